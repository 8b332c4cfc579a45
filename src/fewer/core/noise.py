"""Numbers that look random and depend on nothing but a place, a seed and a layer."""

from __future__ import annotations

from torch import Tensor


def noise(place: Tensor, seed: int, layer: int) -> Tensor:
    """A hash of (place, seed, layer) as float32, uniform over the whole numbers below 2^24. place: long, any shape."""
    x = _mixed(place + hashed(seed * 1009 + layer))
    return (x & 0xFFFFFF).float()


def hashed(x: int) -> int:
    """A hash of 32 bits."""
    x &= 0xFFFFFFFF
    for factor in (0x7FEB352D, 0x46CA68B5):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return x


def _mixed(x: Tensor) -> Tensor:
    """An integer hash of 32 bits: xor with the upper half, multiply by an odd number, twice."""
    for factor in (0x7FEB352D, 0x46CA68B5):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)
