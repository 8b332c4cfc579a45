"""TokenPacker: attention inside regions against torch's own, and that nothing reaches beyond a region."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import fewer
from fewer.core import Signals
from fewer.core.visual.convolution import as_maps
from fewer.core.visual.regions import Regions
from projecting import influence, made, picture, ragged


def reference(packer, x, levels, grid, scale):
    """The paper's steps on square regions: windows are cut by reshaping, torch's attention reads one query in each."""
    h, w = grid
    side = h // scale, w // scale
    maps = F.interpolate(as_maps(x, grid), side, mode="bilinear", align_corners=False)
    q = packer.coarse_norm(packer.coarse(maps.flatten(2).transpose(1, 2)))
    attention = nn.MultiheadAttention(q.shape[-1], packer.heads, batch_first=True)
    layers = packer.query, packer.key, packer.value
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        attention.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
    attention.out_proj = packer.join
    k, v = (
        part(levels).view(-1, side[0], scale, side[1], scale, q.shape[-1]).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        for part in packer.fine
    )
    read, _ = attention(q.reshape(-1, 1, q.shape[-1]), k, v)
    return packer.leave(read.view(q.shape))


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_against_windows_and_torchs_attention(scale):
    signals, shape = picture(grid=(6, 6), channels=16)
    method = fewer.parse("tokenpacker", tokens=(6 // scale) ** 2)
    plan, rows = made(method, signals, shape)
    packer, visual = signals.module("packer"), signals.visual
    for parameter in packer.parameters():
        nn.init.normal_(parameter, std=0.5)
    rows = method.rows(signals, plan)
    levels = torch.cat([visual.level(b) for b in method.taps(shape.depth)], -1)
    assert_close(rows, reference(packer, visual.features, levels, (6, 6), scale), rtol=1e-4, atol=1e-4)


def test_a_query_is_moved_by_its_own_region_only():
    signals, shape = picture(lines=1, grid=(6, 6))
    tower = signals.visual.tower
    tower.features.requires_grad_(True)
    tower.levels[4].requires_grad_(True)
    method = fewer.parse("tokenpacker", tokens=7)  # regions of different sizes
    plan, rows = made(method, signals, shape)
    of = Regions.cut(signals.visual.view, 7).of[0]
    for row in range(plan.m):
        for source in (tower.features, tower.levels[4]):
            moved = influence(rows[0, row], source)
            assert moved[of == row].gt(0).any()
            assert moved[of != row].eq(0).all()


def test_the_order_inside_a_region_does_not_matter():
    signals, shape = picture(lines=1, grid=(4, 4))
    method = fewer.parse("tokenpacker", tokens=4)
    plan, rows = made(method, signals, shape)
    order = torch.arange(16)
    order[[0, 1, 4, 5]] = torch.tensor([5, 0, 1, 4])
    tower = signals.visual.tower
    for block in tower.levels:
        tower.levels[block] = tower.levels[block][order]
    assert_close(method.rows(signals, plan), rows)


def test_as_many_queries_as_patches_is_an_mlp_per_patch():
    signals, shape = picture(lines=1, grid=(3, 3))
    tower = signals.visual.tower
    tower.levels[2].requires_grad_(True)
    _, rows = made(fewer.parse("tokenpacker", tokens=9), signals, shape)
    for row in range(9):
        assert influence(rows[0, row], tower.levels[2]).nonzero().flatten().tolist() == [row]


def test_padding_and_neighbours_change_nothing():
    signals, shape = picture(lines=2, grid=(4, 4))
    method = fewer.parse("tokenpacker", keep=0.25)
    made(method, signals, shape)
    lines = ragged(signals, [16, 8])
    plan, rows = made(method, lines, shape)
    assert plan.lengths.tolist() == [4, 2]
    view = lines.visual.view
    short = type(view)(
        view.sample[1:], *(getattr(view, k)[1:, :8] for k in ("index", "item", "tile", "time", "row", "column")),
        source=view.source[1:, :8],
    )  # fmt: skip
    visual = type(signals.visual)(short, signals.visual.hidden, signals.visual.text, tower=signals.visual.tower)
    tokens = type(signals.tokens).plain(1, 8)
    alone = Signals(signals.hidden[1:, :8], tokens, signals.at, beside=visual, modules=signals.modules)
    assert_close(made(method, alone, shape)[1][0], rows[1, :2])
    assert_close(rows[0], method.rows(signals, method.plan(signals, signals.tokens))[0])


def test_levels_and_tiles():
    method = fewer.parse("tokenpacker:tokens=8")
    assert method.taps(24) == (11, 15, 21, 22)
    assert method.taps(6) == (2, 3, 4)
    assert fewer.parse("tokenpacker:levels=1+3").taps(24) == (1, 3)
    signals, shape = picture(lines=1, grid=(4, 4), tiles=2)
    plan, rows = made(method, signals, shape)
    assert rows.shape == (1, 8, 8)
    assert plan.anchor.tolist() == [[0, 2, 8, 10, 16, 18, 24, 26]]


def test_all_parts_learn_and_the_cost_is_told():
    signals, shape = picture(grid=(4, 4))
    spent = []
    signals.at = type(signals.at)(start=16, spend=spent.append)
    method = fewer.parse("tokenpacker:tokens=4,residual=true")
    _, rows = made(method, signals, shape)
    rows.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in signals.modules.named_parameters() if n != "packer.key.bias")
    packer = signals.module("packer")
    per_cell = sum(
        p.numel() for n, p in packer.named_parameters() if n.startswith(("fine", "key", "value")) and p.dim() > 1
    )
    per_row = sum(p.numel() for n, p in packer.named_parameters() if p.dim() > 1) - per_cell
    assert spent == [2 * 16 * per_cell + 2 * 4 * per_row + 4 * 16 * 12]
    with pytest.raises(ValueError, match="heads=0"):
        fewer.parse("tokenpacker:heads=0")
