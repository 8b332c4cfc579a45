"""SiTo: keep what stands for its surroundings, drop what is like it, copy it back. AAAI 2025."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.core import BudgetError, Hard, Plan, Signals, Tokens, reducer
from fewer.core.denoising import OperationReducer, best_of_cells
from fewer.core.match import unit
from fewer.core.plan import complement, take


@reducer("sito", paper="SiTo, AAAI 2025", acts="prune", on="diffusion", training="free")
@dataclass(frozen=True)
class SiTo(OperationReducer):
    """Of each cell the token that is most like all others is a base; the tokens most like a base are dropped, and get
    back what the most similar of all that stayed was given.

    ratio: share of the tokens that is dropped, rounded down; bases stay, so that of cells of 2 x 2 no more than three
    quarters can go.
    cell: edge of a cell. max_downsample: blocks on grids that are at most so many times coarser than the finest.
    likeness, noise: weights of the mean similarity to all tokens and of a normal draw. What the paper sets them to was
    not at hand: 1 and 0.1 are ours.
    seed: of the draw, which depends on step and block alone.
    """

    ratio: float = 0.5
    cell: int = 2
    max_downsample: int = 1
    likeness: float = 1.0
    noise: float = 0.1
    seed: int = 0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cell < 2 or self.max_downsample < 1:
            raise BudgetError(f"cell={self.cell}, max_downsample={self.max_downsample}: at least 2 and 1")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert signals.grid is not None
        if min(signals.grid) < self.cell:
            signals.at.note(f"layer {signals.at.layer}: a grid of {signals.grid[0]} x {signals.grid[1]} holds no cell "
                            f"of {self.cell} x {self.cell}; nothing was dropped there")  # fmt: skip
            return tokens.unchanged(signals.device)
        n, u = tokens.n, unit(signals.hidden)
        bases = self._bases(u, signals)  # (B, D)
        others = complement(bases, n)
        signals.at.spend(2 * others.shape[1] * (bases.shape[1] + n - others.shape[1]) * u.shape[-1])
        like = (take(u, others) @ take(u, bases).transpose(1, 2)).amax(-1)
        asked = n - self.budget.keep(n, signals.at)
        if asked > others.shape[1]:
            signals.at.note(f"layer {signals.at.layer}: asked to drop {asked} of {n} tokens, {others.shape[1]} can go")
        gone = like.sort(dim=-1, descending=True, stable=True).indices[:, : min(asked, others.shape[1])]
        dropped = others.gather(1, gone)
        kept = complement(dropped, n)
        nearest = (take(u, dropped) @ take(u, kept).transpose(1, 2)).argmax(-1)
        nothing = torch.zeros(dropped.shape, device=dropped.device)
        return Hard(n, kept, dropped, nearest, torch.ones_like(kept, dtype=nothing.dtype), nothing, whole=True)

    def _bases(self, u: Tensor, signals: Signals) -> Tensor:
        """One token of each cell, ascending, (B, cells)."""
        n = u.shape[1]
        grid = signals.grid
        assert grid is not None
        score = self.likeness * (u @ u.mean(1)[..., None])[..., 0]
        if self.noise:
            place = torch.arange(n, device=u.device)
            drawn = signals.moment.draw(place, self.seed, signals.at.layer).clamp(1e-6, 1 - 1e-6)
            score = score + self.noise * torch.erfinv(2 * drawn - 1) * 2**0.5
        best = best_of_cells(score, grid, self.cell)
        cells = (grid[0] // self.cell) * (grid[1] // self.cell)
        return best.sort(dim=-1, descending=True, stable=True).indices[:, :cells].sort(dim=-1).values
