"""VisPruner: half of the tokens by class attention, half by removing duplicates. arXiv:2412.01818."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.core import Budget, Capacity, Plan, Signals, Tokens, VisualReducer, reducer, select
from fewer.core.match import unit
from fewer.core.plan import take


@reducer("vispruner", paper="arXiv:2412.01818", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class VisPruner(VisualReducer):
    """VisPruner, visual cues alone: attention, then diversity (Zhang et al., ICCV 2025).

    First the share `important` of the budget goes to the tokens with most class attention. The others stand in line by
    falling attention, and duplicates leave until the rest of the budget is met: the line is split by turns, the first
    to one side, the second to the other and so on; the `step` tokens of the first side that are most similar to
    anything on the second (cosine of what enters the projector) go; the line becomes the first side, most similar
    first, then the second side.

    budget: how many stay, per image. important: share of it that goes by attention; 1 is FasterVLM. step: tokens that
    go per round.

    Lines of odd length have one token more on the first side. Every similarity is computed once, N x N floats, and
    rounds look them up; there is one per `step` tokens that go, so images of thousands of tokens want a larger step.
    Without a class token the attention received from all patches ranks the tokens.
    """

    budget: Budget = Capacity(64)
    important: float = 0.5
    step: int = 8
    looks_at: ClassVar[tuple[int | None, ...]] = (None,)

    def __post_init__(self) -> None:
        if not 0 <= self.important <= 1:
            raise ValueError(f"important={self.important} is outside [0, 1]; it is the share chosen by attention")
        if self.step < 1:
            raise ValueError(f"step={self.step}: a round removes at least one token")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        visual, n = signals.visual, tokens.n
        count, most = select.allowed(self.budget, tokens, at=signals.at, device=signals.device)
        if tokens.valid is None and most == n:
            return Plan.identity((tokens.batch,), n, signals.device)
        score = visual.importance()
        if tokens.valid is not None:
            score = score.masked_fill(~tokens.valid, float("-inf"))
        order = score.sort(dim=-1, descending=True, stable=True).indices
        first = (count * self.important + 1e-6).floor().long()
        place = torch.arange(n, device=order.device)
        keep = torch.zeros(tokens.batch, n, dtype=torch.bool, device=order.device)
        keep = keep.scatter(-1, order, place < first[:, None])
        wanted = self._table(signals, tokens, most)
        if any(diverse for _, diverse in wanted):
            real = torch.full_like(count, n) if tokens.valid is None else tokens.valid.sum(-1)
            x = unit(visual.features)
            signals.at.spend(2 * n * n * x.shape[-1])
            line = order.gather(-1, (first[:, None] + place).clamp(max=n - 1))[:, : max(left for left, _ in wanted)]
            chosen = self._thinned(x @ x.transpose(-1, -2), line, real - first, count - first, wanted)
            late = torch.arange(chosen.shape[-1], device=keep.device) >= (count - first)[:, None]
            wide = torch.cat([keep, keep[:, :1]], -1)
            keep = wide.scatter(-1, chosen.masked_fill(late, n), True)[:, :n]
        return select.counted(keep, tokens, most)

    def _table(self, signals: Signals, tokens: Tokens, most: int) -> list[tuple[int, int]]:
        """For each number of tokens a line can have: how many stand in line behind those chosen by attention, and how
        many of them stay. Python integers, so that rounds and widths are known without looking at the device."""
        if tokens.valid is None:
            counts = [(tokens.n, most)]
        else:
            counts = list(enumerate(self.budget.counts(tokens.n, signals.at, least=1)))
        first = [int(k * self.important + 1e-6) for _, k in counts]
        return [(n - f, k - f) for (n, k), f in zip(counts, first, strict=True)]

    def _thinned(
        self, similar: Tensor, line: Tensor, length: Tensor, wanted: Tensor, table: list[tuple[int, int]]
    ) -> Tensor:
        """(R, W): lines without their duplicates, the first `wanted` (R,) of each are what is left.

        similar: (R, N, N). line: (R, W) positions, the first `length` (R,) of them count. table: every (length, wanted)
        that can occur."""
        n = similar.shape[-1]
        while any(left > stays for left, stays in table):
            side, other = line[:, 0::2], line[:, 1::2]
            sides, others = (length + 1) // 2, length // 2
            goes = torch.minimum((length - wanted).clamp(0, self.step), sides)
            absent = torch.arange(other.shape[-1], device=line.device) >= others[:, None]
            hidden = similar.new_full((len(line), n + 1), float("-inf"))
            hidden = hidden.scatter(-1, other.masked_fill(absent, n), 0.0)[:, None, :n]
            closest = take(similar, side).add_(hidden).amax(-1).clamp(min=-2)  # -2, below any cosine: nothing is there
            where = torch.arange(side.shape[-1], device=line.device)
            closest = closest.masked_fill(where >= sides[:, None], -3.0)
            side = side.gather(-1, closest.sort(dim=-1, descending=True, stable=True).indices)
            stays = torch.cat([(where >= goes[:, None]) & (where < sides[:, None]), ~absent], -1)
            done = goes == 0  # a line that has what it wants keeps its order
            table = [(left - min(max(left - k, 0), self.step, (left + 1) // 2), k) for left, k in table]
            width = max(left for left, _ in table)
            packed = torch.cat([side, other], -1).gather(-1, (~stays).to(torch.int8).argsort(dim=-1, stable=True))
            line = torch.where(done[:, None], line, packed)[:, :width]
            length = length - goes
        return line
