"""What the commands print: one console for results, one for all else; tables that fit; JSON."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

ACCENT = "bright_red"
WIDE = 150  # columns of output that goes to a file or a pipe, where nobody says how wide it is

READABLE = 36  # columns a sentence needs at least

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
Threads = Annotated[
    int | None,
    typer.Option(min=0, help="Torch threads; one is timed undisturbed by others; 0 = as torch has it. Default: 1."),
]


WINDOW = Console().is_terminal  # whether somebody looks on, through a window of some width

out = Console(highlight=False, emoji=False, width=None if WINDOW else WIDE)
err = Console(stderr=True, highlight=False, emoji=False)


def clean(text: object) -> str:
    """A text as it may be printed: control characters, which a terminal would obey, made visible."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(text))


def shown(text: object) -> str:
    """A text for between markup, taken as it is."""
    return escape(clean(text))


def say(line: object) -> None:
    """A line of results; the terminal breaks it."""
    out.print(shown(line), soft_wrap=True)


def note(line: object) -> None:
    """A line beside the results, in grey, on the error stream."""
    err.print(f"[dim]{shown(line)}[/]", soft_wrap=True)


def complain(line: str, what: str = "error") -> None:
    """A red word and one line."""
    err.print(f"[bold {ACCENT}]{what}[/] {shown(' '.join(line.split()))}", soft_wrap=True)


def wrote(path: Path) -> None:
    out.print(f"[dim]wrote[/] {shown(path)}", soft_wrap=True)


def as_json(value: Any) -> None:
    """A value on the output, as JSON."""
    print(json.dumps(value, indent=1, default=str))


def facts(pairs: Sequence[tuple[str, object]]) -> None:
    """Names and what stands for them, line by line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(clean(name)), Text(clean(value)))
    out.print(table)


def grid(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table whose first column tells the rows apart at any width: the last one and long ones fold, and where a
    reader's window has no room for those between, they are left out from the right."""
    cells = [[clean(cell) for cell in row] for row in rows]
    sizes = [max(map(len, column)) + 1 for column in zip(heads, *cells, strict=True)]
    kept = list(range(len(heads)))

    room = READABLE if WINDOW else 2 * READABLE  # a reader who searches wants a cell on one line

    def needed() -> int:
        return sum(min(sizes[i], room) if folds(i) else sizes[i] for i in kept)

    def folds(i: int) -> bool:
        return i == kept[-1] or (i > 0 and sizes[i] > room)

    while WINDOW and len(kept) > 2 and needed() > out.width:
        kept.pop(-2)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for i in kept:
        table.add_column(
            heads[i],
            no_wrap=not folds(i),
            overflow="fold",
            style=ACCENT if i == 0 else "",
        )
    for row in cells:
        table.add_row(*(Text(row[i]) for i in kept))
    out.print(table, width=max(out.width, needed()), crop=False, soft_wrap=True)


def wide_grid(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[Text]]) -> None:
    """A table of numbers behind names. heads: title and unit of each column. Where a reader's window is too narrow, it
    goes on below, the names repeated."""
    sizes = [max(*map(len, head), *(row[i].cell_len for row in rows)) + 2 for i, head in enumerate(heads)]
    parts, used = [[0]], sizes[0]
    for i in range(1, len(heads)):
        if WINDOW and used + sizes[i] > out.width and len(parts[-1]) > 1:
            parts.append([0])
            used = sizes[0]
        parts[-1].append(i)
        used += sizes[i]
    for number, part in enumerate(parts):
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
        for i in part:
            title = f"{heads[i][0]}\n[dim not bold]{heads[i][1]}[/]"
            table.add_column(title, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(row[i] for i in part))
        if number:
            out.print()
        width = sum(sizes[i] for i in part)
        out.print(table, width=max(width, out.width), crop=False, soft_wrap=True)


def writable(path: Path, *, folder: bool = False, option: str = "--out") -> Path:
    """A path, once it is sure that it can be written to; its folders are made. Raises ValueError where it is not.

    folder: whether it is to hold files; else it is one. option: by which it was given.
    """
    home = path if folder else path.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
        if not folder and path.is_dir():
            raise IsADirectoryError(f"it is a folder; name a file in it, such as {path / 'out'}")
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise ValueError(
            f"{option} {path} cannot be written: {error.strerror or error}; give another {option}"
        ) from error
    return path
