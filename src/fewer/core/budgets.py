"""Budgets: how many tokens stay, as values. A budget never looks at features.

Every counting convention of the literature has a name here:

| convention | budget |
|---|---|
| ToMe: r go per block, constant, inflected or listed | `Remove(8)`, `Remove(8, inflect=-1)`, `Remove((16, 8, 0))` |
| EViT: share of the current free tokens, rounded up | `KeepRatio(0.7, rounding="ceil")` |
| DynamicViT, ATC: share of the first free tokens, power by stage | `KeepRatio(0.7, of="start")` |
| explicit shares of the first free tokens, stage by stage | `KeepRatio((0.7, 0.39, 0.21), of="start")` |
| a share cut off in double precision (kvpress) | `KeepRatio(0.7, rounding="trunc")` |
| SpAtten: all in the first blocks, then linearly down to a share | `Cascade(0.5)` |
| a number that stays | `Capacity(64)`, `Capacity((128, 64, 32))` |
| per sample: a score threshold, a share of the mass, outliers | `Threshold(0.01)`, `Mass(0.9)`, `Outliers()` |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .place import Place
from .plan import on_device
from .settings import Settings

ROUNDING: dict[str, Callable[[float], int]] = {"floor": math.floor, "ceil": math.ceil, "round": round, "trunc": int}


class BudgetError(ValueError):
    """A budget outside its range."""


def _whole(counts: int | tuple[int, ...], least: int) -> bool:
    """Whether this is a whole number, or some, of at least `least`."""
    items = counts if isinstance(counts, tuple) else (counts,)
    return bool(items) and all(isinstance(c, int) and c >= least for c in items)


def _nearly(x: float) -> float:
    """x with float noise removed, so that 196 * 0.7 ** 2 floors as the real product does."""
    return round(x, 9)


@dataclass(frozen=True)
class Budget(Settings):
    """How many stay. `keep` answers with a Python integer; adaptive budgets answer per sample, in the selectors."""

    refusal: ClassVar[type[ValueError]] = BudgetError

    @property
    def adaptive(self) -> bool:
        """Whether samples may keep different numbers."""
        return False

    def keep(self, free: int, at: Place) -> int:
        """How many of the `free` tokens stay at this place, 0 <= keep <= free."""
        raise NotImplementedError

    def spares(self, free: int, at: Place) -> bool:
        """Whether all tokens of all samples stay, as far as shapes tell: a padded sample has at most `free` of them."""
        return self.keep(free, at) == free

    def counts(self, free: int, at: Place, *, least: int = 0) -> list[int]:
        """How many stay of 0, 1, ..., free tokens, at least `least`: what a batch of different lengths needs to know.

        Only the answer for all of them is noted in the ledger. Raises BudgetError where scores decide the number.
        """
        if self.adaptive:
            raise BudgetError(f"{self!r} depends on scores and names no count; give r, keep or tokens here")
        quiet = at.quiet
        return [max(self.keep(n, at if n == free else quiet), min(least, n)) for n in range(free + 1)]

    def most(self, free: int, at: Place, *, least: int = 0) -> int:
        """The most that can stay of `free` tokens or fewer: the rows a padded batch needs, known without its scores.
        Of more tokens never fewer stay."""
        return max(self.keep(free, at.quiet), min(least, free))

    def granted(self, real: Tensor, free: int, at: Place, *, least: int = 0) -> Tensor:
        """How many stay of each padded sample's own free tokens. real: (B,) long, at most `free`. Returns (B,).

        The budget is asked once per possible length: a table of Python integers, read per sample without a sync.
        """
        return on_device(self.counts(free, at, least=least), real.device)[real]

    def _stage(self, values: float | tuple, at: Place, index: int) -> float:
        if not isinstance(values, tuple):
            return values
        return values[index] if index < len(values) else values[-1]


@dataclass(frozen=True)
class Remove(Budget):
    """r tokens go at every place.

    r: a count; or one per place, padded with zeros. inflect: -1 to 1; the counts run linearly from r (1 - inflect) to
    r (1 + inflect) over the places, truncated toward zero at both ends and at each place (ToMe, arXiv:2210.09461).
    Methods that pair tokens take at most half of the free ones; a request cut short is noted in the ledger.
    """

    r: int | tuple[int, ...] = 8
    inflect: float = 0.0

    def __post_init__(self) -> None:
        if not _whole(self.r, least=0):
            raise BudgetError(f"r={self.r}: r counts tokens that go, whole numbers from 0 up")
        if not -1 <= self.inflect <= 1:
            raise BudgetError(f"inflect={self.inflect} is outside [-1, 1]; -1 removes most in the first layers")

    def schedule(self, places: int) -> list[int]:
        """The r of each place."""
        return [self.at(i, places) for i in range(places)]

    def at(self, index: int, places: int) -> int:
        """The r of one place."""
        if isinstance(self.r, tuple):
            return self.r[index] if index < len(self.r) else 0
        if self.inflect == 0 or places == 1:
            return self.r
        low = int(self.r * (1 - self.inflect))
        high = 2 * self.r - low
        return int(low + (high - low) / (places - 1) * index)

    def keep(self, free: int, at: Place) -> int:
        asked = self.at(at.stage, at.stages)
        if asked > free:
            at.note(f"layer {at.layer}: asked to remove {asked}, only {free} free")
        return free - min(asked, free)


@dataclass(frozen=True)
class KeepRatio(Budget):
    """A share stays.

    ratio: in (0, 1]; or one per stage. of: "current" = the free tokens present, so stages compound; "start" = the
    free tokens that entered the model: a single ratio is then raised to the stage's number (1, 2, 3, ...), listed
    ones are taken as they are. rounding: "floor", "ceil", "round" (half to even), each of the decimal product; or
    "trunc", of the product in double precision as it is: 90 tokens at 0.7 floor to 63 and truncate to 62 (kvpress).
    """

    ratio: float | tuple[float, ...] = 0.7
    of: Literal["current", "start"] = "current"
    rounding: Literal["floor", "ceil", "round", "trunc"] = "floor"

    def __post_init__(self) -> None:
        if self.ratio == ():
            raise BudgetError("keep names no share; give one, or one per stage")
        for ratio in self.ratio if isinstance(self.ratio, tuple) else (self.ratio,):
            if not 0 < ratio <= 1:
                raise BudgetError(f"keep={ratio} is outside (0, 1]; keep is the share of tokens that stays")
        if self.of not in ("current", "start"):
            raise BudgetError(f"of={self.of}: keep is a share of the tokens at the start or of the current ones")
        if self.rounding not in ROUNDING:
            raise BudgetError(f"rounding={self.rounding}: choose {', '.join(ROUNDING)}")

    def keep(self, free: int, at: Place) -> int:
        ratio = self._stage(self.ratio, at, at.stage)
        if self.of == "start":
            share = ratio if isinstance(self.ratio, tuple) else ratio ** (at.stage + 1)
            wanted = at.start * share
        else:
            wanted = free * ratio
        count = ROUNDING[self.rounding](wanted if self.rounding == "trunc" else _nearly(wanted))
        return max(min(count, free), min(1, free))

    def spares(self, free: int, at: Place) -> bool:
        if self.of == "current" or at.starts is None:
            return super().spares(free, at)
        quiet = at.quiet  # a shorter sample is granted less, whatever the longest has left
        return all(self.keep(n, replace(quiet, start=n)) == n for n in range(at.start + 1))

    def granted(self, real: Tensor, free: int, at: Place, *, least: int = 0) -> Tensor:
        if self.of == "current" or at.starts is None:
            return super().granted(real, free, at, least=least)
        quiet = at.quiet
        table = [max(self.keep(n, replace(quiet, start=n)), min(least, n)) for n in range(at.start + 1)]
        return torch.minimum(on_device(table, real.device)[at.starts], real)


@dataclass(frozen=True)
class Cascade(KeepRatio):
    """All stay in the first blocks (15 % of them, at least three but never the last), then fewer in each, linearly,
    down to `ratio` in the last. Rounded up.

    of: a share of what entered the model ("start"), or of what is seen so far where a cache is counted ("current").
    """

    ratio: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.ratio, tuple):
            raise BudgetError(f"keep={self.ratio}: a cascade takes one share, what is left in the last block")

    @staticmethod
    def dense(layers: int) -> int:
        """How many first blocks keep all."""
        return min(max(3, math.ceil(0.15 * layers)), layers - 1)

    def keep(self, free: int, at: Place) -> int:
        assert isinstance(self.ratio, float | int)
        whole = self.dense(at.layers)
        share = 1 - (1 - self.ratio) * max(at.layer - whole + 1, 0) / (at.layers - whole)
        every = free if self.of == "current" else at.start
        return max(min(math.ceil(round(every * share, 9)), free), min(1, free))


@dataclass(frozen=True)
class Capacity(Budget):
    """A number stays. tokens: a count; or one per stage."""

    tokens: int | tuple[int, ...] = 64

    def __post_init__(self) -> None:
        if not _whole(self.tokens, least=1):
            raise BudgetError(f"tokens={self.tokens}: tokens counts what stays, whole numbers from 1 up")

    def keep(self, free: int, at: Place) -> int:
        return min(int(self._stage(self.tokens, at, at.stage)), free)


@dataclass(frozen=True)
class Threshold(Budget):
    """Tokens whose score reaches a value stay; samples keep different numbers, at least one."""

    endless: ClassVar[frozenset[str]] = frozenset({"value"})  # -inf keeps everything, inf the best

    value: float = 0.0

    def __post_init__(self) -> None:
        if math.isnan(self.value):
            raise BudgetError("threshold=nan: no score reaches a value that is not a number")

    @property
    def adaptive(self) -> bool:
        return True

    def keep(self, free: int, at: Place) -> int:
        return free


@dataclass(frozen=True)
class Mass(Budget):
    """The fewest tokens whose (non-negative) scores hold this share of the total stay (nucleus, top-p)."""

    share: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise BudgetError(f"mass={self.share} is outside (0, 1]; it is the share of the total score that is kept")

    @property
    def adaptive(self) -> bool:
        return True

    def keep(self, free: int, at: Place) -> int:
        return free


@dataclass(frozen=True)
class Outliers(Budget):
    """Tokens whose score lies above Q3 + factor (Q3 - Q1) of their sample stay; at least one."""

    factor: float = 1.5

    def __post_init__(self) -> None:
        if self.factor < 0:
            raise BudgetError(f"factor={self.factor} is negative; 1.5 is the usual fence")

    @property
    def adaptive(self) -> bool:
        return True

    def keep(self, free: int, at: Place) -> int:
        return free

    def most(self, free: int, at: Place, *, least: int = 0) -> int:
        return min(free, max(1, least, -(-(free - 1) // 4)))  # so many can lie above Q3
