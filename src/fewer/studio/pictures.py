"""Pictures of what became of the tokens. Pure functions: an image and the row of each patch in, an image out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .style import ACCENT, FAINT, GONE, INK, PAPER, QUIET, count, rgb

if TYPE_CHECKING:
    from fewer.runtime.session import Session

TILE = 196  # pixels, longer edge of one picture
DIMMED = 0.85  # how far dropped patches fade


def regions(image: Image.Image, rows: np.ndarray, *, size: int = TILE) -> Image.Image:
    """One image as the model sees it after some block.

    A patch that still has a row of its own is shown as it is. Patches that share a row are painted in their average
    colour, with a border around them. Dropped patches fade into a pale tint.

    image   any mode and size; stretched over the patch grid
    rows    (height, width) int, the row each patch is in, -1 = dropped (from `patch_rows`)
    size    pixels of the longer edge, rounded to whole pixels per patch
    Returns RGB. Raises ValueError if rows is not two-dimensional.
    """
    rows = np.asarray(rows)
    if rows.ndim != 2:
        raise ValueError(f"rows must be (height, width) over the patch grid, got shape {rows.shape}")
    cell = max(4, round(size / max(rows.shape)))
    pixels = _stretched(image, rows.shape, cell)
    paint = _painted(pixels, rows, cell)
    _outline(paint, rows, cell)
    return Image.fromarray(paint.round().astype(np.uint8))


def original(image: Image.Image, grid: tuple[int, int], *, size: int = TILE) -> Image.Image:
    """The input at the size `regions` gives it. grid: patches (height, width)."""
    return Image.fromarray(_stretched(image, grid, max(4, round(size / max(grid)))).astype(np.uint8))


def patch_rows(rows: np.ndarray, prefix: int, grid: tuple[int, int]) -> np.ndarray:
    """The rows of one sample's input tokens, (N0,), laid out on the patch grid, (height, width)."""
    return np.asarray(rows)[prefix:].reshape(grid)


def moments(counts: Sequence[float], most: int = 4, *, start: float) -> list[int]:
    """Layers worth a picture: after which the number of tokens changed; evenly thinned to `most`, the last one kept.

    counts: tokens after each layer; start: tokens that came in. The first layer, where nothing ever changed.

    >>> moments([197, 197, 140, 140, 100, 100], start=197)
    [2, 4]
    >>> moments([8, 7, 6, 5, 4, 3, 2], most=3, start=9)
    [1, 4, 6]
    """
    before = [start, *counts]
    changed = [layer for layer, count in enumerate(counts) if count != before[layer]] or [0]
    if len(changed) <= most:
        return changed
    return [changed[round((i + 1) * len(changed) / most) - 1] for i in range(most)]


def followed(
    session: Session, images: Sequence[Image.Image], *, most: int = 4, size: int = TILE
) -> tuple[list[str], list[list[Image.Image]]]:
    """Every image of the last forward pass beside what became of its tokens. Call it after the model.

    images: as the model saw them, in the order of the batch (the first ones of it).
    Returns captions and rows of tiles, for `sheet`. Raises ValueError where the patches form no known grid.
    """  # fmt: skip
    grid = session.last.grid
    if grid is None or len(grid) != 2:
        raise ValueError("this model's patches form no known grid, so there is nothing to draw them on")
    counts = session.counts
    mean = counts if isinstance(counts, list) else counts.double().mean(1).tolist()
    layers = moments(mean, most, start=session.last.first.n)
    maps = {layer: session.last.rows(layer).cpu().numpy() for layer in layers}
    captions = ["input", *(f"block {layer + 1}: {count(mean[layer])} tokens" for layer in layers)]
    prefix = session.host.prefix
    tiles = [
        [original(image, grid, size=size)]
        + [regions(image, patch_rows(maps[layer][i], prefix, grid), size=size) for layer in layers]
        for i, image in enumerate(images)
    ]
    return captions, tiles


