"""Machines by name: what a pass costs on each, block by block."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from . import heatvit, primate
from .calibrate import Profile, profile
from .ops import Op, Work
from .roofline import estimate
from .spatten import SpAtten, quickselect
from .systolic import Array, Dataflow

MEASURED, SIMULATED = "measured constants", "simulated: a closed form, held against no device"


@dataclass(frozen=True)
class Price:
    """What a pass costs. total, layers (by block, -1 for what is outside them) in `unit`."""

    total: float
    layers: dict[int, float]
    unit: str


class Machine(Protocol):
    """name, title: as it is written, and in words. basis: where its numbers come from. counts: what is counted."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...

    basis: str
    counts: str

    def price(self, work: Work, plain: Work | None = None) -> Price:
        """Of a pass; plain: the same without a method, where there is one."""
        ...


def _summed(work: Work, cost: Callable[[Op], float], unit: str) -> Price:
    layers: dict[int, float] = defaultdict(float)
    for op in work.ops:
        layers[op.layer] += cost(op)
    return Price(sum(layers.values()), dict(layers), unit)


@dataclass
class Processor:
    """This machine, as its profile has it."""

    profile: Profile
    name: str = "cpu"
    title: str = field(init=False)
    basis: str = MEASURED
    counts: str = "everything a pass does, the method's own work included"

    def __post_init__(self) -> None:
        here = self.profile.machine
        threads = f", {here['threads']} thread(s)" if here["threads"] else ""
        self.title = f"{here['name']}{threads}, {here['dtype']}"

    def price(self, work: Work, plain: Work | None = None) -> Price:
        found = estimate(self.profile, work, plain)
        return Price(found.seconds, found.layers, "seconds")


@dataclass
class Systolic:
    """A systolic array that does one matrix product behind the other."""

    array: Array
    basis: str = SIMULATED
    counts: str = "compute cycles of matrix products; no stalls of memory, nothing between the products"

    @property
    def name(self) -> str:
        return f"systolic:{self.array.rows}x{self.array.columns}:{self.array.dataflow}"

    @property
    def title(self) -> str:
        return f"systolic array of {self.array.rows} x {self.array.columns}, SCALE-Sim's closed form"

    def price(self, work: Work, plain: Work | None = None) -> Price:
        return _summed(work, self._cycles, "cycles")

    def _cycles(self, op: Op) -> float:
        if op.kind == "gemm":
            batch, m, n, k = op.shape
            return max(batch, 1) * self.array.cycles(m, n, k)
        if op.kind == "attention":
            heads, n, m, d = op.shape[:4]
            return heads * (self.array.cycles(n, m, d) + self.array.cycles(n, d, m))
        return 0


@dataclass
class Attention:
    """SpAtten: attention alone."""

    engine: SpAtten = field(default_factory=SpAtten)
    name: str = "spatten"
    title: str = "SpAtten, the authors' behavioural model"
    basis: str = SIMULATED
    counts: str = (
        "cycles of attention alone, one sample, its parts one behind the other; ranking where tokens have gone"
    )

    def price(self, work: Work, plain: Work | None = None) -> Price:
        calls = [op for op in work.ops if op.kind == "attention"]
        if not calls:
            raise ValueError("no attention is computed in this model, and SpAtten computes nothing else; take another")
        layers: dict[int, float] = defaultdict(float)
        for i, op in enumerate(calls):
            heads, n, m, d = op.shape[:4]
            layers[op.layer] += self.engine.layer(n, m, heads, d).total
            if i + 1 < len(calls) and calls[i + 1].shape[2] < m:
                layers[op.layer] += quickselect(m, calls[i + 1].shape[2], 2 * self.engine.parallel)[0]
        return Price(sum(layers.values()), dict(layers), "cycles")


@dataclass
class Engine:
    """HeatViT's matrix engine: all linear layers, a method's own included, and attention head by head."""

    engine: heatvit.Engine = field(default_factory=heatvit.Engine)
    name: str = "heatvit"
    title: str = "tiled matrix engine of an FPGA, as HeatViT's"
    basis: str = SIMULATED
    counts: str = "cycles of matrix products, selectors included"

    def price(self, work: Work, plain: Work | None = None) -> Price:
        return _summed(work, self._cycles, "cycles")

    def _cycles(self, op: Op) -> float:
        if op.kind == "gemm":
            batch, m, n, k = op.shape
            return self.engine.matrix(m, k, n) if batch < 2 else self.engine.per_head(m, k, n, batch)
        if op.kind == "attention":
            heads, n, m, d = op.shape[:4]
            return self.engine.per_head(n, d, m, heads) + self.engine.per_head(n, m, d, heads)
        return 0


@dataclass
class Banks:
    """PRIMATE: layers over the banks of a memory; what counts is how often an input can enter."""

    banks: int = 512
    basis: str = SIMULATED
    counts: str = "cycles between two inputs of the pipeline, those of its slowest block"

    @property
    def name(self) -> str:
        return f"primate:{self.banks}"

    @property
    def title(self) -> str:
        return f"{self.banks} banks that compute, after PRIMATE's abstract"

    def price(self, work: Work, plain: Work | None = None) -> Price:
        tokens = [max(1, round(attention)) for attention, _ in work.tokens]
        widths = [op.shape[3] for op in work.ops if op.kind == "gemm" and op.layer >= 0 and op.shape[0] == 0]
        if not tokens or not widths:
            raise ValueError("this model has no blocks with matrices and counted tokens, as a pipeline of banks needs")
        found = primate.assign(tokens, min(widths), self.banks)
        return Price(found.interval, dict(enumerate(map(float, found.cycles))), "cycles")


NAMED = "cpu, cuda, spatten, heatvit, systolic:128x128 (:os, :ws or :is behind it), primate:512"


def machine(form: str, dtype: str = "float32", *, fresh: bool = False, log: Callable[[str], None] = print) -> Machine:
    """A machine by name. cpu and cuda are this one, measured once (`calibrate.profile`).

    Raises   ValueError for a name nobody has, or sizes that cannot be.
    """
    import torch

    name, _, rest = form.partition(":")
    if name in ("cpu", "cuda") and not (name == "cpu" and rest):
        if name == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "hardware cuda: torch finds no GPU here, and what was never measured is not foretold; take cpu"
            )
        return Processor(profile(form, getattr(torch, dtype), fresh=fresh, log=log), form)
    if name == "spatten" and not rest:
        return Attention()
    if name == "heatvit" and not rest:
        return Engine()
    if name == "systolic" and (size := re.fullmatch(r"(\d+)x(\d+)(?::(\w+))?", rest or "128x128")):
        flow: Dataflow = size[3] or "os"  # type: ignore[assignment]
        return Systolic(Array(int(size[1]), int(size[2]), flow))
    if name == "primate" and (not rest or rest.isdecimal()):
        return Banks(int(rest or 512))
    raise ValueError(f"no hardware {form!r}; there are {NAMED}")


def steps_of(machine: Machine, tokens: Sequence[float]) -> str:
    """What tiles make of these tokens, in a sentence; "" where the machine has none."""
    if not isinstance(machine, Systolic) or machine.array.dataflow != "os":
        return ""
    rows = machine.array.rows
    left = sorted({round(n) for n in tokens}, reverse=True)
    edges = sorted({-(-n // rows) * rows for n in left})
    same = ", ".join(map(str, edges))
    return f"tokens are computed {rows} at a time: in linear layers the counts here cost what {same} do"
