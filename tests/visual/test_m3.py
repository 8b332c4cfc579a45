"""M3's nested pooling: blocks of the grid, one inside the other, and what it does off the square."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import fewer
from fewer.core import Capacity, KeepRatio
from fewer.core.visual.convolution import as_maps
from projecting import made, picture, ragged


def pooled(signals, tokens):
    return made(fewer.parse("m3", tokens=tokens), signals, None)


@pytest.mark.parametrize("tokens", [64, 16, 4, 1])
def test_it_is_average_pooling_of_the_projected_grid(tokens):
    signals, _ = picture(grid=(8, 8))
    plan, rows = pooled(signals, tokens)
    side = int(tokens**0.5)
    want = F.avg_pool2d(as_maps(signals.hidden, (8, 8)), 8 // side).flatten(2).transpose(1, 2)
    assert plan.m == tokens
    assert_close(rows, want)


def test_scales_are_nested():
    signals, _ = picture(grid=(8, 8))
    fine = pooled(signals, 16)[1]
    coarse = F.avg_pool2d(as_maps(fine, (4, 4)), 2).flatten(2).transpose(1, 2)
    assert_close(coarse, pooled(signals, 4)[1])
    assert_close(pooled(signals, 1)[1][:, 0], signals.hidden.mean(1))


def test_the_papers_scales_on_its_grid():
    signals, _ = picture(lines=1, grid=(24, 24))
    method = fewer.parse("m3")
    counts = [type(method)(budget).plan(signals, signals.tokens).m for budget in method.scales]
    assert counts == [576, 144, 36, 9, 1]


def test_everything_kept_is_the_identity():
    signals, _ = picture(grid=(3, 5))
    plan, rows = pooled(signals, 99)
    assert torch.equal(plan.anchor, torch.arange(15).expand(2, 15))
    assert torch.equal(rows, signals.hidden)


@pytest.mark.parametrize("grid", [(3, 5), (4, 9), (7, 7)])
def test_any_count_on_any_grid_averages_everything_once(grid):
    signals, _ = picture(grid=grid)
    for tokens in range(1, grid[0] * grid[1]):
        plan, rows = pooled(signals, tokens)
        dense = plan.dense()
        assert rows.shape[1] == tokens
        assert_close(rows, dense @ signals.hidden)
        assert_close(dense.sum(-1), torch.ones_like(dense[..., 0]))
        assert (dense > 0).sum(-2).eq(1).all()  # every token in one region
        assert_close(plan.sizes(None).sum(-1), torch.full((2,), float(grid[0] * grid[1])))


def test_each_tile_by_itself():
    signals, _ = picture(lines=1, grid=(4, 4), tiles=3)
    _, rows = pooled(signals, 12)
    want = F.avg_pool2d(as_maps(signals.hidden, (4, 4)), 2).flatten(2).transpose(1, 2).reshape(1, 12, -1)
    assert_close(rows, want)


def test_lines_of_different_length_pool_as_alone():
    signals, _ = picture(lines=2, grid=(4, 4))
    lines = ragged(signals, [16, 8], fill=1e4)
    method = type(fewer.parse("m3"))(KeepRatio(0.25))
    plan, rows = made(method, lines, None)
    assert plan.lengths.tolist() == [4, 2]
    full = F.avg_pool2d(as_maps(signals.hidden, (4, 4)), 2).flatten(2).transpose(1, 2)
    assert_close(rows[0], full[0])
    assert_close(rows[1, :2], full[1, :2])
    assert rows[1, 2:].eq(0).all()
    few = made(type(method)(Capacity(10)), lines, None)[0]
    assert few.lengths.tolist() == [10, 8]  # no more than there are


def test_half_precision_and_adaptive_budgets():
    signals, _ = picture(grid=(4, 4))
    signals.hidden = signals.hidden.bfloat16()
    assert pooled(signals, 4)[1].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="names no count"):
        made(fewer.parse("m3", threshold=0.5), signals, None)
