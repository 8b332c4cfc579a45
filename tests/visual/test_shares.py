"""Budgets shared out among the parts of an image."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.core import Capacity, Hard, KeepRatio, Outliers, Place, Tokens, match, select
from fewer.core.budgets import BudgetError
from fewer.core.visual.crops import Canvas
from towers import cut_view, whole_view


def shared(total, weight, room):
    return select.apportion(torch.tensor([total]), torch.tensor([weight]), torch.tensor([room])).tolist()[0]


@pytest.mark.parametrize(("total", "weight", "room", "want"), [
    (10, [1.0, 3.0, 1.0], [9, 9, 9], [2, 6, 2]),
    (10, [1.0, 1.0, 1.0], [9, 9, 9], [4, 3, 3]),  # of equals the earlier
    (10, [4.0, 1.0, 1.0], [9, 9, 9], [7, 2, 1]),  # 6.67, 1.67 and 1.67
    (10, [1.0, 8.0, 1.0], [9, 4, 9], [3, 4, 3]),  # full: the others share what it cannot take
    (10, [0.0, 0.0, 0.0], [9, 9, 9], [4, 3, 3]),
    (10, [0.0, 1.0, 0.0], [9, 4, 9], [3, 4, 3]),
    (99, [1.0, 0.0, 1.0], [2, 3, 4], [2, 3, 4]),
    (0, [1.0, 2.0, 3.0], [5, 5, 5], [0, 0, 0]),
])  # fmt: skip
def test_apportioned_by_hand(total, weight, room, want):
    assert shared(total, weight, room) == want


def test_what_rounding_leaves_goes_to_the_fractions_or_to_the_heaviest():
    total, weight, room = torch.tensor([10]), torch.tensor([[1.1, 5.0, 3.9]]), torch.tensor([[9, 9, 9]])
    assert select.apportion(total, weight, room).tolist() == [[1, 5, 4]]
    assert select.apportion(total, weight, room, left="weight").tolist() == [[1, 6, 3]]


@given(st.data())
def test_apportioned_to_the_last(data):
    groups = data.draw(st.integers(1, 12))
    room = data.draw(st.lists(st.integers(0, 40), min_size=groups, max_size=groups))
    weight = data.draw(st.lists(st.floats(0, 1e3), min_size=groups, max_size=groups))
    total = data.draw(st.integers(0, 300))
    share = shared(total, weight, room)
    assert sum(share) == min(total, sum(room))
    assert all(0 <= s <= r for s, r in zip(share, room, strict=True))
    for i in range(groups):  # a heavier group that is not full has no less, but for the rounding
        for j in range(groups):
            if weight[i] >= weight[j] and share[i] < room[i]:
                assert share[i] >= share[j] - 1


def test_ranks_within_groups():
    scores = torch.tensor([[1.0, 5.0, 3.0, 5.0, 2.0, 9.0]])
    group = torch.tensor([[7, 7, -2, 7, -2, 40]])
    assert select.rank_within(scores, group).tolist() == [[2, 0, 0, 1, 1, 0]]


def test_allowed_and_counted():
    at, cpu = Place(start=8), torch.device("cpu")
    count, most = select.allowed(Capacity(3), Tokens.plain(2, 8), at=at, device=cpu)
    assert count.tolist() == [3, 3]
    assert most == 3
    valid = torch.arange(8) < torch.tensor([[8], [2]])
    padded = Tokens.plain(2, 8, valid=valid)
    count, most = select.allowed(Capacity(3), padded, at=at, device=cpu)
    assert count.tolist() == [3, 2]
    assert most == 3
    keep = torch.tensor([[True, False] * 4, [True] * 8])
    plan = select.counted(keep & valid, padded, 4)
    assert plan.anchor[0].tolist() == [0, 2, 4, 6]
    assert plan.lengths.tolist() == [4, 2]
    assert select.counted(keep[:1], Tokens.plain(1, 8), 4).lengths is None
    with pytest.raises(BudgetError, match="names no count"):
        select.allowed(Outliers(), padded, at=at, device=cpu)


def test_within_groups_each_has_its_budget():
    scores, group = torch.rand(1, 12), torch.tensor([[0] * 6 + [3] * 4 + [5] * 2])
    plan = select.within(scores, group, KeepRatio(0.5), Tokens.plain(1, 12), at=Place(start=12))
    rows = plan.anchor[0, : int(plan.lengths[0])].tolist()
    assert [sum(lo <= i < hi for i in rows) for lo, hi in ((0, 6), (6, 10), (10, 12))] == [3, 2, 1]


def test_joined_averages_weigh_by_size():
    x = torch.tensor([[[1.0, 0], [0, 1], [2, 0.1], [0.1, 3]]])
    tokens = Tokens.plain(1, 4, size=torch.tensor([[1.0, 1, 3, 2]]))
    plan = match.joined(Hard(4, torch.tensor([[0, 1]])), x, tokens, at=Place())
    torch.testing.assert_close(plan.dense()[0], torch.tensor([[0.25, 0, 0.75, 0], [0, 1 / 3, 0, 2 / 3]]))


def test_canvas_of_four_crops():
    view = cut_view(4, (2, 2))
    canvas = Canvas.of(view)
    under = canvas.under[0, :16].view(4, 4)
    assert under.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert canvas.counts()[0, :6].tolist() == [16] * 5 + [0]
    y, x = canvas.y[0, 16:].view(4, 4, 4), canvas.x[0, 16:].view(4, 4, 4)
    assert y[2, 0, 0] == 4.5 / 8
    assert x[1, 0, 3] == 7.5 / 8


def test_canvas_guesses_the_squarest_and_is_told_better():
    view = cut_view(2, (3, 1))
    assert Canvas.of(view).under[0, :4].tolist() == [1, 1, 3, 3]
    view.__dict__["crops"] = None  # three crops: side by side
    assert Canvas.of(view).under[0, :4].tolist() == [1, 3, 1, 3]
    view = cut_view(2, (2, 3))
    told = Canvas.of(view).under
    view.__dict__["crops"] = None
    assert torch.equal(Canvas.of(view).under, told)


def test_canvas_mirrors_linear_maps_exactly():
    """A map that grows evenly across the whole view is read evenly by the crops, but for the edges."""
    view = cut_view(4, (1, 2))
    canvas = Canvas.of(view)
    seen = canvas.mirrored(canvas.x.masked_fill(~canvas.whole, 0))
    inner = canvas.cut & (canvas.x > 1 / 8) & (canvas.x < 7 / 8)
    torch.testing.assert_close(seen[inner], canvas.x[inner])
    torch.testing.assert_close(seen[canvas.whole], canvas.x[canvas.whole])


def test_canvas_of_an_image_that_is_not_cut():
    canvas = Canvas.of(whole_view(2, 3, 4))
    assert (canvas.under == 0).all()
    assert not canvas.cut.any()
    assert canvas.height.tolist() == [[3], [3]]
    assert canvas.width.tolist() == [[4], [4]]
