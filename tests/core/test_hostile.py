"""Whatever the numbers, the padding, the length and the budget: protected tokens stay as they are, padding never
counts, no token stands twice, as many stay as were granted, and rows come in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import normal, seeds, tied
from fewer.core import (
    Budget,
    Capacity,
    Group,
    Hard,
    KeepRatio,
    Mass,
    Outliers,
    Place,
    Plan,
    Remove,
    Threshold,
    Tokens,
    cluster,
    match,
    select,
)

AT = Place(start=6)
WILD = (math.nan, math.inf, -math.inf, 1e30, -1e30, 3e38, 1e-30, 0.0)
COUNTED = (Remove(0), Remove(2), Remove(99), KeepRatio(1e-9), KeepRatio(0.5), KeepRatio(1.0),
           KeepRatio(0.5, of="start"), Capacity(1), Capacity(3), Capacity(99))  # fmt: skip
ADAPTIVE = (Threshold(-math.inf), Threshold(0.1), Threshold(math.inf), Mass(1e-9), Mass(1.0), Outliers(0.0))


def _kept(free: int, budget: Budget) -> int:
    return budget.keep(free, AT)


def _some(free: int, budget: Budget) -> int:
    return max(_kept(free, budget), min(1, free))


def _of_halves(free: int, budget: Budget) -> int:
    return max(_kept(free, budget), free - free // 2)


@dataclass(frozen=True)
class Maker:
    """make: metric (B, N, d), budget, tokens -> plan. left: free tokens of one sample, budget -> rows they become, or
    None where scores decide too. merges: whether every real token has a row. ordered: whether rows ascend. adaptive:
    further budgets."""

    make: Callable[[Tensor, Budget, Tokens], Hard]
    left: Callable[[int, Budget], int] | None
    merges: bool = False
    ordered: bool = True
    adaptive: tuple[Budget, ...] = ()


def _clusters(make: Callable) -> Maker:
    return Maker(lambda m, b, t: make(m, b, t, at=AT), _some, merges=True)


def _scored(make: Callable, left: Callable[[int, Budget], int] | None = _kept, **more) -> Maker:
    return Maker(lambda m, b, t: make(m[..., 0], b, t, at=AT), left, **more)


def _joined(m: Tensor, b: Budget, t: Tokens) -> Hard:
    return match.joined(select.top(m[..., 0], b, t, at=AT), m, t, at=AT)


MAKERS = {
    "bipartite": Maker(lambda m, b, t: match.bipartite(m, b, t, at=AT), _of_halves, merges=True,
                       adaptive=(Threshold(-math.inf), Threshold(0.1), Threshold(math.inf))),
    "halves": Maker(lambda m, b, t: match.bipartite(m, b, t, at=AT, order="halves"), _of_halves, merges=True,
                    ordered=False),
    "ranked halves": Maker(lambda m, b, t: match.bipartite(m, b, t, at=AT, order="ranked", penalty=m[..., 1]),
                           _of_halves, merges=True, ordered=False),
    "kth": Maker(lambda m, b, t: match.kth_bipartite(m, b, t, at=AT), None, merges=True),
    "random": Maker(lambda m, b, t: match.random_bipartite(m, b, t, at=AT), _some, merges=True),
    "ranked": Maker(lambda m, b, t: match.ranked_bipartite(m[..., 0], m, b, t, at=AT), _of_halves, merges=True),
    "half dropped": Maker(lambda m, b, t: match.ranked_bipartite(m[..., 0], m, b, t, at=AT, pruned=0.5), _of_halves),
    "joined": Maker(_joined, _kept, adaptive=ADAPTIVE),
    **{f"{way} linkage": _clusters(partial(cluster.agglomerative, linkage=way)) for way in cluster.LINKAGES},
    "dpc_knn": _clusters(cluster.dpc_knn), "kmeans": _clusters(cluster.kmeans),
    "kmedoids": _clusters(lambda m, b, t, at: cluster.kmedoids(m, b, t, at=at, weight=m[..., 1].abs())),
    "kcentre": _clusters(cluster.kcentre), "runs": _scored(cluster.runs, _some, merges=True),
    "top": _scored(select.top, adaptive=ADAPTIVE), "sampled": _scored(select.sampled, None),
    "stratified": _scored(lambda s, b, t, at: select.stratified(s, b, t, at=at, grid=(1, t.n))),
    "maxmin": Maker(lambda m, b, t: select.maxmin(m, b, t, at=AT), _some),
    "dpp": Maker(lambda m, b, t: select.dpp(m, m[..., 0], b, t, at=AT), _some),
    "core_set": Maker(lambda m, b, t: select.core_set(m, b, t, at=AT), _kept),
    "core_set in rounds": Maker(lambda m, b, t: select.core_set(m, b, t, at=AT, block=2), _kept),
}  # fmt: skip


@st.composite
def inputs(draw) -> tuple[Tensor, Tokens]:
    """A metric with a few wild numbers, and tokens with a prefix, guarded ones and padding, each perhaps."""
    b, n, seed = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(seeds)
    metric = tied(seed, b, n) if draw(st.booleans()) else normal(seed, b, n, 4)
    for _ in range(draw(st.integers(0, 3))):
        i, j, c = (draw(st.integers(0, k - 1)) for k in metric.shape)
        metric[i, j, slice(None) if draw(st.booleans()) else c] = draw(st.sampled_from(WILD))
    if draw(st.booleans()):
        metric = metric * 1e30
    prefix = min(draw(st.integers(0, 2)), n - 1)
    tokens = Tokens.plain(b, n, prefix)
    valid = torch.ones(b, n, dtype=torch.bool)
    if draw(st.booleans()) and n - prefix > 2:
        at = torch.tensor([[draw(st.integers(prefix, n - 1))] for _ in range(b)])
        tokens = tokens.protect(Group(index=at))
    if draw(st.booleans()):
        for i in range(b):
            valid[i, draw(st.lists(st.integers(prefix, n - 1), max_size=n - prefix))] = False
        if tokens.guarded is not None:
            valid = valid | tokens.guarded
        metric[~valid] = draw(st.sampled_from((*WILD, 1.0)))
        tokens = replace(tokens, valid=valid)
    return metric, tokens


@contextmanager
def as_long() -> Iterator[None]:
    """Every form that long sequences take, on short ones."""
    with ExitStack() as stack:
        for room, name, value in ((cluster, "NEAR", 2), (cluster, "CHUNK", 7), (cluster, "WHOLE", 3),
                                  (select, "NEAR", 2), (match, "CHUNK", 7)):  # fmt: skip
            stack.enter_context(patch.object(room, name, value))
        yield


def holds(plan: Plan, tokens: Tokens, maker: Maker, budget: Budget) -> None:
    """Raises AssertionError for whatever the plan does that no plan may do."""
    assert isinstance(plan, Hard)
    row, anchor, sizes = plan.row, plan.anchor, plan.sizes(None)
    counts = plan.counted.tolist()
    protected = torch.zeros(1, tokens.n, dtype=torch.bool) if tokens.protected is None else tokens.protected
    protected = protected.expand(tokens.batch, -1)
    assert bool(plan.weight.isfinite().all()), "a weight is not finite"
    for i, count in enumerate(counts):
        real = tokens.unpadded[i]
        assert 0 <= count <= plan.m, f"{count} rows of {plan.m}"
        stands = anchor[i, :count]
        assert len(stands.unique()) == count, f"{stands.tolist()}: a token stands twice"
        assert row[i][stands].tolist() == list(range(count)), "a row does not hold the token it stands for"
        assert sorted(set(row[i][row[i] >= 0].tolist())) == list(range(count)), "a row without a token"
        assert bool(real[stands].all()), "padding stands for a row"
        assert bool((row[i][~real] == -1).all()), "padding is in a row"
        assert not maker.merges or bool((row[i][real] >= 0).all()), "a token is lost"
        if maker.ordered:
            assert stands.tolist() == sorted(stands.tolist()), f"{stands.tolist()} do not ascend"
        held = row[i][protected[i]]
        assert bool((held >= 0).all()), "a protected token goes"
        assert bool((sizes[i][held] == 1).all()), "something is folded into a protected token"
        fixed, free = int(protected[i].sum()), int((real & ~protected[i]).sum())
        if maker.left is not None and not budget.adaptive:
            assert count == fixed + maker.left(free, budget), f"{count} rows of {fixed} fixed and {free} free tokens"
        else:
            assert fixed <= count <= fixed + free


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=max(40, settings.default.max_examples))
@given(inputs(), st.data())
def test_no_input_breaks_the_algebra(name, long, given_, data) -> None:
    (metric, tokens), maker = given_, MAKERS[name]
    budget = data.draw(st.sampled_from((*COUNTED, *maker.adaptive)))
    with as_long() if long else nullcontext():
        holds(maker.make(metric, budget, tokens), tokens, maker, budget)


def _edit(plan: Hard, **change: Callable[[Tensor], Tensor]) -> Hard:
    return replace(plan, **{k: f(getattr(plan, k).clone()) for k, f in change.items()})


def _twice(anchor: Tensor) -> Tensor:
    anchor[:, -1] = anchor[:, -2]
    return anchor


FAULTS: dict[str, Callable[[Hard], Hard]] = {
    "stands twice": lambda p: _edit(p, anchor=_twice),
    "do not ascend": lambda p: _edit(p, anchor=lambda a: a.roll(1, -1)),
    "a protected token goes": lambda p: Plan.keep(p.anchor[:, 1:], p.n),  # where losing tokens is no fault
    "folded into a protected": lambda p: _edit(p, to=torch.zeros_like),
    "a token is lost": lambda p: _edit(p, to=lambda t: t.fill_(-1)),
    "rows of 1 fixed": lambda p: Plan.identity(p.lead, p.n),
    "not finite": lambda p: _edit(p, extra_weight=lambda w: w.fill_(math.nan)),
}


@pytest.mark.parametrize("says", FAULTS)
def test_the_watchdog_bites(says) -> None:
    metric, tokens = normal(0, 2, 9, 4), Tokens.plain(2, 9, 1)
    plan = match.bipartite(metric, Remove(3), tokens, at=AT)
    holds(plan, tokens, MAKERS["bipartite"], Remove(3))
    maker = replace(MAKERS["bipartite"], merges="protected token goes" not in says)
    with pytest.raises(AssertionError, match=says):
        holds(FAULTS[says](plan), tokens, maker, Remove(3))


def test_the_watchdog_bites_where_padding_counts() -> None:
    tokens = Tokens.plain(1, 5, valid=torch.tensor([[True, True, True, False, False]]))
    counts_padding = Maker(lambda m, b, t: t.unchanged(), None)
    for plan in (Plan.keep(torch.tensor([[0, 1, 3]]), 5), Plan.merge(torch.tensor([[4]]), torch.tensor([[0]]), 5)):
        with pytest.raises(AssertionError, match="padding"):
            holds(plan, tokens, counts_padding, Remove(1))


# What came wrong once, by hand.
def test_a_threshold_of_minus_infinity_merges_what_may_merge_and_nothing_else() -> None:
    valid = torch.tensor([[True] * 6 + [False] * 2])
    plan = match.bipartite(tied(0, 1, 8), Threshold(-math.inf), Tokens.plain(1, 8, 2, valid=valid), at=AT)
    assert plan.row[0, :2].tolist() == [0, 1]
    assert plan.counted.tolist() == [4]


def test_a_score_that_is_no_number_goes_before_a_protected_token() -> None:
    scores = torch.tensor([[5.0, math.nan, 3.0, 2.0, math.inf]])
    plan = match.ranked_bipartite(scores, normal(0, 1, 5, 4), Remove(2), Tokens.plain(1, 5, 1), at=AT)
    assert plan.anchor.tolist() == [[0, 2, 4]]  # the numberless one and the smallest go


def test_a_key_that_is_no_number_comes_last_but_in_front_of_padding() -> None:
    key = torch.tensor([[math.nan, 1.0, 0.0, 2.0]])
    tokens = Tokens.plain(1, 4, valid=torch.tensor([[True, True, True, False]]))
    assert cluster.runs(key, Capacity(3), tokens, at=AT).row.tolist() == [[0, 1, 2, -1]]


def test_huge_numbers_keep_their_order() -> None:
    x = torch.tensor([[[0.0], [1.0], [9.0], [10.0], [4.0]]])
    for make in (cluster.kcentre, cluster.kmeans, cluster.kmedoids, select.core_set):
        small, huge = (make(x * scale, Capacity(3), Tokens.plain(1, 5), at=AT) for scale in (1.0, 1e30))
        assert torch.equal(small.row, huge.row), make.__name__


def test_a_sample_that_keeps_nothing_has_no_row() -> None:
    plan = match.joined(
        Plan.keep(torch.arange(4).expand(2, 4), 4, torch.tensor([0, 2])), normal(0, 2, 4, 3), Tokens.plain(2, 4), at=AT
    )
    assert plan.row[0].tolist() == [-1] * 4
    assert (plan.row[1] >= 0).all()


# Budgets and bounds.
@given(st.sampled_from(COUNTED), st.integers(0, 40))
def test_no_shorter_sample_keeps_more_than_the_bound(budget, free) -> None:
    at = Place(start=free)
    assert budget.most(free, at) == max(budget.counts(free, at))
    assert budget.most(free, at, least=1) == max(budget.counts(free, at, least=1))


@given(seeds, st.integers(1, 33), st.sampled_from([0.0, 0.1, 1.5]))
def test_outliers_are_at_most_a_quarter(seed, n, factor) -> None:
    scores = normal(seed, 3, n).exp().square()
    plan = select.top(scores, Outliers(factor), Tokens.plain(3, n), at=AT)
    assert plan.m == Outliers(factor).most(n, AT) <= max(1, n // 4 + 1)
    wide = select._adaptive(scores, Outliers(factor))
    assert plan.counted.tolist() == wide.sum(-1).tolist()


@given(seeds, st.lists(st.integers(2, 20), min_size=2, max_size=4), st.sampled_from(COUNTED),
       st.sampled_from(["bipartite", "halves", "random", "ranked"]))  # fmt: skip
def test_a_padded_matching_is_as_wide_as_its_fullest_sample_can_be(seed, ns, budget, name) -> None:
    n = max(ns)
    valid = torch.arange(n) < torch.tensor(ns)[:, None]
    plan = MAKERS[name].make(normal(seed, len(ns), n, 4), budget, Tokens.plain(len(ns), n, valid=valid))
    assert plan.m == max(MAKERS[name].left(k, budget) for k in range(n + 1))


# Long sequences.
LONG = [name for name in MAKERS if not name.endswith("linkage")]


@pytest.mark.parametrize("name", LONG)
@given(seeds, st.lists(st.integers(2, 20), min_size=1, max_size=3), st.sampled_from([Capacity(4), KeepRatio(0.5)]))
def test_distances_that_are_computed_again_change_no_plan(name, seed, ns, budget) -> None:
    n = max(ns)
    valid = None if len(set(ns)) == 1 else torch.arange(n) < torch.tensor(ns)[:, None]
    metric, tokens = tied(seed, len(ns), n), Tokens.plain(len(ns), n, valid=valid)
    torch.manual_seed(0)  # of the random partition
    plan = MAKERS[name].make(metric, budget, tokens)
    torch.manual_seed(0)
    with as_long():
        assert torch.equal(MAKERS[name].make(metric, budget, tokens).row, plan.row)


@given(seeds, st.integers(4, 24))
def test_long_sequences_are_clustered_in_runs_and_say_so(seed, n) -> None:
    """Each run by itself, with its share of the merges; below two clusters per run as a whole."""
    said: list[str] = []
    metric, at = normal(seed, 1, n, 4), Place(layer=5, note=said.append)
    runs, k = -(-n // 3), max(1, n * 3 // 4)
    with as_long():
        plan = cluster.agglomerative(metric, Capacity(k), Tokens.plain(1, n), at=at)
    assert plan.m == k
    if k < 2 * runs:
        assert not said
        return
    assert said == [
        f"layer 5: {n} tokens are clustered in {runs} runs, because the distances of more than 3 are not kept"
    ]
    for b in range(runs):
        start, stop = b * n // runs, (b + 1) * n // runs
        left = stop - start - ((b + 1) * (n - k) // runs - b * (n - k) // runs)
        own = cluster.agglomerative(metric[:, start:stop], Capacity(left), Tokens.plain(1, stop - start), at=AT)
        rows = plan.row[0, start:stop]
        assert (rows - rows.min()).tolist() == own.row[0].tolist()


@given(seeds, st.lists(st.integers(2, 20), min_size=2, max_size=3))
def test_runs_do_not_depend_on_the_batch(seed, ns) -> None:
    metric, budget = normal(seed, len(ns), max(ns), 4), KeepRatio(0.8)
    with as_long():
        valid = torch.arange(max(ns)) < torch.tensor(ns)[:, None]
        plan = cluster.agglomerative(metric, budget, Tokens.plain(len(ns), max(ns), valid=valid), at=AT)
        for i, n in enumerate(ns):
            own = cluster.agglomerative(metric[i : i + 1, :n], budget, Tokens.plain(1, n), at=AT)
            assert plan.row[i, :n].tolist() == own.row[0].tolist()
