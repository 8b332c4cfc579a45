"""L1, O1-Pruner, DAST, Kimi and what shapes a reward: tables by hand, and orders that must hold."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fewer.rewards import DAST, LCPO, Cosine, Kimi, O1Pruner, Overlong, Repetition, RewardError, dast, lcpo, o1_pruner

LENGTH = st.integers(1, 5000)
ANSWERS = st.lists(st.tuples(st.booleans(), LENGTH), min_size=2, max_size=8)


def earned(reward: Any, answers: list[tuple[bool, int]], **columns: Any) -> list[Any]:
    """What one group's (right, tokens) earn."""
    count = len(answers)
    return reward(
        prompts=["?"] * count, completions=[r"\boxed{1}" if right else "no" for right, _ in answers],
        completion_ids=[[0] * n for _, n in answers], answer=[1] * count, **columns,
    )  # fmt: skip


# -- L1 ---------------------------------------------------------------------------------------------------------------


def test_l1_by_hand():
    answers = [(True, 1000), (True, 900), (True, 1500), (False, 1000), (False, 900)]
    asked = {"num_tokens": [1000] * 5}
    assert earned(LCPO("exact", alpha=1e-3), answers, **asked) == pytest.approx([1.0, 0.9, 0.5, 0.0, -0.1])
    assert earned(LCPO("max", alpha=1e-3), answers, **asked) == pytest.approx([0.5, 0.6, 0.0, 0.0, 0.0])
    code = earned(LCPO("max", alpha=1e-3, fidelity="code"), answers, **asked)
    assert code == pytest.approx([0.5, 0.55, 0.25, 0.0, 0.0])
    few = [(True, 1), (True, 5000)]
    assert earned(LCPO("max"), few, num_tokens=[4000, 100]) == [1.0, 0.0]  # clipped on both sides


@given(LENGTH, LENGTH, st.integers(100, 4000))
def test_l1_falls_with_the_distance(a: int, b: int, asked: int):
    near, far = sorted((a, b), key=lambda n: abs(asked - n))
    first, second, best = earned(LCPO("exact"), [(True, near), (True, far), (True, asked)], num_tokens=[asked] * 3)
    assert first >= second
    assert best == 1.0 >= first
    for fidelity in ("paper", "code"):
        short, long = earned(
            LCPO("max", fidelity=fidelity), [(True, min(a, b)), (True, max(a, b))], num_tokens=[asked] * 2
        )
        assert 1 >= short >= long >= 0


@pytest.mark.parametrize("asked", [-100, 0, None, math.nan])
def test_l1_wants_a_length_that_is_one(asked: Any):
    with pytest.raises(RewardError, match=r"num_tokens\[0\]=.*asks for no length; needs tokens, above 0"):
        earned(LCPO("max"), [(True, 5)], num_tokens=[asked])


def test_l1_asks_in_words_and_draws_lengths():
    assert "exactly 512 tokens" in lcpo.told(512)
    assert "no more than 512 tokens" in lcpo.told(512, "max")
    drawn = lcpo.draw(2000, 100, 103, generator=torch.Generator().manual_seed(0))
    assert set(drawn) == {100, 101, 102, 103}
    assert max(drawn.count(n) for n in set(drawn)) < 600
    with pytest.raises(RewardError, match="lengths from 5 to 4"):
        lcpo.draw(1, 5, 4)


# -- O1-Pruner --------------------------------------------------------------------------------------------------------


def test_o1_pruner_by_hand():
    answers = [(True, 50), (True, 150), (False, 50), (False, 150)]  # mean 100, half of them right
    assert earned(O1Pruner(), answers) == pytest.approx([1 + 1, 2 / 3 - 1 + 1, 1 - 1, 2 / 3 - 1 - 1])
    assert earned(O1Pruner(lam=0.0), [(True, 1), (True, 1999)]) == pytest.approx([4.0, 1000 / 1999 - 1])  # clipped at 4
    assert earned(O1Pruner(lam=5.0), [(False, 200), (True, 50)])[0] == -2.0  # and at -2
    given = {"length": [300.0] * 4, "rate": [0.25] * 4}
    with_reference = earned(O1Pruner(reference=("length", "rate")), answers, **given)
    assert with_reference == pytest.approx([4.0, 1 + 1.5, 4.0, 1 - 0.5])
    assert o1_pruner.weight(0, True, 3.0, 1.0) == 2.0  # an empty answer divides nothing by zero


