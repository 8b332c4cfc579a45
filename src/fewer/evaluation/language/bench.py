"""What each method costs and gains on a language model: the same contexts, questions and clocks for all of them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fewer.core import Reducer
from fewer.datasets import texts
from fewer.evaluation import stats
from fewer.evaluation.record import Cost, Passport, Row, Score, Writing
from fewer.evaluation.runner import Runner, Watch, with_control
from fewer.evaluation.settings import UNREDUCED, cache_methods, split_forms
from fewer.evaluation.settings import Settings as Common
from fewer.models import zoo
from fewer.runtime.costs import CacheLedger, Ledger
from fewer.spec import parse

from .subject import Held, LanguageSubject
from .tasks import DEFAULT, Context, Maker, Material, Outcome, TaskError, distinct, repetition

BLOCK = 8  # decoding steps one model writes before it is the other's turn
FAULT = "fault: "  # how a note begins that says a number cannot be trusted
SPAN = 16  # words of the book that count as one item of the bootstrap: neighbours resemble each other


@dataclass(frozen=True)
class Settings(Common):
    """What to measure and how.

    data       the book: one of `texts.BOOKS`; questions are those of `texts.paragraphs()`
    tasks      some of `tasks.TASKS`
    context    tokens of a context
    limit      contexts of the book, and half as many of paragraphs
    horizon    tokens of the book that are foretold behind a context
    steps      tokens written behind a context
    repeats    contexts that the unreduced model reads and writes behind, too, and both are timed
    """

    model: str = "smollm2-135m"
    data: str = "moby-dick"
    repeats: int = 2
    limit: int = 2
    tasks: tuple[str, ...] = DEFAULT
    context: int = 1024
    horizon: int = 128
    steps: int = 32
    LEAST: ClassVar = {**Common.LEAST, "limit": 1, "horizon": 1, "steps": 2}


def load(settings: Settings, loaded: tuple[nn.Module, Any] | None = None, material: Material | None = None
         ) -> LanguageSubject:  # fmt: skip
    """The model and the contexts of some settings.

    loaded     a model and its tokenizer, instead of loading what settings name; material: texts likewise
    Raises     ModelError, TextError, TaskError.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    dtype, device = settings.torch_dtype, torch.device(settings.device)
    model, tokenizer = loaded if loaded is not None else zoo.load_model(settings.model)
    model = model.to(device=device, dtype=dtype).eval()
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    behind = max(settings.horizon, settings.steps) + 64
    if longest is not None and settings.context + behind > longest:
        raise TaskError(
            f"context={settings.context}: {settings.model} was made for {longest} tokens, and up to {behind} follow a "
            f"context; give at most {longest - behind}"
        )
    if material is None:
        paragraphs = texts.paragraphs() if "qa" in settings.tasks else ()
        material = Material(settings.data, texts.book(settings.data), paragraphs)
    maker = Maker(
        tokenizer, material, settings.context, horizon=settings.horizon, limit=settings.limit, seed=settings.seed
    )
    contexts = maker.contexts(settings.tasks)
    return LanguageSubject(model, tokenizer, contexts, settings.model, material.name, device)


def run(settings: Settings, out: Path, *, watch: Watch | None = None, subject: LanguageSubject | None = None
        ) -> list[Row]:  # fmt: skip
    """Measure everything, the unreduced model first; see `Runner.run`.

    Raises   ValueError for settings, ModelError, TaskError, UnknownMethod, SpecError, JournalError: before anything
             runs.
    """
    forms = split_forms(list(settings.methods)) or cache_methods(all=settings.all)
    methods = {parse(form): form for form in forms}
    subject = load(settings) if subject is None else subject
    return _Bench(settings, subject, watch).run(with_control(methods), out)


@dataclass
class _Written:
    """What the two models wrote behind the timed contexts, and what that took."""

    plain: list[float] = field(default_factory=list)  # seconds per block of steps
    reduced: list[float] = field(default_factory=list)
    plain_texts: list[list[int]] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    end: list[Held] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    full: list[int] = field(default_factory=list)


