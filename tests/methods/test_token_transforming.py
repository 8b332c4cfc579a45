"""Token Transforming: a many-to-many matrix, between averaging all and pruning."""

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.core import Capacity, KeepRatio
from vit import images, run, signals, tiny_vit


def planned(beta, size=None, prefix=1):
    k = torch.randn(2, 12, 5)
    seen = signals(k, hidden=torch.randn(2, 12, 6), prefix=prefix, size=size)
    return seen, fewer.TokenTransforming(Capacity(4), beta=beta).plan(seen, seen.tokens)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_rows_sum_to_one_and_the_prefix_is_left_alone(prefix):
    _, plan = planned(5.0, prefix=prefix)
    w = plan.dense()
    assert w.shape == (2, prefix + 4, 12)
    assert_close(w.sum(-1), torch.ones(2, prefix + 4))
    assert torch.equal(w[:, :prefix, :prefix], torch.eye(prefix).expand(2, -1, -1))
    assert w[:, :prefix, prefix:].abs().sum() == 0
    assert w[:, prefix:, :prefix].abs().sum() == 0
    assert (w[:, prefix:, prefix:] > 0).all()  # every token gives to every anchor


def test_by_hand():
    """Two anchors at right angles, a third token between them, beta = ln 4 / cos: weights 1 : 4^(c - 1) ..."""
    x = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]])
    seen = signals(torch.tensor([[0.0, 3.0, 2.0, 1.0]])[..., None], hidden=x, size=torch.tensor([[1.0, 1, 1, 2]]))
    w = fewer.TokenTransforming(Capacity(2), beta=2.0).plan(seen, seen.tokens).dense()
    e = torch.tensor([0.0, 2.0, 0.0, 2.0 * 0.5**0.5]).exp() * torch.tensor([0.0, 1, 1, 2])
    assert_close(w[0, 1], e / e.sum())


def test_a_sharp_matrix_prunes_and_a_flat_one_averages():
    seen, sharp = planned(1e4)
    kept = fewer.ClsTopK(Capacity(4)).plan(seen, seen.tokens)
    assert_close(sharp.reduce(seen.hidden), kept.reduce(seen.hidden))
    seen, flat = planned(0.0)
    mean = seen.hidden[:, 1:].mean(1, keepdim=True).expand(-1, 4, -1)
    assert_close(flat.reduce(seen.hidden)[:, 1:], mean)


def test_mass_is_conserved():
    size = torch.rand(2, 12) + 0.5
    _, plan = planned(3.0, size)
    assert_close(plan.sizes(size).sum(1), size.sum(1))
    model = tiny_vit("vit")
    with fewer.apply(model, "token_transforming:layers=1+2") as session:
        run(model, images())
        assert_close(session.last.tokens.size.sum(1), torch.full((2,), 17.0))


def test_tome_written_as_a_matrix_gives_what_the_scatter_gives():
    seen = signals(torch.randn(2, 12, 5))
    hard = fewer.ToMe().plan(seen, seen.tokens)
    soft = fewer.Plan.soft(hard.dense())
    assert_close(soft.reduce(seen.hidden), hard.reduce(seen.hidden))


def test_the_value_norm_ranks_anchors():
    logits = torch.tensor([0.0, 1.0, 0.9, 0.0])[None, :, None]
    seen = signals(logits, v=torch.tensor([1.0, 1.0, 2.0, 9.0])[None, :, None])
    plain = fewer.TokenTransforming(Capacity(1)).plan(seen, seen.tokens)
    ranked = fewer.TokenTransforming(Capacity(1), value_norm=True).plan(seen, seen.tokens)
    assert plain.position.tolist() == [[0, 1]]
    assert ranked.position.tolist() == [[0, 3]]


def test_samples_of_different_lengths():
    """Padding gives nothing, and a sample's rows are what they would be alone."""
    k, hidden = torch.randn(2, 10, 3), torch.randn(2, 10, 4)
    valid = torch.arange(10) < torch.tensor([[10], [6]])
    method = fewer.TokenTransforming(KeepRatio(0.5), beta=2.0)
    seen = signals(k, hidden=hidden, valid=valid)
    seen.seen.bias = torch.zeros(2, 1, 1, 10).masked_fill(~valid[:, None, None], float("-inf"))
    plan = method.plan(seen, seen.tokens)
    assert plan.lengths.tolist() == [1 + 4, 1 + 2]
    y = plan.reduce(hidden)
    for b, n in enumerate((10, 6)):
        alone = signals(k[b : b + 1, :n], hidden=hidden[b : b + 1, :n])
        want = method.plan(alone, alone.tokens).reduce(alone.hidden)
        assert_close(y[b : b + 1, : want.shape[1]], want)
        assert y[b, want.shape[1] :].abs().sum() == 0
    model, x = tiny_vit("vit"), images(3)
    with fewer.apply(model, ["ats:layers=1", "token_transforming:keep=0.4,layers=2"]):
        together = run(model, x)
        for i in range(3):
            assert_close(run(model, x[i : i + 1]), together[i : i + 1], atol=1e-5, rtol=0)


def test_beta_is_checked():
    with pytest.raises(ValueError, match="beta must be 0 or more"):
        fewer.TokenTransforming(beta=-1.0)
