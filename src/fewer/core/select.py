"""Selectors: scores and a budget in, a pruning plan out. Pure, deterministic, stable ties."""

from __future__ import annotations

import torch
from torch import Tensor

from .budgets import Budget, Mass, Threshold
from .place import Place
from .plan import Hard, Plan, PlanError
from .tokens import Group, Tokens


def top(scores: Tensor, budget: Budget, tokens: Tokens, *, at: Place, among: Group | None = None) -> Hard:
    """Keep the highest scores. Protected tokens stay besides what the budget grants.

    Shapes   scores: (B, N), any float; higher stays. among: only these tokens may go; the budget counts them.
    Returns  a hard pruning plan, rows ascending by position; ragged for adaptive budgets or padded input.
    Ties     the earlier position wins, on every device.
    Cost     one sort of N per sample, one scatter; no synchronisation.
    Raises   PlanError if scores and tokens disagree on N.
    """
    if scores.shape[-1] != tokens.n:
        raise PlanError(f"scores are for {scores.shape[-1]} tokens, the sequence has {tokens.n}")
    scores = _candidates(scores, tokens, among)
    free = tokens.free_count if among is None else len(among)
    fixed = tokens.n - free
    if budget.adaptive:
        return _ragged(_adaptive(scores, budget), tokens)
    count = fixed + budget.keep(free, at)
    if count == tokens.n and tokens.valid is None:
        return Plan.identity((tokens.batch,), tokens.n, scores.device)
    if tokens.valid is not None:
        return _top_of_padded(scores, budget, tokens, at, fixed)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return Plan.keep(order.sort(dim=-1).values, tokens.n)


def _candidates(scores: Tensor, tokens: Tokens, among: Group | None) -> Tensor:
    """Scores with what must stay at +inf, padding at -inf, NaN lowest among the candidates."""
    scores = scores.float().nan_to_num(nan=torch.finfo(torch.float32).min)
    keep = tokens.protected
    if among is not None:
        outside = ~tokens.where(among)
        keep = outside if keep is None else keep | outside
    if keep is not None:
        scores = scores.masked_fill(keep, float("inf"))
    return scores if tokens.valid is None else scores.masked_fill(~tokens.valid, float("-inf"))


def _adaptive(scores: Tensor, budget: Budget) -> Tensor:
    """(B, N) bool: what a threshold or mass budget keeps; always at least the best candidate."""
    candidate = scores.isfinite()
    if isinstance(budget, Threshold):
        keep = scores >= budget.value
    elif isinstance(budget, Mass):
        ranked, order = scores.masked_fill(~candidate, -1).sort(dim=-1, descending=True, stable=True)
        ranked = ranked.clamp(min=0)
        before = ranked.cumsum(-1) - ranked
        wanted = before < budget.share * ranked.sum(-1, keepdim=True)
        keep = torch.zeros_like(wanted).scatter(-1, order, wanted)
    else:
        raise PlanError(f"{type(budget).__name__} does not say which scores stay")
    best = scores.masked_fill(~candidate, float("-inf")).argmax(-1, keepdim=True)
    keep = keep.scatter(-1, best, True) & candidate
    return keep | (scores == float("inf"))


def _ragged(keep: Tensor, tokens: Tokens) -> Hard:
    """A ragged pruning plan from a mask. keep: (B, N) bool. As many rows as tokens; the lengths say which are real."""
    order = (~keep).to(torch.int8).argsort(dim=-1, stable=True)
    return Plan.keep(order, tokens.n, keep.sum(-1))


def _top_of_padded(scores: Tensor, budget: Budget, tokens: Tokens, at: Place, fixed: int) -> Hard:
    """top where samples are padded: each keeps the budget's share of its own tokens, as it would alone."""
    assert tokens.valid is not None
    # The budget is asked once per possible length: a table of Python integers, read per sample without a sync.
    table = torch.tensor([fixed + budget.keep(n, at) for n in range(tokens.n - fixed + 1)], device=scores.device)
    lengths = table[(tokens.valid.sum(-1) - fixed).clamp(min=0)]
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(tokens.n, device=scores.device)
    keep = torch.zeros_like(tokens.valid).scatter(-1, order, rank < lengths[:, None]) & tokens.valid
    width = int(fixed + budget.keep(tokens.n - fixed, at))
    plan = _ragged(keep, tokens)
    return Plan.keep(plan.anchor[..., :width], tokens.n, lengths)
