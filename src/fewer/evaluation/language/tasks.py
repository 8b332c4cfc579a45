"""Tasks for causal language models: a context to read, and what is asked about it afterwards.

A context is read once, with a method on. Everything asked about it is then asked on a copy of what the reading left:
the method chose what to keep before it saw a question. Whether an answer is known is read off the model's own
probabilities for it, all at once: no sampling, no parsing, and small models that write badly can still show what they
remember.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fewer.datasets.texts import Paragraph

Ids = tuple[int, ...]
Kind = Literal["exact", "choice", "copy", "text"]

TASKS = {
    "perplexity": "of the next words of a real book, teacher-forced behind the context",
    "needle": "one number hidden in a book, one context each: the greedy answer is the number",
    "needles": "numbers hidden all over a book, each with its own key: the greedy answer is the right one",
    "qa": "questions on real paragraphs: the right answer is likelier per token than answers from other paragraphs",
    "copy": "words listed once in a book, to be listed again: share of the tokens that come first",
    "writing": "a summary, written greedily: how much of it is repetition, and whether it ends",
}
"""The tasks, with a line on each."""

DEFAULT = ("perplexity", "needles", "qa", "copy", "writing")

REQUEST = "Summarise the text above in a few sentences."
CITIES = (
    "Oslo", "Lisbon", "Cairo", "Lima", "Kyoto", "Prague", "Nairobi", "Dublin", "Athens", "Havana", "Vienna", "Boston",
    "Madrid", "Geneva", "Tunis", "Jakarta", "Warsaw", "Quito", "Delhi", "Rome", "Seoul", "Denver", "Zagreb", "Malta",
)  # fmt: skip
WORDS = (
    "river", "candle", "window", "garden", "silver", "monkey", "winter", "bridge", "orange", "pocket", "summer",
    "ticket", "island", "button", "market", "pencil", "forest", "kitchen", "mirror", "yellow", "doctor", "carpet",
    "basket", "engine", "feather", "hammer", "ladder", "butter", "castle", "dragon", "anchor", "violin", "rabbit",
    "thunder", "pepper", "blanket",
)  # fmt: skip
LISTED, GIVEN = 16, 2  # words of a list, and how many of them the question repeats
NEEDLES = 8  # in one context
ASKED = 12  # questions on the paragraphs of one context, at most
DISTRACTORS = 2


class TaskError(ValueError):
    """A task that is unknown, or that this text or context cannot carry."""


@dataclass(frozen=True)
class Material:
    """The texts tasks are made of: a book, and paragraphs with questions, several of which may share a text."""

    name: str
    book: str
    paragraphs: tuple[Paragraph, ...] = ()


@dataclass(frozen=True)
class Probe:
    """Something asked behind a context.

    kind      exact: the answer's tokens are the greedy ones; choice: answers[0] is likelier per token than the others;
              copy: the share of the answer's tokens that are the greedy ones; text: nothing but probabilities
    question  tokens read before the answer; may be empty
    depth     where in the context the answer stands, 0 to 1
    """

    task: str
    kind: Kind
    question: Ids
    answers: tuple[Ids, ...]
    depth: float = 0.0


@dataclass(frozen=True)
class Context:
    """Tokens that are read once, what is asked about them, and what is written behind them.

    request   tokens read before writing starts; None = nothing is written
    """

    ids: Ids
    probes: tuple[Probe, ...]
    request: Ids | None = None


@dataclass(frozen=True)
class Outcome:
    """What a model made of a probe.

    value     1 or 0 for exact and choice, a share for copy
    nats      (T,) negative log-likelihood of the right answer's tokens
    logits    (T, vocabulary), of text probes only
    """

    value: float
    nats: Tensor
    logits: Tensor | None = field(default=None, repr=False)


def judge(probe: Probe, logits: Sequence[Tensor]) -> Outcome:
    """The outcome of a probe from the logits that foretell each of its answers, (T, vocabulary) each."""
    nats = [_nats(x, answer) for x, answer in zip(logits, probe.answers, strict=True)]
    first = logits[0]
    greedy = (first.argmax(-1) == torch.tensor(probe.answers[0], device=first.device)).double()
    if probe.kind == "choice":
        cost = [x.mean().item() for x in nats]
        value = float(all(cost[0] < other for other in cost[1:]))
    elif probe.kind == "exact":
        value = greedy.min().item()
    else:
        value = greedy.mean().item()
    return Outcome(
        value if math.isfinite(nats[0].sum().item()) else 0.0, nats[0], first if probe.kind == "text" else None
    )


def _nats(logits: Tensor, answer: Ids) -> Tensor:
    target = torch.tensor(answer, device=logits.device)
    return torch.nn.functional.cross_entropy(logits.float(), target, reduction="none").double().cpu()


# -- what is written ----------------------------------------------------------------------------------------------
def distinct(tokens: Sequence[int], n: int = 2) -> float:
    """Share of different ones among all n-grams; 1 for fewer than n tokens.

    >>> distinct([1, 2, 1, 2, 1])
    0.5
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of tokens that stand in an n-gram seen before: 0 for a text that never repeats itself, near 1 for a loop.

    >>> repetition([1, 2, 3, 4, 9, 1, 2, 3, 4])
    0.4444...
    """
    seen: Counter[tuple[int, ...]] = Counter()
    again: set[int] = set()
    for i in range(len(tokens) - n + 1):
        gram = tuple(tokens[i : i + n])
        if seen[gram]:
            again.update(range(i, i + n))
        seen[gram] += 1
    return len(again) / len(tokens) if tokens else 0.0


# -- making contexts ----------------------------------------------------------------------------------------------
class Maker:
    """Makes the contexts of chosen tasks.

    tokens    length of a context, all that is hidden in it included
    horizon   tokens of the book behind a context that are foretold
    limit     contexts per kind of text
    """

    def __init__(
        self, tokenizer: Any, material: Material, tokens: int, *, horizon: int = 128, limit: int = 3, seed: int = 0
    ) -> None:
        if tokens < 32:
            raise TaskError(f"context={tokens}: give at least 32 tokens")
        self.tokenizer, self.material, self.tokens, self.horizon = tokenizer, material, tokens, horizon
        self.limit, self.seed = limit, seed
        start = tokenizer.bos_token_id
        self.start: Ids = (start,) if start is not None and self._starts(start) else ()

    def _starts(self, bos: int) -> bool:
        """Whether the tokenizer itself puts its first token in front of a text."""
        return list(self.tokenizer("a")["input_ids"])[:1] == [bos]

    def encode(self, text: str) -> Ids:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def contexts(self, tasks: Sequence[str]) -> list[Context]:
        """Contexts for some of `TASKS`: stretches of the book, then paragraphs.

        Raises   TaskError for an unknown task, or a text too short for it.
        """
        for task in tasks:
            if task not in TASKS:
                raise TaskError(f"no task {task!r}: there are {', '.join(TASKS)}")
        made = []
        if set(tasks) & {"perplexity", "needles", "copy", "writing"}:
            made += [self._stretch(i, tasks) for i in range(self.limit)]
        if "needle" in tasks:
            made += [self._single(i) for i in range(self.limit)]
        if "qa" in tasks:
            made += self._papers()
        if not made:
            raise TaskError("no task is chosen; give one of " + ", ".join(TASKS))
        return made

    # -- the book ------------------------------------------------------------------------------------------------
    def _stretch(self, index: int, tasks: Sequence[str]) -> Context:
        """A stretch of the book that hides a list of words and some numbers, and goes on behind its end."""
        rng = random.Random(f"{self.seed} stretch {index}")
        hidden: list[tuple[float, Ids]] = []
        probes: list[Probe] = []
        if "needles" in tasks:
            depths = [(i + 0.5) / NEEDLES for i in range(NEEDLES)]
            for depth, city in zip(depths, rng.sample(CITIES, NEEDLES), strict=True):
                self._hide(hidden, probes, "needles", depth, city, rng)
        if "copy" in tasks:
            self._list(hidden, probes, (index + 0.5) / self.limit, rng)
        ids, rest = self._filled(hidden, self.tokens, rng)
        if "perplexity" in tasks:
            probes.append(Probe("perplexity", "text", (), (rest,)))
        return Context(ids, tuple(probes), self._request() if "writing" in tasks else None)

    def _single(self, index: int) -> Context:
        """One number, deeper from context to context."""
        rng = random.Random(f"{self.seed} needle {index}")
        hidden: list[tuple[float, Ids]] = []
        probes: list[Probe] = []
        self._hide(hidden, probes, "needle", (index + 0.5) / self.limit, rng.choice(CITIES), rng)
        return Context(self._filled(hidden, self.tokens, rng)[0], tuple(probes))

    def _hide(self, hidden: list[tuple[float, Ids]], probes: list[Probe], task: str, depth: float, city: str,
              rng: random.Random) -> None:  # fmt: skip
        number = f" {rng.randrange(10000, 100000)}"
        says = f"The secret number of {city} is"
        hidden.append((depth, self.encode(f" {says}{number}.")))
        probes.append(Probe(task, "exact", self.encode(f"\n\n{says}"), (self.encode(number),), depth))

    def _list(self, hidden: list[tuple[float, Ids]], probes: list[Probe], depth: float, rng: random.Random) -> None:
        words = rng.sample(WORDS, LISTED)
        says = "Remember these words:"
        given, rest = ", ".join(words[:GIVEN]), "".join(f", {word}" for word in words[GIVEN:])
        hidden.append((depth, self.encode(f" {says} {given}{rest}.")))
        probes.append(Probe("copy", "copy", self.encode(f"\n\n{says} {given}"), (self.encode(rest),), depth))

    def _filled(self, hidden: Iterable[tuple[float, Ids]], length: int, rng: random.Random) -> tuple[Ids, Ids]:
        """A stretch of the book with sentences hidden between its own, `length` tokens; and how the book goes on."""
        hidden = sorted(hidden)
        room = length - len(self.start) - sum(len(ids) for _, ids in hidden)
        if room < 2 * len(hidden) + 1:
            raise TaskError(f"context={length} is too short for what is hidden in it: {length - room} tokens")
        text = self._passage(room + self.horizon, rng)
        ends = [i + 1 for i in range(room) if self._ends(text[i])] or list(range(room))
        body: list[int] = []
        done = 0
        for depth, ids in hidden:
            at = max(min(ends, key=lambda end: abs(end - depth * room)), done)
            body += [*text[done:at], *ids]
            done = at
        body += text[done:room]
        return (*self.start, *body), tuple(text[room : room + self.horizon])

    def _passage(self, tokens: int, rng: random.Random) -> Ids:
        """Tokens of the book from the beginning of a paragraph on."""
        book = self.material.book
        last = max(len(book) - 12 * tokens, 0)
        start = rng.randrange(last + 1)
        found = book.find("\n\n", start)
        start = start if found < 0 or found > last else found
        ids = self.encode(book[start : start + 12 * tokens].strip())
        if len(ids) < tokens:
            raise TaskError(
                f"{self.material.name} is too short: {tokens} tokens in a row are needed, it gave {len(ids)}"
            )
        return ids[:tokens]

    def _ends(self, token: int) -> bool:
        """Whether a sentence ends with this token."""
        return self.tokenizer.decode([token]).rstrip().endswith((".", "!", "?"))

    def _request(self) -> Ids:
        """The request to write, as the model was taught to be asked, where it was."""
        if not getattr(self.tokenizer, "chat_template", None):
            return self.encode(f"\n\n{REQUEST}\n\n")
        turn = [{"role": "user", "content": REQUEST}]
        said = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return self.encode(f"\n\n{REQUEST}{said.partition(REQUEST)[2]}")

    # -- the paragraphs ------------------------------------------------------------------------------------------
    def _papers(self) -> list[Context]:
        """Paragraphs behind one another, as many as fit, and what is asked about them. Half as many as stretches."""
        asked: dict[str, list[Paragraph]] = {}
        for paragraph in self.material.paragraphs:
            if paragraph.answers:
                asked.setdefault(_one_line(paragraph.text), []).append(paragraph)
        shuffled = list(asked.items())
        random.Random(f"{self.seed} qa").shuffle(shuffled)
        rest = iter(shuffled)
        return [self._paper(rest, index) for index in range(-(-self.limit // 2))]

    def _paper(self, texts: Iterator[tuple[str, list[Paragraph]]], index: int) -> Context:
        ids: list[int] = list(self.start)
        asked: list[tuple[Paragraph, float]] = []
        for text, about in texts:
            more = self.encode(f"{text}\n\n")
            if len(ids) + len(more) > self.tokens:
                if asked:
                    break
                continue  # too long by itself
            depth = (len(ids) + len(more) / 2) / self.tokens
            asked += [(paragraph, depth) for paragraph in about]
            ids += more
        if not asked:
            raise TaskError(
                f"{self.material.name}: no paragraph with questions fits into {self.tokens} tokens; give a longer "
                "context or leave qa out"
            )
        here = self.tokenizer.decode(ids).lower()
        rng = random.Random(f"{self.seed} qa {index}")
        probes = []
        for paragraph, depth in sorted(rng.sample(asked, min(len(asked), ASKED)), key=lambda item: item[1]):
            said = f"Question: {_one_line(paragraph.question)}\nAnswer:"
            choices = (paragraph.answers[0].strip(), *self._elsewhere(here, paragraph.answers, rng))
            answered = tuple(self.encode(f" {answer}") for answer in choices)
            probes.append(Probe("qa", "choice", self.encode(said), answered, depth))
        return Context(tuple(ids), tuple(probes))

    def _elsewhere(self, here: str, right: Sequence[str], rng: random.Random) -> list[str]:
        """Wrong answers: to questions on other paragraphs, and not to be found in a context. here: it in lower case."""
        taken = {answer.strip().lower() for answer in right}
        found: list[str] = []
        others = list(self.material.paragraphs)
        while len(found) < DISTRACTORS and others:
            answers = others.pop(rng.randrange(len(others))).answers
            answer = answers[0].strip() if answers else ""
            if answer and answer.lower() not in taken and answer.lower() not in here:
                taken.add(answer.lower())
                found.append(answer)
        if len(found) < DISTRACTORS:
            raise TaskError(f"{self.material.name}: too few answers to choose from; more paragraphs are needed")
        return found


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
