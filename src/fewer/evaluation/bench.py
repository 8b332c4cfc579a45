"""The main job: what each method costs and gains on one model and one data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from fewer.core import Reducer
from fewer.datasets import images as datasets
from fewer.models import zoo
from fewer.runtime.costs import Entry, Ledger
from fewer.runtime.session import Session
from fewer.spec import parse, text

from . import stats
from .calibrate import calibrate
from .memory import peak_bytes
from .record import Passport, Row
from .runner import FILE, Runner, Watch, with_control
from .settings import RANDOM, UNREDUCED, split_forms
from .settings import Settings as Common
from .stats import Interval
from .subject import Subject, class_names

__all__ = ["FILE", "EncoderSettings", "Settings", "Watch", "against_random", "draw", "load", "rival", "run"]

Picture = Callable[[Session, Subject, Path], "str | None"]


@dataclass(frozen=True)
class EncoderSettings(Common):
    """What to measure and how, for models that take a batch in one pass.

    tokens     calibrate every method to this mean number of tokens per block
    execution  of samples with different counts
    limit      items, of images a class-balanced draw where the classes allow it; 0 = all
    """

    tokens: float | None = None
    batch: int = 32
    execution: Literal["padded", "packed"] = "packed"
    LEAST: ClassVar = {**Common.LEAST, "batch": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.execution not in ("padded", "packed"):
            raise ValueError(f"execution={self.execution!r}: packed or padded")


@dataclass(frozen=True)
class Settings(EncoderSettings):
    """The same for images. layer: read features of this block, from 0, instead of class scores."""

    layer: int | None = None


def load(settings: Settings, loaded: tuple[nn.Module, Any] | None = None) -> Subject:
    """The model and the data of some settings. loaded: a model and its processor, instead of loading what they name."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    dtype, device = settings.torch_dtype, torch.device(settings.device)
    data = draw(datasets.load(settings.data), settings.limit, settings.seed).readable()
    model, processor = zoo.load_model(settings.model) if loaded is None else loaded
    model = model.to(device=device, dtype=dtype)
    told = [_skipped(data)] if data.skipped else []
    if settings.layer is None:
        data, more = labelled(data, model)
        told += more
    return Subject(
        model, processor, data, settings.model, settings.batch, settings.layer, device=device, dtype=dtype, notes=told
    )


def labelled(data: datasets.ImageSet, model: nn.Module) -> tuple[datasets.ImageSet, list[str]]:
    """The pictures with the labels of the model's head, matched by name, and what must be said about that.

    Where the head's names say nothing (LABEL_0, ...), folder k is class k if there are as many, and that is said.
    Raises   DataError where there are as many classes, and only some of the names match.
    """
    names = class_names(model)
    if not names or data.classes == tuple(names.values()):
        return data, []
    whole = {_plain(name): k for k, name in names.items()}
    listed = Counter(alias for name in names.values() for alias in _aliases(name))
    ids = {alias: k for k, name in names.items() for alias in _aliases(name) if listed[alias] == 1} | whole
    numbered = all(name.isdecimal() and int(name) in names for name in data.classes)
    found = [int(name) if numbered else ids.get(_plain(name)) for name in data.classes]
    if None not in found and len(set(found)) == len(found):
        labels = torch.tensor(found)[data.labels]
        return replace(data, labels=labels, classes=tuple(names[k] for k in sorted(names))), []
    if len(names) != len(data.classes):
        said = f"the model's {len(names)} classes are not the {len(data.classes)} of {data.name}"
        return data, [f"{said}: nearest neighbours are asked instead"]
    strange = [name for name, k in zip(data.classes, found, strict=True) if k is None]
    if len(strange) < len(data.classes):
        raise datasets.DataError(
            f"{data.name}: of its {len(data.classes)} classes, {_listed(strange)} are none of the model's "
            f"({_listed(list(names.values()))}); rename the folders as the model's config.id2label says, or give "
            "--layer"
        )
    said = f"class k of {data.name} is taken for the model's class k, as the names say nothing"
    return data, [f"labels by order: {said} ({_listed(list(names.values()))})"]


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _aliases(name: str) -> set[str]:
    """A class's name, and each of those it lists: ImageNet has "tench, Tinca tinca".

    >>> sorted(_aliases("tench, Tinca_tinca"))
    ['tench', 'tench, tinca tinca', 'tinca tinca']
    """
    return {_plain(name), *(_plain(part) for part in name.split(","))}


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _skipped(data: datasets.ImageSet) -> str:
    """How many pictures could not be read, and which."""
    of = len(data) + len(data.skipped)
    return f"{len(data.skipped)} of {of:,} pictures could not be read and were left out: {_listed(data.skipped)}"


def draw(data: datasets.ImageSet, limit: int, seed: int) -> datasets.ImageSet:
    """`limit` images without replacement, balanced over the classes where that is possible; 0 = all."""
    if not 0 < limit < len(data):
        return data
    try:
        return data.stratified(limit, seed=seed)
    except datasets.DataError:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        return data.take(order[:limit].sort().values)


