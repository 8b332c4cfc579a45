"""What a text became: which spans stayed, which went, and how to have them back."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fewer.core.plan import Hard

from .source import Source, Span, pieces_of

BREAKS = re.compile(r"\s+")
FENCES = ("```", "~~~")
LEANING = frozenset(
    ",.;:!?)]}%\u2026\uff0c\u3002\uff1b\uff1a\uff01\uff1f\uff09\u300d\u300f\u3011\u3001"
)  # marks that stand right behind a word


@dataclass(frozen=True, eq=False)
class Compressed:
    """source: what it was made of. plan: which of its tokens stand where, (1, N) -> (1, M).

    before, after   tokens of the whole text and of what is left of it, both counted by the tokenizer named `counted`
    notes           what could not be done as asked, in words; () where all was
    """

    source: Source
    plan: Hard
    text: str
    before: int
    after: int
    notes: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        """The share of tokens that is left."""
        return self.after / self.before if self.before else 1.0

    @cached_property
    def order(self) -> list[int]:
        """The tokens that stay, where they stand now."""
        return kept(self.plan)

    @cached_property
    def spans(self) -> list[Span]:
        """Of characters that stay, as they stood, neighbours joined; all of a text that has no tokens."""
        if not len(self.source):
            return [(0, len(self.source.text))] * bool(self.source.text)
        return _runs([self.source.spans[i] for i in sorted(self.order)])

    @cached_property
    def dropped(self) -> dict[str, Span]:
        """Spans that went, by their ids."""
        at, gone = 0, []
        for start, stop in [*self.spans, (len(self.source.text),) * 2]:
            if start > at:
                gone.append((at, start))
            at = stop
        return {self.name(span): span for span in gone}

    def name(self, span: Span) -> str:
        """The id of a span: of the text it is of and of its place."""
        return f"{digest(self.source.text)}:{span[0]}-{span[1]}"

    def restore(self, name: str | None = None) -> str:
        """A dropped span by its id; the whole text without one. Raises KeyError for an id of none."""
        if name is None:
            return self.source.text
        if name not in self.dropped:
            raise KeyError(f"no dropped span {name!r}; such as {', '.join([*self.dropped][:3])}")
        start, stop = self.dropped[name]
        return self.source.text[start:stop]

    def diff(self) -> list[tuple[bool, str]]:
        """The whole text in runs, each with whether it stayed."""
        found, at = [], 0
        for start, stop in self.spans:
            found += [(False, self.source.text[at:start])] * (start > at)
            found.append((True, self.source.text[start:stop]))
            at = stop
        return found + [(False, self.source.text[at:])] * (at < len(self.source.text))

    def recover(self, answer: str) -> str:
        """An answer whose words were taken from the shortened text, in the words of the whole one.

        A run of the answer's words that stands in the shortened text is replaced by the shortest run of the whole text
        that holds these words in this order. Source: LongLLMLingua, arXiv:2310.06839, section 4.4.
        """
        words, short = re.findall(r"\S+", answer), re.findall(r"\S+", self.text)
        whole = [m.span() for m in re.finditer(r"\S+", self.source.text)]
        plain = [self.source.text[a:b] for a, b in whole]
        result, i = [], 0
        while i < len(words):
            run = _longest(words[i:], short)
            found = _shortest(words[i : i + run], plain) if run > 1 else None
            if found is None:
                result.append(words[i])
                i += 1
            else:
                result.append(self.source.text[whole[found[0]][0] : whole[found[1]][1]])
                i += run
        return " ".join(result)


def digest(text: str) -> str:
    """Twelve characters that tell texts apart."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def kept(plan: Hard, row: int = 0) -> list[int]:
    """The tokens that stay of a text, in the order they stand now."""
    anchors, length = plan.anchor[row].tolist(), plan.length
    return anchors if length is None else anchors[: int(length[row])]


