"""Train an Hourglass, a character model that pools its characters to segments, from scratch.

    report = train("out")                                                     # boundaries learned from the loss
    report = train("out", Recipe(method="dynamic_pooling:boundaries=whitespace,layers=1+2+3+4"))
    report = train("out", Recipe(method=None))                                # the plain model to compare with

Every kind sees the same characters in the same order. Matrices inside the blocks are stepped by Muon, the rest by
AdamW. Blocks of the text are held out; bits per character are those of the second half of each window of held-out
text, so that every scored character has at least half a window before it.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewer.datasets import texts
from fewer.evaluation import stats
from fewer.methods.language.dynamic_pooling import entropy_spikes, prior_loss
from fewer.models.hourglass import UNKNOWN, Hourglass, Reading, Settings
from fewer.recipes.loop import At, Folder, Loop, muon_and_adamw

__all__ = ["Recipe", "Report", "alphabet", "bits", "compare", "losses", "split", "train", "unigram_ends"]

BLOCK = 20_000  # characters between two cuts of the text
EVERY = 20  # of these blocks one is held out


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on besides the text; the defaults take two to five minutes of one idle core.

    method      text form of a `dynamic_pooling`; None trains the plain model
    book        name of the text, see `fewer.datasets.texts.book`; runs of white space become one blank
    steps       updates, of `batch` windows of `length` characters each
    lr, lr_rest peak learning rates of Muon (matrices in the blocks) and AdamW (everything else)
    warmup      share of the steps spent rising; from there half a cosine to zero
    prior       weight of the binomial prior (gumbel) or of the predictor's own loss (entropy, unigram)
    pieces      vocabulary of the Unigram tokeniser that teaches `unigram`
    rare        characters seen less often than this in the training text count as unknown
    tested      held-out characters that are scored; 0 = all
    bfloat16    multiply matrices in bfloat16, attention excepted; faster where the processor has the instructions
    seed        initial weights, order and draws
    threads     torch threads; None leaves them
    """

    method: str | None = "dynamic_pooling:layers=1+2+3+4"
    book: str = "state-of-the-union"
    steps: int = 1000
    batch: int = 8
    length: int = 256
    width: int = 128
    depth: int = 6
    heads: int = 2
    lr: float = 4e-3
    lr_rest: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    prior: float = 1.0
    pieces: int = 2000
    rare: int = 10
    tested: int = 100_000
    bfloat16: bool = True
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or self.length < 8 or self.length % 2:
            raise ValueError(
                f"Recipe(steps={self.steps}, batch={self.batch}, length={self.length}): at least one step and one "
                "window, of an even length of 8 or more"
            )


@dataclass(frozen=True)
class Report:
    """What a run came to.

    bits, low, high   bits per held-out character, 95 % interval (bootstrap over the windows)
    windows           held-out windows scored
    shortening        characters per segment on held-out text, at most a window; 1 for the plain model
    flops             floating-point operations per character of a forward pass over one window
    train_speed       characters per second of processor time in training; other work on the machine does not count
    read_speed        the same of a forward pass in float32, batches of the training's size
    seconds           wall time of training
    """

    bits: float
    low: float
    high: float
    windows: int
    shortening: float
    flops: float
    train_speed: float
    read_speed: float
    seconds: float
    parameters: int
    characters: int


