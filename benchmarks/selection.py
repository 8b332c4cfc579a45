"""Rho-1 against plain training, a random choice and the clean tokens alone, on noisy text.

What is done is written in fewer.evaluation.selection. A file that is there is added to, where its recipe is the same:

    python benchmarks/selection.py --seeds 0 1 2 --out benchmarks/results/selection.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fewer.evaluation.selection import Run, Selection, passport, runs, summaries


def rows_of(found: list[Run], spike: float) -> list[dict[str, Any]]:
    rows = [asdict(row) for row in summaries(found, spike)]
    for row, one in zip(rows, found, strict=True):
        row["curve"] = [(step, taught, round(nats, 4)) for step, taught, nats in one.curve]
        row["norms"] = [round(x, 3) for x in one.norms]
        row["reference"] = one.reference
    return rows


def added(out: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Rows beside those of other seeds and methods that are there."""
    scale = {k: v for k, v in about["recipe"].items() if k not in ("methods", "seeds")}
    if out.exists():
        before = json.loads(out.read_text())
        other = {k: v for k, v in before["passport"]["recipe"].items() if k not in ("methods", "seeds")}
        if other != scale:
            raise SystemExit(f"{out} was measured with {other}; here it is {scale}: give another --out")
        new = {(row["seed"], row["method"]) for row in rows}
        rows = [row for row in before["rows"] if (row["seed"], row["method"]) not in new] + rows
    about["recipe"] = scale
    out.write_text(json.dumps({"passport": about, "rows": sorted(rows, key=lambda row: row["seed"])}) + "\n")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=Selection.steps)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--methods", nargs="+", default=list(Selection.methods))
    arguments.add_argument("--noise", type=float, default=Selection.noise)
    arguments.add_argument("--known", type=float, default=Selection.known, help="steps of the reference, over --steps")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    recipe = Selection(steps=given.steps, noise=given.noise, known=given.known, methods=tuple(given.methods))
    for seed in given.seeds:  # what is there is written: three seeds take a while
        rows = rows_of(runs(recipe, seeds=[seed], log=lambda line: print(line, flush=True)), recipe.spike)
        if given.out:
            added(given.out, passport(recipe), rows)
        for row in rows:
            print(json.dumps({k: v for k, v in row.items() if k not in ("curve", "norms")}), flush=True)


if __name__ == "__main__":
    main()
