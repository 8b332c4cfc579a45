"""TESTA: merge frames that look alike, then patches inside each frame. arXiv:2310.19060, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewer.core import Budget, Plan, Reducer, Remove, Signals, Tokens, reducer
from fewer.core.spacetime import Rectangle, merge_cells, merge_frames


@reducer("testa", paper="arXiv:2310.19060", acts="merge", on="video", training="optional",
         exempt={"budget_is_met": "its budget counts the patches of a frame, and frames merge besides",
                 "padding_changes_nothing": "frames merge as wholes, so ragged input is refused"})  # fmt: skip
@dataclass(frozen=True)
class TESTA(Reducer):
    """Temporal and spatial aggregation: in every block whole frames merge, then patches within their frame.

    budget: patches of each frame that stay or go.
    frames: whole frames that go in every block besides, at most half of them.
    order: of the rows that are left, which decides who can pair in the next block: by "position", or "halves", the
        rest of the even ones in front of the odd ones, as in the authors' code.
    vote: a frame ranks by the "mean" of its patches' similarities; "least" is what the authors' code takes.

    Written for divided attention, where frames merge behind temporal and patches behind spatial attention. In a model
    with one attention over space and time both happen behind it, by the same keys; class tokens stay out of it.
    """

    budget: Budget = Remove(12)
    frames: int = 1
    layers: tuple[int, ...] | None = None
    order: Literal["position", "halves"] = "position"
    vote: Literal["mean", "least"] = "mean"
    proportional: bool = False

    def __post_init__(self) -> None:
        if self.frames < 0:
            raise ValueError(f"frames={self.frames}: frames that go in each block, 0 or more")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        shape, metric = Rectangle.of(signals, tokens, "testa"), signals.key
        goes = Remove(min(self.frames, max(shape.frames // 2, 0)))
        first = merge_frames(metric, shape, goes, tokens, at=signals.at, vote=self.vote, order=self.order)
        left = Rectangle(shape.frames - goes.at(0, 1), shape.cells, shape.prefix)
        between = tokens.after(first)
        then = merge_cells(first.reduce(metric), left, self.budget, between, at=signals.at, order=self.order)
        Rectangle(left.frames, (then.m - shape.prefix) // left.frames, shape.prefix).keep_in(signals)
        return first.then(then)
