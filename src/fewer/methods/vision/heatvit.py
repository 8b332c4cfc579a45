"""HeatViT: heads judge tokens, and what goes is packed into one token. arXiv:2211.08110."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer, select
from fewer.core.learned import ModuleListOf, gumbel, keep_decision, present, training_policy, with_package

TINY = torch.finfo(torch.float32).tiny


class Judge(nn.Module):
    """One head's opinion: GELU(D -> D/2), the same averaged over the tokens there, both -> D/2 -> D/4 -> 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half, quarter = max(1, width // 2), max(1, width // 4)
        self.local = nn.Sequential(nn.Linear(width, half), nn.GELU())
        self.decide = nn.Sequential(
            nn.Linear(2 * half, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        )

    def forward(self, x: Tensor, present: Tensor | None) -> Tensor:
        """x: (B, M, D); present: (B, M) in [0, 1], None = all. -> (B, M) float32, the probability of keeping."""
        own = self.local(x)
        if present is None:
            shared = own.mean(1, keepdim=True)
        else:
            weight = present[..., None].to(own.dtype)
            shared = (own * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1e-6)
        return self.decide(torch.cat([own, shared.expand_as(own)], -1)).float().softmax(-1)[..., 0]


class Selector(nn.Module):
    """A score per token: the opinions of all heads, each on its own channels, weighted by how much it matters there.

    generator: source of the training noise; None = torch's global one.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.judges = ModuleListOf(Judge(width // heads) for _ in range(heads))
        self.matter = nn.Sequential(nn.Linear(heads, heads), nn.GELU(), nn.Linear(heads, heads), nn.Sigmoid())
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """x: (B, M, C) -> (B, M) float32 in (0, 1); higher stays."""
        slices = x.unflatten(-1, (self.heads, -1))
        opinions = torch.stack([judge(slices[:, :, i], present) for i, judge in enumerate(self.judges)], -1)
        weight = self.matter(slices.mean(-1)).float()
        return (opinions * weight).sum(-1) / weight.sum(-1).clamp_min(1e-12)

    def noise(self, logp: Tensor) -> Tensor:
        """What is added to the log-probabilities in training."""
        return gumbel(logp, self.generator)

    def flops(self, n: int) -> int:
        """The linear layers on n tokens: 2 for each weight and token."""
        return 2 * n * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))


@reducer("heatvit", paper="arXiv:2211.08110", acts="prune+merge", on="vision", training="required")
@dataclass(frozen=True)
class HeatViT(Reducer):
    """Token selectors in front of some blocks; what they drop goes on as one package token.

    The package is the average of what goes, weighted by the scores. At the next selector it is packed again, with what
    goes there, whatever its own score.

    budget: share of the patches that entered the model, to the power of the stage: what selectors are trained towards,
        and how many stay. `threshold=0.5` keeps what scores at least that, as the paper runs trained selectors: images
        then keep different numbers.
    layers: selectors stand before these blocks. The paper puts them in from the last block backwards and keeps those
        that pay by a table of latencies; `fewer.hardware.heatvit.budgets` finds shares by such a table.

    The paper's integer arithmetic and its stand-ins for GELU, softmax and sigmoid are in `fewer.hardware.heatvit`; this
    method computes as the model does.
    """

    budget: Budget = KeepRatio(0.7, of="start")
    layers: tuple[int, ...] | None = (3, 6, 9)
    site: ClassVar[Site] = Site.BEFORE_BLOCK

    @property
    def extra(self) -> int:
        return 1

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        return {"selector": Selector(width, heads)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        selector = signals.module("selector")
        free = tokens.free.of(signals.hidden)
        signals.at.spend(selector.flops(free.shape[1]))
        if signals.training:
            return self._masked(selector, signals, tokens)
        score = F.pad(selector(free, present(tokens)), (tokens.prefix, 0))
        rank = score
        if (package := signals.memory.get("package")) is not None:
            rank = score.masked_fill(package[:, None] & tokens.where(tokens.last), float("-inf"))
        kept = select.top(rank, self.budget, tokens, at=signals.at)
        plan = kept.fuse_rest(score, normalise=True, valid=tokens.valid)
        signals.memory["package"] = plan.counted > kept.counted
        return plan

    def _masked(self, selector: Selector, signals: Signals, tokens: Tokens) -> Plan:
        """The training form: no row goes, decisions are sampled, and a package comes behind the prefix, where the one
        of the stage before is hidden."""
        p, there, some = tokens.prefix, present(tokens), signals.memory.get("some")
        if some is None:
            held, score = None, selector(tokens.free.of(signals.hidden), there)
        else:  # the package of the stage before is a candidate beside the others
            known = signals.hidden.new_ones(tokens.batch, tokens.n - p) if there is None else there
            both = selector(signals.hidden[:, p - 1 :], torch.cat([some.to(known.dtype), known], 1))
            held, score = both[:, :1] * some, both[:, 1:]
        logp = torch.stack([score, 1 - score], -1).clamp_min(TINY).log()
        policy = training_policy(signals, tokens, self.budget, keep_decision(logp, selector.noise(logp)))
        before = torch.ones_like(score) if there is None else there
        gone = before - tokens.free.of(policy, -1)
        package = F.pad(gone * score, (p, 0))
        new = (gone.detach().sum(-1, keepdim=True) > 0).to(policy.dtype)
        if held is not None and some is not None:  # packed again, and hidden from now on
            package = torch.cat([package[:, : p - 1], held, package[:, p:]], 1)
            policy = torch.cat([policy[:, : p - 1], torch.zeros_like(held), policy[:, p:]], 1)
            new = torch.maximum(new, some)
        signals.memory["some"] = new
        package = package / package.sum(-1, keepdim=True).clamp_min(1e-12)
        return with_package(policy, package, new, tokens)
