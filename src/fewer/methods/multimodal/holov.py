"""HoloV: every run of an image's tokens has its own budget, so that no part of it is left out. arXiv:2510.02912."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fewer.core import Budget, Capacity, Plan, Signals, Tokens, VisualReducer, reducer, select
from fewer.core.match import unit
from fewer.core.plan import take


@reducer("holov", paper="arXiv:2510.02912", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class HoloV(VisualReducer):
    """HoloV, holistic visual context retention (Zou et al., NeurIPS 2025).

    An image's tokens, in raster order, are cut into `crops` runs of equal length (the first ones take one more where it
    does not divide). A token scores a + `diversity` v mean(a) / mean(v): a is the attention it receives, v the variance
    of its cosine similarities within its run. Runs share the budget in proportion to their mean scores; within a run
    the tokens with most attention stay, whatever their score.

    budget: how many stay, per image. crops: runs. diversity: what variety weighs beside attention.

    A run is a strip of lines, not a square of the picture, as in the authors' code. What a run cannot take goes to the
    others; their code fills it with empty rows. Of v, as there, a token's similarity to itself counts as zero and the
    sums are divided by the length less one. The means are over the image: over a run they would cancel out of its mean
    score, and v would change nothing. Attention is the class token's where there is one, else what all patches pay.
    """

    budget: Budget = Capacity(64)
    crops: int = 16
    diversity: float = 0.09
    looks_at: ClassVar[tuple[int | None, ...]] = (None,)

    def __post_init__(self) -> None:
        if self.crops < 1:
            raise ValueError(f"crops={self.crops}: an image is cut into at least one run")
        if self.diversity < 0:
            raise ValueError(f"diversity={self.diversity} is negative; 0 leaves attention alone to share the budget")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        n = tokens.n
        count, most = select.allowed(self.budget, tokens, at=signals.at, device=signals.device)
        if tokens.valid is None and most == n:
            return Plan.identity((tokens.batch,), n, signals.device)
        device = signals.device
        real = tokens.unpadded
        paid = signals.visual.importance().masked_fill(~real, 0)

        # Runs: (R, G) starts and lengths, (R, G, W) places in the line.
        which = torch.arange(self.crops, device=device)
        length = real.sum(-1, keepdim=True)
        size = length // self.crops + (which < length % self.crops)
        start = size.cumsum(-1) - size
        inside = torch.arange(-(-n // self.crops), device=device)
        mine = inside < size[..., None]
        place = (start[..., None] + inside).clamp(max=n - 1).flatten(1)

        x = take(unit(signals.hidden), place).unflatten(1, (self.crops, -1)) * mine[..., None]
        signals.at.spend(2 * n * inside.shape[0] * x.shape[-1])
        similar = (x @ x.transpose(-1, -2)) * (1 - torch.eye(x.shape[2], device=device))
        others = (size - 1).clamp(min=1)[..., None]
        mean = similar.sum(-1) / others
        apart = (similar - mean[..., None]).square() * mine[:, :, None]
        spread = apart.sum(-1) / others * mine  # (R, G, W)

        a = take(paid, place).view_as(spread) * mine
        scale = a.sum((1, 2), keepdim=True) / spread.sum((1, 2), keepdim=True).clamp(min=1e-30)
        score = (a + self.diversity * spread * scale).sum(-1) / size.clamp(min=1)
        quota = select.apportion(count, score, size, left="weight")
        where = torch.arange(n, device=device)
        run = (where[:, None] >= start[:, None]).sum(-1) - 1  # the last run that starts here or before
        rank = select.rank_within(paid.masked_fill(~real, -1), run)
        return select.counted(real & (rank < quota.gather(-1, run)), tokens, most)
