"""The one training loop, on accelerate: schedules of transformers, clipping, early stopping, a state to go on from.

    folder = Folder(out, recipe, log)
    rows = Loop(steps=400, warmup=0.1).run(module, [optimiser], batches, loss, folder)
    folder.finish(report)

A recipe brings data, a loss and settings. What a step draws comes from torch's global generator; the batches have a
stream of their own, so that a run which was killed goes on to the bit.

Under `accelerate launch` with several processes each takes its part of every batch, and gradients are averaged: where
the loss is a mean over a batch, that is the run of one process. The first process alone writes to the folder.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["At", "Diverged", "Folder", "Loop", "buckets", "decayed", "hardware", "muon_and_adamw", "shuffled"]

Row = dict[str, float]
Parts = Mapping[str, Any] | Iterable[Mapping[str, Any]]
NOW = "now"  # a file with the name of the state that counts


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
    clip       largest norm of the gradient of all parameters together, inf = any
    bfloat16   multiply in bfloat16 where the loss asks (`at.autocast`)
    patience   checks without a lower held-out loss that end the run, with the best weights put back; 0 = no such end
    check      steps between checks.  save: steps between states
    """

    steps: int
    warmup: float = 0.1
    schedule: str = "cosine"
    decay: float | None = None
    clip: float = 1.0
    bfloat16: bool = False
    every: int = 25
    patience: int = 0
    check: int = 50
    save: int = 200

    def run(
        self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], batches: Iterable[Any],
        loss: Callable[[Any, At], Parts], folder: Folder | None = None, *,
        progress: Callable[[Row], None] = lambda row: None, after: Callable[[At], None] = lambda at: None,
        held: Callable[[], float] | None = None,
    ) -> list[Row]:  # fmt: skip
        """Train. Returns the rows: the means of everything the loss gives, `step` (from 1) and `seconds`.

        module     holds what learns, and is kept in the state
        batches    without end; drawn from torch's global generator, which for them is one of their own
        loss       of a batch: "loss", which is differentiated, and whatever else is worth a mean. Or several such, one
                   after the other, whose gradients add up: each takes the memory of one
        folder     keeps rows, and a state every `save` steps and at the end, from which the run goes on
        progress   receives each row.  after: called when a step is done.  held: the held-out loss, for `patience`

        Raises   Diverged, at the first loss or gradient that is not finite, naming step and state.
        """
        run = _Run(self, module, optimizers, folder)
        device = next(module.parameters()).device.type
        stream = _stream(batches, torch.initial_seed())
        for _ in range(run.step):
            next(stream)
        while run.step < self.steps and not run.ended:
            at = At(run.step, self.steps, device, self.bfloat16)
            given = loss(run.part_of(next(stream)), at)
            seen: dict[str, list[float]] = defaultdict(list)
            for part in (given,) if isinstance(given, Mapping) else given:
                for name, value in part.items():
                    seen[name].append(float(value.detach() if isinstance(value, Tensor) else value))
                if not math.isfinite(seen["loss"][-1]):
                    run.stop("loss", seen)
                run.accelerator.backward(part["loss"])
            run.update(seen)
            after(at)
            if run.step % self.every == 0 or run.step == self.steps:
                row = run.row()
                progress(row)
                if folder is not None:
                    folder.add(row)
            if self.patience and held is not None and run.step % self.check == 0:
                run.judge(held())
            if run.step % self.save == 0 or run.step == self.steps or run.ended:
                run.save()
        if run.best is not None:
            module.load_state_dict(run.best[1])
        return run.rows


