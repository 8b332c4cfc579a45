"""What a reduced cache layer is made of, and its record."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core.plan import take

SPARE = 64, 32  # free rows a growing cache may hold behind the others: so many, and one for so many rows


class CacheError(ValueError):
    """A cache that cannot be reduced, or that was reduced and is now used by somebody who does not know."""


@dataclass(frozen=True)
class Access:
    """What a pass may do with a layer's rows.

    steady     no method will look at the rows of a decoding step, none will go
    headwise   heads of different lengths may be read one by one
    unordered  nobody asks in which order the rows lie
    """

    steady: bool = False
    headwise: bool = False
    unordered: bool = False


class GrowthBuffer:
    """Keys and values with free rows behind them: a token is added without a copy of all the others.

    keys, values: (B, G, S, d), the filled part of the storage.
    """

    def __init__(self, keys: Tensor, values: Tensor, spare: int) -> None:
        filled = keys.shape[-2]
        self.storage = tuple(x.new_empty(*x.shape[:2], filled + spare, x.shape[-1]) for x in (keys, values))
        self.keys, self.values = (s[:, :, :filled].copy_(x) for s, x in zip(self.storage, (keys, values), strict=True))

    def holds(self, keys: Tensor) -> bool:
        """Whether these are the keys that lie here, with a free row behind them that may be written."""
        frozen = keys.is_inference() and not torch.is_inference_mode_enabled()
        return keys is self.keys and keys.shape[-2] < self.storage[0].shape[-2] and not frozen

    def add(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """One row more, key and value (B, G, 1, d); returns all of them."""
        filled = self.keys.shape[-2]
        for storage, row in zip(self.storage, (key, value), strict=True):
            storage[:, :, filled : filled + 1] = row
        self.keys, self.values = (s[:, :, : filled + 1] for s in self.storage)
        return self.keys, self.values

    def replace(self, gone: Tensor) -> tuple[Tensor, Tensor]:
        """The last row takes the place of another and leaves its own. gone: (B, G, 1) long. Returns all that are left.

        Nothing else moves, and a row may stand in for itself.
        """
        last = self.keys.shape[-2] - 1
        for rows in (self.keys, self.values):
            where = gone[..., None].expand(-1, -1, -1, rows.shape[-1])
            rows.scatter_(2, where, rows[:, :, last:].clone())
        self.keys, self.values = (s[:, :, :last] for s in self.storage)
        return self.keys, self.values


@dataclass(frozen=True, eq=False)
class Arrivals:
    """The rows that reach one layer in a pass: (B, M) places among its `total` tokens, and which are no padding."""

    place: Tensor
    valid: Tensor | None
    total: int


@dataclass(frozen=True, eq=False)
class Parked:
    """Tokens that were dropped before a layer and may come back: what would have entered it.

    hidden: (B, D, C); place: (B, D) where they stand in the input, -1 = nobody; at_rope: (B, D) their position ids.
    """

    hidden: Tensor
    place: Tensor
    at_rope: Tensor

    def of(self, samples: Tensor) -> Parked:
        """Samples in a new order."""
        return Parked(*(x.index_select(0, samples) for x in (self.hidden, self.place, self.at_rope)))

    def before(self, length: int) -> Parked:
        """Those of the first `length` tokens."""
        return Parked(self.hidden, self.place.masked_fill(self.place >= length, -1), self.at_rope)

    def joined(self, other: Parked) -> Parked:
        pairs = zip((self.hidden, self.place, self.at_rope), (other.hidden, other.place, other.at_rope), strict=True)
        return Parked(*(torch.cat(pair, 1) for pair in pairs))

    def split(self, chosen: Tensor) -> tuple[Parked, Parked]:
        """Those chosen, as few columns as that takes, and the others. chosen: (B, D) bool. Reads one number."""
        width = int(chosen.sum(-1).max())
        index = (~chosen).to(torch.int8).argsort(dim=-1, stable=True)[:, :width]
        rows = take(self.hidden, index) if width else self.hidden[:, :0]
        taken = Parked(rows, self.place.gather(-1, index), self.at_rope.gather(-1, index))
        real = chosen.gather(-1, index)
        taken = Parked(taken.hidden, taken.place.masked_fill(~real, -1), taken.at_rope)
        return taken, Parked(self.hidden, self.place.masked_fill(chosen, -1), self.at_rope)


@dataclass(eq=False)
class Record:
    """What one layer's cache holds, kept when the cache itself is gone.

    logical   tokens seen; stored: rows held, averaged over samples and heads
    bytes     of keys and values, measured on their storage; peak: the most after any eviction or step
    full      bytes an unreduced cache would hold; index_bytes: of the row positions kept besides; waiting_bytes: of
              the features of dropped tokens that may come back
    """

    logical: int = 0
    stored: float = 0.0
    bytes: int = 0
    peak: int = 0
    full: int = 0
    index_bytes: int = 0
    waiting_bytes: int = 0
    kept: Tensor | None = field(default=None, repr=False)  # (B, G, P) int32 source positions of the evicted part
    tail: tuple[int, int] = (0, 0)  # positions that follow it, one by one
    read: float | Tensor | None = None  # rows per head the last pass's attention read; None: all that are stored
    heads: tuple[int, int] = (0, 0)  # B, G

    def positions(self) -> Tensor:
        """(B, G, M) long: the input position of each stored row, ascending; -1 pads where heads differ."""
        b, g = self.heads
        tail = torch.arange(*self.tail, device=None if self.kept is None else self.kept.device).expand(b, g, -1)
        if self.kept is None:
            return tail
        rows = torch.cat([self.kept.long().expand(b, g, -1), tail], -1)
        order = torch.where(rows < 0, torch.iinfo(torch.int64).max, rows).argsort(dim=-1, stable=True)
        return rows.gather(-1, order)
