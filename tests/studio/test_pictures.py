"""What the pictures must show: own pixels, one colour for a shared row, a tint for what was dropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import fewer
from fewer.studio.pictures import followed, moments, original, patch_rows, regions, sheet
from fewer.studio.style import ACCENT, GONE, rgb
from fewer.testing.models import images, tiny_vit

CELL = 10


def chessboard(rows: int = 4) -> Image.Image:
    """Every patch of 10 pixels its own colour."""
    values = np.random.default_rng(0).integers(0, 200, (rows, rows, 3), np.uint8)
    return Image.fromarray(values.repeat(CELL, 0).repeat(CELL, 1))


def patch(picture: Image.Image, y: int, x: int) -> np.ndarray:
    """The inside of a patch, its border left out: (pixels, 3)."""
    return np.asarray(picture)[y * CELL + 2 : (y + 1) * CELL - 2, x * CELL + 2 : (x + 1) * CELL - 2].reshape(-1, 3)


def test_patches_on_their_own_keep_their_pixels() -> None:
    board, rows = chessboard(), np.arange(16).reshape(4, 4)
    assert np.array_equal(np.asarray(regions(board, rows, size=40)), np.asarray(original(board, (4, 4), size=40)))


def test_a_shared_row_has_one_average_colour_and_a_border() -> None:
    board, rows = chessboard(), np.arange(16).reshape(4, 4)
    rows[1, 1] = rows[1, 2] = 3
    rows[0, 3] = 3  # not a neighbour: the same colour all the same
    drawn = regions(board, rows, size=40)
    members = [(1, 1), (1, 2), (0, 3)]
    wanted = np.mean([patch(board, *m).mean(0) for m in members], 0)
    for member in members:
        assert np.abs(patch(drawn, *member) - wanted).max() <= 1
    assert (np.asarray(drawn)[CELL + 5, CELL] == rgb(ACCENT)).all()  # left of the pair
    assert not (np.asarray(drawn)[CELL + 5, 2 * CELL] == rgb(ACCENT)).all()  # between its two
    assert np.array_equal(patch(drawn, 3, 3), patch(board, 3, 3))


def test_dropped_patches_are_tinted_and_not_outlined() -> None:
    board, rows = chessboard(), np.arange(16).reshape(4, 4)
    rows[0] = -1
    drawn = regions(board, rows, size=40)
    near, far = (np.abs(patch(x, 0, 0) - np.array(rgb(GONE))).mean() for x in (drawn, board))
    assert near < 0.3 * far
    assert not (np.asarray(drawn) == rgb(ACCENT)).all(-1).any()


def test_rows_must_lie_on_a_grid() -> None:
    with pytest.raises(ValueError, match=r"over the patch grid, got shape \(16,\)"):
        regions(chessboard(), np.arange(16))


@pytest.mark.parametrize(
    ("counts", "most", "layers"),
    [
        ([17, 12, 12, 8], 4, [1, 3]), ([15, 13, 11, 9], 4, [0, 1, 2, 3]), ([15, 13, 11, 9, 7, 5], 2, [2, 5]),
        ([17, 17, 17], 4, [0]), ([5], 4, [0]),
    ],
)  # fmt: skip
def test_moments_are_where_something_happened(counts: list[float], most: int, layers: list[int]) -> None:
    assert moments(counts, most, start=17) == layers


def test_a_session_is_followed_to_its_last_row() -> None:
    model, x = tiny_vit(), images(2)
    with fewer.apply(model, "evit:layers=1+3,keep=0.5,fuse=false") as session, torch.no_grad():
        model(x)
    captions, tiles = followed(session, [chessboard()] * 2, size=40)
    assert captions == ["input", "block 2: 9 tokens", "block 4: 5 tokens"]
    for sample in range(2):
        rows = patch_rows(session.origin[sample].numpy(), 1, (4, 4))
        assert (rows >= 0).sum() == 4
        assert np.array_equal(np.asarray(tiles[sample][-1]), np.asarray(regions(chessboard(), rows, size=40)))


def test_a_sheet_holds_its_tiles_where_its_captions_are() -> None:
    red, blue = (Image.new("RGB", (40, 40), c) for c in ("red", "blue"))
    page = np.asarray(sheet([[red, blue], [blue, red]], ["a", "b"], title="t", note="n"))
    ys, xs = np.nonzero((page == (255, 0, 0)).all(-1))
    assert len(ys) == 2 * 40 * 40
    assert xs[ys == ys.min()].max() < xs[ys == ys.max()].min()
    with pytest.raises(ValueError, match=r"rows of 2 tiles, got \[2, 1\]"):
        sheet([[red, blue], [red]], ["a", "b"])
