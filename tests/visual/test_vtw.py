"""VTW: nobody stays."""

import pytest
import torch

from fewer.core import Tokens
from fewer.core.visual.layout import Item, Layout, Standing, lifted, view
from fewer.methods.multimodal.vtw import VTW
from fewer.spec import SpecError, parse
from insides import inside


@pytest.mark.parametrize("lengths", [(6, 6), (6, 2)])
def test_no_visual_row_stays(lengths):
    signals, tokens = inside(lengths)
    plan = VTW().plan(signals, tokens)
    assert (plan.n, plan.m) == (6, 0)
    assert plan.reduce(signals.hidden).shape == (2, 0, 8)
    assert tokens.after(plan).n == 0


def test_text_stays_in_order():
    layout = Layout.of((2, 9), [Item.raster(1, 2, 2)] * 2, [torch.arange(2, 6), 9 + torch.arange(3, 7)], None,
                       torch.device("cpu"))  # fmt: skip
    tokens, standing = Tokens.plain(2, 9), Standing.of(layout)
    shown = view(layout, standing, tokens, "prompt")
    from_here = VTW().plan(type("S", (), {"device": torch.device("cpu")})(), Tokens.plain(2, 4))
    plan, after = lifted(from_here, shown, tokens, "prompt", standing, layout)
    assert plan.anchor.tolist() == [[0, 1, 6, 7, 8], [0, 1, 2, 7, 8]]
    assert plan.lengths is None
    assert after.totals == (0, 0)
    assert view(layout, after, tokens.after(plan), "prompt").n == 0


@pytest.mark.parametrize(("depth", "layer"), [(1, 0), (2, 0), (6, 2), (30, 14), (32, 15)])
def test_default_layer_is_half_of_the_depth(depth, layer):
    assert VTW().acts_at(depth) == (layer,)


def test_the_layer_is_a_count_of_blocks():
    assert parse("vtw:k=16").acts_at(32) == (15,)
    with pytest.raises(ValueError, match="k=0"):
        parse("vtw:k=0")
    with pytest.raises(SpecError, match="no parameter"):
        parse("vtw:tokens=4")
