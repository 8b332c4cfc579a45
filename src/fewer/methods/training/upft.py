"""UPFT, unsupervised prefix fine-tuning (Ji et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewer.core import Budget, Capacity, Plan, Reducer, Signals, Site, Tokens, reducer
from fewer.core.noise import noise
from fewer.core.written import goal, plan


@reducer("upft", paper="arXiv:2503.02875", acts="prune", on="loss", training="free")
@dataclass(frozen=True)
class UPFT(Reducer):
    """The first tokens of a solution teach: what a model writes there is nearly the same whether it ends well or not.

    budget: how many of each sample's labels teach, the first ones. whole: share of the samples all of whose labels do,
    so that the model does not forget how to go on; drawn anew at every step. seed: of the draw.

    All tokens are computed: the saving is in data that ends there, `fewer.training.prefixes` makes it so.
    """

    budget: Budget = Capacity(32)
    layers: tuple[int, ...] | None = None
    whole: float = 0.1
    seed: int = 0
    site: ClassVar[Site] = Site.LOSS

    def __post_init__(self) -> None:
        if not 0 <= self.whole <= 1:
            raise ValueError(f"whole={self.whole} is outside [0, 1]; it is a share of the samples")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        count, free = goal(self.budget, tokens, signals.at)
        first = free.cumsum(-1) <= count[:, None]
        # By what the sample costs: another draw for each sample and step, the same wherever it runs.
        cost = (signals.hidden[..., 0] * free).sum(-1, keepdim=True).double().mul(1e6).long()
        return plan(free & (first | (noise(cost, self.seed, 0) < self.whole * 2**24)), tokens)
