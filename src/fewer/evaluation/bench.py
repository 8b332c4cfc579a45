"""The main job: what each method costs and gains on one model and one data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fewer.core import Reducer
from fewer.datasets import images as datasets
from fewer.models import zoo
from fewer.runtime.apply import apply
from fewer.runtime.costs import Entry, Ledger
from fewer.runtime.modules import UNTRAINED, ModulesError
from fewer.runtime.session import Session
from fewer.spec import parse, text

from . import record, stats
from .calibrate import calibrate
from .memory import peak_bytes
from .record import Journal, Passport, Row
from .settings import RANDOM, UNREDUCED, split_forms
from .stats import Interval
from .subject import Subject

WHAT = "one forward pass of a batch; answers on n items"
AGAINST = "the same weights, all tokens, fused attention"
SPREAD = (
    "quartiles of the ratios of interleaved runs (A B B A); 95 % intervals for shares: Wilson; paired: Bonett, Price"
)
FILE = "results.jsonl"

Picture = Callable[[Session, Subject, Path], "str | None"]


@dataclass(frozen=True)
class Settings:
    """What to measure and how.

    methods    text forms; empty = the default list
    tokens     calibrate every method to this mean number of tokens per block
    limit      images, a class-balanced draw where the classes allow it; 0 = all
    repeats    timed comparisons, two runs of each model in each; threads: torch threads, 0 leaves them;
               one is timed by its own clock, which other work on the machine does not disturb
    layer      read features of this block instead of class scores
    """

    model: str = "vit-fashion"
    data: str = "embedded"
    methods: tuple[str, ...] = ()
    tokens: float | None = None
    batch: int = 32
    device: str = "cpu"
    dtype: str = "float32"
    repeats: int = 4
    limit: int = 1000
    seed: int = 0
    threads: int = 1
    layer: int | None = None
    execution: Literal["padded", "packed"] = "packed"

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("repeats", 1), ("limit", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: give at least {least}")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype={self.dtype!r} is not a torch dtype; float32, bfloat16 or float16")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device={self.device!r}, but torch sees no CUDA device here")


class Watch:
    """What a run tells whoever looks on. Nothing, unless overridden."""

    def begin(self, subject: Any, rows: int) -> None: ...
    def row(self, method: str, batches: int) -> None: ...
    def batch(self) -> None: ...
    def done(self, row: Row, resumed: bool) -> None: ...


def load(settings: Settings, loaded: tuple[nn.Module, Any] | None = None) -> Subject:
    """The model and the data of some settings. loaded: a model and its processor, instead of loading what they name."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    dtype, device = getattr(torch, settings.dtype), torch.device(settings.device)
    model, processor = zoo.load_model(settings.model) if loaded is None else loaded
    model = model.to(device=device, dtype=dtype)
    data = draw(datasets.load(settings.data), settings.limit, settings.seed)
    return Subject(model, processor, data, settings.model, settings.batch, settings.layer, device=device, dtype=dtype)


def draw(data: datasets.ImageSet, limit: int, seed: int) -> datasets.ImageSet:
    """`limit` images without replacement, balanced over the classes where that is possible; 0 = all."""
    if not 0 < limit < len(data):
        return data
    try:
        return data.stratified(limit, seed=seed)
    except datasets.DataError:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        return data.take(order[:limit].sort().values)


def run(settings: Settings, out: Path, *, watch: Watch | None = None, picture: Picture | None = None,
        subject: Subject | None = None) -> list[Row]:  # fmt: skip
    """Measure everything, the unreduced model first. Returns the rows in order; each is in `out/results.jsonl` by then.

    Rows already there with the same settings, at the same commit and on the same hardware, are not measured again.
    A method that does not work on this model becomes a row with an error; the others go on.
    picture    called with each method's session still on; returns the file it drew, if any
    subject    what to measure, instead of loading what settings name
    Raises   ValueError for settings, ModelError, DataError, HostError, UnknownMethod, SpecError: before anything runs.
    """
    watch = watch or Watch()
    subject = load(settings) if subject is None else subject
    methods = _methods(settings, subject)
    journal = Journal(out / FILE)
    watch.begin(subject, 1 + len(methods))
    bench = _Bench(settings, subject, watch)
    rows = []
    draw = None if picture is None else lambda session: picture(session, subject, out)
    for reducer, form in ((None, UNREDUCED), *methods.items()):
        key = bench.key(reducer)
        row = journal.done(key)
        resumed = row is not None
        if row is None:
            watch.row(form, subject.batches)
            row = bench.row(key, form, reducer, draw)
            journal.add(row)
        rows.append(row)
        watch.done(row, resumed)
    return rows


