"""Static and dynamic pruning of a ViT on an FPGA (Parikh et al., FCCM 2024): blocks of weights that are gone, tokens
that leave.

Blocks of b x b weights are pruned once and for all, so their pattern can be balanced over the lanes of the hardware
before it runs; tokens leave while it runs. In FLOPs the two multiply. In time they do not, for lanes wait for the
fullest and tokens come in tiles. Cycle counts are our model from the paper's summary: no number of it is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .systolic import tiles


def blocks(weight: np.ndarray, size: int = 16) -> np.ndarray:
    """Which blocks of a matrix hold a weight that is not zero: (ceil(rows / size), ceil(columns / size)) bool."""
    if weight.ndim != 2 or size < 1:
        raise ValueError(f"a weight of shape {weight.shape} in blocks of {size}: two dimensions, blocks of at least 1")
    rows, columns = weight.shape
    padded = np.pad(weight != 0, ((0, -rows % size), (0, -columns % size)))
    return np.asarray(padded.reshape(padded.shape[0] // size, size, -1, size).any((1, 3)))


def balanced(work: Sequence[int], lanes: int) -> list[int]:
    """Work of each lane when columns of blocks are dealt out off-line: the largest first, always to the least busy."""
    if lanes < 1:
        raise ValueError(f"lanes={lanes}: at least 1")
    loads = [0] * lanes
    for column in sorted(work, reverse=True):
        loads[loads.index(min(loads))] += int(column)
    return loads


def dealt(work: Sequence[int], lanes: int) -> list[int]:
    """The same without balancing: columns in turn."""
    return [int(sum(work[lane::lanes])) for lane in range(lanes)]


def imbalance(loads: Sequence[int]) -> float:
    """Fullest lane over the mean: 1 where all have the same, or nothing, to do."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


@dataclass(frozen=True)
class Accelerator:
    """lanes of block columns; each takes a block to `tile` tokens in `block` cycles (a row of the block at a time).

    width of the sorting network that drops tokens: it takes ceil(N / width) passes of log2(width)(log2(width)+1)/2
    stages.
    """

    lanes: int = 8
    block: int = 16
    tile: int = 16
    sorter: int = 64

    def matrix(self, pattern: np.ndarray, tokens: int, even: bool = True) -> int:
        """Cycles of a linear layer with these blocks left on this many tokens. even: balanced off-line."""
        loads = (balanced if even else dealt)(pattern.sum(0).tolist(), self.lanes)
        return max(loads) * self.block * tiles(tokens, self.tile)

    def dropping(self, tokens: int, width: int) -> int:
        """Cycles of ranking tokens and of moving those that stay (at most all) through the shuffle buffer."""
        depth = max(1, (self.sorter - 1).bit_length())
        return tiles(tokens, self.sorter) * depth * (depth + 1) // 2 + tokens * tiles(width, self.block * self.lanes)


def pattern(rows: int, columns: int, density: float, seed: int = 0) -> np.ndarray:
    """A random pattern of blocks, each there with this probability: (rows, columns) bool."""
    if not 0 <= density <= 1:
        raise ValueError(f"density={density} is a share, 0 to 1")
    return np.random.default_rng(seed).random((rows, columns)) < density