def train(
    out: str | Path, recipe: Recipe = Recipe(), *, text: str | None = None, log: Callable[[str], None] = print
) -> Report:  # fmt: skip
    """Train a model and save it where `Hourglass.from_folder(out)` reads it.

    out: folder for the model, log.jsonl and report.json. text: instead of the named book. log: receives a line every
    50 steps and the result.
    Raises   ValueError for a text that is too short to hold anything out; what `texts.book` and `parse` raise.
    """
    folder = Folder(out, recipe, log)
    out = folder.path
    out = folder.path
    seen, held = split(" ".join((texts.book(recipe.book) if text is None else text).split()))
    letters = alphabet("".join(seen), recipe.rare)
    model = Hourglass(Settings(letters, recipe.width, recipe.depth, recipe.heads, recipe.method))
    characters = torch.cat([model.encode(part) for part in seen])
    taught = None
    if model.method is not None and model.method.boundaries == "unigram":
        taught = unigram_ends(seen, recipe.pieces)
    started, worked = time.perf_counter(), time.process_time()
    _learn(model, recipe, characters, taught, folder)
    seconds, working = time.perf_counter() - started, time.process_time() - worked
    model.save(out, dtype=torch.float16)
    model = Hourglass.from_folder(out)  # what is measured is what is kept
    windows = _windows(model.encode("".join(held)), recipe)
    began = time.process_time()
    scores, ends = bits(model, windows, recipe.batch)
    reading = time.process_time() - began
    interval = stats.mean(scores.tolist())
    rows = recipe.length * ends
    report = Report(
        bits=round(interval.value, 4), low=round(interval.low, 4), high=round(interval.high, 4), windows=len(windows),
        shortening=round(1 / max(ends, 1 / recipe.length), 3),
        flops=round(model.flops(recipe.length, rows) / recipe.length),
        train_speed=round(recipe.steps * recipe.batch * recipe.length / working),
        read_speed=round(windows[:, 1:].numel() / reading),
        seconds=round(seconds, 1),
        parameters=sum(p.numel() for p in model.parameters()),
        characters=len(characters),
    )  # fmt: skip
    card = {"recipe": json.dumps(asdict(recipe)), "report": json.dumps(asdict(report))}
    model.save(out, dtype=torch.float16, card=card)
    folder.finish(report)
    log("  ".join(f"{key} {value}" for key, value in asdict(report).items()))
    return report


# -- text -------------------------------------------------------------------------------------------------------------
def split(text: str) -> tuple[list[str], list[str]]:
    """(training parts, held-out parts): one block of 20,000 characters in every twenty is held out.

    Raises   ValueError for a text of less than twenty blocks.
    """
    blocks = [text[i : i + BLOCK] for i in range(0, len(text), BLOCK)]
    if len(blocks) < EVERY:
        raise ValueError(f"a text of {len(text)} characters leaves nothing to hold out; give {EVERY * BLOCK} or more")
    held = blocks[EVERY - 1 :: EVERY]
    return [block for i, block in enumerate(blocks) if i % EVERY != EVERY - 1], held


def alphabet(text: str, rare: int) -> str:
    """The characters of a text that occur at least `rare` times, by code point, behind the one for all others."""
    return UNKNOWN + "".join(sorted(c for c, count in Counter(text).items() if count >= rare and c != UNKNOWN))


