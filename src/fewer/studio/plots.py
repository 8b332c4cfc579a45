"""The benchmark as plots, SVG strings as wide as their place allows.

They show who is told apart from random choice at each budget, and what accuracy is left at which cost. Each is drawn
for the width of a telephone; wide pages lay them side by side.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fewer.evaluation.levels import Level, able, levels
from fewer.evaluation.record import Row
from fewer.evaluation.settings import RANDOM, UNREDUCED
from fewer.evaluation.stats import Interval

from .style import ACCENT, FAINT, INK, QUIET
from .table import frontier, measured, of_language, of_seeing
from .verdict import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONT = "DejaVu Sans"  # what matplotlib measures with; readers see the page's own font
WIDTH = 4.6  # inches: 331 points, about as many pixels as a telephone leaves
LINE = 0.21  # inches of a method's line
FLOOR = 30  # points below the best that are still drawn to scale


class PlotError(ImportError):
    """Plots need matplotlib, which is not there."""


@dataclass(frozen=True)
class Axis:
    """What a panel shows. better: where less or more is better, "left" or "right"."""

    title: str
    value: Callable[[Row], float]
    better: str = "left"


COST = Axis("GFLOPs per item  (less is better)", lambda row: row.cost.gflops)
SPEED = Axis("measured speed-up  (more is better)", lambda row: row.speedup.value if row.speedup else 1.0, "right")
CACHE = Axis(
    "keys and values once the context is read, MB  (less is better)",
    lambda row: row.writing.kv_read / 1e6 if row.writing else 0.0,
)
SEEN = Axis("visual tokens a block reads, mean  (fewer is better)", lambda row: row.tokens)


def cost(rows: Sequence[Row]) -> Axis:
    """What these rows are paid with: bytes of the cache for language models, visual tokens where there are such, else
    operations."""
    return SEEN if of_seeing(rows) else CACHE if of_language(rows) else COST


def plots(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(what it shows, an SVG element with live text) of every plot these rows allow.

    Raises PlotError without matplotlib, ValueError without rows that have an accuracy.
    """
    if not any(row.accuracy for row in measured(rows)):
        raise ValueError("nothing to plot: no row has an accuracy")
    drawn = [against_random(level, rows) for level in levels(rows)]
    drawn += [tradeoff(rows, axis) for axis in (cost(rows), SPEED)]
    if of_seeing(rows):
        drawn.append(tradeoff(rows, SEEN, "likely"))
    return drawn


def against_random(level: Level, rows: Sequence[Row]) -> tuple[str, str]:
    """A line for each method of a budget: its accuracy minus random's, with the interval that holds for all of them at
    once. One that reaches over zero is not told apart from random."""
    base = next((r for r in measured(rows) if r.method == UNREDUCED), None)
    random, many = level.random, len(level.rows)
    whole = "" if base is None else f" of {base.tokens:.0f}"
    title = f"{random.tokens:.0f}{whole} tokens: against {random.method}, {_percent(random):.1f} %"
    low = max(100 * min(gain.low for gain in level.gains), 100 * max(gain.value for gain in level.gains) - FLOOR)
    with _drawing(1.0 + LINE * many) as (axes, out):
        for i, (row, gain) in enumerate(zip(level.rows, level.gains, strict=True)):
            colour = ACCENT if gain.low > 0 else QUIET if gain.high < 0 else INK
            if 100 * gain.value >= low:
                told = _told(row, f"{interval(gain)} points against random")
                _bar(axes, 100 * gain.value, i, _ends(gain), colour, told)
            else:
                axes.annotate(f"◂ {100 * gain.value:.0f}", (0.01, i), xycoords=("axes fraction", "data"), va="center",
                              fontsize=8, color=colour)  # fmt: skip
            if row.speedup:
                axes.annotate(f"{row.speedup.value:.2f}x", (1.01, i), xycoords=("axes fraction", "data"), va="center",
                              fontsize=8, color=QUIET, annotation_clip=False)  # fmt: skip
        axes.axvline(0, color=INK, lw=1)
        if base is not None and base.accuracy:
            axes.axvline(_percent(base) - _percent(random), color=QUIET, lw=1, ls=":")
        axes.set_yticks(range(many), [row.method for row in level.rows], parse_math=False)
        axes.set_ylim(many - 0.5, -0.5)
        axes.set_xlim(left=low - 1)
        axes.tick_params(axis="y", labelcolor=INK, length=0, labelsize=8)
        axes.set_xlabel("points of accuracy against random", color=INK)
        axes.grid(axis="x", color=FAINT, lw=0.6)
        return title, out()


