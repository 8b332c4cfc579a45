"""`fewer probe distance`: which heads reach far, and what texts lose without them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .inputs import NAMES, load, use_threads
from .output import Threads, say, writable, wrote


def command(
    model: Annotated[str, typer.Option(help=NAMES)] = "smollm2-135m",
    text: Annotated[str, typer.Option(help="A book: state-of-the-union, moby-dick.")] = "state-of-the-union",
    texts: Annotated[int, typer.Option(min=1, help="Passages to find the heads on, and others to measure on.")] = 6,
    length: Annotated[int, typer.Option(min=32, help="Tokens of a passage.")] = 1024,
    near: Annotated[int, typer.Option(help="A key closer than this many tokens is near.")] = 64,
    far: Annotated[int, typer.Option(help="A key at least this many tokens away is far.")] = 512,
    heads: Annotated[int, typer.Option(min=1, help="Positional heads to silence.")] = 10,
    draws: Annotated[int, typer.Option(min=0, help="Sets of random heads of the same layers to compare with.")] = 3,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="Measure on half passages written twice: the second time, far is needed.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the pairs of tokens looked at.")] = 0,
    threads: Threads = None,
    out_: Annotated[Path, typer.Option("--out", help="JSON file for all numbers.")] = Path("runs/distance.json"),
) -> None:
    """Which heads reach far through slow rotary pairs, and what long texts lose without them."""
    import json

    import torch

    from fewer.datasets.texts import book
    from fewer.evaluation import distance as job

    reach = job.Reach(near, far, seed=seed)
    use_threads(threads, 1)
    writable(out_)
    network, tokenizer = load(model)
    ids = job.passages(torch.tensor(tokenizer(book(text), verbose=False)["input_ids"]), 2 * texts, length)
    others = ids[1::2, : length // 2].repeat(1, 2) if repeat else ids[1::2]
    report = job.run(network, ids[::2], others=others, heads=heads, draws=draws, reach=reach, log=say)
    out_.write_text(json.dumps({"model": model, "text": text, "repeat": repeat, **report.plain()}) + "\n")
    for line in report.lines():
        say(line)
    wrote(out_)
