"""What must stay of a text: digits, negations, identifiers, code, structure, words of the user's choice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from .source import Span

NEGATIONS = re.compile(
    r"\b(?:not|no|never|nobody|nothing|nowhere|none|neither|nor|without|cannot|except|unless|\w+n['\u2019]t)\b",
    re.IGNORECASE,
)
IDENTIFIER = re.compile(
    r"""https?://\S+
    |(?<![\w.+-])[\w.+-]+@[\w-]+\.[\w.]+           # addresses
    |(?<![\w.~/-])(?:[\w.~-]*/)+[\w.-]+            # paths
    |(?<!\w)(?=\w*[A-Za-z])\w*_\w*(?:\(\))?       # snake_case
    |(?<!\w)[A-Za-z]*[a-z][A-Z]\w*(?:\(\))?       # camelCase
    |(?<!\w)(?=\w*\d)(?=\w*[A-Za-z])\w+(?:-\w+)*   # mixed with digits
    |(?<!\w)\w+(?:\.[A-Za-z_]\w*)+(?:\(\))?        # dotted
    |(?<!\w)\w+\(\)""",
    re.VERBOSE,
)
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?')
ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|.)")
OPENING = re.compile(r"[{\[]")
FENCE = re.compile(r"^ {0,3}(`{3,}+|~{3,}+)(.*)$", re.MULTILINE)
INLINE = re.compile(r"`[^`\n]+`")
DIGITS = re.compile(r"(?:(?<!\w)[-+])?\d(?:[-\d.,:/]*\d)?")


def digits(text: str) -> list[Span]:
    """Numbers, dates and times, with what joins their digits."""
    return [m.span() for m in DIGITS.finditer(text)]


def negations(text: str) -> list[Span]:
    """English words that turn a sentence round."""
    return [m.span() for m in NEGATIONS.finditer(text)]


def identifiers(text: str) -> list[Span]:
    """Addresses, paths, names in snake_case, camelCase and dotted ones, and words with digits in them."""
    return [m.span() for m in IDENTIFIER.finditer(text)]


def code(text: str) -> list[Span]:
    """Fenced blocks and `code` in a line, as markdown has them."""
    found, opened = [m.span() for m in INLINE.finditer(text)], None
    for fence in FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif fence[1].startswith(opened[1]) and not fence[2].strip():
            found.append((opened.start(), fence.end()))
            opened = None
    return sorted(found)


def jsons(text: str) -> list[Span]:
    """Of JSON objects and arrays that stand in a text all but the words in their strings: keys, numbers and names stay,
    prose may get shorter."""
    found = []
    for at, stop, _ in _values(text):
        for string in STRING.finditer(text, at, stop):
            if string[2] or not any(c.isspace() for c in string[1]):
                continue
            for start, end in _between(string.span(1), [m.span() for m in ESCAPE.finditer(text, *string.span(1))]):
                found.append((at, start))
                at = end
        found.append((at, stop))
    return found


def _between(whole: Span, spans: Sequence[Span]) -> list[Span]:
    """What is left of a span without some in it."""
    edges = [whole[0], *(edge for span in spans for edge in span), whole[1]]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def _values(text: str) -> list[tuple[int, int, Any]]:
    """JSON objects and arrays in a text: from, up to, and what they are."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while opening := OPENING.search(text, at):
        at = opening.start()
        try:
            value, stop = decoder.raw_decode(text, at)
        except ValueError:
            at += 1
            continue
        except RecursionError:  # no text has so many brackets in each other
            break
        if value:
            found.append((at, stop, value))
        at = stop
    return found


def _shape(value: Any) -> Any:
    """A JSON value without its prose."""
    if isinstance(value, dict):
        return {key: _shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shape(inner) for inner in value]
    return "" if isinstance(value, str) and any(c.isspace() for c in value) else value


KINDS: dict[str, Callable[[str], list[Span]]] = {
    "digits": digits, "negations": negations, "identifiers": identifiers, "code": code, "json": jsons,
}  # fmt: skip


def forced(text: str, kinds: Sequence[str], words: Sequence[str]) -> list[Span]:
    """Spans of a text that stay: of some kinds, and wherever one of these words stands (case and all)."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"protect={'+'.join(unknown)}: choose of {', '.join(KINDS)}")
    found = [span for kind in kinds for span in KINDS[kind](text)]
    for word in words:
        if not word:
            raise ValueError("force='': name words, or marks, that shall stay")
        whole = rf"(?<!\w){re.escape(word)}(?!\w)" if word[0].isalnum() and word[-1].isalnum() else re.escape(word)
        found += [m.span() for m in re.finditer(whole, text)]
    return sorted(found)


def broken(before: str, after: str, words: Sequence[str], kinds: Sequence[str]) -> str:
    """What a shorter text lacks that must stay, or how its structure broke, in words; "" where all is well."""
    for word in words:
        if before.count(word) and not after.count(word):
            return f"{word!r} must stay and is gone"
    if "json" in kinds and not _same_shape(before, after):
        return "its JSON is another now"
    if before.count("```") % 2 == 0 and after.count("```") % 2:
        return "a code fence is open"
    return ""


def _same_shape(before: str, after: str) -> bool:
    left, right = ([_shape(value) for *_, value in _values(text)] for text in (before, after))
    return len(left) == len(right) and all(_prose(a, b) for a, b in zip(left, right, strict=True))


def _prose(before: Any, after: Any) -> bool:
    """Whether two values differ in prose at most; of prose a single word may be left."""
    if isinstance(before, dict):
        return (
            isinstance(after, dict) and list(before) == list(after) and all(_prose(before[k], after[k]) for k in before)
        )
    if isinstance(before, list):
        return isinstance(after, list) and len(before) == len(after) and all(map(_prose, before, after))
    return isinstance(after, str) if before == "" else before == after
