"""Plan: which of N tokens become which of M rows, and with what weight.

A plan is a linear map over `(*lead, N)`, where lead is B, or B x KV heads. Three forms share one set of verbs:

- `Hard`: every source goes to at most one row. Stored as the token that stays in each row (`anchor`) plus the few
  sources folded into it (`extra`, `to`), so executing it is one gather and one small scatter.
- `Soft`: a weight matrix; every source may contribute to every row.
- `Masked`: N rows in, N rows out, with a differentiable keep policy. The training form.

The dense matrix is the definition: `plan.reduce(x) == plan.dense() @ x`, and composition is a product.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


class PlanError(ValueError):
    """A plan was built from, or given, tensors that do not fit it."""


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x at index. x: (*lead, N, C) or (*lead, N); index: (*lead, M), long. Returns (*lead, M[, C])."""
    if x.dim() == index.dim():
        return x.gather(-1, index)
    lead, n, c = index.shape[:-1], x.shape[-2], x.shape[-1]
    flat = x.reshape(-1, c)
    return flat.index_select(0, _flat_index(index, n)).view(*lead, index.shape[-1], c)


def _flat_index(index: Tensor, n: int) -> Tensor:
    """Indices into the flattened (lead * N) rows. Copying whole rows is several times faster than gather."""
    m = index.shape[-1]
    rows = index.reshape(-1, m)
    offset = torch.arange(rows.shape[0], device=index.device)[:, None] * n
    return (rows + offset).reshape(-1)


def complement(index: Tensor, n: int) -> Tensor:
    """The sources absent from index, ascending. index: (*lead, M) distinct; returns (*lead, N - M)."""
    taken = torch.zeros(*index.shape[:-1], n, dtype=torch.int8, device=index.device).scatter_(-1, index, 1)
    return taken.argsort(dim=-1, stable=True)[..., : n - index.shape[-1]]


