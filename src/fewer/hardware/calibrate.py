"""Measure a machine in less than a minute: what matrix products, attention and the rest really reach on it.

The result is a `Profile`, kept in the cache folder under what tells the machine from others (processor, torch, threads,
dtype). On one CPU thread seconds are that thread's own, so other work on the machine hardly disturbs them.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.folders import cache_folder

VERSION = 1
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048)
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
PAIRS = (16, 64, 256, 1024)
INNER = (64, 512)
# Kernels like multiples of 16 or 64, and what a reduction leaves is none: neither are these.
QUERIES, KEYS, HEADS = (1, 19, 75, 150, 300, 1100), (19, 75, 150, 300, 1100, 4300), (32, 64, 128)
NUMBERS = (1 << 6, 1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 21, 1 << 22)
SORTED = (16, 64, 256, 1024, 4096)
MOST = 1e9  # FLOPs of the largest product that is timed
ROW = 256  # numbers in a row of what is moved
RING = 3  # results that are alive at a time
LINES = 8  # heads or rows side by side where attention and sorting are timed
COLD = 256 << 20  # bytes of weights that are multiplied in turn: in a model, too, none is found in a cache


@dataclass
class Table:
    """A number at the points of a grid, interpolated in the logarithms of all axes; beyond its ends it stays level."""

    axes: list[list[float]]
    values: list[float]

    def __post_init__(self) -> None:
        shape = [len(axis) for axis in self.axes]
        if math.prod(shape) != len(self.values):
            raise ValueError(f"a table of {shape} points holds {len(self.values)} numbers")
        self._values = np.log(np.asarray(self.values, float)).reshape(shape)
        self._axes = [np.log(np.asarray(axis, float)) for axis in self.axes]

    def at(self, *point: float) -> float:
        """The value at a point inside or outside the grid."""
        values = self._values
        for axis, x in zip(self._axes, point, strict=True):
            x = min(max(math.log(max(x, 1e-30)), axis[0]), axis[-1])
            i = min(max(int(np.searchsorted(axis, x, side="right")) - 1, 0), len(axis) - 2)
            w = (x - axis[i]) / (axis[i + 1] - axis[i])
            values = (1 - w) * values[i] + w * values[i + 1]
        return math.exp(float(values))


@dataclass(frozen=True)
class Around:
    """Seconds spent around operations, in Python above all. call: a model's, for each operation; own: a session's, for
    each that it adds; block: a session's, for each block it takes part in."""

    call: float
    own: float
    block: float


