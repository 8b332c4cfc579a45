"""Pool: average neighbouring patches, whatever they show. A baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Tokens, cluster, reducer


@reducer("pool", paper="baseline", acts="pool", on="vision", training="optional")
@dataclass(frozen=True)
class Pool(Reducer):
    """Average pooling of the patch grid to any count.

    budget: share of the first free tokens that stays, to the power of the stage (1, 2, 3), rounded down.
    proportional: later blocks add log(size) to their attention logits.

    The patches are lined up along a Hilbert curve, on which neighbours in the line are neighbours in the image, and
    the line is cut into equal runs: on a grid of even height and width, a keep ratio of 1/4 is 2 x 2 pooling and 1/2
    pools pairs. Where the patches form no known grid, they are one row.
    """

    budget: Budget = KeepRatio(0.7, of="start")
    layers: tuple[int, ...] | None = (3, 6, 9)
    proportional: bool = False

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        row, column = signals.cell
        line = column if signals.grid is None else hilbert(row, column, (max(signals.grid) - 1).bit_length())
        return cluster.runs(line, self.budget, tokens, at=signals.at)


def hilbert(row: Tensor, column: Tensor, bits: int) -> Tensor:
    """How far along the Hilbert curve of a 2^bits x 2^bits grid a cell comes. row, column: long, of one shape."""
    x, y = column, row
    along = torch.zeros_like(x)
    for bit in reversed(range(bits)):
        right, down = (x >> bit) & 1, (y >> bit) & 1
        along = (along << 2) | ((3 * right) ^ down)
        mirror = ((1 << bits) - 1) * (right & (1 - down))  # the quadrant's curve is turned back into its first form
        x, y = x ^ mirror, y ^ mirror
        x, y = torch.where(down == 0, y, x), torch.where(down == 0, x, y)
    return along
