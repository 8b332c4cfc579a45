"""Many texts: batches of like length, worker processes, and results in the order of the texts that a killed run goes on
with."""

from __future__ import annotations

import json
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import fewer
from fewer.datasets.documents import Document
from fewer.models.device import usable
from fewer.spec import text as written

from .compressed import Compressed, digest
from .compressor import Compressor, Prompt, asked
from .forced import forced
from .source import assembled

WINDOW = 4  # batches that are sorted by length together; a killed run does no more than these again
# Of the model, the tokenizer or the method: where the first texts all have one, all texts do.
FAULTS = ("SignalError: ", "SourceError: ")
AHEAD = 3  # batches that wait for each worker


class CorpusError(ValueError):
    """Results that cannot be written, or are of another run; a worker that is gone."""


@dataclass(frozen=True)
class Settings:
    """How texts are shortened; see `Compressor`. With a name for the model, so that each process can have its own.

    counter   the name of a model, or a tokenizer's folder, whose tokens are counted. device: of the model
    """

    method: str = "llmlingua"
    model: str = "smollm2-135m"
    rate: float | None = None
    tokens: int | None = None
    instruction: str = ""
    question: str = ""
    force: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()
    counter: str | None = None
    gate: bool = True
    device: str | None = None

    def __post_init__(self) -> None:
        asked(self.method, self.rate, self.tokens)
        forced("", self.protect, self.force)
        if self.device is not None:
            usable(self.device)

    @property
    def wanted(self) -> str:
        """The method with what is left, in its text form."""
        return written(asked(self.method, self.rate, self.tokens))

    def compressor(self) -> Compressor:
        """Raises ModelError where there is no such model, or tokenizer."""
        from fewer.models.zoo import load_model, load_tokenizer

        counter = None if self.counter is None else load_tokenizer(self.counter)
        model, tokenizer = load_model(self.model, device=self.device)
        return Compressor(
            self.method, model, tokenizer, counter=counter, force=self.force, protect=self.protect, gate=self.gate
        )

    def prompt(self, *contexts: str) -> Prompt:
        return Prompt(contexts, self.instruction, self.question)

    def whole(self, *contexts: str) -> str:
        """What the ids of dropped spans count in."""
        return assembled(contexts, self.instruction, self.question)[0]

    def plain(self) -> dict[str, Any]:
        """What results depend on, for JSON."""
        known = asdict(self) | {"method": written(asked(self.method), defaults=True), "fewer": fewer.__version__}
        return json.loads(json.dumps(known))


