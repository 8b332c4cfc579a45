"""ToMe for Stable Diffusion: merge tokens before an operation, put the answers back behind it. arXiv:2303.17604."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewer.core import BudgetError, Plan, Signals, Tokens, match, reducer
from fewer.core.denoising import OperationReducer


@reducer("tomesd", paper="arXiv:2303.17604", acts="merge", on="diffusion", training="free")
@dataclass(frozen=True)
class ToMeSD(OperationReducer):
    """In every cell of a grid one token receives; the most similar of the others are averaged into one.

    ratio: share of the tokens that is merged, rounded down; of cells of 2 x 2 no more than three quarters can go.
    sx, sy: width and height of a cell.
    max_downsample: blocks on grids that are at most so many times coarser than the finest are reduced.
    attention, cross, mlp: around which operations; the paper's choice is self-attention alone.
    draws: the receiving token of each cell is drawn anew at each step, the same for all samples; else it is the first.
    seed: of the draw, which depends on step and block alone, so that both branches of guidance merge alike.
    proportional: merged keys weigh as many tokens as they are. Not in the paper.
    """

    ratio: float = 0.5
    sx: int = 2
    sy: int = 2
    max_downsample: int = 1
    attention: bool = True
    cross: bool = False
    mlp: bool = False
    draws: bool = True
    seed: int = 0
    proportional: bool = False
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sx < 1 or self.sy < 1 or self.max_downsample < 1:
            raise BudgetError(
                f"sx={self.sx}, sy={self.sy}, max_downsample={self.max_downsample}: cells and grids are at least one"
            )

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert signals.grid is not None
        height, width = signals.grid
        if height < self.sy or width < self.sx:
            signals.at.note(f"layer {signals.at.layer}: a grid of {height} x {width} holds no cell of "
                            f"{self.sy} x {self.sx}; nothing was merged there")  # fmt: skip
            return tokens.unchanged(signals.device)
        choice = None
        if self.draws:
            cells = torch.arange((height // self.sy) * (width // self.sx), device=signals.device)
            drawn = signals.moment.draw(cells, self.seed, signals.at.layer)
            choice = (drawn * (self.sx * self.sy)).long().view(height // self.sy, width // self.sx)
        return match.grid_bipartite(
            signals.hidden, self.budget, tokens, at=signals.at, grid=(height, width), stride=(self.sy, self.sx),
            choice=choice,
        )  # fmt: skip