class _Run:
    """A run under way: what accelerate holds for it, and what has to survive a kill besides."""

    def __init__(
        self, loop: Loop, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], folder: Folder | None
    ) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ImportError("training needs accelerate: pip install 'fewer[assets]'") from error
        from transformers import get_scheduler

        self.loop, self.module, self.state = loop, module, None if folder is None else folder.phase()
        self.step, self.rows, self.ended = 0, list[Row](), False
        self.recent = defaultdict[str, list[float]](list)
        self.best: tuple[float, dict[str, Tensor]] | None = None
        self.waited, self.began = 0, time.perf_counter()
        many = _processes()  # before accelerate looks for itself: it takes processes on CPUs for one
        self.accelerator = Accelerator(
            device_placement=False, cpu=many is not None and many.device.type == "cpu",
            step_scheduler_with_optimizer=False,  # or schedules run as many times faster as there are processes
        )  # fmt: skip
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        more = {"num_decay_steps": round(loop.decay * loop.steps), "decay_type": "linear"} if loop.decay else None
        rates = [get_scheduler(loop.schedule, o, round(loop.warmup * loop.steps), loop.steps, more) for o in optimizers]
        self.learned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        if many is not None and self.learned[0].device.type != many.device.type:
            raise RuntimeError(
                f"what learns is on {self.learned[0].device}, and {many.num_processes} processes exchange gradients on "
                f"{many.device}: move the model there, or hide it (CUDA_VISIBLE_DEVICES=)"
            )
        # In a list, for accelerate leaves a mark on it; as if it were not trained, or many processes wrap it.
        self.accelerator.prepare_model(nn.ModuleList([module]), evaluation_mode=True)
        self.optimizers = [self.accelerator.prepare(each) for each in optimizers]
        self.rates = [self.accelerator.prepare(each) for each in rates]
        self.accelerator.register_for_checkpointing(self)
        if self.state is not None and (now := self.state / NOW).is_file():
            self.accelerator.load_state(str(self.state / now.read_text()))

    def part_of(self, batch: Any) -> Any:
        """What of a batch is this process's: of tensors and lists every so many-th item. All of it, where there is one
        process. Raises ValueError for a batch that cannot be parted evenly."""
        if self.processes == 1:
            return batch
        if isinstance(batch, Mapping):
            return {name: self.part_of(value) for name, value in batch.items()}
        if isinstance(batch, tuple):
            return tuple(self.part_of(value) for value in batch)
        if not isinstance(batch, list | Tensor) or len(batch) % self.processes:
            held = f"{len(batch)} items" if isinstance(batch, list | Tensor) else f"a {type(batch).__name__}"
            raise ValueError(
                f"a batch of {held} cannot be parted among {self.processes} processes: give a batch size that they "
                "divide, or start the recipe by itself"
            )
        return batch[self.rank :: self.processes]

    def _averaged(self) -> None:
        """The gradients, and so the step, of all processes together."""
        there = torch.tensor([float(p.grad is not None) for p in self.learned], device=self.learned[0].device)
        for p, known in zip(self.learned, self.accelerator.reduce(there, "sum").tolist(), strict=True):
            if known:  # somewhere, and so everywhere
                p.grad = self.accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")

    def _mean(self, value: float) -> float:
        mine = torch.tensor(value, dtype=torch.float64, device=self.learned[0].device)
        return float(self.accelerator.reduce(mine, "mean"))

    def update(self, seen: Mapping[str, Sequence[float]]) -> None:
        """One step of the optimizers."""
        if self.processes > 1:
            self._averaged()
            seen = {name: [self._mean(value) for value in values] for name, values in seen.items()}
        if not math.isfinite(float(self.accelerator.clip_grad_norm_(self.learned, self.loop.clip))):
            self.stop("gradient", seen)
        for each in (*self.optimizers, *self.rates):
            each.step()
        for each in self.optimizers:
            each.zero_grad()
        for name, values in seen.items():
            self.recent[name].append(sum(values) if name == "loss" else sum(values) / len(values))
        self.step += 1

    def row(self) -> Row:
        means = {name: float(f"{sum(values) / len(values):.7g}") for name, values in self.recent.items()}
        self.recent.clear()
        self.rows.append({"step": self.step, "seconds": round(time.perf_counter() - self.began, 1), **means})
        return self.rows[-1]

    def judge(self, loss: float) -> None:
        """Whether the held-out loss still falls."""
        self.waited += 1
        if self.best is None or loss < self.best[0]:
            self.best = loss, {k: v.detach().cpu().clone() for k, v in self.module.state_dict().items()}
            self.waited = 0
        self.ended = self.waited >= self.loop.patience

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
        names = ("step", "rows", "ended", "recent", "best", "waited")
        return {name: getattr(self, name) for name in names} | {"spent": time.perf_counter() - self.began}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.began -= state.pop("spent")
        vars(self).update(state)

    def save(self) -> None:
        """The new state is whole before it counts, and the one before goes after that."""
        if self.state is None:
            return
        folder = self.state / f"step-{self.step}"
        if (now := self.state / NOW).is_file() and now.read_text() == folder.name:
            return
        self.accelerator.save_state(str(folder))  # of all processes: each has draws of its own
        self.accelerator.wait_for_everyone()
        if self.rank:
            return
        (self.state / "next").write_text(folder.name)
        os.replace(self.state / "next", now)
        for old in self.state.glob("step-*"):
            if old != folder:
                shutil.rmtree(old)


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
class Folder:
    """Where a recipe's run leaves rows (log.jsonl), states and its report. Making one begins the run, with the recipe's
    seed and threads; anew, unless one of an equal recipe was killed here. log: receives every `every`-th row.

    out, path    where the run is, and where this process writes: of several, the first one writes to `out`
    """

    def __init__(self, out: str | Path, recipe: Any, log: Callable[[str], None], *, every: int = 1) -> None:
        self.out = self.path = Path(out)
        self.log, self.every = log, every
        self.recipe = asdict(recipe)
        self.phases = self.rows = 0
        self._states, said = self.out / "state", json.dumps(self.recipe)
        kept = self._states / "recipe.json"
        self.goes_on = kept.is_file() and kept.read_text() == said
        _together()  # all have looked
        if _rank() == 0:
            if not self.goes_on:
                shutil.rmtree(self._states, ignore_errors=True)
                (self.out / "log.jsonl").unlink(missing_ok=True)
            self._states.mkdir(parents=True, exist_ok=True)
            kept.write_text(said)
        else:  # what other processes write is the same, and is thrown away
            self._aside = tempfile.TemporaryDirectory(prefix="fewer-")
            self.path, self.log = Path(self._aside.name), lambda line: None
        _together()
        if getattr(recipe, "threads", None):
            torch.set_num_threads(recipe.threads)
        torch.manual_seed(recipe.seed)

    def phase(self) -> Path:
        """Where the next loop keeps its states."""
        self.phases += 1
        return self._states / str(self.phases)

    def add(self, row: Row) -> None:
        with (self.path / "log.jsonl").open("a") as journal:
            journal.write(json.dumps(row) + "\n")
        if self.rows % self.every == 0:
            self.log("  ".join(f"{name} {value:.6g}" for name, value in row.items()))
        self.rows += 1

    def finish(self, report: Any, name: str = "report", **more: Any) -> None:
        """Write the report, a dataclass, as JSON, and forget the states: nothing is left to go on with."""
        written = {"recipe": self.recipe, "report": asdict(report) | more}
        (self.path / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n")
        _together()
        if _rank() == 0:
            shutil.rmtree(self._states)


def _processes() -> Any:
    """What accelerate knows of the processes of this run, None where there is one: it need not be installed then."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def _rank() -> int:
    """This process's number, 0 where it is alone."""
    state = _processes()
    return 0 if state is None else state.process_index


def _together() -> None:
    """All processes get here before one goes on."""
    state = _processes()
    if state is not None:
        state.wait_for_everyone()


def shuffled(n: int, size: int) -> Iterator[Tensor]:
    """Index batches without end: a new order each time the set is used up, its incomplete tail left out; sets smaller
    than a batch come whole."""
    while True:
        yield from torch.randperm(n)[: max(n - n % size, min(n, size))].split(size)


def buckets(lengths: Sequence[int], size: int, near: int) -> Iterator[list[int]]:
    """The indices of texts once, in batches of about equal lengths, in a random order: they are sorted by length among
    so many batches, so that they stay random and padding short."""
    order, near = torch.randperm(len(lengths)).tolist(), near * size
    runs = [sorted(order[i : i + near], key=lambda j: lengths[j]) for i in range(0, len(order), near)]
    groups = [run[i : i + size] for run in runs for i in range(0, len(run), size)]
    for k in torch.randperm(len(groups)).tolist():
        yield groups[k]


def decayed(parameters: Iterable[Tensor], weight_decay: float, **more: Any) -> list[dict[str, Any]]:
    """Groups for an optimiser: matrices decay; vectors and single numbers (biases, thresholds) do not."""
    every = list(parameters)
    halves = ([p for p in every if p.dim() > 1], weight_decay), ([p for p in every if p.dim() <= 1], 0.0)
    return [{"params": half, "weight_decay": decay} | more for half, decay in halves if half]


def muon_and_adamw(
    recipe: Any, blocks: Iterable[nn.Module], parts: Iterable[tuple[float, Iterable[Tensor]]]
) -> list[torch.optim.Optimizer]:
    """Muon (`recipe.lr`, `weight_decay`) for the matrices inside blocks, AdamW (`lr_rest`) without decay for the rest.

    parts: parameters, and the share of both rates that is theirs.
    """
    matrices = {id(m.weight) for block in blocks for m in block.modules() if isinstance(m, nn.Linear)}
    muon, rest = list[dict[str, Any]](), list[dict[str, Any]]()
    for share, parameters in parts:
        inside = {p: id(p) in matrices for p in parameters}
        muon.append({"params": [p for p, yes in inside.items() if yes], "lr": share * recipe.lr})
        rest.append({"params": [p for p, yes in inside.items() if not yes], "lr": share * recipe.lr_rest})
    return [
        torch.optim.Muon(muon, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.lr_rest, weight_decay=0.0, fused=True),
    ]


def hardware(device: torch.device) -> str:
    """Its name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()}-core {platform.machine()} CPU"
