"""Budgets: every counting convention of the literature, by its published numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import golden
from fewer.core import BudgetError, Capacity, KeepRatio, Mass, Outliers, Place, Remove, Threshold


def stages(budget, free: int, n: int, extra: int = 0) -> list[int]:
    """What is left after each of n stages; `extra` tokens join after each."""
    left, counts = free, []
    for stage in range(n):
        left = budget.keep(left, Place(layer=stage, layers=n, stage=stage, stages=n, start=free)) + extra
        counts.append(left)
    return counts


def test_counts_of_the_literature() -> None:
    assert stages(KeepRatio(0.7, of="start"), 196, 3) == [137, 96, 67]  # DynamicViT
    assert stages(KeepRatio(0.9, of="start"), 196, 3) == [176, 158, 142]  # Haurum
    assert stages(KeepRatio(0.7, rounding="ceil"), 196, 3) == [138, 97, 68]  # EViT
    assert stages(KeepRatio(0.7, rounding="ceil"), 196, 3, extra=1) == [139, 99, 71]  # with its fused tokens
    assert [n + 1 for n in stages(Remove(13), 196, 12)] == list(range(184, 40, -13))  # ToMe
    assert stages(Capacity((128, 64, 32)), 196, 4) == [128, 64, 32, 32]
    assert stages(KeepRatio((0.7, 0.39, 0.21), of="start"), 196, 3) == [137, 76, 41]
    assert Remove(8, inflect=-1).schedule(12) == [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    assert Remove(8, inflect=-1).schedule(1) == [8]


def test_noise_in_a_product_takes_no_token() -> None:
    """In floating point 100 * 0.29 is 28.999999999999996, and 100 * 0.7 ** 2 is 48.99999999999999."""
    assert KeepRatio(0.29).keep(100, Place()) == 29
    assert stages(KeepRatio(0.7, of="start"), 100, 2) == [70, 49]
    assert KeepRatio(0.55, rounding="ceil").keep(100, Place()) == 55  # 55.00000000000001


def test_schedules_of_the_authors() -> None:
    z, config = golden("tome_schedules")
    for case in config["cases"]:
        r = case["r"]
        budget = Remove(tuple(r)) if isinstance(r, list) else Remove(r, inflect=case["inflect"])
        assert budget.schedule(case["layers"]) == z[case["case"]].tolist()


BUDGETS = st.one_of(
    st.builds(Remove, st.integers(0, 300), st.floats(-1, 1)),
    st.builds(KeepRatio, st.floats(0.01, 1), st.sampled_from(["current", "start"]),
              st.sampled_from(["floor", "ceil", "round"])),
    st.builds(Capacity, st.integers(1, 300)),
    st.sampled_from([Threshold(0.1), Mass(0.5), Outliers()]),
)  # fmt: skip


@given(BUDGETS, st.integers(0, 200), st.integers(0, 11))
def test_a_budget_never_leaves_its_range(budget, free, stage) -> None:
    at = Place(layer=stage, layers=12, stage=stage, stages=12, start=200)
    kept = budget.keep(free, at)
    assert isinstance(kept, int)
    assert 0 <= kept <= free
    if not budget.adaptive:
        counts = budget.counts(free, at, least=1)
        assert counts[-1] == max(kept, min(1, free))
        assert all(min(1, n) <= k <= n for n, k in enumerate(counts))
        assert all(a <= b for a, b in pairwise(counts))  # longer samples never keep fewer


def test_only_the_request_itself_is_noted() -> None:
    said: list[str] = []
    assert Remove(5).counts(9, Place(note=said.append)) == [0, 0, 0, 0, 0, 0, 1, 2, 3, 4]
    assert said == []
    assert Remove(5).counts(3, Place(layer=2, note=said.append)) == [0, 0, 0, 0]
    assert said == ["layer 2: asked to remove 5, only 3 free"]


@pytest.mark.parametrize(("make", "says"), [
    (lambda: Remove(-1), r"r=-1: r counts tokens that go"),
    (lambda: Remove((3, 1.5)), r"r=\(3, 1.5\)"),
    (lambda: Remove(3, inflect=2), r"inflect=2 is outside \[-1, 1\]"),
    (lambda: KeepRatio(0.0), r"keep=0.0 is outside \(0, 1\]"),
    (lambda: KeepRatio((0.5, 1.2)), r"keep=1.2"),
    (lambda: Capacity(0), r"tokens=0"),
    (lambda: Mass(1.5), r"mass=1.5"),
    (lambda: Outliers(-1), r"factor=-1 is negative"),
    (lambda: Mass(0.5).counts(5, Place()), r"Mass\(share=0.5\) depends on scores"),
])  # fmt: skip
def test_bad_values_are_named(make, says) -> None:
    with pytest.raises(BudgetError, match=says):
        make()


def test_a_share_of_some_tokens_keeps_one_at_least() -> None:
    for rounding in ("floor", "round", "trunc"):
        assert [KeepRatio(0.1, rounding=rounding).keep(n, Place()) for n in (0, 1, 3, 4)] == [0, 1, 1, 1]
