"""C-Abstractor: its blocks against timm's RegNet, any square, and that convolutions look nearby."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fewer
from fewer.core import PlanError
from fewer.core.errors import SignalError
from fewer.methods.multimodal.honeybee_c import Bottleneck
from projecting import influence, made, picture, ragged
from tvstub import timm

NAMES = {
    "first": "conv1.conv", "first_norm": "conv1.bn", "look": "conv2.conv", "look_norm": "conv2.bn",
    "squeeze": "se.fc1", "excite": "se.fc2", "last": "conv3.conv", "last_norm": "conv3.bn",
    "beside.0": "downsample.conv", "beside.1": "downsample.bn",
}  # fmt: skip


@pytest.mark.parametrize("channels", [16, 24])
def test_a_block_is_timms(channels):
    theirs = timm.models.regnet.RegStage(
        1, channels, 16, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=timm.layers.LayerNorm2d, group_size=8
    ).b1
    ours = Bottleneck(channels, 16)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = theirs.state_dict()
    ours.load_state_dict(
        {f"{mine}.{kind}": state.pop(f"{name}.{kind}") for mine, name in NAMES.items() for kind in ("weight", "bias")
         if f"{name}.{kind}" in state}
    )  # fmt: skip
    assert not state
    x = torch.randn(2, channels, 5, 7).double()
    assert_close(ours.double()(x), theirs.double()(x))


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_any_square_from_one_set_of_weights(side):
    signals, shape = picture(grid=(5, 5))
    first = fewer.parse("honeybee_c")
    made(first, signals, shape)
    plan, rows = made(fewer.parse("honeybee_c", tokens=side**2), signals, shape)
    assert rows.shape == (2, side**2, shape.width)
    assert (plan.anchor.diff() > 0).all()
    assert rows.isfinite().all()


def test_off_the_square():
    signals, shape = picture(grid=(4, 6))
    plan, rows = made(fewer.parse("honeybee_c:tokens=6"), signals, shape)
    assert rows.shape[1] == 6
    assert plan.anchor[0].tolist() == [0, 2, 4, 12, 14, 16]  # 2 x 3
    with pytest.raises(PlanError, match="13 rows form no rectangle inside a grid of 4 x 6; ask for another count"):
        made(fewer.parse("honeybee_c:tokens=13"), signals, shape)


def test_convolutions_look_nearby_and_squeeze_excite_at_the_whole():
    signals, shape = picture(lines=1, grid=(15, 15))
    features = signals.visual.tower.features.requires_grad_(True)
    method = fewer.parse("honeybee_c:tokens=25,depth=1")
    plan, rows = made(method, signals, shape)
    moved = influence(rows[0, 0], features).view(15, 15)
    near = moved[:7, :7].mean()  # the pooled neighbours' cells, and one more
    assert near > 10 * moved[8:, 8:].mean() > 0
    for name, parameter in signals.modules.named_parameters():
        if "excite" in name:
            nn.init.zeros_(parameter)
    moved = influence(method.rows(signals, plan)[0, 0], features).view(15, 15)
    board = moved > 0
    assert board[:7, :7].all()
    assert board.sum() == 49


def test_tiles_are_made_one_by_one():
    signals, shape = picture(lines=2, grid=(4, 4), tiles=2)
    method = fewer.parse("honeybee_c:tokens=8")
    plan, rows = made(method, signals, shape)
    assert plan.anchor[0].tolist() == [0, 2, 8, 10, 16, 18, 24, 26]
    view, tower = signals.visual.view, signals.visual.tower
    swapped = torch.cat([view.source[:, 16:], view.source[:, :16]], 1)
    tower.features = tower.features[swapped.flatten()]
    assert_close(method.rows(signals, plan), torch.cat([rows[:, 4:], rows[:, :4]], 1))
    with pytest.raises(PlanError, match="9 rows cannot be shared equally by 2 tiles; ask for a multiple of 2"):
        made(fewer.parse("honeybee_c:tokens=9"), signals, shape)


def test_what_it_cannot_do_it_says():
    signals, shape = picture(grid=(4, 4))
    made(fewer.parse("honeybee_c:tokens=4"), signals, shape)
    with pytest.raises(SignalError, match=r"no full frames|no known grid"):
        made(fewer.parse("honeybee_c:tokens=4"), ragged(signals, [16, 8]), shape)
    with pytest.raises(ValueError, match="depth=0"):
        fewer.parse("honeybee_c:depth=0")


def test_all_parts_learn_and_other_grids_resize_the_positions():
    signals, shape = picture(grid=(4, 4))
    _, rows = made(fewer.parse("honeybee_c:tokens=4,width=16"), signals, shape)
    rows.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in signals.modules.parameters())
    larger, _ = picture(grid=(6, 6))
    larger.modules = signals.modules
    assert made(fewer.parse("honeybee_c:tokens=4"), larger, shape)[1].shape == (2, 4, 8)
