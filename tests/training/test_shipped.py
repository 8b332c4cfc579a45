"""The trained modules in the package: found, and worth having."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fewer
from fewer.datasets.images import embedded
from fewer.models.zoo import load_model
from fewer.runtime.modules import ASSETS, ModulesError, read_card
from fewer.training import losses

FILES = sorted((ASSETS / "vit-fashion").glob("*-*.safetensors")) + [
    ASSETS / "vit-fashion" / f"{name}.safetensors" for name in ("dynamicvit", "tokenlearner")
]


@cache
def pixels() -> tuple[nn.Module, Tensor]:
    model, processor = load_model("vit-fashion")
    return model, embedded().batch(range(0, 2000, 20), processor)


@cache
@torch.no_grad()
def full() -> Tensor:
    model, x = pixels()
    return model(x).logits


@torch.no_grad()
def answers(method: str, **options: object) -> Tensor:
    model, x = pixels()
    with fewer.apply(model, method, **options):
        return model(x).logits


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_packaged_modules_stay_closer_to_the_model_than_untrained_ones(path: Path) -> None:
    card = read_card(path)
    ours = answers(card["method"])
    assert torch.equal(ours, answers(card["method"], modules=path))  # the very file for the setting
    trained = losses.logit_kl(ours, full())
    torch.manual_seed(1)
    untrained = losses.logit_kl(answers(card["method"], modules="untrained"), full())
    assert trained < 0.6 * untrained
    kl, accuracy = json.loads(card["kl"]), json.loads(card["accuracy"])
    assert trained < 3 * kl["trained"]
    assert accuracy["trained"] > accuracy["untrained"]


def test_a_packaged_method_without_modules_says_so() -> None:
    with pytest.raises(ModulesError, match="the package has none for this model"):
        fewer.apply(pixels()[0], "spvit")
