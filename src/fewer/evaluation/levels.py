"""What a benchmark decides: at each budget the best method against random choice, and who loses less than a margin.

The best of many is the luckiest of many, too. Every interval here holds for all comparisons of its kind at once
(Bonferroni), so it holds for whichever method is picked by looking at the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from fewer.runtime.modules import UNTRAINED

from . import stats
from .bench import against_random, rival
from .record import Row
from .settings import RANDOM, UNREDUCED
from .stats import Interval
from .visual import BLIND, ORACLE

BOUNDS = (ORACLE, BLIND)  # what a perfect ranking could do, and what words alone give away


@dataclass(frozen=True)
class Level:
    """A budget: a random row, and the methods measured at the same tokens, best first.

    gains      of each method over random, accuracy, paired; 95 % for all of them at once
    """

    random: Row
    rows: tuple[Row, ...]
    gains: tuple[Interval, ...]

    @property
    def decided(self) -> bool:
        """Whether the best is told apart from random."""
        return self.gains[0].low > 0 or self.gains[0].high < 0

    @property
    def resolves(self) -> float:
        """The difference to random, best to have more than, that these items tell apart: half the widest interval."""
        return max((gain.high - gain.low) / 2 for gain in self.gains)


def able(rows: Sequence[Row]) -> list[Row]:
    """Rows that say something about a method: measured, and not with random modules; `BOUNDS` left out."""
    return [
        r for r in rows
        if not r.error and r.accuracy and r.hits and r.trained != UNTRAINED and r.name not in (UNREDUCED, *BOUNDS)
    ]  # fmt: skip


def levels(rows: Sequence[Row]) -> list[Level]:
    """The budgets with a random row and at least one method, most tokens first."""
    found, methods = [], able(rows)
    for random in sorted((r for r in methods if r.name in RANDOM), key=lambda r: -r.tokens):
        mine = [r for r in methods if rival(r, rows) is random]
        if mine:
            mine.sort(key=lambda r: (-_accuracy(r), -_speed(r)))
            gains = (cast(Interval, against_random(r, rows, among=len(mine))) for r in mine)  # random is their rival
            found.append(Level(random, tuple(mine), tuple(gains)))
    return found


@dataclass(frozen=True)
class Near:
    """Who is faster and shown to lose less than a margin, fastest first, of how many tried; losses: of all tried, in
    the order of rows, 95 % for all at once. rows: all tried, the smallest possible loss first."""

    within: tuple[Row, ...]
    rows: tuple[Row, ...]
    losses: tuple[Interval, ...]


def near(rows: Sequence[Row], margin: float) -> Near | None:
    """The faster methods, random choice among them, against the unreduced model; None where nothing can be compared."""
    base = next((r for r in rows if r.method == UNREDUCED and not r.error and r.hits), None)
    tried = [r for r in able(rows) if base is not None and r.n == base.n and _speed(r) > 1]
    if base is None or not tried:
        return None
    known = stats.unpack_hits(base.hits, base.n)
    pairs = [
        (r, stats.paired_difference(stats.unpack_hits(r.hits, r.n), known, among=len(tried))) for r in tried
    ]  # fmt: skip
    pairs.sort(key=lambda pair: -pair[1].low)
    within = sorted((r for r, loss in pairs if loss.low > -margin), key=lambda r: -_speed(r))
    return Near(tuple(within), tuple(r for r, _ in pairs), tuple(loss for _, loss in pairs))


def _accuracy(row: Row) -> float:
    return row.accuracy.value if row.accuracy else 0.0


def _speed(row: Row) -> float:
    return row.speedup.value if row.speedup else 0.0