def tradeoff(rows: Sequence[Row], axis: Axis, task: str | None = None) -> tuple[str, str]:
    """Accuracy, or the score of a task, over a cost, with 95 % intervals: a point for each row, named where a pointer
    rests on it; random choice and the rows nobody beats each joined by a line."""
    good = [r for r in measured(rows) if _score(r, task) and (r in able(rows) or r.method == UNREDUCED)]
    what = (good[0].score if task is None else f"{task} but absent, denied") if good else "accuracy"
    sign = 1 if axis.better == "left" else -1
    front = frontier(good, lambda row: sign * axis.value(row)) if task is None else []
    with _drawing(3.2) as (axes, out):
        for row in good:
            found = _score(row, task)
            assert found is not None
            told = _told(row, f"{100 * found.value:.1f} %")
            mark = "s" if row.method == UNREDUCED else "x" if row.name in RANDOM else "o"
            colour = ACCENT if row in front else QUIET
            x, ends = axis.value(row), _ends(found)
            _point(axes, x, 100 * found.value, ends, colour, told, mark)
        for style, line in (("--", [r for r in good if r.name in RANDOM]), ("-", front)):
            line = sorted(line, key=axis.value)
            heights = [100 * found.value for r in line if (found := _score(r, task))]
            axes.plot([axis.value(r) for r in line], heights, style, color=ACCENT if style == "-" else QUIET, lw=1.1,
                      zorder=1)  # fmt: skip
        axes.set_xlabel(axis.title, color=INK)
        axes.set_ylabel(f"{what}, %", color=INK)
        axes.margins(x=0.08)
        axes.grid(color=FAINT, lw=0.6)
        return f"{what} over {axis.title.partition('  (')[0]}", out()


def _score(row: Row, task: str | None) -> Interval | None:
    return row.accuracy if task is None else next((s.value for s in row.scores if s.task == task), None)


def _told(row: Row, more: str) -> str:
    speed = f", {row.speedup.value:.2f}x" if row.speedup else ""
    return f"{row.method}: {_percent(row):.1f} %{speed}; {more}"


def _percent(row: Row) -> float:
    return 100 * row.accuracy.value if row.accuracy else 0.0


def _ends(x: Interval) -> list[list[float]]:
    return [[100 * max(x.value - x.low, 0)], [100 * max(x.high - x.value, 0)]]


def _bar(axes: Axes, x: float, y: float, ends: Any, colour: str, told: str) -> None:
    axes.errorbar([x], [y], xerr=ends, color=colour, lw=1.3, capsize=2.5, zorder=2)
    axes.plot([x], [y], "o", color=colour, markersize=5, zorder=3, gid=told)


def _point(axes: Axes, x: float, y: float, ends: Any, colour: str, told: str, mark: str) -> None:
    axes.errorbar([x], [y], yerr=ends, color=colour, lw=0.8, alpha=0.45, zorder=2)
    axes.plot([x], [y], mark, color=colour, markersize=5.5, zorder=3, gid=told)


@contextmanager
def _drawing(height: float) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Axes to draw on, and what writes them down as SVG. Raises PlotError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("plots need matplotlib: pip install 'fewer[report]'") from error
    settings: dict[str, Any] = {"svg.fonttype": "none", "font.family": FONT, "font.size": 8.5, "svg.hashsalt": "fewer"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(FAINT)
        axes.set_axisbelow(True)
        axes.tick_params(colors=QUIET, length=0)

        def written() -> str:
            out = io.StringIO()
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
            return _responsive(out.getvalue())

        yield axes, written


def _responsive(svg: str) -> str:
    """The bare element, as wide as its place allows; what was drawn under a name says it where a pointer rests."""
    svg = svg[svg.index("<svg") :].replace(f"'{FONT}'", "inherit").replace("font: ", "font-size: ")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="([^"]*: [^"]*)">', lambda m: f"<g><title>{m[1]}</title>", svg)
    svg = re.sub(r' height="[\d.]+pt"', "", svg, count=1)
    return re.sub(r'<svg ([^>]*?)width="[^"]*"', r'<svg \1width="100%"', svg, count=1)
