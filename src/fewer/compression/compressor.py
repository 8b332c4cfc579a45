"""Compressor: texts in, shorter texts out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from fewer.core import KeepRatio, Reducer, SignalError, Signals, Site, Tokens
from fewer.core.place import Place
from fewer.core.plan import Hard
from fewer.core.written import BEFORE, BEHIND, Each, Unit, Written
from fewer.methods.text.influx import Influx
from fewer.models.influx import ExampleReader, ExemplarPruner
from fewer.runtime.reading import LanguageReader, WordReader, around, reads_words, window_of
from fewer.spec import parse, text

from .compressed import Compressed, Shelf, composed, counted, kept
from .forced import broken, forced
from .source import JOINT, Source

PROMISE = " We can get the answer to this question in the given documents."
RANKED = 20_000  # documents whose rank for a question is remembered
STRAIGHT = 6  # steps towards the length that was asked for; then halves
NEAR = 16  # units on each side of a border that may change sides


class CompressionError(ValueError):
    """A text cannot be cut as asked."""


@dataclass(frozen=True)
class Prompt:
    """A prompt in its parts. contexts: what is shortened; the instruction in front and the question behind stay.

    force   words of this prompt that stay, besides the compressor's
    """

    contexts: tuple[str, ...]
    instruction: str = ""
    question: str = ""
    force: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: str | Sequence[str] | Prompt) -> Prompt:
        if isinstance(given, Prompt):
            return given
        return cls((given,) if isinstance(given, str) else tuple(given))


class Compressor:
    """A method on texts and the model that reads them.

    method    such as "llmlingua:keep=0.5"; its budget is the share, or the number, of the whole prompt's tokens
    model     a name `fewer.models.load_model` knows, or the model itself with its tokenizer
    counter   a tokenizer that tokens are counted with, of the model that is paid for; default the reader's own
    force     words, or marks, that always stay. protect: kinds of things that do: "digits", "negations", "identifiers",
              "code", "json"
    gate      whether a text is left as it is where shortening makes it no shorter, takes all of it, breaks JSON or code
              fences, or loses what must stay; its notes say so
    shelf     where whole texts are kept so that dropped spans come back by their ids
    window    tokens the reader has in sight; default what its config says
    side      texts it reads side by side; the logits of a segment of each are there at once

    >>> compressor = Compressor("llmlingua:keep=0.5", model="smollm2-135m")     # doctest: +SKIP
    >>> print(compressor("A long text ...").text)                              # doctest: +SKIP
    """

    def __init__(
        self, method: str | Reducer = "llmlingua", model: str | nn.Module = "smollm2-135m", tokenizer: Any = None, *,
        counter: Any = None, force: Sequence[str] = (), protect: Sequence[str] = (), gate: bool = True,
        shelf: Shelf | None = None, window: int | None = None, side: int = 8,
    ) -> None:  # fmt: skip
        if side < 1:
            raise CompressionError(f"side={side}: read one text at a time, or more")
        self.method = _on_text(method)
        forced("", protect, force)  # refuses what it does not know before a model is loaded
        if isinstance(model, str):
            from fewer.models.zoo import load_model

            self.name = model
            model, loaded = load_model(model)
            tokenizer = tokenizer or loaded
        else:
            self.name = type(model).__name__
        if isinstance(self.method, Influx) and not isinstance(model, ExemplarPruner):
            raise CompressionError(
                f"influx asks a policy that learned which examples stay, and {self.name} is none: fewer train influx "
                "makes one, and its folder is the model"
            )
        if tokenizer is None:
            raise CompressionError(f"{self.name} reads tokens: give its tokenizer too")
        self.model, self.tokenizer, self.counter = model.eval(), tokenizer, counter or tokenizer
        self.force, self.protect, self.gate = tuple(force), tuple(protect), gate
        self.shelf, self.side = shelf, side
        self._ranked: dict[Any, float] = {}  # documents that were ranked for a question, at whatever length
        self.window = window or window_of(model)

    def __call__(
        self, given: str | Sequence[str] | Prompt, *, instruction: str = "", question: str = "",
        rate: float | None = None, tokens: int | None = None,
    ) -> Compressed:  # fmt: skip
        """One prompt, shorter.

        given     a text, or contexts of which each is a text
        question  what is asked about it; it stays, and question-aware methods look at it. instruction: stays, in front
        rate      share of the whole prompt's tokens that is left, in (0, 1]; tokens: their number; default the method's
        Raises    CompressionError: no such share or number; less than what must stay. SourceError, SignalError: a
                  tokenizer or model that cannot do it
        """
        prompt = Prompt.of(given)
        prompt = replace(prompt, instruction=instruction or prompt.instruction, question=question or prompt.question)
        return self.batch([prompt], rate=rate, tokens=tokens)[0]

    def batch(
        self, prompts: Sequence[str | Sequence[str] | Prompt], *, rate: float | None = None, tokens: int | None = None
    ) -> list[Compressed]:
        """Several prompts, read side by side with those of like length; each comes out as it would alone."""
        method = asked(self.method, rate, tokens)
        given = [Prompt.of(prompt) for prompt in prompts]
        tasks = [self._task(method, prompt) for prompt in given]
        busy = sorted((task for task in tasks if task.count < len(task.source)), key=lambda task: len(task.source))
        for first in range(0, len(busy), self.side):
            self._cut(method, busy[first : first + self.side])
        found = [self._made(task) for task in tasks]
        for one in found:
            if self.shelf is not None:
                self.shelf.put(one)
        return found

    @cached_property
    def _reads_words(self) -> bool:
        return reads_words(self.model)

    @property
    def _counts(self) -> bool:
        """Whether a count is met; the authors' code may miss it, and is left as it is."""
        return getattr(self.method, "fidelity", "paper") == "paper"

    @property
    def _unit(self) -> Unit:
        return getattr(self.method, "unit", "token")

    # -- what is asked for ---------------------------------------------------------------------------------------------
    def _task(self, method: Reducer, prompt: Prompt) -> Task:
        source = Source.of(prompt.contexts, self.tokenizer, instruction=prompt.instruction, question=prompt.question)
        budget = method.budget
        if isinstance(budget, KeepRatio):
            budget = replace(budget, rounding="round")
        whole = len(source) if self.counter is self.tokenizer else counted(source.text, self.counter)
        goal = min(whole, max(1, budget.keep(whole, Place(start=whole))))
        spans = forced(source.text, self.protect, (*self.force, *prompt.force))
        inside = source.within(spans)
        cells = {cell for cell, mine in zip(source.cells, inside, strict=True) if mine}
        stays = [
            cell in cells or not 0 <= part < len(prompt.contexts)
            for cell, part in zip(source.cells, source.parts, strict=True)
        ]
        count = round(len(source) * goal / whole) if whole else 0
        if count < sum(stays) and goal < whole:
            raise CompressionError(
                f"{goal} of {whole} tokens are asked for, and some {sum(stays)} must stay: ask for more, or force less"
            )
        return Task(prompt, source, whole, goal, count, stays)

    # -- reading and cutting -------------------------------------------------------------------------------------------
    def _cut(self, method: Reducer, tasks: list[Task]) -> None:
        """The method's plan for each, in one batch."""
        device = next(self.model.parameters()).device
        longest = max(len(task.source) for task in tasks)

        def table(rows: list[Any]) -> Tensor:
            return torch.tensor([[*row, *([row[-1]] * (longest - len(row)))] for row in rows], device=device)

        sources = [task.source for task in tasks]
        lengths = torch.tensor([len(source) for source in sources], device=device)
        valid = torch.arange(longest, device=device) < lengths[:, None]
        part, sentence = table([source.parts for source in sources]), table([source.sentences for source in sources])
        written = Written(
            self._reader(tasks, table([source.ids for source in sources]), valid, part, sentence), part,
            table([source.cells for source in sources]), table([source.words for source in sources]),
            table([source.phrases for source in sources]), sentence,
        )  # fmt: skip
        guarded = table([task.stays for task in tasks]).bool() & valid
        tokens = Tokens.plain(
            len(tasks), longest, 0, guarded=guarded, valid=None if bool(valid.all()) else valid, device=device
        )
        free = tuple(task.count - sum(task.stays) for task in tasks)
        signals = Signals(
            torch.zeros(len(tasks), longest, 1, device=device), tokens, Place(start=longest), text=written
        )
        plan = replace(method, budget=Each(free)).plan(signals, tokens)
        assert isinstance(plan, Hard), f"{text(method)} mixes tokens, which are no words then"
        score, unit = signals.memory.get("score"), written.unit(self._unit)
        for row, task in enumerate(tasks):
            n = len(task.source)
            task.order, task.unit = kept(plan, row), unit[row, :n].tolist()
            task.score = [0.0] * n if score is None else score[row, :n].double().nan_to_num(-1e30).tolist()

    def _reader(
        self, tasks: list[Task], ids: Tensor, valid: Tensor, part: Tensor, sentence: Tensor
    ) -> LanguageReader | WordReader | ExampleReader | _Blind:
        if isinstance(self.model, ExemplarPruner):
            return ExampleReader(self.model, ids, valid, part)
        front, behind = around(self.tokenizer)
        try:
            if self._reads_words:
                return WordReader(self.model, ids, valid, sentence, front, behind, min(self.window, 512))
        except SignalError as error:
            return _Blind(str(error))
        coded = [
            [i for i, p in zip(task.source.ids, task.source.parts, strict=True) if p >= len(task.prompt.contexts)]
            if task.prompt.question else [] for task in tasks
        ]  # fmt: skip
        promise, joint = (self.tokenizer(s, add_special_tokens=False)["input_ids"] for s in (PROMISE, JOINT))
        if len(self._ranked) > RANKED:
            self._ranked.clear()
        return LanguageReader(self.model, ids, valid, part, coded, joint, promise, front, self.window, self._ranked)

    # -- what comes of it ----------------------------------------------------------------------------------------------
    def _made(self, task: Task) -> Compressed:
        source, notes = task.source, []
        whole = Compressed(source, _kept(range(len(source)), len(source)), source.text, task.whole, task.whole)
        if task.order is None:
            return whole
        order, after = self._fitted(task) if self._counts else (task.order, -1)
        short = composed(source, order)
        after = counted(short, self.counter) if after < 0 else after
        if abs(after - task.goal) > 1:
            why = f"no {self._unit} is cut to fit" if self._counts else "its fidelity is that of the authors' code"
            notes.append(f"{task.goal} tokens were asked for and {after} are left: {why}")
        words = (*self.force, *task.prompt.force)
        if self.gate and (why := broken(source.text, short, words, self.protect)):
            return replace(whole, notes=(f"left as it was: {why}",))
        if self.gate and after >= task.whole:
            return replace(whole, notes=(f"left as it was: shortened, it has {after} tokens, and had {task.whole}",))
        if self.gate and source.text.strip() and not short.strip():
            return replace(whole, notes=("left as it was: nothing would be left of it",))
        return Compressed(source, _kept(order, len(source)), short, task.whole, after, tuple(notes))

    def _fitted(self, task: Task) -> tuple[list[int], int]:
        """The tokens that stay and how many tokens their text has: units come and go, in the order of their worth,
        until these are as many as were asked for, or one off. Cut words are other tokens than they were in the whole,
        so that counts are tried; where no border hits the number, units about it change sides."""
        units = _Units(task)

        def tried(border: int, aside: frozenset[int] = frozenset()) -> _Fit:
            order = units.order(border, aside)
            short = composed(task.source, order)
            after = counted(short, self.counter)
            useless = after >= task.whole or not short.strip()
            return _Fit(border, aside, order, after, abs(after - task.goal) + 2 * useless)

        best = fit = tried(units.chosen)
        below, above, turn = -1, len(units.ranked) + 1, 0
        while best.off > 1:
            below, above = (fit.border, above) if fit.after < task.goal else (below, fit.border)
            if above - below < 2:
                break
            turn += 1
            by = (task.goal - fit.after) * len(task.source) / task.whole
            border = (below + above) // 2 if turn > STRAIGHT else units.beyond(fit.border, by)
            fit = tried(min(max(border, below + 1), above - 1))
            best = min(best, fit, key=lambda one: one.off)
        improved = True
        while best.off > 1 and improved:
            near = range(max(0, best.border - NEAR), min(len(units.ranked), best.border + NEAR))
            fits = (tried(best.border, best.aside ^ {unit}) for unit in near)
            found = min(fits, key=lambda one: one.off, default=best)
            improved = found.off < best.off
            best = found if improved else best
        return best.order, best.after


