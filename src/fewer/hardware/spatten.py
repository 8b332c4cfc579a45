"""SpAtten: an attention accelerator that fetches fewer tokens, heads and bits. arXiv:2012.09852."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, repeat

import numpy as np

from .systolic import tiles

BUS = 32  # bytes a channel gives in a cycle
SOFTMAX = 7 + 21 + 23 + 29 + 7  # stages: dequantise, exponent, sum, divide, requantise
ROUND = 3  # cycles a round of quick-select takes besides reading its numbers


@dataclass(frozen=True)
class Cycles:
    """Of one layer's attention. dram: both fetches; fill: products; topk: rankings; drain: of the pipeline."""

    dram: int
    fill: int
    topk: float
    drain: int

    @property
    def total(self) -> float:
        """As the released model of the hardware adds them up: one behind the other."""
        return self.dram + self.fill + self.topk + self.drain

    @property
    def overlapped(self) -> float:
        """The same where fetching and computing go on at once, as a pipeline has it."""
        return max(self.dram, self.fill + self.topk) + self.drain

    def __add__(self, other: Cycles) -> Cycles:
        return Cycles(self.dram + other.dram, self.fill + other.fill, self.topk + other.topk, self.drain + other.drain)


@dataclass(frozen=True)
class SpAtten:
    """The accelerator as its registers are set by default.

    multipliers  of each of the two products: keys, then values. channels: of memory, 32 bytes a cycle each.
    bits         of keys and values in memory. parallel: numbers the top-k engine compares in a cycle.
    """

    multipliers: int = 512
    channels: int = 16
    bits: int = 8
    parallel: int = 16

    def __post_init__(self) -> None:
        for name in ("multipliers", "channels", "bits", "parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")

    def layer(
        self, queries: int, keys: int, heads: int = 12, width: int = 64, *, values: int | None = None,
        key_bits: float | None = None,
    ) -> Cycles:  # fmt: skip
        """Attention of one layer: `queries` tokens look at `keys` tokens, in heads of `width` channels.

        values: rows of V each head keeps by its own probabilities (local value pruning); None: all, without top-k.
        key_bits: bits fetched of a key, on the average, where that is decided while it runs.
        Source   the behavioural model the authors released; the three cases of the tests are its own, exact.
        """
        if width > self.multipliers:
            raise ValueError(f"a head of {width} channels needs as many multipliers; there are {self.multipliers}")
        if min(queries, keys, heads) < 1:
            return Cycles(0, 0, 0.0, 0)
        par = self.multipliers // width
        lines = tiles(keys, par)
        wanted = lines if values is None else tiles(min(values, keys), par)
        dram = self._fetch(lines * par * width, key_bits) + self._fetch(wanted * par * width, None)
        select = 0.0
        if values is not None and values < keys:
            select = lines + quickselect(keys, values, 2 * self.parallel)[0] + tiles(values, par)
        drain = 11 + SOFTMAX + lines + 1 + 1 + 3
        return Cycles(heads * dram, heads * queries * lines, heads * select, drain)

    def _fetch(self, numbers: int, bits: float | None) -> int:
        """Cycles until these numbers have come, over all channels at once."""
        return math.ceil(numbers * (self.bits if bits is None else bits) / 8 / BUS / self.channels)

    def model(
        self, tokens: Sequence[int], heads: Sequence[int] | int = 12, width: int = 64, *,
        keys: Sequence[int] | None = None, key_bits: float | None = None, ranked: bool = False,
    ) -> list[Cycles]:  # fmt: skip
        """Attention of all layers. tokens: that stand in each, which are its queries and, unless `keys` says otherwise,
        its keys. heads: left in each. ranked: whether the top-k engine ranks tokens between layers, as cascade pruning
        does wherever the next layer has fewer."""
        known = list(tokens if keys is None else keys)
        left = list(repeat(heads, len(tokens)) if isinstance(heads, int) else heads)
        if not len(tokens) == len(known) == len(left):
            raise ValueError(
                f"{len(tokens)} layers of queries, {len(known)} of keys and {len(left)} of heads: as many of each"
            )
        found = [self.layer(q, k, h, width, key_bits=key_bits) for q, k, h in zip(tokens, known, left, strict=True)]
        if ranked:
            for i in range(len(found) - 1):
                if 0 < known[i + 1] < known[i]:
                    found[i] += Cycles(0, 0, quickselect(known[i], known[i + 1], 2 * self.parallel)[0], 0)
        return found


