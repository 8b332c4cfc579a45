"""Results that carry a passport: what was measured, against what, on what, how often, at which commit."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import reprlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from filelock import FileLock, Timeout

import fewer

from .stats import Interval


class JournalError(ValueError):
    """A results file that was not written by `fewer bench`, cannot be written, or is being written by another run."""


@dataclass(frozen=True)
class Passport:
    """Everything one must know to read a number, or to measure it again.

    what, against, spread    in words; on: data, model and hardware; n: images; repeats: timed comparisons
    unit, notes              what n counts; what else must be known of the data, such as items that could not be read
    """

    what: str
    against: str
    model: str
    data: str
    n: int
    repeats: int
    spread: str
    batch: int
    device: str
    dtype: str
    threads: int
    execution: str
    seed: int
    hardware: str
    versions: dict[str, str]
    commit: str
    when: str
    unit: str = "images"
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Score:
    """What one task of a language model says about a method.

    value, change    with 95 % intervals; change: against the unreduced model on the same items (a difference, for
                     perplexity a ratio)
    n                items it was measured on
    """

    task: str
    value: Interval
    change: Interval | None
    n: int


@dataclass
class Cost:
    """Operations and memory of one forward pass.

    gflops, gflops_own    multiply-adds of one item in 10^9, all and the method's own
    ceiling               ratio of the FLOPs of the model: the speed-up they would allow
    peak                  bytes of tensors alive at once during one batch, weights and input left out
    """

    gflops: float = 0.0
    gflops_own: float = 0.0
    ceiling: float = 1.0
    peak: int = 0


@dataclass
class Writing:
    """What a language model's cache held while it read and wrote, and how soon and how fast it wrote.

    sweep                 (depth in the context, share found, needles)
    kv_read, kv_end       bytes of keys and values once the context is read, and when the last token was written
    kv_peak, kv_full      the most held on the way, and what an unreduced cache holds at the end
    first, first_ratio    seconds to the first token, and those of the unreduced model over these
    decoding, sample      tokens per second behind the first one, and what was written
    """

    sweep: list[tuple[float, float, int]] = field(default_factory=list)
    kv_read: float = 0.0
    kv_peak: float = 0.0
    kv_end: float = 0.0
    kv_full: float = 0.0
    first: float = 0.0
    first_ratio: Interval | None = None
    decoding: float = 0.0
    sample: str = ""


@dataclass
class Drawn:
    """What is said of the pictures a generator made.

    frechet, kernel   distances of a classifier's features from those of real pictures
    moved             mean squared difference of pixels from the unreduced sample that began at the same noise
    steps             of each picture's path
    """

    frechet: float
    kernel: float
    moved: float
    steps: int


@dataclass
class Row:
    """One method at one setting: what every kind of model has, and the parts that only some have.

    method          text form; "unreduced" for the control, which is timed against itself
    trained         "" for methods without modules, else "packaged" or "untrained" (random modules)
    hits            which items were answered rightly, packed (`stats.unpack_hits`)
    difference      accuracy minus that of the unreduced model, paired
    scores          by task, for models of language
    agreement, kl   against the unreduced model's classes and probabilities (nats); for classifiers
    movement        mean 1 - cosine to the unreduced model's features; for models without classes
    tokens, final   mean tokens per block (attention and MLP), tokens after the last block, prefix included; of a
                    language model rows per layer, once the context is read
    speedup         median and quartiles of the pairwise ratios; of a language model: of decoding
    own_time        the method's share of the forward pass, planning and combining; None where there is no clock
    error           why there are no numbers, where there are none
    cost            operations and memory; writing: of language models only; drawn: of picture generators only
    """

    key: str
    method: str
    passport: Passport
    acts: str = ""
    trained: str = ""
    code: str = ""
    score: str = "accuracy"
    n: int = 0
    hits: str = ""
    accuracy: Interval | None = None
    difference: Interval | None = None
    scores: list[Score] = field(default_factory=list)
    agreement: float | None = None
    kl: float | None = None
    movement: float | None = None
    tokens: float = 0.0
    tokens_full: int = 0
    final: float = 0.0
    counts: list[float] = field(default_factory=list)
    speedup: Interval | None = None
    milliseconds: float = 0.0
    own_time: float | None = None
    picture: str | None = None
    notes: list[str] = field(default_factory=list)
    error: str = ""
    cost: Cost = field(default_factory=Cost)
    writing: Writing | None = None
    drawn: Drawn | None = None

    @property
    def name(self) -> str:
        """The method without its setting."""
        return self.method.partition(":")[0]

    @property
    def achieved(self) -> float | None:
        """Speed-up over ceiling."""
        return None if self.speedup is None else self.speedup.value / self.cost.ceiling

    @classmethod
    def of(cls, record: dict[str, Any]) -> Row:
        """A row from its JSON record. Records of before the parts, with all fields side by side, are read too.

        Raises   ValueError or TypeError where it is no such record.
        """
        if "cost" not in record:
            record = dict(record)
            for name, part in (("cost", Cost()), ("writing", Writing())):
                mine = {f.name: record.pop(f.name) for f in fields(part) if f.name in record}
                if any(mine[key] not in (value, []) for key, value in asdict(part).items() if key in mine):
                    record[name] = mine
        return _built(cls, record, "the row")


def _built(kind: Any, value: Any, where: str) -> Any:
    """A value of a field's type from its JSON form. Raises ValueError, naming the place, where it is of another."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if value is None else _built(parts[0], value, where)
    if origin is list and isinstance(value, list):
        return [_built(parts[0], item, where) for item in value]
    if origin is tuple and isinstance(value, list) and len(value) == len(parts):
        return tuple(_built(part, item, where) for part, item in zip(parts, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {name: _built(parts[1], item, f"{where}: {name}") for name, item in value.items()}
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        types, known = _types(kind), {f.name: f for f in fields(kind)}
        if unknown := sorted(value.keys() - known.keys()):
            raise ValueError(f"{where} has {', '.join(unknown)}, which this version does not know")
        needed = (n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING)
        if missing := [name for name in needed if name not in value]:
            raise ValueError(f"{where} lacks {', '.join(missing)}")
        return kind(**{name: _built(types[name], item, name) for name, item in value.items()})
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    raise ValueError(f"{where} is {reprlib.repr(value)}, not of type {getattr(kind, '__name__', kind)}")


_types: Any = cache(get_type_hints)


class Journal:
    """Rows in a JSON lines file, one appended as soon as it is measured.

    Reading changes nothing. A line that is no row - torn by a crash, or of another version - is passed over and told in
    `faults`; its row is measured again. A file without any row of ours is refused.

        journal = Journal(path)                     # to read
        with Journal.open(path) as journal: ...     # to write: the only one that does
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        self.faults: list[str] = []
        self._torn = 0  # bytes at the end that are no row
        self._open = False  # whether the last row lacks its newline
        if path.exists():
            self._read()

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Journal]:
        """A journal to write to, made where there is none. Raises JournalError, before anything is measured, where that
        cannot be done or another process is at it."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
            lock = FileLock(path.with_name(f".{path.name}.lock"))
            lock.acquire(timeout=0)
        except Timeout as error:
            raise JournalError(
                f"{path} is being written by another run; wait until it has ended, or give another --out"
            ) from error
        except OSError as error:
            raise JournalError(
                f"results cannot be written to {path.parent}: {error.strerror or error}; give another --out"
            ) from error
        try:
            journal = cls(path)
            journal._repair()
            yield journal
        finally:
            if not path.stat().st_size:
                path.unlink()  # nothing came of it
            lock.release()

    def _read(self) -> None:
        raw, ours = self.path.read_bytes(), False
        *lines, tail = raw.split(b"\n")
        self._torn = len(tail)
        for number, line in enumerate([*lines, tail], 1):
            line = line.strip(b" \t\r\0")  # a machine that goes down may leave zeros
            if not line:
                continue
            ours |= line.startswith(OURS) or OURS.startswith(line)
            try:
                row = Row.of(json.loads(line))
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                self.faults.append(f"line {number} is not a result of this version ({error})")
                continue
            self.rows[row.key] = row
            if number > len(lines):
                self._torn, self._open = len(tail) - len(tail.rstrip(b" \t\r\0")), True
        if self.faults and not self.rows and not ours:
            raise JournalError(f"{self.path}, {self.faults[0]}; give another --out")

    def _repair(self) -> None:
        """Cut off what a crash left of a last line; give a whole one its newline."""
        with self.path.open("r+b") as file:
            end = file.seek(-self._torn, os.SEEK_END)
            file.truncate()
            if self._open and end:
                file.write(b"\n")

    def done(self, key: str) -> Row | None:
        """The row measured with these settings, if any; failed ones are tried again."""
        row = self.rows.get(key)
        return row if row is not None and not row.error else None

    def add(self, row: Row) -> None:
        """Append a row, in one write: whatever else happens, the lines before it stay as they are."""
        self.rows[row.key] = row
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(asdict(row)).encode() + b"\n")


OURS = b'{"key": '  # how our lines begin, torn ones too


def key(**settings: Any) -> str:
    """A short name of a set of settings: equal settings, equal names, in every process."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def versions() -> dict[str, str]:
    import transformers

    return {
        "fewer": fewer.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip


@cache
def commit() -> str:
    """The commit this package runs from, + where files were changed since; its version where it was installed."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        run = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True, timeout=10)
        return run.stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):  # some other repository happens to lie around us
            return fewer.__version__
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.SubprocessError):
        return fewer.__version__


def hardware(device: torch.device) -> str:
    """The processor and, where one is used, the accelerator.

    Linux tells the processor's name in /proc/cpuinfo; elsewhere Python's `platform` has to do.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"
