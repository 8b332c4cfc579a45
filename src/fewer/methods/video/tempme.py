"""TempMe: merge inside frames first, then across ever longer clips. arXiv:2409.01156, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from fewer.core import Budget, KeepRatio, Plan, PlanError, Reducer, Remove, Signals, Tokens, reducer
from fewer.core.spacetime import Rectangle, merge_cells


@reducer("tempme", paper="arXiv:2409.01156", acts="merge", on="video", training="optional",
         exempt={"budget_is_met": "its budget counts what stays of each clip that is joined; frames lose rows, too",
                 "padding_changes_nothing": "clips merge as wholes, so ragged input is refused"})  # fmt: skip
@dataclass(frozen=True)
class TempMe(Reducer):
    """Progressive multi-granularity merging: early blocks within each frame, later ones across neighbouring clips.

    budget: share of a joined clip that stays when neighbours first meet (the paper's 30 % go). intra: share of the rest
        that goes in the same block, and in all blocks behind the last one that joins. image: tokens that go in each
        frame in the blocks before.
    joins: how many neighbours become one clip, block by block from `first` on; first: a share of the depth.

    Made for an image tower that reads frames one by one, in which clips are joined for the attention too. In a model
    with one attention over space and time all frames meet from the start; the order in which tokens may merge is the
    paper's. Across clips features are compared, within them keys; both happen behind the attention. The frames of a
    video must divide by the product of the joins.
    """

    budget: Budget = KeepRatio(0.7)
    intra: float = 0.1
    image: int = 2
    joins: tuple[int, ...] = (2, 2)
    first: float = 2 / 3
    proportional: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.intra <= 0.5:
            raise ValueError(f"intra={self.intra}: a share of a clip's tokens that goes, at most half of them")
        if not self.joins or min(self.joins) < 2:
            raise ValueError(f"joins={self.joins}: clips of at least two neighbours each")
        if not 0 <= self.first <= 1:
            raise ValueError(f"first={self.first}: a share of the blocks")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        shape, at = Rectangle.of(signals, tokens, "tempme"), signals.at
        step = at.layer - round(self.first * at.layers)
        if step < 0:
            plan = merge_cells(signals.key, shape, Remove(min(self.image, shape.cells // 2)), tokens, at=at)
            return self._left(plan, shape, signals)
        span = prod(self.joins[: step + 1]) // prod(signals.memory.get("joined", ()))
        frames = signals.memory.get("clips", shape.frames)
        if step < len(self.joins) and frames % span:
            raise PlanError(
                f"tempme:joins={'+'.join(map(str, self.joins))} cannot join {frames} clips by {span}; give joins whose "
                "product divides the frames of the video"
            )
        if step >= len(self.joins):
            return self._left(self._within(signals, tokens, shape), shape, signals)
        signals.memory["joined"] = self.joins[: step + 1]
        clips = Rectangle(frames // span, span * shape.cells, shape.prefix)  # a clip counts as a frame from here on
        across = merge_cells(signals.hidden, clips, self.budget, tokens, at=at)
        left = Rectangle(clips.frames, (across.m - shape.prefix) // clips.frames, shape.prefix)
        signals.memory["clips"] = clips.frames
        within = merge_cells(across.reduce(signals.key), left, self._share(left), tokens.after(across), at=at)
        return self._left(across.then(within), left, signals)

    def _within(self, signals: Signals, tokens: Tokens, shape: Rectangle) -> Plan:
        return merge_cells(signals.key, shape, self._share(shape), tokens, at=signals.at)

    def _share(self, shape: Rectangle) -> Remove:
        return Remove(min(int(self.intra * shape.cells), shape.cells // 2))

    @staticmethod
    def _left(plan: Plan, shape: Rectangle, signals: Signals) -> Plan:
        Rectangle(shape.frames, (plan.m - shape.prefix) // shape.frames, shape.prefix).keep_in(signals)
        return plan
