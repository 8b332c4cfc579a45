"""The recipe that trains a method's modules, on a model and pictures small enough for a test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fewer
from fewer.datasets.images import ImageSet
from fewer.recipes.reduce import Reduction, train
from fewer.runtime.modules import read_card
from vit import tiny_vit


def processor(pictures: Sequence[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 128.0 - 1 for p in pictures])


def pictures(count: int, seed: int) -> ImageSet:
    """Grey noise with a bright square, whose corner is the class."""
    generator = np.random.default_rng(seed)
    labels = torch.arange(count) % 4
    pixels = generator.integers(0, 60, (count, 32, 32, 3)).astype(np.uint8)
    for i, label in enumerate(labels.tolist()):
        y, x = 20 * (label // 2), 20 * (label % 2)
        pixels[i, y : y + 10, x : x + 10] = 250
    return ImageSet("squares", labels, ("a", "b", "c", "d"), list(pixels))


def run(method: str, out: Path, kind: str = "vit", **changes: object):
    model = tiny_vit(kind, classes=4)
    reduction = Reduction(method, steps=4, batch=8, bfloat16=False, **changes)
    data = (pictures(32, 0), pictures(12, 1))
    report = train(reduction, out, model=(model, processor), data=data, log=lambda _: None)
    return model, report


@pytest.mark.parametrize("method", [
    "dynamicvit:keep=0.5,layers=1+2", "spvit:keep=0.5+0.25,layers=1+2", "heatvit:keep=0.5+0.25,layers=1+2",
    "tps:scorer=dynamicvit,keep=0.5,layers=1+2",
    "tokenlearner:tokens=4,layers=2", "diffrate:layers=1+2+3,granularity=1",
])  # fmt: skip
def test_every_trained_method_trains_saves_and_comes_back(method: str, tmp_path: Path) -> None:
    model, report = run(method, tmp_path)
    reference = tiny_vit("vit", classes=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())  # left as it was
    assert not model.training
    assert set(report.accuracy) == {"trained", "unreduced", "untrained", "random", "cls_topk"}
    assert report.gflops < report.gflops_full
    name = method.partition(":")[0]
    card = read_card(tmp_path / f"{name}.safetensors")
    assert json.loads(card["recipe"])["steps"] == 4
    assert json.loads(card["accuracy"]) == report.accuracy
    with fewer.apply(model, method, modules=tmp_path) as session, torch.no_grad():
        logits = model(processor([pictures(12, 1).image(i) for i in range(12)])).logits
        assert session.counts == report.tokens
    right = (logits.argmax(-1) == pictures(12, 1).labels).float().mean().item()
    assert right == pytest.approx(report.accuracy["trained"], abs=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4


def test_the_modules_move_and_the_seed_decides_where(tmp_path: Path) -> None:
    states = []
    for i, seed in enumerate((0, 0, 1)):
        model, _ = run("dynamicvit:keep=0.5,layers=1+2", tmp_path / str(i), seed=seed)
        with fewer.apply(model, "dynamicvit:keep=0.5,layers=1+2", modules=tmp_path / str(i)) as session:
            states.append(torch.cat([p.flatten() for p in session.modules.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_the_model_learns_too_if_asked(tmp_path: Path) -> None:
    model = tiny_vit("vit", classes=4)
    before = [p.clone() for p in model.parameters()]

    class Saved:
        __call__ = staticmethod(processor)

        def save(self, folder: Path) -> None:
            (folder / "preprocessor_config.json").write_text("{}")

    reduction = Reduction("tokenlearner:tokens=4,layers=2", steps=2, batch=8, backbone=0.1, bfloat16=False)
    train(reduction, tmp_path, model=(model, Saved()), data=(pictures(16, 0), pictures(8, 1)), log=lambda _: None)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "preprocessor_config.json").is_file()


def test_learned_counts_are_reported_as_a_method(tmp_path: Path) -> None:
    model, report = run("diffrate:layers=1+2+3,granularity=1", tmp_path)
    with fewer.apply(model, report.found) as session, torch.no_grad():
        model(processor([pictures(1, 1).image(0)]))
        assert session.counts == report.tokens


def test_a_method_with_nothing_to_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tome has nothing to train"):
        run("tome", tmp_path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"steps": 0}, "steps=0"), ({"token_loss": "l1"}, "token_loss='l1'"), ({"cost": 0.0}, "cost=0.0")],
)
def test_parameters_out_of_range_are_named(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Reduction(**wrong)


def test_timm_models_train_too(tmp_path: Path) -> None:
    _, report = run("dynamicvit:keep=0.5,layers=1+2", tmp_path, kind="timm")
    assert report.tokens == [17, 9, 5, 5]
