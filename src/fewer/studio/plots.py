"""The benchmark as a plot: what accuracy is left at which cost, as an SVG string."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fewer.evaluation.record import Row
from fewer.evaluation.settings import RANDOM, UNREDUCED
from fewer.evaluation.visual import BLIND, ORACLE
from fewer.spec import BUDGET_KEYS

from .style import ACCENT, FAINT, INK, QUIET
from .table import RAW, frontier, marks, measured, of_language, of_seeing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONT = "DejaVu Sans"  # what matplotlib measures with; readers see the page's own font
APART = 11.5  # points between the lines of two labels


class PlotError(ImportError):
    """Plots need matplotlib, which is not there."""


@dataclass(frozen=True)
class Axis:
    """What a panel shows across. better: "left" or "right"."""

    title: str
    value: Callable[[Row], float]
    better: str


COST = Axis("GFLOPs per image  (less is better)", lambda row: row.gflops, "left")
SPEED = Axis("measured speed-up  (more is better)", lambda row: row.speedup.value if row.speedup else 1.0, "right")
CACHE = Axis("keys and values once the context is read, MB  (less is better)", lambda row: row.kv_read / 1e6, "left")


SEEN = Axis("visual tokens a block reads, mean  (fewer is better)", lambda row: row.tokens, "left")


def cost(rows: Sequence[Row]) -> Axis:
    """What these rows are paid with: bytes of the cache for language models, visual tokens where there are such, else
    operations."""
    return SEEN if of_seeing(rows) else CACHE if of_language(rows) else COST


def pareto(rows: Sequence[Row]) -> str:
    """Accuracy against its cost and against speed-up, the rows nobody beats joined by a line.

    Returns an SVG element with live text. Rows far below the others are named in the margin instead of squeezing the
    rest. Raises PlotError without matplotlib, ValueError without a measured row.
    """
    good = [row for row in measured(rows) if row.accuracy]
    if not good:
        raise ValueError("nothing to plot: no row has numbers")
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise PlotError("plots need matplotlib: pip install 'fewer[report]'") from error
    settings: dict[str, Any] = {"svg.fonttype": "none", "font.family": FONT, "font.size": 9, "svg.hashsalt": "fewer"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(11.6, 4.9), layout=ConstrainedLayoutEngine(w_pad=0.12))
        canvas = FigureCanvasSVG(figure)
        low, off = _floor(good)
        left, right = figure.subplots(1, 2, sharey=True)
        panels = ((left, cost(good)), (right, SPEED))
        for axes, axis in panels:
            _panel(axes, axis, good, low)
        left.set_ylabel(f"{good[0].score} (%)", color=INK)
        if off:
            names = ", ".join(f"{row.method} {_percent(row):.0f} %" for row in off)
            figure.supxlabel(f"below the chart: {names}", fontsize=8, color=QUIET, x=0.01, ha="left")
        canvas.draw()
        for axes, axis in panels:
            _labels(axes, axis, [row for row in good if row not in off], good)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _responsive(out.getvalue())


def curves(rows: Sequence[Row]) -> str:
    """What a vision-language model still knows at each number of visual tokens: right answers, and the denial of what
    is likely but absent; a line per method, across its budgets.

    Returns an SVG element with live text. Raises PlotError without matplotlib, ValueError without a method at two
    budgets.
    """
    good = [row for row in measured(rows) if row.accuracy]
    lines: dict[str, list[Row]] = {}
    for row in good:
        if row.method not in (UNREDUCED, BLIND):
            lines.setdefault(_unbudgeted(row.method), []).append(row)
    lines = {name: sorted(mine, key=lambda r: r.tokens) for name, mine in lines.items() if len(mine) > 1}
    if not lines:
        raise ValueError("nothing to plot: no method was measured at two budgets")
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("plots need matplotlib: pip install 'fewer[report]'") from error
    settings: dict[str, Any] = {"svg.fonttype": "none", "font.family": FONT, "font.size": 9, "svg.hashsalt": "fewer"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(11.6, 4.9), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, 2)
        measures = ((good[0].score, None), ("likely but absent, denied", "likely"))
        colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
        for axes, (title, task) in zip(panels, measures, strict=True):
            for i, (name, mine) in enumerate(lines.items()):
                control = name.split(":")[0] in (*RANDOM, ORACLE)
                axes.plot(
                    [r.tokens for r in mine], [_share(r, task) for r in mine], label=name, marker="o", markersize=3.5,
                    color=INK if control else colours[i % len(colours)], linewidth=1.3,
                    linestyle={ORACLE: ":"}.get(name, "--") if control else "-",
                )  # fmt: skip
            for row in good:
                if row.method in (UNREDUCED, BLIND):
                    axes.axhline(_share(row, task), color=QUIET, linewidth=0.9, linestyle=":")
                    axes.annotate(row.method, (1, _share(row, task)), xycoords=("axes fraction", "data"), color=QUIET,
                                  ha="right", va="bottom", fontsize=8)  # fmt: skip
            axes.set_xscale("log")
            ticks = sorted({round(r.tokens) for mine in lines.values() for r in mine if "random" in r.method})
            axes.set_xticks(ticks, [str(t) for t in ticks])
            axes.minorticks_off()
            axes.set_xlabel(SEEN.title, color=INK)
            axes.set_ylabel(f"{title} (%)", color=INK)
            axes.grid(color=FAINT, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _responsive(out.getvalue())


def _unbudgeted(method: str) -> str:
    """A text form without what says how many stay.

    >>> _unbudgeted("fastv:k=1,keep=0.4"), _unbudgeted("divprune:tokens=36")
    ('fastv:k=1', 'divprune')
    """
    name, _, rest = method.partition(":")
    kept = [part for part in rest.split(",") if part and part.partition("=")[0] not in BUDGET_KEYS]
    return name + (":" + ",".join(kept) if kept else "")


def _share(row: Row, task: str | None) -> float:
    """A row's accuracy, or its score in a task, in per cent."""
    if task is None:
        return _percent(row)
    return next((100 * s.value.value for s in row.scores if s.task == task), float("nan"))


