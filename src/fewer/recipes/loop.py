"""The one training loop, on accelerate: schedules of transformers, clipping, early stopping, a state to go on from.

    rows = Loop(steps=400, warmup=0.1).run(module, [optimiser], batches, loss, state=out / "state")

A recipe brings data, a loss and settings. What a step draws comes from torch's global generator; the batches have a
stream of their own, so that a run which was killed goes on to the bit.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["At", "Diverged", "Loop", "finished", "hardware", "journal", "muon_and_adamw", "shuffled", "unfinished"]

Row = dict[str, float]
Parts = Mapping[str, Any] | Iterable[Mapping[str, Any]]
NOW = "now.json"


class Diverged(ValueError):
    """A loss or a gradient is not a finite number. The weights are those before the step that is named."""


@dataclass(frozen=True)
class At:
    """Where a run is, for its loss: the 0-based step of so many, and what to multiply in."""

    step: int
    steps: int
    device: str
    bfloat16: bool

    @property
    def progress(self) -> float:
        """Share of the run that lies behind, in [0, 1)."""
        return self.step / self.steps

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16)


@dataclass(frozen=True)
class Loop:
    """How a run goes.

    steps      updates.  every: steps that one row is the mean of
    schedule   of the rates, a name of `transformers.get_scheduler`; each group's `lr` is its peak
    warmup     share of the steps in which rates rise;  decay: in which they fall, for warmup_stable_decay
    clip       largest norm of the gradient of all parameters together; None = any
    bfloat16   multiply in bfloat16 where the loss asks (`at.autocast`)
    patience   checks without a lower held-out loss that end the run, with the best weights put back; 0 = no such end
    check      steps between checks.  save: steps between states
    """

    steps: int
    warmup: float = 0.1
    schedule: str = "cosine"
    decay: float | None = None
    clip: float | None = 1.0
    bfloat16: bool = False
    every: int = 25
    patience: int = 0
    check: int = 50
    save: int = 200

    def run(
        self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], batches: Iterable[Any],
        loss: Callable[[Any, At], Parts], *, progress: Callable[[Row], None] = lambda row: None,
        after: Callable[[At], None] | None = None, held: Callable[[], float] | None = None,
        state: Path | None = None, key: Any = None,
    ) -> list[Row]:  # fmt: skip
        """Train. Returns the rows: the means of everything the loss gives, `step` (from 1) and `seconds`.

        module     holds what learns, and is kept in the state
        batches    without end; drawn from torch's global generator, which for them is one of their own
        loss       of a batch: "loss", which is differentiated, and whatever else is worth a mean. Or several such, one
                   after the other, whose gradients add up: each takes the memory of one
        progress   receives each row.  after: called when a step is done
        held       the held-out loss, for `patience`
        state      folder to save in every `save` steps, and at the end; a run with the same `key` (anything JSON takes)
                   and steps goes on from what it finds there

        Raises   Diverged, at the first loss or gradient that is not finite, naming step and state.
        """
        run = _Run(self, module, optimizers, state, key)
        device = next(module.parameters()).device.type
        stream = _stream(batches, torch.initial_seed())
        for _ in range(run.step):
            next(stream)
        while run.step < self.steps and not run.ended:
            at = At(run.step, self.steps, device, self.bfloat16)
            given = loss(next(stream), at)
            seen: dict[str, list[float]] = defaultdict(list)
            for part in (given,) if isinstance(given, Mapping) else given:
                for name, value in part.items():
                    seen[name].append(float(value.detach() if isinstance(value, Tensor) else value))
                if not math.isfinite(seen["loss"][-1]):
                    run.stop("loss", seen)
                run.accelerator.backward(part["loss"])
            run.update(seen)
            if after is not None:
                after(at)
            if run.step % self.every == 0 or run.step == self.steps:
                progress(run.row())
            if self.patience and held is not None and run.step % self.check == 0:
                run.judge(held())
            if run.step % self.save == 0 or run.step == self.steps or run.ended:
                run.save()
        run.leave()
        return run.rows


class _Run:
    """A run under way: what accelerate holds for it, and what has to survive a kill besides."""

    def __init__(
        self, loop: Loop, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: Path | None, key: Any
    ) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ImportError("training needs accelerate: pip install 'fewer[assets]'") from error
        from transformers import get_scheduler

        self.loop, self.module, self.state = loop, module, state
        self.key = key
        self.step, self.rows, self.ended = 0, list[Row](), False
        self.sums, self.since, self.spent = defaultdict[str, float](float), 0, 0.0
        self.best: tuple[float, dict[str, Tensor]] | None = None
        self.waited, self.began = 0, time.perf_counter()
        self.accelerator = Accelerator(device_placement=False)
        if self.accelerator.num_processes > 1:
            raise RuntimeError(f"{self.accelerator.num_processes} processes: a recipe runs in one; start it by itself")
        more = {"num_decay_steps": round(loop.decay * loop.steps), "decay_type": "linear"} if loop.decay else None
        rates = [get_scheduler(loop.schedule, o, round(loop.warmup * loop.steps), loop.steps, more) for o in optimizers]
        self.learned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        self.accelerator.prepare(nn.ModuleList([module]))  # a list of its own, for accelerate leaves a mark
        self.optimizers = [self.accelerator.prepare(each) for each in optimizers]
        self.rates = [self.accelerator.prepare(each) for each in rates]
        self.accelerator.register_for_checkpointing(self)
        if state is not None and (folder := unfinished(state, key, loop.steps)):
            self.accelerator.load_state(str(folder))

    def update(self, seen: Mapping[str, Sequence[float]]) -> None:
        """One step of the optimizers."""
        if self.loop.clip is not None:
            norm = self.accelerator.clip_grad_norm_(self.learned, self.loop.clip)
            if not math.isfinite(float(norm)):
                self.stop("gradient", seen)
        for each in (*self.optimizers, *self.rates):
            each.step()
        for each in self.optimizers:
            each.zero_grad()
        for name, values in seen.items():
            self.sums[name] += sum(values) if name == "loss" else sum(values) / len(values)
        self.step, self.since = self.step + 1, self.since + 1

    def row(self) -> Row:
        means = {name: float(f"{total / self.since:.7g}") for name, total in self.sums.items()}
        self.sums.clear()
        self.since = 0
        self.rows.append({"step": self.step, "seconds": round(self.seconds, 1), **means})
        return self.rows[-1]

    @property
    def seconds(self) -> float:
        return self.spent + time.perf_counter() - self.began

    def judge(self, loss: float) -> None:
        """Whether the held-out loss still falls."""
        if self.best is None or loss < self.best[0]:
            self.best = loss, {k: v.detach().cpu().clone() for k, v in self.module.state_dict().items()}
            self.waited = 0
        else:
            self.waited += 1
        self.ended = self.waited >= self.loop.patience

    def leave(self) -> None:
        """The best weights, where somebody judged."""
        if self.best is not None:
            self.module.load_state_dict(self.best[1])

    def stop(self, what: str, seen: Mapping[str, Sequence[float]]) -> None:
        for each in self.optimizers:
            each.zero_grad()
        self.save()
        parts = ", ".join(f"{name} {values[-1]:.4g}" for name, values in seen.items())
        kept = "" if self.state is None else f", kept in {self.state}"
        raise Diverged(
            f"step {self.step + 1} of {self.loop.steps}: the {what} is not finite ({parts}). The weights are those of "
            f"step {self.step}{kept}; take a lower rate, a longer warm-up or float32"
        )

    # -- the state -----------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        names = ("step", "rows", "ended", "since", "best", "waited")
        return {name: getattr(self, name) for name in names} | {"sums": dict(self.sums), "spent": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"sums": defaultdict(float, state["sums"])})

    def save(self) -> None:
        """The new state is whole before it counts, and the one before goes after that."""
        if self.state is None:
            return
        folder = self.state / f"step-{self.step}"
        if unfinished(self.state, self.key, self.loop.steps) == folder:
            return
        self.accelerator.save_state(str(folder))
        now = {"folder": folder.name, "key": self.key, "steps": self.loop.steps}
        (self.state / "next.json").write_text(json.dumps(now))
        os.replace(self.state / "next.json", self.state / NOW)
        for old in self.state.glob("step-*"):
            if old != folder:
                shutil.rmtree(old)


def unfinished(state: Path, key: Any, steps: int) -> Path | None:
    """Where the state lies that a run with this key and so many steps goes on from; None if it begins anew."""
    if not (state / NOW).is_file():
        return None
    now = json.loads((state / NOW).read_text())
    return state / now["folder"] if [now["key"], now["steps"]] == json.loads(json.dumps([key, steps])) else None


def _stream(batches: Iterable[Any], seed: int) -> Iterator[Any]:
    """The batches, drawn from a generator of their own wherever they ask torch's global one."""
    own, iterator = torch.Generator().manual_seed(seed).get_state(), None
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(own)
            iterator = iter(batches) if iterator is None else iterator
            try:
                given = next(iterator)
            except StopIteration:
                raise ValueError("the batches came to an end before the run did: let them begin again") from None
            own = torch.get_rng_state()
        yield given


