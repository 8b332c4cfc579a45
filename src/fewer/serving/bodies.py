"""The body of a request: its messages, and where each stands, so that all else goes on byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

Span = tuple[int, int]
SPACE = re.compile(r"[ \t\n\r]*")


class BodyError(ValueError):
    """A body without messages; why, in words that say nothing of what is in it."""


@dataclass(frozen=True, eq=False)
class Body:
    """text: all of it. messages, places: each message, and where it stands in the text."""

    text: str
    messages: list[Any]
    places: list[Span]

    @classmethod
    def of(cls, raw: bytes) -> Body:
        """Raises BodyError."""
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise BodyError("the body is not in UTF-8") from error
        try:
            members = [(key, place) for key, place in _members(text) if key == "messages"]
            if len(members) != 1:
                raise BodyError("the body has no messages" if not members else "the body has messages twice")
            found = list(_elements(text, members[0][1][0]))
        except BodyError:
            raise
        except (ValueError, RecursionError, IndexError) as error:
            raise BodyError("the body is not JSON") from error
        return cls(text, [value for value, _ in found], [place for _, place in found])

    def with_messages(self, messages: Sequence[Any]) -> bytes:
        """The body with other messages, as many; those that are the same objects stay as they are written.
        Raises ValueError for what JSON cannot say, such as infinity."""
        parts, at = [], 0
        for (start, stop), old, new in zip(self.places, self.messages, messages, strict=True):
            if new is not old:
                parts += [self.text[at:start], json.dumps(new, allow_nan=False, separators=(",", ":"))]
                at = stop
        return "".join([*parts, self.text[at:]]).encode()


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_constant)


def _members(text: str) -> Iterator[tuple[str, Span]]:
    """Keys of the object a text is, each with where its value stands."""
    at = _open(text, 0, "{")
    if text[at] == "}":
        _end(text, at + 1)
        return
    while True:
        key, at = DECODER.raw_decode(text, at)
        if not isinstance(key, str):
            raise ValueError
        start = _open(text, at, ":")
        _, stop = DECODER.raw_decode(text, start)
        yield key, (start, stop)
        at = _space(text, stop)
        if text[at] == "}":
            _end(text, at + 1)
            return
        at = _open(text, at, ",")


def _elements(text: str, at: int) -> Iterator[tuple[Any, Span]]:
    """Of the array that begins there, which is known to be JSON, each with where it stands."""
    if text[at] != "[":
        raise BodyError("its messages are no list")
    at = _space(text, at + 1)
    while text[at] != "]":
        value, stop = DECODER.raw_decode(text, at)
        yield value, (at, stop)
        at = _space(text, stop)
        if text[at] == ",":
            at = _space(text, at + 1)


def _space(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    return at if match is None else match.end()


def _open(text: str, at: int, mark: str) -> int:
    """Behind a mark and the space around it."""
    at = _space(text, at)
    if text[at] != mark:
        raise ValueError
    return _space(text, at + 1)


def _end(text: str, at: int) -> None:
    if _space(text, at) != len(text):
        raise ValueError
