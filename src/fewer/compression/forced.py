"""What must stay of a text: digits, negations, identifiers, code, structure, words of the user's choice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from .source import Span

NEGATIONS = re.compile(
    r"\b(?:not|no|never|none|neither|nor|without|cannot|except|unless|\w+n['\u2019]t)\b", re.IGNORECASE
)
IDENTIFIER = re.compile(
    r"(?:https?://\S+|[\w.+-]+@[\w-]+\.[\w.]+|(?:[\w.~-]*/)+[\w.-]+|\w*[a-z]\w*(?:_\w+)+|_+\w+"
    r"|\b[A-Za-z]*[a-z][A-Z]\w*|\b(?=\w*\d)(?=\w*[A-Za-z])\w+(?:-\w+)*|\b[\w]+(?:\.[A-Za-z_]\w*)+(?:\(\))?|\b\w+\(\))"
)
FENCE = re.compile(r"^(?P<mark>```+|~~~+).*?^(?P=mark)[^\S\n]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
DIGITS = re.compile(r"[-+]?\d[\d.,:/]*\d|\d")


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
    return [m.span() for m in FENCE.finditer(text)]


def jsons(text: str) -> list[Span]:
    """JSON objects and arrays that stand in a text."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (start := min((i for i in (text.find("{", at), text.find("[", at)) if i >= 0), default=-1)) >= 0:
        try:
            value, stop = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            at = start + 1
            continue
        if isinstance(value, dict) or (isinstance(value, list) and value):
            found.append((start, stop))
        at = stop
    return found


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
    if "json" in kinds and _parses(before) and not _parses(after):
        return "it was JSON and no longer is"
    if before.count("```") % 2 == 0 and after.count("```") % 2:
        return "a code fence is open"
    return ""


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
