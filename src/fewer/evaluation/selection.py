"""Which tokens teach, on real text into which noise was put: a method on the training loss against plain training.

A small Llama learns the presidents' addresses from scratch; a share of the training tokens, in runs of eight, is
replaced by pieces drawn at random. The reference is a model of the same shape that read a fifth of the clean text
first. Held-out text is clean and from addresses nobody trained on. All runs of a seed start from the same weights and
see the same batches, so that differences are paired; the learning rate is constant behind its warm-up, so that a run
that stops earlier is not at a disadvantage.

    found = summaries(runs(Selection(steps=300, seeds=1), log=print))

`fewer bench --suite training` is a short form of it: the texts in the package, few steps, one seed.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fewer.core.settings import Settings
from fewer.datasets import texts
from fewer.evaluation.record import commit, now
from fewer.evaluation.suites import Table
from fewer.runtime.apply import apply

__all__ = ["CLEAN", "OPTIONS", "PLAIN", "Run", "Selection", "Summary", "passport", "run", "runs", "summaries", "table"]

PLAIN, CLEAN = "plain", "clean only"
"""All tokens teach; all that are no noise do, which nobody can know: the most that a choice can hope for."""
OPTIONS: Mapping[str, Any] = {"data": "embedded", "steps": 150, "repeats": 1, "threads": 1}
"""Of the suite. data: see `Selection`. steps: updates of each run. repeats: seeds."""
HEADS = (
    ("method", ""), ("held-out", "nats"), ("against plain", "equal steps"), ("against plain", "equal tokens"),
    ("plain reached at", "% read / taught"), ("noise among what taught", "%"), ("spikes", ""),
    ("gradient norm", "deviation"), ("time", "of plain"),
)  # fmt: skip
NOISY = 8  # tokens of a run of noise
WINDOW = 50  # gradients before a step, whose median a spike is held against


@dataclass(frozen=True)
class Selection(Settings):
    """Everything the numbers depend on.

    data      "eras" (39 MB, npm) or "embedded": of its passages four fifths are for training
    methods   PLAIN, CLEAN, or forms of methods on the training loss
    noise     share of the training tokens that are noise
    steps     updates of `batch` windows of `length` pieces each
    known     how many of them the reference had, over `steps`: 0.5 is half as many
    every     steps between two looks at the held-out text; spike: how many times the median gradient norm is a spike
    seeds     of weights, noise and batches: 0, 1, ...
    """

    data: str = "eras"
    methods: tuple[str, ...] = (PLAIN, "rho1:keep=0.6", "random:site=loss,keep=0.6", CLEAN)
    noise: float = 0.3
    steps: int = 500
    batch: int = 16
    length: int = 96
    pieces: int = 2048
    width: int = 128
    layers: int = 3
    lr: float = 2e-3
    known: float = 0.5
    every: int = 25
    held: int = 192
    spike: float = 2.0
    seeds: int = 3

    def __post_init__(self) -> None:
        if self.data not in ("eras", "embedded"):
            raise ValueError(f"data={self.data!r}: choose eras or embedded")
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise={self.noise}: a share of the training tokens, less than 1")
        if PLAIN not in self.methods:
            raise ValueError(f"methods={self.methods}: {PLAIN!r}, which the others are held against, is missing")
        for name, least in (("steps", 60), ("seeds", 1), ("batch", 1), ("every", 1), ("held", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: give at least {least}")
        if self.known <= 0:
            raise ValueError(f"known={self.known}: a reference learns, too; give more than 0")
        if self.length % NOISY or self.width % 32:
            raise ValueError(f"length={self.length}, width={self.width}: give multiples of {NOISY} and 32")


@dataclass(frozen=True)
class Run:
    """What one run of one method showed.

    curve         (step, tokens that taught so far, nats per held-out token)
    norms         of the gradient at each step, before it is clipped to 1. losses: what was minimised, at each step
    noise_taught  share of the tokens that taught which are noise. seconds: of this thread, held-out text left out
    reference     nats per held-out token of the reference, None without one
    """

    seed: int
    method: str
    curve: list[tuple[int, int, float]]
    norms: list[float] = field(repr=False)
    losses: list[float] = field(repr=False)
    noise_taught: float
    seconds: float
    reference: float | None = None

    @property
    def final(self) -> float:
        return self.curve[-1][2]


@dataclass(frozen=True)
class Summary:
    """A run in numbers, held against plain training with the same seed.

    final, against        held-out nats at the end, and minus plain's: at equal steps
    at_equal_tokens       minus plain's when as many tokens had taught plain, by interpolation
    reached               share of plain's tokens read, and of those that taught, when plain's final loss was reached;
                          None if never
    spikes                steps whose gradient is longer than `spike` times the median of the 50 before
    norm, norm_spread     mean and standard deviation of gradient norms, the first quarter left out
    loss_spread           standard deviation over mean of the last quarter's training losses
    seconds               over plain's
    """

    seed: int
    method: str
    final: float
    against: float
    at_equal_tokens: float
    reached: tuple[float, float] | None
    noise_taught: float
    spikes: int
    norm: float
    norm_spread: float
    loss_spread: float
    seconds: float


def runs(recipe: Selection, *, seeds: Sequence[int] | None = None, log: Callable[[str], None] = print) -> list[Run]:
    """All methods with all seeds, or some. Raises TextError where the texts cannot be had, and what `fewer.apply`
    raises."""
    clean, held = _corpus(recipe)
    found = []
    for seed in range(recipe.seeds) if seeds is None else seeds:
        windows, noise = noisy(clean, recipe.noise, recipe.pieces, seed)
        guide, known = None, None
        if any(method.startswith("rho1") for method in recipe.methods):
            order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))
            fifth = clean[order[: len(clean) // 5]]
            guide = _small(recipe, 100 + seed)
            brief = replace(recipe, steps=max(round(recipe.known * recipe.steps), 60), every=1_000_000)
            known = _train(guide, brief, seed, PLAIN, fifth, torch.zeros_like(fifth, dtype=torch.bool), held).final
            guide.eval().requires_grad_(False)
            log(f"seed {seed}: the reference has {known:.3f} nats per held-out token")
        for method in recipe.methods:
            reference = guide if method.startswith("rho1") else None
            one = _train(_small(recipe, seed), recipe, seed, method, windows, noise, held, reference)
            found.append(replace(one, reference=known if reference is not None else None))
            log(f"seed {seed}, {method}: {one.final:.3f}, {one.seconds:.0f} s, {one.noise_taught:.0%} noise taught")
    return found


def summaries(found: Sequence[Run], spike: float = 2.0) -> list[Summary]:
    """Each run held against the plain one of its seed."""
    plain = {one.seed: one for one in found if one.method == PLAIN}
    return [_summary(one, plain[one.seed], spike) for one in found]


def run(options: Mapping[str, Any], out: Path, log: Callable[[str], None]) -> Table:
    """The suite "training". See `OPTIONS`."""
    torch.set_num_threads(options["threads"] or torch.get_num_threads())
    recipe = Selection(data=options["data"], steps=options["steps"], seeds=options["repeats"], held=96, every=10)
    rows = summaries(runs(recipe, log=log), recipe.spike)
    made = passport(recipe)
    notes = (
        "held-out: clean text that nobody trained on; against plain: the same weights and batches, all tokens teach",
        "plain reached at: share of plain's tokens that were read, and that taught, when its last loss was reached",
        f"{made['model']}; {recipe.noise:.0%} of what is trained on is noise; {recipe.steps} steps of "
        f"{recipe.batch * recipe.length} tokens of {recipe.data}, {recipe.seeds} seeds; commit {made['commit']}",
        "short runs of a tiny model: docs/training.md has longer ones",
    )
    return Table(HEADS, table(rows), notes, {"passport": made, "rows": [asdict(row) for row in rows]})


def table(rows: Sequence[Summary]) -> list[list[str]]:
    """A row of text for each method: means over its seeds, with the lowest and the highest where there are several."""
    by: dict[str, list[Summary]] = {}
    for row in rows:
        by.setdefault(row.method, []).append(row)
    lines = []
    for method, mine in by.items():
        reached = [row.reached for row in mine if row.reached is not None]
        lines.append([
            method, _spread([r.final for r in mine], ".3f"), _spread([r.against for r in mine], "+.3f"),
            _spread([r.at_equal_tokens for r in mine], "+.3f"),
            " / ".join(_spread([100 * r[i] for r in reached], ".0f") for i in (0, 1)) if reached else "never",
            _spread([100 * r.noise_taught for r in mine], ".0f"), _spread([r.spikes for r in mine], "g"),
            _spread([r.norm_spread for r in mine], ".3f"), _spread([r.seconds for r in mine], ".2f"),
        ])  # fmt: skip
        if reached and len(reached) < len(mine):
            lines[-1][4] += f" ({len(reached)} of {len(mine)} seeds)"
    return lines


def _spread(values: Sequence[float], form: str) -> str:
    middle = format(statistics.fmean(values), form)
    return middle if len(values) == 1 else f"{middle} ({format(min(values), form)} to {format(max(values), form)})"


def passport(recipe: Selection) -> dict[str, Any]:
    model = _small(recipe, 0)
    return {
        "what": "nats per held-out token of clean text, after equal steps, after equally many tokens that taught",
        "against": "the same weights and batches, all tokens teach",
        "model": f"Llama, {recipe.layers} layers of width {recipe.width}, {recipe.pieces} pieces, "
                 f"{sum(p.numel() for p in model.parameters()):,} parameters, from scratch",
        "recipe": asdict(recipe), "threads": torch.get_num_threads(), "cpu": platform.machine(),
        "torch": torch.__version__, "commit": commit(), "when": now(),
    }  # fmt: skip


def noisy(windows: Tensor, share: float, pieces: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows (W, L) with noise in them, and where it is, (W, L) bool."""
    draw = torch.Generator().manual_seed(seed)
    hit = torch.rand(len(windows), windows.shape[1] // NOISY, generator=draw) < share
    where = hit.repeat_interleave(NOISY, 1)
    return torch.where(where, torch.randint(pieces, windows.shape, generator=draw), windows), where


def _corpus(recipe: Selection) -> tuple[Tensor, Tensor]:
    """(W, L) windows to train on and (held, L) others, in pieces learned from the first."""
    if recipe.data == "eras":
        parts = [list(texts.load("eras", split=split).texts) for split in ("train", "test")]
    else:
        every = list(texts.load("embedded").texts)
        parts = [every[: len(every) * 4 // 5], every[len(every) * 4 // 5 :]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(parts[0], trainers.BpeTrainer(vocab_size=recipe.pieces, show_progress=False))
    rows = []
    for part in parts:
        flat = torch.tensor([piece for one in tokenizer.encode_batch(part) for piece in one.ids])
        rows.append(flat[: len(flat) // recipe.length * recipe.length].view(-1, recipe.length))
    spread = torch.linspace(0, len(rows[1]) - 1, min(recipe.held, len(rows[1]))).long()
    return rows[0], rows[1][spread]


def _small(recipe: Selection, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.pieces, hidden_size=recipe.width, intermediate_size=3 * recipe.width,
            num_hidden_layers=recipe.layers, num_attention_heads=recipe.width // 32,
            num_key_value_heads=recipe.width // 32, max_position_embeddings=recipe.length, tie_word_embeddings=True,
        )
    )  # fmt: skip


def _train(
    model: LlamaForCausalLM, recipe: Selection, seed: int, method: str, windows: Tensor, noise: Tensor, held: Tensor,
    reference: LlamaForCausalLM | None = None,
) -> Run:  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.1, betas=(0.9, 0.95))
    warm = max(recipe.steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / warm, 1.0))
    draw = torch.Generator().manual_seed(seed)
    curve, norms, losses = [], [], []
    taught = wasted = 0
    seconds = 0.0
    chosen = method not in (PLAIN, CLEAN)
    model.train()
    with apply(model, method, guide=reference) if chosen else nullcontext() as session:
        for step in range(1, recipe.steps + 1):
            began = time.thread_time()
            some = torch.randint(len(windows), (recipe.batch,), generator=draw)
            rows, bad = windows[some], noise[some]
            labels = rows.masked_fill(bad, -100) if method == CLEAN else rows
            loss = model(rows, labels=labels).loss
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            losses.append(float(loss.detach()))
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            seconds += time.thread_time() - began
            who = _who(session, labels)
            taught, wasted = taught + int(who.sum()), wasted + int((who & bad[:, 1:]).sum())
            if step % recipe.every == 0 or step == recipe.steps:
                curve.append((step, taught, _held_out(model, held, recipe.batch)))
    return Run(seed, method, curve, norms, losses, wasted / max(taught, 1), seconds)


def _who(session: Any, labels: Tensor) -> Tensor:
    """(B, L - 1) bool: the tokens that taught in the last step, in the place of what they are."""
    if session is None:
        return labels[:, 1:] != -100
    tokens, width = session.last.tokens, labels.shape[1] - 1
    taught = torch.zeros(len(labels), width + 1, dtype=torch.bool)
    return taught.scatter(1, torch.where(tokens.unpadded, tokens.place(), width), True)[:, :width]


@torch.no_grad()
def _held_out(model: LlamaForCausalLM, windows: Tensor, batch: int) -> float:
    """Mean loss in nats of all tokens of clean text; no labels are given, so no method chooses among them."""
    model.eval()
    sums = [
        float(torch.nn.functional.cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()))
        * len(rows)
        for rows in windows.split(2 * batch)
    ]
    model.train()
    return sum(sums) / len(windows)


def _summary(one: Run, plain: Run, spike: float) -> Summary:
    quarter = len(one.norms) // 4
    late = one.losses[-quarter:]
    level = plain.final
    steps, taught = plain.curve[-1][:2]
    step = next(_crossings(one.curve, level, 0), None)
    reached = None if step is None else (step / steps, next(_crossings(one.curve, level, 1)) / taught)
    return Summary(
        one.seed, one.method, one.final, one.final - level, one.final - _at(plain.curve, one.curve[-1][1]), reached,
        one.noise_taught, _spikes(one.norms, spike), statistics.fmean(one.norms[quarter:]),
        statistics.stdev(one.norms[quarter:]), statistics.stdev(late) / statistics.fmean(late),
        one.seconds / plain.seconds,
    )  # fmt: skip


def _spikes(norms: Sequence[float], spike: float) -> int:
    return sum(norms[i] > spike * statistics.median(norms[i - WINDOW : i]) for i in range(WINDOW, len(norms)))


def _crossings(curve: Sequence[tuple[int, int, float]], level: float, axis: int) -> Iterator[float]:
    """Where a curve comes down to a level, on the axis of steps (0) or of tokens that taught (1), straight between the
    points; points at or below the level that follow such a one are none."""
    before = None
    for point in curve:
        if point[2] <= level and (before is None or before[2] > level):
            share = 1.0 if before is None else (before[2] - level) / (before[2] - point[2])
            start = point[axis] if before is None else before[axis]
            yield start + share * (point[axis] - start)
        before = point


def _at(curve: Sequence[tuple[int, int, float]], taught: float) -> float:
    """Nats of a curve when so many tokens had taught, straight between the points."""
    for (_, a, before), (_, b, after) in pairwise(curve):
        if a <= taught <= b:
            return before + (after - before) * (taught - a) / (b - a)
    return curve[-1][2] if taught > curve[-1][1] else curve[0][2]
