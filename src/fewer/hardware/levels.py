"""One matrix product on a memory hierarchy, by the conventions of Timeloop (dense) and Sparseloop (with zeros).

Cycles are those of the slowest level, for all work at once; energy is summed over every access. Dropping tokens makes
the problem smaller and leaves it dense; zeros inside a problem that keeps its shape (a mask, value rows that one head
skips) save energy where units are gated, and time only where they are skipped.
Source   Timeloop (ISPASS 2019), Accelergy (ICCAD 2019), Sparseloop (MICRO 2022): the conventions, none of their code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ENERGY = {"dram": 640.0, "sram": 5.0, "float32": 4.6, "int8": 0.23}
"""Picojoules of 32 bits read and of a multiply-add at 45 nm, by the well-known table: for ratios, not for bills."""

Zeros = Literal["computed", "gated", "skipped"]


@dataclass(frozen=True)
class Level:
    """A memory. words: it holds (0: all there are). bandwidth: words a cycle. energy: picojoules a word."""

    name: str
    words: int
    bandwidth: float
    energy: float


@dataclass(frozen=True)
class Cost:
    """cycles of each part that can be the slowest, by name; picojoules in all."""

    parts: dict[str, float]
    energy: float

    @property
    def cycles(self) -> float:
        return max(self.parts.values())

    @property
    def bound(self) -> str:
        """The part that is the slowest."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True)
class Machine:
    """units: multiply-adds a cycle. levels: memories, the outermost first. energy: picojoules of a multiply-add."""

    units: int
    levels: Sequence[Level]
    energy: float = ENERGY["float32"]

    def cost(self, m: int, n: int, k: int, density: float = 1.0, zeros: Zeros = "computed") -> Cost:
        """Of (m x k)(k x n), where a share of the products is none of zero.

        Traffic of a level is that of a product blocked to fit the level inside it: blocks of T x T outputs with
        T = sqrt(words / 3), so that each operand is read once for every block of the other. density: share of
        the multiply-adds that count. zeros: "computed", as dense hardware does; "gated", the unit rests, the cycle
        passes; "skipped", neither time nor energy.
        """
        if not 0 <= density <= 1:
            raise ValueError(f"density={density} is a share, 0 to 1")
        if zeros not in ("computed", "gated", "skipped"):
            raise ValueError(f"zeros={zeros!r} are computed, gated or skipped")
        work = m * n * k
        timed = work * (density if zeros == "skipped" else 1)
        burnt = work * (1 if zeros == "computed" else density)
        parts, energy = {"compute": timed / self.units}, burnt * self.energy
        for i, level in enumerate(self.levels):
            inner = self.levels[i + 1].words if i + 1 < len(self.levels) else 3
            moved = traffic(m, n, k, inner)
            read = moved * (density if zeros == "skipped" else 1)
            parts[level.name] = read / level.bandwidth
            energy += moved * (1 if zeros == "computed" else density) * level.energy
        return Cost(parts, energy)


def traffic(m: int, n: int, k: int, words: int) -> float:
    """Words that pass into a memory of this size: both operands once for each block of outputs, outputs once."""
    if not words or m * k + k * n + m * n <= words:
        return float(m * k + k * n + m * n)
    side = max(1, int((words / 3) ** 0.5))
    return float(m * k * -(-n // side) + k * n * -(-m // side) + m * n)
