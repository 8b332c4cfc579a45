"""FrameFusion (Fu et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.core import Budget, Hard, KeepRatio, Plan, Signals, Site, Tokens, View, VisualReducer, attention, reducer
from fewer.core.plan import take
from fewer.core.visual import Scope


@reducer("framefusion", paper="arXiv:2501.01986", acts="merge+prune", on="multimodal", training="free")
@dataclass(frozen=True)
class FrameFusion(VisualReducer):
    """Patches that look as a frame before merge; what is still too much leaves by attention (FrameFusion).

    Behind each block every visual token is compared with the same patch's token before it. Runs whose links reach
    `similarity` become the mean of their members, in the place of the first. After each block a solver asks which share
    must go now so that the mean number of tokens over all layers meets the budget. Once that many links are there,
    only the closest ones merge, and the work is done. Where links become fewer than `stop` of the tokens, merging ends,
    and behind the next block those that receive least attention leave.

    budget: visual tokens per layer, on average over the depth (the paper's cost): 0.3 of those the prompt began with.
    similarity: cosine from which tokens merge. stop: share of the tokens. layers: by default all but the last.

    Each prompt goes its own way, so rows are ragged in a batch. A patch's token before it is the last one that is still
    there, of any earlier frame. With pictures alone nothing can merge, and it prunes behind the second block.
    """

    budget: Budget = KeepRatio(0.3)
    similarity: float = 0.6
    stop: float = 0.1
    layers: tuple[int, ...] | None = None
    site: ClassVar[Site] = Site.AFTER_BLOCK
    scope: ClassVar[Scope] = "prompt"

    def __post_init__(self) -> None:
        if not -1 <= self.similarity <= 1:
            raise ValueError(f"similarity={self.similarity} is no cosine; it lies in [-1, 1]")
        if not 0 <= self.stop <= 1:
            raise ValueError(f"stop={self.stop} is outside [0, 1]; it is a share of the tokens")

    @property
    def adaptive(self) -> bool:
        return True

    def acts_at(self, depth: int) -> tuple[int, ...]:
        return tuple(range(max(1, depth - 1))) if self.layers is None else self.layers

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        at, visual, n = signals.at, signals.visual, tokens.n
        real = tokens.unpadded
        here = real.sum(-1)
        past = signals.memory.get("past")
        if past is None:
            start = torch.full_like(here, at.start) if at.starts is None else at.starts
            wanted = self.budget.granted(start, at.start, at)
            past = Past(wanted * at.layers, torch.zeros_like(start), torch.zeros_like(start), -1)
        # Every block since the last site had as many tokens as are here now.
        spent = past.spent + here * (at.layer - past.layer)
        left = torch.div(past.wanted - spent, max(at.layers - 1 - at.layer, 1), rounding_mode="floor")
        surplus = (here - left.clamp(min=1)).clamp(min=0)  # tokens that must go now
        surplus = torch.minimum(surplus, (here - 1).clamp(min=0))

        order, linked = chains(visual.view, real)
        x = F.normalize(signals.hidden.float(), dim=-1, eps=1e-6)
        along = take(x, order)
        cosine = F.pad((along[:, 1:] * along[:, :-1]).sum(-1), (1, 0), value=-2.0).masked_fill(~linked, -2.0)
        close = linked & (cosine >= self.similarity)
        rank = cosine.masked_fill(~close, -3.0).argsort(dim=-1, descending=True, stable=True).argsort(-1)
        links = close.sum(-1)
        merging, pruning = past.phase == 0, past.phase == 1
        enough = links >= surplus
        limit = torch.where(merging, torch.where(enough, surplus, links), 0)
        runs = close & (rank < limit[:, None])
        few = links < self.stop * here
        phase = torch.where(merging & ~enough, few.long(), 2)
        signals.memory["past"] = Past(past.wanted, spent, phase, at.layer)

        keep = real
        if at.stage > 0:  # nobody prunes behind the first block
            received = self._received(signals)
            first = received.masked_fill(~real, -1).argsort(dim=-1, descending=True, stable=True).argsort(-1)
            keep = real & ((first < (here - surplus)[:, None]) | ~pruning[:, None])
        return merged(order, runs, keep, n)

    @staticmethod
    def _received(signals: Signals) -> Tensor:
        """(R, N): attention received, mean over heads and asking rows."""
        visual = signals.visual
        seen = visual.seen
        assert seen is not None
        _, h, s, d = seen.q.shape
        visual.spend(2 * h * s * s * d)
        weight = None if visual.real is None else visual.real.float()
        return visual.view.of(attention.mass(seen, weight=weight).mean(1))


@dataclass(frozen=True, eq=False)
class Past:
    """What was spent so far, (R,) long each: tokens over all layers that are wanted, those that there were, and the
    phase: 0 = merging, 1 = to be pruned, 2 = done. layer: the last one counted."""

    wanted: Tensor
    spent: Tensor
    phase: Tensor
    layer: int


def chains(view: View, real: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of each line patch by patch, each in the order of time: (R, N) places, and whether the row before is
    the same patch's. real: (R, N) bool; padding comes last and is linked to nothing."""
    order = torch.arange(real.shape[1], device=real.device).expand_as(real)
    for stream in (view.time, view.column, view.row, view.tile, view.item, ~real):
        order = order.gather(-1, stream.to(torch.long).gather(-1, order).argsort(dim=-1, stable=True))
    same = real.gather(-1, order)[:, 1:]
    for stream in (view.column, view.row, view.tile, view.item):
        along = stream.gather(-1, order)
        same = same & (along[:, 1:] == along[:, :-1])
    return order, F.pad(same, (1, 0))


def merged(order: Tensor, joined: Tensor, keep: Tensor, n: int) -> Hard:
    """The plan of runs: a row that is joined to the one before it in `order` goes into the mean of its run, which
    stands in the first one's place. order: (R, N) places; joined: (R, N) bool, in that order; keep: (R, N) bool, by
    place, what may stay at all."""
    where = torch.arange(n, device=order.device).expand_as(order)
    head = torch.where(joined, -1, where).cummax(-1).values  # in order: where the run began
    root = torch.empty_like(order).scatter(-1, order, order.gather(-1, head))
    number = torch.zeros_like(root, dtype=torch.float32).scatter_add(
        -1, root, torch.ones_like(root, dtype=torch.float32)
    )
    alive = (root == where) & keep
    anchor = (~alive).to(torch.int8).argsort(dim=-1, stable=True)
    row = (alive.long().cumsum(-1) - 1).gather(-1, root)
    to = torch.where(alive | ~keep | ~alive.gather(-1, root), -1, row)
    weight = 1 / number.gather(-1, root)
    return Hard(n, anchor, where, to, weight.gather(-1, anchor), weight, length=alive.sum(-1))