def _methods(settings: Settings, subject: Subject) -> dict[Reducer, str]:
    """What to measure, each with the text form it goes by: as written, else the shortest."""
    forms = split_forms(list(settings.methods)) or subject.default_methods()
    methods = {parse(form): form for form in forms}
    if settings.tokens is None:
        return methods
    grid, images = subject.grid, subject.pixels(0)
    found = [calibrate(m, subject.model, target_tokens=settings.tokens, grid=grid, images=images) for m in methods]
    return {method: text(method) for method in found}


class _Bench:
    """The parts of one run that its rows share."""

    def __init__(self, settings: Settings, subject: Subject, watch: Watch) -> None:
        self.settings, self.subject, self.watch = settings, subject, watch
        self.threads = torch.get_num_threads()
        self.hardware = record.hardware(subject.device)
        padded = not subject.host.packs
        self.execution: Literal["padded", "packed"] = "padded" if padded else settings.execution
        self._reference: Tensor | None = None
        # One thread: CPU time of this thread, which others on the machine do not disturb.
        alone = self.threads == 1 and subject.device.type == "cpu"
        self._clock = time.thread_time if alone else time.perf_counter

    def key(self, reducer: Reducer | None) -> str:
        method = UNREDUCED if reducer is None else repr(reducer)
        chosen = replace(self.settings, methods=(), tokens=None, threads=self.threads, execution=self.execution)
        return record.key(method=method, settings=str(chosen), commit=record.commit(), hardware=self.hardware)

    @property
    def passport(self) -> Passport:
        s, subject = self.settings, self.subject
        return Passport(
            WHAT, AGAINST, subject.name, subject.data.name, len(subject.data), s.repeats, SPREAD, s.batch,
            str(subject.device), s.dtype, self.threads, self.execution, s.seed, self.hardware, record.versions(),
            record.commit(), record.now(), subject.unit,
        )  # fmt: skip

    def reference(self) -> Tensor:
        """The unreduced model's answers, (N, classes or C)."""
        if self._reference is None:
            self._reference = torch.cat([self._answer(self.subject.model, x) for _, x in self.subject])
        return self._reference

    def row(self, key: str, form: str, reducer: Reducer | None, picture: Callable[[Session], str | None] | None) -> Row:
        row = Row(key, form, self.passport, score=self.subject.score)
        try:
            with torch.inference_mode():
                return self._measured(row, reducer, picture)
        except Exception as error:  # whatever one method does wrong, the others are still measured
            row.error = f"{type(error).__name__}: {error}".splitlines()[0]
            return row

    def _measured(self, row: Row, reducer: Reducer | None, picture: Callable[[Session], str | None] | None) -> Row:
        subject = self.subject
        reference = self.reference()
        with ExitStack() as stack:
            session = None
            row.code = subject.call
            if reducer is not None:
                row.acts = reducer.card.acts
                session, row.trained = self._applied(reducer)
                stack.enter_context(session)
                extra = f', modules="{UNTRAINED}"' if row.trained == UNTRAINED else ""
                row.code = f'fewer.apply(model, "{row.method}"{extra})'
            torch.manual_seed(self.settings.seed)
            answers = self._timed_pass(row, session)
            row.peak = peak_bytes(lambda: subject.forward(subject.twin, subject.pixels(0)), subject.device)
            if session is not None and picture is not None:
                row.picture = picture(session)
        hits = subject.hits(answers)
        row.n, row.hits = len(hits), stats.pack_hits(hits)
        row.accuracy = stats.share(hits)
        if not answers.isfinite().all():
            row.notes.append("some answers are not finite; they count as wrong")
        if reducer is not None:
            row.difference = stats.paired_difference(hits, subject.hits(reference))
        if subject.classifies:
            row.agreement, row.kl = stats.agreement(answers, reference), _finite(stats.kl(reference, answers))
        else:
            row.movement = _finite(stats.movement(answers, reference))
        return row

    def _applied(self, reducer: Reducer) -> tuple[Session, str]:
        twin = self.subject.twin
        try:
            session = apply(twin, reducer, execution=self.execution)
            return session, "packaged" if len(list(session.modules.parameters())) else ""
        except ModulesError:
            return apply(twin, reducer, execution=self.execution, modules=UNTRAINED), UNTRAINED

    # -- one pass over the data --------------------------------------------------------------------------------
    def _timed_pass(self, row: Row, session: Session | None) -> Tensor:
        """All answers; a few batches, spread over the pass, are run by the unreduced model too, and both are timed."""
        subject, answers = self.subject, []
        timed = set(self._timed_batches())
        plain: list[float] = []
        reduced: list[float] = []
        own: list[float] = []
        cost = _Cost(subject)
        for model in (subject.model, subject.twin):  # warm up
            self._answer(model, subject.pixels(0))
        for index, pixels in subject:
            if index in timed:
                answers.append(self._compared(pixels, plain, reduced))
                if session is not None and session.ledger.seconds and session.ledger.own_seconds is not None:
                    own.append(session.ledger.own_seconds / session.ledger.seconds)
            else:
                answers.append(self._answer(subject.twin, pixels))
            if session is not None:
                cost.add(session, subject.size(index))
            self.watch.batch()
        while len(plain) < self.settings.repeats:
            self._compared(subject.pixels(len(plain) % subject.batches), plain, reduced)
        cost.write(row)
        row.speedup = stats.ratios(plain, reduced)
        row.milliseconds = 1e3 * float(np.median(reduced)) / min(self.settings.batch, len(subject.data))
        row.own_time = float(np.median(own)) if own else None
        return torch.cat(answers)

    def _timed_batches(self) -> Sequence[int]:
        """Full batches, evenly spread, the first left out where there are others."""
        subject = self.subject
        full = len(subject.data) // subject.batch
        candidates = range(1, full) if full > 1 else range(full)
        count = min(self.settings.repeats, len(candidates))
        return [candidates[i * len(candidates) // count] for i in range(count)]

    def _compared(self, pixels: Tensor, plain: list[float], reduced: list[float]) -> Tensor:
        """Both models on one batch in the order A B B A, so that what grows with time cancels; seconds of each.

        A is the unreduced model in every other comparison. Returns the reduced answers.
        """
        subject = self.subject
        turns = [subject.model, subject.twin] if len(plain) % 2 else [subject.twin, subject.model]
        spent = {id(model): 0.0 for model in turns}
        answers: dict[int, Tensor] = {}
        for model in (*turns, *reversed(turns)):
            began = self._now()
            answers[id(model)] = self._answer(model, pixels)
            spent[id(model)] += (self._now() - began) / 2
        plain.append(spent[id(subject.model)])
        reduced.append(spent[id(subject.twin)])
        return answers[id(subject.twin)]

    def _answer(self, model: torch.nn.Module, pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.subject.answer(model, pixels).float().cpu()

    def _now(self) -> float:
        if self.subject.device.type == "cuda":
            torch.cuda.synchronize(self.subject.device)
        return self._clock()


class _Cost:
    """Mean cost over the images of a pass; without a session, that of the unreduced model."""

    def __init__(self, subject: Subject) -> None:
        self.host, self.subject = subject.host, subject
        self.images = 0
        self.sums = np.zeros(5)
        self.counts = np.zeros(len(self.host.blocks))
        self.notes: dict[str, None] = {}

    def add(self, session: Session, images: int) -> None:
        counts = session.counts
        per_layer = np.asarray(counts, float) if isinstance(counts, list) else counts.double().mean(1).cpu().numpy()
        self._add(session.ledger, per_layer, images)

    def _add(self, ledger: Ledger, per_layer: np.ndarray, images: int) -> None:
        self.counts += images * per_layer
        self.sums += images * np.array(
            [ledger.mean_tokens, ledger.gflops, ledger.gflops_own, ledger.gflops_model, ledger.gflops_full]
        )
        self.images += images
        self.notes |= dict.fromkeys(ledger.notes)

    def write(self, row: Row) -> None:
        subject, blocks = self.subject, len(self.counts)
        lengths = [subject.length(index) for index in range(subject.batches)]
        sizes = [subject.size(index) for index in range(subject.batches)]
        if not self.images:
            for n, size in zip(lengths, sizes, strict=True):
                self._add(Ledger.of(self.host, [Entry(n, n)] * blocks, n, 0), np.full(blocks, n), size)
        row.tokens, row.gflops, row.gflops_own, model, full = (self.sums / self.images).tolist()
        row.ceiling = full / model
        row.counts = [round(c, 3) for c in (self.counts / self.images).tolist()]
        row.final, row.tokens_full = row.counts[-1], round(np.average(lengths, weights=sizes))
        row.notes.extend(self.notes)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def against_random(row: Row, rows: Sequence[Row], *, within: float = 0.05) -> Interval | None:
    """Accuracy minus that of random choice at the same tokens (nearest, within 5 %), paired on the same items.

    None where there is no such random row, or the row is one itself.
    """
    rivals = [r for r in rows if r.name in RANDOM and not r.error and r.n == row.n]
    if row.error or row.method == UNREDUCED or row.name in RANDOM or not rivals or not row.n:
        return None
    rival = min(rivals, key=lambda r: abs(r.tokens - row.tokens))
    if abs(rival.tokens - row.tokens) > within * rival.tokens:
        return None
    return stats.paired_difference(stats.unpack_hits(row.hits, row.n), stats.unpack_hits(rival.hits, row.n))
