"""The benchmark of video models: items, scores, probes, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewer.datasets import clips
from fewer.datasets.images import DataError
from fewer.evaluation import stats, video
from fewer.evaluation.subject import SubjectError
from fewer.models.zoo import Processor
from fewer.recipes.actions import CLIPS, Recipe, build
from fewer.studio.strip import strip
from fewer.studio.table import columns, of_language


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made = build(Recipe(width=32, depth=2, heads=2)).eval()
    torch.nn.init.normal_(made.classifier.weight)  # type: ignore[arg-type]
    return made


@pytest.fixture(scope="module")
def rows(model: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    settings = video.Settings(
        methods=("frames:keep=0.5", "rlt:keep=0.5", "tome:r=20", "random:keep=0.5,layers=0,site=before"), limit=12,
        batch=4, repeats=1,
    )  # fmt: skip
    return video.run(settings, tmp_path_factory.mktemp("bench"), subject=video.load(settings, (model, CLIPS)))


def test_every_question_about_every_clip_is_an_item(model: Any, rows: list[Any]) -> None:
    unreduced = rows[0]
    assert not any(row.error for row in rows), [row.error for row in rows]
    asked = clips.exam(12)
    with torch.no_grad():
        logits = model(pixel_values=CLIPS.normalise(asked.pixels[:, :, None])).logits
    parts = logits.split([4, 4, 2, 8], -1)
    right = torch.stack([p.argmax(-1) for p in parts], 1) == asked.answers
    assert unreduced.n == 48
    assert np.array_equal(stats.unpack_hits(unreduced.hits, 48), right.flatten().numpy())
    assert [s.value.value for s in unreduced.scores] == pytest.approx(right.float().mean(0).tolist())


def test_probes_say_what_is_left_of_what_moves(rows: list[Any]) -> None:
    scores = {row.method: {s.task: s for s in row.scores} for row in rows}
    asked = clips.exam(12)
    moving = asked.moving()
    half = moving[:, ::2].flatten(1).sum(1) / moving.flatten(1).sum(1)
    frames = next(v for k, v in scores.items() if k.startswith("frames"))
    assert frames["motion"].value.value == pytest.approx(float(half.mean()), abs=1e-6)
    rlt = next(v for k, v in scores.items() if k.startswith("rlt"))
    assert rlt["motion"].value.value > 0.8  # what changes is what moves
    assert rlt["flash"].value.value > 0.9
    assert "motion" not in scores["unreduced"]


def test_the_table_has_a_column_for_each(rows: list[Any]) -> None:
    heads = {column.head for column in columns(rows)}
    assert set(video.TASKS) <= heads
    assert not of_language(rows)


def test_who_cannot_be_asked(model: Any) -> None:
    from fewer.testing.models import tiny_vit

    with pytest.raises(SubjectError, match="does not answer the questions"):
        video.load(video.Settings(), (tiny_vit("videomae"), Processor((16, 16), (0.5,), (0.5,))))
    with pytest.raises(DataError, match="no clips called 'fashion'"):
        video.load(video.Settings(data="fashion"), (model, CLIPS))


def test_a_short_bench_from_the_command_line(model: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fewer.cli import app

    model.save_pretrained(tmp_path / "m")
    CLIPS.save(tmp_path / "m")
    asked = ["bench", "--model", str(tmp_path / "m"), "--data", "flooded", "--methods", "frames:keep=0.5"]
    done = CliRunner().invoke(app, [*asked, "--limit", "4", "--repeats", "1", "--out", str(tmp_path / "b")])
    assert done.exit_code == 0, done.output
    assert "clips (flooded)" in done.output
    assert (tmp_path / "b" / "report.html").is_file()
    (drawn,) = (tmp_path / "b" / "pictures").glob("frames*.png")
    assert Image.open(drawn).width > 896


def test_a_strip_shows_tubes_in_one_colour_and_fades_what_went() -> None:
    frames = np.full((2, 8, 8), 200, np.uint8)
    frames[1, :, 4:] = 100
    rows = np.array([[[0, 1], [2, -1]], [[0, 3], [2, 4]]])  # the left column is one tube per row
    picture = np.asarray(strip(frames, rows, size=64)).astype(int)
    assert picture.shape == (32, 64, 3)
    assert (picture[8, 40] == picture[8, 8]).all()
    assert (picture[24, 56] == 100).all()
    assert picture[24, 24].tolist() != [200, 200, 200]
    with pytest.raises(ValueError, match="2 frames"):
        strip(frames, rows[0])


def test_the_packaged_model_answers_and_loses_little_at_half_the_tokens() -> None:
    import fewer
    from fewer.models.zoo import load_model
    from fewer.recipes.actions import correct

    packaged, processor = load_model("video-actions")
    asked = clips.exam(100)
    assert processor.size == (clips.SIZE, clips.SIZE)
    full = correct(packaged, asked).float().mean(0)
    assert bool((full[:3] > 0.85).all())
    assert float(full[3]) > 0.3
    with fewer.apply(packaged, "rlt:keep=0.5"):
        half = correct(packaged, asked).float().mean()
    assert float(half) > float(full.mean()) - 0.05