@dataclass
class Profile:
    """What a machine reaches.

    gemm       FLOPs a second of a product with a weight, by m, n, k; pairs: of batched products
    attention  FLOPs a second of fused attention, by queries, keys, width of a head; causal, masked: factors on its
               time by queries
    kinds      seconds of each further kind of operation by bytes moved; sort: of a row of so many numbers
    view       seconds of an operation that moves nothing
    around     what is spent around operations in an "encoder", while a "prompt" is read, in a "step" of writing
    spread     relative half width between quartiles, by part: what the numbers above are uncertain by
    """

    machine: dict[str, str]
    gemm: Table
    pairs: Table
    attention: Table
    causal: Table
    masked: Table
    kinds: dict[str, Table]
    sort: Table
    view: float
    around: dict[str, Around] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = path.with_suffix(".part")
        held.write_text(json.dumps({"version": VERSION, **asdict(self)}) + "\n", encoding="utf-8")
        held.replace(path)  # whole or not at all

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Raises ValueError where the file is none of this version."""
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            if held.pop("version") != VERSION:
                raise ValueError("another version")
            tables = {k: Table(**held[k]) for k in ("gemm", "pairs", "attention", "causal", "masked", "sort")}
            around = {k: Around(**v) for k, v in held["around"].items()}
            kinds = {k: Table(**v) for k, v in held["kinds"].items()}
            return cls(**held | tables | {"kinds": kinds, "around": around})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no profile of this version ({error}); delete it to measure again") from error


def machine(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """What tells this machine, as it is used now, from others."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    threads = "" if device.startswith("cuda") else str(torch.get_num_threads())
    return {
        "device": device, "name": name, "threads": threads, "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }  # fmt: skip


def _processor() -> str:
    """The processor's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    told = " ".join(found[k] for k in ("model name", "cpu family", "model", "stepping") if k in found)
    return told or platform.processor() or platform.machine()


def profile(device: str = "cpu", dtype: torch.dtype = torch.float32, *, fresh: bool = False,
            log: Callable[[str], None] = lambda _: None) -> Profile:  # fmt: skip
    """This machine's profile: the one that was measured before, else measured now (less than a minute on one CPU
    thread). fresh: measure again. log: is told before that starts."""
    here = machine(device, dtype)
    key = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / "hardware" / f"{key}.json"
    if path.exists() and not fresh:
        try:
            return Profile.load(path)
        except ValueError as error:
            log(str(error))
    log(f"measuring {here['name']}, once: less than a minute")
    found = measure(device, dtype)
    found.save(path)
    return found


class Clock:
    """Times small things often enough. samples: how often; least: seconds a sample lasts at least."""

    def __init__(self, device: str, samples: int = 5, least: float = 4e-4) -> None:
        self.device, self.samples, self.least = device, samples, least
        own = device == "cpu" and torch.get_num_threads() == 1
        self.now = time.thread_time if own else time.perf_counter
        self.spreads: list[float] = []

    def __call__(self, run: Callable[[], Any]) -> float:
        """Median seconds of a run."""
        run()
        took, times = self._sample(run, 1), 1
        while took < self.least and times < 4096:
            times *= max(2, min(16, math.ceil(self.least / max(took, 1e-7))))
            took = self._sample(run, times)
        found = sorted([took / times, *(self._sample(run, times) / times for _ in range(self.samples - 1))])
        low, middle, high = statistics.quantiles(found, n=4)
        self.spreads.append((high - low) / 2 / middle)
        return found[len(found) // 2]

    def once(self, run: Callable[[], Any], between: Callable[[], Any]) -> float:
        """Median seconds of a run behind something else, which is not timed."""
        run()
        found = []
        for _ in range(self.samples):
            between()
            found.append(self._sample(run, 1))
        return statistics.median(found)

    def ratio(self, run: Callable[[], Any], against: Callable[[], Any], turns: int = 9) -> float:
        """Median over turns of the seconds of one over those of another."""
        times = max(1, math.ceil(self.least / max(self._sample(run, 1), 1e-7)))
        self._sample(against, 1)
        return statistics.median(self._sample(run, times) / self._sample(against, times) for _ in range(turns))

    def _sample(self, run: Callable[[], Any], times: int) -> float:
        self._wait()
        began = self.now()
        for _ in range(times):
            run()
        self._wait()
        return self.now() - began

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def spread(self) -> float:
        """Relative half width between quartiles, the median over what was timed since the last question."""
        found = statistics.median(self.spreads) if self.spreads else 0.0
        self.spreads = []
        return found


@torch.no_grad()
def measure(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Profile:
    """Time everything a profile holds."""
    began = time.perf_counter()
    clock, spread = Clock(device), {}
    made = _Maker(device, dtype)
    view = clock(lambda x=made(8, 8): x.view(64))
    clock.spread()
    gemm = _rates(clock, (TOKENS, WIDTHS, WIDTHS), lambda m, n, k: 2 * m * n * k, made.linear)
    spread["gemm"] = clock.spread()
    pairs = _rates(clock, (PAIRS, PAIRS, INNER), lambda m, n, k: 2 * LINES * m * n * k, made.pairs)
    spread["pairs"] = clock.spread()
    attention = _rates(clock, (QUERIES, KEYS, HEADS), lambda n, m, d: 4 * LINES * n * m * d, made.attention)
    spread["attention"] = clock.spread()
    causal, masked = (_factors(clock, made, *how) for how in ((True, False), (False, True)))
    kinds = {kind: _by_bytes(clock, run) for kind, run in made.kinds()}
    sort = Table([list(SORTED)], [clock(lambda x=made(LINES, n): x.sort(dim=-1, descending=True, stable=True)) / LINES for n in SORTED])
    spread["kinds"] = clock.spread()
    found = Profile(machine(device, dtype), gemm, pairs, attention, causal, masked, kinds, sort, view, spread=spread)
    from .around import around

    found.around = around(found, device, dtype)
    found.seconds = time.perf_counter() - began
    return found


def _rates(
    clock: Clock, axes: Sequence[Sequence[int]], flops: Callable[..., int], make: Callable[..., Callable[[], Any]]
) -> Table:
    """FLOPs a second over a grid; a point too large to be timed has the rate of the largest below it on the first axis."""
    first, *others = axes
    found: dict[tuple[int, ...], float] = {}
    for rest in product(*others):
        rate = 1.0
        for m in first:
            work = flops(m, *rest)
            if work <= MOST or m == first[0]:
                rate = work / clock(make(m, *rest))
            found[(m, *rest)] = rate
    return Table([list(a) for a in axes], [found[point] for point in product(*axes)])


def _factors(clock: Clock, made: _Maker, causal: bool, mask: bool) -> Table:
    """What a causal or a given mask does to the time of attention, by queries; both timed in turn."""
    sizes = QUERIES[2:]
    found = [clock.ratio(made.attention(n, n, 64, causal, mask), made.attention(n, n, 64)) for n in sizes]
    return Table([list(sizes)], found)


def _by_bytes(clock: Clock, run: Callable[[int], tuple[int, Callable[[], Any]]]) -> Table:
    """Seconds by bytes moved."""
    points = [run(n) for n in NUMBERS]
    return Table([[moved for moved, _ in points]], [clock(call) for _, call in points])


@dataclass
class _Maker:
    """Makes what is timed."""

    device: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.memory, self.read = self(COLD // torch.empty((), dtype=self.dtype).element_size()), 0

    def cold(self, n: int, k: int) -> Tensor:
        """(n, k) of memory that has not been read for a long time."""
        if self.read + n * k > len(self.memory):
            self.read = 0
        self.read += n * k
        return self.memory[self.read - n * k : self.read].view(n, k)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def linear(self, m: int, n: int, k: int) -> Callable[[], Any]:
        """A product with a weight that is read from memory."""
        x, bias = self(m, k), self(n)
        return lambda: F.linear(x, self.cold(n, k), bias)

    def pairs(self, m: int, n: int, k: int) -> Callable[[], Any]:
        a, b = self(LINES, m, k), self(LINES, n, k)
        return lambda: a @ b.transpose(1, 2)

    def attention(self, n: int, m: int, d: int, causal: bool = False, mask: bool = False) -> Callable[[], Any]:
        """Heads lie as projections leave them, side by side in a row."""
        q, k, v = (self(1, rows, LINES, d).transpose(1, 2) for rows in (n, m, m))
        bias = self(1, 1, 1, m) if mask else None
        return self.ringed(lambda _: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal), [q])

    def ringed(self, call: Callable[[Tensor], Any], inputs: Sequence[Tensor]) -> Callable[[], Any]:
        """A call whose inputs take turns and whose results live on for a while, as in a model: what is read was not
        written just before, and what is written is not where the last result was."""
        turn, held = cycle(inputs), deque[Any](maxlen=RING - 1)
        return lambda: held.append(call(next(turn)))

    def kinds(self) -> Iterator[tuple[str, Callable[[int], tuple[int, Callable[[], Any]]]]]:
        """Each kind of operation: of n numbers, what it moves and the call."""

        def ring(*shape: int) -> list[Tensor]:
            return [self(*shape) for _ in range(RING)]

        def shaped(n: int) -> tuple[int, int]:
            return max(1, n // ROW), min(n, ROW)

        def unary(call: Callable[[Tensor], Any], passes: int = 2) -> Callable[[int], tuple[int, Callable[[], Any]]]:
            def make(n: int) -> tuple[int, Callable[[], Any]]:
                inputs = ring(*shaped(n))
                return passes * inputs[0].nbytes, self.ringed(call, inputs)

            return make

        def light(n: int) -> tuple[int, Callable[[], Any]]:
            inputs = ring(*shaped(n))
            others = cycle(inputs[1:] + inputs[:1])
            return 3 * inputs[0].nbytes, self.ringed(lambda x: x + next(others), inputs)

        def reduce(n: int) -> tuple[int, Callable[[], Any]]:
            rows, width = shaped(n)
            inputs = [x.view(rows, 4, -1).transpose(0, 1) for x in ring(rows, width)]  # over heads, as keys lie
            return inputs[0].nbytes, self.ringed(lambda x: x.mean(0), inputs)

        def rows(n: int) -> tuple[int, Callable[[], Any]]:
            inputs = ring(*shaped(2 * n))
            index = torch.randperm(inputs[0].shape[0], device=self.device)[: max(1, inputs[0].shape[0] // 2)]
            return 2 * index.numel() * inputs[0].shape[1] * inputs[0].element_size(), self.ringed(
                lambda x: x.index_select(0, index), inputs
            )

        def gather(n: int) -> tuple[int, Callable[[], Any]]:
            inputs = ring(*shaped(n))
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
