"""DivPrune against its authors' numbers, brute force, and cases computed by hand."""

from itertools import combinations

import pytest
import torch

import fewer
from cases import golden, normal
from fewer.core import Capacity, KeepRatio, Place, Signals, Tokens, cluster
from fewer.core.match import unit
from fewer.methods.multimodal.divprune import DivPrune
from fewer.testing.vision_language import prompts, tiny_vlm
from insides import alone, inside, kept


def chosen(x, budget, valid=None):
    tokens = Tokens.plain(*x.shape[:2], valid=valid)
    return DivPrune(budget).plan(Signals(x, tokens, Place(start=x.shape[1])), tokens)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_the_authors(case):
    z, config = golden("divprune")
    facts = config["cases"][case]
    plan = chosen(z[f"c{case}.x"][None], KeepRatio(facts["ratio"], rounding="round"))
    assert kept(plan) == sorted(z[f"c{case}.selected"].tolist())
    assert plan.m == facts["kept"]


def test_the_papers_share_of_576_tokens_is_56():
    assert DivPrune().budget.keep(576, Place()) == 56
    assert fewer.parse("divprune:tokens=64") == DivPrune(Capacity(64))


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_at_least_half_as_spread_as_the_best(seed):
    """The distance is 1 - cosine, half the squared length of a difference, so half of a length is a quarter of it."""
    x = normal(seed, 1, 12, 5)
    d = cluster.cosine_distance(x)[0]

    def least(some):
        return min(d[i, j].item() for i, j in combinations(some, 2))

    best = max(least(some) for some in combinations(range(12), 4))
    assert best / 4 <= least(kept(chosen(x, Capacity(4)))) <= best


def test_a_planted_outlier_always_stays():
    x = normal(0, 1, 300, 8) * 0.2 + torch.eye(8)[0]
    x[0, 137] = -torch.eye(8)[0]
    assert 137 in kept(chosen(x, Capacity(1)))
    assert 137 in kept(chosen(x, Capacity(9)))


def test_a_flood_of_duplicates_leaves_the_distinct_ones():
    x = normal(1, 1, 1, 8).repeat(1, 40, 1)
    distinct = [3, 17, 18, 39]
    x[0, distinct] = normal(2, 4, 8)
    assert set(distinct) < set(kept(chosen(x, Capacity(5))))


def test_equal_tokens_give_as_many_as_asked():
    assert kept(chosen(torch.ones(1, 20, 4), Capacity(6))) == [0, 1, 2, 3, 4, 5]
    assert len(set(kept(chosen(torch.zeros(1, 20, 4, dtype=torch.bfloat16), Capacity(6))))) == 6


def test_permuting_tokens_permutes_who_stays():
    x, order = normal(3, 1, 40, 6), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert sorted(order[kept(chosen(x[:, order], Capacity(7)))].tolist()) == kept(chosen(x, Capacity(7)))


@pytest.mark.parametrize("keep", [KeepRatio(0.5), Capacity(3), Capacity(100)])
def test_padding_and_other_images_change_nothing(keep):
    lengths = (12, 5, 1)
    together = DivPrune(keep).plan(*inside(lengths))
    for line in range(3):
        assert kept(together, line) == kept(DivPrune(keep).plan(*alone(lengths, line)))


@pytest.mark.parametrize("kind", ["spread", "alike"])
def test_the_loneliest_of_many_is_found_without_the_matrix(kind):
    x = normal(4, 2, 700, 8)
    if kind == "alike":  # most tokens are one of a few, so that few rows must be looked at
        x = x[:, torch.randint(0, 40, (700,), generator=torch.Generator().manual_seed(1))] + 0.3 * normal(5, 2, 700, 8)
    real = torch.arange(700) < torch.tensor([[700], [301]])
    nearest = cluster.cosine_distance(x, real).amin(-1).masked_fill(~real, -1)
    assert torch.equal(cluster.loneliest(unit(x), real), nearest.argmax(-1))
    assert torch.equal(cluster.loneliest(unit(x)), cluster.cosine_distance(x).amin(-1).argmax(-1))


def test_few_and_many_of_many_are_the_same_choice():
    """Columns computed again or a matrix that is kept: a smaller choice is the start of a larger one."""
    x = normal(6, 1, 1200, 16)
    few, many = (set(kept(chosen(x, Capacity(k)))) for k in (300, 301))
    assert few < many


def test_what_it_costs_is_counted():
    spent = []
    for n, again in ((512, 0), (1200, 2 * 1200 * 10)):
        tokens = Tokens.plain(1, n)
        DivPrune(Capacity(10)).plan(Signals(normal(7, 1, n, 8), tokens, Place(start=n, spend=spent.append)), tokens)
        assert spent.pop() == (cluster.pairs(n) + again) * 8
        assert n * n < cluster.pairs(n) < 2 * n * n


def test_in_a_model():
    model = tiny_vlm("llava")
    with fewer.apply(model, "divprune:tokens=5") as session, torch.no_grad():
        model(**prompts(model, [1, 2]))
        assert session.seen(0).sum(-1).tolist() == [5, 10]
