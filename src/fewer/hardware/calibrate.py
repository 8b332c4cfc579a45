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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import torch

from fewer.folders import cache_folder

from .ops import KINDS
from .points import LINES, PRODUCTS, SORTED, SQUARE, Maker, Point, flops
from .timing import Clock, spread

VERSION = 1
SWEEPS = 3, 2  # over all operations, before and behind whole models


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


@torch.no_grad()
def measure(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Profile:
    """Time everything a profile holds."""
    from .around import fitted, timings

    began = time.perf_counter()
    clock, runs = Clock(device), Maker(device, dtype).runs()
    samples: dict[Point, list[float]] = {}
    clock.sweep(runs, samples, SWEEPS[0])
    models = timings(clock, device, dtype)
    clock.sweep(runs, samples, SWEEPS[1])
    found = _profile(machine(device, dtype), samples)
    found.around = fitted(found, models)
    found.seconds = time.perf_counter() - began
    return found


def _profile(here: dict[str, str], samples: dict[Point, list[float]]) -> Profile:
    """What samples of all operations come to."""
    took = {point: statistics.median(found) for point, found in samples.items()}
    rates = {kind: _rates(kind, took) for kind in PRODUCTS}
    square = {n: took["square", (n,)] for n in SQUARE}
    causal, masked = (
        Table([list(SQUARE)], [took[how, (n,)] / square[n] for n in SQUARE]) for how in ("causal", "masked")
    )
    by_bytes: dict[str, dict[int, float]] = {}
    for (kind, size), seconds in took.items():
        if kind in ("light", *KINDS) and kind != "sort":
            by_bytes.setdefault(kind, {})[size[0]] = seconds
    kinds = {kind: Table([list(found)], list(found.values())) for kind, found in by_bytes.items()}
    sort = Table([list(SORTED)], [took["sort", (n,)] / LINES for n in SORTED])
    parts: dict[str, list[float]] = {}
    for (kind, _), found in samples.items():
        parts.setdefault(kind if kind in PRODUCTS else "kinds", []).append(spread(found))
    spreads = {part: statistics.median(widths) for part, widths in parts.items()}
    return Profile(
        here, rates["gemm"], rates["pairs"], rates["attention"], causal, masked, kinds, sort, took["view", ()],
        spread=spreads,
    )  # fmt: skip


def _rates(kind: str, took: dict[Point, float]) -> Table:
    """FLOPs a second; where a point is too large to be timed, that of the largest below it on the first axis."""
    first, *others = PRODUCTS[kind]
    found: dict[tuple[int, ...], float] = {}
    for rest in product(*others):
        rate = 1.0
        for m in first:
            if (kind, (m, *rest)) in took:
                rate = flops(kind, (m, *rest)) / took[kind, (m, *rest)]
            found[(m, *rest)] = rate
    return Table([list(axis) for axis in PRODUCTS[kind]], [found[point] for point in product(*PRODUCTS[kind])])
