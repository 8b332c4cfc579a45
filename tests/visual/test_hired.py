"""HiRED: who gets how much of the budget, by hand."""

import pytest
import torch

from fewer.core import Capacity, KeepRatio
from fewer.methods.multimodal.hired import HiRED
from towers import call, cut_view, kept, part, shown, whole_view

SIDE, TILE = 4, 16


def per_tile(rows, view, line=0):
    tiles = view.tile[line].tolist()
    return [sum(tiles[i] == t for i in rows) for t in range(max(tiles) + 1)]


def quadrant(early, down, right):
    """Attention of the first block on one quadrant of the whole view only."""
    plane = early[:, :TILE].view(-1, SIDE, SIDE)
    plane[:, down * 2 : down * 2 + 2, right * 2 : right * 2 + 2] += 1
    return early


@pytest.mark.parametrize(("down", "right"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_all_attention_in_a_quadrant_pays_its_crop(down, right):
    view, late = cut_view(SIDE, (2, 2)), torch.rand(1, 80) + 0.01
    early = quadrant(torch.full((1, 80), 0.01), down, right)
    signals, tokens = shown({0: call(early), 2: call(late)}, view)
    plan = HiRED(Capacity(12), alpha=0.75).plan(signals, tokens)  # 9 for the whole view; 4 cells vote, all of one crop
    (rows,) = kept(plan)
    want = [9, 0, 0, 0, 0]
    want[1 + 2 * down + right] = 3
    assert per_tile(rows, view) == want
    assert plan.lengths is None
    for t, k in enumerate(want):
        assert set((t * TILE + late[0, t * TILE : (t + 1) * TILE].topk(k).indices).tolist()) <= set(rows)


def test_shares_follow_the_votes():
    view = cut_view(SIDE, (1, 2))
    early = torch.full((1, 48), 0.01)
    early[0, [0, 1, 4, 8, 9, 12]] = 1.0  # six of the left half
    early[0, [2, 7]] = 1.0  # two of the right
    signals, tokens = shown({0: call(early), 2: call(torch.rand(1, 48) + 0.01)}, view)
    assert per_tile(kept(HiRED(Capacity(16)).plan(signals, tokens))[0], view) == [8, 6, 2]


def test_alpha_one_keeps_the_whole_view_alone():
    view = cut_view(SIDE, (2, 2))
    signals, tokens = shown({0: call(torch.rand(1, 80) + 0.01), 2: call(torch.rand(1, 80) + 0.01)}, view)
    assert per_tile(kept(HiRED(Capacity(16), alpha=1).plan(signals, tokens))[0], view) == [16, 0, 0, 0, 0]


@pytest.mark.parametrize("budget", [Capacity(1), Capacity(33), Capacity(79), KeepRatio(0.2), KeepRatio(0.9)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_budget_is_spent_to_the_last_token(budget, alpha):
    view = cut_view(SIDE, (2, 2))
    signals, tokens = shown({0: call(torch.rand(1, 80) + 0.01), 2: call(torch.rand(1, 80) + 0.01)}, view)
    rows = kept(HiRED(budget, alpha).plan(signals, tokens))[0]
    assert len(set(rows)) == budget.keep(80, signals.at)


def test_padding_of_the_canvas_moves_the_borders():
    """Two rows of crops, the lowest three of eight lines are padding: five lines show the picture. The whole view's
    second line of four shows lines 1 and 2 of them, its fourth the last."""
    view = cut_view(SIDE, (2, 1), drop=(5, 6, 7))
    assert view.n == 16 + 20
    early = torch.full((1, 36), 0.01)
    for line, crop in ((0, 1), (1, 1), (2, 1), (3, 2)):  # centres at 1/8, 3/8, 5/8, 7/8 of 5 lines, 4 in the first crop
        voted = early.clone()
        voted[0, 4 * line : 4 * line + 4] = 1.0
        signals, tokens = shown({0: call(voted), 2: call(torch.rand(1, 36) + 0.01)}, view)
        rows = kept(HiRED(Capacity(12), alpha=0.75).plan(signals, tokens))[0]
        counts = per_tile(rows, view)
        assert counts[0] == 9
        assert counts[crop] == 3


def test_the_code_takes_strips_and_loses_tokens():
    view = cut_view(SIDE, (2, 2))
    early = torch.full((1, 80), 0.01)
    early[0, [2, 3, 6, 7, 8, 11, 12, 13]] = 1.0  # lines hold 2, 2, 2 and 2
    signals, tokens = shown({0: call(early), 2: call(torch.rand(1, 80) + 0.01)}, view)
    assert per_tile(kept(HiRED(Capacity(23), fidelity="code").plan(signals, tokens))[0], view) == [11, 3, 3, 3, 3]
    assert per_tile(kept(HiRED(Capacity(23)).plan(signals, tokens))[0], view) == [11, 0, 6, 5, 1]


def test_the_code_cuts_shares_off_in_double_precision():
    for fidelity, cut in (("paper", 29), ("code", 28)):
        assert HiRED(alpha=0.29, fidelity=fidelity)._cut(torch.tensor([100]), 0.29).tolist() == [cut]
    assert int(100 * 0.29) == 28


@pytest.mark.parametrize("fidelity", ["paper", "code"])
def test_an_image_without_crops_goes_by_attention(fidelity):
    late = torch.rand(2, 16) + 0.01
    signals, tokens = shown({0: call(torch.rand(2, 16) + 0.01), 2: call(late)}, whole_view(2, 4, 4))
    plan = HiRED(Capacity(5), fidelity=fidelity).plan(signals, tokens)
    assert kept(plan) == late.topk(5).indices.sort().values.tolist()


@pytest.mark.parametrize("fidelity", ["paper", "code"])
@pytest.mark.parametrize("budget", [KeepRatio(0.3), Capacity(10)])
def test_padding_changes_nothing(fidelity, budget):
    lengths = [80, 48, 16, 3]
    calls = {0: call(torch.rand(4, 80) + 0.01), 2: call(torch.rand(4, 80) + 0.01)}
    signals, tokens = shown(calls, cut_view(SIDE, (2, 2), r=4), lengths=lengths)
    method = HiRED(budget, fidelity=fidelity)
    together = kept(method.plan(signals, tokens))
    for line, length in enumerate(lengths):
        assert kept(method.plan(*part(signals, line, length))) == [together[line]]


def test_bad_input():
    with pytest.raises(ValueError, match="alpha=2"):
        HiRED(alpha=2)
    with pytest.raises(ValueError, match="fidelity='book'"):
        HiRED(fidelity="book")
