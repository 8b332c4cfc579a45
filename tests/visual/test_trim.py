"""TRIM on cases computed by hand: the authors' numbers are not at hand."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import fewer
from cases import normal
from fewer.core import Capacity, KeepRatio, Outliers, SignalError, Tower, select
from fewer.methods.multimodal.trim import TRIM
from fewer.testing.vision_language import prompts, tiny_vlm
from insides import alone, inside, kept, with_visual

PROJECTOR = normal(50, 6, 8)


def project(x):
    return (x @ PROJECTOR).tanh()  # no linear map: before and behind it are not the same


def seen(lengths=(12, 12), one=None):
    """At the bridge: a tower of six channels whose projected features are the visual rows, and a guide on top."""
    signals, tokens = inside(lengths) if one is None else alone(lengths, one)
    features = normal(1, 64, 6)[: tokens.n] + signals.hidden[..., :6]
    source = torch.arange(tokens.batch * tokens.n).view(tokens.batch, tokens.n)
    signals.hidden = project(features)
    view = replace(signals.visual.view, source=source)
    guide = (features, normal(2, 1, 1, 6).expand(tokens.batch, -1, -1))
    return with_visual(signals, view=view, guide=guide, tower=Tower(features.flatten(0, 1), project)), tokens


def score(signals, sign=-1):
    rows, asked = signals.visual.guide
    return sign * (rows * asked).sum(-1)


@pytest.mark.parametrize("count", [1, 2, 5, 10, 11])
def test_the_last_row_of_the_budget_is_the_mean_of_all_others(count):
    signals, tokens = seen()
    method = TRIM(Capacity(count))
    plan = method.plan(signals, tokens)
    rows = method.rows(signals, plan)
    assert plan.m == count
    assert (plan.anchor.diff(dim=-1) > 0).all()
    for line in range(2):
        best = score(signals)[line].topk(count - 1).indices.tolist()
        rest = [i for i in range(12) if i not in best]
        assert kept(plan, line) == sorted([*best, rest[0]])
        mean = project(signals.visual.features[line, rest].mean(0, keepdim=True))[0]
        for slot, i in enumerate(kept(plan, line)):
            assert_close(rows[line, slot], mean if i == rest[0] else signals.hidden[line, i])
    assert_close(plan.sizes(None).sum(-1), torch.tensor([12.0, 12.0]))


def test_without_a_mean_the_whole_budget_is_patches():
    signals, tokens = seen()
    plan = TRIM(Capacity(5), aggregate=False).plan(signals, tokens)
    assert set(kept(plan)) == set(score(signals)[0].topk(5).indices.tolist())
    assert torch.equal(TRIM(Capacity(5), aggregate=False).rows(signals, plan), plan.reduce(signals.hidden))


def test_a_budget_for_all_leaves_all():
    signals, tokens = seen()
    plan = TRIM(Capacity(12)).plan(signals, tokens)
    assert torch.equal(TRIM(Capacity(12)).rows(signals, plan), signals.hidden)


def test_the_sign_on_a_planted_patch():
    signals, tokens = seen()
    rows, asked = signals.visual.guide
    rows[0, 7] = 10 * asked[0, 0]
    assert 7 not in kept(TRIM(Capacity(3), aggregate=False).plan(signals, tokens))
    assert 7 in kept(TRIM(Capacity(3), aggregate=False, negate=False).plan(signals, tokens))


def test_the_dot_product_is_not_normalised():
    signals, tokens = seen((2,))
    signals = with_visual(signals, guide=(torch.tensor([[[3.0, 3], [2, 0]]]), torch.tensor([[[1.0, 0]]])))
    assert kept(TRIM(Capacity(1), aggregate=False, negate=False).plan(signals, tokens)) == [0]


def test_outstanding_scores_decide_the_number():
    signals, tokens = seen()
    for way in (True, False):
        method = TRIM(negate=way)
        p = score(signals, -1 if way else 1).softmax(-1)
        plan = method.plan(signals, tokens)
        for line in range(2):
            low, high = torch.quantile(p[line], torch.tensor([0.25, 0.75]))
            stay = (p[line] > high + 1.5 * (high - low)).nonzero()[:, 0].tolist() or [int(p[line].argmax())]
            first = min(i for i in range(12) if i not in stay)
            assert kept(plan, line) == sorted([*stay, first])
    assert select.outliers(p, tokens, at=signals.at).lengths.tolist() == [n - 1 for n in plan.lengths.tolist()]


@pytest.mark.parametrize("method", [TRIM(), TRIM(Capacity(4)), TRIM(KeepRatio(0.5)), TRIM(Capacity(1))])
def test_padding_and_other_images_change_nothing(method):
    lengths = (12, 5, 1)
    signals, tokens = seen(lengths)
    signals.visual.tower.features.view(3, 12, 6)[~tokens.valid] = 1e4
    plan = method.plan(signals, tokens)
    rows = method.rows(signals, plan)
    for line in range(3):
        own, alone_ = seen(lengths, line)
        mine = method.plan(own, alone_)
        assert kept(plan, line) == kept(mine)
        assert_close(rows[line, : len(kept(plan, line))], method.rows(own, mine)[0, : len(kept(mine))])


def test_permuting_patches_permutes_who_stays():
    signals, tokens = seen((12,))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    rows, asked = signals.visual.guide
    moved = with_visual(signals, guide=(rows[:, order], asked))
    method = TRIM(Capacity(4), aggregate=False)
    assert sorted(order[kept(method.plan(moved, tokens))].tolist()) == kept(method.plan(signals, tokens))


def test_without_a_guide_the_words_are_asked():
    signals, tokens = seen()
    signals = with_visual(signals, guide=None)
    signals.visual.hidden[:, -5:] = signals.hidden[:, 4:5]
    assert 4 in kept(TRIM(Capacity(2), aggregate=False).plan(signals, tokens))


def test_a_mean_needs_to_see_the_tower():
    signals, tokens = seen()
    signals = with_visual(signals, tower=None)
    plan = TRIM(Capacity(3)).plan(signals, tokens)
    with pytest.raises(SignalError, match="not known here"):
        TRIM(Capacity(3)).rows(signals, plan)
    method = TRIM(Capacity(3), aggregate=False)
    assert method.rows(signals, method.plan(signals, tokens)).shape == (2, 3, 8)


def test_in_a_model():
    assert fewer.parse("trim") == TRIM(Outliers())
    model = tiny_vlm("llava")
    inputs = prompts(model, [1, 2])
    with fewer.apply(model, "trim:tokens=5") as session, torch.no_grad():
        model(**inputs)
        assert session.seen(0).sum(-1).tolist() == [5, 10]
    with fewer.apply(model, "trim") as session, torch.no_grad():
        model(**inputs)
        assert 2 <= session.seen(0).sum(-1)[0] < 16