@dataclass(frozen=True, eq=False)
class Plan:
    """The verbs every plan has. Build one with `keep`, `merge`, `from_rows`, `soft`, `mask` or `identity`."""

    n: int

    # -- building ---------------------------------------------------------------------------------------------------
    @staticmethod
    def identity(lead: tuple[int, ...], n: int, device: torch.device | None = None) -> Hard:
        """Every token stays where it is."""
        return Hard(n, torch.arange(n, device=device).expand(*lead, n))

    @staticmethod
    def keep(index: Tensor, n: int, lengths: Tensor | None = None) -> Hard:
        """Prune: the sources in index stay, in that order; the others are dropped.

        index: (*lead, M) long, distinct in each sample. lengths: (*lead,) where samples keep different numbers; entries
        of index at and beyond a sample's length are ignored.
        """
        return Hard(n, index, length=lengths)

    @staticmethod
    def merge(source: Tensor, into: Tensor, n: int, size: Tensor | None = None) -> Hard:
        """Fold each source into the token at position `into`; every other token stays. Rows ascend by position.

        source, into: (*lead, r) positions; a target must not itself be a source. size: (*lead, N) tokens each source
        stands for, the weights of the average; None means one each.
        Returns a hard plan from N to N - r rows whose weights sum to one in each row.
        """
        lead, r = source.shape[:-1], source.shape[-1]
        stays = torch.ones(*lead, n, dtype=torch.long, device=source.device).scatter_(-1, source, 0)
        row = stays.cumsum(-1) - 1
        slot = torch.where(stays.bool(), row, n - r)
        where = torch.arange(n, device=source.device).expand(*lead, n)
        anchor = where.new_empty(*lead, n - r + 1).scatter_(-1, slot, where)[..., :-1]
        return Hard(n, anchor, source, row.gather(-1, into)).averaged(size)

    @staticmethod
    def from_rows(row: Tensor, m: int, weight: Tensor | None = None, size: Tensor | None = None) -> Hard:
        """A hard plan from its integer map. The first source of a row anchors it.

        row: (*lead, N) long, the row of each source, -1 = dropped; each of the m rows needs a source. weight:
        (*lead, N) combining weights taken as they are; without them rows are averages weighted by size.
        """
        lead, n = row.shape[:-1], row.shape[-1]
        where = torch.arange(n, device=row.device).expand(*lead, n)
        slot = torch.where(row < 0, m, row)
        first = torch.full((*lead, m + 1), n, device=row.device)
        anchor = first.scatter_reduce(-1, slot, where, "amin")[..., :m]
        extra = complement(anchor, n)
        plan = Hard(n, anchor, extra, row.gather(-1, extra))
        if weight is None:
            return plan.averaged(size)
        return replace(plan, anchor_weight=weight.gather(-1, anchor), extra_weight=weight.gather(-1, extra))

    @staticmethod
    def soft(matrix: Tensor, mass: Tensor | None = None, position: Tensor | None = None) -> Soft:
        """A dense plan. matrix: (*lead, M, N). mass: (*lead, M, N), how sizes travel (columns sum to one); by default
        the matrix with its columns normalised. position: (*lead, M), the source each row mostly stands for."""
        return Soft(matrix.shape[-1], matrix, mass, position)

    @staticmethod
    def mask(policy: Tensor) -> Masked:
        """The training form: all N rows stay, policy (*lead, N) in [0, 1] says how much each is still there."""
        return Masked(policy.shape[-1], policy)

    @staticmethod
    def where(condition: Tensor, yes: Hard, no: Hard) -> Hard:
        """Per sample one of two hard plans of the same shape. condition: (*lead,) bool."""
        if yes.anchor.shape != no.anchor.shape:
            raise PlanError(f"Plan.where needs equal row counts, got {yes.m} and {no.m}")
        yes, no = yes.spelled_out(), no.spelled_out()
        pick = condition[..., None]
        names = ("anchor", "extra", "to", "anchor_weight", "extra_weight", "extra_mass")
        return Hard(yes.n, *(torch.where(pick, getattr(yes, k), getattr(no, k)) for k in names))

    # -- what every form answers ------------------------------------------------------------------------------------
    @property
    def m(self) -> int:
        """Rows that come out, counting padding."""
        raise NotImplementedError

    @property
    def lead(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def lengths(self) -> Tensor | None:
        """(*lead,) rows that are real, where samples keep different numbers; None where all rows are."""
        return None

    @property
    def row(self) -> Tensor:
        """(*lead, N): the row each source went to, -1 = dropped. For a soft plan the row it gave most weight."""
        raise NotImplementedError

    @property
    def position(self) -> Tensor:
        """(*lead, M): the source each row stands for, for streams that must not be averaged."""
        raise NotImplementedError

    def reduce(self, x: Tensor) -> Tensor:
        """Combine features. x: (*lead, N, C) -> (*lead, M, C), same dtype and device. Padding rows are zero."""
        raise NotImplementedError

    def restore(self, y: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """Spread rows back over the sources. y: (*lead, M, C) -> (*lead, N, C); dropped sources get fill."""
        raise NotImplementedError

    def sizes(self, size: Tensor | None) -> Tensor:
        """How many tokens each row stands for. size: (*lead, N) or None (ones) -> (*lead, M), float32."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """(*lead, M, N), float32: the definition. Small N and tests only."""
        raise NotImplementedError

    def gather(self, stream: Tensor) -> Tensor:
        """Streams that must not be averaged (positions, masks, labels): (*lead, N[, C]) -> (*lead, M[, C])."""
        return take(stream, self.position)

    def then(self, next: Plan) -> Plan:
        """This plan, then the next one on its rows: `a.then(b).dense() == b.dense() @ a.dense()`."""
        if next.n != self.m:
            raise PlanError(f"the first plan gives {self.m} rows, the next one takes {next.n}")
        if isinstance(self, Hard) and isinstance(next, Hard):
            return self._then_hard(next)
        return Plan.soft(next.dense() @ self.dense(), position=self.position.gather(-1, next.position))

    def stats(self) -> dict[str, float]:
        """Counts averaged over the samples, for reports (synchronises): n, m, merged, dropped."""
        row = self.row
        dropped = (row < 0).float().sum(-1).mean().item()
        rows = self.m if self.lengths is None else self.lengths.float().mean().item()
        return {"n": self.n, "m": rows, "dropped": dropped, "merged": self.n - rows - dropped}

    def _check(self, x: Tensor, n: int, axis: int) -> None:
        if x.shape[axis] != n:
            raise PlanError(f"this plan takes {self.n} tokens to {self.m}; got {x.shape[axis]} (shape {tuple(x.shape)})")


@dataclass(frozen=True, eq=False)
class Hard(Plan):
    """Each source goes to one row or nowhere.

    anchor        (*lead, M)  the source that stays in each row
    extra, to     (*lead, E)  further sources and their row; to = -1: dropped (sources named nowhere are dropped too)
    *_weight                  combining weights; None = one
    extra_mass    (*lead, E)  share of an extra's size its row inherits; None = all of it
    length        (*lead,)    real rows, where ragged
    front                     rows this plan adds right behind the protected prefix (package tokens)
    preserve_norm             rescale each row to the largest norm among its members after averaging (MLERP)
    """

    anchor: Tensor
    extra: Tensor | None = None
    to: Tensor | None = None
    anchor_weight: Tensor | None = None
    extra_weight: Tensor | None = None
    extra_mass: Tensor | None = None
    length: Tensor | None = field(default=None, kw_only=True)
    front: int = field(default=0, kw_only=True)
    preserve_norm: bool = field(default=False, kw_only=True)

    @property
    def m(self) -> int:
        return self.anchor.shape[-1]

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.anchor.shape[:-1])

    @property
    def lengths(self) -> Tensor | None:
        return self.length

    @property
    def valid(self) -> Tensor | None:
        """(*lead, M) bool, True where a row is real; None where all are."""
        if self.length is None:
            return None
        return torch.arange(self.m, device=self.anchor.device) < self.length[..., None]

    @property
    def averages(self) -> bool:
        """Whether any row can hold more than one source (known from shapes alone)."""
        return self.extra is not None and self.extra.shape[-1] > 0 and self.to is not None

    @property
    def row(self) -> Tensor:
        lead, m = self.lead, self.m
        row = torch.full((*lead, self.n + 1), -1, device=self.anchor.device)
        if self.extra is not None and self.to is not None:
            row.scatter_(-1, self.extra, self.to)
        rows = torch.arange(m, device=self.anchor.device).expand(*lead, m)
        valid = self.valid
        slot = self.anchor if valid is None else torch.where(valid, self.anchor, self.n)
        return row.scatter_(-1, slot, rows)[..., : self.n]

    @property
    def position(self) -> Tensor:
        return self.anchor

    @property
    def weight(self) -> Tensor:
        """(*lead, N): the combining weight of each source, 0 where dropped."""
        weight = torch.zeros(*self.lead, self.n + 1, device=self.anchor.device)
        if self.extra is not None and self.to is not None:
            extra = torch.ones_like(self.extra, dtype=weight.dtype) if self.extra_weight is None else self.extra_weight
            weight = weight.scatter(-1, self.extra, extra.float().masked_fill(self.to < 0, 0))
        valid = self.valid
        slot = self.anchor if valid is None else torch.where(valid, self.anchor, self.n)
        anchor = torch.ones_like(self.anchor, dtype=weight.dtype) if self.anchor_weight is None else self.anchor_weight
        return weight.scatter(-1, slot, anchor.float())[..., : self.n]

    def averaged(self, size: Tensor | None) -> Hard:
        """The same rows as averages weighted by size. size: (*lead, N) or None for one each."""
        if not self.averages:
            return self
        assert self.extra is not None and self.to is not None
        a = torch.ones_like(self.anchor, dtype=torch.float32) if size is None else size.gather(-1, self.anchor)
        e = torch.ones_like(self.extra, dtype=torch.float32) if size is None else size.gather(-1, self.extra)
        e = e.masked_fill(self.to < 0, 0)
        to = self.to.clamp(min=0)
        total = a.scatter_add(-1, to, e)
        return replace(self, anchor_weight=a / total, extra_weight=e / total.gather(-1, to))

    def pruned(self) -> Hard:
        """The same rows without what was folded into them."""
        return Hard(self.n, self.anchor, length=self.length, front=self.front)

    def norm_preserving(self) -> Hard:
        """Average, then rescale each row to the largest norm among its members (MLERP, arXiv:2312.01026)."""
        return replace(self, preserve_norm=True)

    def spelled_out(self) -> Hard:
        """The same plan with every optional tensor written down and all other sources as dropped extras."""
        if self.extra is not None and self.extra.shape[-1] == self.n - self.m:
            extra, to = self.extra, self.to
        else:
            extra = complement(self.anchor, self.n)
            to = self.row.gather(-1, extra)
        assert to is not None
        weight, mass = self.weight, torch.ones_like(extra, dtype=torch.float32)
        if self.extra_mass is not None and self.extra is not None:
            mass = torch.ones(*self.lead, self.n, device=mass.device).scatter(-1, self.extra, self.extra_mass)
            mass = mass.gather(-1, extra)
        return replace(
            self, extra=extra, to=to, extra_mass=mass,
            anchor_weight=weight.gather(-1, self.anchor), extra_weight=weight.gather(-1, extra),
        )  # fmt: skip

    def fuse_rest(self, weight: Tensor, *, normalise: bool = False, protect: bool = False, prefix: int = 0) -> Hard:
        """One more row: the weighted sum of everything this pruning plan drops.

        weight: (*lead, N), taken as it is (EViT) or divided by its sum over the dropped (`normalise`, SPViT).
        protect: the new row goes right behind the `prefix` protected rows and is protected from now on; else it is
        last. A plan that drops nothing is returned unchanged.
        """
        if self.averages:
            raise PlanError("fuse_rest works on a pruning plan; this one already merges")
        if self.m == self.n and self.length is None:
            return self
        if self.length is not None:
            return self._fuse_ragged(weight, normalise)
        rest = complement(self.anchor, self.n)
        w = weight.gather(-1, rest).float()
        if normalise:
            w = w / w.sum(-1, keepdim=True).clamp_min(1e-12)
        at = prefix if protect else self.m
        ones = torch.ones_like(self.anchor, dtype=w.dtype)
        return Hard(
            self.n,
            torch.cat([self.anchor[..., :at], rest[..., :1], self.anchor[..., at:]], -1),
            rest[..., 1:],
            torch.full_like(rest[..., 1:], at),
            torch.cat([ones[..., :at], w[..., :1], ones[..., at:]], -1),
            w[..., 1:],
            front=int(protect),
        )

    def _fuse_ragged(self, weight: Tensor, normalise: bool) -> Hard:
        """fuse_rest where samples keep different numbers: the new row stands at each sample's old length."""
        assert self.length is not None and self.valid is not None
        gone = self.row < 0
        w = weight.float().masked_fill(~gone, 0)
        if normalise:
            w = w / w.sum(-1, keepdim=True).clamp_min(1e-12)
        first = gone.to(torch.int8).argmax(-1, keepdim=True)
        some = gone.any(-1)
        anchor = torch.cat([self.anchor, first], -1).scatter(-1, self.length[..., None], first)
        ones = torch.ones_like(anchor, dtype=w.dtype)
        anchor_weight = ones.scatter(-1, self.length[..., None], w.gather(-1, first))
        where = torch.arange(self.n, device=anchor.device).expand_as(gone)
        to = torch.where(gone & (where != first), self.length[..., None], -1)
        return Hard(self.n, anchor, where, to, anchor_weight, w, length=self.length + some.long())

    def reduce(self, x: Tensor) -> Tensor:
        self._check(x, self.n, -2)
        y = take(x, self.anchor)
        if self.anchor_weight is not None:
            y = y * self.anchor_weight[..., None].to(x.dtype)
        if self.averages:
            assert self.extra is not None and self.to is not None
            e = take(x, self.extra)
            if self.extra_weight is not None:
                e = e * self.extra_weight[..., None].to(x.dtype)
            e = e.masked_fill((self.to < 0)[..., None], 0)
            index = _flat_index(self.to.clamp(min=0), self.m)
            c = x.shape[-1]
            y = y.reshape(-1, c).index_add(0, index, e.reshape(-1, c)).view_as(y)
            if self.preserve_norm:
                y = self._to_largest_norm(x, y)
        if self.length is not None:
            assert self.valid is not None
            y = y.masked_fill(~self.valid[..., None], 0)
        return y

    def _to_largest_norm(self, x: Tensor, y: Tensor) -> Tensor:
        """y scaled row by row to the largest norm among its members; where members cancel out, the anchor itself."""
        assert self.extra is not None and self.to is not None
        norm = x.float().norm(dim=-1)
        mine = norm.gather(-1, self.anchor)
        theirs = norm.gather(-1, self.extra).masked_fill(self.to < 0, 0)
        top = mine.scatter_reduce(-1, self.to.clamp(min=0), theirs, "amax")
        now = y.float().norm(dim=-1)
        scale = torch.where(now > 1e-6 * top, top / now.clamp_min(1e-30), 0)
        own = take(x, self.anchor) * (top / mine.clamp_min(1e-30))[..., None].to(x.dtype)
        return torch.where((scale == 0)[..., None], own, y * scale[..., None].to(y.dtype))

    def restore(self, y: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        self._check(y, self.m, -2)
        row = self.row
        x = take(y, row.clamp(min=0))
        filler = fill if isinstance(fill, Tensor) else torch.as_tensor(fill, dtype=y.dtype, device=y.device)
        return torch.where((row < 0)[..., None], filler, x)

    def sizes(self, size: Tensor | None) -> Tensor:
        if size is None:
            size = torch.ones(*self.lead, self.n, device=self.anchor.device)
        out = size.gather(-1, self.anchor)
        if self.averages:
            assert self.extra is not None and self.to is not None
            more = size.gather(-1, self.extra).masked_fill(self.to < 0, 0)
            if self.extra_mass is not None:
                more = more * self.extra_mass
            out = out.scatter_add(-1, self.to.clamp(min=0), more)
        valid = self.valid
        return out if valid is None else out.masked_fill(~valid, 0)

    def dense(self) -> Tensor:
        if self.preserve_norm:
            raise PlanError("a norm-preserving plan is not linear: it has no dense matrix")
        row = self.row
        matrix = torch.zeros(*self.lead, self.m + 1, self.n, device=row.device)
        index = torch.where(row < 0, self.m, row)[..., None, :]
        return matrix.scatter(-2, index, self.weight[..., None, :])[..., : self.m, :]

    def as_mask(self) -> Masked:
        """The training form: N rows in, N rows out, the kept ones updated where they stand, the others masked."""
        rows = torch.ones_like(self.anchor, dtype=torch.float32)
        if self.valid is not None:
            rows = self.valid.float()
        policy = torch.zeros(*self.lead, self.n, device=rows.device)
        return Masked(self.n, policy.scatter_reduce(-1, self.anchor, rows, "amax"), self)

    def _then_hard(self, next: Hard) -> Hard:
        if self.preserve_norm or next.preserve_norm:
            raise PlanError("norm-preserving plans do not compose into one linear plan; compose their rows instead")
        mine, yours = self.row, next.row
        row = torch.where(mine < 0, -1, yours.gather(-1, mine.clamp(min=0)))
        weight = self.weight * next.weight.gather(-1, mine.clamp(min=0)).masked_fill(mine < 0, 0)
        anchor = self.anchor.gather(-1, next.anchor)
        extra = torch.arange(self.n, device=row.device).expand_as(row)
        if next.length is None and self.length is None:
            extra = complement(anchor, self.n)
            return Hard(
                self.n, anchor, extra, row.gather(-1, extra), weight.gather(-1, anchor), weight.gather(-1, extra)
            )
        # Ragged: anchors of padding rows are arbitrary, so every source is listed and the anchors' copies are muted.
        valid = next.valid if next.valid is not None else torch.ones_like(anchor, dtype=torch.bool)
        slot = torch.where(valid, anchor, self.n)
        anchored = torch.zeros(*row.shape[:-1], self.n + 1, dtype=torch.bool, device=row.device)
        anchored = anchored.scatter(-1, slot, True)[..., : self.n]
        to = row.masked_fill(anchored, -1)
        lengths = next.length if next.length is not None else torch.full(row.shape[:-1], next.m, device=row.device)
        return Hard(self.n, anchor, extra, to, weight.gather(-1, anchor), weight, length=lengths)


@dataclass(frozen=True, eq=False)
class Soft(Plan):
    """Every source may contribute to every row. matrix: (*lead, M, N)."""

    matrix: Tensor
    mass: Tensor | None = None
    place: Tensor | None = None

    @property
    def m(self) -> int:
        return self.matrix.shape[-2]

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.matrix.shape[:-2])

    @property
    def row(self) -> Tensor:
        best, row = self.matrix.max(dim=-2)
        return torch.where(best > 0, row, -1)

    @property
    def position(self) -> Tensor:
        return self.matrix.argmax(dim=-1) if self.place is None else self.place

    @property
    def transport(self) -> Tensor:
        """(*lead, M, N): how sizes travel; columns sum to one wherever a source contributes at all."""
        if self.mass is not None:
            return self.mass
        return self.matrix / self.matrix.sum(-2, keepdim=True).clamp_min(1e-30)

    def reduce(self, x: Tensor) -> Tensor:
        self._check(x, self.n, -2)
        return self.matrix.to(x.dtype) @ x

    def restore(self, y: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        self._check(y, self.m, -2)
        return self.transport.transpose(-1, -2).to(y.dtype) @ y

    def sizes(self, size: Tensor | None) -> Tensor:
        if size is None:
            return self.transport.float().sum(-1)
        return (self.transport.float() @ size[..., None])[..., 0]

    def dense(self) -> Tensor:
        return self.matrix.float()


@dataclass(frozen=True, eq=False)
class Masked(Plan):
    """N rows in, N rows out. policy: (*lead, N) in [0, 1], may carry gradient; change: rows updated in place."""

    policy: Tensor
    change: Hard | None = None

    @property
    def m(self) -> int:
        return self.n

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.policy.shape[:-1])

    @property
    def row(self) -> Tensor:
        own = torch.where(self.policy > 0, torch.arange(self.n, device=self.policy.device), -1)
        if self.change is None:
            return own
        row = self.change.row
        return torch.where(row < 0, -1, self.change.anchor.gather(-1, row.clamp(min=0)))

    @property
    def position(self) -> Tensor:
        return torch.arange(self.n, device=self.policy.device).expand_as(self.policy)

    def reduce(self, x: Tensor) -> Tensor:
        self._check(x, self.n, -2)
        if self.change is None or not (self.change.averages or self.change.anchor_weight is not None):
            return x
        index = self.change.anchor[..., None].expand(*self.change.anchor.shape, x.shape[-1])
        return x.scatter(-2, index, self.change.reduce(x))

    def restore(self, y: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        return y

    def sizes(self, size: Tensor | None) -> Tensor:
        if size is None:
            size = torch.ones_like(self.policy)
        if self.change is None:
            return size
        return size.scatter(-1, self.change.anchor, self.change.sizes(size))

    def dense(self) -> Tensor:
        eye = torch.eye(self.n, device=self.policy.device).expand(*self.lead, self.n, self.n)
        if self.change is None:
            return eye
        index = self.change.anchor[..., None].expand(*self.change.anchor.shape, self.n)
        return eye.scatter(-2, index, self.change.dense())
