"""A text in pieces: tokens with their place in it, and the words, phrases and sentences they belong to."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fewer.core.written import BEFORE, BEHIND

Span = tuple[int, int]
"""Of characters, from and up to."""

JOINT = "\n\n"
# Scripts without spaces between words: there a word is a character.
LONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"\s*(?:[{LONE}]|(?:(?![{LONE}])\w)+(?:[-'\u2019](?:(?![{LONE}])\w)+)*|[^\w\s])|\s+")
CLOSING = "\"')\\]\u201d\u2019\u300d\u300f\uff09"
SENTENCE = re.compile(rf"(?:[.!?\u2026]+[{CLOSING}]*(?=\s)|[\u3002\uff01\uff1f\uff61]+[{CLOSING}]*|\n+)\s*")
# English words that lean on what follows them; a phrase begins with such, or behind a mark.
LEANING = re.compile(
    "a|an|the|this|that|these|those|my|your|his|her|its|our|their|some|any|no|each|every|of|in|on|at|by|for|with|from|to"
    "|into|onto|over|under|about|after|before|between|through|during|against|and|or|but|nor|so|as|than|if|when|while"
    "|which|who|whom|whose|where|because|is|are|was|were|be|been|being|has|have|had|do|does|did|will|would|can|could"
    "|may|might|shall|should|must|not"
)


class SourceError(ValueError):
    """A text, or a tokenizer, that cannot be cut into pieces."""


@dataclass(frozen=True, eq=False)
class Source:
    """A text as a model's tokens, with where each stands.

    text     all of it: instruction, contexts and question, two line breaks between them where there are several
    ids      per token. spans: per token, where it stands in the text; they tile it, a space belongs to what follows
    parts    per token, the context it is of, `BEFORE` for the instruction, `BEHIND` for the question
    """

    text: str
    ids: Sequence[int]
    spans: Sequence[Span]
    parts: Sequence[int]

    @classmethod
    def of(cls, contexts: Sequence[str], tokenizer: Any, *, instruction: str = "", question: str = "") -> Source:
        """Raises SourceError for a tokenizer that does not say where its tokens stand."""
        pieces = [(BEFORE, instruction)] * bool(instruction)
        pieces += [(number, context) for number, context in enumerate(contexts)]
        pieces += [(BEHIND, question)] * bool(question)
        text, edges, numbers = "", [], []
        for number, piece in pieces:
            text += JOINT * bool(text) * bool(piece)
            edges.append(len(text))
            numbers.append(number)
            text += piece
        ids, spans = pieces_of(text, tokenizer)
        parts = [numbers[max(0, bisect_right(edges, max(a, b - 1)) - 1)] for a, b in spans]
        return cls(text, ids, spans, parts)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def cells(self) -> list[int]:
        """Per token, a number that rises with the characters: bytes of one character have one."""
        found, number = [], -1
        for i, (start, stop) in enumerate(self.spans):
            number += i == 0 or stop > start
            found.append(max(number, 0))
        return found

    @cached_property
    def words(self) -> list[int]:
        return self._numbers([m.start() for m in WORD.finditer(self.text)])

    @cached_property
    def sentences(self) -> list[int]:
        return self._numbers([0, *(m.end() for m in SENTENCE.finditer(self.text) if m.end() < len(self.text))])

    @cached_property
    def phrases(self) -> list[int]:
        """Leaning words with the words they lean on; a mark goes with what it follows."""
        starts: list[int] = []
        fresh, last_leans = True, False
        for match in WORD.finditer(self.text):
            word = match.group().strip().lower()
            mark = not any(c.isalnum() for c in word)
            leans = LEANING.fullmatch(word) is not None
            if fresh or (leans and not last_leans):
                starts.append(match.start())
            fresh, last_leans = mark and bool(word), leans
        return self._numbers(starts)

    def _numbers(self, starts: list[int]) -> list[int]:
        """Per token, in which run it begins. A token over an edge belongs where its first mark that is no space is."""
        found = []
        for start, stop in self.spans:
            piece = self.text[start:stop]
            space = len(piece) - len(piece.lstrip()) if piece.strip() else 0
            found.append(bisect_right(starts, start + space))
        return _rising(found)

    def within(self, spans: Sequence[Span]) -> list[bool]:
        """Per token, whether it touches one of these spans of characters, white space at its edges aside."""
        marked = [False] * (len(self.text) + 1)
        for start, stop in spans:
            for i in range(max(0, start), min(stop, len(self.text))):
                marked[i] = True
        return [any(marked[i] and not self.text[i].isspace() for i in range(a, b)) for a, b in self.spans]


def _rising(numbers: list[int]) -> list[int]:
    """Counted from 0, each new number one more."""
    found: list[int] = []
    last = None
    for number in numbers:
        found.append((found[-1] if found else -1) + (number != last))
        last = number
    return found


def pieces_of(text: str, tokenizer: Any) -> tuple[list[int], list[Span]]:
    """A text's tokens, none added, and the spans of characters they stand for, which tile the text."""
    if not getattr(tokenizer, "is_fast", False):
        raise SourceError(
            f"{type(tokenizer).__name__} does not say where in a text its tokens stand; take a fast tokenizer "
            "(AutoTokenizer gives one where there is a tokenizer.json)"
        )
    if not text:
        return [], []
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    spans: list[Span] = []
    at = 0
    for _, stop in coded["offset_mapping"]:
        stop = max(at, stop)
        spans.append((at, stop))
        at = stop
    if spans and at < len(text):  # what a tokenizer leaves out behind the last token
        spans[-1] = (spans[-1][0], len(text))
    return list(coded["input_ids"]), spans
