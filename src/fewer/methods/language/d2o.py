"""D2O: rows that leave the cache are folded into the row most like them, where one is like enough. arXiv:2406.13035."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from fewer.core import Budget, Hard, KeepRatio, Plan, Signals, Tokens, reducer
from fewer.core.budgets import BudgetError
from fewer.core.cache import CacheReducer, CacheSignals, Rows, top


@reducer("d2o", paper="arXiv:2406.13035", acts="merge", on="kv-cache", training="free")
@dataclass(frozen=True)
class D2O(CacheReducer):
    """Heavy hitters and the newest rows stay, as in h2o; an evicted row is merged rather than lost if it has a twin.

    The twin is the row that stays with the most similar key (cosine, rotation included). A row is merged where its
    similarity is at least the mean one of all evicted rows of the head; the others are dropped. Keys and values of a
    row are then the average over the row itself, with weight e, and what was folded into it, with exp(similarity).

    budget  rows per KV head, newest included
    recent  share of the budget that goes to the newest rows, rounded down
    merge   off: the same choice of rows without merging

    Acts when a prompt is read. Left out: the paper's budgets per layer, and its threshold that moves while decoding.
    Compares every row with those that stay: S K floats per head for the time of the choice.
    """

    budget: Budget = KeepRatio(0.2)
    recent: float = 0.5
    merge: bool = True
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.recent <= 1:
            raise BudgetError(f"recent={self.recent} is outside [0, 1]; it is a share of the budget")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(signals, CacheSignals) and isinstance(tokens, Rows)
        mass = signals.per_group(signals.attention_mass_of_all())
        widths = [int(self.recent * k) for k in tokens.counts(self.budget, signals.at)]
        newest = tokens.newest(widths[0] if tokens.even else torch.tensor(widths, device=mass.device)[:, None, None])
        plan = top(mass, self.budget, tokens, at=signals.at, protected=newest)
        return self._folded(plan, signals, tokens) if self.merge else plan

    def _folded(self, plan: Hard, signals: CacheSignals, rows: Rows) -> Hard:
        unit = F.normalize(signals.k.float(), dim=-1)  # (B, G, S, d)
        lead = unit.shape[:2]
        anchor = plan.anchor.expand(*lead, -1)
        stay = unit.gather(2, anchor[..., None].expand(*anchor.shape, unit.shape[-1]))
        like = unit @ stay.transpose(-1, -2)
        signals.at.spend(2 * lead[1] * rows.n * plan.m * unit.shape[-1])
        if plan.valid is not None:
            like = like.masked_fill(~plan.valid.expand(*lead, -1)[:, :, None], float("-inf"))
        best, to = like.max(-1)  # (B, G, S)
        gone = plan.row.expand(*lead, -1) < 0
        gone = gone if rows.real is None else gone & rows.real
        mean = (best * gone).sum(-1, keepdim=True) / gone.sum(-1, keepdim=True).clamp(min=1)
        merged = gone & (best >= mean)
        share = best.exp() * merged
        total = torch.zeros_like(anchor, dtype=share.dtype).scatter_add(-1, to, share) + math.e
        every = torch.arange(rows.n, device=to.device).expand_as(to)
        return replace(
            plan, anchor=anchor, extra=every, to=torch.where(merged, to, -1), anchor_weight=math.e / total,
            extra_weight=share / total.gather(-1, to),
            length=None if plan.length is None else plan.length.expand(lead),
        )  # fmt: skip
