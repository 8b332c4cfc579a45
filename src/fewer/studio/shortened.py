"""What left a text: in a terminal, as marks, and as a page that holds everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unicodedata import category

from rich.text import Text

from fewer.compression import Compressed

from . import style
from .report import templates

OPEN, CLOSE = "[-", "-]"


JOINERS = "\u200c\u200d"  # which scripts and emoji are written with


def visible(text: str) -> str:
    """A text as it may be shown: what a terminal would obey, or turns the order of letters, as a replacement mark."""
    return "".join(
        c if category(c)[0] != "C" or c in "\n\t" or c in JOINERS else "" if c == "\r" else "\ufffd" for c in text
    )


def marked(one: Compressed) -> str:
    """The whole text, what went in [-brackets-].

    >>> from types import SimpleNamespace
    >>> marked(SimpleNamespace(diff=lambda: [(True, "We met"), (False, " all"), (True, ".")]))
    'We met[- all-].'
    """
    runs = [(stays, visible(piece)) for stays, piece in one.diff()]
    return "".join(piece if stays else f"{OPEN}{piece}{CLOSE}" for stays, piece in runs)


def painted(one: Compressed) -> Text:
    """The whole text, what went dim and struck through."""
    found = Text()
    for stays, piece in one.diff():
        found.append(visible(piece), style="" if stays else "dim strike")
    return found


def page(one: Compressed, *, title: str, facts: list[tuple[str, str]]) -> str:
    """The whole text as HTML with what went marked, and what is left of it; no script, nothing from elsewhere.

    facts: names and what stands for them, shown above. Raises ReportError without jinja2.
    """
    gone = {span: name for name, span in one.dropped.items()}
    runs, at = [], 0
    for stays, piece in one.diff():
        span = (at, at + len(piece))
        runs.append((visible(piece), "" if stays else gone[span]))
        at = span[1]
    return templates().get_template("shortened.html.jinja").render(
        title=visible(title), facts=[(name, visible(value)) for name, value in facts], runs=runs,
        text=visible(one.text), notes=[visible(note) for note in one.notes], spans=len(gone), style=style,
    )  # fmt: skip


def write(one: Compressed, path: Path, **about: Any) -> None:
    path.write_text(page(one, **about), encoding="utf-8")
