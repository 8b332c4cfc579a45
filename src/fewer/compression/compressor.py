"""Compressor: texts in, shorter texts out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewer.core import KeepRatio, Reducer, Signals, Site, Tokens
from fewer.core.place import Place
from fewer.core.plan import Hard
from fewer.core.written import Each, Written
from fewer.runtime.reading import LanguageReader, WordReader
from fewer.spec import parse, text

from .compressed import Compressed, Shelf, composed, counted, kept
from .forced import broken, forced
from .source import Source

PROMISE = " We can get the answer to this question in the given documents."
FITTINGS = 6  # times a text is counted again until it has the length that was asked for


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
    gate      whether a text is left as it is where shortening makes it longer, breaks JSON or code fences, or loses
              what must stay; its notes say so
    shelf     where whole texts are kept so that dropped spans come back by their ids
    window    tokens the reader has in sight; default what its config says

    >>> compressor = Compressor("llmlingua:keep=0.5", model="smollm2-135m")     # doctest: +SKIP
    >>> print(compressor("A long text ...").text)                              # doctest: +SKIP
    """

    def __init__(
        self, method: str | Reducer = "llmlingua", model: str | nn.Module = "smollm2-135m", tokenizer: Any = None, *,
        counter: Any = None, force: Sequence[str] = (), protect: Sequence[str] = (), gate: bool = True,
        shelf: Shelf | None = None, window: int | None = None,
    ) -> None:  # fmt: skip
        self.method = _on_text(method)
        if isinstance(model, str):
            from fewer.models.zoo import load_model

            self.name = model
            model, loaded = load_model(model)
            tokenizer = tokenizer or loaded
        else:
            self.name = type(model).__name__
        if tokenizer is None:
            raise CompressionError(f"{self.name} reads tokens: give its tokenizer too")
        self.model, self.tokenizer, self.counter = model.eval(), tokenizer, counter or tokenizer
        self.force, self.protect, self.gate = tuple(force), tuple(protect), gate
        self.shelf = shelf
        self.window = window or _window(model)
        forced("", self.protect, self.force)  # refuses what it does not know before any text comes

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
        """Several prompts side by side; each comes out as it would alone."""
        method = self._method(rate, tokens)
        given = [Prompt.of(prompt) for prompt in prompts]
        tasks = [self._task(method, prompt) for prompt in given]
        busy = [task for task in tasks if task.count < len(task.source)]
        if busy:
            self._cut(method, busy)
        found = [self._made(task) for task in tasks]
        for one in found:
            if self.shelf is not None:
                self.shelf.put(one)
        return found

    # -- what is asked for ---------------------------------------------------------------------------------------------
    def _method(self, rate: float | None, tokens: int | None) -> Reducer:
        if rate is not None and tokens is not None:
            raise CompressionError(f"rate={rate} and tokens={tokens}: give one of them")
        if rate is not None and not 0 < rate <= 1:
            raise CompressionError(f"rate={rate} is outside (0, 1]; 0.5 leaves half of the tokens")
        if tokens is not None and tokens < 1:
            raise CompressionError(f"tokens={tokens}: ask for one token or more")
        if rate is not None:
            return parse(self.method, keep=float(rate))
        return self.method if tokens is None else parse(self.method, tokens=tokens)

    def _task(self, method: Reducer, prompt: Prompt) -> Task:
        source = Source.of(prompt.contexts, self.tokenizer, instruction=prompt.instruction, question=prompt.question)
        budget = method.budget
        if budget.adaptive:
            raise CompressionError(f"{text(method)} names no number of tokens; give keep, tokens or r")
        if isinstance(budget, KeepRatio):
            budget = replace(budget, rounding="round")
        whole = len(source) if self.counter is self.tokenizer else counted(source.text, self.counter)
        goal = min(whole, budget.keep(whole, Place(start=whole)))
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
        score, unit = signals.memory.get("score"), written.unit(getattr(method, "unit", "token"))
        for row, task in enumerate(tasks):
            n = len(task.source)
            task.order, task.unit = kept(plan, row), unit[row, :n].tolist()
            task.score = [0.0] * n if score is None else score[row, :n].double().nan_to_num(-1e30).tolist()

    def _reader(
        self, tasks: list[Task], ids: Tensor, valid: Tensor, part: Tensor, sentence: Tensor
    ) -> LanguageReader | WordReader:
        front, behind = _around(self.tokenizer)
        if _says_words(self.model):
            return WordReader(self.model, ids, valid, sentence, front, behind, min(self.window, 512))
        coded = [
            [i for i, p in zip(task.source.ids, task.source.parts, strict=True) if p >= len(task.prompt.contexts)]
            if task.prompt.question else [] for task in tasks
        ]  # fmt: skip
        promise = self.tokenizer(PROMISE, add_special_tokens=False)["input_ids"]
        return LanguageReader(self.model, ids, valid, part, coded, promise, front, self.window)

    # -- what comes of it ----------------------------------------------------------------------------------------------
    def _made(self, task: Task) -> Compressed:
        source, notes = task.source, []
        whole = Compressed(source, _kept(range(len(source)), len(source)), source.text, task.whole, task.whole)
        if task.order is None:
            return whole
        order, after = self._fitted(task)
        short = composed(source, order)
        if abs(after - task.goal) > 1:
            notes.append(f"{task.goal} tokens were asked for and {after} are left: words are not cut to fit")
        words = (*self.force, *task.prompt.force)
        if self.gate and (why := broken(source.text, short, words, self.protect)):
            return replace(whole, notes=(f"left as it was: {why}",))
        if self.gate and after >= task.whole:
            return replace(whole, notes=(f"left as it was: shortened, it has {after} tokens, and had {task.whole}",))
        return Compressed(source, _kept(order, len(source)), short, task.whole, after, tuple(notes))

    def _fitted(self, task: Task) -> tuple[list[int], int]:
        """The tokens that stay and how many tokens their text has: units come and go, the dearest first, until
        these are as many as were asked for. Cut words are other tokens than they were in the whole."""
        assert task.order is not None
        place = {part: i for i, part in enumerate(dict.fromkeys(task.source.parts[i] for i in task.order))}
        units = _Units(task)
        chosen, best = units.of(task.order), (task.order, -1)
        for _ in range(FITTINGS):
            order = sorted(units.tokens(chosen), key=lambda i: (place.get(task.source.parts[i], len(place)), i))
            after = counted(composed(task.source, order), self.counter)
            if best[1] < 0 or abs(after - task.goal) < abs(best[1] - task.goal):
                best = order, after
            if after == task.goal:
                break
            chosen = units.moved(
                chosen, round((task.goal - after) * len(task.source) / task.whole) or task.goal - after
            )
        return best


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
    """The units of a text by what they are worth."""

    def __init__(self, task: Task) -> None:
        self.members: dict[int, list[int]] = {}
        for i, unit in enumerate(task.unit):
            self.members.setdefault(unit, []).append(i)
        self.fixed = [i for i, stays in enumerate(task.stays) if stays]
        self.free = {u: [i for i in members if not task.stays[i]] for u, members in self.members.items()}
        self.worth = {u: max(task.score[i] for i in members) for u, members in self.members.items()}

    def of(self, order: Sequence[int]) -> set[int]:
        there = set(order)
        return {u for u, members in self.free.items() if members and members[0] in there}

    def tokens(self, chosen: set[int]) -> list[int]:
        return [*self.fixed, *(i for u in chosen for i in self.free[u])]

    def moved(self, chosen: set[int], by: int) -> set[int]:
        """About so many tokens more, or fewer."""
        out = [u for u, members in self.free.items() if members and (u in chosen) == (by < 0)]
        out.sort(key=lambda u: self.worth[u], reverse=by > 0)
        found, left = set(chosen), abs(by)
        for unit in out:
            if len(self.free[unit]) <= left:
                found ^= {unit}
                left -= len(self.free[unit])
            if not left:
                break
        return found


def _kept(order: Sequence[int], n: int) -> Hard:
    return Hard.keep(torch.tensor([list(order)], dtype=torch.long), n)


def _on_text(method: str | Reducer) -> Reducer:
    """The method, put where texts are cut. Raises CompressionError where it acts elsewhere."""
    found = parse(method)
    if found.site is not Site.TEXT and "site" in {f.name for f in fields(found)}:
        found = parse(found, site=Site.TEXT)
    if found.site is not Site.TEXT:
        raise CompressionError(
            f"{text(found)} acts {found.site.value}, inside a model: fewer.apply(model, ...) puts it there; on texts "
            "act "
            "llmlingua, longllmlingua, llmlingua2, selective_context and random"
        )
    return found


def _says_words(model: nn.Module) -> bool:
    """Whether a model says of each token whether it stays."""
    return type(model).__name__.endswith("ForTokenClassification")


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts in front of a text and behind it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:at], whole[at + len(plain) :]


def _window(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)
