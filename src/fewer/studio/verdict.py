"""What a benchmark says, in sentences: first one that anybody understands, then a verdict for each budget."""

from __future__ import annotations

from collections.abc import Sequence

from fewer.evaluation.generation import best_at_cost
from fewer.evaluation.levels import BOUNDS, Level, able, levels, near
from fewer.evaluation.record import Row
from fewer.evaluation.settings import RANDOM, UNREDUCED
from fewer.evaluation.stats import Interval

from .table import measured, of_language, of_seeing

NEAR = 0.01  # the loss of accuracy that is called near
EVEN_CHOICES = ("grid", "pool")  # baselines that look at nothing


def verdict(rows: Sequence[Row]) -> list[str]:
    """The first line, then one for each budget, then who is shown to lose less than a point."""
    base = next((r for r in measured(rows) if r.method == UNREDUCED and r.accuracy), None)
    if base is None or not able(rows):
        return ["Nothing to compare yet."]
    found = levels(rows)
    if any(row.drawn for row in rows):
        return [_generating(rows), *best_at_cost(rows)]
    said = [_plainly(base, rows, found), *(_level(level, base) for level in found), _near(rows, base)]
    return [line for line in (*said, _imagined(rows) if of_seeing(rows) else "") if line]


def _generating(rows: Sequence[Row]) -> str:
    """Whether any method beats fewer steps at equal cost."""
    said = best_at_cost(rows)
    better = sum("is nearer" in line for line in said)
    if not said:
        return "No method here is dearer than a row with fewer steps, so none can be held against one."
    return (
        f"{better or 'None'} of {len(said)} settings {'are' if better != 1 else 'is'} nearer to real pictures than "
        "the unreduced model with fewer steps, at equal cost."
    )


def _plainly(base: Row, rows: Sequence[Row], found: Sequence[Level]) -> str:
    """What leaving out about half of the tokens does, for somebody who knows nothing of this."""
    half = min(found, key=lambda level: abs(level.random.tokens / base.tokens - 0.5), default=None)
    best = half.rows[0] if half else min(able(rows), key=lambda r: abs(r.tokens / base.tokens - 0.5))
    what = "remembered tokens" if of_language(rows) else "image's tokens" if of_seeing(rows) else "tokens"
    line = f"Leaving out {100 * (1 - best.tokens / base.tokens):.0f} % of the {what} makes the model {_fast(best)}"
    line += f" ({best.method}): {_right(best)} right instead of {_right(base)}."
    return f"{line} Tokens picked at random: {_fast(half.random)}, {_right(half.random)} right." if half else line


def _fast(row: Row) -> str:
    speed = row.speedup.value if row.speedup else 1.0
    return f"{speed:.2f} times as fast"


def _right(row: Row) -> str:
    assert row.accuracy is not None
    return f"{round(row.accuracy.value * row.n):,} of {row.n:,}"


def _level(level: Level, base: Row) -> str:
    """The best of a budget, against random: by how much, whether that is decided, and what could have been."""
    random, best, many = level.random, level.rows[0], len(level.rows)
    better, worse = sum(g.low > 0 for g in level.gains), sum(g.high < 0 for g in level.gains)
    leads = f"{best.method} is the best of {many}" if many > 1 else best.method
    line = (
        f"{random.tokens:.0f} of {base.tokens:.0f} tokens: {leads}, {_percent(best)}{_cost(best)}; {random.method} "
        f"{_percent(random)}{_cost(random)}. Difference {interval(level.gains[0])} points: "
        f"{'decided' if level.decided else 'not decided'}."
    )
    if many > 1:
        line += f" Better than random: {better}, worse: {worse}, not told apart: {many - better - worse}."
    return f"{line} {base.n:,} {base.passport.unit} tell {100 * level.resolves:.1f} points apart."


def _near(rows: Sequence[Row], base: Row) -> str:
    found = near(rows, NEAR)
    if found is None:
        return "None here is faster than the unreduced model."
    many, least = len(found.rows), found.rows[0]
    at_once = f"95 %, for all {many} faster settings at once" if many > 1 else "95 %"
    if not found.within:
        return (
            f"Nobody is shown to lose less than one point ({at_once}); nearest is {least.method}: {_percent(least)} of "
            f"{_percent(base)}, a loss of at most {-100 * found.losses[0].low:.1f} points."
        )
    best, losses = found.within[0], dict(zip((r.key for r in found.rows), found.losses, strict=True))
    others = f"; so do {len(found.within) - 1} others" if len(found.within) > 1 else ""
    return (
        f"Shown to lose less than one point ({at_once}): {best.method} is the fastest{_cost(best)}, "
        f"{interval(losses[best.key])} points{others}."
    )


def interval(x: Interval) -> str:
    """A difference of shares in points, with its ends."""
    return f"{100 * x.value:+.1f} [{100 * x.low:+.1f}, {100 * x.high:+.1f}]"


def _percent(row: Row) -> str:
    assert row.accuracy is not None
    return f"{100 * row.accuracy.value:.1f} %"


def _cost(row: Row) -> str:
    """What a row is paid with, behind a comma."""
    if row.writing and row.writing.kv_full:
        return f", {100 * row.writing.kv_end / row.writing.kv_full:.0f} % of the cache"
    return f", {row.speedup.value:.2f}x" if row.speedup else ""


def _imagined(rows: Sequence[Row]) -> str:
    """Whether any method is on or above the unreduced model, at a quarter of its visual tokens, in denying what is not
    there but likely."""

    def denied(row: Row) -> float | None:
        return next((s.value.value for s in row.scores if s.task == "likely"), None)

    base = next((r for r in measured(rows) if r.method == UNREDUCED), None)
    known = None if base is None else denied(base)
    if base is None or known is None:
        return ""
    tried = [
        (share, r) for r in able(rows)
        if r.name not in (*RANDOM, *EVEN_CHOICES, *BOUNDS) and abs(r.tokens / base.tokens - 0.25) < 0.03
        and (share := denied(r)) is not None
    ]  # fmt: skip
    if not tried:
        return ""
    above = [(share, r) for share, r in tried if share >= known]
    start = f"At a quarter of the visual tokens {len(above) or 'none'} of {len(tried)} methods"
    start += f" deny what is likely but absent as often as the unreduced model ({100 * known:.1f} %) or more often"
    if not above:
        return f"{start}."
    share, best = max(above, key=lambda pair: (pair[0], pair[1].accuracy.value if pair[1].accuracy else 0))
    return f"{start}; {best.method} in {100 * share:.1f} %."
