"""GlobalCom2: shares and scores, by hand and against its formulas."""

import pytest
import torch

from fewer.core import Capacity, KeepRatio
from fewer.methods.multimodal.globalcom import GlobalCom
from towers import call, cut_view, kept, part, shown, whole_view


def per_tile(rows, view, line=0):
    tiles = view.tile[line].tolist()
    return [sum(tiles[i] == t for i in rows) for t in range(max(tiles) + 1)]


def test_warm_shares_are_nearly_equal():
    view = cut_view(4, (2, 2))
    signals, tokens = shown({2: call(torch.rand(1, 80) + 0.01)}, view)
    assert per_tile(kept(GlobalCom(KeepRatio(0.25)).plan(signals, tokens))[0], view) == [4, 4, 4, 4, 4]


def test_cold_shares_follow_the_whole_view():
    view, paid = cut_view(4, (2, 2)), torch.full((1, 80), 0.01)
    paid[0, :16].view(4, 4)[:2, 2:] = 1.0  # the second crop
    signals, tokens = shown({2: call(paid)}, view)
    rows = kept(GlobalCom(KeepRatio(0.5), temperature=1e-3).plan(signals, tokens))[0]
    # 1 + p - 1/4 is 1.75 for it and 0.75 for the others: 8 of 16 times that
    assert per_tile(rows, view) == [8, 6, 14, 6, 6]


def test_scores_add_both_views():
    """A crop's own attention and the whole view's, both of length one: the place where both are high wins."""
    view, paid = cut_view(2, (1, 1)), torch.tensor([[9.0, 1, 1, 1, 3.0, 2.0, 1.0, 1.0]])
    signals, tokens = shown({2: call(paid)}, view)
    mine = paid[0, 4:] / paid[0, 4:].norm()
    seen = paid[0, :4] / paid[0, :4].norm()
    best = (mine + seen).topk(2).indices + 4
    rows = kept(GlobalCom(Capacity(4)).plan(signals, tokens))[0]
    assert best.tolist() == [4, 5]
    assert rows == [0, 1, 4, 5]


def test_the_whole_view_is_read_where_a_crop_looks():
    """The right crop's tokens look alike to their own class token: the whole view's right half decides."""
    view, paid = cut_view(4, (1, 2)), torch.ones(1, 48)
    plane = paid[0, :16].view(4, 4)
    plane[3, 2:] = 5.0  # low in the right half: the lowest line of the right crop
    signals, tokens = shown({2: call(paid)}, view)
    rows = kept(GlobalCom(Capacity(12)).plan(signals, tokens))[0]
    right = [i - 32 for i in rows if i >= 32]
    assert right == [12, 13, 14, 15]


@pytest.mark.parametrize("budget", [Capacity(1), Capacity(37), Capacity(79), KeepRatio(0.1), KeepRatio(0.95)])
@pytest.mark.parametrize("temperature", [0.01, 10.0])
@pytest.mark.parametrize("drop", [(), (0, 5, 6, 7)])
def test_the_budget_is_spent_to_the_last_token(budget, temperature, drop):
    view = cut_view(4, (2, 2), drop=drop)
    signals, tokens = shown({2: call(torch.rand(1, view.n) + 0.01)}, view)
    rows = kept(GlobalCom(budget, temperature).plan(signals, tokens))[0]
    assert len(set(rows)) == budget.keep(view.n, signals.at)


def test_an_image_without_crops_goes_by_attention():
    paid = torch.rand(2, 16) + 0.01
    signals, tokens = shown({2: call(paid)}, whole_view(2, 4, 4))
    assert kept(GlobalCom(Capacity(5)).plan(signals, tokens)) == paid.topk(5).indices.sort().values.tolist()


@pytest.mark.parametrize("budget", [KeepRatio(0.3), Capacity(10)])
def test_padding_changes_nothing(budget):
    lengths = [80, 48, 16, 3]
    signals, tokens = shown({2: call(torch.rand(4, 80) + 0.01)}, cut_view(4, (2, 2), r=4), lengths=lengths)
    method = GlobalCom(budget, 0.05)
    together = kept(method.plan(signals, tokens))
    for line, length in enumerate(lengths):
        assert kept(method.plan(*part(signals, line, length))) == [together[line]]


def test_bad_input():
    with pytest.raises(ValueError, match="temperature=0"):
        GlobalCom(temperature=0)
