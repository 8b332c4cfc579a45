"""GlobalCom2: the whole view of an image says how hard each of its crops is compressed. arXiv:2501.05179."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fewer.core import Budget, KeepRatio, Plan, Signals, Tokens, VisualReducer, reducer, select
from fewer.core.visual.crops import Canvas


@reducer("globalcom", paper="arXiv:2501.05179", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class GlobalCom(VisualReducer):
    """GlobalCom2, global compression commander (Liu et al. 2025).

    For images shown whole and in crops. The whole view keeps the budget's share by class attention. The share of a crop
    is larger or smaller than that by its part in the whole view's attention: with S_c the attention on the cells that
    lie in it and p = softmax(S / temperature) over the crops, it is the budget's times 1 + p_c - mean(p), one at most.
    A crop's tokens are ranked by the sum of its own class attention and the whole view's at the same place (linearly
    interpolated), each taken as a vector of length one over the crop.

    budget: share of an image's tokens that stays, rounded down, all tiles together. temperature: of the softmax. The
    authors' 10 makes nearly equal shares, for S sums to one.

    The mean of the shares is the budget's. Where crops have unequal numbers of tokens, or fractions, their counts would
    not sum to the budget: they are scaled to do so, and nothing is lost to rounding. Padding has no token and gets no
    share. An image without crops keeps its first ones by attention, as FasterVLM does. Without a class token attention
    received takes its place.
    """

    budget: Budget = KeepRatio(0.25)
    temperature: float = 10.0
    looks_at: ClassVar[tuple[int | None, ...]] = (None,)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: it must be above 0; the authors' is 10")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        view, n = signals.visual.view, tokens.n
        count, most = select.allowed(self.budget, tokens, at=signals.at, device=signals.device)
        if tokens.valid is None and most == n:
            return Plan.identity((tokens.batch,), n, signals.device)
        paid = signals.visual.importance()
        canvas = Canvas.of(view)
        size = canvas.counts()
        crops = size.scatter(1, torch.zeros_like(size[:, :1]), 0)
        whole, real = size[:, 0], size.sum(-1)

        first = torch.where(crops.any(-1), whole * count // real.clamp(min=1), count)
        attention = canvas.sums(paid.masked_fill(~canvas.whole, 0), canvas.under)
        logits = (attention / self.temperature).masked_fill(crops == 0, float("-inf"))
        part = logits.masked_fill(~crops.any(-1, keepdim=True), 0).softmax(-1)
        mean = 1 / (crops > 0).sum(-1, keepdim=True).clamp(min=1)
        quota = select.apportion(count - first, crops * (1 + part - mean), crops)
        quota = quota.scatter(1, torch.zeros_like(size[:, :1]), first[:, None])

        def unit(x: torch.Tensor) -> torch.Tensor:
            return x / canvas.of_tile(canvas.sums(x.square(), view.tile)).sqrt().clamp(min=1e-12)

        mine = paid.masked_fill(~(canvas.whole | canvas.cut), 0)
        seen = canvas.mirrored(paid.masked_fill(~canvas.whole, 0)).masked_fill(~canvas.cut, 0)
        group = torch.where(canvas.whole, 0, torch.where(canvas.cut, view.tile, n))  # padding by itself
        keep = select.rank_within(unit(mine) + unit(seen), group) < canvas.of_tile(quota)
        return select.counted(keep & (canvas.whole | canvas.cut), tokens, most)
