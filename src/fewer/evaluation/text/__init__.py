"""What a reader still knows of a text that was shortened: `fewer bench --suite text`.

    table = run({**OPTIONS, "limit": 300, "tasks": ("documents",)}, Path("runs/text"), print)

A real language model reads the text, whole or shortened, and says how likely answers are. What a cell came to is kept
in `text.jsonl` of the folder, and not measured again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewer.evaluation.stats import Interval, clustered
from fewer.evaluation.suites import Table
from fewer.models.zoo import load_model

from .reader import Reader
from .shorten import HEAD, WAYS, WHOLE, WITHOUT, Shortener, way
from .tasks import TASKS, Item

__all__ = ["OPTIONS", "Cell", "compared", "measure", "run"]

OPTIONS: Mapping[str, Any] = {
    "model": "qwen2.5-coder-0.5b", "methods": (), "tasks": (), "limit": 40, "seed": 0, "threads": 1, "dtype": "bfloat16"
}  # fmt: skip
RATES = (0.5, 0.3)
FILE = "text.jsonl"


@dataclass(frozen=True)
class Cell:
    """One way on one task at one rate.

    rate     share of the text's tokens that was asked for; 1 = whole, 0 = none. kept: share that was left, mean
    item     per probe, the number of the text it is about. hits: per probe, whether the right answer was the likeliest.
    nats     per probe, -log p of the right answer per token
    seconds  of shortening and of reading, wall clock
    """

    task: str
    way: str
    rate: float
    kept: float
    item: tuple[int, ...]
    hits: tuple[int, ...]
    nats: tuple[float, ...]
    shortening: float
    reading: float

    @property
    def choice(self) -> bool:
        """Whether there was an answer to choose."""
        return self.task != "summary"


def run(options: Mapping[str, Any], out: Path, log: Callable[[str], None] = print) -> Table:
    """Measure and compare. Raises ValueError for a task or way there is not, naming those there are."""
    return table(measure(options, out, log), options)


def measure(
    options: Mapping[str, Any], out: Path, log: Callable[[str], None] = print, *, rates: Sequence[float] = RATES
) -> list[Cell]:
    """All cells, those that the folder has already among them."""
    tasks = _typed(options["tasks"]) or [*TASKS]
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"no task {task!r} in the suite text: choose {', '.join(TASKS)}")
    ways = _typed(options["methods"]) or [*WAYS]
    for name in ways:
        way(name)  # refuses what it does not know before a model is loaded
    if options["limit"] < 2:
        raise ValueError(f"limit={options['limit']}: ask 2 questions of a task, or more")
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    file = _File(out, options)
    dtype = getattr(torch, options["dtype"])
    model, tokenizer = load_model(options["model"], dtype=dtype)
    reader, shortener = Reader(model, tokenizer), Shortener(tokenizer, dtype)
    for task in tasks:
        items: list[Item] = []
        plan = [(WHOLE, 1.0), (WITHOUT, 0.0), *((name, rate) for name in ways for rate in rates)]
        for name, rate in plan:
            if (task, name, rate) in file.cells:
                continue
            items = items or TASKS[task](options["limit"], options["seed"], reader)
            cell = _cell(task, items, name, rate, reader, shortener)
            file.add(cell)
            score = f"{np.mean(cell.hits):.3f} right, " if cell.choice else ""
            log(
                f"{task}, {name} at {rate:g}: {score}{np.mean(cell.nats):.3f} nats, {len(cell.nats)} questions, "
                f"{cell.shortening + cell.reading:.0f} s"
            )
    wanted = {(task, name, rate) for task in tasks for name in (*ways, WHOLE, WITHOUT) for rate in (*rates, 1.0, 0.0)}
    return [cell for key, cell in file.cells.items() if key in wanted]


def _cell(task: str, items: Sequence[Item], name: str, rate: float, reader: Reader, shortener: Shortener) -> Cell:
    kept, number, hits, nats = [], [], [], []
    spent = {"shortening": 0.0, "reading": 0.0}
    for i, item in enumerate(items):
        start = time.perf_counter()
        if name in (WHOLE, WITHOUT):
            texts = [item.whole if name == WHOLE else ""]
        else:
            texts = shortener.texts(item, way(name), rate)
        middle = time.perf_counter()
        shared = len(texts) == 1
        for text, probes in zip(texts, [item.probes] if shared else [(p,) for p in item.probes], strict=True):
            for said in reader.judge(HEAD + text, probes):
                number.append(i)
                hits.append(int(said.right))
                nats.append(round(said.nats, 4))
                kept.append(reader.count(text) / reader.count(item.whole))
        spent["shortening"] += middle - start
        spent["reading"] += time.perf_counter() - middle
    return Cell(
        task, name, rate, round(float(np.mean(kept)), 4), tuple(number), tuple(hits), tuple(nats),
        round(spent["shortening"], 1), round(spent["reading"], 1),
    )  # fmt: skip


# -- what it says ------------------------------------------------------------------------------------------------------
def compared(cell: Cell, whole: Cell) -> tuple[Interval, Interval]:
    """How many more answers are right than with the whole text, and how many nats per token likelier the right one is;
    both on the same questions, with 95 % intervals over texts, which questions share."""
    hits = np.asarray(cell.hits, float) - np.asarray(whole.hits, float)
    return clustered(hits, cell.item), clustered(np.asarray(whole.nats) - np.asarray(cell.nats), cell.item)


def table(cells: Sequence[Cell], options: Mapping[str, Any]) -> Table:
    heads = [
        ("task", ""), ("method", ""), ("rate", ""), ("left", "%"), ("right", "%"), ("against whole", "points"),
        ("log p", "nats a token"), ("against whole", "nats"), ("n", ""), ("seconds", ""),
    ]  # fmt: skip
    rows, better = [], []
    whole = {cell.task: cell for cell in cells if cell.way == WHOLE}
    for cell in cells:
        more, likelier = compared(cell, whole[cell.task])
        plain = cell.way == WHOLE
        rows.append([
            cell.task, cell.way, f"{cell.rate:g}", f"{100 * cell.kept:.0f}",
            f"{100 * np.mean(cell.hits):.1f}" if cell.choice else "",
            "" if plain or not cell.choice else _span(more, 100),
            f"{-np.mean(cell.nats):.3f}", "" if plain else _span(likelier), str(len(cell.nats)),
            f"{cell.shortening + cell.reading:.0f}",
        ])  # fmt: skip
        for what, interval in (("more answers right", more), ("the right answer likelier", likelier)):
            if interval.low > 0:
                better.append(f"{cell.task}: {cell.way} at {cell.rate:g}, {what}")
    count = sum(cell.way != WHOLE for cell in cells)
    notes = [
        "better than the whole text, by a 95 % interval: " + ("; ".join(better) if better else "none"),
        f"intervals: bootstrap over texts, each for itself ({2 * count} of them: one in 40 is above 0 by chance alone)",
        f"reader {options['model']}, {options['dtype']}; seed {options['seed']}; chance is 25 %, of exemplars 12.5 %",
    ]
    return Table(heads, rows, notes, [asdict(cell) for cell in cells])


def _span(interval: Interval, times: float = 1) -> str:
    digits = 1 if times > 1 else 3
    value, low, high = (times * x for x in (interval.value, interval.low, interval.high))
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _typed(given: Sequence[str]) -> list[str]:
    """Names of which several may be joined by semicolons."""
    return [name.strip() for one in given for name in one.split(";") if name.strip()]


class _File:
    """Cells by task, way and rate, in a file of lines that begins with what they depend on."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self.cells: dict[tuple[str, str, float], Cell] = {}
        about = {name: options[name] for name in ("model", "limit", "seed", "dtype")}
        lines = self.path.read_text().split("\n") if self.path.exists() else []
        whole = [json.loads(line) for line in lines[:-1]]  # the last one is empty, or was cut off while written
        if whole and whole[0] != about:
            raise ValueError(f"{self.path} holds results of {whole[0]}, asked for are {about}: give another folder")
        for line in whole[1:]:
            known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in line.items()}
            self._take(Cell(**known))
        self.path.write_text("".join(json.dumps(line) + "\n" for line in whole or [about]))

    def _take(self, cell: Cell) -> None:
        self.cells[cell.task, cell.way, cell.rate] = cell

    def add(self, cell: Cell) -> None:
        self._take(cell)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(cell)) + "\n")