def _floor(rows: Sequence[Row]) -> tuple[float, list[Row]]:
    """The lowest accuracy shown, and the rows below it: far from the best, or with untrained modules."""
    best = max(map(_percent, rows))
    shown = [p for row in rows if (p := _percent(row)) > best - 25 and RAW not in marks(row, rows)] or [best]
    low = min(shown) - max(0.12 * (best - min(shown)), 0.5)
    return low, [row for row in rows if _percent(row) < low]


def _panel(axes: Axes, axis: Axis, rows: Sequence[Row], low: float) -> None:
    sign = 1 if axis.better == "left" else -1
    front = frontier(rows, lambda row: sign * axis.value(row))
    visible = [row for row in front if _percent(row) >= low]
    axes.plot([axis.value(r) for r in visible], [_percent(r) for r in visible], color=ACCENT, lw=1.4, zorder=1)
    for row in rows:
        if _percent(row) < low:
            continue
        colour = ACCENT if row in front else QUIET
        kind = "s" if row.method == UNREDUCED else "x" if row.name in RANDOM else "o"
        style: dict[str, Any] = {"c": colour}
        if kind != "x":
            style = {"facecolors": colour if row in front else "white", "edgecolors": colour}
        axes.scatter(axis.value(row), _percent(row), s=30, marker=kind, linewidths=1.3, zorder=2, **style)
    best = max(map(_percent, rows))
    axes.set_ylim(low, best + 0.1 * (best - low))
    _doubt(axes, rows)
    axes.margins(x=0.16)
    axes.set_xlabel(axis.title, color=INK)
    axes.grid(color=FAINT, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)


def _doubt(axes: Axes, rows: Sequence[Row]) -> None:
    """A bar as long as the usual 95 % interval of a difference to the unreduced model, in the lower left corner."""
    widths = sorted(100 * (row.difference.high - row.difference.low) for row in rows if row.difference)
    if not widths:
        return
    low, half = axes.get_ylim()[0], widths[len(widths) // 2] / 2
    frame = axes.get_yaxis_transform()
    axes.errorbar([0.015], [low + half], yerr=half, color=QUIET, lw=1, capsize=2, transform=frame)
    said = axes.annotate("95 % of a difference", (0.015, low), (4, 5), xycoords=frame, textcoords="offset points",
                         rotation=90, va="bottom", fontsize=7.5, color=QUIET)  # fmt: skip
    said.set_in_layout(False)


def _labels(axes: Axes, axis: Axis, rows: Sequence[Row], every: Sequence[Row]) -> None:
    """Names beside the points, pushed apart where they would overlap, with a thin line where one had to move."""
    sign = 1 if axis.better == "left" else -1
    front = frontier(every, lambda row: sign * axis.value(row))
    dpi = axes.figure.dpi / 72
    height = axes.bbox.height / dpi
    where = {row.key: axes.transData.transform((axis.value(row), _percent(row))) / dpi for row in rows}
    placed = [(x - 4, x + 4, y) for x, y in where.values()]  # left, right, middle in points: the points themselves
    right_edge = axes.bbox.x1 / dpi
    for row in sorted(rows, key=lambda row: (row not in front, -_percent(row))):
        x, y = where[row.key]
        wide = 4.7 * len(row.method)
        flip = x + 8 + wide > right_edge
        a = x - 8 - wide if flip else x + 8
        at = _free(y, a, a + wide, placed, axes.bbox.y0 / dpi + 4, axes.bbox.y0 / dpi + height - 4)
        placed.append((a, a + wide, at))
        moved = abs(at - y) > 5
        axes.annotate(
            row.method, (axis.value(row), _percent(row)), (-8 if flip else 8, at - y), textcoords="offset points",
            ha="right" if flip else "left", va="center", fontsize=8.5, color=ACCENT if row in front else INK,
            alpha=1 if row in front else 0.72,
            arrowprops={"arrowstyle": "-", "color": QUIET, "lw": 0.4, "shrinkA": 1, "shrinkB": 4} if moved else None,
        )  # fmt: skip


def _free(
    y: float, left: float, right: float, placed: Sequence[tuple[float, float, float]], low: float, high: float
) -> float:
    """The height nearest to y where a label from left to right touches no other."""
    rivals = [other for a, b, other in placed if a < right and left < b]
    tries = sorted({y, *(o + s * APART for o in rivals for s in (1, -1))}, key=lambda t: abs(t - y))
    fits = [t for t in tries if low <= t <= high and all(abs(t - o) >= APART - 1e-6 for o in rivals)]
    return fits[0] if fits else y


def _percent(row: Row) -> float:
    return 100 * row.accuracy.value if row.accuracy else 0.0


def _responsive(svg: str) -> str:
    """The bare element, as wide as its place allows."""
    svg = svg[svg.index("<svg") :].replace(f"'{FONT}'", "inherit").replace("font: ", "font-size: ")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' height="[\d.]+pt"', "", svg, count=1)
    return re.sub(r'<svg ([^>]*?)width="[^"]*"', r'<svg \1width="100%"', svg, count=1)
