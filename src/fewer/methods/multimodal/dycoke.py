"""DyCoke, in front of the language model: what repeats within four frames is dropped. arXiv:2411.15024, sec. 3.2."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewer.core import Budget, KeepRatio, Plan, Signals, Tokens, VisualReducer, reducer, select
from fewer.core.plan import on_device
from fewer.core.visual.frames import earlier, likeness


@reducer("dycoke", paper="arXiv:2411.15024", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class DyCoke(VisualReducer):
    """Temporal token merging, dynamic compression's first stage: of every four frames the first stays whole; the second
    and the fourth are compared with the frame before, the third with the first, patch by patch; the most similar go.

    budget: share of a frame's tokens that stays, of frames that are compared (the paper drops 70 %).

    The paper calls it merging; its code drops. Its second stage, which lets decoding attend to a changing subset of the
    cache, is no part of this. A picture stays whole.
    """

    budget: Budget = KeepRatio(0.3)

    @property
    def adaptive(self) -> bool:
        return True

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        view, real = signals.visual.view, tokens.unpadded
        turn = view.time % 4
        back = torch.where(turn == 2, 2, 1)
        partner, found = earlier(view, real, back)
        compared = found & (turn > 0)
        signals.at.spend(2 * tokens.n * signals.hidden.shape[-1])
        close = likeness(signals.hidden, partner).masked_fill(~compared, -2.0)
        frame = signals.plane.masked_fill(~real, -1)
        ranked = frame.sort(dim=-1).values
        size = torch.searchsorted(ranked, frame, right=True) - torch.searchsorted(ranked, frame)
        stays = on_device(self.budget.counts(tokens.n, signals.at), real.device)[size]
        keep = ~compared | (select.rank_within(-close, frame) < stays)
        return select.marked(keep & real, tokens)
