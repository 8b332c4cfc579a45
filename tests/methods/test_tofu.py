"""ToFu: pruning early, MLERP late."""

import math

import torch
from torch.testing import assert_close

import fewer
from fewer.core import Place, Plan, Remove
from vit import images, run, signals, tiny_vit


def pair(x, y):
    """The MLERP of two tokens, the second folded into the first."""
    plan = Plan.from_rows(torch.tensor([[0, 0]]), 1).norm_preserving()
    return plan.reduce(torch.tensor([[x, y]]))[0, 0]


def test_mlerp_by_hand():
    """(3, 0) and (0, 1): the mean (1.5, .5) stretched to length 3."""
    want = torch.tensor([1.5, 0.5]) * 3 / math.hypot(1.5, 0.5)
    assert_close(want, torch.tensor([2.846, 0.949]), atol=1e-3, rtol=0)
    assert_close(pair([3.0, 0.0], [0.0, 1.0]), want)
    assert_close(pair([0.0, 1.0], [3.0, 0.0]), want)
    assert_close(pair([1.0, 0.0], [-2.0, 0.0]).norm(), torch.tensor(2.0))


def test_opposite_tokens_fall_back_to_a_member():
    out = pair([0.0, 2.0], [0.0, -2.0])
    assert out.isfinite().all()
    assert_close(out.norm(), torch.tensor(2.0))


def test_early_layers_keep_rows_and_late_ones_keep_norms():
    x = torch.randn(2, 11, 6)
    for layer, merges in ((0, False), (1, False), (2, True), (3, True)):
        seen = signals(x, hidden=x, place=Place(layer, 4, start=10))
        plan = fewer.ToFu(Remove(4)).plan(seen, seen.tokens)
        y = plan.reduce(x)
        row = plan.row
        if merges:
            assert (row >= 0).all()
            for b in range(2):
                for m in range(plan.m):
                    members = x[b, row[b] == m]
                    assert_close(y[b, m].norm(), members.norm(dim=-1).max())
                    mean = members.mean(0)
                    assert_close(y[b, m], mean * members.norm(dim=-1).max() / mean.norm())
        else:
            assert (row < 0).sum(1).tolist() == [4, 4]
            assert torch.equal(y, x.gather(1, plan.anchor[..., None].expand(-1, -1, 6)))


def test_the_mean_of_mlerp_knows_no_sizes():
    k = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    x = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [1.0, 1.0], [5.0, 5.0]]])
    size = torch.tensor([[1.0, 9.0, 1.0, 1.0]])
    seen = signals(k, hidden=x, prefix=0, size=size)
    plan = fewer.ToFu(Remove(1), split=0).plan(seen, seen.tokens)
    assert plan.row.tolist() == [[1, 1, 0, 2]]
    assert_close(plan.reduce(x)[0, 1], pair([3.0, 0.0], [0.0, 1.0]))
    assert plan.sizes(size).tolist() == [[1, 10, 1]]


def test_split_is_a_layer():
    model, x = tiny_vit("vit"), images()
    for split, dropped in ((0, 0), (1, 2), (4, 8), (None, 4)):
        with fewer.apply(model, fewer.ToFu(Remove(2), split=split)) as session:
            run(model, x)
            assert (session.origin < 0).sum(1).tolist() == [dropped, dropped]
            assert session.counts == [15, 13, 11, 9]


def test_pruned_tokens_leave_no_size_behind():
    model, x = tiny_vit("vit"), images()
    with fewer.apply(model, "tofu:r=3") as session:
        run(model, x)
        assert_close(session.last.tokens.size.sum(1), torch.full((2,), 17.0 - 6))