@given(st.integers(50, 100), st.integers(101, 200), st.integers(50, 200), st.floats(0, 1))
def test_o1_pruner_orders_answers(short: int, long: int, wrong: int, rate: float):
    """With lambda large enough: short and right, long and right, wrong; here lengths are within a factor of 4."""
    mean = 100.0

    def weight(n: int, right: bool) -> float:
        return o1_pruner.weight(n, right, mean, rate, lam=3.0)

    assert weight(short, True) > weight(long, True) > weight(wrong, False)


def test_a_small_lambda_lets_a_short_wrong_answer_win():
    """The pitfall: the order above is not for free."""
    wrong, right = (o1_pruner.weight(n, r, 100.0, 0.5, lam=0.5) for n, r in ((50, False), (200, True)))
    assert wrong > right


def test_o1_pruner_standardises_after_the_clip():
    weights = torch.tensor([1.0, 2.0, 3.0, 6.0])
    found = o1_pruner.standardised(weights)
    assert found.mean().abs() < 1e-6
    assert found.std().item() == pytest.approx(1)
    assert o1_pruner.standardised(torch.full((3,), 0.7)).tolist() == [0.0] * 3
    assert o1_pruner.standardised(torch.tensor([2.0])).tolist() == [0.0]


def test_o1_pruner_objective_by_hand():
    reference = torch.tensor([[-1.0, -1.0, 9.0], [-2.0, 9.0, 9.0], [-1.0, -1.0, -1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    logps = reference.clone().requires_grad_()
    w = torch.tensor([2.0, -1.0, 0.0])
    value = o1_pruner.objective(logps, reference, w, mask)
    assert value.item() == pytest.approx(-1 / 3)  # every ratio is 1
    (gradient,) = torch.autograd.grad(value, logps)
    assert_close(gradient, torch.tensor([[-1 / 3, -1 / 3, 0], [1 / 3, 0, 0], [0, 0, 0]]))  # none where the weight is 0
    moved = reference + torch.tensor([[0.4, 0.4, 0.0], [-0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    far = o1_pruner.objective(moved, reference, w, mask)
    assert far.item() == pytest.approx((-2 * 1.2 + 0.8) / 3)  # clipped: right ones above, wrong ones below
    garbage = reference.masked_fill(mask == 0, torch.nan)
    assert o1_pruner.objective(garbage, reference, w, mask).item() == pytest.approx(-1 / 3)


# -- DAST -------------------------------------------------------------------------------------------------------------


def test_dast_by_hand():
    assert dast.budget([True, True], [100, 200], 1000) == 150  # never wrong: as long as its answers are
    assert dast.budget([False, False], [100, 200], 1000) == 1000  # hopeless: all there is
    assert dast.budget([True, False], [100, 200], 1000) == 550
    assert [dast.score(True, n, 100) for n in (50, 100, 150, 1000)] == pytest.approx([0.75, 0.5, 0.25, 0.1])
    assert [dast.score(False, n, 100) for n in (10, 50, 100, 1000)] == pytest.approx([-0.91, -0.55, -0.1, -0.1])
    assert earned(DAST(1000), [(True, 100), (False, 200)]) == pytest.approx(
        [0.5 + 0.5 * 450 / 550, -0.9 * 350 / 550 - 0.1]
    )
    with pytest.raises(RewardError, match="0 grades and 0 lengths"):
        dast.budget([], [], 10)


@given(ANSWERS)
def test_dast_puts_right_above_wrong_and_short_above_long(answers: list[tuple[bool, int]]):
    found = earned(DAST(5000), answers)
    for (a, n), x in zip(answers, found, strict=True):
        for (b, m), y in zip(answers, found, strict=True):
            if a and not b:
                assert x > y
            if a and b and n < m:
                assert x >= y


def test_dast_pairs():
    scores, rights = [0.9, 0.5, 0.2, -0.8, -0.1, 0.9], [True, True, True, False, False, True]
    assert dast.pairs(scores, rights, 0.5) == [(0, 2), (4, 3)]
    assert dast.pairs(scores, rights, 0.75) == []
    assert dast.pairs(scores, rights, 0.7) == [(0, 2), (4, 3)]
    assert dast.pairs([], [], 0.5) == []
    with pytest.raises(RewardError, match=r"gap=0 is outside \(0, inf\]"):
        dast.pairs(scores, rights, 0)


# -- Kimi -------------------------------------------------------------------------------------------------------------


def test_kimi_by_hand():
    answers = [(True, 10), (True, 20), (True, 30), (False, 10), (False, 30)]
    assert earned(Kimi(), answers) == [0.5, 0.0, -0.5, 0.0, -0.5]
    assert earned(Kimi(0.1), answers) == pytest.approx([0.05, 0.0, -0.05, 0.0, -0.05])
    assert earned(Kimi(), [(True, 7), (False, 7)]) == [0.0, 0.0]


def test_kimi_judges_each_group_by_itself():
    given = {
        "completions": [r"\boxed{1}"] * 4,
        "completion_ids": [[0] * n for n in (1, 3, 100, 300)],
        "answer": [1] * 4,
    }
    assert Kimi()(prompts=["a", "a", "b", "b"], **given) == [0.5, -0.5, 0.5, -0.5]
    assert Kimi(num_generations=2)(**given) == [0.5, -0.5, 0.5, -0.5]
    assert Kimi(num_generations=4)(**given) != [0.5, -0.5, 0.5, -0.5]


@given(ANSWERS)
def test_kimi_never_pays_for_a_wrong_answer(answers: list[tuple[bool, int]]):
    found = earned(Kimi(), answers)
    assert all(-0.5 <= r <= 0.5 for r in found)
    assert all(r <= 0 for (right, _), r in zip(answers, found, strict=True) if not right)


def test_kimi_waits_for_the_warm_up():
    answers = [(True, 10), (True, 20)]
    steps = [
        earned(Kimi(warmup=5), answers, trainer_state=SimpleNamespace(global_step=n, max_steps=9)) for n in (0, 4, 5)
    ]
    assert steps == [[0.0, 0.0], [0.0, 0.0], [0.5, -0.5]]
    with pytest.raises(RewardError, match="warmup=5 counts steps, and no trainer_state"):
        earned(Kimi(warmup=5), answers)


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_overlong_is_continuous_at_both_knots():
    found = earned(Overlong(100, 20), [(True, n) for n in (1, 79, 80, 81, 90, 99, 100, 101, 5000)])
    assert found == pytest.approx([0, 0, 0, -0.05, -0.5, -0.95, -1, -1, -1])


@given(LENGTH, st.integers(1, 4000), st.integers(0, 1000))
def test_overlong_falls_by_a_token_at_a_time(n: int, cache: int, free: int):
    here, next_one = earned(Overlong(free + cache, cache), [(True, n), (True, n + 1)])
    assert 0 >= here >= next_one >= -1
    assert here - next_one <= 1 / cache + 1e-9


def test_repetition_by_hand():
    def of(ids: list[int], n: int) -> float:
        return Repetition(n)(completions=[""], completion_ids=[ids])[0]

    assert of([1, 2, 3, 4], 2) == 0
    assert of([5] * 5, 2) == pytest.approx(-0.75)  # four pairs, one kind
    assert of([1, 2, 1, 2], 2) == pytest.approx(-1 / 3)
    assert of([1, 2], 3) == 0
    assert of([], 1) == 0
    assert Repetition(1, most=-4.0)(completions=[""], completion_ids=[[1, 1]]) == [-2.0]


def test_cosine_by_hand():
    found = earned(
        Cosine(100), [(True, 1), (True, 50), (True, 100), (False, 50), (False, 100), (True, 101), (False, 101)]
    )
    assert found == pytest.approx([2.0, 1.5, 1.0, -5.0, 0.0, -10.0, -10.0], abs=1e-3)


@given(st.integers(1, 99))
def test_cosine_falls_for_right_and_rises_for_wrong_answers(n: int):
    right, longer, wrong, longer_wrong = earned(Cosine(100), [(True, n), (True, n + 1), (False, n), (False, n + 1)])
    assert right > longer
    assert wrong < longer_wrong
