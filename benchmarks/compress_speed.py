"""What it takes to shorten a prompt, in plain forwards of the model that reads it.

SmolLM2-135M on one CPU thread in float32 reads the first tokens of this repository's pages. All is counted from text
to text: tokenizing, reading, choosing, fitting the length, writing. Seconds are this process's CPU seconds. A plain
forward with the logits of all tokens, which is what one perplexity takes, is run before and after each; medians of the
ratios, with quartiles. Beside them stands the same against a forward with the last token's logits alone.

    python benchmarks/compress_speed.py --tokens 2048 --rounds 7 [--methods ...] [--out results.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fewer import Compressor
from fewer.compression.source import pieces_of
from fewer.evaluation import stats
from fewer.evaluation.record import commit, now
from fewer.models.zoo import load_model

PAGES = Path(__file__).resolve().parent.parent / "docs"
METHODS = ("llmlingua:keep=0.5", "llmlingua:keep=0.5,unit=word", "selective_context:keep=0.5,context=text")


def prompt(tokenizer: Any, tokens: int) -> str:
    """The first tokens of the hand-written pages."""
    text = "\n\n".join(
        (PAGES / f"{name}.md").read_text() for name in ("faq", "algebra", "vision-language", "quickstart")
    )
    _, spans = pieces_of(text, tokenizer)
    if len(spans) < tokens:
        raise SystemExit(f"the pages have {len(spans):,} tokens; ask for fewer than {tokens:,}")
    return text[: spans[tokens - 1][1]]


def seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--tokens", type=int, default=2048)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--methods", nargs="+", default=METHODS)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model("smollm2-135m")
    model = model.float().eval()
    text = prompt(tokenizer, given.tokens)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def plain(**logits: int) -> None:
        model(ids, **logits)

    rows = []
    for method in given.methods:
        compressor = Compressor(method, model, tokenizer)
        made = compressor(text)  # warm
        plain()
        took, full, last = [], [], []
        for _ in range(given.rounds):
            before = seconds(plain), seconds(lambda: plain(logits_to_keep=1))
            took.append(seconds(lambda compressor=compressor: compressor(text)))
            after = seconds(plain), seconds(lambda: plain(logits_to_keep=1))
            full.append((before[0] + after[0]) / 2)
            last.append((before[1] + after[1]) / 2)
        row: dict[str, Any] = {"method": method, "tokens": made.before, "left": made.after}
        for name, against in (("forwards", full), ("forwards_with_one_logit_row", last)):
            found = stats.ratios(took, against)
            row[name] = [round(x, 3) for x in (found.value, found.low, found.high)]
        row["seconds"] = {name: round(median(values), 2) for name, values in (("all", took), ("forward", full))}
        rows.append(row)
        print(json.dumps(row), flush=True)
    if given.out:
        passport = {
            "against": "a forward of the same model over the same tokens, run before and after", "rounds": given.rounds,
            "model": "smollm2-135m", "dtype": "float32", "threads": 1, "cpu": platform.machine(),
            "torch": torch.__version__, "commit": commit(), "when": now(),
        }  # fmt: skip
        given.out.write_text(json.dumps({"passport": passport, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
