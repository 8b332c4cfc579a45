"""What each method costs and gains on a vision-language model: right answers, and what goes wrong where.

    rows = run(Settings(limit=50), Path("runs/visual"))

The questions are those of `datasets.scenes`, whose objects' places are known to the patch. Besides right answers a row
says whether the model sees what is not there, whether it sees the lower part of a picture better than the upper one,
whether the object that was asked about kept its patches, how well the rest of the picture is still covered, and what
happens when most of a picture is one patch repeated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.adapters.clip_guide import Guide
from fewer.core import Budget, Capacity, Plan, Reducer, Signals, Tokens, VisualReducer, reducer, select
from fewer.core.noise import noise
from fewer.datasets import scenes
from fewer.datasets.scenes import GRID, Question
from fewer.evaluation import stats
from fewer.evaluation.record import Cost, Passport, Row, Score
from fewer.evaluation.runner import Runner, Watch, with_control
from fewer.evaluation.settings import Settings as Common
from fewer.evaluation.settings import split_forms
from fewer.models import zoo
from fewer.spec import parse

TASKS = {
    "presence": "is there a ...: half yes, half no",
    "place": "what is where, where is what",
    "count": "how many",
    "colour": "what colour",
    "compare": "two pictures in one prompt",
    "likely": "presence of what is not there but often goes with what is (POPE's popular and adversarial)",
    "yes": "presence questions answered with yes; half of them should be",
    "upper": "questions about one thing in the upper third of the picture",
    "lower": "the same in the lower third",
    "recall": "patches of the asked things that are left behind the last block",
    "lean": "share of the rows left that lie in the lower third of the picture, minus that of the upper third",
    "coverage": "cosine of each patch to the nearest one that is left, features centred on the picture's mean",
    "flooded": "one-picture questions on pictures whose empty patches are all one and the same",
}
BLIND, ORACLE = "no-image", "oracle"
SHARES = (0.5, 0.25, 0.11, 0.05)
TELLING = (0.25,)
DRAWS = 3
SIZE = 50  # questions in a batch
BRIDGE = (
    "random:site=bridge", "grid:site=bridge", "pool:site=bridge", ORACLE, "fastervlm", "visionzip", "prumerge",
    "vispruner", "holov", "vscan:window=4,shallow=1", "divprune", "cdpruner", "cdpruner:negate=false", "trim",
    "trim:negate=false", "setok",
)  # fmt: skip
INSIDE = ("fastv:k=1", "dart:layers=0", "topv:layer=1")


@reducer(ORACLE, paper="baseline", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class Oracle(VisualReducer):
    """Keeps the patches of the things asked about, then others by chance: what a perfect ranking could do.

    asked: (I, 144) float, 1 = such a patch; filled in by the benchmark before each batch.
    """

    budget: Budget = Capacity(64)
    seed: int = 0
    asked: list = field(default_factory=list, compare=False, repr=False)

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        view = signals.visual.view
        cell = view.row * GRID + view.column
        wanted = self.asked[0].to(cell.device).gather(-1, cell)
        place = tokens.place()
        return select.top(2**24 * wanted + noise(place, self.seed, 0), self.budget, tokens, at=signals.at)


@dataclass(frozen=True)
class Settings(Common):
    """What to measure and how. limit: questions of each kind in each of three draws."""

    model: str = "llava-scenes"
    data: str = "scenes"
    limit: int = 100
    LEAST: ClassVar = {**Common.LEAST, "limit": 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data != "scenes":
            raise ValueError(f"data={self.data!r}: questions with known places are those of 'scenes' only")


def default_methods(rows: int, blocks: int, *, all: bool = True) -> list[str]:
    """Every method at `SHARES` of the visual tokens, counted as the mean over the language model's blocks, and those
    that choose their own number; not all: only at `TELLING`.

    Methods that act behind the first block cannot go below one block's share; they are there where they can."""
    forms = []
    for share in SHARES if all else TELLING:
        tokens = round(rows * share)
        forms += [f"{form}{',' if ':' in form else ':'}tokens={tokens}" for form in BRIDGE]
        late = (share * blocks - 1) / (blocks - 1)
        if late > 0.02:
            forms += [f"{form},keep={late:.4f}" for form in INSIDE]
    return [*forms, "prumerge", "trim", "pyramiddrop", "sparsevlm", f"vtw:k={blocks // 2}"] if all else forms


