"""Texts that a machine reads too: JSON, whose strings alone may get shorter, and code, which stays."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .source import JOINT, Span

STRING = re.compile(r'"(?:[^"\\]|\\.)*"(\s*:)?', re.DOTALL)
WORDY = 12  # words a string has at least to be shortened; names, dates, paths and states have fewer
GLANCE, LINE = 10_000, 200  # characters of a text, and of each line, that are looked at to tell code from prose
QUOTED = re.compile(r"/\*.*?\*/|\"{3}.*?\"{3}|^[^\S\n]*#\s.*?$", re.DOTALL | re.MULTILINE)
"""Comments and docstrings: code however much of them is prose."""
MARKED = re.compile(  # lines that read as source code
    r"""^\s*(?:
        [{}()\[\]]+[;,]?\s*$                                                        # brackets alone
      | (?://|\#\s*(?:include|define|undef|if|ifdef|ifndef|elif|else|endif|pragma)\b|\#!|@\w|<\/?\w+[^>]*>\s*$)
      | (?:def|class|import|from|return|if|elif|else|for|while|try|except|with|raise|yield|assert|async|await|pass|break
          |function|const|let|var|export|public|private|protected|static|void|package|func|fn|impl|struct|enum|use|match
          |switch|case|end|fi|done|then|local)\b.*[:;{()}\]=,]\s*$
      | (?:from|import|return|package|use|raise|yield)\s+[\w.'"({\[:*]+(?:\s+(?:import|as)\s+[\w.*, ]+)?;?\s*$
      | [\w.\[\]'"*&, ]+\s*(?::\s*[\w.\[\], |]+)?\s*[-+*/|&:]?=[^=].*$              # assignments
      | [\w.>:-]*\w\(.*\)?[;,:{]?\s*$                                               # calls
      | .*[;{}]\s*$
    )""",
    re.VERBOSE,
)


def is_json(text: str) -> bool:
    """Whether a text is one JSON object or array. Raises RecursionError for one that is too deep to say."""
    text = text.strip()
    if text[:1] + text[-1:] not in ("{}", "[]"):
        return False
    return shape(text) is not None


def is_code(text: str) -> bool:
    """Whether a text reads as source code: most of its lines do. Guessed by their looks, of any language with braces,
    semicolons or Python's colons; a long text by its beginning."""
    lines = [short for line in QUOTED.sub("", text[:GLANCE]).split("\n") if (short := " ".join(line[:LINE].split()))]
    return len(lines) >= 3 and 2 * sum(MARKED.match(line) is not None for line in lines) > len(lines)


def shape(text: str) -> Any:
    """What a JSON text holds, in which every string is "", numbers are as they are written and keys keep their order
    and number; None for a text that is not JSON. Raises RecursionError for one that is too deep."""

    def bare(value: Any) -> Any:
        if isinstance(value, _Number):
            return value
        if isinstance(value, str):
            return ""
        if isinstance(value, tuple):
            return tuple((key, bare(one)) for key, one in value)
        return [bare(one) for one in value] if isinstance(value, list) else value

    try:
        return (bare(json.loads(text, object_pairs_hook=tuple, parse_int=_Number, parse_float=_Number,
                                parse_constant=_Number)),)  # fmt: skip
    except ValueError:
        return None


class _Number(str):
    """A number as it is written."""


@dataclass(frozen=True, eq=False)
class Strings:
    """The strings of a JSON text that may be shortened, one behind the other in `text`, two line breaks between them.

    source   the JSON text. places: per string, where its literal stands there
    """

    source: str
    places: tuple[Span, ...]
    values: tuple[str, ...]

    @classmethod
    def of(cls, source: str) -> Strings:
        places, values = [], []
        for match in STRING.finditer(source):
            if match[1] is not None:  # a key
                continue
            value = json.loads(match.group(), strict=False)
            if len(value.split()) >= WORDY and not is_json(value) and not is_code(value) and _sound(value):
                places.append(match.span())
                values.append(value)
        return cls(source, tuple(places), tuple(values))

    @cached_property
    def text(self) -> str:
        return JOINT.join(self.values)

    def shortened(self, kept: Sequence[Span], stays: Sequence[Span]) -> tuple[str, list[Span]]:
        """The JSON text with the words of which most is kept, and the spans of `text` that went.

        kept: spans of `text` that stay. stays: spans whose words stay as wholes.
        """
        marks = bytearray(len(self.text))
        for start, stop in kept:
            marks[start:stop] = b"\1" * (stop - start)
        for start, stop in stays:
            marks[start:stop] = b"\2" * (stop - start)
        found, gone, at, last = [], [], 0, 0
        for (start, stop), value in zip(self.places, self.values, strict=True):
            short, left = _words(value, marks[at : at + len(value)])
            gone += [(at + a, at + b) for a, b in left]
            literal = self.source[start:stop]
            new = json.dumps(short, ensure_ascii=literal.isascii()) if left else literal
            found += [self.source[last:start], new]
            at, last = at + len(value) + len(JOINT), stop
        return "".join([*found, self.source[last:]]), gone


def _words(value: str, marks: bytearray) -> tuple[str, list[Span]]:
    """The words of a string of which most is marked, and the spans of it that went."""
    parts: list[str] = []
    gone: list[Span] = []
    at = 0  # up to here all is decided
    for match in re.finditer(r"\S+", value):
        start, stop = match.span()
        mine = marks[start:stop]
        if 2 not in mine and 2 * sum(mine) < len(mine):
            continue
        gap = value[at:start]
        if gap.strip():  # words went between the last that stayed and this one
            gone.append((at, start))
            gap = "" if not parts else "\n" if "\n" in gap else " "
        parts += [gap, value[start:stop]]
        at = stop
    if value[at:].strip():
        gone.append((at, len(value)))
    else:
        parts.append(value[at:])
    return "".join(parts), gone


def _sound(value: str) -> bool:
    """Whether a string is one of characters: halves of a surrogate pair are none."""
    return not any("\ud800" <= c <= "\udfff" for c in value)
