"""The operations whose time makes a profile: which, of what sizes, and on what memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048)
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
PAIRS = (16, 64, 256, 1024)
INNER = (64, 512)
# Kernels like multiples of 16 or 64, and what a reduction leaves is none: neither are these.
QUERIES, KEYS, HEADS = (1, 19, 75, 150, 300, 1100), (19, 75, 150, 300, 1100, 4300), (32, 64, 128)
SQUARE = QUERIES[2:]
NUMBERS = (1 << 6, 1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 21, 1 << 22)
SORTED = (16, 64, 256, 1024, 4096)
MOST = 1e9  # FLOPs of the largest product that is timed
LINES = 8  # heads or rows side by side where attention and sorting are timed
ROW = 256  # numbers in a row of what is moved
RING = 3  # results that are alive at a time
COLD = 256 << 20  # bytes of weights that are multiplied in turn: in a model, too, none is found in a cache
NEAR = 1 << 25  # numbers that all else is made of

Run = Callable[[], Any]
Point = tuple[str, tuple[int, ...]]
PRODUCTS = {
    "gemm": (TOKENS, WIDTHS, WIDTHS), "pairs": (PAIRS, PAIRS, INNER), "attention": (QUERIES, KEYS, HEADS),
}  # fmt: skip
"""Axes of what has a rate. The first is m or queries, then n or keys, then k or the width of a head."""


def flops(kind: str, point: tuple[int, ...]) -> int:
    """Of one product or attention that is timed."""
    return {"gemm": 2, "pairs": 2 * LINES, "attention": 4 * LINES}[kind] * math.prod(point)


class Maker:
    """Makes what is timed, out of memory that is shared by all."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.near = torch.randn(NEAR, device=device, dtype=dtype)
        self.far = torch.ones(COLD // self.near.element_size(), device=device, dtype=dtype)
        self.read = 0

    def runs(self) -> dict[Point, Run]:
        """Everything that is timed, by kind and size."""
        made: dict[str, Callable[..., Run]] = {"gemm": self.linear, "pairs": self.pairs, "attention": self.attention}
        found: dict[Point, Run] = {("view", ()): partial(self(8, 8).view, 64)}
        for kind, axes in PRODUCTS.items():
            for point in product(*axes):
                if flops(kind, point) <= MOST or point[0] == axes[0][0]:
                    found[kind, point] = made[kind](*point)
        for n in SQUARE:
            found["square", (n,)] = self.attention(n, n, 64)
            found["causal", (n,)] = self.attention(n, n, 64, causal=True)
            found["masked", (n,)] = self.attention(n, n, 64, mask=True)
        for kind, make in self.kinds():
            for n in NUMBERS:
                moved, run = make(n)
                found[kind, (moved,)] = run
        for n in SORTED:
            found["sort", (n,)] = partial(self(LINES, n).sort, dim=-1, descending=True, stable=True)
        return found

    def __call__(self, *shape: int, slot: int = 0) -> Tensor:
        """Numbers of this shape, those of another slot elsewhere."""
        n = math.prod(shape)
        return self.near[slot * n : (slot + 1) * n].view(shape)

    def ring(self, *shape: int) -> list[Tensor]:
        return [self(*shape, slot=i) for i in range(RING)]

    def cold(self, n: int, k: int) -> Tensor:
        """(n, k) of memory that has not been read for a long time."""
        if self.read + n * k > len(self.far):
            self.read = 0
        self.read += n * k
        return self.far[self.read - n * k : self.read].view(n, k)

    def linear(self, m: int, n: int, k: int) -> Run:
        """A product with a weight that is read from memory."""
        x, bias = self(m, k), self(n)
        return lambda: F.linear(x, self.cold(n, k), bias)

    def pairs(self, m: int, n: int, k: int) -> Run:
        a, b = self(LINES, m, k), self(LINES, n, k)
        return lambda: a @ b.transpose(1, 2)

    def attention(self, n: int, m: int, d: int, causal: bool = False, mask: bool = False) -> Run:
        """Heads lie as projections leave them, side by side in a row."""
        q, k, v = (self(1, rows, LINES, d, slot=i).transpose(1, 2) for i, rows in enumerate((n, m, m)))
        bias = self(1, 1, 1, m) if mask else None
        return self.ringed(lambda _: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal), [q])

    def ringed(self, call: Callable[[Tensor], Any], inputs: Sequence[Tensor]) -> Run:
        """A call whose inputs take turns and whose results live on for a while, as in a model: what is read was not
        written just before, and what is written is not where the last result was."""
        turn, held = cycle(inputs), deque[Any](maxlen=RING - 1)
        return lambda: held.append(call(next(turn)))

    def kinds(self) -> Iterator[tuple[str, Callable[[int], tuple[int, Run]]]]:
        """Each kind of operation: of n numbers, what it moves and the call."""

        def shaped(n: int) -> tuple[int, int]:
            return max(1, n // ROW), min(n, ROW)

        def unary(call: Callable[[Tensor], Any], passes: int = 2) -> Callable[[int], tuple[int, Run]]:
            def make(n: int) -> tuple[int, Run]:
                inputs = self.ring(*shaped(n))
                return passes * inputs[0].nbytes, self.ringed(call, inputs)

            return make

        def light(n: int) -> tuple[int, Run]:
            inputs = self.ring(*shaped(n))
            others = cycle(inputs[1:] + inputs[:1])
            return 3 * inputs[0].nbytes, self.ringed(lambda x: x + next(others), inputs)

        def reduce(n: int) -> tuple[int, Run]:
            rows, width = shaped(n)
            inputs = [x.view(rows, 4, -1).transpose(0, 1) for x in self.ring(rows, width)]  # over heads, as keys lie
            return inputs[0].nbytes, self.ringed(lambda x: x.mean(0), inputs)

        def rows(n: int) -> tuple[int, Run]:
            inputs = self.ring(*shaped(2 * n))
            index = torch.randperm(inputs[0].shape[0], device=self.device)[: max(1, inputs[0].shape[0] // 2)]
            return 2 * index.numel() * inputs[0].shape[1] * inputs[0].element_size(), self.ringed(
                lambda x: x.index_select(0, index), inputs
            )

        def gather(n: int) -> tuple[int, Run]:
            inputs = self.ring(*shaped(n))
            index = torch.randint(inputs[0].shape[1], inputs[0].shape, device=self.device)
            return 2 * inputs[0].nbytes, self.ringed(lambda x: x.gather(1, index), inputs)

        yield "light", light
        yield "norm", unary(lambda x: F.layer_norm(x, x.shape[1:]))
        yield "gelu", unary(F.gelu)
        yield "silu", unary(F.silu)
        yield "exp", unary(torch.exp)
        yield "softmax", unary(lambda x: x.softmax(-1))
        yield "reduce", reduce
        yield "copy", unary(Tensor.clone)
        yield "rows", rows
        yield "gather", gather
