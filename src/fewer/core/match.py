"""Matchers: similarities and a budget in, a merging plan out. Pure, deterministic, stable ties."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .budgets import Budget
from .place import Place
from .plan import Hard, Plan, PlanError
from .tokens import Tokens

CHUNK = 1 << 24  # similarities held at once, in numbers (64 MB of float32)


def best_partner(a: Tensor, b: Tensor, forbidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each row of a its most similar row of b. a: (B, Na, d), b: (B, Nb, d); forbidden: (B or 1, Nb) bool.

    Returns (values, indices), each (B, Na). The first index wins ties. Memory is linear in Na + Nb: rows of a are
    taken in chunks of at most `CHUNK` similarities.
    """
    batch, na, _ = a.shape
    nb = b.shape[1]
    step = max(1, CHUNK // max(1, batch * nb))
    bt = b.transpose(-1, -2)
    values, indices = [], []
    for i in range(0, na, step):
        s = a[:, i : i + step] @ bt
        if forbidden is not None:
            s = s.masked_fill(forbidden[:, None], float("-inf"))
        v, j = s.max(dim=-1)
        values.append(v)
        indices.append(j)
    return (values[0], indices[0]) if len(values) == 1 else (torch.cat(values, 1), torch.cat(indices, 1))


def bipartite(metric: Tensor, budget: Budget, tokens: Tokens, *, at: Place) -> Hard:
    """Fold the most similar free tokens at even positions into their best match at an odd position.

    Shapes   metric: (B, N, d), any float; compared by cosine in float32, without gradient.
    Returns  a hard plan from N to N - r rows, ascending by the position of the token that stayed; weights are the
             tokens' sizes, normalised in each row. Ties: the earlier position wins, on every device.
    Units    the budget counts free tokens; at most half of them go, and the ledger records a request cut short.
    Cost     N^2 d / 2 FLOPs per sample in chunks of bounded memory, one sort of N / 2, no synchronisation.
    Raises   PlanError, naming both shapes, if metric and tokens disagree on N.
    Source   ToMe, arXiv:2210.09461, sec. 3. Our metric is the paper's K averaged over heads, our size its s.

    >>> from fewer.core import Remove
    >>> metric = torch.eye(4)[None, [0, 0, 1, 1]]
    >>> bipartite(metric, Remove(1), Tokens.plain(1, 4), at=Place()).row.tolist()
    [[0, 0, 1, 2]]
    """
    if metric.shape[1] != tokens.n:
        raise PlanError(f"the metric is for {metric.shape[1]} tokens (shape {tuple(metric.shape)}), there are {tokens.n}")
    free = tokens.free_count
    asked = free - budget.keep(free, at)
    r = min(asked, free // 2)
    if r < asked:
        at.note(f"layer {at.layer}: asked to remove {asked} of {free} tokens, pairing takes at most {r}")
    if r <= 0:
        return Plan.identity((tokens.batch,), tokens.n, metric.device)
    with torch.no_grad():
        at.spend(matching_flops(tokens.n, metric.shape[-1]))
        unit = F.normalize(metric.detach().float(), dim=-1)
        movable = tokens.movable
        forbidden = None if movable is None else ~movable[:, 1::2]
        best, partner = best_partner(unit[:, ::2], unit[:, 1::2], forbidden)
        if movable is not None:
            best = best.masked_fill(~movable[:, ::2], float("-inf"))
        source = best.sort(dim=-1, descending=True, stable=True).indices[:, :r]
        into = partner.gather(-1, source) * 2 + 1
        if tokens.valid is None:
            return Plan.merge(source * 2, into, tokens.n, tokens.size)
        return _bipartite_of_padded(source * 2, into, budget, tokens, at)


def _bipartite_of_padded(source: Tensor, into: Tensor, budget: Budget, tokens: Tokens, at: Place) -> Hard:
    """The same pairs where samples are padded: each sample folds what the budget asks of its own length."""
    assert tokens.valid is not None
    fixed = tokens.n - tokens.free_count
    table = torch.tensor(
        [min(n - budget.keep(n, at), n // 2) for n in range(tokens.free_count + 1)], device=source.device
    )
    lengths = tokens.valid.sum(-1)
    r = table[(lengths - fixed).clamp(min=0)]
    goes = torch.arange(source.shape[-1], device=source.device) < r[:, None]
    gone = torch.zeros(tokens.batch, tokens.n, dtype=torch.bool, device=source.device).scatter(-1, source, goes)
    stays = tokens.valid & ~gone
    order = (~stays).to(torch.int8).argsort(dim=-1, stable=True)
    row = stays.long().cumsum(-1) - 1
    to = row.gather(-1, into).masked_fill(~goes, -1)
    width = tokens.n
    return Hard(tokens.n, order[..., :width], source, to, length=lengths - r).averaged(tokens.size)


def matching_flops(n: int, d: int) -> int:
    """A @ B.T over halves: 2 * (n/2) * (n/2) * d. Left out: normalising, 3nd (3% of it at n = 197), and the sort."""
    return n * n * d // 2
