"""Train an AutoCompressor: a language model learns to condense each segment of a long text for the next ones.

report = train(Condensing(), "out")                               # the model, its summary tokens, a log, a report
compressor = AutoCompressor.load("out", AutoModelForCausalLM.from_pretrained("out"))
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core.settings import Settings
from fewer.datasets.texts import book
from fewer.models.zoo import load_model
from fewer.recipes.loop import At, Folder, Loop, decayed
from fewer.summaries import AutoCompressor
from fewer.summaries.autocompressor import draw_lengths

__all__ = ["Condensing", "Report", "measured", "train"]


@dataclass(frozen=True)
class Condensing(Settings):
    """Everything a run depends on.

    model, text  as in `load_model` and `texts.book`
    count        summary vectors of a segment; 0 trains a plain language model on segments that know of no other
    length       tokens of a segment, on average: drawn from half to twice of it. segments: of a training text
    accumulate, window   see `AutoCompressor`
    steps        updates, of `batch` texts each. lr: AdamW's peak rate, warm-up over `warmup` of the steps, then half a
                 cosine. weight_decay: of matrices
    test         texts of two segments that are measured, from the last tenth of the text, which is never trained on
    bfloat16     multiply in bfloat16 while training. seed: of all draws. threads: None leaves them
    """

    model: str = "smollm2-135m"
    text: str = "state-of-the-union"
    count: int = 8
    length: int = 64
    segments: int = 3
    accumulate: bool = True
    window: int | None = 2
    steps: int = 500
    batch: int = 16
    lr: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    test: int = 200
    bfloat16: bool = False
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("length", 2), ("segments", 1), ("steps", 1), ("batch", 1), ("test", 2), ("count", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"Condensing({name}={getattr(self, name)}): must be at least {least}")


@dataclass(frozen=True)
class Report:
    """What a run came to: nats per token of segment 2 of held-out texts, means over the texts, each model reading

    alone     nothing before it
    summary   the summary of segment 1. other: the summary of another text's segment 1
    full      segment 1 in full

    of the model as it was (`before`) and as it is now (`after`). texts: the same, one number for each text.
    recovered: the share of what the full segment is worth to the model now that its summary is worth, by the means.
    seconds: training alone.
    """

    parameters: int
    seconds: float
    before: dict[str, float]
    after: dict[str, float]
    recovered: float | None
    texts: dict[str, dict[str, list[float]]] = field(repr=False)


def train(
    recipe: Condensing, out: str | Path, *, model: tuple[nn.Module, Any] | None = None, ids: Tensor | None = None,
    held: Tensor | None = None, log: Callable[[str], None] = print,
) -> Report:  # fmt: skip
    """Train model and summary tokens, and save both.

    model: instead of loading the one named, with its tokenizer or None. ids: (T,) long, instead of reading the text.
    held: (T,) long, instead of its last tenth.
    """
    folder = Folder(out, recipe, log, every=10)
    net, tokenizer = load_model(recipe.model) if model is None else model
    if ids is None:
        ids = torch.tensor(tokenizer(book(recipe.text))["input_ids"])
    if held is None:
        ids, held = ids.split([len(ids) * 9 // 10, len(ids) - len(ids) * 9 // 10])
    total = recipe.segments * recipe.length
    if min(len(ids), len(held)) <= max(total, 2 * recipe.length):
        raise ValueError(f"texts of {len(ids)} and {len(held)} tokens: too short for {total} at a time")
    compressor = AutoCompressor(
        net, recipe.count, segments=recipe.segments, accumulate=recipe.accumulate, window=recipe.window
    )
    two = _windows(held, recipe.test, 2 * recipe.length)
    before = measured(compressor, two, recipe.batch)
    before = {name: before[name] for name in ("alone", "full")}

    draw = iter(lambda: torch.randint(0, len(ids) - total + 1, (recipe.batch,)), None)

    def loss(starts: Tensor, at: At) -> dict[str, Any]:
        rows = ids[starts[:, None] + torch.arange(total)].to(compressor.tokens.device)
        lengths = draw_lengths(total, recipe.segments, longest=2 * recipe.length, shortest=recipe.length // 2)
        with at.autocast():
            return {"loss": compressor(rows, labels=rows, lengths=lengths)["loss"]}

    optimiser = torch.optim.AdamW(decayed(compressor.parameters(), recipe.weight_decay), lr=recipe.lr)
    compressor.train()
    lines = Loop(recipe.steps, recipe.warmup, bfloat16=recipe.bfloat16).run(compressor, [optimiser], draw, loss, folder)
    compressor.eval()
    after = measured(compressor, two, recipe.batch)
    compressor.save_pretrained(folder.path)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder.path)
    means = {name: sum(values) / len(values) for name, values in after.items()}
    worth = means["alone"] - means["full"]
    report = Report(
        sum(p.numel() for p in compressor.parameters()), lines[-1]["seconds"],
        {name: sum(values) / len(values) for name, values in before.items()}, means,
        (means["alone"] - means["summary"]) / worth if recipe.count and worth > 0 else None,
        {"before": before, "after": after},
    )  # fmt: skip
    folder.finish(report)
    log(json.dumps({"before": report.before, "after": report.after, "recovered": report.recovered}))
    return report


@torch.no_grad()
def measured(compressor: AutoCompressor, texts: Tensor, batch: int = 16) -> dict[str, list[float]]:
    """Nats per token of the second half of each text, see `Report`. texts: (N, 2 L) long.

    The first token of the half is left out: without what came before, nothing foretells it. So every reader is asked
    for the same L - 1 tokens.
    """
    was = compressor.training
    compressor.eval()
    half = texts.shape[1] // 2
    found: dict[str, list[float]] = {}
    texts = texts.to(compressor.tokens.device)
    strange = texts[:, :half].roll(len(texts) // 2, 0)  # far away: neighbours have much in common
    for rows, far in zip(texts.split(batch), strange.split(batch), strict=True):
        first, second = rows[:, :half], rows[:, half:]
        logits = {"alone": compressor.model(second).logits, "full": compressor.model(rows).logits[:, half:]}
        if compressor.count:
            for name, read in (("summary", first), ("other", far)):
                logits[name] = compressor.summary(read, lengths=[half]).logits(second)
        for name, scores in logits.items():
            each = F.cross_entropy(scores[:, :-1].transpose(1, 2).float(), second[:, 1:], reduction="none")
            found.setdefault(name, []).extend(each.mean(1).tolist())
    compressor.train(was)
    return found


def _windows(ids: Tensor, count: int, length: int) -> Tensor:
    """(count or as many as there are, length): pieces side by side, spread evenly over the whole."""
    pieces = ids[: len(ids) // length * length].view(-1, length)
    return pieces[torch.linspace(0, len(pieces) - 1, min(count, len(pieces))).long()]
