"""Matchers: similarities and a budget in, a merging plan out. Pure, deterministic, stable ties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .budgets import Budget, Threshold
from .place import Place
from .plan import Hard, Plan, PlanError, complement, on_device, take
from .tokens import Tokens

CHUNK = 1 << 24  # similarities held at once, in numbers (64 MB of float32)


def unit(x: Tensor) -> Tensor:
    """Rows of x at length one, float32, detached; a row that is not finite becomes zero, similar to nothing."""
    return F.normalize(x.detach().float(), dim=-1).nan_to_num(0.0)


def best_partner(
    a: Tensor, b: Tensor, forbidden: Tensor | int | None = None, few: bool = True
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:  # fmt: skip
    """For each row of a its most similar row of b. a: (B, Na, d), b: (B, Nb, d).

    forbidden: (B or 1, Nb) bool, or how many of the first rows of b take no part. few: whether fewer than half of the
    pairs will be asked for.
    Returns the similarities (B, Na), and a function from some rows of a, (B, r), to their partners, (B, r): only the
    pairs that merge need one. The first index wins ties. Memory is linear in Na + Nb: rows of a are taken in chunks of
    at most `CHUNK` similarities.
    """
    batch, na, _ = a.shape
    nb = b.shape[1]
    step = max(1, CHUNK // max(1, batch * nb))
    bt = b.transpose(-1, -2)

    def similar(rows: Tensor) -> Tensor:
        s = rows @ bt
        if isinstance(forbidden, Tensor):
            return s.masked_fill_(forbidden[:, None], float("-inf"))
        if forbidden:
            s[..., :forbidden] = float("-inf")
        return s

    if na <= step and few:
        s = similar(a)
        return s.amax(-1), lambda rows: take(s, rows).argmax(-1)
    parts = [similar(a[:, i : i + step]).max(dim=-1) for i in range(0, na, step)]
    values, partner = (torch.cat(list(part), 1) for part in zip(*parts, strict=True))
    return values, lambda rows: partner.gather(-1, rows)


Order = Literal["position", "halves", "ranked"]
Fidelity = Literal["paper", "code"]
Parts = tuple[slice | Tensor, slice | Tensor]


def bipartite(
    metric: Tensor, budget: Budget, tokens: Tokens, *, at: Place, order: Order = "position",
    penalty: Tensor | None = None,
) -> Hard:  # fmt: skip
    """Fold the most similar free tokens at even positions into their best match at an odd position.

    Shapes   metric: (B, N, d), any float; compared by cosine in float32, without gradient.
    Returns  a hard plan from N to N - r rows; weights are the tokens' sizes, normalised in each row. Ties: the
             earlier position wins, on every device.
    order    of the rows. "position": by the position of the token that stayed. "halves": the protected prefix, what
             is left of the even positions, the odd ones (step 5 of the paper; it decides which tokens can pair in the
             next block). "ranked": halves, but the even ones by falling similarity, as the paper's code has them
             where there is no class token. Where more than the prefix is guarded, as in a causal text, always
             "position".
    penalty  (B, N), taken from the similarity of a token that would go; who its partner is stays as it was.
    Units    the budget counts free tokens; at most half of them go, and the ledger records a request cut short.
    Cost     N^2 d / 2 FLOPs per sample in chunks of bounded memory, one sort of N / 2, no synchronisation.
    Raises   PlanError, naming both shapes, if metric and tokens disagree on N.
    Source   ToMe, arXiv:2210.09461, sec. 3. Our metric is the paper's K averaged over heads, our size its s.

    >>> from fewer.core import Remove
    >>> metric = torch.eye(4)[None, [0, 0, 1, 1]]
    >>> bipartite(metric, Remove(1), Tokens.plain(1, 4), at=Place()).row.tolist()
    [[0, 0, 1, 2]]
    """
    parts: Parts = (slice(0, None, 2), slice(1, None, 2))
    if (
        tokens.irregular
    ):  # the even and the odd ones among the real ones; where tokens are guarded, among those that may go
        index = torch.arange(tokens.n, device=metric.device).expand(tokens.batch, -1)
        if tokens.guarded is not None:
            index, order = tokens.free_index(), "position"
        if tokens.valid is not None:
            index = index.gather(1, (~tokens.valid.gather(1, index)).to(torch.int8).argsort(dim=-1, stable=True))
        parts = (index[:, ::2], index[:, 1::2])
    return _fold(metric, budget, tokens, at, parts, _half, order, penalty)


def kth_bipartite(
    metric: Tensor, budget: Budget | None, tokens: Tokens, *, at: Place, k: int = 2, fidelity: Fidelity = "paper"
) -> Hard:
    """Every k-th token (positions k - 1, 2k - 1, ...) is a destination; the most similar of the others fold into one.

    Shapes   metric: (B, N, d), any float; compared by cosine in float32, without gradient.
    budget   counts free tokens; None folds every source, N to N / k. A protected token neither goes nor receives.
    fidelity "code" drops the last N mod k tokens, as the authors' code does; "paper" treats them as sources. "code"
             needs plain input: no protected prefix, no padding, no budget.
    Source   ToMe, arXiv:2210.09461, its video variant.
    """
    if k < 2:
        raise PlanError(f"k={k}: every k-th token receives, so k is at least 2")
    if fidelity == "code":
        return _kth_of_code(metric, budget, tokens, at, k)
    target = torch.arange(tokens.n, device=metric.device)[k - 1 :: k]
    first = tokens.n - tokens.free_count

    def most(free: int) -> int:
        receivers = (first + free) // k - first // k
        return free - receivers if receivers else 0

    return _fold(metric, budget, tokens, at, (complement(target, tokens.n), target), most)


def _kth_of_code(metric: Tensor, budget: Budget | None, tokens: Tokens, at: Place, k: int) -> Hard:
    if tokens.prefix or tokens.irregular or budget is not None:
        raise PlanError("kth_bipartite(fidelity='code') takes plain tokens and no budget; use fidelity='paper'")
    n = tokens.n - tokens.n % k
    row = kth_bipartite(metric[:, :n], None, Tokens.plain(tokens.batch, n, device=tokens.device), at=at, k=k).row
    return Plan.from_rows(F.pad(row, (0, tokens.n % k), value=-1), n // k, size=tokens.size)


def random_bipartite(
    metric: Tensor, budget: Budget, tokens: Tokens, *, at: Place, order: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Hard:  # fmt: skip
    """Tokens drawn at random go, each into the most similar of those that stay.

    Shapes   metric: (B, N, d), any float; compared by cosine in float32, without gradient. order: (B, N), a
             permutation: the first r that may go are the sources; None = drawn with `generator`.
    Units    the budget counts free tokens; one free token always stays to receive.
    Source   ToMe, arXiv:2210.09461, the random partition of its ablation.
    """
    free = tokens.free_count
    if order is None:
        order = torch.rand(tokens.batch, tokens.n, generator=generator, device=metric.device).argsort(-1)
    movable = tokens.movable
    if movable is not None:  # what may not go is drawn last
        fixed = (~movable).expand_as(order).gather(-1, order)
        order = order.gather(-1, fixed.to(torch.int8).argsort(dim=-1, stable=True))
    r = _asked(budget, tokens, at, _all_but_one(free))
    goes, left = None, tokens.n - r
    if tokens.valid is not None:  # a sample's sources are its own first r, the others receive
        goes, left = _own_share(budget, tokens, at, tokens.n, _all_but_one), _left(budget, tokens, at, _all_but_one)
    return _fold_drawn(metric, tokens, at, order, r, goes, left)


def grid_bipartite(
    metric: Tensor, budget: Budget, tokens: Tokens, *, at: Place, grid: tuple[int, int],
    stride: tuple[int, int] = (2, 2), choice: Tensor | None = None, generator: torch.Generator | None = None,
) -> Hard:  # fmt: skip
    """One cell of every window of the patch grid receives; the most similar of the other patches fold into one.

    Shapes   metric: (B, N, d), any float; compared by cosine in float32, without gradient.
    grid     (height, width) of the free tokens, row-major. stride: (sy, sx) of the windows; rows and columns behind
             the last whole window hold sources only.
    choice   (height // sy, width // sx), the receiving cell of each window, row-major inside it; None = drawn with
             `generator`, or the first cell where there is none either.
    Units    the budget counts free tokens; at most all sources go, and the ledger records a request cut short.
    Raises   PlanError if the free tokens are not this grid, are padded or guarded, or the grid holds no window.
    Source   ToMe for Stable Diffusion, arXiv:2303.17604, sec. 3.
    """
    (h, w), (sy, sx) = grid, stride
    if tokens.irregular or tokens.free_count != h * w:
        raise PlanError(f"grid_bipartite needs the whole {h} x {w} grid, {h * w} tokens; {tokens.free_count} are free")
    if not (0 < sy <= h and 0 < sx <= w):
        raise PlanError(f"windows of {sy} x {sx} do not fit into a grid of {h} x {w}")
    rows, columns = h // sy, w // sx
    device = metric.device
    if choice is None:
        if generator is None:
            choice = torch.zeros(rows, columns, dtype=torch.long, device=device)
        else:
            choice = torch.randint(sy * sx, (rows, columns), generator=generator, device=device)
    if choice.shape != (rows, columns):
        raise PlanError(f"choice has shape {tuple(choice.shape)}, the grid has {rows} x {columns} windows")
    y = torch.arange(rows, device=device)[:, None] * sy + choice // sx
    x = torch.arange(columns, device=device) * sx + choice % sx
    target = (tokens.prefix + y * w + x).flatten().sort().values
    source = complement(target, tokens.n)[tokens.prefix :]
    return _fold(metric, budget, tokens, at, (source, target), lambda _: h * w - rows * columns)


def ranked_bipartite(
    scores: Tensor, metric: Tensor, budget: Budget, tokens: Tokens, *, at: Place, pruned: float = 0.0
) -> Hard:  # fmt: skip
    """The less important half of the free tokens goes, the most similar first, each into its best match among the
    more important half.

    Shapes   scores: (B, N), any float, higher is more important; metric: (B, N, d), compared by cosine in float32.
    pruned   share of those that go, the most similar ones, rounded down, that is dropped instead of merged.
    Returns  a hard plan, rows ascending by position, merged rows averaged by size; ragged where texts are padded. Ties:
             the earlier position counts as less important; the first partner wins.
    Units    the budget counts free tokens; at most half of them go, and the ledger records a request cut short.
    Source   UTRC, arXiv:2410.14725, sec. 3.
    """
    _check(metric, tokens)
    n, free = tokens.n, tokens.free_count
    most = _asked(budget, tokens, at, free // 2)
    if free < 2 or (tokens.valid is None and most <= 0):
        return tokens.unchanged(metric.device)
    with torch.no_grad():
        movable = tokens.movable
        s = scores.float().nan_to_num(nan=torch.finfo(torch.float32).min)  # what is no number goes first
        s = s if movable is None else s.masked_fill(~movable, float("inf"))
        order = s.argsort(dim=-1, stable=True)
        real: Tensor | int = free
        goes: Tensor | int = most
        if tokens.valid is not None:
            real = (tokens.valid.sum(-1, keepdim=True) - n + free).clamp(min=0)
            goes = torch.minimum(real - budget.granted(real[:, 0], free, at)[:, None], real // 2)
            left, most = _left(budget, tokens, at, _half), free // 2
        rank = torch.arange(n, device=s.device).expand_as(order)
        shut = torch.ones_like(order, dtype=torch.bool).scatter(-1, order, (rank < real // 2) | (rank >= real))
        u, source = unit(metric), order[:, : free // 2]
        at.spend(2 * source.shape[1] * n * u.shape[-1])
        similar, partner = best_partner(take(u, source), u, shut)
        similar = similar.masked_fill(rank[:, : free // 2] >= real // 2, float("-inf"))
        first = similar.argsort(dim=-1, descending=True, stable=True)[:, :most]
        into, source = partner(first), source.gather(-1, first)
        place = torch.arange(most, device=s.device).expand_as(source)
        leaves = place < goes
        cut = int(goes * pruned + 1e-9) if isinstance(goes, int) else (goes * pruned + 1e-9).long()
        stays = ~torch.zeros_like(shut).scatter(-1, source, leaves)
        if tokens.valid is not None:
            stays = stays & tokens.valid
        anchor = (~stays).to(torch.int8).argsort(dim=-1, stable=True)
        to = (stays.long().cumsum(-1) - 1).gather(-1, into).masked_fill(~leaves | (place < cut), -1)
        if tokens.valid is None:
            return Hard(n, anchor[:, : n - most], source, to).averaged(tokens.size)
        return Hard(n, anchor[:, :left], source, to, length=stays.sum(-1)).averaged(tokens.size)


def joined(kept: Hard, metric: Tensor, tokens: Tokens, *, at: Place) -> Hard:
    """A pruning plan whose dropped tokens join the most similar of those that stay; rows are averages by size.

    metric: (B, N, d), any float; compared by cosine in float32, without gradient. Of equals the earliest takes all.
    Protected tokens and padding take nobody in; where nothing else stays, what was dropped stays dropped.
    Cost     2 N M d FLOPs for M rows; memory linear in N. No synchronisation.
    """
    _check(metric, tokens)
    if kept.m == 0 or (kept.length is None and kept.m == kept.n):
        return kept
    at.spend(2 * kept.n * kept.m * metric.shape[-1])
    x = unit(metric)
    shut = None if tokens.protected is None else tokens.protected.expand(tokens.batch, -1).gather(1, kept.anchor)
    if kept.valid is not None:
        shut = ~kept.valid if shut is None else shut | ~kept.valid
    best, partner = best_partner(x, take(x, kept.anchor), shut)
    if kept.length is None:
        guest = complement(kept.anchor, kept.n)
        gone = best.gather(1, guest) > float("-inf")
    else:
        guest = torch.arange(kept.n, device=x.device).expand(*kept.lead, kept.n)
        gone = (kept.row < 0) & (best > float("-inf"))
        gone = gone if tokens.valid is None else gone & tokens.valid
    to = torch.where(gone, partner(guest), -1)
    return replace(kept, extra=guest, to=to).averaged(tokens.size)


def _asked(budget: Budget | None, tokens: Tokens, at: Place, most: int) -> int:
    """How many tokens go: what the budget asks, cut at what is possible, and the ledger told so."""
    if budget is not None and budget.adaptive:
        raise PlanError(f"{budget!r} names no count; matchings take r, keep, tokens or a threshold of similarity")
    free = tokens.free_count
    asked = most if budget is None else free - budget.keep(free, at)
    if asked > most:
        at.note(f"layer {at.layer}: asked to remove {asked} of {free} tokens, this matching takes at most {most}")
    return min(asked, most)


def _part(x: Tensor, part: slice | Tensor) -> Tensor:
    """Rows of x: (B, N[, C]) at a slice, at positions (M,) or at positions (B, M)."""
    if isinstance(part, slice):
        return x[:, part]
    return x.index_select(1, part) if part.dim() == 1 else take(x, part)


def _at(part: slice | Tensor, index: Tensor) -> Tensor:
    """Positions of the index-th entries of a part. index: (B, M)."""
    if isinstance(part, slice):
        return index * part.step + part.start
    return part[index] if part.dim() == 1 else part.gather(-1, index)


def _fold(
    metric: Tensor, budget: Budget | None, tokens: Tokens, at: Place, parts: Parts, most: Callable[[int], int],
    order: Order = "position", penalty: Tensor | None = None,
) -> Hard:  # fmt: skip
    """Sources into their most similar target, the most similar first.

    parts: sources and targets, each ascending. most: how many of some free tokens can go.
    """
    _check(metric, tokens)
    cut = budget.value if isinstance(budget, Threshold) else None
    r = most(tokens.free_count) if cut is not None else _asked(budget, tokens, at, most(tokens.free_count))
    if r <= 0:
        return tokens.unchanged(metric.device)
    with torch.no_grad():
        u = unit(metric)
        a, b = (_part(u, part) for part in parts)
        at.spend(2 * a.shape[1] * b.shape[1] * u.shape[-1])
        if not tokens.irregular and isinstance(parts[0], slice):  # only a prefix to protect: its first halves
            best, partner = best_partner(a, b, tokens.prefix // 2)
            best[:, : (tokens.prefix + 1) // 2] = float("-inf")
        else:
            movable = tokens.movable
            fixed = None if movable is None else [~_part(movable.expand(tokens.batch, -1), part) for part in parts]
            best, partner = best_partner(a, b, None if fixed is None else fixed[1], 2 * r < a.shape[1])
            if fixed is not None:
                best = best.masked_fill(fixed[0], float("-inf"))
        if penalty is not None:
            best = best - _part(penalty.detach().float().nan_to_num(0.0), parts[0])
        ranked = best.sort(dim=-1, descending=True, stable=True)
        first = ranked.indices[:, :r]
        source = _at(parts[0], first)
        # How many sources go is known from the counts alone, unless a threshold decides or the partition was made
        # without regard to padding and guarded tokens.
        apart = isinstance(parts[0], Tensor) and parts[0].dim() == 2
        if cut is None and tokens.valid is None and (apart or tokens.guarded is None):
            if order != "position":  # the rows are known without looking for them
                return _halves(ranked.indices, r, partner(first), tokens, order)
            return Plan.merge(source, _at(parts[1], partner(first)), tokens.n, tokens.size)
        value, width = ranked.values[:, :r], tokens.n
        goes = value > float("-inf")
        if cut is not None:
            goes = goes & (value >= cut)
        elif tokens.valid is not None:
            goes = goes & _own_share(budget, tokens, at, r, most)
            width = _left(budget, tokens, at, most) if apart else width
        plan = _merge_some(source, _at(parts[1], partner(first)), goes, tokens, width)
        return plan if order == "position" else _in_halves(plan, tokens, best if order == "ranked" else None)


def _fold_drawn(
    metric: Tensor, tokens: Tokens, at: Place, order: Tensor, r: int, goes: Tensor | None, left: int
) -> Hard:  # fmt: skip
    """The first tokens of an order into the most similar of the free ones behind them.

    order: (B, N); r: how many go, goes: (B, N) bool, which entries of the order do where samples differ; left: the
    most rows that any sample has then.
    """
    _check(metric, tokens)
    if r <= 0:
        return tokens.unchanged(metric.device)
    with torch.no_grad():
        u = unit(metric)
        at.spend(2 * r * (tokens.n - r) * u.shape[-1])
        if goes is None:
            source, target = order[:, :r], order[:, r:].sort(-1).values
        else:
            source, target = order[:, :r], torch.arange(tokens.n, device=order.device).expand_as(order)
        fixed = torch.zeros_like(target, dtype=torch.bool)
        if tokens.movable is not None:
            fixed = ~tokens.movable.expand(tokens.batch, -1).gather(-1, target)
        if goes is not None:  # whoever goes does not receive
            fixed = fixed | torch.zeros_like(fixed).scatter(-1, order, goes)
        _, partner = best_partner(take(u, source), take(u, target), fixed)
        into = target.gather(-1, partner(torch.arange(r, device=order.device).expand(tokens.batch, r)))
        if goes is None:
            return Plan.merge(source, into, tokens.n, tokens.size)
        return _merge_some(source, into, goes[:, :r], tokens, left)


def _check(metric: Tensor, tokens: Tokens) -> None:
    if metric.shape[-2] != tokens.n:
        raise PlanError(
            f"the metric is for {metric.shape[-2]} tokens (shape {tuple(metric.shape)}), there are {tokens.n}"
        )


def _own_share(
    budget: Budget | None, tokens: Tokens, at: Place, width: int, most: Callable[[int], int]
) -> Tensor:  # fmt: skip
    """(B, width) bool: the first pairs of each padded sample, as many as its own length asks for."""
    assert tokens.valid is not None
    free = tokens.free_count
    real = (tokens.valid.sum(-1) - tokens.n + free).clamp(min=0)
    own = on_device([most(n) for n in range(free + 1)], real.device)[real]
    if budget is not None:
        own = torch.minimum(own, real - budget.granted(real, free, at))
    return torch.arange(width, device=own.device) < own[:, None]


def _left(budget: Budget | None, tokens: Tokens, at: Place, most: Callable[[int], int]) -> int:
    """The rows of the fullest padded sample behind a matching, from the counts alone: nothing is read from the
    device, and no row is carried on that is padding in every sample."""
    free = tokens.free_count
    left = max(n - most(n) for n in range(free + 1))
    return tokens.n - free + (left if budget is None else max(left, budget.most(free, at)))


def _half(free: int) -> int:
    """How many of some free tokens a matching of two halves can fold."""
    return free // 2


def _all_but_one(free: int) -> int:
    return max(free - 1, 0)


def _merge_some(source: Tensor, into: Tensor, goes: Tensor, tokens: Tokens, width: int) -> Hard:
    """A ragged merge: each source that goes is folded into the token at `into`; padding is dropped. All (B, S).

    width: rows, at least as many as any sample has left."""
    n = tokens.n
    gone = torch.zeros(tokens.batch, n, dtype=torch.bool, device=source.device).scatter(-1, source, goes)
    stays = ~gone if tokens.valid is None else tokens.valid & ~gone
    anchor = (~stays).to(torch.int8).argsort(dim=-1, stable=True)[:, :width]
    row = stays.long().cumsum(-1) - 1
    to = row.gather(-1, into).masked_fill(~goes, -1)
    return Hard(n, anchor, source, to, length=stays.sum(-1)).averaged(tokens.size)


def _halves(ranked: Tensor, r: int, partner: Tensor, tokens: Tokens, order: Order) -> Hard:
    """A bipartite plan whose rows are the prefix, the even positions that stay, the odd ones.

    ranked: (B, E), the even ones by falling similarity, of which the first r go; the prefix is last. partner: (B, r),
    to which odd one each."""
    n, p = tokens.n, tokens.prefix
    stays, fixed = ranked[:, r:], (p + 1) // 2
    stays = stays.sort(-1).values[:, fixed:] if order == "halves" else stays[:, : stays.shape[1] - fixed]
    where = torch.arange(n, device=ranked.device)
    odd = where[p // 2 * 2 + 1 :: 2]
    anchor = torch.cat([part.expand(tokens.batch, -1) for part in (where[:p], 2 * stays, odd)], -1)
    return Hard(n, anchor, 2 * ranked[:, :r], partner + (ranked.shape[1] - r), whole=True).averaged(tokens.size)


def _in_halves(plan: Hard, tokens: Tokens, best: Tensor | None) -> Hard:
    """The rows of a bipartite plan as prefix, even positions, odd positions, padding. best: (B, ceil(N / 2)), what the
    even ones are ranked by, or None for their position. Positions are those among the real tokens."""
    where, n = plan.anchor, tokens.n
    if tokens.valid is not None:
        where = (tokens.valid.cumsum(-1) - 1).clamp(min=0).gather(-1, where)
    even = where
    if best is not None:
        rank = best.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        even = rank.gather(-1, where // 2)
    key = torch.where(where % 2 == 0, even, n + where).masked_fill(where < tokens.prefix, -1)
    if plan.valid is not None:
        key = key.masked_fill(~plan.valid, 2 * n)
    return plan.arranged(key.argsort(dim=-1, stable=True))
