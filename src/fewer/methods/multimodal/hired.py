"""HiRED: a budget shared out among the crops of an image by what its whole view attends to. arXiv:2408.10945."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewer.core import Budget, KeepRatio, Plan, Signals, Tokens, VisualReducer, reducer, select
from fewer.core.visual.crops import Canvas


@reducer("hired", paper="arXiv:2408.10945", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class HiRED(VisualReducer):
    """HiRED, high-resolution early dropping (Arif et al., AAAI 2025).

    For images shown whole and in crops. The whole view gets the share `alpha` of the budget. The rest is shared out by
    what its class token attends to in the tower's first block: of the first 1 - alpha of its cells by that attention,
    those that lie in a crop say how much the crop gets. Within a tile, class attention of the block whose output is
    used says who stays.

    budget: share of an image's tokens that stays, rounded down, all tiles together. alpha: the whole view's part.

    fidelity: "paper": a crop is credited with the cells that show what it shows, padding taken into account, and the
    budget is spent to the last token. "code": the authors cut the whole view's cells, in raster order, into as many
    runs of equal length as there are crops, and round every share down, so that some tokens are lost.

    An image without crops keeps its first ones by attention, as FasterVLM does. Without a class token attention
    received takes its place.
    """

    budget: Budget = KeepRatio(0.2)
    alpha: float = 0.5
    fidelity: Literal["paper", "code"] = "paper"
    looks_at: ClassVar[tuple[int | None, ...]] = (0, None)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is outside [0, 1]; it is the whole view's share of the budget")
        if self.fidelity not in ("paper", "code"):
            raise ValueError(f"fidelity={self.fidelity!r}: choose 'paper' or 'code'")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        visual = signals.visual
        view = visual.view
        count, most = select.allowed(self.budget, tokens, at=signals.at, device=signals.device)
        if tokens.valid is None and most == tokens.n:
            return Plan.identity((tokens.batch,), tokens.n, signals.device)
        early, late = visual.importance(0), visual.importance()
        canvas = Canvas.of(view)
        size = canvas.counts()
        whole, room = size[:, 0], size.scatter(1, torch.zeros_like(size[:, :1]), 0)

        first = torch.minimum(self._cut(count, self.alpha), whole)
        first = torch.where(room.any(-1), first, count)
        others = torch.minimum(count - first, room.sum(-1))
        marks = self._cut(whole, 1 - self.alpha)
        group = torch.where(canvas.whole, 0, torch.where(canvas.cut, view.tile, tokens.n))  # padding by itself
        marked = canvas.whole & (select.rank_within(early, group) < marks[:, None])
        if self.fidelity == "code":
            crops = view.tile.masked_fill(~canvas.cut, 0).amax(-1, keepdim=True)
            under = (canvas.whole.cumsum(-1) - 1) * crops // whole.clamp(min=1)[:, None] + 1
            credit = canvas.sums(marked.long(), under.clamp(min=0))
            share = (credit / credit.sum(-1, keepdim=True).clamp(min=1) * others[:, None]).long()  # in float32
            quota = torch.minimum(share, room)
        else:
            first = count - others
            quota = select.apportion(others, canvas.sums(marked.long(), canvas.under), room)
        quota = quota.scatter(1, torch.zeros_like(size[:, :1]), first[:, None])
        keep = (canvas.whole | canvas.cut) & (select.rank_within(late, group) < canvas.of_tile(quota))
        return select.marked(keep, tokens) if self.fidelity == "code" else select.counted(keep, tokens, most)

    def _cut(self, number: Tensor, share: float) -> Tensor:
        """A share of whole numbers, rounded down: the decimal product, in "code" the one in double precision."""
        return (number.double() * share + (0 if self.fidelity == "code" else 1e-6)).floor().long()
