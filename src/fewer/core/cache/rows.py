"""The rows of one layer's KV cache, as a method sees them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..budgets import Budget
from ..place import Place
from ..tokens import Tokens


@dataclass(frozen=True, eq=False)
class Rows(Tokens):
    """The rows of one cache layer. n: rows (S), counting padding and holes.

    totals    per sample, the rows an unreduced cache would hold: what the budget is asked with
    real      (B, 1 or G, S) bool, False = padding or a hole of ragged heads; None = all real
    age       (B or 1, 1 or G, S) long: tokens seen since the row came, itself included
    shuffled  whether rows lie in another order than they came; only for a `Ranker`, and without padding
    """

    totals: tuple[int, ...] = ()
    real: Tensor | None = None
    age: Tensor | None = None
    shuffled: bool = False

    @property
    def even(self) -> bool:
        """Whether all rows are real and all samples alike, so that counts are Python integers."""
        return self.real is None and len(set(self.totals)) == 1

    def newest(self, width: int | Tensor) -> Tensor:
        """(1 or B, 1 or G, S) bool: the last `width` real rows of each head; a (B, 1, 1) tensor for one per sample."""
        if self.shuffled and width:
            assert self.age is not None
            return self.age <= self.age.kthvalue(min(int(width), self.n), keepdim=True).values
        if self.real is None:
            return (torch.arange(self.n, device=self.device) >= self.n - width)[None, None]
        return self.real & (self.real.flip(-1).cumsum(-1).flip(-1) <= width)

    def newness(self) -> Tensor:
        """(1 or B, 1 or G, S) float32: rank of each real row from the oldest; higher is newer. Of rows that are
        shuffled not the rank but what orders them alike."""
        if self.shuffled:
            assert self.age is not None
            return -self.age.float()
        if self.real is None:
            return torch.arange(self.n, device=self.device, dtype=torch.float32)[None, None]
        return self.real.cumsum(-1).float()

    def sinks(self, width: int) -> Tensor:
        """(1 or B, 1 or G, S) bool: the first `width` real rows of each head."""
        if self.shuffled and width:
            assert self.age is not None
            return self.age >= self.age.topk(min(width, self.n), sorted=False).values.amin(-1, True)
        if self.real is None:
            return (torch.arange(self.n, device=self.device) < width)[None, None]
        return self.real & (self.real.cumsum(-1) <= width)

    def counts(self, budget: Budget, at: Place, least: int = 0) -> list[int]:
        """Rows each sample keeps per head: the budget's answer, never fewer than `least` nor more than there are."""
        return [allowed(budget, total, at, least) for total in self.totals]


def allowed(budget: Budget, total: int, at: Place, least: int = 0) -> int:
    """How many of `total` rows stay: the budget's answer, never fewer than `least` nor more than there are."""
    wanted = budget.keep(total, at)
    if wanted < (floor := min(least, total)):
        at.note(f"layer {at.layer}: the budget asks for {wanted} of {total} rows, {floor} always stay")
    return min(max(wanted, floor, 1), total)
