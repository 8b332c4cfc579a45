"""Regions: a line of visual tokens cut into M parts of its picture, and what is summed, sampled and weighed in them.

Regions are as square as they can be and differ by at most one row and one column of cells. Everything about them is
tensors, so lines of different grids stand side by side and nothing waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budgets import Budget, Capacity
from ..place import Place
from ..plan import Hard, Plan, PlanError, complement, take
from ..select import allowed
from ..signals import lazy
from ..tokens import Tokens
from .method import Shape
from .view import View

FAR = 2**31
"""Beyond every row and column."""


# -- counts ------------------------------------------------------------------------------------------------------------
def granted(budget: Budget, tokens: Tokens, at: Place) -> tuple[int, Tensor | None]:
    """Rows of a line: the most any line gets, at least one, and each line's own, (R,) long; None where all get it.

    Raises PlanError for a budget that names no count."""
    _counts(budget)
    if tokens.valid is None:
        return max(budget.keep(tokens.n, at), min(1, tokens.n)), None
    count, most = allowed(budget, tokens, at=at, device=tokens.valid.device)
    return most, count


def queries(budget: Budget, shape: Shape) -> int:
    """Rows a module with one learned query each must be able to make: the count asked for, or the share of a tile.

    Raises PlanError for a budget that names no count."""
    _counts(budget)
    if isinstance(budget, Capacity):
        return max(budget.tokens) if isinstance(budget.tokens, tuple) else budget.tokens
    cells = shape.grid[0] * shape.grid[1]
    return max(1, budget.keep(cells, Place(start=cells)))


def _counts(budget: Budget) -> None:
    if budget.adaptive:
        raise PlanError(f"{budget!r} names no count, and a projector makes a fixed one; give r, keep or tokens")


def rectangle(count: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns with rows * columns == count that fit in the grid and are nearest to its shape.

    A square count on a square grid gives a square. Raises PlanError where no such rectangle exists."""
    height, width = grid
    fits = [(a, count // a) for a in range(1, height + 1) if count % a == 0 and count // a <= width]
    if not fits:
        near = min(math.isqrt(count), height, width) ** 2
        raise PlanError(
            f"{count} rows form no rectangle inside a grid of {height} x {width}; ask for another count, such as "
            f"{near}, or take m3 or tokenpacker, which make any"
        )
    return min(fits, key=lambda shape: abs(math.log(shape[0] * width / (shape[1] * height))))


# -- regions -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Regions:
    """Each line's cells cut into m regions, in raster order.

    of         (R, N) long, the region of each cell, m where there is none (padding)
    m          regions, counting padding
    row, column    (R, N) long, where the cells stand in their tile
    lengths    (R,) regions of each line, where they differ; None = m
    """

    of: Tensor
    m: int
    row: Tensor
    column: Tensor
    lengths: Tensor | None = None

    @classmethod
    def cut(cls, view: View, m: int, lengths: Tensor | None = None, bands: int | None = None) -> Regions:
        """The regions of a view: every tile (and frame) gets its share of them by its cells.

        A tile is cut into bands of rows and each band into columns, so that regions are as square as can be; `bands`
        sets their number. Tiles too small for a region of their own join a neighbour's; a tile with cells missing is
        cut into runs of equal length. No line may have more regions than cells.
        """
        r, n = view.index.shape
        real = torch.ones_like(view.row, dtype=torch.bool) if view.valid is None else view.valid
        new = (view.tile.diff(dim=-1) != 0) | (view.time.diff(dim=-1) != 0)
        segment = F.pad(new.long(), (1, 0)).cumsum(-1)
        slot = torch.where(real, segment, n)

        def ends(x: Tensor) -> tuple[Tensor, Tensor]:
            """First coordinate and extent of each cell's tile, (R, N) each."""
            low = x.new_full((r, n + 1), FAR).scatter_reduce(-1, slot, x, "amin").gather(-1, segment)
            high = x.new_zeros(r, n + 1).scatter_reduce(-1, slot, x, "amax").gather(-1, segment)
            return low, (high - low + 1).clamp(min=1)

        (top, height), (left, width) = ends(view.row), ends(view.column)
        each = real.long()
        size = each.new_zeros(r, n + 1).scatter_add(-1, slot, each)[:, :n]
        until = size.cumsum(-1).gather(-1, segment)
        size = size.gather(-1, segment)
        total = each.sum(-1, keepdim=True).clamp(min=1)
        wanted = torch.full_like(total, m) if lengths is None else lengths[:, None]
        first = wanted * (until - size) // total  # regions before this tile
        share = wanted * until // total - first
        own = share.clamp(min=1)

        near = torch.full_like(own, bands) if bands else (own * height / width).double().sqrt().round().long()
        fewest = (own + width - 1) // width
        a = torch.minimum(torch.minimum(torch.maximum(near, fewest), height), own)
        down = (view.row - top) * a // height
        start, stop = down * own // a, (down + 1) * own // a
        across = (view.column - left) * (stop - start) // width
        rank = each.cumsum(-1) - 1 - (until - size)
        region = torch.where(size == height * width, start + across, rank * own // size.clamp(min=1))
        region = torch.where(share > 0, first + region, first.clamp(max=(wanted - 1).clamp(min=0)))
        return cls(torch.where(real, region, m), m, view.row, view.column, lengths)

    @property
    def real(self) -> Tensor:
        """(R, N) bool: the cells that are no padding."""
        return self.of < self.m

    @lazy
    def middle(self) -> tuple[Tensor, Tensor]:
        """Twice the coordinates of each region's middle: (R, m) long each, rows and columns; padding's are far."""
        return self._middle(self.row), self._middle(self.column)

    def _middle(self, x: Tensor) -> Tensor:
        lead = (x.shape[0], self.m + 1)
        low = x.new_full(lead, FAR).scatter_reduce(-1, self.of, x, "amin")
        high = x.new_zeros(lead).scatter_reduce(-1, self.of, x, "amax")
        return (low + high)[:, :-1]

    @lazy
    def _off(self) -> tuple[Tensor, Tensor]:
        """Twice the distance of each cell from the middle of its region: (R, N) long, rows and columns."""
        of = self.of.clamp(max=self.m - 1)
        row, column = (middle.gather(-1, of) for middle in self.middle)
        return (2 * self.row - row).abs(), (2 * self.column - column).abs()

    @lazy
    def anchor(self) -> Tensor:
        """(R, m) long: the cell nearest the middle of each region, the first of equals; ascending."""
        n = self.of.shape[1]
        row, column = self._off
        key = (row + column) * n + torch.arange(n, device=self.of.device)
        best = key.new_full((key.shape[0], self.m + 1), n - 1 + n * FAR)
        return best.scatter_reduce(-1, self.of, key, "amin")[:, :-1] % n

    def kept(self) -> Hard:
        """The plan of a projector: the anchors stay, what they hold is the projector's matter."""
        return Plan.keep(self.anchor, self.of.shape[1], self.lengths)

    def averaged(self) -> Hard:
        """The plan in which each region's cells are averaged into its anchor."""
        n = self.of.shape[1]
        if self.lengths is None:
            extra = complement(self.anchor, n)
            return Hard(n, self.anchor, extra, self.of.gather(-1, extra)).averaged(None)
        where = torch.arange(n, device=self.of.device).expand_as(self.of)
        settled = (self.anchor.gather(-1, self.of.clamp(max=self.m - 1)) == where) | ~self.real
        return Hard(n, self.anchor, where, self.of.masked_fill(settled, -1), length=self.lengths).averaged(None)

    def bilinear(self) -> Tensor:
        """(R, N) float32: weights that sample the map in the middle of each region; they sum to one in each.

        Where regions are equal, this is bilinear resizing of the map to one value per region."""
        row, column = ((1 - off / 2).clamp(min=0) for off in self._off)
        weight = (row * column)[..., None]
        return (weight / self.spread(self.sum(weight)).clamp_min(1e-6))[..., 0]

    def sum(self, x: Tensor) -> Tensor:
        """(R, N, C) -> (R, m, C)."""
        lines, _, c = x.shape
        offset = torch.arange(lines, device=x.device)[:, None] * (self.m + 1)
        out = x.new_zeros(lines * (self.m + 1), c).index_add(0, (self.of + offset).flatten(), x.flatten(0, 1))
        return out.view(lines, self.m + 1, c)[:, :-1]

    def spread(self, y: Tensor) -> Tensor:
        """(R, m, C) -> (R, N, C): each cell reads its region's row; padding the last one's."""
        return take(y, self.of.clamp(max=self.m - 1))

    def softmax(self, logits: Tensor) -> Tensor:
        """Softmax of (R, N, H) over the cells of each region, in float32; zero in the padding."""
        logits = logits.float()
        index = self.of[..., None].expand_as(logits)
        low = logits.new_full((logits.shape[0], self.m + 1, logits.shape[2]), float("-inf"))
        top = low.scatter_reduce(1, index, logits.detach(), "amax")[:, :-1]
        p = (logits - self.spread(top)).masked_fill(~self.real[..., None], float("-inf")).exp()
        return p / self.spread(self.sum(p)).clamp_min(1e-30)


def evenly(tokens: Tokens, m: int, lengths: Tensor | None = None) -> Hard:
    """A plan of m rows each of which stands for a whole line: their anchors are spread evenly over it."""
    step = torch.arange(m, device=tokens.device)
    if lengths is None:
        return Plan.keep(((2 * step + 1) * tokens.n // (2 * m)).expand(tokens.batch, m), tokens.n)
    assert tokens.valid is not None
    many, own = tokens.valid.sum(-1, keepdim=True), lengths[:, None].clamp(min=1)
    order = (~tokens.valid).to(torch.int8).argsort(dim=-1, stable=True)
    place = ((2 * step + 1) * many // (2 * own)).clamp(max=tokens.n - 1)
    return Plan.keep(order.gather(-1, place), tokens.n, lengths)
