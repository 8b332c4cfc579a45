"""Grid: keep tokens evenly spread over the image, whatever it shows. A baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer, select

BITS = 16  # of rows, columns and planes in a vision-language model, where their number is no Python integer


@reducer("grid", paper="baseline", acts="prune", on="vision", training="optional")
@dataclass(frozen=True)
class Grid(Reducer):
    """Uniform subsampling of the patch grid to any count.

    budget: share of the first free tokens that stays, to the power of the stage (1, 2, 3), rounded down.
    site: where in the block; "bridge" is once, in front of the language model of a vision-language model, whatever
    `layers` says.

    Patches leave in the order of a Bayer matrix, as in ordered dithering: a quarter is every second row and column,
    a half the squares of one colour of a chess board, and smaller sets are contained in larger ones. Tiles and frames
    take turns, those far apart first, so that each gives its share. Where the patches form no known grid, they are one
    row.
    """

    budget: Budget = KeepRatio(0.7, of="start")
    layers: tuple[int, ...] | None = (3, 6, 9)
    site: Site = Site.MID_BLOCK

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        row, column = signals.cell
        if signals.beside is not None or signals.frames > 1:
            key = (bayer(row, column, BITS) << BITS) | mirrored(signals.plane, BITS)
            rank = key.argsort(dim=-1, stable=True).argsort(dim=-1)
        else:
            side = signals.at.start if signals.grid is None else max(signals.grid)
            rank = bayer(row, column, (side - 1).bit_length())
        return select.top(-rank.float(), self.budget, tokens, at=signals.at)


def bayer(row: Tensor, column: Tensor, bits: int) -> Tensor:
    """The rank of a cell in the 2^bits x 2^bits Bayer matrix: bits of (row ^ column) and row, interleaved, reversed."""
    rank = torch.zeros_like(row)
    for bit in range(bits):
        rank = (rank << 2) | ((((row ^ column) >> bit) & 1) << 1) | ((row >> bit) & 1)
    return rank


def mirrored(x: Tensor, bits: int) -> Tensor:
    """Whole numbers with their bits in the opposite order: counting up, every number falls into the widest gap."""
    out = torch.zeros_like(x)
    for bit in range(bits):
        out = (out << 1) | ((x >> bit) & 1)
    return out
