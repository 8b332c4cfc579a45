"""Rows of a cache in few bits: keys per channel in groups of rows, values per row, outlier rows exactly."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Codec:
    """How the older rows of a cache layer are stored.

    bits      of a number
    group     rows that share one scale per key channel, and leave the window together
    window    newest rows that stay as they are, `group` - 1 more until a group is full
    outliers  rows of each group with the smallest keys (sum of absolute values) that compete for the pool
    pool      rows per KV head that are kept exactly
    """

    bits: int = 2
    group: int = 128
    window: int = 128
    outliers: int = 3
    pool: int = 32

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits}: a byte holds whole numbers of {', '.join(map(str, BITS))} bits")
        if self.group < 1 or min(self.window, self.outliers, self.pool) < 0:
            raise ValueError(
                f"group={self.group}, window={self.window}, outliers={self.outliers}, pool={self.pool}: at least 1 row "
                "a group, and no negative number of rows"
            )
        if self.outliers > self.group:
            raise ValueError(f"outliers={self.outliers} of a group of {self.group} rows; at most all of them")


def pack(codes: Tensor, bits: int) -> Tensor:
    """(..., d) whole numbers below 2^bits -> (..., ceil(d bits / 8)) uint8, the first number in the lowest bits."""
    per = 8 // bits
    codes = F.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per))
    return (codes << _shifts(bits, codes.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, d: int) -> Tensor:
    """The (..., d) uint8 numbers that `pack` took."""
    return ((packed[..., None] >> _shifts(bits, packed.device)) & (2**bits - 1)).flatten(-2)[..., :d]


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def quantise(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Codes between the smallest and the largest number along `dim`.

    Returns (..., d) uint8 codes and the grid, float16, with `dim` of size two: scale and smallest number. x is about
    code * scale + smallest; codes are rounded on the grid as it is stored.
    """
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    grid = torch.cat([(high - low) / (2**bits - 1), low], dim).half()
    scale, low = grid.float().split(1, dim)
    codes = ((x - low) / torch.where(scale > 0, scale, 1)).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), grid


def rounded(x: Tensor, bits: int) -> Tensor:
    """What x is after symmetric rounding to 2^bits - 1 levels, each token on its own scale. x: (..., C)."""
    top = 2 ** (bits - 1) - 1
    scale = x.detach().float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
    return ((x.float() / scale).round() * scale).to(x.dtype)


