"""Systolic arrays: compute cycles of a matrix product by the closed forms of SCALE-Sim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Dataflow = Literal["os", "ws", "is"]
DATAFLOWS = {"os": "output", "ws": "weight", "is": "input"}


def tiles(size: int, tile: int) -> int:
    """How many tiles cover a size; the last may be partly empty."""
    return -(-size // tile)


@dataclass(frozen=True)
class Array:
    """rows x columns multiply-add units. dataflow: what stands still while the rest flows past: "os" outputs, "ws"
    weights, "is" inputs.

    >>> array = Array(128, 128)
    >>> [array.cycles(tokens, 1536, 384) for tokens in (197, 129, 128)]
    [15311, 15311, 7655]
    """

    rows: int
    columns: int
    dataflow: Dataflow = "os"

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1:
            raise ValueError(
                f"an array of {self.rows}x{self.columns} units computes nothing; at least 1x1, as in 128x128"
            )
        if self.dataflow not in DATAFLOWS:
            raise ValueError(
                f"dataflow {self.dataflow!r} is none of {', '.join(DATAFLOWS)} (output, weight, input stationary)"
            )

    def cycles(self, m: int, n: int, k: int) -> int:
        """Cycles of (m x k)(k x n), m = tokens; 0 where there is nothing to compute. Without stalls of the memory.

        Each fold of the array is filled, run and drained one behind the other: R + C + K - 2 cycles where outputs stand
        still; 2R + C + T - 2 where an operand does, for it is loaded first (R), and T rows or columns then flow past.
        Source   SCALE-Sim, arXiv:1811.02883, version 3: nine of its runs are in the tests, exact.
        """
        if min(m, n, k) < 0:
            raise ValueError(f"a product of {m} x {k} and {k} x {n}: no size may be negative")
        if min(m, n, k) == 0:
            return 0
        r, c = self.rows, self.columns
        if self.dataflow == "os":
            return tiles(m, r) * tiles(n, c) * (r + c + k - 2) - 1
        across, flow = (n, m) if self.dataflow == "ws" else (m, n)
        return tiles(k, r) * tiles(across, c) * (2 * r + c + flow - 2) - 1

    def used(self, m: int, n: int, k: int) -> float:
        """Share of the units' cycles that multiply something of this product, 0 to 1."""
        cycles = self.cycles(m, n, k)
        return m * n * k / (self.rows * self.columns * cycles) if cycles else 0.0


def steps(cost: Callable[[int], float], most: int) -> list[int]:
    """Token counts, ascending, behind which one more token costs more: between them tokens are free.

    cost: of a number of tokens, not falling. most: the largest count looked at, always the last of the list.
    """
    costs = [cost(n) for n in range(1, most + 1)]
    edges = [n for n, (here, there) in enumerate(pairwise(costs), 1) if there > here]
    return [*edges, most]
