"""Selectors that count per KV head, in what a sample's cache holds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budgets import Budget, BudgetError
from ..place import Place
from ..plan import Hard, Plan, PlanError
from .rows import Rows
from .signals import CacheSignals


def check_window(window: int, kernel: int, pool: str) -> None:
    """Raises ValueError for an observation window or a pooling that cannot be."""
    if window < 1:
        raise ValueError(f"window={window}: at least one query must vote")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel}: the pooling width must be odd, 1 for none")
    if pool not in ("mean", "max"):
        raise ValueError(f"pool={pool!r} is neither 'mean' nor 'max'")


def check_alpha(alpha: float) -> None:
    """Raises BudgetError for a safeguard that is no share."""
    if not 0 <= alpha <= 1:
        raise BudgetError(f"alpha={alpha} is outside [0, 1]; it is the share of the budget each head is sure of")


def pooled_votes(signals: CacheSignals, rows: Rows, window: int, kernel: int, pool: str) -> Tensor:
    """(B, G, S) float32: attention of the last `window` queries on the rows before them, pooled along the sequence.

    Pooling comes before the mean over the query heads of a group. Zeros beyond the ends count in the mean; a hole is no
    neighbour, wherever padding or a shorter head has left one.
    Source   SnapKV, arXiv:2404.14469, sec. 4 and listing 1.
    """
    votes = signals.window_mass(window).masked_fill(~signals.before(rows, window), 0)
    pooled = F.avg_pool1d if pool == "mean" else F.max_pool1d
    if rows.real is None or kernel == 1:
        return signals.per_group(pooled(votes, kernel, stride=1, padding=kernel // 2))
    order = (~rows.real).to(torch.int8).argsort(dim=-1, stable=True).expand(len(votes), -1, -1)
    order = order.repeat_interleave(votes.shape[1] // order.shape[1], dim=1)
    side_by_side = pooled(votes.gather(-1, order), kernel, stride=1, padding=kernel // 2)
    return signals.per_group(torch.empty_like(votes).scatter_(-1, order, side_by_side))


def _candidates(scores: Tensor, rows: Rows, protected: Tensor | None) -> Tensor:
    """Scores with what must stay at +inf and what is not there at -inf; NaN counts lowest."""
    if scores.shape[-1] != rows.n:
        raise PlanError(f"scores are for {scores.shape[-1]} rows, the cache holds {rows.n}")
    scores = scores.float().nan_to_num(nan=torch.finfo(torch.float32).min)
    if protected is not None:
        scores = scores.masked_fill(protected, float("inf"))
    return scores if rows.real is None else scores.masked_fill(~rows.real, float("-inf"))


def ragged(keep: Tensor, n: int, width: int) -> Hard:
    """The plan of a mask. keep: (B, G, S) bool; width: the most rows any head can keep."""
    order = (~keep).to(torch.int8).argsort(dim=-1, stable=True)[..., :width]
    return Plan.keep(order, n, keep.sum(-1))


def marked(keep: Tensor, rows: Rows) -> Hard:
    """The plan of a mask, ragged where samples or heads keep different numbers. keep: (B, 1 or G, S) bool."""
    keep = keep if rows.real is None else keep & rows.real
    return ragged(keep, rows.n, rows.n)


def lowest(scores: Tensor, rows: Rows, protected: Tensor | None = None) -> Tensor:
    """(B, 1 or G, 1) long: the row of each head that `top` drops where it drops one; of equal ones the newest.

    Shapes as in `top`; rows may be shuffled, all of them are real."""
    assert rows.age is not None
    s = _candidates(scores, rows, protected)
    age = torch.where(s == s.amin(-1, keepdim=True), rows.age, torch.iinfo(rows.age.dtype).max)
    return age.argmin(-1, keepdim=True)


def _highest(s: Tensor, k: int) -> Tensor:
    """(B, G, k) long: where the k highest scores of each head stand, ascending; of equal ones the earlier.

    s: (B, G, S) without NaN. Selecting the k-th highest takes half the time of a sort."""
    edge = s.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, level = s > edge, s == edge
    keep = above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    slot = torch.where(keep, keep.cumsum(-1) - 1, k)  # what goes is written behind the end, and cut off
    where = torch.arange(s.shape[-1], device=s.device).expand_as(slot)
    return where.new_empty(*s.shape[:-1], k + 1).scatter_(-1, slot, where)[..., :k]


def top(
    scores: Tensor, budget: Budget, rows: Rows, *, at: Place, protected: Tensor | None = None, least: int = 0
) -> Hard:
    """Every head keeps its highest scores.

    Shapes   scores: (B, G, S) or (B, 1, S), any float; higher stays. protected: bool, broadcastable to it; these rows
             count against the budget and stay first. least: how many of them there are at most, the budget's floor.
    Returns  a hard plan of lead (B, G) or (B, 1), rows ascending; ragged where samples are padded or heads differ.
    Ties     the earlier row wins, on every device.
    Cost     one selection of S per head, or a sort where samples are padded; no synchronisation.
    """
    s = _candidates(scores, rows, protected)
    counts = rows.counts(budget, at, least)
    if rows.even:
        return Plan.keep(_highest(s, counts[0]), rows.n)
    order = s.sort(dim=-1, descending=True, stable=True).indices
    limit = torch.tensor(counts, device=s.device)[:, None, None]
    rank = torch.arange(rows.n, device=s.device)
    keep = torch.zeros_like(s, dtype=torch.bool).scatter(-1, order, (rank < limit).expand_as(order))
    return ragged(keep & (s > float("-inf")), rows.n, max(counts))


def shared(
    scores: Tensor, budget: Budget, rows: Rows, *, at: Place, alpha: float = 0.2, protected: Tensor | None = None,
    least: int = 0,
) -> Hard:  # fmt: skip
    """The heads of a layer share one budget: each keeps its own best first, the rest goes to the best of all heads.

    Shapes   scores: (B, G, S), comparable between heads (probabilities); higher stays. protected, least: see `top`.
    alpha    share of the even budget K that each head is sure of, floor(alpha K), at least one row.
    Returns  a ragged hard plan of lead (B, G): G K rows in all for each sample, floor(alpha K) or more per head.
    Ties     the earlier row wins, then the lower head.
    Source   Ada-KV, arXiv:2407.11550, alg. 1.
    """
    s = _candidates(scores, rows, protected)
    b, g, n = s.shape
    counts = rows.counts(budget, at, least)
    pools = [k * g for k in counts]
    sure = [max(int(k * alpha), min(least, k), 1) for k in counts]
    order = s.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(n, device=s.device)
    own = (rank < torch.tensor(sure, device=s.device)[:, None, None]).expand_as(order)
    own = torch.zeros_like(s, dtype=torch.bool).scatter(-1, order, own) & (s > float("-inf"))
    flat = s.masked_fill(own, float("inf")).flatten(1)
    order = flat.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(g * n, device=s.device)
    keep = (rank < torch.tensor(pools, device=s.device)[:, None]).expand_as(order)
    keep = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, order, keep) & (flat > float("-inf"))
    return ragged(keep.view(b, g, n), rows.n, min(max(pools), n))
