"""Where in its picture each visual row lies, when an image is shown whole (tile 0) and in crops (tiles 1 and up)."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from ..plan import on_device
from .view import View

FAR = 1 << 40  # larger than any row, column or group


@dataclass(frozen=True, eq=False)
class Canvas:
    """The crops of each image laid side by side, what is padding there cut away, beside the whole view of it.

    The whole view and the crops show the same picture: the first cell row of the one begins where the first cell row
    of the others does. Cells that the model left out as padding have no row in the view, so they count nowhere.

    whole     (R, N) bool, rows of the whole view
    cut       (R, N) bool, rows of crops
    y, x      (R, N) float32 in (0, 1), the centre of each cell, down and across the picture
    height, width    (R, 1) long, cells of a tile
    under     (R, N) long, for rows of the whole view the crop that shows the same place; 0 where there are no crops
    """

    view: View
    whole: Tensor
    cut: Tensor
    y: Tensor
    x: Tensor
    height: Tensor
    width: Tensor
    under: Tensor

    @classmethod
    def of(cls, view: View) -> Canvas:
        """Where `view.crops` is not known, crops are taken to form the squarest rectangle, the longer side across."""
        tile, row, column = view.tile, view.row, view.column
        real = torch.ones_like(tile, dtype=torch.bool) if view.valid is None else view.valid
        whole, cut = real & (tile == 0), real & (tile > 0)
        height, width = (1 + g.masked_fill(~real, 0).amax(-1, keepdim=True) for g in (row, column))
        across = _across(tile.masked_fill(~real, 0).amax(-1), view.n) if view.crops is None else view.crops[:, 1]
        across = across.clamp(min=1)[:, None]
        crop = (tile - 1).clamp(min=0)
        down, right = crop // across * height + row, crop % across * width + column
        top, tall = _extent(down, cut)
        left, wide = _extent(right, cut)
        y = torch.where(whole, (row + 0.5) / height, (down - top + 0.5) / tall)
        x = torch.where(whole, (column + 0.5) / width, (right - left + 0.5) / wide)
        below, beside = ((y * tall).long() + top) // height, ((x * wide).long() + left) // width
        under = (below * across + beside + 1).masked_fill(~(whole & cut.any(-1, keepdim=True)), 0)
        return cls(view, whole, cut, y, x, height, width, under)

    def counts(self) -> Tensor:
        """(R, N + 1) long: the real rows of each tile. A line of N rows has at most that many tiles."""
        return self.sums((self.whole | self.cut).long(), self.view.tile)

    def sums(self, x: Tensor, tile: Tensor) -> Tensor:
        """(R, N + 1): x (R, N), zero at padding, summed over the rows of each tile."""
        return x.new_zeros(x.shape[0], x.shape[1] + 1).scatter_add(-1, tile.clamp(0, x.shape[1]), x)

    def of_tile(self, per_tile: Tensor) -> Tensor:
        """(R, N + 1) -> (R, N): what belongs to each row's tile; padding gets anything."""
        return per_tile.gather(-1, self.view.tile.clamp(0, self.view.n))

    def mirrored(self, x: Tensor) -> Tensor:
        """(R, N): a map over the whole view, read at each row's place, interpolated between the four nearest cells."""
        n = self.view.n
        cell = (self.view.row * self.width + self.view.column).masked_fill(~self.whole, n).clamp(max=n)
        plane = x.new_zeros(x.shape[0], n + 1).scatter(-1, cell, x)
        total = torch.zeros_like(x)
        rows, columns = _between(self.y, self.height), _between(self.x, self.width)
        for row, down in rows:
            for column, right in columns:
                total = total + down * right * plane.gather(-1, (row * self.width + column).clamp(max=n - 1))
        return total


def _across(crops: Tensor, most: int) -> Tensor:
    """(R,) long: the columns of the squarest rectangle of so many crops. crops: (R,) long, at most `most`."""
    table = [1] * (most + 1)
    for high in range(1, isqrt(most) + 1):  # the highest that is not higher than wide comes last
        for wide in range(high, most // high + 1):
            table[high * wide] = wide
    return on_device(table, crops.device)[crops.clamp(max=most)]


def _extent(place: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """The first of some places, and how many there are from it to the last: (R, 1) long each."""
    first = place.masked_fill(~among, FAR).amin(-1, keepdim=True)
    last = place.masked_fill(~among, -1).amax(-1, keepdim=True)
    some = among.any(-1, keepdim=True)
    return torch.where(some, first, 0), torch.where(some, last - first + 1, 1)


def _between(at: Tensor, cells: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two cells nearest to a place in (0, 1) along an axis, and their shares."""
    where = (at * cells - 0.5).clamp(min=0)
    where = torch.minimum(where, (cells - 1).to(where.dtype))
    low = where.floor()
    share = where - low
    first = low.long()
    return [(first, 1 - share), (torch.minimum(first + 1, cells - 1), share)]
