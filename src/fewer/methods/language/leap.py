"""Leap-of-Thought: tokens leap over a block and may come back for the next. EMNLP 2023, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, Plan, Reducer, Signals, Site, Threshold, Tokens, reducer, select
from fewer.core.learned import gumbel, keep_decision, remember


class Router(nn.Module):
    """Whether a token is processed or leaps: its features plus the mean of all, normed, C -> hidden -> 2 with GELU.

    No gradient goes through the mean. At first nearly everything is processed.
    generator: source of the training noise; None = torch's global one.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        last = nn.Linear(hidden, 2)
        self.decide = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), last)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([5.0, -5.0]))
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x: (B, N, C); valid: (B, N) bool. Returns (B, N, 2) float32 log-probabilities, 0 = processed."""
        if valid is None:
            mean = x.detach().mean(1, keepdim=True)
        else:
            real = valid[..., None].to(x.dtype)
            mean = (x.detach() * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
        return F.log_softmax(self.decide(x + mean).float(), dim=-1)

    def flops(self, n: int) -> int:
        """The linear layers on n tokens."""
        return 2 * n * sum(m.weight.numel() for m in self.decide if isinstance(m, nn.Linear))


@reducer("leap", paper="EMNLP 2023", acts="prune", on="language", training="required")
@dataclass(frozen=True)
class Leap(Reducer):
    """A router in front of every block lets tokens leap over it, unchanged; the next block's router sees all again.

    budget: tokens whose probability of being processed reaches the threshold go through the block, and the class token
        always; with any other budget the most probable, as many as it grants.
    summary: whether the block also sees one row more, the mean of the real tokens that leap; its output is dropped.
    hidden: width of the routers.

    In training decisions are sampled (Gumbel), rows really leap, and the pass's memory holds each router's
    log-probabilities ("logp"). The router learns from labels, the tokens most salient to the finished model; no
    gradient of the task goes through its decisions, as it does in the paper. The authors' code also adds the class
    token to the summary; here it is processed, so it is not.
    """

    budget: Budget = Threshold(0.5)
    layers: tuple[int, ...] | None = None
    summary: bool = True
    hidden: int = 256
    site: ClassVar[Site] = Site.AROUND_BLOCK

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden={self.hidden}: the router needs at least one hidden channel")

    @property
    def extra(self) -> int:
        return int(self.summary)

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        return {"router": Router(width, self.hidden)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        router: Router = signals.module("router")
        signals.at.spend(router.flops(tokens.n))
        logp = router(signals.hidden, tokens.valid)
        if signals.training:
            remember(signals, "logp", logp)
            plan = select.marked(keep_decision(logp.detach(), gumbel(logp, router.generator)) > 0, tokens)
        elif isinstance(self.budget, Threshold):
            plan = select.marked(logp[..., 0].exp() >= self.budget.value, tokens)
        else:
            plan = select.top(logp[..., 0], self.budget, tokens, at=signals.at)
        if not self.summary:
            return plan
        even = torch.ones(tokens.batch, tokens.n, device=logp.device)
        return replace(plan.fuse_rest(even, normalise=True, valid=tokens.valid), back=plan.counted)
