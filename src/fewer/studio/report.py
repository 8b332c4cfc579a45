"""The report of a benchmark: one HTML file that holds everything, to be opened, mailed or kept."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fewer.evaluation.record import Row
from fewer.evaluation.settings import UNREDUCED

from . import style
from .gallery import FOLDER
from .plots import PlotError, cost, plots
from .style import count
from .table import NONE, columns, failed, footnotes, frontier, measured, of_language
from .verdict import verdict

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
    template = templates().get_template("report.html.jinja")
    good, passport = measured(rows), rows[0].passport
    facts = [
        ("model", passport.model), ("data", f"{passport.data}, {passport.n:,} {passport.unit}"),
        ("hardware", passport.hardware), ("threads", passport.threads), ("batch", passport.batch),
        ("dtype", passport.dtype), ("commit", passport.commit), ("measured", passport.when[:10]),
    ]  # fmt: skip
    return template.render(
        title=f"Fewer tokens in {Path(passport.model).name}",
        verdict=verdict(rows),
        facts=facts,
        plots=_plots(good),
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
        depths=[depth for depth, _, _ in next((r.writing.sweep for r in good if r.writing and r.writing.sweep), [])],
    )


def templates() -> Any:
    """What makes pages: everything is escaped, and nothing left out unsaid. Raises ReportError without jinja2."""
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
    """Tokens after each block, the first one being block 1 as in the pictures; runs of the same number once, with the
    blocks they hold for."""
    if not row.counts:
        return NONE
    counts = [count(c) for c in row.counts]
    starts = [i for i, c in enumerate(counts) if i == 0 or c != counts[i - 1]]
    if len(starts) == len(counts) > 6:
        return f"{counts[0]} → {counts[-1]}, fewer in each of blocks 1 to {len(counts)}"
    spans = zip(starts, [*starts[1:], len(counts)], strict=True)
    return " → ".join(f"{counts[a]} (block{f' {b}' if b == a + 1 else f's {a + 1} to {b}'})" for a, b in spans)


def _plots(rows: Sequence[Row]) -> Any:
    """(title, SVG) of each plot, or why there is none."""
    from markupsafe import Markup

    try:
        return [(title, Markup(drawn)) for title, drawn in plots(rows)]
    except (PlotError, ValueError) as error:
        return str(error)


def _embedded(out: Path, picture: str | None) -> str:
    """A picture's bytes as base64; "" where there is none, or where what is named is no PNG of this run.

    Results may come from somebody else: whatever they name, only a picture that lies in the run's own folder is read.
    """
    if picture is None:
        return ""
    try:
        home, file = (out / FOLDER).resolve(), (out / picture).resolve()
        own = home.parent == out.resolve() and file.parent == home and file.is_file()
        raw = file.read_bytes() if own else b""
        with Image.open(io.BytesIO(raw), formats=["PNG"]) as drawn:
            drawn.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    return base64.b64encode(raw).decode()


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
        *(("data, further", note) for note in p.notes),
        ("commit", ", ".join(commits)), ("when", first if first == last else f"{first} to {last}"),
    ]  # fmt: skip
