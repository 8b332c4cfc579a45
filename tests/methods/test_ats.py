"""ATS: the number of tokens follows the scores."""

import pytest
import torch

import fewer
from fewer.core import Capacity
from vit import images, run, signals, tiny_vit


def kept(logits, points, v=None, **more):
    seen = signals(torch.tensor([0.0, *logits])[:, None], v=v)
    plan = fewer.ATS(Capacity(points), **more).plan(seen, seen.tokens)
    return plan.anchor[0, : plan.lengths[0]].tolist()


def test_even_scores_keep_every_point_and_peaked_ones_few():
    v = torch.ones(1, 9, 1)
    assert len(kept([0.0] * 8, 4, v)) == 1 + 4
    assert kept([0.0] * 8, 4, v) == [0, 1, 3, 5, 7]  # points .125 .375 .625 .875 of eight even steps
    assert kept([0.0, 0, 0, 20, 0, 0, 0, 0], 4, v) == [0, 4]


def test_by_hand():
    """Scores .1 .2 .3 .4, rising: sums .1 .3 .6 1. Three points 1/6, 1/2, 5/6 fall into the steps of .2, .3, .4."""
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log().tolist()
    assert kept(logits, 3, torch.ones(1, 5, 1)) == [0, 1, 3, 4]
    assert kept(logits, 2, torch.ones(1, 5, 1)) == [0, 1, 4]  # 1/4 in the step of .2, 3/4 in that of .4
    assert kept(logits, 1, torch.ones(1, 5, 1)) == [0, 3]  # 1/2 in the step of .3


def test_the_length_of_the_value_counts():
    logits = torch.tensor([0.25] * 4).log().tolist()
    assert kept(logits, 1, torch.tensor([5.0, 1, 1, 9, 1])[None, :, None]) == [0, 3]


def test_counts_vary_by_image_and_the_batch_changes_nobody():
    model, x = tiny_vit("vit", seed=1), images(6, seed=3)
    x[0] *= 0.02
    answers = []
    for execution in ("padded", "packed"):
        with fewer.apply(model, "ats:layers=1+2", execution=execution) as session:
            together = run(model, x)
            answers.append(together)
            counts = session.counts
            assert counts.shape == (4, 6)
            assert (counts[1] <= 1 + int(16 * 0.7)).all()
            assert counts[2].unique().numel() > 1
            assert (counts[2] <= counts[1]).all()
            assert (counts[2] < counts[1]).any()  # the second layer samples anew though its points cover all
            for i in range(6):
                assert torch.allclose(run(model, x[i : i + 1]), together[i : i + 1], atol=1e-5)
                assert session.counts[:, 0].tolist() == counts[:, i].tolist()
    assert torch.allclose(*answers, atol=1e-5)


def test_as_many_points_as_tokens_change_nothing():
    model, x = tiny_vit("vit"), images()
    want = run(model, x)
    with fewer.apply(model, "ats:keep=1.0,layers=1+2"):
        assert torch.equal(run(model, x), want)


def test_the_paper_acts_from_the_fourth_block_on():
    assert fewer.ATS().layers == (3, 4, 5, 6, 7, 8, 9, 10, 11)


@pytest.mark.parametrize("fidelity", ["paper", "code"])
def test_deterministic(fidelity):
    logits = torch.randn(30).tolist()
    first = kept(logits, 12, fidelity=fidelity)
    assert first == kept(logits, 12, fidelity=fidelity)
    assert first[0] == 0
    assert 2 <= len(first) <= 13
