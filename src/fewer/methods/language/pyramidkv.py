"""PyramidKV: lower layers spread their attention, upper ones funnel it; so cache more below. arXiv:2406.02069."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewer.core import Budget, Capacity, KeepRatio, Place, Plan, Signals, Tokens, reducer
from fewer.core.cache import CacheReducer, CacheSignals, Rows, check_window, pooled_votes, top

Fidelity = Literal["paper", "code", "kvpress"]


@dataclass(frozen=True)
class Pyramid(Budget):
    """A budget per layer that falls linearly from the first layer to the last and averages to `mean`.

    Besides the window, a layer keeps on average K, the last one K / beta and the first one 2 K - K / beta, but no more
    than there is. "paper": floors, what is left over goes to the largest fractions, so that the sum is exact. "code":
    the authors' integer divisions, whose sum falls a little short; below 2 K rows all layers keep K. "kvpress": the
    window counted inside the ramp, rounded half to even; a last layer below the window makes all layers equal.
    """

    mean: Budget = Capacity(1024)
    window: int = 32
    beta: float = 20
    fidelity: Fidelity = "paper"

    def keep(self, free: int, at: Place) -> int:
        mean, last, w = self.mean.keep(free, at), at.stages - 1, self.window
        if self.fidelity == "kvpress":
            share = self.mean.ratio if isinstance(self.mean, KeepRatio) and isinstance(self.mean.ratio, float) else None
            exact = mean if share is None else free * share
            low, high = _ramp(exact, exact / self.beta, free - w)
            if last == 0 or low < w or high < low:
                return round(exact)
            return round(high - at.stage * (high - low) / last)
        k = mean - w
        if k <= 0 or last == 0 or mean >= free:
            return mean
        if self.fidelity == "code":
            low, high = _ramp(k, k // self.beta, free - w)
            return mean if free < 2 * k else int(high - at.stage * ((high - low) // last)) + w
        low, high = _ramp(k, k / self.beta, free - w)
        ramp = [high - i * (high - low) / last for i in range(at.stages)]
        floors = [int(x + 1e-9) for x in ramp]
        rest = sorted(range(at.stages), key=lambda i: floors[i] - ramp[i])[: at.stages * k - sum(floors)]
        return floors[at.stage] + int(at.stage in rest) + w


def _ramp(mean: float, low: float, most: int) -> tuple[float, float]:
    """The ends of a ramp of this mean, the upper one no more than `most`."""
    high = 2 * mean - low
    return (2 * mean - most, most) if high > most else (low, high)


@reducer("pyramidkv", paper="arXiv:2406.02069", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class PyramidKV(CacheReducer):
    """SnapKV's votes under a budget that falls from layer to layer.

    budget    rows per KV head on average over the layers, the window included
    beta      steepness: the last layer keeps a beta-th of the average, besides the window
    window    queries that vote and always stay
    kernel    odd width of the pooling
    pool      "mean" or "max" over the kernel
    fidelity  how layers round, see `Pyramid`
    """

    budget: Budget = Capacity(1024)
    window: int = 8
    kernel: int = 5
    pool: Literal["mean", "max"] = "mean"
    beta: float = 20
    fidelity: Fidelity = "paper"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_window(self.window, self.kernel, self.pool)
        if self.beta < 1:
            raise ValueError(f"beta={self.beta}: the last layer keeps a beta-th of the average, so beta is at least 1")
        if self.fidelity not in ("paper", "code", "kvpress"):
            raise ValueError(f"fidelity={self.fidelity!r} is none of 'paper', 'code', 'kvpress'")

    @property
    def least(self) -> int:
        return self.window

    @property
    def allowance(self) -> Budget:
        return Pyramid(self.budget, self.window, self.beta, self.fidelity)

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(signals, CacheSignals) and isinstance(tokens, Rows)
        votes = pooled_votes(signals, tokens, self.window, self.kernel, self.pool)
        window = tokens.newest(self.window)
        return top(votes, self.allowance, tokens, at=signals.at, protected=window, least=self.least)