@lru_cache(maxsize=64)
def quickselect(n: int, k: int, parallel: int = 16) -> tuple[float, float]:
    """Mean and standard deviation of the cycles the top-k engine takes to find the k-th of n numbers.

    A round compares all that are left with a pivot drawn from them, `parallel` in a cycle and 3 besides, and goes on in
    the part that holds the rank; it ends where the pivot is the one. Exact over all draws, not simulated: a table over
    (numbers left, rank), filled with running sums along ranks that stay and along those that move. All numbers differ.
    """
    if not 1 <= k <= n:
        raise ValueError(f"the {k}-th of {n} numbers: k is 1 to {n}")
    if parallel < 1:
        raise ValueError(f"parallel={parallel}: at least one number a cycle")
    # first[s, r], second[s, r]: moments of the cycles for rank r of s numbers. A pivot of rank j > r leaves j - 1
    # numbers and the rank, j < r leaves s - j numbers and rank r - j: sums over sizes at one rank and at one s - r.
    k = min(k, n - k + 1)  # ranks from either end are alike
    most = k
    same = np.zeros((2, most + 1))  # over sizes below s, at rank r
    moved = np.zeros((2, n + 1))  # over sizes below s, at s - r
    first, second = np.zeros(most + 1), np.zeros(most + 1)
    for s in range(1, n + 1):
        ranks = np.arange(1, min(s, most) + 1)
        cost = tiles(s, parallel) + ROUND
        one = (same[0, ranks] + moved[0, s - ranks]) / s
        two = (same[1, ranks] + moved[1, s - ranks]) / s
        first[ranks] = cost + one
        second[ranks] = cost**2 + 2 * cost * one + two
        same[:, ranks] += np.stack([first[ranks], second[ranks]])
        moved[:, s - ranks] += np.stack([first[ranks], second[ranks]])
    mean, square = float(first[k]), float(second[k])
    return mean, math.sqrt(max(square - mean**2, 0.0))


def sorter(n: int) -> tuple[int, int]:
    """Stages and comparators of each stage of a bitonic sorter of n numbers, what quick-select stands in for."""
    depth = max(1, math.ceil(math.log2(max(n, 2))))
    return depth * (depth + 1) // 2, 2**depth // 2


def cascade(full: int, final: float, layers: int, dense: float = 0.15) -> list[int]:
    """Tokens (or heads) that stand in each layer: all in the first `dense` share of them (rounded up), then linearly
    down to `final` of them in the last. Shapes a schedule as the paper describes it; the slope there is chosen for each
    task.

    >>> cascade(384, 0.25, 12)
    [384, 384, 356, 327, 298, 269, 240, 212, 183, 154, 125, 96]
    """
    if not 0 < final <= 1:
        raise ValueError(f"final={final} is the share left in the last layer, above 0 and at most 1")
    if layers < 1:
        raise ValueError(f"layers={layers}: at least 1")
    whole = min(math.ceil(dense * layers), layers)
    down = layers - whole
    shares = [1.0] * whole + [1 - (1 - final) * i / down for i in range(1, down + 1)]
    return [max(1, math.ceil(round(full * share, 9))) for share in shares]


def nested(counts: Sequence[int]) -> list[int]:
    """Counts as a cascade has them: what went never returns."""
    return list(accumulate(counts, min))


@dataclass(frozen=True)
class Progressive:
    """Keys in two planes of bits: the high one is fetched first; where no probability stands out, the low one too.

    high, low  bits of the planes. threshold: the largest probability below which the rest is fetched.
    """

    high: int = 8
    low: int = 4
    threshold: float = 0.1

    def key_bits(self, recomputed: float) -> float:
        """Bits fetched of a key on the average. recomputed: share of the queries whose low plane was fetched."""
        if not 0 <= recomputed <= 1:
            raise ValueError(f"recomputed={recomputed} is a share, 0 to 1")
        return self.high + recomputed * self.low

    def traffic(
        self, tokens: Sequence[int], heads: Sequence[int] | int, width: int, recomputed: float, values: float = 1.0
    ) -> float:
        """Bytes read from memory over all layers for one query a layer: keys by planes, and the share `values` of the
        rows of V, at all bits."""
        left = list(repeat(heads, len(tokens)) if isinstance(heads, int) else heads)
        bits = self.key_bits(recomputed) + values * (self.high + self.low)
        return sum(n * h * width * bits / 8 for n, h in zip(tokens, left, strict=True))

    def recompute_rate(self, largest: Sequence[float]) -> float:
        """Share of queries whose low plane is fetched. largest: each query's largest probability by the high plane."""
        return sum(p < self.threshold for p in largest) / max(len(largest), 1)
