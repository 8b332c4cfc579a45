"""Rho-1, selective language modelling (Lin et al., NeurIPS 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer
from fewer.core.written import plan


@reducer("rho1", paper="arXiv:2404.07965", acts="prune", on="loss", training="free")
@dataclass(frozen=True)
class Rho1(Reducer):
    """Tokens teach that cost the model more than a reference model: what can be learned and is not yet.

    A token's excess is its loss minus the reference's, signed; the largest teach. Noise costs both the same.

    budget: share of the tokens that teach. over: what they are ranked in, the whole "batch" (on several processes, of
    all of them) or each "sample".
    """

    budget: Budget = KeepRatio(0.6)
    layers: tuple[int, ...] | None = None
    over: Literal["batch", "sample"] = "batch"
    site: ClassVar[Site] = Site.LOSS

    def __post_init__(self) -> None:
        if not isinstance(self.budget, KeepRatio) or isinstance(self.budget.ratio, tuple):
            raise ValueError(f"{self.budget!r}: rho1 takes one share, such as keep=0.6, whatever a batch's length")
        if self.over not in ("batch", "sample"):
            raise ValueError(f"over={self.over!r}: choose batch or sample")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(self.budget, KeepRatio) and isinstance(self.budget.ratio, float | int)
        excess, valid = signals.hidden[..., 0] - signals.reference, tokens.unpadded
        if self.over == "sample":
            return plan(_largest(excess, valid, valid.sum(-1, keepdim=True), self.budget.ratio), tokens)
        flat, there = excess.flatten(), valid.flatten()
        values, real, start = _gathered(flat, there)
        stays = _largest(values[None], real[None], real.sum(), self.budget.ratio)[0]
        return plan(stays[start : start + len(flat)].view_as(valid), tokens)


def _largest(scores: Tensor, valid: Tensor, number: Tensor, share: float) -> Tensor:
    """(B, N) bool: in each row the floor(share * number) largest, one at least; of equals the first."""
    order = scores.masked_fill(~valid, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    count = (number * share + 1e-9).floor().clamp(min=1)  # 10 * 0.7 is 7 here as on paper
    first = torch.arange(scores.shape[-1], device=scores.device) < count
    return torch.zeros_like(valid).scatter(-1, order, first.expand_as(order)) & valid


def _many() -> bool:
    return torch.is_grad_enabled() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gathered(scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, int]:
    """Those of all processes, in their order, and where this process's begin."""
    if not _many():
        return scores, valid, 0
    sizes = [torch.zeros(1, dtype=torch.long, device=scores.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(scores)], device=scores.device))
    lengths = [int(size) for size in sizes]
    mine = torch.stack([scores, valid.to(scores.dtype)])
    mine = torch.nn.functional.pad(mine, (0, max(lengths) - len(scores)))
    every = [torch.empty_like(mine) for _ in lengths]
    dist.all_gather(every, mine)
    values, real = torch.cat([one[:, :n] for one, n in zip(every, lengths, strict=True)], 1)
    return values, real > 0, sum(lengths[: dist.get_rank()])