def dequantise(codes: Tensor, grid: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The numbers of codes on their grid."""
    scale, low = grid.float().split(1, dim)
    return torch.addcmul(low, codes.float(), scale).to(dtype)


@dataclass(eq=False)
class Codes:
    """The coded rows of one layer: `rows` of each head from `first` on, in the order of the cache; those before are
    padding.

    k, v       (B, G, C, bytes) uint8. k_grid: (B, G, C / group, 2, d), v_grid: (B, G, C, 2), float16
    pool_k, v  (B, G, P, d) exact rows, pool_row (B, G, P) int32 where they stand, pool_size their sum of |k|, infinite
               for padding; their places in k hold a filler
    slot, home (B, G, R) int32: a row that lost its place in the pool was coded with a later group, at the slot that one
               of that group's outliers left free; home is where it stands, -1: nothing is there
    """

    codec: Codec
    d: int
    dtype: torch.dtype
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)
    k_grid: Tensor = field(init=False)
    v_grid: Tensor = field(init=False)
    pool_k: Tensor = field(init=False)
    pool_v: Tensor = field(init=False)
    pool_row: Tensor = field(init=False)
    pool_size: Tensor = field(init=False)
    slot: Tensor = field(init=False)
    home: Tensor = field(init=False)
    rows: int = 0
    first: int = 0

    @staticmethod
    def empty(codec: Codec, like: Tensor, first: int = 0) -> Codes:
        """No rows yet. like: (B, G, ..., d)."""
        new, (b, g, d) = Codes(codec, like.shape[-1], like.dtype, first=first), (*like.shape[:2], like.shape[-1])
        new.k = new.v = pack(like.new_empty(b, g, 0, d), codec.bits)
        new.k_grid, new.v_grid = like.new_empty(b, g, 0, 2, d).half(), like.new_empty(b, g, 0, 2).half()
        new.pool_k = new.pool_v = like.new_empty(b, g, 0, d)
        new.pool_size = torch.empty(b, g, 0, device=like.device)
        new.pool_row = new.slot = new.home = torch.empty(b, g, 0, dtype=torch.int32, device=like.device)
        return new

    def emptied(self) -> Codes:
        """The same without rows."""
        return Codes.empty(self.codec, self.pool_k, self.first)

    def tensors(self) -> list[Tensor]:
        """All that is stored."""
        return [x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)]

    def select(self, samples: Tensor) -> None:
        """Samples in a new order. samples: (B',)."""
        for f in fields(self):
            if isinstance(x := getattr(self, f.name), Tensor):
                setattr(self, f.name, x.index_select(0, samples))

    # -- in ------------------------------------------------------------------------------------------------------------
    def append(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        """Code whole groups of rows that follow those that are there.

        k, v: (B, G, m group, d). real: (B, 1 or G, m group) bool, False = padding, which widens no range and enters no
        pool; None = all real.
        """
        codec, (b, g, n, _) = self.codec, k.shape
        real = torch.ones(1, 1, 1, dtype=torch.bool, device=k.device) if real is None else real
        real = real.expand(b, g, n)
        size = k.abs().sum(-1, dtype=torch.float32).masked_fill(~real, float("inf"))
        k, v, counts = k.clone(), v.clone(), real.clone()
        if codec.pool and codec.outliers:
            for start in range(0, n, codec.group):
                part = slice(start, start + codec.group)
                self._compete(k[:, :, part], v[:, :, part], size[:, :, part], counts[:, :, part], self.rows + start)
        groups = k.unflatten(2, (-1, codec.group))
        counts = counts.unflatten(2, (-1, codec.group))[..., None]
        mean = (groups.float() * counts).sum(3, keepdim=True) / counts.sum(3, keepdim=True).clamp(min=1)
        codes, grid = quantise(torch.where(counts, groups.float(), mean), codec.bits, 3)
        self._extend("k", pack(codes.flatten(2, 3), codec.bits))
        self._extend("k_grid", grid)
        codes, grid = quantise(v, codec.bits, -1)
        self._extend("v", pack(codes, codec.bits))
        self._extend("v_grid", grid)
        self.rows += n

    def _extend(self, name: str, new: Tensor) -> None:
        setattr(self, name, torch.cat([getattr(self, name), new], 2))

    def _compete(self, k: Tensor, v: Tensor, size: Tensor, counts: Tensor, first: int) -> None:
        """One group's smallest rows against those in the pool; the smallest of all are in the pool afterwards.

        k, v, counts are changed in place: a row that goes to the pool counts no more, and where a member comes back,
        it takes the slot of one that went.
        """
        codec, held = self.codec, self.pool_row.shape[-1]
        low, mine = (x[..., : codec.outliers] for x in size.sort(dim=-1, stable=True))
        every = torch.cat([self.pool_size, low], -1)
        order = every.argsort(dim=-1, stable=True)
        stay = min(codec.pool, every.shape[-1])
        wins = torch.zeros_like(every, dtype=torch.bool).scatter_(-1, order[..., :stay], True)
        away = wins[..., held:] & low.isfinite()  # padding may fill the pool, the last there is, but leaves no slot
        slots = mine.gather(-1, (~away).to(torch.int8).argsort(dim=-1, stable=True))
        lost = ~wins[..., :held] & self.pool_size.isfinite()
        back = (~lost).to(torch.int8).argsort(dim=-1, stable=True)[..., : codec.outliers]
        comes = lost.gather(-1, back)
        slots_back = slots[..., : back.shape[-1]]

        rows = torch.cat([self.pool_row, (first + mine).to(torch.int32)], -1)
        index = order[..., :stay]
        wide = mine[..., None].expand(*mine.shape, self.d)
        new_k, new_v = (
            torch.cat([pool, x.gather(2, wide)], 2).gather(2, index[..., None].expand(*index.shape, self.d))
            for pool, x in ((self.pool_k, k), (self.pool_v, v))
        )
        counts.scatter_(-1, mine, counts.gather(-1, mine) & ~away)
        if stay < every.shape[-1] and held:
            wide, at = back[..., None].expand(*back.shape, self.d), slots_back[..., None].expand(*back.shape, self.d)
            for x, pool in ((k, self.pool_k), (v, self.pool_v)):
                x.scatter_(2, at, torch.where(comes[..., None], pool.gather(2, wide), x.gather(2, at)))
            counts.scatter_(-1, slots_back, counts.gather(-1, slots_back) | comes)
            self._extend("slot", (first + slots_back).to(torch.int32))
            self._extend("home", torch.where(comes, self.pool_row.gather(-1, back), -1))
        self.pool_k, self.pool_v = new_k, new_v
        self.pool_row, self.pool_size = rows.gather(-1, index), every.gather(-1, index)

    # -- out -----------------------------------------------------------------------------------------------------------
    def decode(self) -> tuple[Tensor, Tensor]:
        """All rows, (B, G, C, d) keys and values; those in the pool exactly."""
        bits, d = self.codec.bits, self.d
        codes = unpack(self.k, bits, d).unflatten(2, (-1, self.codec.group))
        k = dequantise(codes, self.k_grid, 3, self.dtype).flatten(2, 3)
        v = dequantise(unpack(self.v, bits, d), self.v_grid, -1, self.dtype)
        if self.home.shape[-1]:  # what is nowhere goes to a place that the pool writes over
            home = torch.where(self.home < 0, self.pool_row[..., :1], self.home).long()[..., None].expand(-1, -1, -1, d)
            slot = self.slot.long()[..., None].expand(-1, -1, -1, d)
            k, v = (x.scatter(2, home, x.gather(2, slot)) for x in (k, v))
        if self.pool_row.shape[-1]:
            row = self.pool_row.long()[..., None].expand(-1, -1, -1, d)
            k, v = k.scatter(2, row, self.pool_k), v.scatter(2, row, self.pool_v)
        return k, v
