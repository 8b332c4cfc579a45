"""RLT: patches that do not change from one moment to the next are read once. arXiv:2411.05222, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.core import Budget, Hard, Plan, Reducer, Signals, Site, Threshold, Tokens, reducer, select
from fewer.core.spacetime import changed


@reducer("rlt", paper="arXiv:2411.05222", acts="prune", on="video", training="free",
         exempt={"padding_changes_nothing": "it looks at the pixels of a clip; the check has none"})  # fmt: skip
@dataclass(frozen=True)
class RLT(Reducer):
    """Run-length tokenization: before the first block, a patch goes that looks as it did a moment ago.

    budget: mean absolute difference of pixels, as normalised for the model, from which a patch stays: samples keep as
        many as they need. A share or a number keeps the patches that changed most.
    proportional: attend to a run as to as many tokens as it is long (the authors add an embedding of its length
        instead, which a model has to be trained for).

    The last frame of a patch is compared with the first frame of the patch before it. What goes counts in the size of
    the patch it repeats. Those of the first moment stay.
    """

    budget: Budget = Threshold(0.1)
    layers: tuple[int, ...] | None = (0,)
    proportional: bool = False
    site: ClassVar[Site] = Site.BEFORE_BLOCK

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        frames, height, width = signals.space
        moved = changed(signals.clip, signals.space).flatten(1)  # (B, T * H * W)
        moved[:, : height * width] = 1e30
        patch = (tokens.ordinal() - signals.prefix).clamp(min=0)
        scores = moved.gather(1, patch)
        kept = select.top(scores, self.budget, tokens, at=signals.at)
        whole = tokens.free_count == frames * height * width and not tokens.irregular
        return runs(kept, (frames, height * width), tokens) if whole else kept


def runs(kept: Hard, shape: tuple[int, int], tokens: Tokens) -> Hard:
    """A pruning plan whose dropped patches count in the size of the last one at their place that stayed. shape: frames,
    and patches of each. Rows hold what they held."""
    frames, cells = shape
    p = tokens.prefix
    stays = (kept.row >= 0)[:, p:].unflatten(1, shape)
    time = torch.arange(frames, device=stays.device)[:, None]
    head = torch.where(stays, time, -1).cummax(1).values  # (B, T, cells), -1 before the first that stayed
    source = (head.clamp(min=0) * cells + torch.arange(cells, device=stays.device)).flatten(1) + p
    row = kept.row.gather(1, source).masked_fill((head < 0).flatten(1), -1)
    gone = ~stays.flatten(1)
    every = torch.arange(kept.n, device=row.device).expand(len(row), -1)
    to = F.pad(torch.where(gone, row, -1), (p, 0), value=-1)
    ones = torch.ones_like(kept.anchor, dtype=torch.float32)
    return replace(
        kept, extra=every, to=to, anchor_weight=ones, extra_weight=torch.zeros_like(every, dtype=torch.float32)
    )


def lengths(keep: Tensor) -> Tensor:
    """(B, T, H, W) long: how many moments each patch that stays stands for, 0 for those that go. keep: likewise bool,
    all True at the first moment."""
    t = keep.shape[1]
    time = torch.arange(t, device=keep.device)[:, None, None]
    upcoming = torch.where(keep, time, t).flip(1).cummin(1).values.flip(1)  # the next kept one, from here on
    after = torch.cat([upcoming[:, 1:], torch.full_like(upcoming[:, :1], t)], 1)
    return torch.where(keep, after - time, 0)
