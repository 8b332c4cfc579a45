"""TR-BERT: a policy, taught by reward, picks the tokens that go on through the model. arXiv:2105.11618, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, Plan, Reducer, Signals, Site, Threshold, Tokens, reducer, select
from fewer.core.learned import remember


class Policy(nn.Module):
    """How likely each token is selected: C -> hidden -> 1 with GELU, on the token's own features.

    generator: source of the actions' noise; None = torch's global one.
    guide: (B, N0) saliency of the input tokens for the warm start, NaN where actions are sampled; None = all are.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.decide = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))
        self.generator: torch.Generator | None = None
        self.guide: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N) float32 logits."""
        return self.decide(x)[..., 0].float()

    def act(self, p: Tensor, tokens: Tokens) -> Tensor:
        """(B, N) bool: sampled actions; guided samples take their most salient tokens, as many as the policy expects.

        p: (B, N), zero where a token may not go on its own account (padding, protected).
        """
        action = torch.rand(p.shape, generator=self.generator, device=p.device) < p
        if self.guide is None:
            return action
        salient = self.guide.gather(1, tokens.place())
        guided = ~salient.isnan().any(-1, keepdim=True)
        if tokens.movable is not None:
            salient = salient.masked_fill(~tokens.movable, float("-inf"))
        rank = salient.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
        return torch.where(guided, rank < p.sum(-1, keepdim=True).round(), action)

    def flops(self, n: int) -> int:
        """The linear layers on n tokens."""
        return 2 * n * sum(m.weight.numel() for m in self.decide if isinstance(m, nn.Linear))


@reducer("trbert", paper="arXiv:2105.11618", acts="prune", on="language", training="required")
@dataclass(frozen=True)
class TRBert(Reducer):
    """Two small policies select tokens; the others skip to the end of the model with the features they have.

    budget: tokens whose probability reaches the threshold stay, and the class token; with any other budget the most
        probable, as many as it grants.
    layers: the policies stand before these blocks, 0-based: the second and the middle one of 12.
    hidden: width of the policies.

    In training actions are sampled and the pass's memory holds, per policy, the negative log-likelihood of the actions
    ("nll", averaged over the tokens that had a choice) and the share of the sequence selected ("share"): what the
    policy gradient of `fewer.recipes.encode` needs.
    """

    budget: Budget = Threshold(0.5)
    layers: tuple[int, ...] | None = (1, 6)
    hidden: int = 32
    site: ClassVar[Site] = Site.BEFORE_BLOCK

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden={self.hidden}: the policy needs at least one hidden channel")

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        return {"policy": Policy(width, self.hidden)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        policy: Policy = signals.module("policy")
        signals.at.spend(policy.flops(tokens.n))
        logit = policy(signals.hidden)
        if not signals.training:
            score = logit.sigmoid()
            if isinstance(self.budget, Threshold):
                return select.marked(score >= self.budget.value, tokens)
            return select.top(score, self.budget, tokens, at=signals.at)
        choice = torch.ones_like(logit) if tokens.movable is None else tokens.movable.expand_as(logit).float()
        action = policy.act(logit.detach().sigmoid() * choice, tokens)
        plan = select.marked(action, tokens)
        if "length" not in signals.memory:
            signals.memory["length"] = tokens.n if tokens.valid is None else tokens.valid.sum(-1)
        surprise = F.binary_cross_entropy_with_logits(logit, action.float(), reduction="none")
        remember(signals, "nll", (surprise * choice).sum(-1) / choice.sum(-1).clamp_min(1))
        remember(signals, "share", plan.counted / signals.memory["length"])
        return plan