@dataclass(eq=False)
class Task:
    """One prompt on its way. whole, goal: tokens of the counter; count: of the reader; stays: per token, if it must.

    order, unit, score   what a method made of it: tokens that stay, and per token its unit and what it was ranked by
    """

    prompt: Prompt
    source: Source
    whole: int
    goal: int
    count: int
    stays: list[bool]
    order: list[int] | None = None
    unit: list[int] = field(default_factory=list)
    score: list[float] = field(default_factory=list)


class _Units:
    """The units of a text by what they are worth, those that a method chose first."""

    def __init__(self, task: Task) -> None:
        assert task.order is not None
        free: dict[int, list[int]] = {}
        for i, unit in enumerate(task.unit):
            if not task.stays[i]:
                free.setdefault(unit, []).append(i)
        there = {*task.order}
        place = _places([task.source.parts[i] for i in task.order])
        self.place = [place(part) for part in task.source.parts]
        self.fixed = [i for i, stays in enumerate(task.stays) if stays]
        self.ranked = sorted(free.values(), key=lambda unit: (unit[0] not in there, -task.score[unit[0]], unit[0]))
        self.chosen = sum(unit[0] in there for unit in self.ranked)
        self._upto = [0, *accumulate(map(len, self.ranked))]

    def order(self, border: int, aside: frozenset[int]) -> list[int]:
        """The tokens of the units in front of a border, but for those aside, which are on the other side of it."""
        inside = {*range(border)} ^ aside
        tokens = [*self.fixed, *(i for unit in inside for i in self.ranked[unit])]
        return sorted(tokens, key=lambda i: (self.place[i], i))

    def beyond(self, border: int, by: float) -> int:
        """The border so many tokens away."""
        return bisect_left(self._upto, self._upto[border] + by)


