"""Mini-Gemini: patches mine their own block and nothing else; at the start they are as they were."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import fewer
from fewer.core.errors import SignalError
from fewer.core.visual.convolution import PixelEncoder
from fewer.methods.multimodal.mini_gemini import Mining
from projecting import influence, made, picture, ragged


def test_at_the_start_and_without_values_rows_are_as_they_were():
    signals, shape = picture(grid=(3, 4), tiles=2)
    plan, rows = made(fewer.parse("mini_gemini"), signals, shape)
    visual = signals.visual
    assert plan.m == plan.n == 24
    assert torch.equal(rows, visual.project(visual.features))


def test_mining_is_attention_over_the_block():
    mining = Mining(12, 6)
    for parameter in mining.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, block = torch.randn(5, 12), torch.randn(5, 9, 6)
    q, k, v = mining.query(x)[:, None], mining.key(block), mining.value(block)
    assert_close(mining(x, block), x + F.scaled_dot_product_attention(q, k, v)[:, 0])


def test_a_block_moves_its_own_patch_only():
    mining = Mining(12, 6)
    nn.init.normal_(mining.value[1].weight)
    x, block = torch.randn(5, 12), torch.randn(5, 9, 6)
    other = block.clone()
    other[2] = torch.randn(9, 6)
    changed = (mining(x, other) - mining(x, block)).abs().sum(-1) > 1e-6
    assert changed.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("patch", [8, 6])
def test_blocks_stand_on_the_patch_grid(patch):
    """Of the pixels: exactly, where the picture needs no resizing; else up to the filter's reach."""
    signals, _ = picture(lines=1, grid=(3, 4), tiles=2, patch=patch)
    tower = signals.visual.tower
    tower.pixels.requires_grad_(True)
    encoder = PixelEncoder(8, (3, 4), fine=2, pixels=4, depth=0)
    blocks = encoder(tower)
    assert blocks.shape == (24, 4, 8)
    (grad,) = torch.autograd.grad(blocks[12 + 5].square().sum(), tower.pixels)  # second tile, row 1, column 1
    moved = grad.abs().sum(1) > 0
    assert not moved[0].any()
    reach = 0 if patch == 8 else 1
    rows, columns = (moved[1].any(1 - axis).nonzero().flatten() for axis in (0, 1))
    assert (rows.min(), rows.max()) == (patch - reach, 2 * patch - 1 + reach)
    assert (columns.min(), columns.max()) == (patch - reach, 2 * patch - 1 + reach)
    (grad,) = torch.autograd.grad(encoder(tower)[12 + 5, 1].square().sum(), tower.pixels)
    right = grad[1].abs().sum(0).sum(0)  # the block's second feature, in its first row, is the patch's right half
    assert right[patch : patch + patch // 2 - 1].eq(0).all()


def test_lines_of_different_length_and_everything_learns():
    signals, shape = picture(grid=(4, 4))
    signals.visual.tower.features.requires_grad_(True)
    method = fewer.parse("mini_gemini:fine=2,width=8,depth=1")
    made(method, signals, shape)
    nn.init.normal_(signals.module("mining").value[1].weight)
    rows = method.rows(signals, method.plan(signals, signals.tokens))
    lines = ragged(signals, [16, 6])
    plan, some = made(method, lines, shape)
    assert plan.lengths.tolist() == [16, 6]
    rows.square().sum().backward()
    learns = {n for n, p in signals.modules.named_parameters() if p.grad.abs().sum() > 1e-7}
    assert {n for n, _ in signals.modules.named_parameters()} - learns <= {"mining.key.1.bias"}
    assert_close(some[1, :6], rows[1, :6])
    moved = influence(some[1, 0], signals.visual.tower.features)
    assert moved.nonzero().flatten().tolist() == [16]


def test_what_it_cannot_do_it_says():
    with pytest.raises(ValueError, match="mini_gemini has no parameter 'tokens'"):
        fewer.parse("mini_gemini:tokens=4")
    signals, shape = picture(grid=(4, 4))
    method = fewer.parse("mini_gemini")
    made(method, signals, shape)
    wrong, _ = picture(grid=(5, 4))
    wrong.modules = signals.modules
    with pytest.raises(SignalError, match="gave 40 rows for 2 tiles; these modules were made for a grid of 4 x 4"):
        made(method, wrong, shape)
    signals.visual.tower.pixels = None
    with pytest.raises(SignalError, match=r"pixels .* are not known here"):
        made(method, signals, shape)
