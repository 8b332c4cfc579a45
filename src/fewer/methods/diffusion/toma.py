"""ToMA: destinations that cover the others best, and merging as a product of matrices. ICML 2025."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.core import BudgetError, Plan, Signals, Tokens, reducer
from fewer.core.denoising import OperationReducer
from fewer.core.match import unit


@reducer("toma", paper="ToMA, ICML 2025", acts="merge", on="diffusion", training="free")
@dataclass(frozen=True)
class ToMA(OperationReducer):
    """In each window of the grid tokens are chosen one by one, each the one that adds most to how well all are covered;
    every token then shares itself out among them, and takes their answers back in the same shares.

    ratio: share of the tokens that is merged; each window keeps the same number, at least one.
    window: edge of a window; where the grid does not divide, the next smaller edge that divides it.
    temperature: of the softmax over cosines by which a token shares itself out. The paper's was not at hand: 0.1 is
    ours.
    reuse: steps for which a block keeps destinations and shares; 1 = none.
    max_downsample: blocks on grids that are at most so many times coarser than the finest.
    attention, cross, mlp: around which operations.
    """

    ratio: float = 0.5
    window: int = 8
    temperature: float = 0.1
    reuse: int = 1
    max_downsample: int = 1
    attention: bool = True
    cross: bool = False
    mlp: bool = False
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.window, self.reuse, self.max_downsample) < 1 or self.temperature <= 0:
            raise BudgetError(
                f"window={self.window}, reuse={self.reuse}, max_downsample={self.max_downsample}: at least one; "
                f"temperature={self.temperature}: above zero"
            )

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert signals.grid is not None
        kept: Plan | None = signals.memory.get("plan")
        step = signals.moment.step
        fits = kept is not None and kept.n == tokens.n and kept.lead == (tokens.batch,)
        if kept is not None and fits and step - signals.memory["step"] < self.reuse:
            return kept
        places = _windows(signals.grid, self.window, signals.device)  # (W, n)
        u = unit(signals.hidden)[:, places]  # (B, W, n, C)
        count = max(1, round(self.budget.keep(tokens.n, signals.at) / len(places)))
        like = u @ u.transpose(-1, -2)
        signals.at.spend(2 * places.numel() * places.shape[1] * u.shape[-1])
        chosen = covering(like, count)
        share = (like.gather(2, chosen[..., None].expand(*chosen.shape, like.shape[-1])) / self.temperature).softmax(2)
        matrix = torch.zeros(tokens.batch, len(places) * count, tokens.n, device=u.device)
        rows = torch.arange(len(places) * count, device=u.device).view(len(places), count, 1)
        matrix[:, rows, places[:, None]] = share
        position = torch.gather(places.expand(tokens.batch, -1, -1), 2, chosen).flatten(1)
        made = Plan.soft(matrix / matrix.sum(-1, keepdim=True).clamp_min(1e-12), mass=matrix, position=position)
        signals.memory |= {"plan": made, "step": step}
        return made


def covering(like: Tensor, count: int) -> Tensor:
    """The places of those that cover all best, chosen greedily: each adds most to sum_i max_j like[i, j] over the
    chosen j. like: (..., n, n). Returns (..., count), ascending."""
    best = torch.full(like.shape[:-1], -1.0, device=like.device)
    taken = torch.zeros(like.shape[:-1], dtype=torch.bool, device=like.device)
    for _ in range(count):
        gain = (like - best[..., None]).clamp_min(0).sum(-2).masked_fill(taken, -1)
        pick = gain.argmax(-1, keepdim=True)
        taken = taken.scatter(-1, pick, True)
        best = torch.maximum(best, like.gather(-1, pick[..., None, :].expand(*like.shape[:-1], 1))[..., 0])
    return taken.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


def _windows(grid: tuple[int, int], edge: int, device: torch.device) -> Tensor:
    """(W, n): the places of each window."""
    height, width = grid
    h, w = (next(e for e in range(min(edge, side), 0, -1) if side % e == 0) for side in grid)
    places = torch.arange(height * width, device=device).view(height // h, h, width // w, w)
    return places.transpose(1, 2).reshape(-1, h * w)
