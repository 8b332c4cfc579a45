"""DPC-KNN: a case computed by hand, and its weights."""

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.core import Capacity
from vit import images, run, signals, tiny_vit


def test_two_peaks_by_hand():
    """On a line, with two neighbours (itself and the nearest): density exp(-d^2 / 2).

    d^2 to the nearest: 1, .25, .25, 4, 4. The densest is the earlier of the twins at 1.5 gaps, position 1; of the
    others the one at 8 is 6 away from anything denser, which beats all closer ones.
    """
    x = torch.tensor([0.0, 1.0, 1.5, 8.0, 10.0])
    seen = signals(torch.zeros(1, 6, 1), hidden=torch.cat([torch.zeros(1), x])[None, :, None])
    plan = fewer.DPCKNN(Capacity(2), neighbours=2).plan(seen, seen.tokens)
    assert plan.row.tolist() == [[0, 1, 1, 1, 2, 2]]
    assert_close(plan.reduce(seen.hidden)[0, :, 0], torch.tensor([0, 2.5 / 3, 9.0]))  # flat attention: plain means


def test_attention_weighs_the_averages():
    p = torch.tensor([0.1, 0.5, 0.1, 0.3])
    hidden = torch.tensor([0.0, 1.0, 3.0, 50.0])[None, :, None]
    seen = signals(p.log()[None, :, None], hidden=hidden)
    plan = fewer.DPCKNN(Capacity(2), neighbours=1).plan(seen, seen.tokens)
    assert plan.row.tolist() == [[0, 1, 1, 2]]
    w = p.exp()
    assert_close(plan.reduce(hidden)[0, 1, 0], (w[1] * 1 + w[2] * 3) / (w[1] + w[2]))


def test_duplicates_need_no_noise():
    seen = signals(torch.randn(1, 9, 2), hidden=torch.ones(1, 9, 4))
    plan = fewer.DPCKNN(Capacity(3)).plan(seen, seen.tokens)
    assert plan.m == 4
    assert torch.equal(plan.row.unique(), torch.arange(4))
    assert_close(plan.reduce(seen.hidden), torch.ones(1, 4, 4))


def test_in_a_model():
    model, x = tiny_vit("vit"), images()
    with fewer.apply(model, "dpc_knn:keep=0.5,layers=1+2") as session:
        run(model, x)
        assert session.counts == [17, 9, 5, 5]
        assert_close(session.last.tokens.size.sum(1), torch.full((2,), 17.0))
    with pytest.raises(ValueError, match="at least one neighbour"):
        fewer.DPCKNN(neighbours=0)
