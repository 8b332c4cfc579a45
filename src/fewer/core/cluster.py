"""Clusterings: a metric and a budget in, a plan that merges each cluster out. Pure, deterministic, batched.

Each algorithm stands twice: a core over a block of F tokens and K clusters that returns labels, and a wrapper that
takes the free tokens, asks the budget and builds the plan. Rows are ordered by their smallest member; the earlier
position wins every tie. A cluster's row is the average of its members, weighted by `weight` or by the tokens' sizes.

Up to `NEAR` free tokens all distances are kept. Beyond, they are computed again, some rows at a time, so that memory is
linear in F and no result changes; `agglomerative`, which has to keep them, is approximate beyond `WHOLE` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .budgets import Budget
from .match import unit
from .place import Place
from .plan import Hard, Plan, PlanError, on_device, take
from .tokens import Tokens

Linkage = Literal["average", "single", "complete"]
LINKAGES = ("average", "single", "complete")
INF = float("inf")
NEAR = 2048  # tokens up to which a matrix of their distances is kept (16 MB)
WHOLE = 3072  # tokens up to which agglomerative clustering looks at all pairs
CHUNK = 1 << 22  # distances held at once beyond NEAR, in numbers (16 MB)


# -- wrappers: tokens and budgets -----------------------------------------------------------------------------------
def agglomerative(
    metric: Tensor, budget: Budget, tokens: Tokens, *, at: Place, linkage: Linkage = "average",
    weight: Tensor | None = None,
) -> Hard:  # fmt: skip
    """Merge the two closest clusters until as many are left as the budget grants.

    Shapes   metric: (B, N, d), any float; the distance is 1 - cosine, in float32, without gradient. weight: (B, N).
    Returns  a hard plan, one row per cluster; ragged where the input is padded.
    Cost     F^2 d + R F^2 FLOPs and F^2 floats per sample for F free tokens and R merges; R steps, no sync.
    Beyond   `WHOLE` free tokens the sequence is cut into even runs of at most as many, and each merges its share of
             the pairs by itself: approximate, and noted. Below two clusters per run it stays exact.
    Raises   PlanError for an unknown linkage, a metric of another length or a budget that names no count.
    Source   ATC, arXiv:2409.11923, sec. 3; the update is Lance and Williams 1967.
    """  # fmt: skip
    if linkage not in LINKAGES:
        raise PlanError(f"linkage={linkage!r} is unknown; choose one of {', '.join(LINKAGES)}")
    field = Field.of(metric, budget, tokens, at)
    if field.all_stay:
        return tokens.unchanged(metric.device)
    cut = [max(1, -(-n // WHOLE)) for n, _ in field.table]  # runs, of every length a sample can have
    cut = [r if k >= 2 * r else 1 for r, (_, k) in zip(cut, field.table, strict=True)]
    merges = max(-(-(n - k) // r) for r, (n, k) in zip(cut, field.table, strict=True))
    runs, f = max(cut), max(-(-n // r) for r, (n, _) in zip(cut, field.table, strict=True))
    at.spend(runs * (pairs(f) * metric.shape[-1] + merges * f**2))
    with torch.no_grad():
        x = field.take(metric)
        if runs == 1:
            limit = None if field.count is None else field.number - field.count
            label = agglomerate(cosine_distance(x, field.real), merges, linkage, limit)
        else:
            at.note(
                f"layer {at.layer}: {field.f} tokens are clustered in {runs} runs, because the distances of more than "
                f"{WHOLE} are not kept"
            )
            own = torch.full((tokens.batch,), runs, device=x.device)
            if field.real is not None:
                own = on_device(cut, x.device)[field.number]
            label = _in_runs(x, field, own, (runs, f, merges), linkage)
        return field.plan(label, tokens, weight)


def _in_runs(x: Tensor, field: Field, own: Tensor, most: tuple[int, int, int], linkage: Linkage) -> Tensor:
    """Agglomerative clustering within even runs of the tokens, each with its share of the merges.

    x: (B, F, d); own: (B,) runs of each sample; most: runs of any sample, and tokens and merges of any run. Returns
    labels (B, F)."""
    (b, f, c), (runs, width, merges) = x.shape, most
    n = k = torch.full((b,), f, device=x.device)
    k = k - f + field.k
    line = torch.arange(f, device=x.device).expand(b, f)
    if field.real is not None and field.count is not None:
        n, k, line = field.number, field.count, (~field.real).to(torch.int8).argsort(dim=-1, stable=True)
    edge = torch.minimum(torch.arange(runs + 1, device=x.device), own[:, None])
    start, done = edge * n[:, None] // own[:, None], edge * (n - k)[:, None] // own[:, None]
    rank = start[:, :-1, None] + torch.arange(width, device=x.device)  # (B, runs, width), places in line
    real = (rank < start[:, 1:, None]).flatten(0, 1)
    where = line.gather(1, rank.flatten(1).clamp(max=f - 1))
    part = take(x, where).view(b * runs, width, c)
    label = agglomerate(cosine_distance(part, real), merges, linkage, done.diff(dim=-1).flatten())
    label = where.view(b * runs, width).gather(1, label).view(b, -1)
    slot = where.masked_fill(~real.view(b, -1), f)
    return slot.new_zeros(b, f + 1).scatter(1, slot, label)[:, :f]


def dpc_knn(
    metric: Tensor, budget: Budget, tokens: Tokens, *, at: Place, neighbours: int = 5, weight: Tensor | None = None
) -> Hard:
    """Density peaks: centres are dense and far from anything denser; the others join their nearest centre.

    Shapes   metric: (B, N, d); distances are Euclidean over sqrt(d), in float32, without gradient. weight: (B, N).
    Returns  a hard plan, one row per cluster. No noise is added to the densities: the earlier of two equals is denser.
    Cost     F^2 d FLOPs and F^2 floats per sample; no loop, no sync. Beyond `NEAR` tokens (4 F + 2 K) F d FLOPs.
    Source   Du et al. 2016; as TCFormer, arXiv:2204.08680, sec. 3.2, uses it.
    """
    field = Field.of(metric, budget, tokens, at)
    if neighbours < 1:
        raise PlanError(f"neighbours={neighbours}: the density needs at least one neighbour")
    if field.all_stay:
        return tokens.unchanged(metric.device)
    at.spend(Distances.flops(field.f, metric.shape[-1], 2, field.k))
    with torch.no_grad():
        d = Distances(field.take(metric), field.real, metric.shape[-1])
        label, _ = density_peaks(d, field.k, neighbours, field.real, field.count)
        return field.plan(label, tokens, weight)


def kmeans(
    metric: Tensor, budget: Budget, tokens: Tokens, *, at: Place, iterations: int = 3, weight: Tensor | None = None
) -> Hard:
    """Lloyd's algorithm from evenly spaced seeds. A seed never leaves its cluster, so no cluster runs empty.

    Shapes   metric: (B, N, d); squared Euclidean, in float32, without gradient. weight: (B, N), also of the means.
    Cost     4 F K d FLOPs per sample and iteration; iterations loops, no sync.
    """
    field = Field.of(metric, budget, tokens, at)
    if field.all_stay:
        return tokens.unchanged(metric.device)
    at.spend(4 * field.f * field.k * metric.shape[-1] * max(iterations, 1))
    with torch.no_grad():
        mass = field.mass(tokens, weight)
        label = lloyd(field.take(metric).float(), field.k, iterations, mass, field.real, field.count)
        return field.plan(label, tokens, weight)


def kmedoids(
    metric: Tensor, budget: Budget, tokens: Tokens, *, at: Place, weight: Tensor | None = None, iterations: int = 3,
    output: Literal["mean", "medoid"] = "mean",
) -> Hard:  # fmt: skip
    """Weighted k-medoids: the heaviest tokens start as centres; a centre is the member its cluster is closest to.

    Shapes   metric: (B, N, d); squared Euclidean, in float32, without gradient. weight: (B, N), non-negative: ranks
             the first centres, weighs the members' distances and the rows' averages; None = the tokens' sizes.
    output   "mean": a row is the average of its cluster; "medoid": its centre, as it is.
    Cost     F^2 d + 2 F^2 iterations FLOPs and F^2 floats per sample; iterations loops, no sync. Beyond `NEAR` tokens
             (2 F + 2 K) F d FLOPs per iteration.
    Source   Token Pooling, arXiv:2110.03860, sec. 3.2 (weighted clustering).
    """
    field = Field.of(metric, budget, tokens, at)
    if field.all_stay:
        return tokens.unchanged(metric.device)
    asked = Distances.flops(field.f, metric.shape[-1], iterations, field.k * (iterations + 1))
    at.spend(asked + 2 * field.f**2 * iterations)
    with torch.no_grad():
        d = Distances(field.take(metric), field.real)
        label, centre = medoids(d, field.k, iterations, field.mass(tokens, weight), field.real, field.count)
        if output == "medoid":
            weight = field.only(centre, tokens)
        return field.plan(label, tokens, weight)


def kcentre(metric: Tensor, budget: Budget, tokens: Tokens, *, at: Place, weight: Tensor | None = None) -> Hard:
    """Greedy k-centre: from the first free token on, the token farthest from all centres is the next one.

    Shapes   metric: (B, N, d); squared Euclidean, in float32, without gradient. weight: (B, N).
    Cost     F^2 d + 2 F K FLOPs and F^2 floats per sample; K steps, no sync. At most twice the optimal radius.
             Beyond `NEAR` tokens 4 F K d FLOPs.
    Source   Gonzalez 1985.
    """
    field = Field.of(metric, budget, tokens, at)
    if field.all_stay:
        return tokens.unchanged(metric.device)
    at.spend(Distances.flops(field.f, metric.shape[-1], 0, 2 * field.k) + 2 * field.f * field.k)
    with torch.no_grad():
        d = Distances(field.take(metric), field.real)
        first = torch.zeros(tokens.batch, dtype=torch.long, device=metric.device)
        if field.real is not None:  # the first real one
            first = field.real.to(torch.int8).argmax(-1)
        centre = farthest(d.to, first, field.k, field.f, field.real)
        if field.count is None:
            centre = centre.sort(-1).values
        return field.plan(nearest(d, centre, field.count), tokens, weight)


def runs(key: Tensor, budget: Budget, tokens: Tokens, *, at: Place) -> Hard:
    """Line the free tokens up by key and cut the line into equal runs, as many as the budget grants.

    Shapes   key: (B, N), any ordered type; ties: the earlier position first.
    Returns  a hard plan, one row per run; runs differ in length by at most one.
    Cost     two sorts of F; no loop, no sync.
    """
    field = Field.of(key[..., None], budget, tokens, at)
    if field.all_stay:
        return tokens.unchanged(key.device)
    line = field.take(key).float().nan_to_num(nan=torch.finfo(torch.float32).max)  # what is no number comes last
    if field.real is not None:
        line = line.masked_fill(~field.real, INF)
    rank = line.argsort(dim=-1, stable=True).argsort(dim=-1)
    if field.count is None:
        label = rank * field.k // field.f
    else:
        label = (rank * field.count[:, None] // field.number.clamp(min=1)[:, None]).clamp(max=field.k)
    return field.plan(label, tokens, None)


# -- cores: F tokens, K clusters ------------------------------------------------------------------------------------
PAIRS = 256  # rows of a matrix of pairs computed at once


def pairs(f: int) -> int:
    """FLOPs per channel of the dot products of f rows, nearly each pair once: about f^2 instead of twice as many."""
    return f * (f + min(f, PAIRS))


def cosine_distance(x: Tensor, real: Tensor | None = None) -> Tensor:
    """1 - cosine. x: (B, F, d) -> (B, F, F) float32, exactly symmetric, +inf on the diagonal and at padding."""
    u = unit(x)
    d = _mirrored(u, lambda i, j: (u[:, i:j] @ u[:, i:].transpose(-1, -2)).neg_().add_(1))
    d.diagonal(dim1=-2, dim2=-1).fill_(INF)
    return d if real is None else d.masked_fill_(~(real[:, None] & real[:, :, None]), INF)


def _mirrored(x: Tensor, part: Callable[[int, int], Tensor]) -> Tensor:
    """(B, F, F), exactly symmetric, from its upper triangle. part(i, j): (B, j - i, F - i), the entries of rows i to
    j from column i on. x: (B, F, d)."""
    f = x.shape[1]
    d = x.new_empty(x.shape[0], f, f)
    for i in range(0, f, PAIRS):
        j = min(i + PAIRS, f)
        s = part(i, j)
        # The two triangles of a matrix product may differ in the last bit; the order of merges must not depend on that.
        s[..., : j - i] = torch.minimum(s[..., : j - i], s[..., : j - i].transpose(-1, -2))
        d[:, i:j, i:] = s
        d[:, j:, i:j] = s[..., j - i :].transpose(-1, -2)
    return d


def loneliest(u: Tensor, real: Tensor | None = None) -> Tensor:
    """(B,): the row whose most similar other row is least similar to it, by cosine. u: (B, F, d) of length one.

    Rows are compared with all others `PAIRS` at a time, no pair twice, so memory is linear in F. On a CPU the rows
    that look loneliest so far come next, and all is done once every other row is known to have a nearer neighbour:
    at most as much work, and far less where many tokens look alike. Ties: the earlier position.
    """
    b, f, _ = u.shape
    known = u.new_full((b, f), INF)  # cosine to the nearest neighbour, of the rows compared so far
    at = torch.arange(f, device=u.device).expand(b, f)
    best = u.new_full((b, f), -INF)
    if real is not None:
        best = best.masked_fill(~real, INF)
    stops = u.device.type == "cpu" and f > PAIRS
    if stops:  # rows from everywhere first
        order = (at % -(-f // PAIRS)).argsort(dim=-1, stable=True)
        u, at, best = take(u, order), order, best.gather(1, order)
    while u.shape[1]:
        c = min(PAIRS, u.shape[1])
        s = u[:, :c] @ u.transpose(-1, -2)
        s.diagonal(dim1=-2, dim2=-1).fill_(-INF)
        if real is not None:
            there = real.gather(1, at)
            s.masked_fill_(~(there[:, :c, None] & there[:, None]), -INF)
        best = torch.maximum(best, torch.cat([s.amax(-1), s[..., c:].amax(-2)], 1))
        known = known.scatter(1, at[:, :c], best[:, :c])
        u, at, best = u[:, c:], at[:, c:], best[:, c:]
        if stops and u.shape[1]:
            if (best > known.amin(-1, keepdim=True)).all():
                break
            order = best.argsort(dim=-1)
            u, at, best = take(u, order), at.gather(1, order), best.gather(1, order)
    return known.argmin(-1)


class Distances:
    """Squared Euclidean distances between F tokens, over `scale`: never below zero, zero to itself, +inf at padding.

    x: (B, F, d), any float; compared in float32, without gradient; what is not finite counts as zero, and samples of
    huge numbers are scaled down, so that no distance overflows. Up to `NEAR` tokens all pairs are kept, exactly
    symmetric; beyond, rows are computed again whenever they are asked for, `CHUNK` distances at a time.
    """

    def __init__(self, x: Tensor, real: Tensor | None = None, scale: float = 1.0) -> None:
        self.x, self.real, self.scale = bounded(x, real), real, scale
        self.norm = (self.x * self.x).sum(-1)
        self.kept = None
        if x.shape[1] <= NEAR:
            d = _mirrored(self.x, lambda i, j: self._between(slice(i, j), self.x[:, i:], self.norm[:, i:]))
            d.diagonal(dim1=-2, dim2=-1).zero_()
            self.kept = d if real is None else d.masked_fill_(~(real[:, None] & real[:, :, None]), INF)

    @staticmethod
    def flops(f: int, d: int, whole: int, centres: int) -> int:
        """FLOPs per sample of asking for all distances so many times, and for those to so many centres in all."""
        return pairs(f) * d if f <= NEAR else 2 * f * (whole * f + centres) * d

    @property
    def f(self) -> int:
        return self.x.shape[1]

    def _between(self, rows: slice, y: Tensor, norm: Tensor, out: Tensor | None = None) -> Tensor:
        """(B, R, K): from some rows to others. y: (B, K, d); norm: (B, K), their squared lengths."""
        d = torch.baddbmm(norm[:, None], self.x[:, rows], y.transpose(-1, -2), alpha=-2, out=out)
        d = d.add_(self.norm[:, rows, None]).clamp_(min=0)
        return d if self.scale == 1 else d.div_(self.scale)

    def rows(self, centre: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Some tokens at a time, and their distances to all tokens, (B, R, F), or to those at centre, (B, R, K).

        Each part is gone when the next one comes: all are made in the same memory."""
        if self.kept is not None:
            yield slice(0, self.f), self.kept if centre is None else self.kept.gather(2, _each(centre, self.f))
            return
        y, norm = (self.x, self.norm) if centre is None else (take(self.x, centre), self.norm.gather(1, centre))
        step = max(1, CHUNK // max(1, y.shape[0] * y.shape[1]))
        scratch = y.new_empty(y.shape[0], min(step, self.f), y.shape[1])
        for i in range(0, self.f, step):
            part = slice(i, min(i + step, self.f))
            d = self._between(part, y, norm, scratch[:, : part.stop - i])
            own = torch.arange(part.start, part.stop, device=d.device)[:, None]
            which = torch.arange(self.f, device=d.device) if centre is None else centre[:, None]
            d.masked_fill_(own == which, 0)
            if self.real is not None:
                there = self.real if centre is None else self.real.gather(1, centre)
                d.masked_fill_(~(self.real[:, part, None] & there[:, None]), INF)
            yield part, d

    def each(self, ask: Callable[[slice, Tensor], Tensor], centre: Tensor | None = None) -> Tensor:
        """What is asked of every token's distances, (B, F, ...). ask: some rows (B, R, F or K) -> (B, R, ...)."""
        out: Tensor | None = None
        for part, some in self.rows(centre):
            answer = ask(part, some)
            if self.kept is not None:
                return answer
            if out is None:  # one memory for all answers: little ones kept between large ones would scatter both
                out = answer.new_empty(answer.shape[0], self.f, *answer.shape[2:])
            out[:, part] = answer
        assert out is not None
        return out

    def to(self, at: Tensor) -> Tensor:
        """(B, F): how far all tokens are from one of each sample. at: (B,) positions."""
        if self.kept is not None:
            return take(self.kept, at[:, None])[:, 0]
        y = take(self.x, at[:, None])
        d = self._between(slice(None), y, self.norm.gather(1, at[:, None]))[..., 0].scatter(1, at[:, None], 0)
        return d if self.real is None else d.masked_fill(~self.real, INF)


def bounded(x: Tensor, real: Tensor | None = None) -> Tensor:
    """x as float32 without gradient, finite and small enough that squared distances are too. x: (B, F, d)."""
    x = x.detach().float().nan_to_num(0.0, 0.0, 0.0)
    if real is not None:
        x = x.masked_fill(~real[..., None], 0)
    most = torch.finfo(torch.float32).max ** 0.5 / (4 * max(x.shape[-1], 1) ** 0.5)
    return x / (x.abs().amax(dim=(-2, -1), keepdim=True) / most).clamp(min=1)


def _each(index: Tensor, f: int) -> Tensor:
    """(B, K) positions for each of f tokens, (B, F, K)."""
    return index[:, None].expand(-1, f, -1)


def agglomerate(d: Tensor, merges: int, linkage: Linkage, limit: Tensor | None = None) -> Tensor:
    """The cluster of each token after some merges, named by its smallest member. Returns (B, F) long.

    d: (B, F, F) symmetric distances, +inf on the diagonal; used up. limit: (B,) merges of each sample, at most
    `merges`; None = all. A step is a vectorised row minimum and a handful of operations on rows.
    """
    b, f, _ = d.shape
    if limit is not None:  # samples that are done merge a spare row with itself
        d = torch.nn.functional.pad(d, (0, 1, 0, 1), value=INF)
        f += 1
    flat = d.view(b * f, f)
    base = torch.arange(b, device=d.device) * f
    size = torch.ones(b * f, device=d.device)
    rows = torch.full((2, b, f), INF, device=d.device)  # the merged row, and what stands where the other one was
    new = rows[0]
    columns = rows.permute(1, 2, 0)
    pair = torch.empty(2, b, dtype=torch.long, device=d.device)
    index = pair.t()[:, None].expand(b, f, 2)
    kept, gone = [], []
    for step in range(merges):
        i = d.amin(-1).argmin(-1)
        if limit is not None:
            i = torch.where(step < limit, i, f - 1)
        at_i = i + base
        mine = flat.index_select(0, at_i)
        j = mine.argmin(-1)
        if limit is not None:
            j = torch.where(step < limit, j, f - 1)
        at_j = j + base
        theirs = flat.index_select(0, at_j)
        if linkage == "average":
            n, m = size.index_select(0, at_i), size.index_select(0, at_j)
            total = n + m
            torch.div((n[:, None] * mine).add_(m[:, None] * theirs), total[:, None], out=new)
            size.index_copy_(0, at_i, total)
        elif linkage == "complete":
            torch.maximum(mine, theirs, out=new)
        else:  # the pair's own distance must not survive as a distance of the new row to itself
            torch.minimum(mine, theirs, out=new)
            new.scatter_(1, i[:, None], INF)
        pair[0], pair[1] = i, j
        flat.index_copy_(0, at_i, new)
        d.scatter_(2, index, columns)
        flat.index_fill_(0, at_j, INF)
        kept.append(i)
        gone.append(j)
    parent = torch.arange(f, device=d.device).repeat(b, 1)
    if kept:
        parent.scatter_(1, torch.stack(gone, 1), torch.stack(kept, 1))
    for _ in range(max(1, math.ceil(math.log2(max(f, 2))))):  # a parent comes earlier, so jumping ends at the root
        parent = parent.gather(1, parent)
    return parent if limit is None else parent[:, : f - 1]


def density_peaks(
    d: Distances, k: int, neighbours: int | Tensor, real: Tensor | None = None, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Labels (B, F) in [0, k) and centres (B, k), positions. d: squared distances over channels.

    Centres are the highest `peaks`. neighbours: one number, or one per sample, (B,), of at most k.
    """
    centre = peaks(d, neighbours, real, k).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    if count is None:
        centre = centre.sort(-1).values
    return nearest(d, centre, count), centre


def peaks(d: Distances, neighbours: int | Tensor, real: Tensor | None = None, most: int | None = None) -> Tensor:
    """How much each token is a peak of density: density times separation, (B, F) float32, -1 at padding.

    density = exp(-mean of d over the nearest `neighbours`), the token itself being one of them; separation = distance
    to the nearest denser token, for the densest one the largest distance there is. d: squared distances over channels.
    neighbours: one number, or one per sample, (B,), of at most `most`.
    """
    f = d.f
    nearby = min(neighbours if isinstance(neighbours, int) else f if most is None else most, f)
    near = d.each(lambda _, some: some.topk(nearby, dim=-1, largest=False).values)
    if isinstance(neighbours, Tensor):
        beyond = torch.arange(nearby, device=near.device) >= neighbours[:, None, None]
        real = torch.ones(near.shape[:2], dtype=torch.bool, device=near.device) if real is None else real
        near = near.masked_fill(beyond, INF)
    if real is None:
        density = (-near.mean(-1)).exp()
    else:  # a sample shorter than `neighbours` averages over what it has
        there = near.isfinite()
        density = (-near.masked_fill(~there, 0).sum(-1) / there.sum(-1).clamp(min=1)).exp().masked_fill(~real, -1)
    rank = density.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)

    def ends(part: slice, some: Tensor) -> Tensor:
        apart = some.masked_fill(rank[:, part, None] <= rank[:, None], INF).amin(-1)
        far = (some if real is None else some.masked_fill(some == INF, 0)).amax(-1)
        return torch.stack([apart, far], -1)

    apart, far = d.each(ends).unbind(-1)
    separation = torch.minimum(apart, far.amax(-1, keepdim=True)).sqrt()
    score = density * separation
    return score if real is None else score.masked_fill(~real, -1)


def lloyd(
    x: Tensor, k: int, iterations: int, mass: Tensor, real: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """k-means labels (B, F) in [0, k). x: (B, F, d) float32; mass: (B, F) weights of the means."""
    x = bounded(x, real)
    b, f, c = x.shape
    step = torch.arange(k, device=x.device)
    if real is None or count is None:
        seed = (step * f // k).expand(b, k)
        spare = None
    else:
        seed = step * real.sum(-1, keepdim=True) // count.clamp(min=1)[:, None]
        spare = step >= count[:, None]
        line = (~real).to(torch.int8).argsort(dim=-1, stable=True)  # wherever padding stands
        seed = line.gather(1, seed.clamp(max=f - 1))
    centre = take(x, seed)
    own = step.expand(b, k)
    label = own
    for _ in range(max(iterations, 1)):
        label = _put(_closest(x, centre, spare), seed, own, spare)
        m = mass[..., None]
        index = label[..., None]
        total = x.new_zeros(b, k, 1).scatter_add(1, index, m)
        mean = x.new_zeros(b, k, c).scatter_add(1, index.expand(b, f, c), x * m) / total.clamp_min(1e-30)
        centre = torch.where(total > 0, mean, centre)
    return label


def _closest(x: Tensor, centre: Tensor, spare: Tensor | None) -> Tensor:
    """(B, F): the nearest of some centres, (B, K, d), but for the spare ones. x: (B, F, d)."""
    norm = (centre * centre).sum(-1)  # |x|^2 is the same for all centres of a token and is left out
    if spare is not None:
        norm = norm.masked_fill(spare, INF)
    step = max(1, CHUNK // max(1, centre.shape[0] * centre.shape[1]))
    parts = x.split(step, 1)
    return torch.cat([torch.baddbmm(norm[:, None], p, centre.transpose(-1, -2), alpha=-2).argmin(-1) for p in parts], 1)


def medoids(
    d: Distances, k: int, iterations: int, mass: Tensor, real: Tensor | None = None, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """k-medoids: labels (B, F) in [0, k) and centres (B, k). d: squared distances; mass: (B, F)."""
    b, f = mass.shape
    rank = mass if real is None else mass.masked_fill(~real, -INF)
    centre = rank.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    if count is None:
        centre = centre.sort(-1).values
    where, weight = torch.arange(f, device=mass.device).expand(b, f), mass[..., None]
    label = nearest(d, centre, count)
    for _ in range(iterations):
        shut = label if real is None else label.masked_fill(~real, -1)

        def away(part: slice, some: Tensor, own: Tensor = label, shut: Tensor = shut) -> Tensor:
            return (some.masked_fill(own[:, part, None] != shut[:, None], 0) @ weight)[..., 0]

        cost = d.each(away)
        if real is not None:
            cost = cost.masked_fill(~real, INF)
        best = cost.new_full((b, k), INF).scatter_reduce(1, label, cost, "amin")
        wins = where.masked_fill(cost > best.gather(1, label), f)
        found = where.new_full((b, k), f).scatter_reduce(1, label, wins, "amin")
        centre = torch.where(found < f, found, centre)
        label = nearest(d, centre, count)
    return label, centre


def farthest(reach: Callable[[Tensor], Tensor], first: Tensor, k: int, f: int, real: Tensor | None = None) -> Tensor:
    """Greedy max-min: positions (B, k) in the order chosen.

    reach: positions (B,) -> (B, F), how far all tokens are from these; first: (B,) the start."""
    b = first.shape[0]
    apart = torch.full((b, f), INF, device=first.device)
    if real is not None:
        apart = apart.masked_fill(~real, -1)
    chosen = [first]
    for _ in range(k - 1):
        apart = torch.minimum(apart, reach(chosen[-1]))
        apart = apart.scatter(1, chosen[-1][:, None], -1.0 - len(chosen))  # never again, even among duplicates
        chosen.append(apart.argmax(-1))
    return torch.stack(chosen, 1)


def known(d: Tensor) -> Callable[[Tensor], Tensor]:
    """`reach` of `farthest` for a matrix of distances. d: (B, F, F)."""
    return lambda at: take(d, at[:, None])[:, 0]


def spread(
    x: Tensor, k: int, centres: Tensor | None, fixed: int, real: Tensor | None = None, block: int = 1
) -> Tensor:  # fmt: skip
    """Greedy max-min with a running minimum instead of a matrix of distances. Returns (B, N) float32: how early a
    token was chosen, higher = earlier, the tokens never chosen lowest.

    x: (B, N, d); centres: (B or 1, N) bool, `fixed` of them in each sample (at most), chosen before all others; k:
    further tokens; block: how many of these are chosen at once.
    """
    x = bounded(x, real)
    b, n, _ = x.shape
    limit = torch.finfo(torch.float32).max
    apart = x.new_full((b, n), limit)
    given = torch.zeros(1, n, dtype=torch.bool, device=x.device) if centres is None else centres
    apart = apart.masked_fill(given, INF)
    if real is not None:
        apart = apart.masked_fill(~real, -1)
    score = x.new_full((b, n), -limit)
    alone = max(fixed, 1)  # centres one by one, and the first token where there is none
    sizes = [1] * alone + [block] * -(-(fixed + k - alone) // block)
    for turn, size in enumerate(sizes):
        if size == 1:
            far, pick = apart.max(-1, keepdim=True)
        else:
            far, pick = (v[:, :size] for v in apart.sort(dim=-1, descending=True, stable=True))
        early = -torch.arange(pick.shape[1], device=x.device) - float(turn * block)
        score = score.scatter(1, pick, torch.where(far >= 0, early, score.gather(1, pick)))
        reach = torch.cdist(x, take(x, pick), compute_mode="donot_use_mm_for_euclid_dist").amin(-1)
        apart = torch.where(apart == INF, apart, torch.minimum(apart, reach)).scatter(1, pick, -1.0)
    return score


def nearest(d: Distances, centre: Tensor, count: Tensor | None = None) -> Tensor:
    """The nearest centre of each token, (B, F) in [0, k); a centre belongs to itself. centre: (B, k) positions."""
    b, k = centre.shape
    own = torch.arange(k, device=centre.device)
    spare = None if count is None else own >= count[:, None]

    def closest(_: slice, some: Tensor) -> Tensor:
        return (some if spare is None else some.masked_fill(spare[:, None], INF)).argmin(-1)

    return _put(d.each(closest, centre), centre, own.expand(b, k), spare)


def _put(label: Tensor, where: Tensor, own: Tensor, spare: Tensor | None) -> Tensor:
    """label with its entries at `where` set to `own`, but for the spare ones."""
    if spare is None:
        return label.scatter(1, where, own)
    wide = torch.nn.functional.pad(label, (0, 1))
    return wide.scatter(1, where.masked_fill(spare, label.shape[1]), own)[:, :-1]


def weighed(x: Tensor, least: float) -> Tensor:
    """Weights as float32 without gradient: numbers, at least `least`, and small enough to be added up."""
    return x.detach().float().nan_to_num(0.0).clamp(least, 1e30)


# -- the free tokens as one block -----------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Field:
    """The F free tokens of each sample, side by side, and the number of clusters they become.

    start   their first position where they are a run; index: (B, F) positions otherwise
    f, k    tokens and clusters, the largest of any sample
    real    (B, F) bool and count (B,), the clusters of each sample, where samples are padded
    table   tokens and clusters, the fewest there can be, of every length that a sample can have
    """

    start: int
    index: Tensor | None
    f: int
    k: int
    real: Tensor | None = None
    count: Tensor | None = None
    table: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, metric: Tensor, budget: Budget, tokens: Tokens, at: Place) -> Field:
        if metric.shape[-2] != tokens.n:
            raise PlanError(
                f"the metric is for {metric.shape[-2]} tokens (shape {tuple(metric.shape)}), there are {tokens.n}"
            )
        f = tokens.free_count
        index = None
        if tokens.guarded is not None:
            index = tokens.free_index()
        table = budget.counts(f, at, least=1)
        if tokens.valid is None:
            return cls(tokens.prefix, index, f, table[f], table=((f, table[f]),))
        real = tokens.valid[:, tokens.prefix :] if index is None else tokens.valid.gather(1, index)
        count = budget.granted(real.sum(-1), f, at, least=1)
        if at.starts is not None:  # the fewest clusters: a sample may have started with no more tokens than it has
            table = [min(k, max(budget.keep(n, replace(at.quiet, start=n)), min(1, n))) for n, k in enumerate(table)]
        return cls(tokens.prefix, index, f, budget.most(f, at, least=1), real, count, tuple(enumerate(table)))

    @property
    def all_stay(self) -> bool:
        return self.count is None and self.k == self.f

    @property
    def number(self) -> Tensor:
        """(B,): the real tokens of each sample."""
        assert self.real is not None
        return self.real.sum(-1)

    def take(self, x: Tensor) -> Tensor:
        """The block of (B, N[, C])."""
        if self.index is not None:
            return take(x, self.index)
        return x[:, self.start :]

    def mass(self, tokens: Tokens, weight: Tensor | None) -> Tensor:
        """(B, F) float32: weight, or sizes, or ones; zero at padding."""
        given = tokens.size if weight is None else weight
        shape = (tokens.batch, self.f)
        if given is None:
            mass = torch.ones(shape, device=tokens.device if self.real is None else self.real.device)
        else:
            mass = weighed(self.take(given), 0)
        return mass if self.real is None else mass.masked_fill(~self.real, 0)

    def only(self, centre: Tensor, tokens: Tokens) -> Tensor:
        """(B, N) weights: one at the centres (B, k) and outside the block, zero elsewhere in it."""
        weight = torch.zeros(tokens.batch, self.f + 1, device=centre.device)
        if self.count is not None:
            spare = torch.arange(self.k, device=centre.device) >= self.count[:, None]
            centre = centre.masked_fill(spare, self.f)
        weight = weight.scatter(1, centre, 1.0)[:, : self.f]
        if self.index is None:
            return torch.cat([weight.new_ones(tokens.batch, self.start), weight], 1)
        return weight.new_ones(tokens.batch, tokens.n).scatter(1, self.index, weight)

    def plan(self, label: Tensor, tokens: Tokens, weight: Tensor | None) -> Hard:
        """label: (B, F), clusters named in any way, none of them empty. Rows by smallest member."""
        b, n = tokens.batch, tokens.n
        where = torch.arange(n, device=label.device).expand(b, n)
        place = where[:, self.start :] if self.index is None else self.index
        if self.real is not None:  # padding is in no cluster
            label = label.masked_fill(~self.real, self.f)
        first = place.new_full((b, self.f + 1), n).scatter_reduce(1, label, place, "amin")
        root = where.scatter(1, place, first.gather(1, label))
        alive = root == where
        if tokens.valid is not None:
            alive = alive & tokens.valid
        row = (alive.long().cumsum(-1) - 1).gather(1, root.clamp(max=n - 1))
        m = n - self.f + self.k
        # Members that all weigh nothing still make a row: their even average.
        size = tokens.size if weight is None else weighed(weight, 1e-12)
        if self.count is None:
            return Plan.from_rows(row, m, size=size)
        assert tokens.valid is not None
        lengths = tokens.valid.sum(-1) - self.number + self.count
        return Plan.from_rows(row.masked_fill(~tokens.valid, -1), m, size=size, lengths=lengths)
