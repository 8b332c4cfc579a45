"""FasterVLM: the tokens that the vision tower's class token attends to stay. arXiv:2412.01818."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fewer.core import Budget, Capacity, Plan, Signals, Tokens, VisualReducer, reducer, select


@reducer("fastervlm", paper="arXiv:2412.01818", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class FasterVLM(VisualReducer):
    """FasterVLM, class attention instead of text attention (Zhang et al. 2024).

    The attention that the class token pays in the block whose output is used, averaged over heads, ranks an image's
    tokens; the first ones stay. It looks at no text, so an image keeps the same tokens whatever is asked.

    budget: how many stay. per: what the budget counts for. "image": all tiles of an image together, so that images of
    any size cost the same; "tile": each tile, and each frame of a video, for itself, as the authors do with images cut
    into crops. How many an image keeps is not known on the host then: batches stay as wide as they were.

    Without a class token the attention received from all patches ranks them. Attention gathers on what is salient: on
    pages of dense text, rankings by attention were measured below a random draw.
    """

    budget: Budget = Capacity(64)
    per: Literal["image", "tile"] = "image"
    looks_at: ClassVar[tuple[int | None, ...]] = (None,)

    def __post_init__(self) -> None:
        if self.per not in ("image", "tile"):
            raise ValueError(f"per={self.per!r}: the budget counts per 'image' or per 'tile'")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        score = signals.visual.importance()
        if self.per == "image":
            return select.top(score, self.budget, tokens, at=signals.at)
        return select.within(score, signals.plane, self.budget, tokens, at=signals.at)
