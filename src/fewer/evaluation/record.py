"""Results that carry a passport: what was measured, against what, on what, how often, at which commit."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fewer

from .stats import Interval


class JournalError(ValueError):
    """A results file that was not written by `fewer bench`."""


@dataclass(frozen=True)
class Passport:
    """Everything one must know to read a number, or to measure it again.

    what, against, spread    in words; on: data, model and hardware; n: images; repeats: timed comparisons
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
    unit: str = "images"  # what n counts


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

    @classmethod
    def of(cls, record: dict[str, Any]) -> Score:
        """A score from its JSON record."""
        change = record["change"]
        return cls(
            record["task"], Interval(**record["value"]), None if change is None else Interval(**change), record["n"]
        )


@dataclass
class Row:
    """One method at one setting.

    method          text form; "unreduced" for the control, which is timed against itself
    trained         "" for methods without modules, else "packaged" or "untrained" (random modules)
    tokens, final   mean tokens per block (attention and MLP), tokens after the last block, prefix included
    difference      accuracy minus that of the unreduced model, paired
    agreement, kl   against the unreduced model's classes and probabilities (nats); for classifiers
    movement        mean 1 - cosine to the unreduced model's features; for models without classes
    speedup         median and quartiles of the pairwise ratios; ceiling: ratio of the FLOPs of the model
    own_time        the method's share of the forward pass, planning and combining; None where there is no clock
    peak            bytes of tensors alive at once during one batch, weights and input left out
    hits            which items were answered rightly, packed (`stats.unpack_hits`)
    error           why there are no numbers, where there are none
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
    agreement: float | None = None
    kl: float | None = None
    movement: float | None = None
    tokens: float = 0.0
    tokens_full: int = 0
    final: float = 0.0
    counts: list[float] = field(default_factory=list)
    gflops: float = 0.0
    gflops_own: float = 0.0
    ceiling: float = 1.0
    speedup: Interval | None = None
    milliseconds: float = 0.0
    own_time: float | None = None
    peak: int = 0
    picture: str | None = None
    notes: list[str] = field(default_factory=list)
    error: str = ""
    # Language models only. tokens, final, counts: rows per layer once the context is read; speedup: of decoding.
    scores: list[Score] = field(default_factory=list)
    sweep: list[tuple[float, float, int]] = field(default_factory=list)  # depth in the context, share found, needles
    kv_read: float = 0.0  # bytes of keys and values: once the context is read,
    kv_peak: float = 0.0  # the most a cache held while reading and writing,
    kv_end: float = 0.0  # when the last token was written,
    kv_full: float = 0.0  # and what an unreduced cache holds then
    first: float = 0.0  # seconds to the first token
    first_ratio: Interval | None = None  # those of the unreduced model over these
    decoding: float = 0.0  # tokens per second behind the first one
    sample: str = ""  # what it wrote

    @property
    def name(self) -> str:
        """The method without its setting."""
        return self.method.partition(":")[0]

    @property
    def setting(self) -> str:
        """The setting without the method."""
        return self.method.partition(":")[2]

    @property
    def achieved(self) -> float | None:
        """Speed-up over ceiling."""
        return None if self.speedup is None else self.speedup.value / self.ceiling

    @classmethod
    def of(cls, record: dict[str, Any]) -> Row:
        """A row from its JSON record."""
        record = dict(record)
        record["passport"] = Passport(**record["passport"])
        for name in ("accuracy", "difference", "speedup", "first_ratio"):
            if record.get(name) is not None:
                record[name] = Interval(**record[name])
        record["scores"] = [Score.of(score) for score in record.get("scores", ())]
        record["sweep"] = [tuple(place) for place in record.get("sweep", ())]
        return cls(**record)


class Journal:
    """Rows in a JSON lines file, one appended as soon as it is measured. A last line torn by a crash is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[:whole].splitlines(), 1):
            try:
                row = Row.of(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise JournalError(
                    f"{self.path}, line {number} is not a result of this version ({error}); give another --out"
                ) from error
            self.rows[row.key] = row
        if whole < len(raw):
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def done(self, key: str) -> Row | None:
        """The row measured with these settings, if any; failed ones are tried again."""
        row = self.rows.get(key)
        return row if row is not None and not row.error else None

    def add(self, row: Row) -> None:
        self.rows[row.key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()


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
