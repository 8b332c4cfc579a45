"""Short clips in which real pictures move, and questions whose answers and whereabouts are known exactly.

    asked = exam(500)                            # 500 clips of pictures held out from training
    asked.answers[0]                             # one answer to each of QUESTIONS
    asked.box[0, 3]                              # where the thing that moves is in frame 3

A clip is 16 grey frames of 56 x 56 pixels. One thing moves along a path; half-way it turns into another (a garment into
a shoe, or a shoe into a garment); a bag flashes up in one frame. Behind them are a still background and further
pictures that never move. Pictures are those of Fashion-MNIST: its training pictures in the split "train", in "test" the
test pictures in the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fewer.datasets.images import DataError, embedded, fashion_mnist

__all__ = ["FRAMES", "GRID", "LEVELS", "PATCH", "QUESTIONS", "SIZE", "TUBELET", "Clips", "Setting", "compose", "exam"]

Split = Literal["train", "test"]

FRAMES, SIZE = 16, 56
"""Frames of a clip, and pixels of the side of each."""
TUBELET, PATCH = 2, 8
"""Frames and pixels along the sides of what one token shows."""
GRID = (FRAMES // TUBELET, SIZE // PATCH, SIZE // PATCH)
"""Tokens along time, height and width: 8 x 7 x 7, so 392 in a clip."""
QUESTIONS: dict[str, tuple[str, ...]] = {
    "action": ("straight", "there and back", "circle", "growing"),
    "direction": ("up", "right", "down", "left"),
    "order": ("garment first", "shoe first"),
    "moment": tuple(f"slot {k}" for k in range(GRID[0])),
}
"""What is asked about every clip, with the possible answers. The direction is the one in which the motion starts; the
moment is when the bag is there."""
GARMENTS, SHOES, BAG = (0, 2, 3, 4, 6), (5, 7, 9), 8
MARGIN = 16  # pixels of background around the frame, for a camera that moves


@dataclass(frozen=True)
class Setting:
    """What clips are like besides their answers.

    side     pixels of the side of what moves, from and to; flash: of the bag
    clutter  still pictures in the background, from and to
    camera   chance that the background moves, one pixel a frame
    """

    side: tuple[int, int] = (14, 22)
    flash: int = 18
    clutter: tuple[int, int] = (0, 3)
    camera: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.side
        if not 4 <= low <= high <= 28:
            raise DataError(f"side={self.side}: things that move are 4 to 28 pixels wide, the smaller number first")
        if not 0 <= self.clutter[0] <= self.clutter[1]:
            raise DataError(f"clutter={self.clutter}: give the least and the most still pictures")


LEVELS: dict[str, Setting] = {
    "plain": Setting(),
    "small": Setting(side=(9, 11), flash=11),
    "flooded": Setting(clutter=(8, 10)),
    "camera": Setting(camera=1.0),
}
"""Settings by name: as in training; things a tenth as large; backgrounds full of still pictures; a moving camera."""


@dataclass(frozen=True, eq=False)
class Clips:
    """Clips and what is known of them.

    pixels    (N, T, H, W) uint8
    answers   (N, Q) long, the answer to each question
    box       (N, T, 4) float32, the thing that moves: top, left, bottom, right, in pixels
    flash     (N, 4) float32, the bag, in the last frame of its slot
    """

    pixels: Tensor
    answers: Tensor
    box: Tensor
    flash: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def moving(self) -> Tensor:
        """(N, T', H', W') bool: the tokens that show a part of what moves, by at least a fifth of their own area in one
        of their frames."""
        return _covered(self.box).unflatten(1, (GRID[0], TUBELET)).any(2)

    def flashed(self) -> Tensor:
        """(N, T', H', W') bool: the tokens that show the bag, likewise."""
        slot = torch.arange(GRID[0]) == self.answers[:, list(QUESTIONS).index("moment"), None]
        return _covered(self.flash[:, None]) & slot[:, :, None, None]


def exam(n: int, level: str = "plain", *, seed: int = 0) -> Clips:
    """n clips made of the test pictures in the package; the same for the same seed. Raises DataError for a level that
    is none of `LEVELS`."""
    if level not in LEVELS:
        raise DataError(f"no clips called {level!r}; there are {', '.join(LEVELS)}")
    return compose(n, "test", LEVELS[level], generator=torch.Generator().manual_seed(1_000_003 * seed + 17))


def compose(n: int, split: Split, setting: Setting = LEVELS["plain"], *, generator: torch.Generator) -> Clips:
    """n clips drawn with a generator. Raises DataError without n, or without the training pictures."""
    if n < 1:
        raise DataError(f"n={n}: at least one clip")
    draw = _Draw(generator)
    action, way = draw.whole(4, n), draw.whole(4, n)
    shoe_first, slot = draw.whole(2, n), draw.whole(GRID[0], n)
    side = draw.between(*setting.side, n)
    path, scale = _path(action, way, draw)
    span = side[:, None] * scale  # (n, T) pixels
    low, high = path.amin(1), path.amax(1)  # what the path needs besides where it stands
    half = span.amax(1, keepdim=True) / 2 - 1
    room = (SIZE - 2 * half) - (high - low)
    centre = path - low[:, None] + (half + room.clamp(min=0) * draw.unit(n, 2))[:, None]
    turn = draw.whole(5, n) + FRAMES // 2 - 2
    second = torch.arange(FRAMES) >= turn[:, None]
    garments, shoes = (_pictures(split, kinds, n, draw) for kinds in (GARMENTS, SHOES))
    is_shoe = second ^ shoe_first.bool()[:, None]
    things = torch.where(is_shoe[:, :, None, None], shoes[:, None], garments[:, None])
    frames = _background(n, split, setting, draw)
    frames = _pasted(frames.flatten(0, 1), things.flatten(0, 1), centre.flatten(0, 1), span.flatten())
    frames = frames.unflatten(0, (n, FRAMES))
    spot = setting.flash / 2 + (SIZE - setting.flash) * draw.unit(n, 2)
    bags = _pictures(split, (BAG,), n, draw)
    size = torch.full((n,), float(setting.flash))
    where, at = torch.arange(n), slot * TUBELET + TUBELET - 1
    frames[where, at] = _pasted(frames[where, at], bags, spot, size)
    frames = frames + 3 * draw.normal(*frames.shape)
    return Clips(
        frames.round().clamp(0, 255).to(torch.uint8),
        torch.stack([action, way, shoe_first, slot], 1),
        torch.cat([centre - span[..., None] / 2, centre + span[..., None] / 2], -1),
        torch.cat([spot - setting.flash / 2, spot + setting.flash / 2], -1),
    )


class _Draw:
    """What is drawn at random, all from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def whole(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator)

    def unit(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * self.unit(*shape)


def _path(action: Tensor, way: Tensor, draw: _Draw) -> tuple[Tensor, Tensor]:
    """Places relative to any origin, (n, T, 2) as row and column, and sizes relative to the thing's own, (n, T)."""
    n = len(action)
    ahead = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])[way]
    aside = ahead.flip(-1) * (2.0 * draw.whole(2, n) - 1)[:, None]
    reach = draw.between(18, 28, n)[:, None]
    t = torch.linspace(0, 1, FRAMES).expand(n, FRAMES)
    angle = 2 * math.pi * t
    radius = 0.4 * reach
    kind = action[:, None]
    along = torch.where(kind == 1, 1 - (2 * t - 1).abs(), t) * reach
    along = torch.where(kind == 2, radius * angle.sin(), along)
    across = torch.where(kind == 2, radius * (1 - angle.cos()), 0)
    scale = torch.where(kind == 3, 0.6 + 0.7 * t, 1)
    return along[..., None] * ahead[:, None] + across[..., None] * aside[:, None], scale


