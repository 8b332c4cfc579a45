"""Radial: keep the patches nearest to the centre of the image, whatever it shows. A baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Tokens, reducer, select


@reducer("radial", paper="arXiv:2308.04657", acts="prune", on="vision", training="optional")
@dataclass(frozen=True)
class Radial(Reducer):
    """A fixed mask around the centre.

    budget: share of the first free tokens that stays, to the power of the stage (1, 2, 3), rounded down.
    norm: of the distance to the centre: "l1", "l2" or "linf". Of equally distant patches the earlier one stays.
    Where the patches form no known grid, they are one row and its middle stays.
    """

    budget: Budget = KeepRatio(0.7, of="start")
    layers: tuple[int, ...] | None = (3, 6, 9)
    norm: Literal["l1", "l2", "linf"] = "l2"

    def __post_init__(self) -> None:
        if self.norm not in ("l1", "l2", "linf"):
            raise ValueError(f"Radial(norm={self.norm!r}): choose l1, l2 or linf")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        row, column = signals.cell
        height, width = signals.extent
        # Twice the offsets, to stay with whole numbers: the centre of an even grid lies between two patches.
        down, right = (2 * row - height + 1).abs(), (2 * column - width + 1).abs()
        away = {"l1": down + right, "l2": down**2 + right**2, "linf": torch.maximum(down, right)}[self.norm]
        return select.top(-away.float(), self.budget, tokens, at=signals.at)