def sheet(
    rows: Sequence[Sequence[Image.Image]], captions: Sequence[str], *, title: str = "", note: str = ""
) -> Image.Image:
    """Tiles in a grid, a caption above each column, a title above them all, a note beside it.

    rows: one list of tiles per image, all of the same length as captions. Raises ValueError if they are not.
    """
    if not rows or any(len(row) != len(captions) for row in rows):
        raise ValueError(f"a sheet needs rows of {len(captions)} tiles, got {[len(row) for row in rows]}")
    width, height = rows[0][0].size
    gap, edge = 14, 20
    head = (34 if title else 0) + (18 if note else 0)
    top = edge + head + 22
    page = Image.new(
        "RGB",
        (2 * edge + len(captions) * (width + gap) - gap, top + len(rows) * (height + gap) - gap + edge),
        PAPER,
    )
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((edge, edge - 4), title, INK, _font(20))
    if note:
        draw.text((edge, edge + 24), note, QUIET, _font(12))
    for column, caption in enumerate(captions):
        left = edge + column * (width + gap)
        draw.text((left, top - 20), caption, INK if column else QUIET, _font(14))
        for line, tiles in enumerate(rows):
            down = top + line * (height + gap)
            draw.rectangle((left - 1, down - 1, left + width, down + height), outline=FAINT)
            page.paste(tiles[column], (left, down))
    return page


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _stretched(image: Image.Image, grid: tuple[int, int], cell: int) -> np.ndarray:
    """(height * cell, width * cell, 3) float."""
    height, width = grid
    coarse = min(image.size) < min(height, width) * cell / 2  # tiny pictures stay crisp
    kind = Image.Resampling.NEAREST if coarse else Image.Resampling.BICUBIC
    return np.asarray(image.convert("RGB").resize((width * cell, height * cell), kind), dtype=np.float64)


def _painted(pixels: np.ndarray, rows: np.ndarray, cell: int) -> np.ndarray:
    height, width = rows.shape
    flat = rows.reshape(-1)
    patch = pixels.reshape(height, cell, width, cell, 3).mean((1, 3)).reshape(-1, 3)
    inverse = np.unique(flat, return_inverse=True)[1]
    members = np.bincount(inverse)
    colour = np.stack([np.bincount(inverse, patch[:, c]) for c in range(3)], 1) / members[:, None]
    flatten = ((members[inverse] > 1) & (flat >= 0)).reshape(height, width)
    average = colour[inverse].reshape(height, width, 3)
    big = (slice(None), None, slice(None), None)
    out = np.where(_grown(flatten, cell)[..., None], np.broadcast_to(
        average[big], (height, cell, width, cell, 3)).reshape(pixels.shape), pixels)  # fmt: skip
    grey = out.mean(-1, keepdims=True)
    gone = np.array(rgb(GONE)) * DIMMED + grey * (1 - DIMMED)
    return np.where(_grown(rows < 0, cell)[..., None], gone, out)


def _outline(paint: np.ndarray, rows: np.ndarray, cell: int) -> None:
    """Draw, in place, a line wherever a shared row meets another."""
    values, inverse, members = np.unique(rows, return_inverse=True, return_counts=True)
    shared = ((members[inverse] > 1) & (values[inverse] >= 0)).reshape(rows.shape)
    down = (rows[1:] != rows[:-1]) & (shared[1:] | shared[:-1])
    right = (rows[:, 1:] != rows[:, :-1]) & (shared[:, 1:] | shared[:, :-1])
    for y, x in zip(*np.nonzero(down), strict=True):
        paint[(y + 1) * cell - 1 : (y + 1) * cell + 1, x * cell : (x + 1) * cell] = rgb(ACCENT)
    for y, x in zip(*np.nonzero(right), strict=True):
        paint[y * cell : (y + 1) * cell, (x + 1) * cell - 1 : (x + 1) * cell + 1] = rgb(ACCENT)


def _grown(mask: np.ndarray, cell: int) -> np.ndarray:
    return mask.repeat(cell, 0).repeat(cell, 1)
