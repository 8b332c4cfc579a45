"""PRIMATE: token pruning computed in the banks of a memory (Pan et al., ASP-DAC 2024).

Only the paper's abstract was at hand: it names the problems (arrays have no top-k; pruning leaves banks idle) and the
answers (an in-memory top-k, layers laid over banks as a pipeline, an optimiser for it). The formulas are our model of
them, for comparing schedules with each other; no number of the paper is claimed for them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from .systolic import tiles


def utilisation(kept: int, banks: int) -> float:
    """Share of the banks' row slots that hold a token: 1 where `kept` is a multiple of the banks."""
    if kept < 1 or banks < 1:
        raise ValueError(f"kept={kept} tokens in banks={banks}: at least one of each")
    return kept / (banks * tiles(kept, banks))


def prefill_bytes(tokens: int, heads: int, bytes_each: float = 2) -> float:
    """Scores that never leave the banks, h N N numbers: what the prefill of a layer saves of the bus."""
    return heads * tokens * tokens * bytes_each


def decode_bytes(tokens: int, kv_width: int, bytes_each: float = 2) -> float:
    """Rows of K and V read for one new token, linear in the tokens that are left."""
    return 2 * tokens * kv_width * bytes_each


def topk_cycles(tokens: int, banks: int, bits: int = 16, count: int = 8) -> int:
    """Cycles of a bit-serial search for the threshold that leaves k scores: one pass for each bit of a score, in which
    every bank reads its share of them and the counts are added up (`count` cycles). Independent of k."""
    return bits * (tiles(tokens, banks) + count)


@dataclass(frozen=True)
class Pipeline:
    """Layers over banks. banks: given to each layer; cycles: each layer takes for one input."""

    banks: tuple[int, ...]
    cycles: tuple[int, ...]

    @property
    def interval(self) -> int:
        """Cycles between two inputs: those of the slowest layer."""
        return max(self.cycles)

    @property
    def idle(self) -> float:
        """Share of all banks' time in which they wait for the slowest layer."""
        busy = sum(b * c for b, c in zip(self.banks, self.cycles, strict=True))
        return 1 - busy / (sum(self.banks) * self.interval)


def layer_cycles(tokens: int, width: int, banks: int, ratio: float = 4, heads: int = 1, per_bank: int = 16) -> int:
    """Cycles of a layer whose tokens are spread over banks that make `per_bank` multiply-adds a cycle each."""
    slots = tiles(tokens, banks)
    per_token = (4 + 2 * ratio) * width**2 + 2 * tokens * width
    return tiles(int(slots * per_token), per_bank) + topk_cycles(tokens, banks)


def assign(tokens: Sequence[int], width: int, banks: int, ratio: float = 4) -> Pipeline:
    """Banks to layers so that the slowest layer is as fast as it can be: each further bank goes where it helps the
    slowest. Banks that cannot speed it up any more stay unused, for tokens come whole.

    Raises   ValueError where there are fewer banks than layers.
    """
    if banks < len(tokens):
        raise ValueError(f"banks={banks}: a pipeline of {len(tokens)} layers needs one for each")
    given = [1] * len(tokens)
    queue = [(-layer_cycles(n, width, 1, ratio), i) for i, n in enumerate(tokens)]
    heapq.heapify(queue)
    left = banks - len(tokens)
    while left:
        _, i = queue[0]
        wanted = _next(tokens[i], given[i])
        if wanted is None or wanted - given[i] > left:
            break
        left -= wanted - given[i]
        given[i] = wanted
        heapq.heapreplace(queue, (-layer_cycles(tokens[i], width, wanted, ratio), i))
    cycles = tuple(layer_cycles(n, width, b, ratio) for n, b in zip(tokens, given, strict=True))
    return Pipeline(tuple(given), cycles)


def _next(tokens: int, banks: int) -> int | None:
    """The fewest banks that hold these tokens in fewer rows each; None where each has one."""
    rows = tiles(tokens, banks)
    return None if rows == 1 else tiles(tokens, rows - 1)
