"""Turbo's side of the text encoder: its cross-attention sees fewer image tokens layer by layer. arXiv:2407.11717."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fewer.core import Budget, Group, KeepRatio, Plan, Reducer, Signals, Site, Tokens, attention, reducer, select

STEP, MOST = 0.07, 0.8  # shares of the image tokens that go behind each layer, and in all


@reducer("turbo_cross", paper="arXiv:2407.11717", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class TurboCross(Reducer):
    """Turbo in cross-attention, fewer image tokens for each text layer [Ju et al., ECCV 2024].

    For a text encoder that looks at an image (BLIP's): behind each layer the image tokens that its words attended to
    least go, and the layers that follow do not see them. It works on the text encoder alone, `model.text_encoder`, and
    goes with `turbo` on the vision tower.

    budget: share of the image tokens that came in, layer by layer; the paper's is 7 % less behind each, down to 20 %,
    cut off in double precision as the authors' code does.
    by: "words", the attention of all words; or "cls", that of the first one.

    The image's class token counts and competes like any other. Heads and words are summed; padding has no say (in the
    authors' code padded words vote). Behind the last layer nobody looks, so nothing is done there.
    """

    budget: Budget = KeepRatio(
        tuple(max(1 - MOST, 1 - STEP * (i + 1)) for i in range(12)), of="start", rounding="trunc"
    )
    layers: tuple[int, ...] | None = None
    by: Literal["words", "cls"] = "words"
    site: ClassVar[Site] = Site.AFTER_BLOCK
    across: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.by not in ("words", "cls"):
            raise ValueError(f"by={self.by!r}: image tokens are ranked by words or cls")

    def acts_at(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth - 1)) if self.layers is None else self.layers

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        queries = Group(0, 1 if self.by == "cls" else signals.q.shape[2])
        seen = signals.seen
        assert seen is not None
        signals.at.spend(2 * seen.q.shape[1] * len(queries) * tokens.n * seen.q.shape[-1])
        return select.top(attention.mass(seen, queries).sum(1), self.budget, tokens, at=signals.at)
