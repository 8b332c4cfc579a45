"""EVS: of a video's tokens those stay that differ from the same patch a frame before. NVIDIA, 2025, as in vLLM."""

from __future__ import annotations

from dataclasses import dataclass

from fewer.core import Budget, KeepRatio, Plan, Signals, Tokens, VisualReducer, reducer, select
from fewer.core.visual.frames import earlier, likeness


@reducer("evs", paper="arXiv:2510.14624", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class EVS(VisualReducer):
    """Efficient Video Sampling: a token's worth is 1 - cosine with the same patch's token in the frame before.

    budget: share of a video's tokens that stays, rounded down; at least the whole first frame.

    What stays keeps its position in time and space. A picture is a first frame and stays whole.
    """

    budget: Budget = KeepRatio(0.25)

    @property
    def adaptive(self) -> bool:
        return True

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        real = tokens.unpadded
        partner, found = earlier(signals.visual.view, real, 1)
        signals.at.spend(2 * tokens.n * signals.hidden.shape[-1])
        worth = (1 - likeness(signals.hidden, partner)).masked_fill(~found, 255.0).masked_fill(~real, -1)
        count, _ = select.allowed(self.budget, tokens, at=signals.at, device=signals.device)
        count = count.maximum((real & ~found).sum(-1))
        rank = worth.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return select.marked(real & (rank < count[:, None]), tokens)
