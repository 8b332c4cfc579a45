"""The suite "reasoning": how short a small reasoner's chains can be made, by what, and what it costs in right answers.

The packaged weights are measured here. Rows that further training makes come from `RECORD`, which
`benchmarks/reasoning.py` writes and which says how it was made; there are none where it has not been run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewer.datasets import reasoning
from fewer.evaluation import stats
from fewer.evaluation.suites import Table
from fewer.evaluation.thoughts import Score, answers, scored
from fewer.models.zoo import load_model

__all__ = ["OPTIONS", "RECORD", "Line", "line", "measured", "recorded", "run", "table"]

OPTIONS: Mapping[str, Any] = {"limit": 300, "threads": None}
"""limit: of the packaged problems, the first so many."""
RECORD = "assets/reasoner/trained.json"
CUTS = (20, 40, 60)
"""Tokens of a chain after which the answer is asked for."""
UNTOUCHED = "reasoner, untouched"


@dataclass(frozen=True)
class Line:
    """A row. Of several seeds: their means, and the lowest and highest of them; of one, 95 % intervals over problems.

    difference: of the accuracy to the untouched model's on the same problems. source: "here" or "recorded"
    """

    name: str
    accuracy: stats.Interval
    difference: stats.Interval | None
    tokens: stats.Interval
    per_right: stats.Interval
    seeds: int
    problems: int
    source: str


def run(options: Mapping[str, Any], out: Path, log: Callable[[str], None]) -> Table:
    """Measure what is in the package, and put the recorded rows beside it."""
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    limit = int(options["limit"])
    problems = reasoning.load()[:limit] if limit else reasoning.load()
    here = measured(problems, log)
    base = here[UNTOUCHED]
    lines = [line(name, [score], base, "here") for name, score in here.items()]
    record = recorded()
    lines += [Line(**each) for each in record["lines"]]
    return table(lines, record["made"])


def measured(problems: Sequence[reasoning.Problem], log: Callable[[str], None] = print) -> dict[str, Score]:
    """The packaged weights: untouched, and cut short."""
    found = {}
    model, tokenizer = load_model("reasoner", dtype=torch.bfloat16)
    prompts = [p.prompt for p in problems]
    found[UNTOUCHED] = scored(answers(model, tokenizer, prompts), problems)
    log(f"{UNTOUCHED}: {found[UNTOUCHED].accuracy:.1%}, {found[UNTOUCHED].tokens:.1f} tokens")
    for most in CUTS:
        found[f"cut after {most} tokens"] = scored(answers(model, tokenizer, prompts, most=most), problems)
    return found


def line(name: str, scores: Sequence[Score], base: Score | None, source: str) -> Line:
    """A row of one run or of several seeds."""
    rights = [np.array(score.rights) for score in scores]
    lengths = [np.array(score.lengths, float) for score in scores]
    if len(scores) == 1:
        accuracy, tokens, per_right = stats.share(rights[0]), stats.mean(lengths[0]), _ratio(lengths[0], rights[0])
    else:
        accuracy = _spread([float(r.mean()) for r in rights])
        tokens = _spread([float(n.mean()) for n in lengths])
        per_right = _spread([score.per_right for score in scores])
    difference = None
    if base is not None and len(base.rights) == len(rights[0]):
        apart = [stats.paired_difference(r, np.array(base.rights)) for r in rights]
        difference = apart[0] if len(apart) == 1 else _spread([each.value for each in apart])
    return Line(name, accuracy, difference, tokens, per_right, len(scores), len(rights[0]), source)


def recorded() -> dict[str, Any]:
    """The rows of runs whose weights are not in the package; `made` says how they came about. None where none are."""
    file = resources.files("fewer").joinpath(RECORD)
    if not file.is_file():
        return {"made": {}, "lines": []}
    found = json.loads(file.read_text())
    for each in found["lines"]:
        for name in ("accuracy", "difference", "tokens", "per_right"):
            each[name] = None if each[name] is None else stats.Interval(**each[name])
    return found


def table(lines: Sequence[Line], made: Mapping[str, Any]) -> Table:
    """The rows as text."""
    base = next((each for each in lines if each.name == UNTOUCHED), None)
    rows = []
    for each in lines:
        apart = "" if each.difference is None or each is base else _text(each.difference, 100, "+.1f")
        fewer = "" if base is None or each is base else f"{100 * (1 - each.tokens.value / base.tokens.value):.0f}"
        rows.append(
            [each.name, _text(each.accuracy, 100), apart, _text(each.tokens, 1), fewer, _text(each.per_right, 1),
             str(each.seeds), each.source]
        )  # fmt: skip
    heads = [("method", ""), ("right", "%"), ("difference", "points"), ("chain", "tokens"), ("fewer", "%"),
             ("per right answer", "tokens"), ("seeds", ""), ("measured", "")]  # fmt: skip
    notes = ["in brackets: 95 % intervals over the problems; of several seeds, the lowest and the highest"]
    if made:
        how = f"{made['problems']} problems, {made['hardware']}, commit {made['commit']}"
        notes.append(f"recorded: {made['command']}; {how}")
    return Table(heads, rows, notes, {"lines": [asdict(each) for each in lines], "recorded": dict(made)})


def _text(value: stats.Interval, scale: float, form: str = ".1f") -> str:
    low, high = (format(scale * end, form) for end in (value.low, value.high))
    return f"{format(scale * value.value, form)} ({low} to {high})"


def _spread(values: Sequence[float]) -> stats.Interval:
    return stats.Interval(sum(values) / len(values), min(values), max(values))


def _ratio(lengths: np.ndarray, rights: np.ndarray, draws: int = 2000) -> stats.Interval:
    """Tokens for each right answer, with a bootstrap interval over the problems."""
    drawn = np.random.default_rng(0).integers(len(lengths), size=(draws, len(lengths)))
    each = lengths[drawn].sum(1) / np.maximum(rights[drawn].sum(1), 1)
    low, high = np.quantile(each, (0.025, 0.975)).tolist()
    return stats.Interval(float(lengths.sum() / max(rights.sum(), 1)), low, high)
