"""The recipes for videos: clips with known answers, a classifier, and modules of methods on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fewer
from fewer.datasets import clips
from fewer.datasets.images import DataError
from fewer.models.zoo import load_model
from fewer.recipes import actions, watch
from fewer.recipes.actions import Recipe


# -- clips ------------------------------------------------------------------------------------------------------------
def test_clips_are_what_their_answers_say() -> None:
    asked = clips.exam(64)
    questions = list(clips.QUESTIONS)
    centre = (asked.box[..., :2] + asked.box[..., 2:]) / 2
    side = asked.box[..., 2] - asked.box[..., 0]
    ahead = torch.tensor([[-1.0, 0], [0, 1.0], [1.0, 0], [0, -1.0]])
    for i in range(64):
        action, way, _, slot = asked.answers[i].tolist()
        step = centre[i, 1] - centre[i, 0]
        assert float(step @ ahead[way]) == pytest.approx(float(step.norm()), rel=0.1)  # starts in that direction
        gone = (centre[i, -1] - centre[i, 0]).norm()
        far = (centre[i] - centre[i, 0]).norm(dim=-1).max()
        assert (gone > 15) == (action in (0, 3))
        assert far > 10
        assert (side[i, -1] > 1.5 * side[i, 0]) == (action == 3)
        # the bag is in the last frame of its slot and in no other
        top, left, bottom, right = asked.flash[i].round().long().tolist()
        patch = asked.pixels[i, :, top + 4 : bottom - 4, left + 4 : right - 4].float()
        still = patch.diff(dim=0).abs().mean((1, 2))
        moving = asked.moving()[i].flatten(1).any(1)
        assert moving.all()
        if not _overlap(asked.box[i], asked.flash[i]):
            assert int(still.argmax()) in (2 * slot, 2 * slot + 1)
    assert questions == ["action", "direction", "order", "moment"]


def _overlap(box: torch.Tensor, flash: torch.Tensor) -> bool:
    low, high = torch.maximum(box[:, :2], flash[:2]), torch.minimum(box[:, 2:], flash[2:])
    return bool((high > low).all(-1).any())


def test_things_stay_inside_and_are_where_the_tokens_say() -> None:
    for level in clips.LEVELS:
        asked = clips.exam(16, level)
        assert bool((asked.box >= -2).all()), level
        assert bool((asked.box <= clips.SIZE + 2).all()), level
        share = asked.moving().float().mean()
        assert 0.03 < float(share) < 0.3
        flashed = asked.flashed().flatten(2).any(-1)
        assert bool((flashed.sum(-1) <= 1).all())
        assert bool(flashed.any(-1).float().mean() > 0.9)


def test_the_same_seed_is_the_same_exam_and_levels_differ_in_what_they_say() -> None:
    first, again, other = clips.exam(4), clips.exam(4), clips.exam(4, seed=1)
    assert torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.pixels, other.pixels)
    still = {level: clips.exam(8, level).pixels.float() for level in ("plain", "camera")}
    edge = {k: (v[:, 1:, :3, :3] - v[:, :-1, :3, :3]).abs().mean() for k, v in still.items()}
    assert edge["camera"] > edge["plain"]


@pytest.mark.parametrize(
    ("call", "says"),
    [(lambda: clips.exam(4, "huge"), "'huge'"), (lambda: clips.exam(0), "n=0"),
     (lambda: clips.Setting(side=(30, 40)), "side="), (lambda: clips.Setting(clutter=(3, 1)), "clutter=")],
)  # fmt: skip
def test_clips_that_cannot_be(call: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        call()


# -- recipes ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def on_test_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training pictures are no part of the package."""
    monkeypatch.setattr(clips, "fashion_mnist", lambda split: clips.embedded())
    clips._bank.cache_clear()


def test_a_short_run_can_be_loaded_and_reduced(tmp_path: Path, on_test_pictures: None) -> None:
    recipe = Recipe(clips=24, batch=8, depth=2, width=32, heads=2, phases=((0.5, 0.3), (0.5, 1.0)), bfloat16=False)
    report = actions.train(tmp_path, recipe, log=lambda line: None)
    assert report.steps == 3
    assert set(report.accuracy) == set(clips.LEVELS)
    model, processor = load_model(tmp_path)
    assert type(model).__name__ == "VideoMAEForVideoClassification"
    assert processor.size == (56, 56)
    with fewer.apply(model, "frames:keep=0.5") as session, torch.no_grad():
        out = model(pixel_values=actions.pixels(clips.exam(2))).logits
    assert out.shape == (2, 18)
    assert session.counts == [196, 196]
    again = actions.train(tmp_path / "on", replace(recipe, start=str(tmp_path)), log=lambda line: None)
    assert again.steps == 3


@pytest.mark.parametrize("form", ["stts:keep=0.5", "stts:by=windows,keep=0.6", "ts2_net:keep=0.5,layers=1",
                                  "vtm:targets=learned,keep=0.5,layers=1"])  # fmt: skip
def test_modules_learn_and_the_model_stays(form: str, tmp_path: Path, on_test_pictures: None) -> None:
    torch.manual_seed(0)
    model = actions.build(Recipe(width=32, depth=2, heads=2))
    torch.nn.init.normal_(model.classifier.weight)  # type: ignore[arg-type]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = watch.Watching(form, steps=2, batch=2, test=8, bfloat16=False)
    report = watch.train(run, tmp_path, model=model, log=lambda line: None)
    assert set(report.accuracy) == {"unreduced", "trained", "untrained"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation != "fewer_float32_attention"
    with fewer.apply(model, form, modules=str(tmp_path)) as session:
        fresh = fewer.apply(actions.build(Recipe(width=32, depth=2, heads=2)), form, modules="untrained")
        pairs = zip(session.modules.parameters(), fresh.modules.parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs)


def test_what_cannot_be_trained_says_so(tmp_path: Path, on_test_pictures: None) -> None:
    model = actions.build(Recipe(width=32, depth=1, heads=2))
    with pytest.raises(ValueError, match="has nothing to train"):
        watch.train(watch.Watching("testa"), tmp_path, model=model)
    with pytest.raises(ValueError, match="steps=0"):
        watch.Watching(steps=0)
    with pytest.raises(ValueError, match="add up to 1"):
        Recipe(phases=((0.5, 0.5),))