def unigram_ends(parts: list[str], pieces: int) -> Tensor:
    """(characters,) bool: where the pieces of a Unigram tokeniser end that was trained on these parts.

    A blank stays with the word before it, so that no piece crosses it and the end of a word shows when it is read.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "merged_with_previous")
    trainer = trainers.UnigramTrainer(
        vocab_size=pieces, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(parts, trainer)
    ends = []
    for part, encoded in zip(parts, tokenizer.encode_batch(parts), strict=True):
        mark = torch.zeros(len(part), dtype=torch.bool)
        mark[torch.tensor([end - 1 for _, end in encoded.offsets])] = True
        ends.append(mark)
    return torch.cat(ends)


def _windows(characters: Tensor, recipe: Recipe) -> Tensor:
    """(W, length + 1): windows half a length apart, so that their second halves tile the text."""
    if recipe.tested:
        characters = characters[: recipe.tested + recipe.length // 2 + 1]
    return characters.unfold(0, recipe.length + 1, recipe.length // 2)


# -- training ---------------------------------------------------------------------------------------------------------
def losses(model: Hourglass, reading: Reading, targets: Tensor, taught: Tensor | None) -> dict[str, Tensor]:
    """Name -> loss. "next": nats per character. "boundaries": the prior (gumbel) or the predictor's own loss.

    targets: (B, N), the next characters. taught: (B, N) bool, for `unigram` where its pieces end.
    """
    parts = {"next": F.cross_entropy(reading.logits.float().flatten(0, 1), targets.flatten())}
    method = model.method
    if method is None or not method.learned:
        return parts
    assert reading.boundaries is not None and reading.boundary_logits is not None
    if method.boundaries == "gumbel":
        parts["boundaries"] = prior_loss(reading.boundaries, method.share)
    else:
        wanted = entropy_spikes(reading.logits) if method.boundaries == "entropy" else taught
        assert wanted is not None
        parts["boundaries"] = F.binary_cross_entropy_with_logits(reading.boundary_logits, wanted.float())
    return parts


def _learn(model: Hourglass, recipe: Recipe, characters: Tensor, taught: Tensor | None, folder: Folder) -> None:
    span = torch.arange(recipe.length + 1)

    def loss(first: Tensor, at: At) -> dict[str, Any]:
        places = first[:, None] + span
        x = characters[places]
        with at.autocast():
            reading = model(x[:, :-1])
        parts = losses(model, reading, x[:, 1:], None if taught is None else taught[places[:, :-1]])
        total = parts["next"] + recipe.prior * parts["boundaries"] if "boundaries" in parts else parts["next"]
        found = {"loss": total, "bits": parts["next"] / math.log(2)}
        if reading.boundaries is not None:
            found["share"] = reading.boundaries.float().mean()
        return found | {name: value for name, value in parts.items() if name != "next"}

    optimizers = muon_and_adamw(recipe, [model.blocks], [(1.0, model.parameters())])
    model.train()
    loop = Loop(recipe.steps, recipe.warmup, bfloat16=recipe.bfloat16, every=50)
    loop.run(model, optimizers, _starts(len(characters), recipe), loss, folder)
    model.eval()


def _starts(n: int, recipe: Recipe) -> Iterator[Tensor]:
    """Where the windows of each batch start: all of them in a random order, each time from another offset. A stream
    of its own, so that every kind of model sees the same text whatever else it draws."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        offset = int(torch.randint(recipe.length, (), generator=generator))
        whole = torch.arange(offset, n - recipe.length, recipe.length)
        yield from whole[torch.randperm(len(whole), generator=generator)].split(recipe.batch)


# -- testing ----------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def bits(model: Hourglass, windows: Tensor, batch: int) -> tuple[Tensor, float]:
    """Bits per character of each window's second half, (W,), and the share of characters that end a segment.

    windows: (W, length + 1). The model is in evaluation mode and float32; a learned boundary is not drawn but taken
    where it is likelier than not.
    """
    half = (windows.shape[1] - 1) // 2
    scores, ends = [], []
    for part in windows.split(batch):
        reading = model(part[:, :-1])
        nats = F.cross_entropy(reading.logits[:, half:].transpose(1, 2), part[:, half + 1 :], reduction="none")
        scores.append(nats.mean(1) / math.log(2))
        if reading.boundaries is not None:
            ends.append(reading.boundaries.float().mean(1))
    return torch.cat(scores), torch.cat(ends).mean().item() if ends else 1.0


def compare(
    folders: Sequence[str | Path], recipe: Recipe = Recipe(), *, text: str | None = None
) -> dict[str, tuple[stats.Interval, stats.Interval]]:
    """Saved models on the same held-out characters.

    folders: of the models, or packaged names. recipe: says which text, and how it is cut and scored.
    Returns  name -> (bits per character, their difference from the first model's on the same windows), each with a
             95 % bootstrap interval over the windows. The paired difference is the sharper of the two.
    """
    _, held = split(" ".join((texts.book(recipe.book) if text is None else text).split()))
    found, first = {}, None
    for folder in folders:
        model = Hourglass.from_folder(folder)
        scores, _ = bits(model, _windows(model.encode("".join(held)), recipe), recipe.batch)
        first = scores if first is None else first
        found[str(folder)] = (stats.mean(scores.tolist()), stats.mean((scores - first).tolist()))
    return found
