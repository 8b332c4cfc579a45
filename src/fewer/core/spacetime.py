"""Matching along the axes of a video: frames with frames, patches inside a frame, tokens across clips.

A video is a line of tokens, frame by frame, behind the protected prefix. While methods here act, it stays a rectangle:
every frame has as many tokens as the others. `Rectangle` says how many frames of how many tokens are left; plans along
one axis are made as if that axis were a sequence of its own, and lifted to the whole line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import match
from .budgets import Budget
from .match import unit
from .place import Place
from .plan import Hard, Plan, PlanError, Soft, take
from .signals import Signals
from .tokens import Tokens

Order = Literal["position", "halves"]
LEFT = "rectangle"  # what methods of a pass know it under


@dataclass(frozen=True)
class Rectangle:
    """frames of `cells` tokens each, behind `prefix` protected ones."""

    frames: int
    cells: int
    prefix: int = 0

    @property
    def n(self) -> int:
        return self.prefix + self.frames * self.cells

    @classmethod
    def of(cls, signals: Signals, tokens: Tokens, who: str) -> Rectangle:
        """What is left of a video's grid; `keep_in` says so to later blocks of the same pass.

        Raises   PlanError where rows have left otherwise, or samples differ.
        """
        left = signals.shared.get(LEFT)
        if left is None:
            frames, height, width = signals.space
            left = cls(frames, height * width, tokens.prefix)
        if tokens.irregular or left.n != tokens.n:
            raise PlanError(
                f"{who} merges along whole frames: it needs the same number of tokens in every frame, here "
                f"{left.frames} x {left.cells}, and there are {tokens.free_count} in all; let nothing else reduce "
                "before it"
            )
        return left

    def keep_in(self, signals: Signals) -> None:
        """For the methods that act later in this pass."""
        signals.shared[LEFT] = self

    def cube(self, x: Tensor) -> Tensor:
        """(B, N, ...) -> (B, frames, cells, ...): the free tokens."""
        return x[:, self.prefix :].unflatten(1, (self.frames, self.cells))

    def sizes(self, tokens: Tokens) -> Tensor | None:
        """(B, frames, cells), or None for one each."""
        return None if tokens.size is None else self.cube(tokens.size)

    # -- plans along one axis, lifted to the line ---------------------------------------------------------------------
    def of_groups(self, plan: Hard, frames: int = 1) -> Hard:
        """A plan for groups of so many frames each, (B * groups, frames * cells) to as many rows in each, as one for
        the whole line."""
        groups, b = self.frames // frames, plan.anchor.shape[0] * frames // self.frames
        width = frames * self.cells
        row, anchor = plan.row.unflatten(0, (b, groups)), plan.anchor.unflatten(0, (b, groups))
        turn = torch.arange(groups, device=row.device)[:, None]
        row = torch.where(row < 0, -1, row + turn * plan.m).flatten(1)
        return self._lifted(row, (anchor + turn * width).flatten(1))

    def of_frames(self, plan: Hard) -> Hard:
        """A plan for the frames of each sample, (B, frames) to as many, as one in which each of a frame's tokens goes
        where its frame does."""
        row = plan.row[..., None] * self.cells + torch.arange(self.cells, device=plan.anchor.device)
        row = row.masked_fill(plan.row[..., None] < 0, -1)
        cell = torch.arange(self.cells, device=row.device)
        return self._lifted(row.flatten(1), (plan.anchor[..., None] * self.cells + cell).flatten(1))

    def soft(self, matrix: Tensor) -> Soft:
        """A soft plan of the free tokens, with the prefix in front. matrix: (B, M, frames * cells)."""
        b, m, n = matrix.shape
        p = self.prefix
        whole = matrix.new_zeros(b, p + m, p + n)
        whole[:, :p, :p] = torch.eye(p, device=matrix.device)
        whole[:, p:, p:] = matrix
        return Plan.soft(whole)

    def _lifted(self, row: Tensor, anchor: Tensor) -> Hard:
        """With the prefix in front. row: (B, frames * cells), anchor: (B, M)."""
        front = torch.arange(self.prefix, device=row.device).expand(row.shape[0], -1)
        row = torch.cat([front, torch.where(row < 0, -1, row + self.prefix)], 1)
        anchor = torch.cat([front, anchor + self.prefix], 1)
        return Plan.from_rows(row, anchor.shape[1], anchor=anchor, weight=torch.ones(row.shape, device=row.device))


def merge_cells(
    metric: Tensor, shape: Rectangle, budget: Budget, tokens: Tokens, *, at: Place, frames: int = 1,
    order: Order = "position",
) -> Hard:  # fmt: skip
    """Inside every frame, or every run of `frames` frames, the most similar tokens at even positions join odd ones.

    metric: (B, N, d) of the whole line. The budget counts the tokens of one frame or run; rows are averages by size.
    Source   TESTA, arXiv:2310.19060 (frames = 1); TempMe, arXiv:2409.01156 (runs of frames).
    """
    groups = shape.frames // frames
    inside = shape.cube(metric).flatten(1, 2).unflatten(1, (groups, frames * shape.cells)).flatten(0, 1)
    own = Tokens.plain(inside.shape[0], inside.shape[1], device=metric.device)
    # each group spends its own FLOPs; the ledger counts per sample
    asked = replace(at, spend=lambda flops: at.spend(flops * groups))
    plan = match.bipartite(inside, budget, own, at=asked, order=order)
    return shape.of_groups(plan, frames).averaged(tokens.size)


Vote = Literal["least", "mean"]


def merge_frames(
    metric: Tensor, shape: Rectangle, budget: Budget, tokens: Tokens, *, at: Place, vote: Vote = "mean",
    order: Order = "position",
) -> Hard:  # fmt: skip
    """The most similar frames at even positions join odd ones, all patches of a frame the same one.

    metric: (B, N, d). Every patch compares itself with the same patch of the odd frames: a frame goes where most of its
    patches would go (of equals the earlier), and ranks by the patches' best similarities.
    vote     their "mean", or the "least" of them: what the authors' code gets, which takes the mode of real numbers
    Units    the budget counts frames; at most half of them go. Cost frames^2 / 2 d per patch.
    Source   TESTA, arXiv:2310.19060, sec. 3.2.
    """
    t, cells = shape.frames, shape.cells
    r = min(t - budget.keep(t, at), t // 2)
    if r <= 0:
        return tokens.unchanged(metric.device)
    with torch.no_grad():
        u = unit(shape.cube(metric)).transpose(1, 2)  # (B, L, T, d)
        at.spend(2 * cells * ((t + 1) // 2) * (t // 2) * u.shape[-1])
        similar = u[:, :, ::2] @ u[:, :, 1::2].transpose(-1, -2)
        best, to = similar.max(-1)  # (B, L, ceil(T / 2))
        rank = best.amin(1) if vote == "least" else best.mean(1)
        votes = torch.zeros(*rank.shape, t // 2, device=u.device)
        votes = votes.scatter_add(-1, to.transpose(1, 2), torch.ones_like(best).transpose(1, 2))
        into = votes.argmax(-1)  # of equals the first
        first = rank.argsort(dim=-1, descending=True, stable=True)[:, :r]
        plan = Plan.merge(2 * first, 2 * into.gather(-1, first) + 1, t)
        if order == "halves":
            key = torch.where(plan.anchor % 2 == 0, plan.anchor, t + plan.anchor)
            plan = plan.arranged(key.argsort(dim=-1))
        return shape.of_frames(plan).averaged(tokens.size)


def join_into(metric: Tensor, target: Tensor, tokens: Tokens, *, at: Place) -> Hard:
    """Every free token that is no target joins the most similar target; rows are plain averages.

    metric: (B, N, d); target: (B, K) long, ascending, none of the prefix. Returns a plan to prefix + K rows.
    Source   VTM, arXiv:2410.23782, sec. 3.1, which found averages weighted by size to be worse.
    """
    with torch.no_grad():
        u = unit(metric)
        source = match.complement(target, tokens.n)[:, tokens.prefix :]  # the prefix neither goes nor receives
        at.spend(2 * source.shape[1] * target.shape[1] * u.shape[-1])
        _, partner = match.best_partner(take(u, source), take(u, target))
        every = torch.arange(source.shape[1], device=u.device).expand(source.shape)
        return Plan.merge(source, target.gather(-1, partner(every)), tokens.n)


def across_frames(
    metric: Tensor, frames: int, target: int, stays: int, *, stride: int = 4, carried: int = 0, aligned: bool = False,
    mean: bool = False, at: Place,
) -> Hard:  # fmt: skip
    """Tokens of most frames join the most similar ones of every `stride`-th frame.

    metric   (B, carried + frames * cells, d): tokens an earlier round left, which receive, and the frames behind them
    target   offset of the receiving frames, below stride. stays: how many of the others stay, the least similar ones
    aligned  one matching for all samples, by the best pair in any of them: as branches of guidance need
    mean     rows are averages; else what joins is dropped, and `restore` gives it its target's row
    Returns  a hard plan, rows ascending by position. Source: VidToMe, arXiv:2312.10656, sec. 4.1.
    """
    b, n, d = metric.shape
    if not 0 <= target < min(stride, frames):
        raise PlanError(
            f"target={target}: with stride {stride} and {frames} frames it is 0 to {min(stride, frames) - 1}"
        )
    if (n - carried) % frames:
        raise PlanError(f"{n - carried} tokens are no {frames} frames of equal size")
    cells = (n - carried) // frames
    receiving = [carried + f * cells + torch.arange(cells) for f in range(target, frames, stride)]
    into = torch.cat([torch.arange(carried), *receiving]).to(metric.device, non_blocking=True)
    source = match.complement(into, n)
    r = len(source) - stays
    if r <= 0 or not len(source):
        return Plan.identity((b,), n, metric.device)
    with torch.no_grad():
        u = unit(metric)
        at.spend(2 * len(source) * len(into) * d)
        a, t = u[:, source], u[:, into]
        if aligned:
            pairs = (a @ t.transpose(-1, -2)).amax(0)  # the best of any sample, (S, D)
            value, best = pairs.max(-1)
            value, best = value.expand(b, -1), best.expand(b, -1)
            first = value.argsort(dim=-1, descending=True, stable=True)[:, :r]
            partner = best.gather(-1, first)
        else:
            value, found = match.best_partner(a, t)
            first = value.argsort(dim=-1, descending=True, stable=True)[:, :r]
            partner = found(first)
        plan = Plan.merge(source[first], into[partner], n)
        return plan if mean else _replaced(plan)


def behind_prefix(plan: Hard, prefix: int) -> Hard:
    """A plan of the free tokens with protected ones in front of it."""
    if not prefix:
        return plan
    b = plan.anchor.shape[0]
    front = torch.arange(prefix, device=plan.anchor.device).expand(b, -1)
    ones = torch.ones(b, prefix, device=plan.anchor.device)
    return replace(
        plan, n=plan.n + prefix, anchor=torch.cat([front, plan.anchor + prefix], 1),
        extra=None if plan.extra is None else plan.extra + prefix,
        to=None if plan.to is None else torch.where(plan.to < 0, -1, plan.to + prefix),
        anchor_weight=None if plan.anchor_weight is None else torch.cat([ones, plan.anchor_weight], 1),
    )  # fmt: skip


def _replaced(plan: Hard) -> Hard:
    """The same rows, holding nothing but their anchors."""
    assert plan.extra is not None
    ones = torch.ones_like(plan.anchor, dtype=torch.float32)
    return replace(plan, anchor_weight=ones, extra_weight=torch.zeros_like(plan.extra, dtype=torch.float32))


def spread(n: int, k: int, device: torch.device) -> Tensor:
    """(k,) long: k of n places, evenly spread, the first among them."""
    return torch.arange(k, device=device) * n // max(k, 1)


def changed(clip: Tensor, space: tuple[int, int, int]) -> Tensor:
    """(B, T, H, W) float32: how much each patch differs from the one before it; zero at the first moment.

    clip: (B, C, frames, height, width); space: patches along time, height and width. Last frame against first.
    """
    t, h, w = space
    tube = clip.shape[2] // t
    x = clip.float().unflatten(2, (t, tube))
    apart = (x[:, :, 1:, -1] - x[:, :, :-1, 0]).abs().mean(1)  # (B, T - 1, height, width)
    size = (apart.shape[-2] // h, apart.shape[-1] // w)
    return F.pad(F.avg_pool2d(apart, size, size), (0, 0, 0, 0, 1, 0))
