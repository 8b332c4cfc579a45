"""Rho-1 against plain training, a random choice and the clean tokens alone, on noisy text.

What is done is written in fewer.evaluation.selection.

python benchmarks/selection.py --out benchmarks/results/selection.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from fewer.evaluation.selection import Selection, passport, run, summaries


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=Selection.steps)
    arguments.add_argument("--seeds", type=int, default=Selection.seeds)
    arguments.add_argument("--noise", type=float, default=Selection.noise)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    recipe = Selection(steps=given.steps, seeds=given.seeds, noise=given.noise)
    runs = []
    for seed in range(recipe.seeds):  # what is there is written: three seeds take a while
        runs += run(recipe, seeds=[seed], log=lambda line: print(line, flush=True))
        rows = [asdict(row) for row in summaries(runs, recipe.spike)]
        for row, one in zip(rows, runs, strict=True):
            row["curve"] = [(step, taught, round(nats, 4)) for step, taught, nats in one.curve]
            row["norms"] = [round(x, 3) for x in one.norms]
            row["reference"] = one.reference
        if given.out:
            given.out.write_text(json.dumps({"passport": passport(recipe), "rows": rows}) + "\n")
    for row in rows:
        print(json.dumps({k: v for k, v in row.items() if k not in ("curve", "norms")}))


if __name__ == "__main__":
    main()
