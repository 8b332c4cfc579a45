"""What the benchmarks of all kinds of models share: resuming, rows with errors, sessions, clocks, passports."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fewer.core import Reducer
from fewer.runtime.apply import apply
from fewer.runtime.modules import UNTRAINED, ModulesError

from . import record
from .record import Journal, Passport, Row
from .settings import UNREDUCED, Settings

FILE = "results.jsonl"


class Watch:
    """What a run tells whoever looks on. Nothing, unless overridden."""

    def begin(self, subject: Any, rows: int) -> None: ...
    def row(self, method: str, batches: int) -> None: ...
    def batch(self) -> None: ...
    def done(self, row: Row, resumed: bool) -> None: ...
    def note(self, line: str) -> None: ...


class Runner:
    """Measures one form after the other, each against the same model with all its tokens.

    A kind of model says how: `measured` fills in a row, `passport` states what its numbers are, `score` names its main
    one, `batches` is how often `watch.batch` is called in a row, at least.
    """

    WHAT: ClassVar[str]
    AGAINST: ClassVar[str]
    SPREAD: ClassVar[str]
    score = "accuracy"
    batches = 1

    def __init__(self, settings: Settings, subject: Any, watch: Watch | None = None) -> None:
        self.settings, self.subject, self.watch = settings, subject, watch or Watch()
        self.threads = torch.get_num_threads()
        self.hardware = record.hardware(subject.device)
        self.out = Path()
        # One thread: CPU time of this thread, which others on the machine do not disturb.
        alone = self.threads == 1 and subject.device.type == "cpu"
        self._clock = time.thread_time if alone else time.perf_counter

    # -- what a kind of model says -------------------------------------------------------------------------------------
    @property
    def passport(self) -> Passport:
        raise NotImplementedError

    @property
    def chosen(self) -> Settings:
        """The settings a row's numbers depend on: another number of threads, another row; other methods beside it, the
        same row."""
        return replace(self.settings, methods=(), all=False, threads=self.threads)

    def measured(self, row: Row, form: str, method: Reducer | None) -> Row:
        raise NotImplementedError

    # -- what all do alike ---------------------------------------------------------------------------------------------
    def run(self, forms: Mapping[str, Reducer | None], out: Path) -> list[Row]:
        """Rows in the order of the forms; each is in `out/results.jsonl` by then. Rows already there with the same
        settings, at the same commit and on the same hardware, are not measured again. A method that does not work on
        this model becomes a row with an error; the others go on.

        Raises   JournalError, before anything is measured, where out cannot be written to.
        """
        self.out, rows = out, []
        with Journal.open(out / FILE) as journal:
            self.watch.begin(self.subject, len(forms))
            keys = {form: self._key(form, method) for form, method in forms.items()}
            self._tell(journal, keys)
            for form, method in forms.items():
                row = journal.done(keys[form])
                resumed = row is not None
                if row is None:
                    self.watch.row(form, self.batches)
                    row = self.row(keys[form], form, method)
                    journal.add(row)
                rows.append(row)
                self.watch.done(row, resumed)
        return rows

    def _tell(self, journal: Journal, keys: Mapping[str, str]) -> None:
        """What of a results file is not used, and why."""
        for fault in journal.faults:
            self.watch.note(f"{journal.path}, {fault}; it is passed over")
        known = set(keys.values())
        others = [row for key, row in journal.rows.items() if key not in known and row.method in keys]
        if others:
            commits = ", ".join(sorted({row.passport.commit for row in others}))
            self.watch.note(
                f"{len(others)} rows of these methods in {journal.path} are of other settings, data, hardware or "
                f"versions (commit {commits}; now {record.commit()}): they stay there, and are measured anew"
            )

    def _key(self, form: str, method: Reducer | None) -> str:
        return record.key(
            method=form if method is None else repr(method), settings=str(self.chosen), commit=record.commit(),
            hardware=self.hardware, items=self.passport.n,
        )  # fmt: skip

    def row(self, key: str, form: str, method: Reducer | None) -> Row:
        """One form's numbers, or the reason why there are none."""
        row = Row(key, form, self.passport, score=self.score)
        try:
            with torch.inference_mode():
                return self.measured(row, form, method)
        except Exception as error:  # whatever one method does wrong, the others are still measured
            row.error = f"{type(error).__name__}: {error}".splitlines()[0]
            return row

    def stamped(self, data: str, n: int, batch: int, execution: str, unit: str, notes: list[str]) -> Passport:
        """A passport of this run, as of now."""
        s = self.settings
        return Passport(
            self.WHAT, self.AGAINST, self.subject.name, data, n, s.repeats, self.SPREAD, batch,
            str(self.subject.device), s.dtype, self.threads, execution, s.seed, self.hardware, record.versions(),
            record.commit(), record.now(), unit, notes,
        )  # fmt: skip

    def applied(self, row: Row, model: nn.Module, method: Reducer, **how: Any) -> Any:
        """A session of a method, with random modules where it has none for this model; the row says which it was."""
        row.acts = method.card.acts
        try:
            session = apply(model, method, **how)
            row.trained = "packaged" if len(list(session.modules.parameters())) else ""
            more = ""
        except ModulesError:
            session, row.trained = apply(model, method, modules=UNTRAINED, **how), UNTRAINED
            more = f', modules="{UNTRAINED}"'
        row.code = f'fewer.apply(model, "{row.method}"{more})'
        return session

    def now(self) -> float:
        """Seconds; of this thread where it is alone, so that other work on the machine does not disturb."""
        if self.subject.device.type == "cuda":
            torch.cuda.synchronize(self.subject.device)
        return self._clock()


def with_control(methods: Mapping[Reducer, str], *controls: str) -> dict[str, Reducer | None]:
    """What `Runner.run` takes: the unreduced model first, other controls, then the methods."""
    return {UNREDUCED: None, **dict.fromkeys(controls), **{form: method for method, form in methods.items()}}
