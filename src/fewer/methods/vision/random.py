"""Random: keep tokens by a seeded draw. The baseline every ranking must beat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Tokens, reducer, select


@reducer("random", paper="baseline", acts="prune", on="vision", training="optional")
@dataclass(frozen=True)
class Random(Reducer):
    """A random subset stays: another one at every layer, the same one for every image.

    budget: share of the first free tokens that stays, to the power of the stage (1, 2, 3), rounded down.
    seed: of the draw. A token's number depends on the seed, the layer and its place in the input alone, so neither
    the batch nor the device changes who stays.
    """

    budget: Budget = KeepRatio(0.7, of="start")
    layers: tuple[int, ...] | None = (3, 6, 9)
    seed: int = 0

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        return select.top(noise(tokens.place(), self.seed, signals.at.layer), self.budget, tokens, at=signals.at)


def noise(place: Tensor, seed: int, layer: int) -> Tensor:
    """A hash of (place, seed, layer) as float32, uniform over the whole numbers below 2^24. place: long, any shape."""
    x = _mixed(place + _mixed_int(seed * 1009 + layer))
    return (x & 0xFFFFFF).float()


def _mixed_int(x: int) -> int:
    x &= 0xFFFFFFFF
    for factor in (0x7FEB352D, 0x46CA68B5):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return x


def _mixed(x: Tensor) -> Tensor:
    """An integer hash of 32 bits: xor with the upper half, multiply by an odd number, twice."""
    for factor in (0x7FEB352D, 0x46CA68B5):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)
