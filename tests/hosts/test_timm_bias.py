"""timm's blocks that make a position bias between all tokens themselves: what is left keeps its own part of it."""

from __future__ import annotations

import pytest
import torch

import fewer
import tvstub
from fewer.runtime.program import SessionError
from fewer.runtime.sites import blocks

TOLERANCE = 1e-5  # logits are around one


@pytest.fixture(params=["own", "shared"])
def beit(request: pytest.FixtureRequest) -> torch.nn.Module:
    """BEiT with a bias of each block, or one that all share. Random, and large enough to matter."""
    torch.manual_seed(0)
    bias = dict(use_rel_pos_bias=request.param == "own", use_shared_rel_pos_bias=request.param == "shared")
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4)
    model = tvstub.timm.create_model("beit_base_patch16_224", **sizes, **bias).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("method", ["tome:r=3", "evit:keep=0.7,layers=1+2", "random:keep=0.5,layers=0+2,site=before"])
def test_what_left_is_what_is_hidden(beit: torch.nn.Module, method: str):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    out = {}
    for execution in ("padded", "masked"):
        with fewer.apply(beit, method, execution=execution) as session, torch.no_grad():
            out[execution] = beit(x)
            counts = session.counts
    assert counts[-1] < 17
    assert not torch.allclose(out["padded"], beit(x), atol=1e-2)
    torch.testing.assert_close(out["padded"], out["masked"], atol=TOLERANCE, rtol=0)


def test_bias_of_other_rows_would_be_noticed(beit: torch.nn.Module, monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    run = next(kind for kind in vars(blocks).values() if isinstance(kind, type) and "_fit" in vars(kind))
    monkeypatch.setattr(run, "_fit", lambda self, full: full[..., : self.tokens.n, : self.tokens.n])
    with torch.no_grad():
        with fewer.apply(beit, "tome:r=3"):
            wrong = beit(x)
        with fewer.apply(beit, "tome:r=3", execution="masked"):
            right = beit(x)
    assert (wrong - right).abs().max() > 10 * TOLERANCE


def test_packed_rows_cannot_carry_it(beit: torch.nn.Module):
    with pytest.raises(SessionError, match="execution='padded'"):
        fewer.apply(beit, "tome:r=3", execution="packed")