def _background(n: int, split: Split, setting: Setting, draw: _Draw) -> Tensor:
    """(n, T, H, W) float32: a soft texture and still pictures, or a camera moving over them."""
    wide = SIZE + 2 * MARGIN
    soft = F.interpolate(
        draw.unit(n, 1, 8, 8) * draw.between(0, 90, n)[:, None, None, None], (wide, wide), mode="bilinear"
    )
    still = soft[:, 0]
    count = draw.whole(setting.clutter[1] - setting.clutter[0] + 1, n) + setting.clutter[0]
    for k in range(setting.clutter[1]):
        kinds = (*GARMENTS, *SHOES)
        side = draw.between(12, 24, n) * (count > k)
        still = _pasted(still, _pictures(split, kinds, n, draw), wide * draw.unit(n, 2), side)
    way = torch.tensor([[-1, 0], [0, 1], [1, 0], [0, -1]])[draw.whole(4, n)]
    moves = draw.unit(n) < setting.camera
    offset = MARGIN + torch.where(moves[:, None], way, 0)[:, None] * (torch.arange(FRAMES)[:, None] - FRAMES // 2)
    row, column = (offset[..., k, None] + torch.arange(SIZE) for k in (0, 1))  # (n, T, SIZE)
    return still[torch.arange(n)[:, None, None, None], row[..., None], column[..., None, :]]


def _pasted(onto: Tensor, pictures: Tensor, centre: Tensor, side: Tensor) -> Tensor:
    """Pictures on frames, their black see-through. onto: (N, H, W), pictures: (N, 28, 28), centre: (N, 2), side: (N,)
    in pixels; none where it is 0."""
    height, width = onto.shape[1:]
    grid = [
        ((torch.arange(edge) + 0.5 - centre[:, k, None]) * 2 / side.clamp(min=1e-3)[:, None])
        for k, edge in enumerate((height, width))
    ]
    where = torch.stack([grid[1][:, None].expand(-1, height, -1), grid[0][:, :, None].expand(-1, -1, width)], -1)
    shown = F.grid_sample(pictures[:, None], where, align_corners=False)[:, 0]
    cover = (shown / 40).clamp(max=1)
    return onto * (1 - cover) + shown * cover


def _pictures(split: Split, kinds: tuple[int, ...], n: int, draw: _Draw) -> Tensor:
    """(n, 28, 28) float32, of classes drawn with equal chance."""
    pictures, by_class = _bank(split)
    kind = torch.tensor(kinds)[draw.whole(len(kinds), n)]
    turn = draw.whole(1 << 30, n)
    members = torch.stack([by_class[int(k)][int(t) % len(by_class[int(k)])] for k, t in zip(kind, turn, strict=True)])
    return pictures[members].float()


@cache
def _bank(split: Split) -> tuple[Tensor, list[Tensor]]:
    """Pictures and, for each class, which they are."""
    if split not in ("train", "test"):
        raise DataError(f"split={split!r}: clips are made of the train or the test pictures")
    data = embedded() if split == "test" else fashion_mnist("train")
    pictures = torch.as_tensor(data.pictures)
    return pictures, [(data.labels == k).nonzero().flatten() for k in range(10)]


def _covered(box: Tensor) -> Tensor:
    """(N, T, H', W') bool: the patches a box covers by at least a fifth. box: (N, T, 4)."""
    edges = torch.arange(GRID[1]) * PATCH
    share = []
    for k in (0, 1):
        low, high = box[..., k, None], box[..., k + 2, None]
        share.append((torch.minimum(high, edges + PATCH) - torch.maximum(low, edges)).clamp(min=0) / PATCH)
    return share[0][..., None] * share[1][..., None, :] >= 0.2
