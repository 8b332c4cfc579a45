"""Regions of a picture: they cover it, are as square as can be, and lines do not disturb each other."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from fewer.core import Capacity, KeepRatio, PlanError, Shape, Threshold, Tokens, View
from fewer.core.place import Place
from fewer.core.visual.convolution import as_maps
from fewer.core.visual.regions import Regions, evenly, granted, queries, rectangle
from projecting import picture, ragged


def view(grid, tiles=1):
    return picture(lines=1, grid=grid, tiles=tiles)[0].visual.view


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (2, 9), (7, 1)])
def test_every_count_gives_that_many_rectangles_that_cover_the_grid(grid):
    h, w = grid
    for m in range(1, h * w + 1):
        regions = Regions.cut(view(grid), m)
        board = regions.of.view(grid)
        assert board.unique().tolist() == list(range(m))
        for region in range(m):
            rows, columns = (board == region).nonzero().unbind(1)
            size = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert size == len(rows)
        anchor = regions.anchor[0]
        assert torch.equal(regions.of[0, anchor], torch.arange(m))
        assert (anchor.diff() > 0).all()


def test_the_anchor_is_the_cell_nearest_the_middle():
    regions = Regions.cut(view((6, 6)), 4)
    assert regions.anchor.tolist() == [[7, 10, 25, 28]]  # the middles of four 3 x 3 regions
    assert Regions.cut(view((4, 4)), 4).anchor.tolist() == [[0, 2, 8, 10]]  # of four equals the first


def test_squares_of_a_square_grid_are_the_usual_blocks():
    board = Regions.cut(view((6, 6)), 9).of.view(6, 6)
    assert torch.equal(board, torch.arange(9).view(3, 3).repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_tiles_share_the_regions_by_their_cells_and_small_ones_join():
    regions = Regions.cut(view((2, 2), tiles=3), 7)
    of = regions.of.view(3, 4)
    assert [len(t.unique()) for t in of] == [2, 2, 3]
    assert of.flatten().unique().tolist() == list(range(7))
    joined = Regions.cut(view((2, 2), tiles=4), 2)
    assert joined.of.view(4, 4).tolist() == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]
    assert len(Regions.cut(view((2, 2), tiles=4), 1).of.unique()) == 1


def test_a_tile_with_cells_missing_is_cut_into_runs():
    full = view((4, 4))
    some = torch.tensor([[0, 1, 2, 5, 6, 9, 10, 15]])
    part = View(
        full.sample, *(getattr(full, k)[:, some[0]] for k in ("index", "item", "tile", "time", "row", "column"))
    )
    regions = Regions.cut(part, 4)
    assert regions.of.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]


def test_bilinear_weights_resize_as_interpolation_does():
    signals, _ = picture(grid=(6, 6))
    x = signals.visual.features
    for side in (1, 2, 3, 6):
        regions = Regions.cut(signals.visual.view, side * side)
        ours = regions.sum(x * regions.bilinear()[..., None])
        want = F.interpolate(as_maps(x, (6, 6)), (side, side), mode="bilinear", align_corners=False)
        assert_close(ours, want.flatten(2).transpose(1, 2))


def test_softmax_over_the_cells_of_a_region():
    regions = Regions.cut(view((4, 4)), 4)
    logits = torch.randn(1, 16, 3)
    p = regions.softmax(logits)
    assert_close(regions.sum(p), torch.ones(1, 4, 3))
    first = (regions.of[0] == 0).nonzero()[:, 0]
    assert_close(p[0, first], logits[0, first].softmax(0))


def test_a_line_does_not_notice_its_padding_or_its_neighbour():
    signals, _ = picture(lines=2, grid=(4, 5))
    lines = ragged(signals, [20, 10])
    m, lengths = granted(KeepRatio(0.3), lines.tokens, lines.at)
    assert (m, lengths.tolist()) == (6, [6, 3])
    regions = Regions.cut(lines.visual.view, m, lengths)
    alone = Regions.cut(view((2, 5)), 3)
    assert torch.equal(regions.of[1, :10], alone.of[0])
    assert regions.of[1, 10:].eq(6).all()
    assert torch.equal(regions.anchor[1, :3], alone.anchor[0])
    assert torch.equal(regions.of[0], Regions.cut(view((4, 5)), 6).of[0])
    plan, kept = regions.averaged(), regions.kept()
    x = signals.hidden
    assert_close(plan.reduce(x), plan.dense() @ x)
    assert_close(plan.dense().sum(-1), plan.valid.float())
    assert torch.equal(plan.position[kept.valid], kept.position[kept.valid])


def test_anchors_spread_evenly():
    assert evenly(Tokens.plain(1, 12), 3).anchor.tolist() == [[2, 6, 10]]
    assert evenly(Tokens.plain(1, 5), 5).anchor.tolist() == [[0, 1, 2, 3, 4]]
    signals, _ = picture(lines=2, grid=(3, 4))
    lines = ragged(signals, [12, 6])
    plan = evenly(lines.tokens, 3, torch.tensor([3, 2]))
    assert plan.anchor[0].tolist() == [2, 6, 10]
    assert plan.anchor[1, :2].tolist() == [1, 4]


def test_rectangles_and_counts():
    assert rectangle(144, (24, 24)) == (12, 12)
    assert rectangle(144, (20, 30)) == (9, 16)
    assert rectangle(6, (1, 6)) == (1, 6)
    with pytest.raises(PlanError, match="29 rows form no rectangle inside a grid of 6 x 6"):
        rectangle(29, (6, 6))
    shape = Shape(8, 2, 12, 6, (4, 4))
    assert queries(Capacity(160), shape) == 160
    assert queries(KeepRatio(0.25), shape) == 4
    with pytest.raises(PlanError, match="names no count"):
        queries(Threshold(0.1), shape)
    with pytest.raises(PlanError, match="names no count"):
        granted(Threshold(0.1), Tokens.plain(1, 4), Place(start=4))