@dataclass(eq=False)
class VisualSubject:
    """A vision-language model and the questions it is asked.

    processor  turns pictures and prompts into what the model takes
    guide      the image-text model whose vision tower it has; None where there is none
    """

    model: nn.Module
    processor: Any
    questions: Sequence[Question]
    flooded: Sequence[Question]
    name: str = "model"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    guide: Guide | None = None

    @property
    def extent(self) -> str:
        """How much there is to measure on, in words."""
        return f"{len(self.questions)} questions about scenes"

    def batches(self, questions: Sequence[Question]) -> Iterator[tuple[list[int], scenes.Batch]]:
        """Numbers of the questions in a batch, and what the model takes; pictures per prompt alike in each."""
        for pictures in (1, 2):
            mine = [i for i, q in enumerate(questions) if len(q.scenes) == pictures]
            for first in range(0, len(mine), SIZE):
                part = mine[first : first + SIZE]
                yield part, scenes.batch([questions[i] for i in part], self.processor)

    @cached_property
    def prepared(self) -> list[tuple[list[int], scenes.Batch]]:
        return list(self.batches(self.questions))

    @cached_property
    def floods(self) -> list[tuple[list[int], scenes.Batch]]:
        return list(self.batches(self.flooded))


def load(settings: Settings, loaded: tuple[nn.Module, Any] | None = None) -> VisualSubject:
    """The model and the questions of some settings. loaded: a model and its processor, instead of loading them."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model, processor = zoo.load_model(settings.model) if loaded is None else loaded
    device = torch.device(settings.device)
    model = model.to(device=device, dtype=settings.torch_dtype).eval()
    asked = [q for draw in range(DRAWS) for q in scenes.exam(settings.limit, seed=settings.seed + draw)]
    half = [q for q in asked[: len(asked) // DRAWS] if len(q.scenes) == 1][::2]
    return VisualSubject(
        model, processor, asked, [_flood(q) for q in half], settings.model, device, _guide(model, settings.model)
    )


def _guide(model: nn.Module, name: str) -> Guide | None:
    try:
        clip, tokenizer = zoo.load_clip(name, model)
    except zoo.ModelError:
        return None
    return Guide(clip, tokenizer)


def _flood(question: Question) -> Question:
    """The same question about the same things before one and the same patch, repeated."""
    flooded = []
    for shown in question.scenes:
        cells = shown.pixels.reshape(GRID, scenes.PATCH, GRID, scenes.PATCH, 3).transpose(0, 2, 1, 3, 4)
        cells = cells.reshape(GRID * GRID, scenes.PATCH, scenes.PATCH, 3).copy()
        empty = ~shown.patches.any(0)
        cells[empty] = cells[np.flatnonzero(empty)[0]]
        back = cells.reshape(GRID, GRID, scenes.PATCH, scenes.PATCH, 3).transpose(0, 2, 1, 3, 4)
        flooded.append(replace(shown, pixels=back.reshape(shown.pixels.shape)))
    return replace(question, scenes=tuple(flooded))


def run(
    settings: Settings, out: Path, *, watch: Watch | None = None, subject: VisualSubject | None = None,
    picture: Callable[[VisualSubject, str, Callable[[], Any], Path], str | None] | None = None,
) -> list[Row]:  # fmt: skip
    """Measure everything, the unreduced model first; see `Runner.run`.

    picture: draws a row's examples and returns the file, relative to out.
    Raises   ValueError for settings, ModelError, UnknownMethod, SpecError, JournalError: before anything runs.
    """
    subject = load(settings) if subject is None else subject
    bench = _Bench(settings, subject, watch, picture)
    blocks = len(bench.host.blocks)
    forms = split_forms(list(settings.methods)) or default_methods(GRID * GRID, blocks, all=settings.all)
    return bench.run(with_control({parsed(form): form for form in forms}, BLIND), out)


def parsed(form: str) -> Reducer:
    """A method from its text form, the oracle included."""
    name, _, rest = form.partition(":")
    if name != ORACLE:
        return parse(form)
    return parse(Oracle(), **_tokens(rest))


def _tokens(rest: str) -> dict[str, Any]:
    return {key: int(value) for key, _, value in (pair.partition("=") for pair in rest.split(",") if pair)}


@dataclass
class _Seen:
    """What one method's passes gave."""

    logits: Tensor  # (Q, words)
    recall: list[float] = field(default_factory=list)
    lean: list[float] = field(default_factory=list)
    coverage: list[float] = field(default_factory=list)
    counts: list[list[float]] = field(default_factory=list)  # visual rows that each block reads, per picture
    final: list[float] = field(default_factory=list)  # and those behind the last one
    ledger: Any = None


