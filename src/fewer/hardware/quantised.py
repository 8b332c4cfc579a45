"""Few bits and few tokens together: what they are worth where memory or multipliers are narrow.

Agile-Quant (arXiv:2312.05693) drops prompt tokens so that the rest bears fewer bits of activation; OTT
(arXiv:2505.10938) stores the KV cache in two bits but for a few tokens. Both run as methods on models; this is their
cost on hardware that has such multipliers, from closed forms. Speeds that the papers measured are not claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def spread(final: float, stages: int) -> float:
    """Share that goes at each of some stages so that `final` has gone behind the last: 1 - (1 - final)^(1/n).

    >>> round((1 - spread(0.9, 3)) ** 3, 9)
    0.1
    """
    if not 0 <= final < 1 or stages < 1:
        raise ValueError(f"final={final} over {stages} stages: a share from 0 to below 1, and at least one stage")
    return 1 - (1 - final) ** (1 / stages)


@dataclass(frozen=True)
class Multipliers:
    """A processor whose multiply-adds a second rise as operands get narrower, until memory is what it waits for.

    full       multiply-adds a second at 16 bits
    gain       how much more of them there are with operands of half the bits (2: as many fit a register)
    bandwidth  bytes a second
    """

    full: float
    bandwidth: float
    gain: float = 2.0

    def rate(self, weights: int, activations: int) -> float:
        """Multiply-adds a second: the wider operand decides, for both go through one register."""
        steps, bits = 0, 16
        while bits > max(weights, activations) and bits > 2:
            bits //= 2
            steps += 1
        return float(self.full * self.gain**steps)

    def layer(self, tokens: int, keys: int, weights: int, width: int, bits: tuple[int, int] = (16, 16)) -> float:
        """Seconds of a layer. weights: number of its weights, read once; bits: of weights and activations."""
        macs = tokens * weights + 2 * tokens * keys * width
        moved = weights * bits[0] / 8 + 4 * tokens * width * bits[1] / 8
        return max(macs / self.rate(*bits), moved / self.bandwidth)

    def prefill(self, counts: Sequence[int], weights: int, width: int, bits: tuple[int, int] = (16, 16)) -> float:
        """Seconds of all layers, counts: tokens in each."""
        return sum(self.layer(n, n, weights, width, bits) for n in counts)


def row_bytes(
    bits: int, group: int, kv_heads: int, head_dim: int, *, rows: int = 0, pool: int = 0, window: int = 0,
    exact: int = 2, scale: int = 4,
) -> float:  # fmt: skip
    """Bytes of a row of one layer's cache, K and V: codes, the keys' scale and smallest number of each channel and
    group, the values' of each row; and its share of what is exact.

    rows   stored in all, over which pool and window are spread (0: neither is counted). Rows of the pool keep their
           place among the codes, so they count twice; rows of the window are not coded.
    exact  bytes of a number that is not coded; scale: of a scale and a smallest number together.

    With the values' scales left out of account this is the estimate 2 h D (bits / 8 + 4 / group).
    """
    d = kv_heads * head_dim
    coded = 2 * d * bits / 8 + d * scale / group + kv_heads * scale
    if not rows:
        return coded
    left = max(rows - window, 0)
    return (left * coded + (min(pool, left) + min(window, rows)) * 2 * d * exact) / rows


def decode_seconds(weights: float, cache: float, bandwidth: float) -> float:
    """Seconds for one token: all weights and all of the cache pass the bus once. weights, cache: bytes."""
    if bandwidth <= 0:
        raise ValueError(f"bandwidth={bandwidth} bytes a second: above 0")
    return (weights + cache) / bandwidth
