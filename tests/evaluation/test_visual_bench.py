"""The vision-language benchmark: what its rows say, on the packaged model and a handful of questions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fewer.datasets import scenes
from fewer.evaluation import visual
from fewer.evaluation.record import Row
from fewer.evaluation.settings import UNREDUCED
from fewer.studio import report, table
from fewer.studio.asked import asked

METHODS = ("random:site=bridge,tokens=36", "oracle:tokens=60", "fastv:k=2,keep=0.25", "random:site=bridge,tokens=72")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row], visual.VisualSubject]:
    out = tmp_path_factory.mktemp("bench")
    settings = visual.Settings(methods=METHODS, limit=4, repeats=1)
    subject = visual.load(settings)
    return out, visual.run(settings, out, subject=subject, picture=asked), subject


def score(row: Row, task: str) -> float:
    return next(s.value.value for s in row.scores if s.task == task)


def test_rows_say_what_was_left(measured: tuple) -> None:
    _, (whole, blind, random, oracle, fastv, _), _ = measured
    assert [r.method for r in (whole, blind)] == [UNREDUCED, visual.BLIND]
    assert not any(r.error for r in (whole, blind, random, oracle, fastv))
    assert (whole.tokens, random.tokens, oracle.tokens) == (144, 36, 60)
    assert fastv.tokens == pytest.approx((2 * 144 + 4 * 36) / 6)
    assert fastv.final == 36
    assert score(whole, "recall") == score(whole, "coverage") == 1
    assert score(oracle, "recall") > 0.95 > score(random, "recall")
    assert random.cost.ceiling > fastv.cost.ceiling > 1
    assert whole.accuracy.value > blind.accuracy.value + 0.2


def test_rows_are_not_measured_twice(measured: tuple) -> None:
    out, rows, subject = measured
    again = visual.run(visual.Settings(methods=METHODS, limit=4, repeats=1), out, subject=subject)
    assert [r.passport.when for r in again] == [r.passport.when for r in rows]


def test_table_report_and_pictures(measured: tuple) -> None:
    out, rows, _ = measured
    heads = [c.head for c in table.columns(rows)]
    assert {"presence", "likely", "recall", "coverage", "flooded", "tokens"} <= set(heads)
    assert "KV end" not in heads
    page = report.write(rows, out).read_text()
    assert "oracle:tokens=60" in page
    assert "visual tokens a block reads" in page
    assert "likely but absent, denied" in page
    assert all((out / row.picture).is_file() for row in rows if row.method != visual.BLIND)


def test_a_method_that_fails_becomes_a_row(tmp_path: Path, measured: tuple) -> None:
    settings = visual.Settings(methods=("vscan:shallow=20,tokens=36",), limit=4, repeats=1)
    *_, row = visual.run(settings, tmp_path, subject=measured[2])
    assert "block 20" in row.error


def test_flooded_pictures_differ_in_their_empty_patches_only() -> None:
    question = scenes.exam(4)[0]
    flooded = visual._flood(question)
    for before, after in zip(question.scenes, flooded.scenes, strict=True):
        where = (before.pixels != after.pixels).any(-1).reshape(12, 8, 12, 8).any((1, 3)).reshape(-1)
        assert not (where & before.patches.any(0)).any()
        patches = after.pixels.reshape(12, 8, 12, 8, 3).transpose(0, 2, 1, 3, 4).reshape(144, -1)
        assert len(np.unique(patches[~before.patches.any(0)], axis=0)) == 1


def test_coverage_is_one_where_all_is_kept_and_falls() -> None:
    features = torch.randn(2, 144, 8, generator=torch.Generator().manual_seed(0))
    kept = torch.ones(2, 144, dtype=torch.bool)
    torch.testing.assert_close(visual._coverage(kept, features), torch.ones(2))
    kept[:, 4:] = False
    assert bool((visual._coverage(kept, features) < 0.7).all())


@pytest.mark.parametrize(("wrong", "what"), [({"limit": 1}, "limit=1"), ({"data": "coco"}, "data='coco'")])
def test_settings_are_judged_first(wrong: dict, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        visual.Settings(**wrong)