class _Bench(Runner):
    WHAT = (
        "right answers to questions about scenes of real pictures, one word each, by the likeliest next token; three "
        "draws of scenes and questions, random methods drawn anew with each"
    )
    AGAINST = "the same weights, questions and pictures with all visual tokens, fused attention"
    SPREAD = (
        "quartiles of the ratios of interleaved runs (A B B A); 95 % intervals for shares: Wilson; paired: Bonett, "
        "Price; for means: bootstrap over pictures"
    )
    score = "answers right"
    settings: Settings
    subject: VisualSubject

    def __init__(self, settings: Settings, subject: VisualSubject, watch: Watch | None, picture: Any) -> None:
        from fewer import hosts

        super().__init__(settings, subject, watch)
        host = hosts.find(subject.model)
        if not isinstance(host, hosts.VisionLanguageHost):
            raise ValueError(f"{type(subject.model).__name__} is no vision-language model")
        self.host, self.picture, self.batches = host, picture, len(subject.prepared)
        self.answers = torch.cat([torch.empty(0, dtype=torch.long)] + [b.answers for _, b in subject.prepared])
        self.order = [i for part, _ in subject.prepared for i in part]
        self._plain: _Seen | None = None
        self._plain_flood: Tensor | None = None

    @property
    def passport(self) -> Passport:
        n = len(self.subject.questions)
        data = f"scenes: {n} questions of {len(scenes.KINDS)} kinds, {DRAWS} draws"
        return self.stamped(data, n, SIZE, "padded", "questions", [])

    def session(self, method: Reducer | None, draw: int, row: Row | None = None) -> Any:
        """A session of a method, drawn anew where it draws; none for no method. row: told what the session is."""
        if method is None:
            return nullcontext()
        if any(f.name == "seed" for f in fields(method)):
            method = replace(method, seed=draw)
        row = Row("", "", self.passport) if row is None else row
        return self.applied(row, self.subject.model, method, guide=self.subject.guide)

    def _blind(self, row: Row) -> Row:
        """The same questions without their pictures: what words alone give away."""
        right = scenes.answered(self.subject.model, self.subject.processor, self.subject.questions, blind=True)
        row.notes.append("the pictures are hidden: what the words alone give away")
        hits = np.array([bool(right[i]) for i in self.order])
        self._scores(row, hits, None, compared=True)
        return row

    def measured(self, row: Row, form: str, method: Reducer | None) -> Row:
        row.tokens_full = GRID * GRID
        if form == BLIND:
            return self._blind(row)
        seen = self._pass(row, method)
        if method is None:
            self._plain = seen
        elif self._plain is None:
            self._plain = self._pass(Row("", "", self.passport), None)
        assert self._plain is not None
        right, plain = (x.logits.argmax(-1) == self.answers for x in (seen, self._plain))
        self._scores(row, right.numpy(), seen, compared=method is not None, plain=plain.numpy())
        flood = self._flooded(method)
        if method is None or self._plain_flood is None:
            self._plain_flood = flood if method is None else self._flooded(None)
        known = self._plain_flood.numpy()
        change = None if method is None else stats.paired_difference(flood.numpy(), known)
        row.scores.append(Score("flooded", stats.share(flood.numpy()), change, len(flood)))
        row.agreement = stats.agreement(seen.logits, self._plain.logits)
        row.kl = stats.kl(self._plain.logits, seen.logits)
        self._timed(row, method)
        if self.picture is not None:
            row.picture = self.picture(self.subject, form, lambda: self.session(method, 0), self.out)
        return row

    # -- passes -------------------------------------------------------------------------------------------------------
    def _pass(self, row: Row, method: Reducer | None) -> _Seen:
        subject, per = self.subject, len(self.subject.questions) // DRAWS
        seen, logits = _Seen(torch.empty(0)), []
        for draw in range(DRAWS):
            with ExitStack() as stack:
                session = stack.enter_context(self.session(method, draw, row))
                for part, given in subject.prepared:
                    mine = [k for k, i in enumerate(part) if i // per == draw]
                    if not mine:
                        continue
                    logits.append((part, mine, self._answer(session, part, given, mine, seen)))
        order = {i: k for k, i in enumerate(self.order)}
        seen.logits = torch.zeros(len(self.order), logits[0][2].shape[-1])
        for part, mine, made in logits:
            seen.logits[[order[part[k]] for k in mine]] = made
        if seen.counts:
            row.counts = np.mean(seen.counts, axis=0).round(3).tolist()
            row.tokens, row.final = float(np.mean(seen.counts)), float(np.mean(seen.final))
        else:
            row.counts = [float(GRID * GRID)] * len(self.host.blocks)
            row.tokens = row.final = float(GRID * GRID)
        if seen.ledger is not None:
            cost = seen.ledger
            row.cost = Cost(cost.gflops, cost.gflops_own, cost.ceiling)
            row.notes = list(dict.fromkeys([*row.notes, *cost.notes]))
        return seen

    def _answer(
        self, session: Any, part: list[int], given: scenes.Batch, mine: list[int], seen: _Seen
    ) -> Tensor:  # fmt: skip
        """Logits of the next word, (mine, words), and what is left of the pictures."""
        chosen = _subset(given, mine)
        asked = [self.subject.questions[part[k]] for k in mine]
        logits = self._forward(session, asked, chosen)
        self.watch.batch()
        if session is None:
            patches = chosen.patches
            seen.recall += [1.0] * int(patches.any(-1).sum())
            seen.lean += [0.0] * len(patches)
            seen.coverage += [1.0] * len(patches)
            return logits
        kept, features = _left(session, len(chosen.patches))
        there = chosen.patches.any(-1)
        found = (kept & chosen.patches)[there].sum(-1) / chosen.patches[there].sum(-1)
        seen.recall += found.tolist()
        third = torch.arange(GRID * GRID) // (GRID * GRID // 3)
        total = kept.sum(-1).clamp(min=1)
        seen.lean += ((kept[:, third == 2].sum(-1) - kept[:, third == 0].sum(-1)) / total).tolist()
        seen.coverage += _coverage(kept, features).tolist()
        if len(asked[0].scenes) == 1:
            seen.ledger = session.ledger.reading
            words = float((given.attention_mask[mine].sum(-1) - GRID * GRID).float().mean())
            seen.counts.append([entry.attention - words for entry in seen.ledger.entries])
            seen.final.append(session.visual_counts[-1])
        return logits

    def _forward(self, session: Any, asked: Sequence[Question], given: scenes.Batch) -> Tensor:
        inputs = {k: v.to(self.subject.device) for k, v in given.inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.settings.torch_dtype)
        if session is not None:
            _prepare(session, asked, given)
        return self.subject.model(**inputs, logits_to_keep=1).logits[:, -1].float().cpu()

    def _flooded(self, method: Reducer | None) -> Tensor:
        """(questions,) bool: right answers on flooded pictures."""
        with self.session(method, 0) as session:
            return torch.cat([
                self._forward(session, [self.subject.flooded[i] for i in part], given).argmax(-1) == given.answers
                for part, given in self.subject.floods
            ])  # fmt: skip

    def _timed(self, row: Row, method: Reducer | None) -> None:
        """A batch of one-picture questions, in turns with the unreduced model: A B B A."""
        part, given = self.subject.prepared[0]
        asked = [self.subject.questions[i] for i in part]
        plain: list[float] = []
        reduced: list[float] = []
        own: list[float] = []
        for turn in range(self.settings.repeats):
            for side in ((0, 1), (1, 0))[turn % 2]:
                with self.session(method if side else None, 0) as session:
                    began, wall = self.now(), time.perf_counter()
                    self._forward(session, asked, given)
                    (reduced if side else plain).append(self.now() - began)
                    if session is not None and (spent := session.ledger.reading.own_seconds) is not None:
                        own.append(spent / (time.perf_counter() - wall))
        row.speedup, row.milliseconds = stats.ratios(plain, reduced), 1e3 * float(np.median(reduced))
        row.own_time = float(np.median(own)) if own else None

    # -- scores -------------------------------------------------------------------------------------------------------
    def _scores(
        self, row: Row, hits: np.ndarray, seen: _Seen | None, *, compared: bool, plain: np.ndarray | None = None
    ) -> None:
        questions = [self.subject.questions[i] for i in self.order]
        if plain is None and compared:
            if self._plain is None:
                self._plain = self._pass(Row("", "", self.passport), None)
            plain = (self._plain.logits.argmax(-1) == self.answers).numpy()
        row.n, row.hits, row.accuracy = len(hits), stats.pack_hits(hits), stats.share(hits)
        row.difference = stats.paired_difference(hits, plain) if compared and plain is not None else None
        for task, chosen in _groups(questions).items():
            if not chosen.any():
                continue
            change = stats.paired_difference(hits[chosen], plain[chosen]) if compared and plain is not None else None
            row.scores.append(Score(task, stats.share(hits[chosen]), change, int(chosen.sum())))
        if seen is None:
            return
        words = self.subject.processor.tokenizer
        yes = words.convert_tokens_to_ids("yes")
        presence = np.array([q.kind == "presence" for q in questions])
        said = (seen.logits.argmax(-1) == yes).numpy()[presence]
        row.scores.append(Score("yes", stats.share(said), None, len(said)))
        for task, values in (("recall", seen.recall), ("lean", seen.lean), ("coverage", seen.coverage)):
            row.scores.append(Score(task, stats.mean(values), None, len(values)))


def answers(subject: VisualSubject, session: Any, questions: Sequence[Question]) -> tuple[list[str], list[np.ndarray]]:
    """The words a model answers one-picture questions with, and what is left of each picture: (12, 12) numbers of the
    rows, -1 = gone. session: on the model, None for all tokens."""
    given = scenes.batch(questions, subject.processor)
    if session is not None:
        _prepare(session, questions, given)
    inputs = {k: v.to(subject.device) for k, v in given.inputs.items()}
    said = subject.model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
    words = subject.processor.tokenizer.convert_ids_to_tokens(said.tolist())
    everything = torch.ones(len(questions), GRID * GRID, dtype=torch.bool)
    kept = everything if session is None else _left(session, len(questions))[0]
    rows = torch.where(kept, kept.cumsum(-1) - 1, -1).view(-1, GRID, GRID)
    return words, list(rows.numpy())


def _prepare(session: Any, asked: Sequence[Question], given: scenes.Batch) -> None:
    """Tell those who want to know what is asked next."""
    for method in session.methods:
        if isinstance(method, Oracle):
            method.asked[:] = [given.patches.float()]
    if session.guide is not None:
        session.ask([q.text for q in asked])


def _groups(questions: Sequence[Question]) -> dict[str, np.ndarray]:
    """Which questions each task is about."""
    groups = {kind: np.array([q.kind == kind for q in questions]) for kind in scenes.KINDS}
    groups["likely"] = np.array([q.kind == "presence" and q.form in ("popular", "adversarial") for q in questions])
    for task, where in (("upper", "top"), ("lower", "bottom")):
        groups[task] = np.array([_only_region(q).startswith(where) for q in questions])
    return groups


def _only_region(question: Question) -> str:
    """Where the one thing a question is about lies; "" where it is about none or several."""
    if len(question.about) != 1 or len(question.scenes) != 1:
        return ""
    image, thing = question.about[0]
    return question.scenes[image].things[thing].region


def _subset(given: scenes.Batch, mine: list[int]) -> scenes.Batch:
    """Some questions of a batch."""
    pictures = [i for i, s in enumerate(given.sample.tolist()) if s in set(mine)]
    sample = torch.tensor([mine.index(int(given.sample[i])) for i in pictures])
    return scenes.Batch(
        given.input_ids[mine], given.attention_mask[mine], given.pixel_values[pictures], given.answers[mine],
        given.patches[pictures], sample,
    )  # fmt: skip


def _left(session: Any, pictures: int) -> tuple[Tensor, Tensor]:
    """(I, 144) bool, the cells left behind the last block, and (I, 144, d), the projected features of all."""
    layout, left = session.layout, session.seen()
    cell = layout.row * GRID + layout.column
    kept = torch.zeros(pictures, GRID * GRID, dtype=torch.bool)
    kept[layout.line[left].cpu(), cell[left].cpu()] = True
    embedded = session.last.beside.embedded
    features = torch.zeros(pictures, GRID * GRID, embedded.shape[-1])
    every = layout.visual
    features[layout.line[every].cpu(), cell[every].cpu()] = embedded[every].float().cpu()
    return kept, features


def _coverage(kept: Tensor, features: Tensor) -> Tensor:
    """(I,): mean cosine of each patch to its nearest kept one."""
    x = F.normalize(features - features.mean(1, keepdim=True), dim=-1)
    near = (x @ x.transpose(1, 2)).masked_fill(~kept[:, None], -1).amax(-1)
    return near.mean(-1)


__all__ = [
    "BLIND",
    "ORACLE",
    "TASKS",
    "Oracle",
    "Settings",
    "VisualSubject",
    "answers",
    "default_methods",
    "load",
    "run",
]
