"""PoWER-BERT: word vectors that others attend to stay, fewer of them in every block. arXiv:2001.08950, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewer.core import Budget, Capacity, Hard, Plan, Reducer, Signals, Tokens, reducer, select
from fewer.core.learned import Learned, ModuleListOf, Whole, remember, straight_through


class Retention(Whole):
    """How much of each rank a block retains; the sum, rounded up, is the number of tokens it keeps.

    weight: (ranks,) in [0, 1], ones at first, one for each token the model was made for; call `clip` after every
    update. Source: PoWER-BERT, sec. 3.3.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ranks))

    def forward(self) -> Tensor:
        """The count, a scalar of at least 1: a whole number with the gradient of the sum."""
        mass = self.weight.float().sum()
        # Ones that were pushed below one and clipped again sum to a little more than they should.
        return straight_through((mass.detach() - 1e-4).ceil().clamp(min=1), mass)

    def of(self, rank: Tensor) -> Tensor:
        """The weights of ranks, counted from 0; ranks beyond the last are retained as the last. Any shape, long."""
        return self.weight.float()[rank.clamp(max=len(self.weight) - 1)]

    @torch.no_grad()
    def clip(self) -> None:
        """Back into [0, 1]."""
        self.weight.clamp_(0, 1)


@reducer("power_bert", paper="arXiv:2001.08950", acts="prune", on="language", training="optional")
@dataclass(frozen=True)
class PowerBert(Reducer):
    """Progressive word-vector elimination: a token is significant when the others attend to it.

    Significance is the attention a token receives, averaged over heads and summed over the other real tokens. The most
    significant stay, in their order, the class token besides.

    budget: tokens that stay in each block, the class token not counted. `Learned()` takes the counts from the trained
        modules; any other budget needs no training. A listed configuration is `tokens=40+31+20`, one per block.

    With `Learned()` the training form is the paper's soft extraction: every token stays, multiplied by what its block
    retains of its rank (the class token ranked like any other). Blocks keep the sum of this, rounded up, class token
    included; at least one token stays beside it. `found` writes the counts as a method that needs no modules.
    """

    budget: Budget = Learned()
    layers: tuple[int, ...] | None = None

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        return {"retention": Retention(free)} if isinstance(self.budget, Learned) else {}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        with torch.no_grad():
            score = significance(signals)
        if not isinstance(self.budget, Learned):
            return select.top(score, self.budget, tokens, at=signals.at)
        retention: Retention = signals.module("retention")
        if not signals.training:
            count = max(1, retention.number - tokens.prefix)
            return select.top(score, Capacity(count), tokens, at=signals.at)
        if tokens.valid is not None:
            score = score.masked_fill(~tokens.valid, float("-inf"))
        rank = score.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
        remember(signals, "mass", retention.weight.float().sum())
        here = torch.arange(tokens.n, device=score.device).expand(tokens.batch, -1)
        return Hard(tokens.n, here, anchor_weight=retention.of(rank))


def significance(signals: Signals) -> Tensor:
    """(B, N) float32: attention received from the other real tokens, averaged over heads."""
    return signals.attention_mass(own=False).mean(dim=1)


def found(modules: ModuleListOf[nn.ModuleDict], layers: tuple[int, ...] | None = None, prefix: int = 1) -> PowerBert:
    """The learned configuration as a method that needs no modules. modules: one nn.ModuleDict per block."""
    counts: list[int] = []
    for stage in modules:
        retention = stage["retention"]
        assert isinstance(retention, Whole)
        count = max(1, retention.number - prefix)
        counts.append(min(count, counts[-1]) if counts else count)
    return PowerBert(budget=Capacity(tuple(counts)), layers=layers)