@dataclass(frozen=True)
class Result:
    """What became of one text.

    source     the text's name. before, after, rate: tokens, as counted, and their share; None where it failed
    notes      what could not be done as asked. original: the whole text, in which dropped spans count
    dropped    {"id", "start", "stop"} of each span of characters that went
    error      why there is no text; "" where there is one
    """

    source: str
    text: str | None = None
    before: int | None = None
    after: int | None = None
    rate: float | None = None
    notes: tuple[str, ...] = ()
    dropped: tuple[dict[str, Any], ...] = ()
    original: str | None = None
    error: str = ""

    @classmethod
    def of(cls, source: str, one: Compressed) -> Result:
        gone = tuple({"id": name, "start": start, "stop": stop} for name, (start, stop) in one.dropped.items())
        return cls(source, one.text, one.before, one.after, one.rate, one.notes, gone, one.source.text)

    @classmethod
    def failed(cls, source: str, why: object) -> Result:
        return cls(source, error=str(why) if isinstance(why, str) else f"{type(why).__name__}: {why}")

    def line(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Done:
    """What is remembered of a result that is there: whose it is, the digest of the whole text, and what went wrong."""

    source: str
    digest: str
    error: str

    @classmethod
    def of(cls, row: dict[str, Any]) -> Done:
        known = row["original"]
        return cls(str(row["source"]), "" if known is None else digest(known), str(row["error"]))


def shortened(
    documents: Iterable[Document], settings: Settings, *, batch: int = 8, workers: int = 1, threads: int = 1,
    done: Sequence[Done] = (),
) -> Iterator[tuple[Document, Result]]:  # fmt: skip
    """Each text with what became of it, in their order.

    batch     texts side by side, of like length. workers: processes, each with its own model; 1 = this one. threads:
              torch threads of each. Results do not depend on the workers: batches are made of the texts alone.
    done      results of the first texts, from a run before, which are checked against these and not made again
    A text that fails, or could not be read, has a result that says so, and the others go on.
    Raises    CorpusError where `done` is of other texts, a worker is gone, or the model cannot do what the method asks;
              ModelError without the model
    """
    if batch < 1 or workers < 1 or threads < 1:
        raise CorpusError(f"batch={batch}, workers={workers}, threads={threads}: all are 1 or more")
    ready: dict[int, tuple[Document, Result]] = {}
    at = start = len(done)
    for job, results in _answers(_jobs(documents, settings, batch, done), settings, workers, threads):
        if at == start and all(result.error.startswith(FAULTS) for result in results):
            raise CorpusError(results[0].error.partition(": ")[2])
        for (index, document), result in zip(job, results, strict=True):
            if index >= len(done):
                ready[index] = document, result
        while at in ready:
            yield ready.pop(at)
            at += 1


Job = list[tuple[int, Document]]
"""Texts that are read side by side, with their numbers."""


def _jobs(documents: Iterable[Document], settings: Settings, batch: int, done: Sequence[Done]) -> Iterator[Job]:
    """Batches of like length out of each few texts; those that hold a text not done yet, whoever else is in it, so that
    a run that goes on makes what one that never stopped makes."""
    window: Job = []
    number = -1
    for number, document in enumerate(documents):
        if number < len(done):
            _same(done[number], document, settings, number)
        window.append((number, document))
        if len(window) == batch * WINDOW:
            yield from _batches(window, batch, len(done))
            window = []
    if number + 1 < len(done):
        raise CorpusError(f"there are results of {len(done)} texts, and now {number + 1} texts: give another --out")
    yield from _batches(window, batch, len(done))


def _batches(window: Job, batch: int, done: int) -> list[Job]:
    lost = [(i, document) for i, document in window if document.text is None]
    rest = [(i, document) for i, document in window if document.text is not None]
    rest.sort(key=lambda each: len(each[1].text or ""))
    found = [lost, *(sorted(rest[i : i + batch]) for i in range(0, len(rest), batch))]
    return sorted(job for job in found if job and job[-1][0] >= done)


def _same(result: Done, document: Document, settings: Settings, number: int) -> None:
    if result.source != document.name:
        raise CorpusError(
            f"line {number + 1} is of {result.source}, and text {number + 1} is {document.name} now: give another --out"
        )
    if result.digest and result.digest != digest(settings.whole(document.text or "")):
        raise CorpusError(f"{document.name} has changed since it was shortened: give another --out")


# -- who does it -------------------------------------------------------------------------------------------------------


def _answers(jobs: Iterator[Job], settings: Settings, workers: int, threads: int) -> Iterator[tuple[Job, list[Result]]]:
    if workers == 1:
        with _threads(threads):
            compressor = None
            for job in jobs:
                compressor = compressor or settings.compressor()
                yield job, _results(compressor, settings, [document for _, document in job])
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (settings, threads))
    waiting: deque[tuple[Job, Future[tuple[list[Result], list[str]]]]] = deque()
    told: set[str] = set()

    def first() -> tuple[Job, list[Result]]:
        job, answer = waiting.popleft()
        results, said = answer.result()
        for line in said:
            if line not in told:
                told.add(line)
                warnings.warn(line, stacklevel=4)
        return job, results

    try:
        for job in jobs:
            waiting.append((job, pool.submit(_work, [document for _, document in job])))
            if len(waiting) >= AHEAD * workers:
                yield first()
        while waiting:
            yield first()
    except BrokenProcessPool as error:
        raise CorpusError(
            "a worker process was ended from outside, often for want of memory: go on, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Own:
    """What a worker process has."""

    settings: Settings | None = None
    compressor: Compressor | None = None
    said: list[str] = field(default_factory=list)


_own = _Own()


def _begin(settings: Settings, threads: int) -> None:
    """A worker's start. It ends with the process it works for, and leaves the keyboard to that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers.utils import logging

    logging.disable_progress_bar()
    _own.settings = settings


def _work(documents: list[Document]) -> tuple[list[Result], list[str]]:
    """Results, and warnings that came with the model."""
    assert _own.settings is not None
    if _own.compressor is None:  # here, so that what fails is told as it is
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _own.compressor = _own.settings.compressor()
        _own.said = [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
    return _results(_own.compressor, _own.settings, documents), _own.said


def _results(compressor: Compressor, settings: Settings, documents: Sequence[Document]) -> list[Result]:
    if any(document.text is None for document in documents):
        return [Result.failed(document.name, document.error or "no text") for document in documents]
    try:
        prompts = [settings.prompt(document.text or "") for document in documents]
        found = compressor.batch(prompts, rate=settings.rate, tokens=settings.tokens)
    except Exception as error:  # one text's fault, of whatever kind, is not the others'
        if len(documents) == 1:
            return [Result.failed(documents[0].name, error)]
        return [result for document in documents for result in _results(compressor, settings, [document])]
    return [Result.of(document.name, one) for document, one in zip(documents, found, strict=True)]


# -- where it goes -----------------------------------------------------------------------------------------------------


class Results:
    """Results as JSON lines, each appended as soon as it and all before it are there; beside them their settings.

        with Results.open(path, settings.plain()) as results:
            for _, result in shortened(documents, settings, done=results.done):
                results.add(result)

    A last line that a crash has torn is cut off, and its text done again.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.done: list[Done] = []

    @property
    def beside(self) -> Path:
        """The file with the settings."""
        return self.path.with_suffix(".settings.json")

    @classmethod
    @contextmanager
    def open(cls, path: Path, settings: dict[str, Any]) -> Iterator[Results]:
        """Raises CorpusError, before anything is done, where results cannot be written, are of other settings (naming
        these), or are being written by another process."""
        found = cls(path, settings)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
            lock.acquire(timeout=0)
        except Timeout as error:
            raise CorpusError(f"{path} is being written by another run; wait, or give another --out") from error
        except OSError as error:
            why = error.strerror or error
            raise CorpusError(f"--out {path} cannot be written: {why}; give another --out") from error
        try:
            found._go_on()
            yield found
        finally:
            if path.exists() and not path.stat().st_size:  # nothing came of it
                path.unlink()
                found.beside.unlink(missing_ok=True)
            lock.release()

    def add(self, result: Result) -> None:
        """In one write: whatever happens, the lines before it stay as they are."""
        with self.path.open("ab", buffering=0) as file:
            file.write(result.line().encode() + b"\n")

    def _go_on(self) -> None:
        whole = 0  # bytes of whole lines
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not OURS.startswith(line[: len(OURS)].rstrip(b"\0")):
                    raise CorpusError(f"{self.path}, line {number} is no result: give another --out")
                if not line.endswith(b"\n"):
                    break
                if number == 1:
                    self._compare()
                self.done.append(self._read(line, number))
                whole += len(line)
        os.truncate(self.path, whole)
        fresh = self.beside.with_name(f".{self.beside.name}.new")
        fresh.write_text(json.dumps(self.settings, indent=1) + "\n")
        fresh.replace(self.beside)

    def _read(self, line: bytes, number: int) -> Done:
        try:
            return Done.of(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise CorpusError(f"{self.path}, line {number} is no result: {error}; give another --out") from error

    def _compare(self) -> None:
        try:
            before = json.loads(self.beside.read_text())
        except (OSError, ValueError) as error:
            raise CorpusError(
                f"{self.path} holds lines, and {self.beside.name} does not say how they were made: give another --out"
            ) from error
        names = [*dict.fromkeys([*before, *self.settings])]
        differs = [name for name in names if before.get(name) != self.settings.get(name)]
        if differs:
            said = ", ".join(f"{name}={before.get(name)} (now {self.settings.get(name)})" for name in differs)
            raise CorpusError(f"{self.path} was made with {said}: go on with the same, or give another --out")


OURS = b'{"source": '  # how our lines begin, torn ones too
