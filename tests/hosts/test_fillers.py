"""Heads that pool by attention without a mask: samples that keep different numbers of rows are refused, not misread."""

from __future__ import annotations

import pytest
import torch

import fewer
from fewer.hosts import HostError
from fewer.testing import TinyHost

RAGGED = "rlt"  # its threshold decides how many rows a clip keeps


def clips() -> torch.Tensor:
    """Two clips: one moves, one stands still behind its first half."""
    x = TinyHost("vjepa2").batch[:2].clone()
    x[1, x.shape[1] // 2 :] = x[1, x.shape[1] // 2]
    return x


def test_a_head_that_takes_padding_for_rows_is_known():
    model = TinyHost("vjepa2").model()
    with (
        fewer.apply(model, RAGGED) as session,
        pytest.raises(HostError, match="numbers of rows of their own"),
        torch.no_grad(),
    ):
        model(clips())
    assert session.host.reads_fillers


def test_equal_numbers_go_on():
    model = TinyHost("vjepa2").model()
    with fewer.apply(model, "rlt:keep=0.5"), torch.no_grad():
        model(clips())


@pytest.mark.parametrize("kind", ["videomae", "vit"])
def test_heads_that_pool_by_a_mean_or_a_class_token_take_different_numbers(kind: str):
    host = TinyHost(kind)
    method = RAGGED if kind == "videomae" else "evit:mass=0.5,fuse=false,layers=1"
    model = host.model()
    x = clips() if kind == "videomae" else host.batch
    with fewer.apply(model, method) as session, torch.no_grad():
        both = model(x).logits
        assert not session.host.reads_fillers
        alone = torch.cat([model(x[i : i + 1]).logits for i in range(len(x))])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-4)
