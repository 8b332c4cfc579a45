"""Many texts by name: files, folders, JSON lines, what comes in, and sets of the `datasets` library; one at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INPUT = "-"
"""Names what comes in from another program."""
SET = "datasets:"
"""Begins the name of a set of the `datasets` library."""
LINES = (".jsonl", ".ndjson")
SAVED = ("dataset_info.json", "dataset_dict.json")  # what save_to_disk leaves in a folder


class DocumentError(ValueError):
    """Texts that are not there, or cannot be read."""


@dataclass(frozen=True)
class Document:
    """name: where it comes from: a path, FILE:LINE, SET:NUMBER. text: None where it could not be read; error says why.

    file    whether it is a file of its own
    """

    name: str
    text: str | None = None
    error: str = ""
    file: bool = False


class Documents:
    """The texts of files, folders (all files in them, in order of their paths, hidden ones left out), JSON lines, sets.

    field   of a line or a row of a set: which holds the text. split: of a set.
    Raises  DocumentError for a name of nothing, a set that has no such field, two files of one name. A text that cannot
            be read raises nothing: it comes without one, and says why.
    """

    def __init__(self, names: Sequence[str], *, field: str = "text", split: str = "train") -> None:
        self.field, self.split = field, split
        self._parts = [_part(name, field, split, alone=len(names) == 1) for name in names]
        seen: set[str] = set()
        for file in self.files:
            if file in seen:
                raise DocumentError(f"two files are called {file}; give each once")
            seen.add(file)

    @property
    def files(self) -> list[str]:
        """The names of texts that are a file each."""
        return [file.name for part in self._parts if isinstance(part, list) for file in part if file.path != INPUT]

    @property
    def count(self) -> int | None:
        """How many texts there are; None where that shows only at the end."""
        return None if any(not hasattr(part, "__len__") for part in self._parts) else sum(map(len, self._parts))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Document]:
        for part in self._parts:
            yield from (file.read() for file in part) if isinstance(part, list) else part


def single(names: Sequence[str]) -> bool:
    """Whether these names stand for one text."""
    return len(names) == 1 and (
        names[0] == INPUT or (Path(names[0]).is_file() and Path(names[0]).suffix.lower() not in LINES)
    )


def read(name: str) -> str:
    """The text of a file, or what comes in, to the letter; a byte order mark is none of it.

    Raises DocumentError where there is none, or it is no text.
    """
    try:
        raw = sys.stdin.buffer.read() if name == INPUT else Path(name).read_bytes()
    except OSError as error:
        raise DocumentError(f"{name} cannot be read: {error.strerror or error}") from error
    return _text(raw, "what comes in" if name == INPUT else name)


@dataclass(frozen=True)
class _File:
    name: str
    path: str

    def read(self) -> Document:
        try:
            return Document(self.name, read(self.path), file=self.path != INPUT)
        except DocumentError as error:
            return Document(self.name, error=str(error), file=self.path != INPUT)


@dataclass(frozen=True)
class _Lines:
    name: str
    field: str

    def __len__(self) -> int:
        with Path(self.name).open("rb") as file:
            return sum(1 for raw in file if raw.strip())

    def __iter__(self) -> Iterator[Document]:
        with Path(self.name).open("rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    yield self._read(raw, f"{self.name}:{number}")

    def _read(self, raw: bytes, name: str) -> Document:
        try:
            row = json.loads(_text(raw, "the line"))
        except (ValueError, RecursionError) as error:
            return Document(name, error=f"no JSON: {error}")
        return _of(row, name, self.field)


@dataclass(frozen=True)
class _Stream:
    """A set whose length nobody knows."""

    name: str
    table: Any
    field: str

    def __iter__(self) -> Iterator[Document]:
        return (_of(row, f"{self.name}:{number}", self.field) for number, row in enumerate(self.table))


class _Rows(_Stream):
    def __len__(self) -> int:
        return len(self.table)

    @staticmethod
    def of(name: str, table: Any, field: str) -> _Stream:
        known = getattr(table, "column_names", None)
        if known and field not in known:
            raise DocumentError(f"{name} has no column {field!r}; it has {', '.join(known)}: give --field")
        return _Rows(name, table, field) if hasattr(table, "__len__") else _Stream(name, table, field)


Part = list[_File] | _Lines | _Stream


def _part(name: str, field: str, split: str, *, alone: bool) -> Part:
    """The files a name stands for, or texts as they are read."""
    path = Path(name)
    if name == INPUT:
        return [_File(INPUT, INPUT)]
    if name.startswith(SET):
        return _Rows.of(name, _set(name.removeprefix(SET), split), field)
    if path.is_dir() and any((path / file).is_file() for file in SAVED):
        return _Rows.of(name, _saved(path, split), field)
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        if not inside:
            raise DocumentError(f"{name} holds no files")
        return [_File((p.relative_to(path) if alone else p).as_posix(), str(p)) for p in inside]
    if not path.is_file():
        raise DocumentError(
            f"no file or folder {name}; a set of the datasets library is written {SET}NAME, what comes in from another "
            f"program {INPUT}"
        )
    if path.suffix.lower() in LINES:
        return _Lines(name, field)
    return [_File(name, name)]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _text(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{name} is no text in UTF-8: {error}") from error


def _of(row: Any, name: str, field: str) -> Document:
    if not isinstance(row, dict):
        return Document(name, error=f"{type(row).__name__}, not an object with a field {field!r}")
    if field not in row:
        return Document(name, error=f"no field {field!r}; there is {', '.join(map(str, row)) or 'none'}: give --field")
    if not isinstance(row[field], str):
        return Document(name, error=f"field {field!r} is no text but {type(row[field]).__name__}")
    return Document(name, row[field])


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DocumentError("sets need the `datasets` library: pip install 'fewer[data]'") from error
    return datasets


def _set(name: str, split: str) -> Any:
    """A set by its name, or NAME:CONFIGURATION."""
    library = _library()
    whole, _, configuration = name.partition(":")
    try:
        return library.load_dataset(whole, configuration or None, split=split)
    except Exception as error:  # the library raises errors of many kinds, of its own and of others
        raise DocumentError(f"{SET}{name} could not be had: {error}") from error


def _saved(folder: Path, split: str) -> Any:
    """A set that save_to_disk has left in a folder."""
    library = _library()
    try:
        table = library.load_from_disk(str(folder))
    except Exception as error:
        raise DocumentError(f"{folder} could not be read as a set: {error}") from error
    if hasattr(table, "keys"):
        if split not in table:
            raise DocumentError(f"{folder} has no split {split!r}; it has {', '.join(table)}: give --split")
        return table[split]
    return table
