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
    rows = index.reshape(index.shape[:-1].numel(), m)
    offset = torch.arange(rows.shape[0], device=index.device)[:, None] * n
    return (rows + offset).reshape(-1)


def on_device(values: list[int], device: torch.device) -> Tensor:
    """(len(values),) long: Python integers on the device, copied there without waiting for it."""
    return torch.tensor(values).to(device, non_blocking=True)


def complement(index: Tensor, n: int) -> Tensor:
    """The sources absent from index, ascending. index: (*lead, M) distinct; returns (*lead, N - M)."""
    taken = torch.zeros(*index.shape[:-1], n, dtype=torch.int8, device=index.device).scatter_(-1, index, 1)
    return taken.argsort(dim=-1, stable=True)[..., : n - index.shape[-1]]


def _muted(row: Tensor, anchor: Tensor, lengths: Tensor) -> Tensor:
    """The rows of all sources but the anchors of real rows, which get -1: in a ragged plan the anchors of padding
    rows are arbitrary, so every source is listed as an extra. row: (*lead, N), anchor: (*lead, M)."""
    n, m = row.shape[-1], anchor.shape[-1]
    real = torch.arange(m, device=row.device) < lengths[..., None]
    anchored = torch.zeros(*row.shape[:-1], n + 1, dtype=torch.bool, device=row.device)
    return row.masked_fill(anchored.scatter(-1, torch.where(real, anchor, n), True)[..., :n], -1)


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
        return Hard(n, anchor, source, row.gather(-1, into), whole=True).averaged(size)

    @staticmethod
    def from_rows(
        row: Tensor, m: int, weight: Tensor | None = None, size: Tensor | None = None, lengths: Tensor | None = None,
        anchor: Tensor | None = None,
    ) -> Hard:  # fmt: skip
        """A hard plan from its integer map. anchor: (*lead, m) the source that anchors each row; None = its first.

        row: (*lead, N) long, the row of each source, -1 = dropped; each of the m rows needs a source. weight:
        (*lead, N) combining weights taken as they are; without them rows are averages weighted by size.
        lengths: (*lead,) where samples have different numbers of rows; rows at and beyond it need no source.
        """
        lead, n = row.shape[:-1], row.shape[-1]
        where = torch.arange(n, device=row.device).expand(*lead, n)
        if anchor is None:
            slot = torch.where(row < 0, m, row)
            first = torch.full((*lead, m + 1), n, device=row.device)
            anchor = first.scatter_reduce(-1, slot, where, "amin")[..., :m]
        if lengths is None:
            extra = complement(anchor, n)
            to = row.gather(-1, extra)
        else:
            anchor = anchor.clamp(max=n - 1)
            extra, to = where, _muted(row, anchor, lengths)
        plan = Hard(n, anchor, extra, to, length=lengths)
        if weight is None:
            return plan.averaged(size)
        return replace(plan, anchor_weight=weight.gather(-1, anchor), extra_weight=weight.gather(-1, extra))

    @staticmethod
    def soft(
        matrix: Tensor, mass: Tensor | None = None, position: Tensor | None = None, lengths: Tensor | None = None
    ) -> Soft:
        """A dense plan. matrix: (*lead, M, N). mass: (*lead, M, N), how sizes travel (columns sum to one); by default
        the matrix with its columns normalised. position: (*lead, M), the source each row mostly stands for. lengths:
        (*lead,) where samples have different numbers of rows; rows at and beyond it become zero."""
        if lengths is not None:
            rows = torch.arange(matrix.shape[-2], device=matrix.device)
            matrix = matrix.masked_fill((rows >= lengths[..., None])[..., None], 0)
        return Soft(matrix.shape[-1], matrix, mass, position, length=lengths)

    @staticmethod
    def mask(policy: Tensor, change: Hard | Soft | None = None, front: int = 0) -> Masked:
        """The training form: all rows stay, policy (*lead, M) in [0, 1] says how much each is still there.

        change: what happens to the rows besides, see `Masked`. front: rows it adds right behind the prefix.
        """
        return Masked(policy.shape[-1] if change is None else change.n, policy, change, front=front)

    @staticmethod
    def where(condition: Tensor, yes: Hard, no: Hard) -> Hard:
        """Per sample one of two hard plans, of as many rows unless one is ragged. condition: (*lead,) bool."""
        if yes.m != no.m and yes.length is None and no.length is None:
            raise PlanError(f"Plan.where needs equal row counts, got {yes.m} and {no.m}")
        if yes.front != no.front or yes.preserve_norm != no.preserve_norm:
            raise PlanError("Plan.where needs two plans that agree on front rows and on preserving norms")
        ragged = yes.length is not None or no.length is not None
        width = max(yes.m, no.m)
        yes, no = (plan.spelled_out(ragged).widened(width) for plan in (yes, no))
        pick = condition[..., None]
        names = ("anchor", "extra", "to", "anchor_weight", "extra_weight", "extra_mass")
        return Hard(
            yes.n, *(torch.where(pick, getattr(yes, k), getattr(no, k)) for k in names),
            length=torch.where(condition, yes.counted, no.counted) if ragged else None,
            front=yes.front, preserve_norm=yes.preserve_norm,
        )  # fmt: skip

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
    def valid(self) -> Tensor | None:
        """(*lead, M) bool, True where a row is real; None where all are."""
        lengths = self.lengths
        return None if lengths is None else torch.arange(self.m, device=lengths.device) < lengths[..., None]

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
            raise PlanError(
                f"this plan takes {self.n} tokens to {self.m}; got {x.shape[axis]} (shape {tuple(x.shape)})"
            )


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
    back          (*lead,)    rows that `restore` gives back, the first ones; those behind them are there to be looked
                              at only, and their sources count as dropped. None = all
    whole                     no source is dropped, as whoever made the plan knows: nothing is looked for and masked
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
    back: Tensor | None = field(default=None, kw_only=True)
    whole: bool = field(default=False, kw_only=True)

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
        return row.scatter_(-1, self._real_anchor, rows)[..., : self.n]

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
        anchor = torch.ones_like(self.anchor, dtype=weight.dtype) if self.anchor_weight is None else self.anchor_weight
        return weight.scatter(-1, self._real_anchor, anchor.float())[..., : self.n]

    def averaged(self, size: Tensor | None) -> Hard:
        """The same rows as averages weighted by size. size: (*lead, N) or None for one each."""
        if not self.averages:
            return self
        assert self.extra is not None and self.to is not None
        a = torch.ones_like(self.anchor, dtype=torch.float32) if size is None else size.gather(-1, self.anchor)
        e = torch.ones_like(self.extra, dtype=torch.float32) if size is None else size.gather(-1, self.extra)
        to = self.to
        if not self.whole:
            e, to = e.masked_fill(to < 0, 0), to.clamp(min=0)
        total = a.scatter_add(-1, to, e).clamp_min(1e-30)  # padding stands for nothing
        return replace(self, anchor_weight=a / total, extra_weight=e / total.gather(-1, to))

    def pruned(self) -> Hard:
        """The same rows without what was folded into them."""
        return Hard(self.n, self.anchor, length=self.length, front=self.front)

    def norm_preserving(self) -> Hard:
        """Average, then rescale each row to the largest norm among its members (MLERP, arXiv:2312.01026)."""
        return replace(self, preserve_norm=True)

    def arranged(self, order: Tensor) -> Hard:
        """The same rows in another order. order: (*lead, M), a permutation of the rows that leaves padding last."""
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(self.m, device=order.device).expand_as(order))
        to = None if self.to is None else torch.where(self.to < 0, -1, rank.gather(-1, self.to.clamp(min=0)))
        weight = None if self.anchor_weight is None else self.anchor_weight.gather(-1, order)
        return replace(self, anchor=self.anchor.gather(-1, order), to=to, anchor_weight=weight)

    @property
    def counted(self) -> Tensor:
        """(*lead,): the real rows of each sample."""
        if self.length is not None:
            return self.length
        return torch.full(self.lead, self.m, device=self.anchor.device)

    @property
    def share(self) -> Tensor:
        """(*lead, N): the share of each source's size that its row inherits, 0 where dropped."""
        share = (self.row >= 0).float()
        if self.extra_mass is None or self.extra is None or self.to is None:
            return share
        whole = torch.ones_like(share).scatter(-1, self.extra, self.extra_mass.float())
        return share * torch.nn.functional.pad(whole, (0, 1)).scatter(-1, self._real_anchor, 1.0)[..., : self.n]

    @property
    def _real_anchor(self) -> Tensor:
        """(*lead, M): the anchors, N where a row is padding."""
        valid = self.valid
        return self.anchor if valid is None else torch.where(valid, self.anchor, self.n)

    def trimmed(self) -> Hard:
        """The same rows without those that are padding in every sample. Reads two numbers from the device."""
        if self.length is None:
            return self
        most, least = torch.stack([self.length.max(), self.length.min()]).tolist()
        weight = None if self.anchor_weight is None else self.anchor_weight[..., :most]
        length = None if most == least else self.length
        return replace(self, anchor=self.anchor[..., :most], anchor_weight=weight, length=length)

    def widened(self, m: int) -> Hard:
        """The same rows with padding up to m rows."""
        if self.m == m:
            return self
        more = (0, m - self.m)
        weight = None if self.anchor_weight is None else torch.nn.functional.pad(self.anchor_weight, more)
        return replace(
            self, anchor=torch.nn.functional.pad(self.anchor, more), anchor_weight=weight, length=self.counted
        )

    def spelled_out(self, every: bool = False) -> Hard:
        """The same plan with every optional tensor written down and all other sources as dropped extras.

        every: list all N sources as extras, the anchors of real rows muted; always so in a ragged plan.
        """
        if every or self.length is not None:
            extra = torch.arange(self.n, device=self.anchor.device).expand(*self.lead, self.n)
            to = _muted(self.row, self.anchor, self.counted)
        elif self.extra is not None and self.to is not None and self.extra.shape[-1] == self.n - self.m:
            extra, to = self.extra, self.to
        else:
            extra = complement(self.anchor, self.n)
            to = self.row.gather(-1, extra)
        weight = self.weight
        return replace(
            self, extra=extra, to=to, extra_mass=self.share.gather(-1, extra),
            anchor_weight=weight.gather(-1, self.anchor), extra_weight=weight.gather(-1, extra),
        )  # fmt: skip

    def fuse_rest(
        self, weight: Tensor, *, normalise: bool = False, protect: bool = False, prefix: int = 0,
        valid: Tensor | None = None,
    ) -> Hard:  # fmt: skip
        """One more row: the weighted sum of everything this pruning plan drops.

        weight: (*lead, N), taken as it is (EViT) or divided by its sum over the dropped (`normalise`, SPViT).
        protect: the new row goes right behind the `prefix` protected rows and is protected from now on; else it is
        last. A plan that drops nothing is returned unchanged. valid: (*lead, N) bool, the sources that are no padding
        and can be fused at all; where samples differ, those that drop nothing get no new row.
        """
        if self.averages:
            raise PlanError("fuse_rest works on a pruning plan; this one already merges")
        if self.m == self.n and self.length is None:
            return self
        if self.length is not None:
            if protect:
                raise PlanError("a protected package needs the same prefix in every sample; this plan is ragged")
            return self._fuse_ragged(weight, normalise, valid)
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

    def _fuse_ragged(self, weight: Tensor, normalise: bool, real: Tensor | None) -> Hard:
        """fuse_rest where samples keep different numbers: the new row stands at each sample's old length."""
        assert self.length is not None and self.valid is not None
        gone = self.row < 0 if real is None else (self.row < 0) & real
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
        y = take(x, self.anchor)  # fresh memory, so the next steps may write into it
        if self.anchor_weight is not None:
            weight = self.anchor_weight[..., None].to(x.dtype)
            y = y * weight if weight.requires_grad else y.mul_(weight)
        if self.averages:
            assert self.extra is not None and self.to is not None
            e = take(x, self.extra)
            if self.extra_weight is not None:
                e = e * self.extra_weight[..., None].to(x.dtype)
            to, c = self.to, x.shape[-1]
            if not self.whole:
                e, to = e.masked_fill((to < 0)[..., None], 0), to.clamp(min=0)
            index = _flat_index(to, self.m)
            y.view(-1, c).index_add_(0, index, e.view(-1, c))
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
        if self.whole and self.back is None:
            return take(y, row)
        if self.back is not None:
            row = row.masked_fill(row >= self.back[..., None], -1)
        x = take(y, row.clamp(min=0))
        return torch.where((row < 0)[..., None], fill, x)

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
        lengths = next.length
        if lengths is None and self.length is not None:  # a row is real if the row that anchors it was
            lengths = (next.anchor < self.length[..., None]).sum(-1)
        if lengths is None:
            extra = complement(anchor, self.n)
            to = row.gather(-1, extra)
        else:
            extra = torch.arange(self.n, device=row.device).expand_as(row)
            to = _muted(row, anchor, lengths)
        share = None
        if self.extra_mass is not None or next.extra_mass is not None:
            share = (self.share * next.share.gather(-1, mine.clamp(min=0))).gather(-1, extra)
        return Hard(
            self.n, anchor, extra, to, weight.gather(-1, anchor), weight.gather(-1, extra), share,
            length=lengths, front=self.front + next.front,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Soft(Plan):
    """Every source may contribute to every row. matrix: (*lead, M, N); length: (*lead,) real rows, where ragged."""

    matrix: Tensor
    mass: Tensor | None = None
    place: Tensor | None = None
    length: Tensor | None = field(default=None, kw_only=True)

    @property
    def m(self) -> int:
        return self.matrix.shape[-2]

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.matrix.shape[:-2])

    @property
    def lengths(self) -> Tensor | None:
        return self.length

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
    """The training form: every row stays. policy: (*lead, M) in [0, 1], may carry gradient.

    change  what happens to the rows besides: a hard plan updates its anchors where they stand; a soft one gives all
            M rows from the N sources (M = N + front)
    front   rows a soft change adds right behind the protected prefix (package tokens)
    """

    policy: Tensor
    change: Hard | Soft | None = None
    front: int = field(default=0, kw_only=True)

    @property
    def m(self) -> int:
        return self.policy.shape[-1]

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.policy.shape[:-1])

    @property
    def _live(self) -> Tensor:
        """(*lead, M, N): a soft change without the rows that are masked."""
        assert isinstance(self.change, Soft)
        return self.change.matrix * (self.policy > 0)[..., None]

    @property
    def row(self) -> Tensor:
        if isinstance(self.change, Soft):
            best, row = self._live.max(dim=-2)
            return torch.where(best > 0, row, -1)
        own = torch.where(self.policy > 0, torch.arange(self.n, device=self.policy.device), -1)
        if self.change is None:
            return own
        row = self.change.row
        return torch.where(row < 0, -1, self.change.anchor.gather(-1, row.clamp(min=0)))

    @property
    def position(self) -> Tensor:
        if isinstance(self.change, Soft):
            return self.change.position
        return torch.arange(self.n, device=self.policy.device).expand_as(self.policy)

    def reduce(self, x: Tensor) -> Tensor:
        self._check(x, self.n, -2)
        if isinstance(self.change, Soft):
            return self.change.reduce(x)
        if self.change is None or not (self.change.averages or self.change.anchor_weight is not None):
            return x
        return self._updated(x, self.change, self.change.reduce(x))

    def restore(self, y: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        if not isinstance(self.change, Soft):
            return y
        row = self.row
        return torch.where((row < 0)[..., None], fill, take(y, row.clamp(min=0)))

    def sizes(self, size: Tensor | None) -> Tensor:
        if size is None:
            size = torch.ones(*self.lead, self.n, device=self.policy.device)
        if self.change is None:
            return size
        if isinstance(self.change, Soft):
            return Soft(self.n, self._live.detach()).sizes(size)
        change = self.change
        out = self._updated(size[..., None], change, change.sizes(size)[..., None])[..., 0]
        if change.extra is None or change.extra_mass is None:
            return out
        # A masked row that passed on a share of its size keeps that share: it weighs in the gradient of the policy.
        assert change.to is not None
        passed = size.gather(-1, change.extra) * change.extra_mass
        return out.scatter(-1, change.extra, torch.where(change.to < 0, out.gather(-1, change.extra), passed))

    def dense(self) -> Tensor:
        if isinstance(self.change, Soft):
            return self.change.dense()
        eye = torch.eye(self.n, device=self.policy.device).expand(*self.lead, self.n, self.n)
        if self.change is None:
            return eye
        return self._updated(eye, self.change, self.change.dense())

    @staticmethod
    def _updated(x: Tensor, change: Hard, rows: Tensor) -> Tensor:
        """x: (*lead, N, C) with the change's rows where their anchors stand; padding rows go nowhere."""
        index = change._real_anchor[..., None].expand(*change.anchor.shape, x.shape[-1])
        if change.length is None:
            return x.scatter(-2, index, rows)
        return torch.nn.functional.pad(x, (0, 0, 0, 1)).scatter(-2, index, rows)[..., : change.n, :]
