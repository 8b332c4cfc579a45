"""SPViT: every head judges its own slice, and what goes is melted into a package token. arXiv:2112.13890, sec. 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer, select
from fewer.core.learned import ModuleListOf, Predictor, keep_decision, present, training_policy, with_package


class Selector(nn.Module):
    """One keep predictor per head, on the head's own channels, weighted by how much each head matters to the token.

    Source   SPViT, arXiv:2112.13890, eq. 4 to 9. The heads have weights of their own, as in the paper (the authors'
             code makes them share one).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.predictors = ModuleListOf(Predictor(width // heads) for _ in range(heads))
        squeezed = max(1, heads // 2)
        self.matter = nn.Sequential(nn.Linear(heads, squeezed), nn.GELU(), nn.Linear(squeezed, heads), nn.Sigmoid())

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """x: (B, M, C); present: (B, M) in [0, 1]. Returns (B, M, 2), float32 log-probabilities; 0 = keep."""
        slices = x.unflatten(-1, (self.heads, -1))
        judged = [head(slices[:, :, i], present).exp() for i, head in enumerate(self.predictors)]
        weight = self.matter(slices.mean(-1)).float()
        total = weight.sum(-1, keepdim=True).clamp_min(1e-12)
        score = (torch.stack(judged, 2) * (weight / total)[..., None]).sum(2)
        return score.clamp_min(torch.finfo(torch.float32).tiny).log()

    def noise(self, logp: Tensor) -> Tensor:
        """What is added to the log-probabilities in training."""
        return self.predictors[0].noise(logp)

    def flops(self, n: int) -> int:
        """The linear layers on n tokens."""
        own = 2 * n * sum(m.weight.numel() for m in self.matter.modules() if isinstance(m, nn.Linear))
        return own + sum(head.flops(n) for head in self.predictors)


@reducer("spvit", paper="arXiv:2112.13890", acts="prune+merge", on="vision", training="required",
         exempt={"padding_changes_nothing": "a package right behind the prefix needs one prefix length in all samples, "
                                            "so ragged input is refused"})  # fmt: skip
@dataclass(frozen=True)
class SPViT(Reducer):
    """Soft pruning: the best tokens stay, the others become one package token behind the class token.

    The package is the average of what a stage drops, weighted by the keep scores (as the paper has it; the authors'
    code does not normalise the weights). Packages of earlier stages are protected. In training decisions are sampled,
    no row goes, and the package is added all the same; a stage that drops nothing adds one that nobody attends to.

    budget: share of the free tokens that entered the model, stage by stage, rounded down. The defaults are the rates
    of the authors' code for DeiT-S at 2.6 GFLOPs. See `ratios_for_latency` for choosing them.
    """

    budget: Budget = KeepRatio((0.617, 0.369, 0.137), of="start")
    layers: tuple[int, ...] | None = (3, 6, 9)
    site: ClassVar[Site] = Site.BEFORE_BLOCK

    @property
    def extra(self) -> int:
        return 1

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        return {"selector": Selector(width, heads)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        selector = signals.module("selector")
        there = present(tokens)
        logp = selector(tokens.free.of(signals.hidden), there)
        signals.at.spend(selector.flops(len(tokens.free)))
        if not signals.training:
            score = F.pad(logp[..., 0], (tokens.prefix, 0))
            kept = select.top(score, self.budget, tokens, at=signals.at)
            return kept.fuse_rest(score.exp(), normalise=True, protect=True, prefix=tokens.prefix)
        policy = training_policy(signals, tokens, self.budget, keep_decision(logp, selector.noise(logp)))
        before = torch.ones_like(logp[..., 0]) if there is None else there
        gone = before - tokens.free.of(policy, -1)
        package = F.pad(gone * logp[..., 0].exp(), (tokens.prefix, 0))
        package = package / package.sum(-1, keepdim=True).clamp_min(1e-12)
        some = (gone.detach().sum(-1, keepdim=True) > 0).to(policy.dtype)
        return with_package(policy, package, some, tokens)


def ratios_for_latency(
    table: Mapping[float, float], stages: Sequence[int], blocks: int, limit: float
) -> tuple[float, ...]:
    """The gentlest keep ratios, equal steps down, whose measured latency meets a limit.

    table    keep ratio -> measured latency of one block with that share of the tokens, any unit; must hold 1.0
    stages   0-based blocks before which tokens go, ascending, 1 or later
    blocks   blocks of the model
    limit    latency of all blocks together, in the table's unit

    Returns  the ratios to give as KeepRatio(ratios, of="start"): ratio, ratio squared, ... with the largest ratio in
             the table that meets the limit, each power read at the nearest measured ratio not below it.
    Raises   ValueError if even the smallest ratio in the table is too slow.
    Source   the latency table of SPViT, arXiv:2112.13890, sec. 3.4; the geometric sequence is our choice.

    >>> ratios_for_latency({1.0: 10.0, 0.7: 7.0, 0.5: 5.0, 0.25: 3.0}, (3, 6, 9), 12, limit=90.0)
    (0.7, 0.49, 0.343)
    """
    runs = [after - before for before, after in zip(stages, [*stages[1:], blocks], strict=True)]
    for ratio in sorted(table, reverse=True):
        shares = [ratio ** (i + 1) for i in range(len(runs))]
        cost = stages[0] * table[1.0]
        cost += sum(n * table[min(r for r in table if r >= s - 1e-9)] for n, s in zip(runs, shares, strict=True))
        if cost <= limit:
            return tuple(round(s, 9) for s in shares)
    raise ValueError(
        f"limit={limit}: even keep={min(table)}, the smallest one measured, takes {cost:g}; measure smaller ones"
    )
