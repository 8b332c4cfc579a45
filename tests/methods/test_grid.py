"""Grid: even spread, whatever the count."""

import pytest
import torch

import fewer
from fewer.core import Capacity
from vit import images, run, signals, tiny_vit


def picture(count, height, width, prefix=1):
    n = height * width + prefix
    seen = signals(torch.zeros(1, n, 1), prefix=prefix, grid=(height, width))
    anchor = fewer.Grid(Capacity(count)).plan(seen, seen.tokens).anchor[0, prefix:] - prefix
    out = torch.zeros(height * width, dtype=torch.int)
    out[anchor] = 1
    return out.view(height, width)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_regular_counts_are_regular_grids(prefix):
    quarter = picture(16, 8, 8, prefix)
    assert quarter[::2, ::2].sum() == 16
    sixteenth = picture(4, 8, 8, prefix)
    assert sixteenth[::4, ::4].sum() == 4
    half = picture(32, 8, 8, prefix)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    assert torch.equal(half == 1, (rows + columns) % 2 == 0)


@pytest.mark.parametrize("count", [137, 96, 67, 49, 30])
def test_any_count_is_spread_evenly(count):
    """Each quarter of a 14 x 14 grid gets its share, and a smaller set is part of a larger one."""
    whole = picture(count, 14, 14)
    assert whole.sum() == count
    for part in (whole[:7, :7], whole[:7, 7:], whole[7:, :7], whole[7:, 7:]):
        assert abs(part.sum().item() - count / 4) <= 0.1 * count
    assert (whole >= picture(count - 9, 14, 14)).all()


def test_patches_in_one_row():
    seen = signals(torch.zeros(1, 9, 1), prefix=1)
    assert fewer.Grid(Capacity(4)).plan(seen, seen.tokens).anchor.tolist() == [[0, 1, 3, 5, 7]]
    seen = signals(torch.zeros(1, 1025, 1), prefix=1)  # longer than any grid is wide
    anchor = fewer.Grid(Capacity(256)).plan(seen, seen.tokens).anchor
    assert torch.equal(anchor[0, 1:], 1 + 4 * torch.arange(256))


def test_the_image_does_not_matter():
    model = tiny_vit("vit")
    with fewer.apply(model, "grid:keep=0.25,layers=1") as session:
        run(model, images(2))
        assert session.kept(3).tolist() == [[0, 1, 3, 9, 11]] * 2
