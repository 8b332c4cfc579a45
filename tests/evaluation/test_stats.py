"""Intervals against their definition and simulation; agreement, divergence and movement on cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.evaluation import stats


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (9, 10), (913, 1000)])
def test_share_is_wilsons_interval(right: int, n: int) -> None:
    hits = np.arange(n) < right
    found = stats.share(hits)
    assert found.value == right / n
    for end in (found.low, found.high):  # the shares that lie just 1.96 of their own deviations away
        assert (found.value - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n, abs=1e-12)
    assert found.low <= found.value <= found.high


def test_a_share_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no observations"):
        stats.share(np.array([], bool))


def test_paired_difference_counts_only_disagreements() -> None:
    reference = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], bool)
    hits = np.array([1, 1, 1, 0, 1, 1, 1, 0, 0, 0], bool)  # three gained, one lost
    found = stats.paired_difference(hits, reference)
    assert found.value == pytest.approx(0.2)
    middle, spread = 2 / 12, math.sqrt((6 / 12 - (2 / 12) ** 2) / 12)
    assert (found.low, found.high) == pytest.approx((middle - 1.96 * spread, middle + 1.96 * spread), abs=1e-3)


def test_equal_answers_still_leave_doubt() -> None:
    hits = np.ones(100, bool)
    found = stats.paired_difference(hits, hits)
    assert found.value == 0
    assert found.low < 0 < found.high
    assert found.high - found.low < 0.06


def test_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered, runs, n = 0, 600, 300
    for _ in range(runs):
        kind = rng.choice(4, n, p=[0.80, 0.07, 0.03, 0.10])  # both, reference only, method only, neither
        found = stats.paired_difference((kind == 0) | (kind == 2), (kind == 0) | (kind == 1))
        covered += found.low <= -0.04 <= found.high
    assert 0.92 <= covered / runs <= 0.98


def test_paired_difference_needs_the_same_items() -> None:
    with pytest.raises(ValueError, match=r"same items.*\(3,\).*\(4,\)"):
        stats.paired_difference(np.ones(3, bool), np.ones(4, bool))


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_hits_survive_packing(hits: list[bool]) -> None:
    assert stats.unpack_hits(stats.pack_hits(np.array(hits)), len(hits)).tolist() == hits


def test_kl_is_that_of_the_probabilities() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    wanted = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert stats.kl(p.log(), q.log() + 3) == pytest.approx(wanted, rel=1e-6)  # adding a constant to logits is nothing
    assert stats.kl(p.log(), p.log()) == 0


def test_agreement_and_movement() -> None:
    a = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    b = torch.tensor([[2.0, 0], [0, 9], [0, 1], [0, 1]])
    assert stats.agreement(a, b) == 0.75
    assert stats.movement(a, b) == pytest.approx(0.25)
    assert stats.movement(a, 7 * a) == pytest.approx(0, abs=1e-12)


def test_bootstrap_mean_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    found = [stats.mean(rng.exponential(2.0, 60), draws=400, seed=i) for i in range(300)]
    assert 0.88 <= np.mean([x.low <= 2 <= x.high for x in found]) <= 0.98
    assert stats.mean([1.0, 2.0, 4.0]).value == pytest.approx(7 / 3)
    assert stats.mean([1.0, 2.0, 4.0]) == stats.mean([1.0, 2.0, 4.0])
    with pytest.raises(ValueError, match="no observations"):
        stats.mean([])
