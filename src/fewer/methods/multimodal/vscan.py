"""VScan: a scan window by window, one over the whole image; what goes is averaged into what stays. arXiv:2505.22654."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewer.core import Budget, Capacity, Plan, Signals, Tokens, VisualReducer, match, reducer, select

SIDE = 1 << 15  # more than the windows of a tile each way


@reducer("vscan", paper="arXiv:2505.22654", acts="prune+merge", on="multimodal", training="free")
@dataclass(frozen=True)
class VScan(VisualReducer):
    """VScan, two-stage visual token reduction: the stage in front of the language model (Zhang et al., TMLR 2026).

    Local scan: each window of `window` x `window` cells keeps the same number of its tokens, by the class attention of
    a shallow block, where it still follows detail. Global scan: the others by the class attention of the block whose
    output is used. Every token that goes joins the one most similar to it that stays (cosine, behind the projector),
    and these average.

    budget: how many stay, per image. window: cells, each way. overall: the global scan's share of the budget. shallow:
    the tower's block of the local scan, from 0; 5 is for towers of 24 blocks.

    What the windows cannot divide evenly goes to the global scan, so the budget is met (the authors lose it). Windows
    never reach over the edge of a tile or a frame. The second stage, a cut by the last token's attention in the middle
    of the language model, is PyramidDrop with one stage: stack the two. Without a class token attention received takes
    its place.
    """

    budget: Budget = Capacity(64)
    window: int = 6
    overall: float = 0.5
    shallow: int = 5

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window}: a window is at least one cell wide")
        if not 0 <= self.overall <= 1:
            raise ValueError(f"overall={self.overall} is outside [0, 1]; it is the global scan's share of the budget")
        if self.shallow < 0:
            raise ValueError(f"shallow={self.shallow}: blocks of the tower count from 0; the authors' is 5 of 24")

    @property
    def looks_at(self) -> tuple[int | None, ...]:
        return (self.shallow, None)

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        visual, n = signals.visual, tokens.n
        view = visual.view
        count, most = select.allowed(self.budget, tokens, at=signals.at, device=signals.device)
        if tokens.valid is None and most == n:
            return Plan.identity((tokens.batch,), n, signals.device)
        real = tokens.unpadded
        cell = (view.row // self.window) * SIDE + view.column // self.window
        cell = (signals.plane * SIDE * SIDE + cell).masked_fill(~real, -1)
        ranked = select.rank_within(visual.importance(self.shallow), cell)
        windows = (real & (ranked == 0)).sum(-1)  # each has one token that is its first
        local = (count * (1 - self.overall) + 1e-6).floor().long()
        picked = real & (ranked < (local // windows.clamp(min=1))[:, None])

        late = visual.importance().masked_fill(~real | picked, -1)
        rank = select.rank_within(late, torch.zeros_like(cell))
        keep = picked | (real & ~picked & (rank < (count - picked.sum(-1))[:, None]))
        return match.joined(select.counted(keep, tokens, most), signals.hidden, tokens, at=signals.at)