# -- what recipes share -----------------------------------------------------------------------------------------------
def shuffled(n: int, size: int) -> Iterator[Tensor]:
    """Index batches without end: a new order each time the set is used up, its incomplete tail left out; sets smaller
    than a batch come whole."""
    while True:
        yield from torch.randperm(n)[: max(n - n % size, min(n, size))].split(size)


def muon_and_adamw(
    matrices: Iterable[Any], rest: Iterable[Any], lr: float, lr_rest: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW without decay for the rest. Parameters, or groups of them."""
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return [
        torch.optim.Muon(matrices, **options),
        torch.optim.AdamW(rest, lr=lr_rest, weight_decay=0.0, fused=True),
    ]


def journal(out: Path, log: Callable[[str], None], every: int = 1) -> Callable[[Row], None]:
    """What writes rows into out/log.jsonl, and each `every`-th as a line. A run that goes on adds to the file."""
    file = out / "log.jsonl"
    if not (out / "state").exists():
        file.unlink(missing_ok=True)
    rows = 0

    def progress(row: Row) -> None:
        nonlocal rows
        with file.open("a") as journal:
            journal.write(json.dumps(row) + "\n")
        if rows % every == 0:
            log("  ".join(f"{name} {value:.6g}" for name, value in row.items()))
        rows += 1

    return progress


def finished(out: Path, recipe: Any, report: Any, name: str = "report") -> None:
    """Write the report as JSON, and forget the states: nothing is left to go on with."""
    (out / f"{name}.json").write_text(json.dumps({"recipe": recipe, "report": report}, indent=1) + "\n")
    shutil.rmtree(out / "state", ignore_errors=True)


def hardware(device: torch.device) -> str:
    """Its name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()}-core {platform.machine()} CPU"
