"""DiffRate: how many to prune and how many to merge in each block is learned by gradient. arXiv:2305.17997, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, Capacity, Hard, Plan, PlanError, Reducer, Signals, Tokens, reducer
from fewer.core.learned import Learned, Whole, remember, straight_through
from fewer.core.plan import take


class Count(Whole):
    """A learned number of tokens: the expectation over candidates M, M - g, M - 2g, ..., rounded up.

    logits: (T,) of the candidates' probabilities. Source: DiffRate, arXiv:2305.17997, eq. 6 to 9.
    """

    def __init__(self, most: int, granularity: int) -> None:
        super().__init__()
        self.candidates = tuple(range(most, 0, -granularity))
        self.logits = nn.Parameter(torch.zeros(len(self.candidates)))

    def forward(self) -> Tensor:
        """The count, a scalar: a whole number with the gradient of the expectation."""
        candidates = torch.tensor(self.candidates, dtype=torch.float32, device=self.logits.device)
        expected = (candidates * self.logits.float().softmax(-1)).sum()
        return straight_through(expected.detach().ceil(), expected)

    def survival(self, n: int) -> Tensor:
        """(n,): for each rank from 0, the probability that more tokens than this stay."""
        candidates = torch.tensor(self.candidates, device=self.logits.device)
        more = torch.arange(n, device=self.logits.device)[:, None] < candidates
        return (more * self.logits.float().softmax(-1)).sum(-1)


@reducer("diffrate", paper="arXiv:2305.17997", acts="prune+merge", on="vision", training="optional",
         exempt={"padding_changes_nothing": "one count holds for all samples, so ragged input is refused"})  # fmt: skip
@dataclass(frozen=True)
class DiffRate(Reducer):
    """Tokens are ranked by class attention; the tail is pruned, the next ones join their most similar better token.

    A group becomes its plain mean. Sizes add up, those of the joining tokens first multiplied by their similarity, and
    feed proportional attention. The class attention is averaged over heads; similarity is the cosine of the features.

    budget: tokens left after merging. `Learned()` takes it, and how many are pruned, from the trained modules; any
        other budget needs no training.
    pruned: with such a budget, free tokens left after pruning, one per layer; () = prune nothing, only merge.
    granularity: step between the learned counts' candidates.
    fidelity: "code" keeps sizes at 1 or more in training only, as the authors' code does; "paper" has one rule for
        training and inference, so that both give the same numbers.

    `found` writes learned counts as a method that needs no modules.
    """

    budget: Budget = Learned()
    layers: tuple[int, ...] | None = tuple(range(1, 12))
    pruned: tuple[int, ...] = ()
    granularity: int = 4
    proportional: bool = True
    fidelity: Literal["paper", "code"] = "paper"
    needs_cls: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.granularity < 1:
            raise ValueError(f"granularity={self.granularity}: candidates are at least 1 token apart")
        if any(count < 1 for count in self.pruned):
            raise ValueError(f"pruned={self.pruned}: counts what stays after pruning, whole numbers from 1 up")
        if self.fidelity not in ("paper", "code"):
            raise ValueError(f"fidelity={self.fidelity!r}: it is paper or code")

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        if not isinstance(self.budget, Learned):
            return {}
        return {"prune": Count(free, self.granularity), "merge": Count(free, self.granularity)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        if tokens.valid is not None:
            raise PlanError("diffrate keeps one count in all samples; it cannot follow a method whose counts differ")
        learned = isinstance(self.budget, Learned)
        live = signals.memory.get("live", tokens.n) if signals.training else tokens.n
        fixed = tokens.n - tokens.free_count
        kp, km = self._counts(signals, live - fixed)
        score = signals.cls_attention
        if tokens.policy is not None:
            score = score.masked_fill(tokens.policy == 0, -1)
        if tokens.protected is not None:
            score = score.masked_fill(tokens.protected, float("inf"))
        order = score.sort(dim=-1, descending=True, stable=True).indices
        kept, tail = order[:, : fixed + km], order[:, fixed + km : fixed + kp]
        if not (signals.training and learned):
            return self._joined(kept.sort(-1).values, tail, signals, tokens, clamp=False)
        prune, merge = signals.module("prune"), signals.module("merge")
        remember(signals, "count", (prune() + fixed, merge() + fixed))
        signals.memory["live"] = fixed + km
        policy = torch.ones(tokens.batch, tokens.n, device=order.device) if tokens.policy is None else tokens.policy
        for count, before, after in ((prune, live - fixed, kp), (merge, kp, km)):
            if after < before:
                policy = policy * self._mask(count, fixed, before, after, order)
        plan = self._joined(kept, tail, signals, tokens, clamp=self.fidelity == "code")
        return Plan.mask(policy, plan if tail.shape[-1] else None)

    def _counts(self, signals: Signals, free: int) -> tuple[int, int]:
        """Free tokens left after pruning and after merging, never more than there are."""
        if isinstance(self.budget, Learned):
            prune, merge = signals.module("prune"), signals.module("merge")
            kp, km = prune.number, merge.number
        else:
            stage = signals.at.stage
            kp = self.pruned[min(stage, len(self.pruned) - 1)] if self.pruned else free
            km = self.budget.keep(free, signals.at)
        kp = min(kp, free)
        return kp, min(km, kp)

    @staticmethod
    def _mask(count: Count, fixed: int, before: int, after: int, order: Tensor) -> Tensor:
        """(B, N): 0 for what goes here, else 1, with the gradient of the chance to stay.

        Ranks at and beyond `before` went earlier: their 1 lets the earlier decision's gradient pass.
        """
        n = order.shape[-1]
        soft = torch.cat([torch.ones(fixed, device=order.device), count.survival(n - fixed)])
        rank = torch.arange(n, device=order.device)
        hard = ((rank < fixed + after) | (rank >= fixed + before)).float()
        mask = straight_through(hard, soft).expand(order.shape)
        return torch.zeros_like(mask).scatter(-1, order, mask)

    def _joined(self, kept: Tensor, tail: Tensor, signals: Signals, tokens: Tokens, clamp: bool) -> Hard:
        """The plan that keeps some tokens and folds the tail into them. kept: (B, K), tail: (B, T) positions."""
        if tail.shape[-1] == 0:
            return Plan.keep(kept, tokens.n)
        x = F.normalize(signals.hidden.detach().float(), dim=-1)
        similar = take(x, tail) @ take(x, kept).transpose(-1, -2)
        signals.at.spend(2 * similar.shape[1] * similar.shape[2] * x.shape[-1])
        if tokens.protected is not None:
            shut = take(tokens.protected.expand(tokens.batch, -1), kept)
            similar = similar.masked_fill(shut[:, None], float("-inf"))
        best, to = similar.max(-1)
        mass = best
        if clamp:  # sizes are at least one before they are added, so shares are taken from the clamped product
            size = torch.ones_like(best) if tokens.size is None else tokens.size.gather(-1, tail)
            mass = (size * best).clamp(min=1) / size
        return Hard(tokens.n, kept, tail, to, extra_mass=mass).averaged(None)


def found(counts: list[tuple[int, int]]) -> DiffRate:
    """Learned counts as a method that needs no modules.

    counts: per layer, free tokens left after pruning and after merging.
    """
    return DiffRate(budget=Capacity(tuple(km for _, km in counts)), pruned=tuple(kp for kp, _ in counts))