def composed(source: Source, order: Sequence[int]) -> str:
    """The tokens that stay as a text: characters of the source, and where some are gone between two words a break that
    stood there. Contexts that were moved stand an empty line apart."""
    text, last = "", None
    for start, stop in _runs([source.spans[i] for i in order]):
        piece = source.text[start:stop]
        if last is not None and text.endswith(FENCES) and "\n" in source.text[last:start]:
            piece = "\n" * (not _lines(piece)) + piece  # what closes a block of code stands alone on its line
        if last is None:
            piece = piece.lstrip() if start else piece
        elif last > start:
            text += "\n" * max(0, 2 - _lines(text[len(text.rstrip()) :]) - _lines(piece))
        elif text and not piece[0].isspace() and not text[-1].isspace():
            text += "" if piece[0] in LEANING else _break(source.text[last:start])
        text += piece
        last = stop
    return text


def _break(gap: str) -> str:
    """What stands for a gap: its widest break between lines, else a space of it, else nothing."""
    runs = BREAKS.findall(gap)
    if not runs:
        return ""
    lines = max(run.count("\n") for run in runs)
    return "\n" * min(lines, 2) if lines else runs[0][0]


def _lines(piece: str) -> int:
    """Line breaks at the beginning."""
    return piece[: len(piece) - len(piece.lstrip())].count("\n")


def _runs(spans: Sequence[Span]) -> list[Span]:
    """Neighbours joined, in the order given."""
    found: list[Span] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        elif stop > start:
            found.append((start, stop))
    return found


def _longest(words: list[str], text: list[str]) -> int:
    """How many of the first words stand in the text one behind the other."""
    best = 0
    for i, word in enumerate(text):
        if word == words[0]:
            run = 0
            while run < len(words) and i + run < len(text) and text[i + run] == words[run]:
                run += 1
            best = max(best, run)
    return best


def _shortest(words: list[str], text: list[str]) -> tuple[int, int] | None:
    """The first and last place of the shortest run of the text that holds the words in order."""
    best: tuple[int, int] | None = None
    for start in (i for i, word in enumerate(text) if word == words[0]):
        at = start
        for word in words[1:]:
            at = next((j for j in range(at + 1, len(text)) if text[j] == word), -1)
            if at < 0:
                break
        if at >= 0 and (best is None or at - start < best[1] - best[0]):
            best = (start, at)
    return best


@dataclass(eq=False)
class Shelf:
    """Texts that were shortened, by their digest, so that a dropped span comes back by its id alone.

    most    texts that are kept; the one asked for longest ago goes first. seconds: how long each is kept.
    Safe to use from several threads.
    """

    most: int = 10_000
    seconds: float = float("inf")
    _texts: OrderedDict[str, tuple[float, str]] = field(default_factory=OrderedDict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def put(self, one: Compressed) -> None:
        self.put_text(one.source.text)

    def put_text(self, text: str) -> None:
        with self._lock:
            self._texts[digest(text)] = (time.monotonic(), text)
            self._texts.move_to_end(digest(text))
            while len(self._texts) > self.most:
                self._texts.popitem(last=False)

    def restore(self, name: str) -> str:
        """A span by its id, `Compressed.dropped`; a whole text by its digest. Raises KeyError, saying what is wrong."""
        key, _, place = name.partition(":")
        ends = re.fullmatch(r"(\d+)-(\d+)", place) if place else None
        if place and ends is None:
            raise KeyError(f"{name!r} is no id of a span: they read like 0123456789ab:40-52")
        with self._lock:
            when, text = self._texts.get(key, (0.0, None))
            if text is not None and time.monotonic() - when > self.seconds:
                del self._texts[key]
                raise KeyError(f"{name!r} has expired: texts are kept {self.seconds:g} seconds")
            if text is None:
                raise KeyError(f"{name!r} is not known here: at most {self.most:,} texts are kept; ask for it in full")
            self._texts.move_to_end(key)
        if ends is None:
            return text
        start, stop = int(ends[1]), int(ends[2])
        if not start < stop <= len(text):
            raise KeyError(f"{name!r} is outside its text of {len(text):,} characters")
        return text[start:stop]


def counted(text: str, tokenizer: Any) -> int:
    """How many tokens a text has."""
    if getattr(tokenizer, "is_fast", False):
        return len(pieces_of(text, tokenizer)[0])
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
