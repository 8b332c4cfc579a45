"""Budgets: how many tokens stay, as values. A budget never looks at features.

Every counting convention of the literature has a name here:

| convention | budget |
|---|---|
| ToMe: r go per block, constant, linearly inflected or listed | `Remove(8)`, `Remove(8, inflect=-1)`, `Remove((16, 8, 0))` |
| EViT: share of the current free tokens, rounded up | `KeepRatio(0.7, rounding="ceil")` |
| DynamicViT, ATC: share of the first free tokens, power by stage | `KeepRatio(0.7, of="start")` |
| explicit shares of the first free tokens, stage by stage | `KeepRatio((0.7, 0.39, 0.21), of="start")` |
| a number that stays | `Capacity(64)`, `Capacity((128, 64, 32))` |
| a score threshold, a share of the score mass (per sample) | `Threshold(0.01)`, `Mass(0.9)` |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .place import Place

ROUNDING: dict[str, Callable[[float], int]] = {"floor": math.floor, "ceil": math.ceil, "round": round}


class BudgetError(ValueError):
    """A budget outside its range."""


def _nearly(x: float) -> float:
    """x with float noise removed, so that 196 * 0.7 ** 2 floors as the real product does."""
    return round(x, 9)


@dataclass(frozen=True)
class Budget:
    """How many stay. `keep` answers with a Python integer; adaptive budgets answer per sample, in the selectors."""

    @property
    def adaptive(self) -> bool:
        """Whether samples may keep different numbers."""
        return False

    def keep(self, free: int, at: Place) -> int:
        """How many of the `free` tokens stay at this place, 0 <= keep <= free."""
        raise NotImplementedError

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
        counts = self.r if isinstance(self.r, tuple) else (self.r,)
        if any(c < 0 or c != int(c) for c in counts):
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
    ones are taken as they are. rounding: "floor", "ceil" or "round" (half to even).
    """

    ratio: float | tuple[float, ...] = 0.7
    of: Literal["current", "start"] = "current"
    rounding: Literal["floor", "ceil", "round"] = "floor"

    def __post_init__(self) -> None:
        for ratio in self.ratio if isinstance(self.ratio, tuple) else (self.ratio,):
            if not 0 < ratio <= 1:
                raise BudgetError(f"keep={ratio} is outside (0, 1]; keep is the share of tokens that stays")

    def keep(self, free: int, at: Place) -> int:
        ratio = self._stage(self.ratio, at, at.stage)
        if self.of == "start":
            share = ratio if isinstance(self.ratio, tuple) else ratio ** (at.stage + 1)
            count = ROUNDING[self.rounding](_nearly(at.start * share))
        else:
            count = ROUNDING[self.rounding](_nearly(free * ratio))
        return max(min(count, free), min(1, free))


@dataclass(frozen=True)
class Capacity(Budget):
    """A number stays. tokens: a count; or one per stage."""

    tokens: int | tuple[int, ...] = 64

    def __post_init__(self) -> None:
        for tokens in self.tokens if isinstance(self.tokens, tuple) else (self.tokens,):
            if tokens < 1 or tokens != int(tokens):
                raise BudgetError(f"tokens={tokens}: tokens counts what stays, whole numbers from 1 up")

    def keep(self, free: int, at: Place) -> int:
        return min(int(self._stage(self.tokens, at, at.stage)), free)


@dataclass(frozen=True)
class Threshold(Budget):
    """Tokens whose score reaches a value stay; samples keep different numbers, at least one."""

    value: float = 0.0

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
