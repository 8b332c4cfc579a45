"""Draw docs/pictures/selection.png: held-out loss against tokens read, and against tokens that taught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fewer.studio.style import ACCENT, FAINT, INK, QUIET

ROOT = Path(__file__).resolve().parent.parent
RESULT, OUT = ROOT / "benchmarks" / "results" / "selection.json", ROOT / "docs" / "pictures" / "selection.png"
LOOKS = {
    "plain": ("all tokens", INK, "-"),
    "rho1:keep=0.6": ("Rho-1, 60 %", ACCENT, "-"),
    "random:site=loss,keep=0.6": ("60 % at random", QUIET, "--"),
    "clean only": ("all but the noise", QUIET, ":"),
}


def mean(rows: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """Step, tokens that taught and nats, at each look, means over the seeds."""
    looks = zip(*(row["curve"] for row in rows), strict=True)
    return [tuple(sum(at) / len(at) for at in zip(*points, strict=True)) for points in looks]


def main() -> None:
    made = json.loads(RESULT.read_text())
    recipe = made["passport"]["recipe"]
    figure, panes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, constrained_layout=True)
    for method, (name, colour, line) in LOOKS.items():
        rows = [row for row in made["rows"] if row["method"] == method]
        if not rows:
            continue
        points = mean(rows)
        read = [step * recipe["batch"] * recipe["length"] / 1e3 for step, _, _ in points]
        for pane, x in zip(panes, (read, [taught / 1e3 for _, taught, _ in points]), strict=True):
            seeds = "seed" if len(rows) == 1 else "seeds"
            pane.plot(x, [p[2] for p in points], line, color=colour, label=f"{name} ({len(rows)} {seeds})", lw=1.6)
    for pane, title in zip(panes, ("tokens read, thousands", "tokens that taught, thousands"), strict=True):
        pane.set_xlabel(title)
        pane.set_ylim(top=6.5)
        pane.grid(color=FAINT, lw=0.6)
        pane.spines[["top", "right"]].set_visible(False)
    panes[0].set_ylabel("nats per token of clean, unseen text")
    panes[0].legend(frameon=False, fontsize=9)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT, dpi=110)
    print(f"written: {OUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
