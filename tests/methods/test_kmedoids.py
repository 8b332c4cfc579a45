"""K-Medoids (Token Pooling): cases computed by hand."""

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.core import Capacity
from vit import images, run, signals, tiny_vit


def planned(weights, x, method, prefix=1):
    """CLS and the patches at x, attended with `weights` by everyone: every query is the same."""
    logits = torch.tensor([1.0, *weights]).log()[:, None]
    hidden = torch.tensor([0.0, *x])[None, :, None]
    seen = signals(logits, hidden=hidden, prefix=prefix)
    return seen.hidden, method.plan(seen, seen.tokens)


def test_two_groups_by_hand():
    """Centres start at the heaviest, 1 and 0; a round later they are the groups' medoids."""
    x, weights = [0.0, 1.0, 2.0, 10.0, 11.0], [3.0, 4.0, 1.0, 2.0, 1.0]
    hidden, plan = planned(weights, x, fewer.KMedoids(Capacity(2)))
    assert plan.row.tolist() == [[0, 1, 1, 1, 2, 2]]
    want = [0.0, (0 * 3 + 1 * 4 + 2 * 1) / 8, (10 * 2 + 11 * 1) / 3]  # averages weighted by attention
    assert_close(plan.reduce(hidden)[0, :, 0], torch.tensor(want))


def test_medoids_are_members_left_as_they_are():
    """In {0, 1, 2} the medoid is 1; in {10, 11} the heavier of the two costs less."""
    hidden, plan = planned([3.0, 4.0, 1.0, 1.0, 2.0], [0.0, 1.0, 2.0, 10.0, 11.0],
                           fewer.KMedoids(Capacity(2), output="medoid"))  # fmt: skip
    assert plan.row.tolist() == [[0, 1, 1, 1, 2, 2]]
    assert plan.reduce(hidden)[0, :, 0].tolist() == [0.0, 1.0, 11.0]
    assert plan.sizes(None).tolist() == [[1, 3, 2]]


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_medoid_rows_are_input_rows(prefix):
    seen = signals(torch.randn(2, 14, 4), hidden=torch.randn(2, 14, 6), prefix=prefix)
    plan = fewer.KMedoids(Capacity(5), output="medoid").plan(seen, seen.tokens)
    y = plan.reduce(seen.hidden)
    equal = (y[:, :, None] == seen.hidden[:, None]).all(-1)
    assert equal.any(-1).all()
    assert torch.equal(equal.to(torch.int8).argmax(-1)[:, :prefix], torch.arange(prefix).expand(2, -1))
    assert (plan.row.gather(1, equal.to(torch.int8).argmax(-1)) == torch.arange(prefix + 5)).all()


def test_weights_by_the_class_token_alone():
    """The class token attends elsewhere than everyone else does."""
    seen = signals(torch.randn(1, 9, 3))
    seen.seen.q[:, :, 0] *= -1
    for weight, score in (("cls", seen.saliency), ("mass", seen.attention_mass().mean(1))):
        plan = fewer.KMedoids(Capacity(3), weight=weight).plan(seen, seen.tokens)
        own = plan.weight * torch.zeros_like(score).scatter_add(1, plan.row, score).gather(1, plan.row)
        assert_close(own, score.masked_fill(torch.arange(9) < 1, own[0, 0].item()))


def test_in_a_model():
    model, x = tiny_vit("vit"), images()
    with fewer.apply(model, "kmedoids:keep=0.5,layers=1+2") as session:
        run(model, x)
        assert session.counts == [17, 9, 5, 5]
        assert_close(session.last.tokens.size.sum(1), torch.full((2,), 17.0))


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"weight": "q"}, {"output": "x"}])
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        fewer.KMedoids(**wrong)
