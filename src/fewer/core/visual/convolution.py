"""Feature maps: what projectors that convolve over the picture share, and an encoder of its pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SignalError
from .resampler import linear_flops
from .view import Tower


def as_maps(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(R, T * h * w, C) -> (R * T, C, h, w): whole tiles, each in raster order."""
    return x.reshape(-1, grid[0] * grid[1], x.shape[-1]).transpose(1, 2).unflatten(2, grid)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map, (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Positions(nn.Module):
    """A learned vector for every cell of a grid, added to a map; other grids get them resized."""

    def __init__(self, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.cells = nn.Parameter(torch.randn(1, channels, *grid) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        if x.shape[-2:] == self.cells.shape[-2:]:
            return x + self.cells
        return x + F.interpolate(self.cells.float(), x.shape[-2:], mode="bilinear", align_corners=False).to(x.dtype)


class FineBlock(nn.Module):
    """ConvNeXt's block: 7 x 7 per channel, norm, an MLP per cell, residual. Source: arXiv:2201.03545, sec. 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.look = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(T, C, h, w) -> the same."""
        y = self.norm(self.look(x).movedim(1, -1))
        return x + self.shrink(F.gelu(self.grow(y))).movedim(-1, 1)


class PixelEncoder(nn.Module):
    """A small convolutional encoder of the pixels whose map is aligned with the tower's patches.

    The picture is resized so that every patch becomes a block of fine x fine cells of `pixels` x `pixels` each.
    """

    def __init__(self, width: int, grid: tuple[int, int], fine: int = 4, pixels: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.width, self.grid, self.fine, self.pixels = width, grid, fine, pixels
        self.stem = nn.Conv2d(3, width, pixels, stride=pixels)
        self.norm = ChannelNorm(width)
        self.blocks = nn.Sequential(*(FineBlock(width) for _ in range(depth)))

    def forward(self, tower: Tower) -> Tensor:
        """(T * P, fine * fine, width): for every patch of every tile its block of finer features, row by row.

        Raises SignalError where the pixels are not known, or the patches are not the grid this was made for."""
        if tower.pixels is None:
            raise SignalError(
                "the pixels that entered the vision tower are not known here; choose a projector that reads its "
                "features alone, such as honeybee_c or tokenpacker"
            )
        t, (h, w) = tower.pixels.shape[0], self.grid
        if tower.features.shape[0] != t * h * w:
            raise SignalError(
                f"the tower gave {tower.features.shape[0]} rows for {t} tiles; these modules were made for a grid of "
                f"{h} x {w} each. Make new ones for this model and picture size"
            )
        side, x = self.fine * self.pixels, tower.pixels.float()
        if x.shape[-2:] != (h * side, w * side):
            x = F.interpolate(x, (h * side, w * side), mode="bilinear", align_corners=False, antialias=True)
        y = self.blocks(self.norm(self.stem(x.to(self.stem.weight.dtype))))
        y = y.unflatten(2, (h, self.fine)).unflatten(4, (w, self.fine))  # (T, C, h, fine, w, fine)
        return y.permute(0, 2, 4, 3, 5, 1).reshape(t * h * w, self.fine**2, self.width)

    def flops(self, patches: int) -> int:
        """Of so many patches."""
        return linear_flops(self, patches * self.fine**2)
