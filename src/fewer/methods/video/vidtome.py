"""VidToMe's local merging: around a block, most frames' tokens are those of one frame. arXiv:2312.10656, sec. 4.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer
from fewer.core.noise import hashed
from fewer.core.spacetime import Rectangle, across_frames, behind_prefix


@reducer("vidtome", paper="arXiv:2312.10656", acts="merge", on="video", training="free",
         exempt={"budget_is_met": "its budget counts tokens of frames that may go; all rows come back",
                 "padding_changes_nothing": "frames merge as wholes, so ragged input is refused",
                 "protected_survive": "all rows are back behind the block; no step is left"})  # fmt: skip
@dataclass(frozen=True)
class VidToMe(Reducer):
    """Around each block, tokens of most frames give way to the most similar ones of every `stride`-th frame.

    budget: share of those tokens that stays (the paper's p = 0.9 go). stride: of the frames that receive.
    aligned: one matching for the whole batch, as the branches of guidance need.
    seed: which frames receive is drawn anew in every block, from the seed and the block's number.

    What goes gets its receiver's row behind the block. The paper puts this around the self-attention of a diffusion
    model and merges again against tokens of earlier chunks.
    """

    budget: Budget = KeepRatio(0.1)
    stride: int = 4
    aligned: bool = False
    seed: int = 0
    site: ClassVar[Site] = Site.AROUND_BLOCK

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"stride={self.stride}: every how-manieth frame receives, 1 or more")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        shape = Rectangle.of(signals, tokens, "vidtome")
        stride = min(self.stride, shape.frames)
        target = hashed(self.seed * 1009 + signals.at.layer) % stride
        receive = len(range(target, shape.frames, stride)) * shape.cells
        others = shape.frames * shape.cells - receive
        stays = self.budget.keep(others, signals.at) if others else 0
        metric = shape.cube(signals.hidden).flatten(1, 2)
        plan = across_frames(metric, shape.frames, target, stays, stride=stride, aligned=self.aligned, at=signals.at)
        return behind_prefix(plan, shape.prefix)
