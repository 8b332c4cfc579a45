"""D-Abstractor: where its queries look, against sampling by hand."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fewer
from fewer.core import PlanError
from fewer.methods.multimodal.honeybee_d import DeformableAttention, middles
from projecting import influence, made, picture


def sampled(board, row, column):
    """Bilinear value of a (h, w, C) board at fractional cell coordinates, nothing beyond the border."""
    total = torch.zeros(board.shape[-1])
    for r in (math.floor(row), math.floor(row) + 1):
        for c in (math.floor(column), math.floor(column) + 1):
            if 0 <= r < board.shape[0] and 0 <= c < board.shape[1]:
                total = total + (1 - abs(row - r)) * (1 - abs(column - c)) * board[r, c]
    return total


def test_against_sampling_by_hand():
    attention = DeformableAttention(width=8, heads=2, points=3)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    query, place, x = torch.randn(1, 4, 8), torch.rand(4, 2), torch.randn(1, 8, 5, 6)
    with torch.no_grad():
        ours = attention(query, place, x)
        value = attention.value(x[0].permute(1, 2, 0)).view(5, 6, 2, 4)
        offset = attention.offset(query)[0].view(4, 2, 3, 2)
        weight = attention.weight(query)[0].view(4, 2, 3).softmax(-1)
        rows = []
        for m in range(4):
            column, row = (place[m] * torch.tensor([6.0, 5.0]) - 0.5).tolist()
            heads = []
            for h in range(2):
                places = [(row + y, column + x) for x, y in offset[m, h].tolist()]
                read = [sampled(value[:, :, h], *at) for at in places]
                heads.append(sum(w * r for w, r in zip(weight[m, h], read, strict=True)))
            rows.append(torch.cat(heads))
        assert_close(ours[0], attention.join(torch.stack(rows)), rtol=1e-4, atol=1e-5)


def test_without_offsets_it_samples_exactly_the_grid():
    attention = DeformableAttention(width=8, heads=2, points=4)
    nn.init.zeros_(attention.offset.bias)
    x = torch.randn(2, 8, 4, 5)
    out = attention(torch.randn(2, 20, 8), middles(20, (4, 5)), x)
    assert_close(out, attention.join(attention.value(x.flatten(2).transpose(1, 2))))


def test_places_start_as_the_middles_of_regions_and_offsets_around_them():
    assert_close(middles(4, (6, 6)), torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]))
    offset = DeformableAttention(width=8, heads=4, points=2).offset.bias.view(4, 2, 2)
    want = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    assert_close(offset, torch.stack([want, 2 * want], 1), atol=1e-6, rtol=0)


def test_queries_look_nearby_at_first_and_places_learn():
    signals, shape = picture(lines=1, grid=(12, 12))
    features = signals.visual.tower.features.requires_grad_(True)
    method = fewer.parse("honeybee_d:tokens=9,depth=2,points=2,width=16")
    plan, rows = made(method, signals, shape)
    assert rows.shape == (1, 9, 8)
    assert plan.anchor[0, [0, 4, 8]].tolist() == [13, 65, 117]
    moved = influence(rows[0, 0], features).view(12, 12)
    assert moved[:4, :4].gt(0).all()  # its own region's mean
    assert moved[6:].eq(0).all()
    assert moved[:, 6:].eq(0).all()
    rows.square().sum().backward()
    still = [n for n, p in signals.modules.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_counts_and_tiles_it_was_not_made_for():
    signals, shape = picture(grid=(4, 4))
    made(fewer.parse("honeybee_d:tokens=4,depth=1"), signals, shape)
    with pytest.raises(PlanError, match="made for 4 rows of one tile; here 5 are wanted"):
        made(fewer.parse("honeybee_d:tokens=5,depth=1"), signals, shape)
    tiles, shape = picture(grid=(4, 4), tiles=2)
    with pytest.raises(PlanError, match=r"of 2 tiles of 4 x 4\. Use honeybee_c"):
        made(fewer.parse("honeybee_d:tokens=4,depth=1"), tiles, shape)
    with pytest.raises(ValueError, match="points=0"):
        fewer.parse("honeybee_d:points=0")


def test_half_precision():
    signals, shape = picture(grid=(4, 4))
    method = fewer.parse("honeybee_d:tokens=4,depth=1")
    _, rows = made(method, signals, shape)
    signals.modules.bfloat16()
    signals.visual.tower.features = signals.visual.tower.features.bfloat16()
    low = method.rows(signals, method.plan(signals, signals.tokens))
    assert low.dtype == torch.bfloat16
    assert_close(low.float(), rows, rtol=0.1, atol=0.1)
