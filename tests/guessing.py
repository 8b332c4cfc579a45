"""Models and heads that guess, for tests of what is written several tokens a pass."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import nn

from decoders import decoder
from fewer.generation import Chained, Layers


@cache
def exact(family: str) -> Any:
    """In float64, so that no two tokens tie by rounding."""
    return copy.deepcopy(decoder(family)).double()


def heads_for(model: nn.Module, kind: str | None) -> Any:
    """Heads that are wrong in their own way each: guesses must do no harm."""
    if kind is None:
        return None
    torch.manual_seed(1)
    heads = {"chained": Chained, "layers": Layers}[kind].of(model, 3)
    for p in heads.parameters():
        nn.init.normal_(p, std=0.3)
    return heads.double()
