"""Suites: fixed sets of tasks with packaged weights, each a table from one command, `fewer bench --suite NAME`.

    table = run("reasoning", {"limit": 200}, "runs/bench")

A suite is a module of this package with `OPTIONS`, what may be set, with the defaults, and `run(options, out, log)`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["SUITES", "Table", "run"]

SUITES: Mapping[str, str] = {
    "reasoning": "fewer.evaluation.reasoning",
    "training": "fewer.evaluation.selection",
    "text": "fewer.evaluation.text",
}
"""Names, and the module that measures each."""


@dataclass(frozen=True)
class Table:
    """What a suite came to.

    heads: title and unit of each column. rows: a text for each. notes: lines below. record: all of it, for JSON
    """

    heads: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    record: Any = field(default=None, repr=False)


def run(name: str, given: Mapping[str, Any], out: str | Path, log: Callable[[str], None] = print) -> tuple[Table, Path]:
    """Measure a suite and write its table to `out`. given: options that differ from the suite's defaults.

    Returns the table and the file. Raises ValueError for a suite or an option that there is not, naming those there are
    """
    if name not in SUITES:
        raise ValueError(f"no suite {name!r}: choose {', '.join(SUITES)}")
    module = importlib.import_module(SUITES[name])
    for option in given:
        if option not in module.OPTIONS:
            raise ValueError(f"--{option} does not apply to the suite {name}; {_listed(module.OPTIONS)}")
    table = module.run({**module.OPTIONS, **given}, Path(out), log)
    Path(out).mkdir(parents=True, exist_ok=True)
    file = Path(out) / f"{name}.json"
    file.write_text(json.dumps(asdict(table), indent=1) + "\n")
    return table, file


def _listed(options: Mapping[str, Any]) -> str:
    return f"it takes {', '.join(f'--{name}' for name in options)}" if options else "it takes no options"