def run(settings: EncoderSettings, out: Path, *, watch: Watch | None = None, picture: Picture | None = None,
        subject: Subject | None = None) -> list[Row]:  # fmt: skip
    """Measure everything, the unreduced model first; see `Runner.run`.

    picture    called with each method's session still on; returns the file it drew, if any
    subject    what to measure, instead of loading what settings name
    Raises   ValueError for settings, ModelError, DataError, HostError, UnknownMethod, SpecError, JournalError: before
             anything runs.
    """
    if subject is None:
        assert isinstance(settings, Settings), "texts need their subject"
        subject = load(settings)
    return _Bench(settings, subject, watch, picture).run(with_control(_methods(settings, subject)), out)


def _methods(settings: EncoderSettings, subject: Subject) -> dict[Reducer, str]:
    """What to measure, each with the text form it goes by: as written, else the shortest."""
    forms = split_forms(list(settings.methods)) or subject.default_methods(all=settings.all)
    methods = {parse(form): form for form in forms}
    if settings.tokens is None:
        return methods
    grid, images = subject.grid, subject.pixels(0)
    found = [calibrate(m, subject.model, target_tokens=settings.tokens, grid=grid, images=images) for m in methods]
    return {method: text(method) for method in found}


class _Bench(Runner):
    WHAT = "one forward pass of a batch; answers on n items"
    AGAINST = "the same weights, all tokens, fused attention"
    SPREAD = (
        "quartiles of the ratios of interleaved runs (A B B A); 95 % intervals for shares: Wilson; paired: Bonett, "
        "Price"
    )
    settings: EncoderSettings
    subject: Subject

    def __init__(
        self, settings: EncoderSettings, subject: Subject, watch: Watch | None, picture: Picture | None
    ) -> None:
        super().__init__(settings, subject, watch)
        self.picture, self.score, self.batches = picture, subject.score, subject.batches
        packs = subject.host.packs
        self.execution: Literal["padded", "packed"] = settings.execution if packs else "padded"
        self._reference: Tensor | None = None

    @property
    def chosen(self) -> EncoderSettings:
        return replace(cast(EncoderSettings, super().chosen), tokens=None, execution=self.execution)

    @property
    def passport(self) -> Passport:
        s = self.subject
        return self.stamped(s.data.name, len(s.data), self.settings.batch, self.execution, s.unit, s.notes)

    def reference(self) -> Tensor:
        """The unreduced model's answers, (N, classes or C)."""
        if self._reference is None:
            self._reference = torch.cat([self._answer(self.subject.model, x) for _, x in self.subject])
        return self._reference

    def measured(self, row: Row, form: str, method: Reducer | None) -> Row:
        subject = self.subject
        reference = self.reference()
        with ExitStack() as stack:
            session = None
            row.code = subject.call
            if method is not None:
                session = stack.enter_context(self.applied(row, subject.twin, method, execution=self.execution))
            torch.manual_seed(self.settings.seed)
            answers = self._timed_pass(row, session)
            row.cost.peak = peak_bytes(lambda: subject.forward(subject.twin, subject.pixels(0)), subject.device)
            if session is not None and self.picture is not None:
                row.picture = self.picture(session, subject, self.out)
        hits = subject.hits(answers)
        row.n, row.hits = len(hits), stats.pack_hits(hits)
        row.accuracy = stats.share(hits)
        if not answers.isfinite().all():
            row.notes.append("some answers are not finite; they count as wrong")
        if method is not None:
            row.difference = stats.paired_difference(hits, subject.hits(reference))
        if subject.classifies:
            row.agreement, row.kl = stats.agreement(answers, reference), _finite(stats.kl(reference, answers))
        else:
            row.movement = _finite(stats.movement(answers, reference))
        return row

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
            began = self.now()
            answers[id(model)] = self._answer(model, pixels)
            spent[id(model)] += (self.now() - began) / 2
        plain.append(spent[id(subject.model)])
        reduced.append(spent[id(subject.twin)])
        return answers[id(subject.twin)]

    def _answer(self, model: torch.nn.Module, pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.subject.answer(model, pixels).float().cpu()


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
        row.tokens, row.cost.gflops, row.cost.gflops_own, model, full = (self.sums / self.images).tolist()
        row.cost.ceiling = full / model
        row.counts = [round(c, 3) for c in (self.counts / self.images).tolist()]
        row.final, row.tokens_full = row.counts[-1], round(np.average(lengths, weights=sizes))
        row.notes.extend(self.notes)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def rival(row: Row, rows: Sequence[Row], *, within: float = 0.05) -> Row | None:
    """The random row at the same tokens (the nearest, within 5 %), on as many items; None where there is none, or the
    row is no method's, or one itself."""
    rivals = [r for r in rows if r.name in RANDOM and not r.error and r.n == row.n]
    if row.error or row.method == UNREDUCED or row.name in RANDOM or not rivals or not row.n:
        return None
    nearest = min(rivals, key=lambda r: abs(r.tokens - row.tokens))
    return nearest if abs(nearest.tokens - row.tokens) <= within * nearest.tokens else None


def against_random(row: Row, rows: Sequence[Row], *, within: float = 0.05, among: int = 1) -> Interval | None:
    """Accuracy minus that of random choice at the same tokens, paired on the same items; None without a `rival`.

    among: how many comparisons the 95 % are to hold for at once (Bonferroni)."""
    other = rival(row, rows, within=within)
    if other is None:
        return None
    hits = (stats.unpack_hits(r.hits, r.n) for r in (row, other))
    return stats.paired_difference(*hits, among=among)
