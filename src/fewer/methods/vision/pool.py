"""Pool: average neighbouring patches, whatever they show. A baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, cluster, reducer

BITS = 16  # of rows and columns in a vision-language model, where their number is no Python integer


@reducer("pool", paper="baseline", acts="pool", on="vision", training="optional")
@dataclass(frozen=True)
class Pool(Reducer):
    """Average pooling of the patch grid to any count.

    budget: share of the first free tokens that stays, to the power of the stage (1, 2, 3), rounded down.
    proportional: later blocks add log(size) to their attention logits.
    site: where in the block; "bridge" is once, in front of the language model of a vision-language model, whatever
    `layers` says.

    The patches are lined up along a Hilbert curve, on which neighbours in the line are neighbours in the image, and
    the line is cut into equal runs: on a grid of even height and width, a keep ratio of 1/4 is 2 x 2 pooling and 1/2
    pools pairs. Tiles and frames are lined up one behind the other. Where the patches form no known grid, they are
    one row.
    """

    budget: Budget = KeepRatio(0.7, of="start")
    layers: tuple[int, ...] | None = (3, 6, 9)
    proportional: bool = False
    site: Site = Site.MID_BLOCK

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        row, column = signals.cell
        if signals.beside is not None or signals.frames > 1:
            line = (signals.plane << 2 * BITS) | hilbert(row, column, BITS)
            line = line.argsort(dim=-1, stable=True).argsort(dim=-1)
        else:
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
