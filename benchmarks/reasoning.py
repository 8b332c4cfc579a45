"""Train the rows of `fewer bench --suite reasoning` whose weights are not in the package, and write them down.

    python benchmarks/reasoning.py --runs thinkprune:0 kimi:0 kimi:1 random:0 words:1
    python benchmarks/reasoning.py --weak DIR --runs traces:0 upft:0
    python benchmarks/reasoning.py --write          # the rows of all runs so far, into the package

A run is a reward of `fewer train shorten` or a chooser of `fewer train tokenskip`, and a seed; or, from a weak reasoner
(of `fewer train reasoner` with its defaults), fine-tuning on its own chains: whole and right ones ("traces"), or,
unchecked, their first tokens ("upft"). Each leaves a file in --out, and what is there is not run again. Needs
fewer[reasoning]; rewards need TRL, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch

from fewer.datasets import reasoning
from fewer.evaluation.reasoning import RECORD, Line, line
from fewer.evaluation.thoughts import Score, answers, scored
from fewer.models.zoo import load_model
from fewer.recipes import reasoner, shorten, skipping
from fewer.recipes.loop import Folder, Loop, hardware
from fewer.training.prefixes import Prefixes

ROOT = Path(__file__).resolve().parents[1]
WEAK = "weak reasoner, untouched"
PREFIX = 16
SIDE = 48
"""Texts side by side in a step of fine-tuning."""
RATIOS = ("0.9", "0.7", "0.5")
LABELS = {
    "thinkprune": "ThinkPrune", "fast": "FAST", "zipr1": "ZipR1, by length", "lcpo": "L1-Max (LCPO)",
    "o1-pruner": "O1-Pruner, by group", "dast": "DAST, as a reward", "kimi": "Kimi k1.5", "correct": "right or wrong",
}  # fmt: skip


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--runs", nargs="*", default=[], help="name:seed; names: words, random, or a reward")
    ask.add_argument("--out", type=Path, default=Path("runs/reasoning"))
    ask.add_argument("--weak", type=Path, help="the weak reasoner of traces and upft")
    ask.add_argument("--write", action="store_true", help=f"write the rows into src/fewer/{RECORD}")
    given = ask.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.runs:
        file = given.out / f"{name.replace(':', '-')}.json"
        if not file.exists():
            file.write_text(json.dumps(made(name, given.out, given.weak)) + "\n")
    if given.write:
        write(given.out)


def made(name: str, out: Path, weak: Path | None) -> dict[str, dict[str, object]]:
    """Run one: for each row it gives, what was answered."""
    kind, _, seed = name.partition(":")
    folder = out / name.replace(":", "-")
    if kind in ("words", "random"):
        ran = skipping.train(skipping.Skipping(by=kind, seed=int(seed)), folder)  # type: ignore[arg-type]
        title = "TokenSkip, {} asked" if kind == "words" else "random words skipped, {} asked"
        return {title.format(ratio): asdict(ran.scores[ratio]) for ratio in RATIOS}
    if kind in ("traces", "upft"):
        if weak is None:
            raise SystemExit(f"{name} starts from a weak reasoner: give its folder with --weak")
        return {title: asdict(score) for title, score in own(kind, int(seed), weak, folder).items()}
    report = shorten.train(shorten.Shortening(reward=kind, seed=int(seed)), folder)
    assert report.score is not None
    return {LABELS[kind]: asdict(report.score)}


def name_of(kind: str) -> str:
    return f"weak, UPFT on {PREFIX} tokens" if kind == "upft" else "weak, own right traces"


def own(kind: str, seed: int, weak: Path, folder: Path, problems: int = 1000, steps: int = 60) -> dict[str, Score]:
    """Fine-tune a weak reasoner on its own sampled chains, for as many steps either way."""
    recipe = skipping.Skipping(model=str(weak), seed=seed, problems=problems, steps=steps)
    at = Folder(folder, recipe, print)
    model, tokenizer = load_model(weak, dtype=torch.bfloat16)
    drawn = list(reasoning.problems(problems, seed=50 + seed))
    wrote = answers(model, tokenizer, [p.prompt for p in drawn], sample=True)
    pairs = [(p.prompt, w.text) for p, w in zip(drawn, wrote, strict=True)
             if kind == "upft" or reasoning.right(w.text, p.answer)]  # fmt: skip
    rows = reasoner.encoded(tokenizer, pairs)
    if kind == "upft":
        cut, rows_cut = Prefixes(PREFIX, seed=seed), []
        for i, (ids, prompt) in enumerate(rows):
            labels = [-100] * prompt + ids[prompt:]
            rows_cut.append((cut({"input_ids": ids, "labels": labels}, i)["input_ids"], prompt))
        rows = rows_cut
    test = reasoning.load()[: recipe.test]
    before = scored(answers(model, tokenizer, [p.prompt for p in test]), test)
    optimizer = torch.optim.AdamW(model.float().parameters(), lr=3e-4, weight_decay=0.0)
    size = sum(len(ids) for ids, _ in rows) * SIDE // len(rows)  # as many texts a step, however long
    reasoner.learnt(model, rows, Loop(steps, 0.1, bfloat16=True), [optimizer], at, tokens=size)
    after = scored(answers(model.bfloat16(), tokenizer, [p.prompt for p in test]), test)
    print(f"{name_of(kind)}: {sum(len(ids) for ids, _ in rows) / len(rows):.0f} tokens a text", flush=True)
    return {WEAK: before, name_of(kind): after}


def write(out: Path) -> None:
    """One line for each row, over its seeds."""
    rows: dict[str, list[Score]] = {}
    runs = sorted(out.glob("*.json"))
    for file in runs:
        for title, score in json.loads(file.read_text()).items():
            found = Score(tuple(score["rights"]), tuple(score["lengths"]))
            if title != WEAK or title not in rows:  # the same model before each of its runs
                rows.setdefault(title, []).append(found)
    problems = reasoning.load()[: len(next(iter(rows.values()))[0].rights)]
    model, tokenizer = load_model("reasoner", dtype=torch.bfloat16)
    base = scored(answers(model, tokenizer, [p.prompt for p in problems]), problems)
    lines: list[Line] = [
        line(title, scores, rows[WEAK][0] if title.startswith("weak, ") else base, "recorded")
        for title, scores in rows.items()
    ]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    names = [":".join(file.stem.rsplit("-", 1)) for file in runs]
    passport = {
        "command": f"python benchmarks/reasoning.py --runs {' '.join(names)}",
        "problems": len(problems), "hardware": hardware(torch.device("cpu")), "commit": commit.strip(),
    }  # fmt: skip
    text = json.dumps({"made": passport, "lines": [asdict(each) for each in lines]}, indent=1)
    (ROOT / "src/fewer" / RECORD).write_text(text + "\n")


if __name__ == "__main__":
    main()