def _places(order: Sequence[int]) -> Callable[[int], int]:
    """Where a part stands among those that stay, of which the order is given: one that was left out stands in its old
    place where the others do, else behind them, and in front of the question in any case."""
    there = [part for part in dict.fromkeys(order) if 0 <= part < BEHIND]
    if there == sorted(there):
        return int
    place = {BEFORE: -1, BEHIND: BEHIND} | {part: number for number, part in enumerate(there)}
    return lambda part: place.get(part, len(there))


@dataclass(frozen=True)
class _Fit:
    """What stays in front of a border, see `_Units.order`, how many tokens its text has, and how far that is from what
    was asked for; further for a text that is empty or no shorter."""

    border: int
    aside: frozenset[int]
    order: list[int]
    after: int
    off: int


def _kept(order: Sequence[int], n: int) -> Hard:
    return Hard.keep(torch.tensor([list(order)], dtype=torch.long), n)


def asked(method: str | Reducer, rate: float | None = None, tokens: int | None = None) -> Reducer:
    """The method on texts with the share, or number, of tokens that shall be left. Raises CompressionError where there
    is no such, or the method names none."""
    found = _on_text(method)
    if rate is not None and tokens is not None:
        raise CompressionError(f"rate={rate} and tokens={tokens}: give one of them")
    if rate is not None and not 0 < rate <= 1:
        raise CompressionError(f"rate={rate} is outside (0, 1]; 0.5 leaves half of the tokens")
    if tokens is not None and tokens < 1:
        raise CompressionError(f"tokens={tokens}: ask for one token or more")
    if rate is not None:
        found = parse(found, keep=float(rate))
    elif tokens is not None:
        found = parse(found, tokens=tokens)
    if found.budget.adaptive:
        raise CompressionError(f"{text(found)} names no number of tokens; give keep, tokens or r")
    return found


def _on_text(method: str | Reducer) -> Reducer:
    """The method, put where texts are cut. Raises CompressionError where it acts elsewhere."""
    found = parse(method)
    if found.site is not Site.TEXT and "site" in {f.name for f in fields(found)}:
        found = parse(found, site=Site.TEXT)
    if found.site is not Site.TEXT:
        raise CompressionError(
            f"{text(found)} acts {found.site.value}, inside a model: fewer.apply(model, ...) puts it there; on texts "
            "act "
            "llmlingua, longllmlingua, llmlingua2, selective_context, influx and random"
        )
    return found


@dataclass(frozen=True)
class _Blind:
    """Stands for a reader where the model is none: methods that ask it nothing, such as a random draw, get on."""

    why: str

    def __getattr__(self, asked: str) -> Any:
        raise SignalError(self.why)
