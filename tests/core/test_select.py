"""Selectors: equal to their slow twins, to the authors' choice, and blind to padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import batches, dtypes, golden, lengths, normal, padded, plain, prefixes, seeds, tied, tied_scores
from fewer.core import (
    Capacity,
    Group,
    KeepRatio,
    Mass,
    Outliers,
    Place,
    PlanError,
    Remove,
    Threshold,
    Tokens,
    naive,
    select,
)

AT = Place()
kinds = st.sampled_from(["normal", "tied"])


def scores_of(kind: str, seed: int, b: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (tied_scores(seed, b, n) if kind == "tied" else normal(seed, b, n).abs()).to(dtype)


def kept(plan) -> list[list[int]]:
    """The positions that stay, per sample."""
    lengths = [plan.m] * plan.lead[0] if plan.lengths is None else plan.lengths.tolist()
    return [row[:n] for row, n in zip(plan.anchor.tolist(), lengths, strict=True)]


@given(kinds, seeds, batches, lengths, prefixes, st.integers(0, 40), dtypes)
def test_top_is_its_slow_twin(kind, seed, b, n, prefix, keep, dtype) -> None:
    prefix, scores = min(prefix, n), scores_of(kind, seed, b, n, dtype)
    plan = select.top(scores, Remove(max(n - prefix - keep, 0)), plain(scores[..., None], prefix), at=AT)
    assert kept(plan) == [naive.top(s, min(keep, n - prefix), prefix) for s in scores.tolist()]


@given(kinds, seeds, batches, lengths, prefixes, st.sampled_from(["threshold", "mass", "outliers"]), st.floats(0.05, 1))
def test_adaptive_budgets_are_their_slow_twins(kind, seed, b, n, prefix, how, value) -> None:
    prefix, scores = min(prefix, n - 1), scores_of(kind, seed, b, n)
    value = round(value * 8) / 8 or 0.125  # on the grid of the tied scores
    budget = {"threshold": Threshold(value), "mass": Mass(value), "outliers": Outliers(value)}[how]
    plan = select.top(scores, budget, plain(scores[..., None], prefix), at=AT)
    assert kept(plan) == [getattr(naive, how)(s, value, prefix) for s in scores.tolist()]


@given(kinds, seeds, batches, lengths, prefixes, st.floats(0.05, 1), st.sampled_from(["paper", "code"]))
def test_sampled_is_its_slow_twin(kind, seed, b, n, prefix, share, fidelity) -> None:
    prefix, scores = min(prefix, n - 1), scores_of(kind, seed, b, n)
    k = max(1, round((n - prefix) * share))
    plan = select.sampled(scores, Capacity(k), plain(scores[..., None], prefix), at=AT, fidelity=fidelity)
    assert kept(plan) == [naive.sampled(s, k, prefix, fidelity) for s in scores.tolist()]


@given(kinds, seeds, batches, st.sampled_from([(4, 4), (5, 6), (1, 7)]), st.sampled_from([(2, 2), (3, 2), (1, 1)]),
       prefixes, st.floats(0, 1))  # fmt: skip
def test_stratified_is_its_slow_twin(kind, seed, b, grid, window, prefix, share) -> None:
    n = grid[0] * grid[1]
    scores, keep = scores_of(kind, seed, b, n + prefix), round(n * share)
    tokens = plain(scores[..., None], prefix)
    plan = select.stratified(scores, Remove(n - keep), tokens, at=AT, grid=grid, window=window)
    assert kept(plan) == [naive.stratified(s, keep, grid, window, prefix) for s in scores.tolist()]


@given(kinds, seeds, batches, lengths, prefixes, st.floats(0.05, 1), dtypes)
def test_maxmin_is_its_slow_twin(kind, seed, b, n, prefix, share, dtype) -> None:
    prefix = min(prefix, n - 1)
    metric = tied(seed, b, n, dtype) if kind == "tied" else normal(seed, b, n, 6, dtype=dtype)
    k = max(1, round((n - prefix) * share))
    plan = select.maxmin(metric, Capacity(k), plain(metric, prefix), at=AT)
    assert kept(plan) == [naive.maxmin(m, k, prefix) for m in metric.float().tolist()]


def test_at_full_length() -> None:
    metric, scores = normal(3, 1, 197, 8), normal(4, 1, 197).abs()
    tokens = plain(metric, 1)
    assert kept(select.maxmin(metric, Capacity(50), tokens, at=AT)) == [naive.maxmin(metric[0].tolist(), 50, 1)]
    for fidelity in ("paper", "code"):
        plan = select.sampled(scores, Capacity(100), tokens, at=AT, fidelity=fidelity)
        assert kept(plan) == [naive.sampled(scores[0].tolist(), 100, 1, fidelity)]
    plan = select.stratified(scores, Capacity(77), tokens, at=AT, grid=(14, 14), window=(3, 3))
    assert kept(plan) == [naive.stratified(scores[0].tolist(), 77, (14, 14), (3, 3), 1)]


def test_diversity_of_the_authors() -> None:
    z, config = golden("divprune")
    for case in config["cases"]:
        x = z[f"c{case['case']}.x"][None]
        plan = select.maxmin(x, KeepRatio(case["ratio"], rounding="round"), plain(x, 0), at=AT)
        assert kept(plan)[0] == sorted(z[f"c{case['case']}.selected"].tolist())


def test_sampling_by_hand() -> None:
    """Even scores give K tokens, a peak takes several points."""
    even = torch.ones(1, 8)
    tokens = Tokens.plain(1, 8)
    assert select.sampled(even, Capacity(8), tokens, at=AT).lengths.tolist() == [8]
    for k in (3, 5, 7, 10, 49):  # every point falls on the edge of two tokens and takes the lower one
        plan = select.sampled(torch.full((1, 2 * k), 0.1), Capacity(k), Tokens.plain(1, 2 * k), at=AT)
        assert kept(plan) == [list(range(0, 2 * k, 2))]
    empty = torch.tensor([[0, 0, 0, 0.5, 0.5]])  # of tokens without a share, and of two equally near, the first
    assert kept(select.sampled(empty, Capacity(5), Tokens.plain(1, 5), at=AT, fidelity="code")) == [[0, 3, 4]]
    peak = torch.tensor([[0.1, 0.1, 0.1, 9.7, 0, 0, 0, 0]])
    assert kept(select.sampled(peak, Capacity(8), tokens, at=AT)) == [[3]]
    assert kept(select.sampled(torch.zeros(1, 8), Capacity(4), tokens, at=AT)) == kept(
        select.sampled(even, Capacity(4), tokens, at=AT)
    )


RUNS = {
    "top": lambda s, b, t, at: select.top(s, b, t, at=at),
    "sampled": lambda s, b, t, at: select.sampled(s, b, t, at=at),
    "sampled as the code": lambda s, b, t, at: select.sampled(s, b, t, at=at, fidelity="code"),
    "stratified": lambda s, b, t, at: select.stratified(s, b, t, at=at, grid=(5, 4)),
    "maxmin": lambda s, b, t, at: select.maxmin(torch.stack([s.cos(), s.sin(), s], -1), b, t, at=at),
    "threshold": lambda s, b, t, at: select.top(s, Threshold(0.7), t, at=at),
    "mass": lambda s, b, t, at: select.top(s, Mass(0.7), t, at=at),
    "outliers": lambda s, b, t, at: select.outliers(s, t, at=at, factor=0.2),
}
COUNTED = [Remove(3), Remove(40), KeepRatio(0.5), KeepRatio(0.7, of="start"), Capacity(4)]


@given(st.sampled_from(sorted(RUNS)), seeds, st.lists(st.integers(3, 17), min_size=2, max_size=3), prefixes,
       st.sampled_from(COUNTED))  # fmt: skip
def test_padding_changes_nothing(name, seed, ns, prefix, budget) -> None:
    samples = [normal(seed + i, n).abs() for i, n in enumerate(ns)]
    scores, valid = padded(samples, float("nan"))
    at = Place(start=9)
    together = kept(RUNS[name](scores, budget, Tokens.plain(len(ns), max(ns), prefix, valid=valid), at))
    for i, n in enumerate(ns):
        assert together[i] == kept(RUNS[name](samples[i][None], budget, Tokens.plain(1, n, prefix), at))[0]


@given(st.sampled_from(sorted(RUNS)), seeds, st.integers(6, 20), prefixes)
def test_guarded_tokens_stay(name, seed, n, prefix) -> None:
    scores = normal(seed, 2, n).abs()
    index = normal(seed, 2, n - prefix).argsort(-1)[:, :2] + prefix
    tokens = Tokens.plain(2, n, prefix).protect(Group(index=index))
    plan = RUNS[name](scores, Capacity(2), tokens, AT)
    for b, stay in enumerate(kept(plan)):
        assert {*range(prefix), *index[b].tolist()} <= set(stay)
        assert stay == sorted(stay)
    if name in ("top", "stratified", "maxmin"):
        assert plan.m == prefix + 4


@given(seeds, st.integers(4, 16), st.integers(1, 3))
def test_only_the_named_group_may_go(seed, n, w) -> None:
    scores = normal(seed, 2, n)
    plan = select.top(scores, Remove(w), Tokens.plain(2, n, 1), at=AT, among=Group(1, 1 + w))
    assert kept(plan) == [[0, *range(1 + w, n)]] * 2


def test_not_a_number_ranks_last() -> None:
    scores = torch.tensor([[0.5, float("nan"), 0.1, float("inf"), float("-inf")]])
    assert kept(select.top(scores, Capacity(3), Tokens.plain(1, 5), at=AT)) == [[0, 2, 3]]


def test_bad_input_is_named() -> None:
    scores, tokens = torch.ones(1, 5), Tokens.plain(1, 6)
    for run in (select.top, select.sampled):
        with pytest.raises(PlanError, match="scores are for 5 tokens, the sequence has 6"):
            run(scores, Capacity(2), tokens, at=AT)
    with pytest.raises(PlanError, match="sampling takes r, keep or tokens"):
        select.sampled(torch.ones(1, 6), Mass(0.5), tokens, at=AT)
    with pytest.raises(PlanError, match="stratified takes r, keep or tokens"):
        select.stratified(torch.ones(1, 6), Mass(0.5), tokens, at=AT, grid=(2, 3))
    with pytest.raises(PlanError, match="windows of 0 x 2"):
        select.stratified(torch.ones(1, 6), Capacity(2), tokens, at=AT, grid=(2, 3), window=(0, 2))
    with pytest.raises(ValueError, match="factor=-1"):
        select.outliers(torch.ones(1, 6), tokens, at=AT, factor=-1)
