"""HeatViT: token selectors on a matrix engine of an FPGA. arXiv:2211.08110.

The arithmetic is what the hardware computes instead of GELU, softmax and sigmoid. The constants below 1 that scale the
results are part of it: they bound how far an error of rounding grows, and models are fine-tuned with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .systolic import tiles

A, B = -0.2888, -1.769  # of the polynomial that stands for erf between 0 and -B
HALVED = 0.5  # what the results of erf and of the softmax of attention are multiplied by


def erf(u: Tensor, delta: float = HALVED) -> Tensor:
    """delta sign(u) (a (min(|u|, -b) + b)^2 + 1): a second-degree stand-in for the error function."""
    return delta * u.sign() * (A * (u.abs().clamp(max=-B) + B) ** 2 + 1)


def gelu(x: Tensor, delta: float = HALVED) -> Tensor:
    """x / 2 (1 + erf(x / sqrt 2)) with the polynomial; delta = 1 comes close to the function, 0.5 is the design's."""
    return x / 2 * (1 + erf(x / math.sqrt(2), delta))


def exponential(x: Tensor) -> Tensor:
    """exp(x) for x <= 0: a polynomial on (-ln 2, 0], and a shift of bits for the whole powers of two."""
    z = torch.floor(-x / math.log(2))
    p = x + z * math.log(2)
    return (0.3585 * (p + 1.353) ** 2 + 0.344) * torch.exp2(-z)


def softmax(x: Tensor, delta: float = HALVED) -> Tensor:
    """Over the last axis; rows sum to delta (0.5 in attention, 1 in the selector)."""
    e = exponential(x - x.amax(-1, keepdim=True))
    return delta * e / e.sum(-1, keepdim=True)


def sigmoid(x: Tensor) -> Tensor:
    """Four straight lines and their mirror image; a jump of 1/256 at 2.375 is the design's own."""
    u = x.abs()
    y = torch.where(u >= 1, u / 8 + 0.625, u / 4 + 0.5)
    y = torch.where(u >= 2.375, u / 32 + 0.84375, y)
    y = torch.where(u >= 5, torch.ones_like(u), y)
    return torch.where(x < 0, 1 - y, y)


# -- cost -------------------------------------------------------------------------------------------------------------
def selector_layers(width: int, heads: int) -> list[tuple[int, int, int]]:
    """(times, in, out) of the matrices a token passes in a selector: those of each head, then the heads' weights."""
    d = width // heads
    return [(heads, d, d // 2), (heads, d, d // 2), (heads, d // 2, d // 4), (heads, d // 4, 2), (2, heads, heads)]


def selector_macs(width: int, heads: int) -> int:
    """Multiply-adds of a selector for one token.

    >>> selector_macs(384, 6), round(selector_macs(384, 6) / (12 * 384**2), 4)  # DeiT-S: 1.6 % of a block's
    (27912, 0.0158)
    """
    return sum(times * i * o for times, i, o in selector_layers(width, heads))


@dataclass(frozen=True)
class Engine:
    """A tiled matrix engine: every cycle, `lanes` heads (or strips of a matrix) take `tile_in` inputs of a token to
    `tile_out` outputs. The loop order and the rounding to whole tiles are our model; the paper gives the engine, not
    its cycle counts. clock: MHz.
    """

    tile_in: int = 16
    tile_out: int = 16
    lanes: int = 4
    clock: float = 150.0

    def __post_init__(self) -> None:
        if min(self.tile_in, self.tile_out, self.lanes) < 1 or self.clock <= 0:
            raise ValueError(f"{self!r}: tiles and lanes are at least 1, the clock is above 0 MHz")

    def matrix(self, tokens: int, inputs: int, outputs: int) -> int:
        """Cycles of a linear layer: its outputs are split over the lanes."""
        return tokens * tiles(inputs, self.tile_in) * tiles(outputs, self.tile_out * self.lanes)

    def per_head(self, tokens: int, inputs: int, outputs: int, heads: int) -> int:
        """Cycles of as many products as there are heads, each in one lane."""
        return tokens * tiles(inputs, self.tile_in) * tiles(outputs, self.tile_out) * tiles(heads, self.lanes)

    def block(self, tokens: int, width: int, heads: int, ratio: float = 4, mlp: int | None = None) -> int:
        """Cycles of a block of a ViT. mlp: tokens that reach its MLP, None: all."""
        behind, inner, d = tokens if mlp is None else mlp, int(ratio * width), width // heads
        attention = self.per_head(tokens, d, tokens, heads) + self.per_head(tokens, tokens, d, heads)
        linear = self.matrix(tokens, width, 3 * width) + self.matrix(tokens, width, width)
        return linear + attention + self.matrix(behind, width, inner) + self.matrix(behind, inner, width)

    def selector(self, tokens: int, width: int, heads: int) -> int:
        """Cycles of a token selector on the same engine."""
        *own, weights = selector_layers(width, heads)
        cycles = sum(self.per_head(tokens, i, o, heads) for _, i, o in own)
        return cycles + 2 * self.matrix(tokens, weights[1], weights[2])

    def milliseconds(self, cycles: float) -> float:
        return cycles / self.clock / 1e3


def latency_table(
    engine: Engine, width: int, heads: int, tokens: int, shares: Sequence[float], prefix: int = 1
) -> dict[float, float]:
    """The latency-sparsity table: share of patches left -> milliseconds of one block. What `budgets` reads; one
    measured on a device does as well.

    tokens: of the unreduced model, prefix included; patches that stay are rounded up, and one package row is added.
    """
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares={list(shares)}: each is above 0 and at most 1")
    free = tokens - prefix
    table = {}
    for share in (1.0, *shares):
        left = prefix + math.ceil(round(free * share, 9)) + (share < 1)
        table[share] = engine.milliseconds(engine.block(left, width, heads))
    return table


def budgets(
    table: dict[float, float], stages: Sequence[int], blocks: int, limit: float, own: float = 0.0
) -> tuple[float, ...]:
    """The gentlest shares, one per stage and each a power of the first, whose latency meets the limit.

    table: see `latency_table`. stages: blocks in front of which selectors stand, ascending. own: what one selector
    takes, in the table's unit. Returns the shares as `KeepRatio(shares, of="start")` wants them.

    Raises   ValueError where even the smallest share of the table is too slow: it names what that one takes.
    """
    from fewer.methods.vision.spvit import ratios_for_latency

    return ratios_for_latency(table, stages, blocks, limit - own * len(stages))
