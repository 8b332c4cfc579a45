"""Pool: neighbours are averaged, whatever the count."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import fewer
from fewer.core import Capacity
from fewer.methods.vision.pool import hilbert
from vit import images, run, signals, tiny_vit


def planned(count, height, width, prefix=1, **streams):
    n = height * width + prefix
    seen = signals(torch.zeros(1, n, 1), prefix=prefix, grid=(height, width), **streams)
    return fewer.Pool(Capacity(count)).plan(seen, seen.tokens)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (14, 14), (4, 6)])
def test_a_quarter_is_two_by_two_pooling(height, width):
    x = torch.randn(1, height * width + 1, 3)
    plan = planned(height * width // 4, height, width)
    y = plan.reduce(x)
    want = F.avg_pool2d(x[:, 1:].transpose(1, 2).unflatten(2, (height, width)), 2).flatten(2).transpose(1, 2)
    corner = plan.anchor[0, 1:] - 1  # the first member of each row
    cell = corner // width // 2 * (width // 2) + corner % width // 2
    assert torch.equal(cell.sort().values, torch.arange(height * width // 4))
    assert_close(y[:, 1:], want[:, cell])
    assert torch.equal(y[:, 0], x[:, 0])


def test_a_half_pools_pairs_of_neighbours():
    row = planned(98, 14, 14).row[0, 1:]
    for cell in range(1, 99):
        (a, b) = (row == cell).nonzero()[:, 0].tolist()
        assert abs(a // 14 - b // 14) + abs(a % 14 - b % 14) == 1


@pytest.mark.parametrize("count", [137, 96, 67, 5, 1])
def test_any_count_is_met_with_even_cells(count):
    plan = planned(count, 14, 14)
    sizes = plan.sizes(None)[0, 1:]
    assert plan.m == count + 1
    assert sizes.sum() == 196
    assert sizes.max() - sizes.min() <= 1


def test_sizes_weigh_the_averages():
    size = torch.tensor([[1.0, 1, 3, 1, 1]])
    plan = planned(1, 2, 2, size=size)
    y = plan.reduce(torch.tensor([[[9.0], [1], [2], [3], [4]]]))
    assert_close(y[0, 1, 0], torch.tensor((1 + 6 + 3 + 4) / 6))


def test_the_curve_visits_every_cell_and_never_jumps():
    row, column = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    along = hilbert(row.flatten(), column.flatten(), bits=4)
    assert torch.equal(along.sort().values, torch.arange(256))
    order = along.argsort()
    step = row.flatten()[order].diff().abs() + column.flatten()[order].diff().abs()
    assert torch.equal(step, torch.ones(255, dtype=torch.long))


def test_without_a_grid_the_patches_are_one_row():
    seen = signals(torch.zeros(1, 601, 1))
    plan = fewer.Pool(Capacity(200)).plan(seen, seen.tokens)
    assert torch.equal(plan.row[0, 1:], 1 + torch.arange(600) // 3)


def test_two_stages_in_a_model():
    model, x = tiny_vit("vit"), images()
    with fewer.apply(model, "pool:keep=0.25+0.0625,layers=1+2") as session:
        run(model, x)
        assert session.counts == [17, 5, 2, 2]
        assert_close(session.last.tokens.size, torch.tensor([[1.0, 16.0]] * 2))
