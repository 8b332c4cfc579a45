"""Small random inputs for the tests of the algebra, some of them full of ties, and the golden files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from fewer.core import Tokens

GOLDENS = Path(__file__).parent / "goldens"
LENGTHS = (1, 2, 7, 16, 33)
DTYPES = (torch.float32, torch.bfloat16)

seeds = st.integers(0, 2**31 - 1)
lengths = st.sampled_from(LENGTHS)
batches = st.integers(1, 3)
prefixes = st.integers(0, 2)
dtypes = st.sampled_from(DTYPES)


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays of one golden file as tensors, and its settings."""
    with np.load(GOLDENS / f"{name}.npz") as z:
        config = json.loads(str(z["config"]))
        arrays = {k: torch.from_numpy(z[k]) for k in z.files if k != "config"}
    return {k: v.long() if not v.is_floating_point() else v for k, v in arrays.items()}, config


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tied(seed: int, batch: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, N, 4) of +-1: at most 16 different vectors, so that many pairs are equally alike. Every cosine and every
    squared distance is exact in float32."""
    return torch.randint(0, 2, (batch, n, 4), generator=torch.Generator().manual_seed(seed)).mul(2).sub(1).to(dtype)


def tied_scores(seed: int, batch: int, n: int) -> Tensor:
    """(B, N) in quarters from 0 to 1."""
    return torch.randint(0, 5, (batch, n), generator=torch.Generator().manual_seed(seed)) / 4


def plain(metric: Tensor, prefix: int, size: Tensor | None = None) -> Tokens:
    return Tokens.plain(metric.shape[0], metric.shape[1], prefix, size=size)


def padded(x: list[Tensor], fill: float) -> tuple[Tensor, Tensor]:
    """Samples of different length side by side, the rest filled; and which entries are real."""
    n = max(len(v) for v in x)
    out = torch.full((len(x), n, *x[0].shape[1:]), fill, dtype=x[0].dtype)
    valid = torch.zeros(len(x), n, dtype=torch.bool)
    for i, v in enumerate(x):
        out[i, : len(v)] = v
        valid[i, : len(v)] = True
    return out, valid


def partition(label: list[int]) -> list[int]:
    """Labels renamed in order of appearance."""
    names: dict[int, int] = {}
    return [names.setdefault(v, len(names)) for v in label]