class _Bench(Runner):
    WHAT = (
        "contexts are read once with the method on; every question and the book's next words are then read on a copy "
        "of what was kept, so no method knows what will be asked; question and answer are one pass"
    )
    AGAINST = "the same weights and the same tokens, nothing evicted, fused attention"
    SPREAD = (
        "quartiles of the ratios of interleaved runs (A B B A); 95 % intervals for shares: Wilson; paired: Bonett, "
        "Price; for means: bootstrap over items"
    )
    score = "answers right"
    settings: Settings
    subject: LanguageSubject

    def __init__(self, settings: Settings, subject: LanguageSubject, watch: Watch | None) -> None:
        super().__init__(settings, subject, watch)
        self.batches = len(subject.contexts)
        self._reference: dict[tuple[int, int], Outcome] = {}

    @property
    def passport(self) -> Passport:
        subject = self.subject
        asked = sum(len(context.probes) for context in subject.contexts)
        data = f"{subject.data}: {len(subject.contexts)} contexts of up to {self.settings.context} tokens"
        return self.stamped(data, asked, 1, "padded", "questions", [])

    def measured(self, row: Row, form: str, method: Reducer | None) -> Row:
        subject = self.subject
        subject.tokenwise, row.writing = False, Writing()
        with ExitStack() as stack:
            session = None
            row.code = "model.generate(**inputs)"
            if method is not None:
                session = stack.enter_context(self.applied(row, subject.twin, method))
            torch.manual_seed(self.settings.seed)
            outcomes = self._pass(row, row.writing, session)
        if method is None:
            self._reference = outcomes
        for index, context in enumerate(subject.contexts):  # what was measured in an earlier run and is not kept
            if any((index, i) not in self._reference for i in range(len(context.probes))):
                cache, behind = subject.read(subject.model, context.ids)
                for i, probe in enumerate(context.probes):
                    self._reference[index, i] = subject.ask(subject.model, cache, behind, probe)
        self._score(row, outcomes, compared=method is not None)
        if subject.tokenwise:
            row.notes.append(
                "answers were read token by token: this method leaves out rows inside a pass, and what is left out "
                "foretells nothing"
            )
        return row

    # -- one pass over the contexts ------------------------------------------------------------------------------
    def _pass(self, row: Row, wrote: Writing, session: Any) -> dict[tuple[int, int], Outcome]:
        """All outcomes. The first few contexts are read by the unreduced model too, and both are timed."""
        subject, repeats = self.subject, self.settings.repeats
        outcomes: dict[tuple[int, int], Outcome] = {}
        held: list[Held] = []
        plain: list[float] = []
        reduced: list[float] = []
        own: list[float] = []
        written = _Written()
        for model in (subject.model, subject.twin):  # warm up
            subject.read(model, subject.contexts[0].ids[:32])
        for index, context in enumerate(subject.contexts):
            timed = index < repeats
            rival = None
            if timed and index % 2:
                rival = self._read(subject.model, context, plain)
            began = time.perf_counter()
            cache, behind = self._read(subject.twin, context, reduced if timed else [])
            wall = time.perf_counter() - began
            held.append(Held.of(cache))
            if session is not None:
                spent = self._session_facts(row, session.ledger)
                own += [] if spent is None else [spent / wall]
            for i, probe in enumerate(context.probes):
                outcomes[index, i] = subject.ask(subject.twin, cache, behind, probe, session)
            if timed:
                if rival is None:
                    rival = self._read(subject.model, context, plain)
                if context.request is not None:
                    self._write(context, rival[0], cache, session, written)
            self.watch.batch()
        layers = np.mean([h.rows for h in held], axis=0)
        row.counts = [round(x, 3) for x in layers.tolist()]
        row.tokens, row.final = float(layers.mean()), row.counts[-1]
        row.tokens_full = max(h.seen for h in held)
        wrote.kv_read = float(np.mean([h.bytes for h in held]))
        wrote.first, wrote.first_ratio = float(np.median(reduced)), stats.ratios(plain, reduced)
        row.own_time = float(np.median(own)) if own else None
        if written.plain:
            self._note_written(row, wrote, written)
        return outcomes

    @staticmethod
    def _session_facts(row: Row, ledger: Ledger | CacheLedger) -> float | None:
        """Operations and notes of a reading, as far as the session counts them. Returns the method's own seconds."""
        row.notes = list(dict.fromkeys([*row.notes, *ledger.notes]))
        if isinstance(ledger, CacheLedger):
            row.cost = Cost(gflops_own=ledger.flops / 1e9)
            return ledger.seconds
        row.cost = Cost(ledger.gflops, ledger.gflops_own, ledger.ceiling)
        return ledger.own_seconds

    def _read(self, model: nn.Module, context: Context, seconds: list[float]) -> tuple[Any, Tensor]:
        """A context read by one model; what that took is appended."""
        began = self.now()
        found = self.subject.read(model, context.ids)
        seconds.append(self.now() - began)
        return found

    def _write(self, context: Context, plain: Any, reduced: Any, session: Any, written: _Written) -> None:
        """Both models write greedily behind a context, in turns of a few steps: A B B A, so that drift cancels."""
        subject, steps = self.subject, self.settings.steps
        assert context.request is not None
        models = {0: subject.model, 1: subject.twin}
        caches = {0: plain, 1: copy.deepcopy(reduced)}
        texts: dict[int, list[int]] = {}
        for side in (0, 1):
            behind = subject.go_on(models[side], caches[side], context.request, 1)
            texts[side] = [int(behind.argmax(-1))]
        seconds: dict[int, list[float]] = {0: [], 1: []}
        turn = 0
        while len(texts[1]) < steps:
            count = min(BLOCK, steps - len(texts[1]))
            for side in ((0, 1), (1, 0))[turn % 2]:
                began = self.now()
                for _ in range(count):
                    behind = subject.go_on(models[side], caches[side], texts[side][-1:], 1)
                    texts[side].append(int(behind.argmax(-1)))
                seconds[side].append((self.now() - began) / count)
            turn += 1
        written.plain += seconds[0]
        written.reduced += seconds[1]
        written.plain_texts.append(self._ended(texts[0]))
        written.texts.append(self._ended(texts[1]))
        end, whole = Held.of(caches[1]), Held.of(caches[0]).bytes
        written.end.append(end)
        ledger = None if session is None else session.ledger
        counted = (ledger.peak_bytes, ledger.full_bytes) if isinstance(ledger, CacheLedger) else (end.bytes, whole)
        written.peak.append(counted[0])
        written.full.append(counted[1])

    def _ended(self, tokens: list[int]) -> list[int]:
        """Tokens up to and with the first one that ends a text."""
        stop = next((i for i, token in enumerate(tokens) if token in self.subject.ends), len(tokens) - 1)
        return tokens[: stop + 1]

    def _note_written(self, row: Row, wrote: Writing, written: _Written) -> None:
        row.speedup = stats.ratios(written.plain, written.reduced)
        wrote.decoding = 1 / float(np.median(written.reduced))
        row.milliseconds = 1e3 / wrote.decoding
        wrote.kv_peak, wrote.kv_end, wrote.kv_full = (
            float(np.mean(x)) for x in (written.peak, [h.bytes for h in written.end], written.full)
        )
        wrote.sample = self.subject.text(written.texts[0])
        compared = row.method != UNREDUCED
        for task, measure in (("repetition", repetition), ("distinct-2", distinct)):
            ours = [measure(text) for text in written.texts]
            theirs = [measure(text) for text in written.plain_texts]
            change = stats.mean([a - b for a, b in zip(ours, theirs, strict=True)]) if compared else None
            row.scores.append(Score(task, stats.mean(ours), change, len(ours)))
        ends = np.array([text[-1] in self.subject.ends for text in written.texts])
        ends_plain = np.array([text[-1] in self.subject.ends for text in written.plain_texts])
        change = stats.paired_difference(ends, ends_plain) if compared else None
        row.scores.append(Score("stops", stats.share(ends), change, len(ends)))

    # -- scores --------------------------------------------------------------------------------------------------
    def _score(self, row: Row, outcomes: dict[tuple[int, int], Outcome], *, compared: bool) -> None:
        """Everything the outcomes say, task by task, paired with the unreduced model's."""
        places: dict[str, list[tuple[int, int]]] = {}
        for place in sorted(outcomes):
            places.setdefault(self._probe(place).task, []).append(place)
        scores: list[Score] = []
        judged: list[tuple[int, int]] = []
        for task, found in places.items():
            ours, theirs = [outcomes[p] for p in found], [self._reference[p] for p in found]
            kind = self._probe(found[0]).kind
            if kind == "text":
                scores.append(_perplexity(task, ours, theirs, compared))
                self._judge(row, scores[-1], ours)
                self._likeness(row, ours, theirs)
                continue
            if kind == "copy":
                a, b = ([o.value for o in side] for side in (ours, theirs))
                change = stats.mean([x - y for x, y in zip(a, b, strict=True)]) if compared else None
                scores.append(Score(task, stats.mean(a), change, len(a)))
                continue
            judged += found
            hits, known = (np.array([o.value == 1 for o in side]) for side in (ours, theirs))
            change = stats.paired_difference(hits, known) if compared else None
            scores.append(Score(task, stats.share(hits), change, len(hits)))
            a, b = ([o.nats.mean().item() for o in side] for side in (ours, theirs))
            moved = stats.mean([x - y for x, y in zip(a, b, strict=True)]) if compared else None
            scores.append(Score(f"{task} nats", stats.mean(a), moved, len(a)))
        row.scores = [*scores, *row.scores]
        assert row.writing is not None
        row.writing.sweep = self._sweep(outcomes, [p for p in judged if self._probe(p).kind == "exact"])
        row.n = len(judged)
        if judged:
            hits, known = (np.array([side[p].value == 1 for p in judged]) for side in (outcomes, self._reference))
            row.hits, row.accuracy = stats.pack_hits(hits), stats.share(hits)
            row.difference = stats.paired_difference(hits, known) if compared else None
        if any(not torch.isfinite(o.nats).all() for o in outcomes.values()):
            row.notes.append("some answers are not finite; they count as wrong")

    def _probe(self, place: tuple[int, int]) -> Any:
        return self.subject.contexts[place[0]].probes[place[1]]

    def _sweep(self, outcomes: dict[tuple[int, int], Outcome], places: Sequence[tuple[int, int]]
               ) -> list[tuple[float, float, int]]:  # fmt: skip
        """What was found by where it stood: (depth, share, needles)."""
        by: dict[float, list[float]] = {}
        for place in places:
            by.setdefault(self._probe(place).depth, []).append(outcomes[place].value)
        return [(depth, float(np.mean(found)), len(found)) for depth, found in sorted(by.items())]

    @staticmethod
    def _likeness(row: Row, ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> None:
        """How far the next words' probabilities moved: token by token, and in nats."""
        pairs = [(a.logits, b.logits) for a, b in zip(ours, theirs, strict=True)]
        a = torch.cat([x for x, _ in pairs if x is not None])
        b = torch.cat([y for _, y in pairs if y is not None])
        row.agreement = stats.agreement(a, b)
        distance = stats.kl(b, a)
        row.kl = distance if math.isfinite(distance) else None

    @staticmethod
    def _judge(row: Row, found: Score, outcomes: Sequence[Outcome]) -> None:
        """A perplexity above that of a guess among all tokens is no measurement but a fault, and is called so."""
        words = next(o.logits.shape[-1] for o in outcomes if o.logits is not None)
        if not found.value.value <= words:
            row.notes.insert(0, f"{FAULT}perplexity {found.value.value:,.0f} is above the {words:,} of an even guess")


def _perplexity(task: str, ours: Sequence[Outcome], theirs: Sequence[Outcome], compared: bool) -> Score:
    """The perplexity of some stretches, and its ratio to another; bootstrap over spans of neighbouring words."""
    a, b = (_spans(side) for side in (ours, theirs))
    ratio = _exp(stats.mean(a - b)) if compared else None
    return Score(task, _exp(stats.mean(a)), ratio, sum(len(o.nats) for o in ours))


def _spans(outcomes: Sequence[Outcome]) -> np.ndarray:
    """Mean nats of each span of `SPAN` words; the last, shorter one of a stretch is joined to the one before."""
    found = []
    for outcome in outcomes:
        cut = max(len(outcome.nats) // SPAN, 1)
        found += [span.mean().item() for span in outcome.nats.tensor_split(cut)]
    return np.array(found)


def _exp(x: stats.Interval) -> stats.Interval:
    with np.errstate(over="ignore"):  # infinite is an answer, too
        return stats.Interval(*(float(np.exp(end)) for end in (x.value, x.low, x.high)))
