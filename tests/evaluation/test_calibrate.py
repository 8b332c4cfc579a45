"""Predicted costs equal measured ones for every method with fixed counts; calibration meets its target."""

from __future__ import annotations

import pytest
import torch

import fewer
from fewer.core import BudgetError
from fewer.evaluation.calibrate import calibrate, model_grid, predict
from fewer.runtime.modules import UNTRAINED
from fewer.testing.models import images, tiny_vit

SHAPE = {"image": 48, "patch": 8, "depth": 10}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_vit("vit", **SHAPE)


@pytest.mark.parametrize("name", sorted(n for n, c in fewer.registered().items() if c.card.on == "vision"))
def test_prediction_equals_a_forward_pass(name: str, model: torch.nn.Module) -> None:
    method = fewer.lookup(name)()
    depth = SHAPE["depth"]
    if method.layers is not None:
        method = fewer.parse(method, layers=tuple(layer for layer in method.layers if layer < depth))
    if method.adaptive:
        with pytest.raises(BudgetError, match="depends on the image"):
            predict(method, model)
        return
    with fewer.apply(model, method, modules=UNTRAINED if _has_modules(method) else None) as session, torch.no_grad():
        model(images(image=48))
        ledger = session.ledger
    found = predict(method, model)
    assert found.entries == ledger.entries
    assert found.gflops == ledger.gflops
    assert found.notes == ledger.notes


def _has_modules(method: fewer.Reducer) -> bool:
    return bool(method.modules(32, 4, 1, 36))


@pytest.mark.parametrize(
    ("form", "target"),
    [
        ("tome:r=8", 27.0), ("tome:r=2,inflect=-1", 32.0), ("tome:r=4+2+0+2", 30.0), ("evit", 24.0),
        ("evit:keep=0.9+0.5+0.3,of=start", 28.0), ("evit:tokens=20", 22.0), ("evit:tokens=30+20+5", 27.0),
    ],
)  # fmt: skip
def test_target_tokens_are_met(form: str, target: float, model: torch.nn.Module) -> None:
    before = model(images(image=48)).logits
    found = calibrate(form, model, target_tokens=target)
    assert predict(found, model).mean_tokens == pytest.approx(target, rel=0.06)
    assert type(found.budget) is type(fewer.parse(form).budget)
    assert torch.equal(model(images(image=48)).logits, before)


def test_the_nearest_whole_count_is_found(model: torch.nn.Module) -> None:
    best = min(range(13), key=lambda r: abs(predict(f"tome:r={r}", model).mean_tokens - 25))
    assert calibrate("tome", model, target_tokens=25).budget == fewer.Remove(best)


def test_target_gflops_are_met(model: torch.nn.Module) -> None:
    full = predict("tome:r=0", model).gflops
    found = calibrate("evit", model, target_gflops=0.7 * full)
    assert predict(found, model).gflops == pytest.approx(0.7 * full, rel=0.04)


def test_adaptive_methods_calibrate_on_images(model: torch.nn.Module) -> None:
    x = images(4, image=48)
    found = calibrate("evit:mass=0.9,fuse=false", model, target_tokens=25, images=x)
    with fewer.apply(model, found) as session, torch.no_grad():
        model(x)
        assert session.ledger.mean_tokens == pytest.approx(25, rel=0.1)
    with pytest.raises(BudgetError, match="pass images="):
        calibrate("evit:mass=0.9", model, target_tokens=25)


def test_what_cannot_be_reached_is_said(model: torch.nn.Module) -> None:
    with pytest.raises(BudgetError, match=r"tome reaches [\d.]+ to 37 tokens here, not 1000"):
        calibrate("tome", model, target_tokens=1000)
    with pytest.raises(BudgetError, match="give one target"):
        calibrate("tome", model)
    with pytest.raises(BudgetError, match="give one target"):
        calibrate("tome", model, target_tokens=20, target_gflops=1.0)


def test_grid_of_a_model(model: torch.nn.Module) -> None:
    assert model_grid(model) == (6, 6)
