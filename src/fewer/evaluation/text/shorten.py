"""Ways to make the parts of a text shorter, each to the same number of the reader's tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fewer.compression import Compressor
from fewer.compression.compressor import Prompt
from fewer.spec import parse

from .tasks import Item

WITHOUT, WHOLE = "no text", "whole text"  # what every way stands between
HEAD = "Read this, then answer.\n\n"


@dataclass(frozen=True)
class Way:
    """How texts get shorter.

    method, model   of the Compressor; an empty model: words are chosen here, by `words`
    words           (number of words, a seed) -> their places, the first to stay first
    aware           whether it is told the question, and so shortens a text anew for each
    """

    method: str = ""
    model: str = ""
    words: Callable[[int, str], list[int]] | None = None
    aware: bool = False


def _at_random(number: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(number), number)


COMPRESSOR = "smollm2-135m"
WAYS: Mapping[str, Way] = {
    "longllmlingua:slack=1,unit=sentence": Way("longllmlingua:slack=1,unit=sentence", COMPRESSOR, aware=True),
    "longllmlingua": Way("longllmlingua", COMPRESSOR, aware=True),
    "random words": Way(words=_at_random),
    "first words": Way(words=lambda number, seed: list(range(number))),
    "llmlingua": Way("llmlingua", COMPRESSOR),
    "selective_context": Way("selective_context", COMPRESSOR),
}
"""Those measured when nobody says otherwise, in this order."""


def way(name: str) -> Way:
    """One of `WAYS`, or any method on texts, with the model that reads for it behind an @: `llmlingua2@FOLDER`.

    Raises ValueError for a method that there is not.
    """
    if name in WAYS:
        return WAYS[name]
    method, _, model = name.partition("@")
    return Way(method, model or COMPRESSOR, aware=parse(method).card.name == "longllmlingua")


@dataclass(eq=False)
class Shortener:
    """The ways, with their models loaded once. counter: the tokenizer of the reader."""

    counter: Any
    dtype: torch.dtype = torch.float32
    _loaded: dict[str, tuple[Any, Any]] = field(default_factory=dict, repr=False)
    _made: dict[tuple[str, str], Compressor] = field(default_factory=dict, repr=False)

    def texts(self, item: Item, way: Way, rate: float) -> list[str]:
        """What is left of an item's text: one for all its probes, or, of a way that is told the question, one each."""
        if way.words is not None:
            return [item.joined(self._drawn(item, way, rate))]
        compressor = self._compressor(way)
        if item.labels:
            return [item.joined([one.text for one in compressor.batch(item.parts, rate=rate)])]
        if not (way.aware and item.ask):
            return [compressor(item.parts, rate=rate).text]
        tokens = max(1, round(rate * self._count(item.whole)))
        return [self._asked(compressor, item.parts, probe.question.strip(), tokens) for probe in item.probes]

    def _asked(self, compressor: Compressor, parts: Sequence[str], question: str, tokens: int) -> str:
        """The shortened text without the question, which the reader gets in any case."""
        own = self._count(f"\n\n{question}")
        made = compressor(Prompt(tuple(parts), question=question), tokens=tokens + own).text
        if not made.endswith(question):
            raise ValueError(f"the question is not where it was put, behind the text: ...{made[-80:]!r}")
        return made.removesuffix(question).rstrip()

    def _compressor(self, way: Way) -> Compressor:
        key = way.method, way.model
        if key not in self._made:
            if way.model not in self._loaded:
                from fewer.models.zoo import load_model

                self._loaded[way.model] = load_model(way.model, dtype=self.dtype)
            model, tokenizer = self._loaded[way.model]
            self._made[key] = Compressor(way.method, model, tokenizer, counter=self.counter, gate=False)
        return self._made[key]

    def _drawn(self, item: Item, way: Way, rate: float) -> list[str]:
        """Words of the parts, of all of them together or, where labels stand between, of each. The parts keep their
        places, so that an empty one leaves its line breaks."""
        assert way.words is not None
        groups = [[part] for part in item.parts] if item.labels else [list(item.parts)]
        found: list[str] = []
        for number, parts in enumerate(groups):
            whole = "\n\n".join(parts)
            spans = [m.span() for m in re.finditer(r"\S+", whole)]
            order = way.words(len(spans), f"{number} {whole}")
            goal, low, high = rate * self._count(whole), 0, len(spans)
            while low < high:  # the most words that are no more tokens than asked for
                middle = (low + high + 1) // 2
                fits = self._count(_taken(whole, spans, order[:middle])) <= goal
                low, high = (middle, high) if fits else (low, middle - 1)
            kept = _taken(whole, spans, order[:low])
            found += [kept] if item.labels else [kept, *[""] * (len(parts) - 1)]
        return [part for part in found if part] if not item.labels else found

    def _count(self, text: str) -> int:
        return len(self.counter(text, add_special_tokens=False)["input_ids"])


def _taken(whole: str, spans: Sequence[tuple[int, int]], chosen: Sequence[int]) -> str:
    """Words of a text, with the line breaks that stood between them."""
    text, last = "", 0
    for i in sorted(chosen):
        start, stop = spans[i]
        gap = whole[last:start]
        text += ("\n\n" if "\n" in gap else " ") * bool(text) + whole[start:stop]
        last = stop
    return text
