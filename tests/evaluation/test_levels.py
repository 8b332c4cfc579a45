"""Verdicts: who is told apart from random at a budget, with how many compared at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fewer.evaluation import stats
from fewer.evaluation.bench import against_random
from fewer.evaluation.levels import levels, near
from fewer.evaluation.record import Row
from fewer.evaluation.settings import UNREDUCED
from studio.made import BASE, N, row

RANDOM = row("random:keep=0.5", np.arange(N) < 340, 100, 2.0)


def right(count: int, *, also: int = 0) -> np.ndarray:
    """The first `count` items, and `also` of the last ones."""
    return (np.arange(N) < count) | (np.arange(N) >= N - also)


def test_a_level_is_a_random_row_and_what_was_measured_at_its_tokens() -> None:
    rows = [
        row(UNREDUCED, BASE, 197, 1.0), RANDOM, row("random:keep=0.3", right(300), 60, 3.0),
        row("good:r=1", right(358), 101, 1.9), row("bad:r=1", right(300), 99, 1.9), row("far:r=1", right(360), 80, 2.0),
        row("raw:r=1", right(390), 100, 1.9, trained="untrained"), row("low:r=2", right(310), 61, 2.9),
        row("oracle:tokens=3", right(400), 100, 2.0), replace(row("broken", BASE, 100, 1.0), error="E: no"),
    ]  # fmt: skip
    half, third = levels(rows)
    assert [r.method for r in half.rows] == ["good:r=1", "bad:r=1"]
    assert [r.method for r in third.rows] == ["low:r=2"]
    assert half.random is RANDOM
    assert half.decided
    assert half.gains[0].value == pytest.approx(18 / N)
    assert half.gains[1].high < 0


def test_the_best_of_many_must_clear_more() -> None:
    """One that is told apart alone is not, as the best of thirty."""
    rival = row("good:r=1", right(349, also=1), 100, 1.9)
    alone = [row(UNREDUCED, BASE, 197, 1.0), RANDOM, rival]
    crowd = [*alone, *(row(f"same:r={i}", right(339), 100, 1.9) for i in range(29))]
    assert levels(alone)[0].decided
    assert not levels(crowd)[0].decided
    assert levels(crowd)[0].rows[0] is rival
    one, many = (against_random(rival, crowd, among=k) for k in (1, 30))
    assert one is not None and many is not None  # noqa: PT018
    assert many.low < one.low < one.value < one.high < many.high
    assert levels(crowd)[0].resolves == pytest.approx(max((g.high - g.low) / 2 for g in levels(crowd)[0].gains))


def test_near_is_a_statement_about_intervals() -> None:
    base, rows = row(UNREDUCED, BASE, 197, 1.0), [row("good:r=1", right(358), 100, 1.9), RANDOM]
    slow = row("slow:r=1", BASE, 100, 0.9)
    found = near([base, *rows, slow], 0.01)
    assert found is not None
    assert not found.within  # half a point is lost, and more cannot be excluded with 400 items
    assert [r.method for r in found.rows] == ["good:r=1", "random:keep=0.5"]
    assert found.losses[0].low < -0.01
    large = [large_row(r) for r in (base, *rows)]
    wide = near(large, 0.02)
    assert wide is not None
    assert [r.method for r in wide.within] == ["good:r=1"]
    assert near([base, slow], 0.01) is None
    assert near(rows, 0.01) is None


def large_row(made: Row) -> Row:
    """The same shares on fifty times as many items."""
    return replace(made, n=50 * N, hits=stats.pack_hits(np.tile(stats.unpack_hits(made.hits, N), 50)))
