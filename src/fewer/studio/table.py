"""The benchmark's table: which columns there are, what each says, and the marks of its rows: one place for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fewer.evaluation.bench import against_random
from fewer.evaluation.record import Row
from fewer.evaluation.settings import UNREDUCED
from fewer.evaluation.stats import Interval
from fewer.trained import UNTRAINED

from .style import count

NONE = "–"
NEAR = 0.01  # the loss of accuracy a summary calls near
LOSES, EVEN, RAW = "▼", "≈", "*"

FOOTNOTES = {
    LOSES: "loses to random at the same tokens: the 95 % interval of the paired difference lies below zero",
    EVEN: "not told apart from random at the same tokens: the interval holds zero",
    RAW: "has modules to train, and they are random here: its accuracy says nothing about the method",
}


@dataclass(frozen=True)
class Column:
    """head and unit of a column, what it means, and its cell for a row."""

    head: str
    unit: str
    help: str
    cell: Callable[[Row], str]


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns for these rows; those that have nothing to say are left out."""
    score = rows[0].score if rows else "accuracy"
    marked = {row.key: marks(row, rows) for row in rows}
    head = score.replace("accuracy", "acc.") if len(score) > 8 else score
    every = [
        Column("method", "", "the method and its setting, in text form", lambda r: _named(r, marked[r.key])),
        Column("tokens", "mean", "per block, over attention and MLP, prefix included", lambda r: f"{r.tokens:.0f}"),
        Column("", "final", "tokens after the last block", lambda r: count(r.final)),
        Column(head, "%", f"{score} with its 95 % interval", lambda r: percent(r.accuracy)),
        Column("change", "points", "against the unreduced model, paired, 95 % interval",
               lambda r: points(r.difference)),
        Column("vs random", "points", "against random at the same tokens, paired, 95 % interval",
               lambda r: points(against_random(r, rows))),
        Column("agree", "%", "images given the class the unreduced model gives",
               lambda r: NONE if r.agreement is None else f"{100 * r.agreement:.1f}"),
        Column("KL", "nats", "of the class probabilities, from the unreduced model's",
               lambda r: NONE if r.kl is None else f"{r.kl:.3f}"),
        Column("moved", "1 - cos", "how far features moved from the unreduced model's",
               lambda r: NONE if r.movement is None else f"{r.movement:.4f}"),
        Column("GFLOPs", "", "multiply-adds of one image, the method's own included", lambda r: f"{r.gflops:.3f}"),
        Column("speed-up", "x", "median of interleaved pairs, with quartiles; the first row is its own rival",
               lambda r: ratio(r.speedup)),
        Column("ceiling", "x", "speed-up the model's remaining FLOPs would allow", lambda r: f"{r.ceiling:.2f}"),
        Column("of it", "%", "speed-up over ceiling",
               lambda r: NONE if r.achieved is None else f"{100 * r.achieved:.0f}"),
        Column("own", "% time", "the method's share of the forward pass: deciding and combining",
               lambda r: NONE if r.own_time is None else f"{100 * r.own_time:.1f}"),
        Column("peak", "MB", "tensors alive at once in one batch, without weights and input",
               lambda r: f"{r.peak / 1e6:.1f}"),
    ]  # fmt: skip
    good = [row for row in rows if not row.error]
    return [column for column in every if column.head == "method" or any(column.cell(r) != NONE for r in good)]


def marks(row: Row, rows: Sequence[Row]) -> str:
    """The marks of a row, in the order of `FOOTNOTES`."""
    found = "" if row.trained != UNTRAINED else RAW
    rival = against_random(row, rows)
    if rival is None:
        return found
    return (LOSES if rival.high < 0 else EVEN if rival.low <= 0 else "") + found


def footnotes(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The marks that occur, each with what it says."""
    used = "".join(marks(row, rows) for row in rows)
    return [(mark, says) for mark, says in FOOTNOTES.items() if mark in used]


def failed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.error]


def measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not row.error]


def frontier(rows: Sequence[Row], cost: Callable[[Row], float]) -> list[Row]:
    """Rows no other row beats in both accuracy and cost (lower is better), cheapest first; untrained ones left out."""
    ordered = sorted(
        (r for r in measured(rows) if r.accuracy and r.trained != UNTRAINED), key=lambda r: (cost(r), -_accuracy(r))
    )
    best, front = -1.0, []
    for row in ordered:
        if _accuracy(row) > best:
            front.append(row)
            best = _accuracy(row)
    return front


def summary(rows: Sequence[Row]) -> str:
    """What a reader in a hurry should know: the fastest method whose measured loss is within a point."""
    base = next((r for r in measured(rows) if r.method == UNREDUCED), None)
    tried = [r for r in measured(rows) if r.difference and r.speedup and r.trained != UNTRAINED]
    if base is None or not tried:
        return "Nothing to compare yet."
    assert base.accuracy is not None
    start = f"The unreduced model reaches {100 * base.accuracy.value:.1f} % {base.score} on {base.n} images."
    near = [r for r in tried if r.difference and r.difference.value > -NEAR and r.speedup and r.speedup.value > 1]
    if not near:
        best = max(tried, key=_accuracy)
        return (
            f"{start} None here is faster within one point of it; {best.method} differs by {points(best.difference)}."
        )
    best = max(near, key=lambda r: r.speedup.value if r.speedup else 0.0)
    assert best.speedup is not None
    return (
        f"{start} Within one point of it, {best.method} is the fastest: {best.speedup.value:.2f}x "
        f"(its FLOPs allow {best.ceiling:.2f}x), {points(best.difference)} points."
    )


def _accuracy(row: Row) -> float:
    return row.accuracy.value if row.accuracy else 0.0


def _named(row: Row, marked: str) -> str:
    return f"{row.method} {marked}".rstrip()


def percent(x: Interval | None) -> str:
    """A share in per cent with half the width of its interval."""
    return NONE if x is None else f"{100 * x.value:.1f} ±{100 * _half(x):.1f}"


def points(x: Interval | None) -> str:
    """A difference of shares in percentage points with half the width of its interval."""
    return NONE if x is None else f"{100 * x.value:+.1f} ±{100 * _half(x):.1f}"


def ratio(x: Interval | None) -> str:
    """A ratio with half the distance of its quartiles."""
    return NONE if x is None else f"{x.value:.2f} ±{_half(x):.2f}"


def _half(x: Interval) -> float:
    return (x.high - x.low) / 2
