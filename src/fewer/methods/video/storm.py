"""STORM's token compression: pool over time, pool over space, or skip frames. arXiv:2503.04130, sec. 3.2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fewer.core import Budget, KeepRatio, Plan, PlanError, Reducer, Signals, Site, Tokens, reducer
from fewer.core.spacetime import Rectangle, spread


@reducer("storm", paper="arXiv:2503.04130", acts="pool", on="video", training="optional",
         exempt={"budget_is_met": "runs of frames, or squares of patches, become one: at most what the budget grants",
                 "padding_changes_nothing": "it pools a whole grid, so ragged input is refused"})  # fmt: skip
@dataclass(frozen=True)
class STORM(Reducer):
    """Mean of the same patch over runs of frames, of squares of patches in each frame, or every so-manieth frame.

    budget: share of the tokens that stays: one in k, k whole (for "space" a whole square); rounded down.
    over: "time", "space" or "skip".

    The paper mixes frames in front of this with a trained state-space projector; in an encoder with attention over
    space and time the blocks before do. Without any mixing it is the baseline the paper measures itself against.
    """

    budget: Budget = KeepRatio(0.25)
    layers: tuple[int, ...] | None = (2,)
    over: Literal["time", "space", "skip"] = "time"
    site: ClassVar[Site] = Site.BEFORE_BLOCK

    def __post_init__(self) -> None:
        if self.over not in ("time", "space", "skip"):
            raise ValueError(f"over={self.over!r}: time, space or skip")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        shape, p = Rectangle.of(signals, tokens, "storm"), tokens.prefix
        run = -(-tokens.free_count // self.budget.keep(tokens.free_count, signals.at))
        if self.over == "skip":
            k = max(1, shape.frames // run)
            Rectangle(k, shape.cells, p).keep_in(signals)
            kept = spread(shape.frames, k, signals.device).expand(tokens.batch, -1)
            return shape.of_frames(Plan.keep(kept, shape.frames))
        if self.over == "time":
            frame = torch.arange(shape.frames, device=signals.device) // run
            left = Rectangle(-(-shape.frames // run), shape.cells, p)
            plan = shape.of_frames(Plan.from_rows(frame.expand(tokens.batch, -1), left.frames))
        else:
            _, height, width = signals.space
            if height * width != shape.cells:
                raise PlanError(f"storm:over=space needs whole frames of {height} x {width}; {shape.cells} are left")
            side = next(s for s in range(1, shape.cells + 1) if s * s >= run)
            place = torch.arange(shape.cells, device=signals.device)
            across = -(-width // side)
            cell = place // width // side * across + place % width // side
            left = Rectangle(shape.frames, -(-height // side) * across, p)
            rows = cell.expand(tokens.batch * shape.frames, -1)
            plan = shape.of_groups(Plan.from_rows(rows, left.cells))
        left.keep_in(signals)
        return plan.averaged(tokens.size)
