"""The report of a benchmark: one HTML file that holds everything, to be opened, mailed or kept."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewer.evaluation.record import Row
from fewer.evaluation.settings import UNREDUCED

from . import style
from .plots import PlotError, cost, curves, pareto
from .style import count
from .table import columns, failed, footnotes, frontier, measured, of_language, of_seeing, summary

FILE = "report.html"
TENSORS = "tensor bytes alive at once in one batch; on CUDA the allocator's peak; weights and input left out"
KEYS_AND_VALUES = "bytes of the storage that holds keys and values, between the layers' turns; their positions left out"


class ReportError(ImportError):
    """Reports need jinja2, which is not there."""


def write(rows: Sequence[Row], out: Path) -> Path:
    """Write `out/report.html` from the rows of a run and the pictures that lie in `out`. Returns its path.

    Without matplotlib the plots are left out and the file says so.
    Raises   ValueError without rows, ReportError without jinja2.
    """
    if not rows:
        raise ValueError("nothing to report: no rows")
    path = out / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html(rows, out), encoding="utf-8")
    return path


def html(rows: Sequence[Row], out: Path) -> str:
    """The report as a string; pictures are read from `out` and put inside."""
    template = _environment().get_template("report.html.jinja")
    good, passport = measured(rows), rows[0].passport
    facts = [
        ("model", passport.model), ("data", f"{passport.data}, {passport.n:,} {passport.unit}"),
        ("hardware", passport.hardware), ("threads", passport.threads), ("batch", passport.batch),
        ("dtype", passport.dtype), ("commit", passport.commit), ("measured", passport.when[:10]),
    ]  # fmt: skip
    return template.render(
        title=f"Fewer tokens in {Path(passport.model).name}",
        summary=summary(rows),
        facts=facts,
        plot=_plot(good),
        columns=columns(rows),
        rows=good,
        unreduced=UNREDUCED,
        front={row.key for row in frontier(good, cost(good).value)},
        footnotes=footnotes(good),
        failed=failed(rows),
        pictures={row.key: _embedded(out, row.picture) for row in good},
        passport=_passport(rows),
        style=style,
        language=of_language(good),
        depths=[depth for depth, _, _ in next((row.sweep for row in good if row.sweep), [])],
    )


def _environment() -> Any:
    try:
        import jinja2
        from markupsafe import Markup, escape
    except ImportError as error:
        raise ReportError("reports need jinja2: pip install 'fewer[report]'") from error

    def spread(cell: str) -> Markup:
        """The uncertain part of a cell in a quieter colour."""
        return Markup(re.sub(r"(±[\d.]+)", r"<i>\1</i>", str(escape(cell))))

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fewer.studio", ""), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )  # fmt: skip
    environment.filters |= {"spread": spread, "path": _path}
    return environment


def _path(row: Row) -> str:
    """Tokens after each block, runs of the same number written once."""
    counts = [count(c) for c in row.counts]
    changed = [c for i, c in enumerate(counts) if i == 0 or c != counts[i - 1]]
    return " → ".join(changed)


def _plot(rows: Sequence[Row]) -> Any:
    from markupsafe import Markup

    try:
        if of_seeing(rows):
            return Markup(curves(rows))
        return Markup(pareto(rows)) if any(row.accuracy for row in rows) else ""
    except (PlotError, ValueError) as error:
        return str(error)


def _embedded(out: Path, picture: str | None) -> str:
    """A picture's bytes as base64, "" where there is none."""
    file = None if picture is None else out / picture
    return base64.b64encode(file.read_bytes()).decode() if file is not None and file.is_file() else ""


def _passport(rows: Sequence[Row]) -> list[tuple[str, str]]:
    p = rows[0].passport
    commits = sorted({row.passport.commit for row in rows})
    first, last = min(row.passport.when for row in rows), max(row.passport.when for row in rows)
    return [
        ("measured", p.what), ("against", p.against),
        ("on", f"{p.hardware}; {p.device}, {p.threads} threads, {p.dtype}"),
        ("model", p.model), ("data", f"{p.data}: {p.n:,} {p.unit}, seed {p.seed}"),
        ("repeats", f"{p.repeats} comparisons of four runs each (A B B A) on a batch of {p.batch}"),
        ("spread", p.spread), ("ragged samples", p.execution),
        ("memory", KEYS_AND_VALUES if of_language(rows) else TENSORS),
        ("versions", ", ".join(f"{name} {version}" for name, version in p.versions.items())),
        ("commit", ", ".join(commits)), ("when", first if first == last else f"{first} to {last}"),
    ]  # fmt: skip
