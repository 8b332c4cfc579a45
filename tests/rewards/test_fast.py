"""FAST's reward against hand-made tables and an independent, slow version of the authors' rule."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.rewards import FAST, RewardError
from fewer.rewards.fast import betas, ranked, thought, worth

RIGHT, WRONG = r"\boxed{1}", r"\boxed{2}"
SHARES = {"form_weight": 0.0, "thinking_weight": 1.0}


def made(groups: list[list[tuple[bool, int]]]) -> dict[str, Any]:
    """A batch of (right, tokens)."""
    flat = [each for group in groups for each in group]
    return {
        "prompts": [str(i) for i, group in enumerate(groups) for _ in group],
        "completions": [RIGHT if right else WRONG for right, _ in flat],
        "completion_ids": [[0] * n for _, n in flat],
        "answer": [1] * len(flat),
    }


EASY = [(True, 10), (True, 20), (False, 30), (True, 20)]  # mean 20, three of four right
HARD = [(False, 10), (False, 100), (True, 20), (False, 30)]  # mean 40, one of four right


def test_the_four_cases():
    """Right and wrong, easy and hard; a wrong answer to a hard question may gain at most 1 by its length."""
    found = FAST(**SHARES)(**made([EASY, HARD]))
    assert found == pytest.approx([1 + 0.5, 1 + 0.0, 0, 1 + 0.0, 0.25 - 1, 1.0, 1.0, 0.75 - 1])
    only = FAST(**SHARES, average="batch")(**made([EASY, HARD]))  # mean 30
    assert only == pytest.approx([1 + 2 / 3, 1 + 1 / 3, 0, 1 + 1 / 3, 1 / 3 - 1, 1.0, 1.0, 0.0])


def test_the_sum_has_the_weights_of_the_paper():
    given = made([EASY, HARD])
    given["completions"][0] = r"<think>so</think>\boxed{1}"
    plain, formed = FAST(**SHARES)(**made([EASY, HARD])), FAST()(**given)
    assert formed[0] == pytest.approx(1 + 0.5 + 0.5 * 0.5)
    assert formed[4] == pytest.approx(0.5 * plain[4])
    assert FAST(form=lambda text: True)(**given)[4] == pytest.approx(0.5 + 0.5 * plain[4])


@pytest.mark.parametrize(
    ("text", "well"),
    [
        (r"<think>a</think> so \boxed{1}.", True), (r"<think>\boxed{1}</think> so", False), (r"\boxed{1}", False),
        (r"<think>a \boxed{1}", False), (r"well <think>a</think>\boxed{1}", False),
    ],
)  # fmt: skip
def test_the_form(text: str, well: bool):
    assert thought(text) is well


def test_complexity_makes_a_question_hard():
    groups = [[(False, 10), (True, 30)] for _ in range(5)]
    level = FAST(**SHARES)(**made(groups))
    assert level == [0.0, 0.5] * 5  # all alike, none above the 80th percentile: thinking pays nowhere
    one = FAST(**SHARES, complexity="detail")(**made(groups), detail=[1, 1, 2, 2, 9, 9, 3, 3, 4, 4])
    assert one == [0.0, 0.5] * 2 + [-0.5, 1.0] + [0.0, 0.5] * 2


def test_ranks():
    assert ranked([3.0, 1.0, 9.0]) == [0.5, 0.0, 1.0]
    assert ranked([1.0, 1.0, 5.0]) == [0.25, 0.25, 1.0]
    assert ranked([2.0, 2.0]) == [0.5, 0.5]
    assert ranked([2.0]) == [0.5]
    assert ranked([]) == []


def test_the_quota_goes_to_the_shortest():
    groups = [[(True, 10), (True, 20), (True, 30), (True, 40)]]
    assert FAST(**SHARES, quota=0.5)(**made(groups)) == pytest.approx([1.6, 1.2, 1.0, 1.0])
    assert FAST(**SHARES, quota=0.0)(**made(groups)) == [1.0] * 4
    assert FAST(**SHARES, quota=1.0)(**made(groups)) == pytest.approx([1.6, 1.2, 0.8, 0.4])
    tied = [[(True, 10), (True, 20), (True, 20), (True, 30)]]
    assert FAST(**SHARES, quota=0.5)(**made(tied)) == pytest.approx([1.5, 1.0, 1.0, 1.0])  # all who tie, or none


BATCH = st.lists(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), min_size=4, max_size=4), min_size=1, max_size=4)


def shuffled(given: dict[str, Any], size: int, seed: int) -> tuple[dict[str, Any], list[int]]:
    """The same batch with the groups, and the completions of each, in another order; and where each came from."""
    draw = random.Random(seed)
    groups = [list(range(i, i + size)) for i in range(0, len(given["prompts"]), size)]
    draw.shuffle(groups)
    for group in groups:
        draw.shuffle(group)
    order = [i for group in groups for i in group]
    return {name: [values[i] for i in order] for name, values in given.items()}, order


def depends_on_order(reward: FAST, given: dict[str, Any]) -> bool:
    plain = reward(**given)
    for seed in range(6):
        other, order = shuffled(given, reward.num_generations or 4, seed)
        if reward(**other) != pytest.approx([plain[i] for i in order]):
            return True
    return False


@given(BATCH)
def test_the_order_of_a_batch_changes_nothing(groups: list[list[tuple[bool, int]]]):
    for average in ("group", "batch"):
        assert not depends_on_order(FAST(**SHARES, average=average, quota=0.5, num_generations=4), made(groups))


def test_the_authors_rule_depends_on_the_order():
    """What the test above guards against is there, where it is asked for: the check can fail."""
    given = made([[(True, 1)] * 4, [(True, 1)] * 2 + [(False, 1)] * 2])
    given["completions"] = [r"\boxed{1}" + "." * i if right else WRONG for i, right in enumerate([1] * 6 + [0] * 2)]
    assert depends_on_order(FAST(**SHARES, fidelity="code", quota=0.3, num_generations=4), given)


def authors(texts: list[str], grades: list[bool], group: int, complexity: list[float]) -> list[float]:
    """The released rule in words of our own, one completion after another: characters, one mean, first come."""
    texts = [re.sub(r"\s*([<>/])\s*", r"\1", text) for text in texts]
    mean = sum(map(len, texts)) / len(texts)
    share = [sum(grades[i : i + group]) / group for i in range(0, len(texts), group)]
    difficulty = [(1 - p) * c for p, c in zip(share, complexity, strict=True)]
    edge = np.percentile(difficulty, 80)
    left, found = 0.8 * len(texts), []
    for i, (text, right) in enumerate(zip(texts, grades, strict=True)):
        hard, x = difficulty[i // group] > edge, len(text) / mean
        bonus = 0.0
        if right and not hard and left > 0:
            left -= 1
            bonus = 1 - x
        elif not right and hard:
            bonus = min(x - 1, 1)
        found.append(right + 0.5 * thought(text) + 0.5 * bonus)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_with_the_code_of_the_authors(seed: int):
    draw = random.Random(seed)
    texts, grades, detail = [], [], []
    for _ in range(5):
        rate, value = draw.random(), draw.choice([1.0, 2.0, 3.0])
        for _ in range(8):
            right = draw.random() < rate
            think = "<think>" + " a / b " * draw.randint(0, 20) + "</think>"
            texts.append(draw.choice(["", think]) + "x" * draw.randint(0, 60) + (RIGHT if right else WRONG))
            grades.append(right)
            detail.append(value)
    reward = FAST(fidelity="code", complexity="detail", num_generations=8)
    found = reward(completions=texts, answer=[1] * 40, detail=detail)  # asks for no tokens
    assert found == pytest.approx(authors(texts, grades, 8, ranked(detail[::8])))


def test_the_penalty_grows_with_difficulty():
    assert betas([1.0, 0.0, 0.5], 2).tolist() == pytest.approx([0.001, 0.001, 0.01, 0.01, 0.0055, 0.0055])
    with pytest.raises(RewardError, match=r"passed=\[2\]: needs the share"):
        betas([2], 1)
    with pytest.raises(RewardError, match=r"low=0\.1, high=0\.01"):
        betas([0.5], 1, 0.1, 0.01)
    assert betas([0.5], 1).dtype == torch.float32


def test_what_is_learnt_from():
    assert [worth(p, 0.0) for p in (0.0, 0.3, 0.31, 0.98, 0.99, 1.0)] == [False, False, True, True, False, False]
    assert [worth(p, 0.5) for p in (0.0, 0.02, 0.69, 0.7, 1.0)] == [False, True, True, False, False]
    assert worth(0.2, 0.49) != worth(0.2, 0.51)
    with pytest.raises(RewardError, match=r"progress=1\.1 is outside"):
        worth(0.5, 1.1)


def test_groups_that_are_not_worth_it_are_not_judged():
    given = made([EASY, HARD])
    early, late = (
        FAST(sampling=True)(**given, trainer_state=SimpleNamespace(global_step=step, max_steps=10)) for step in (1, 9)
    )
    assert [r is None for r in early] == [False] * 4 + [True] * 4
    assert [r is None for r in late] == [True] * 4 + [False] * 4
    with pytest.raises(RewardError, match=r"sampling=True goes by how far the training is"):
        FAST(sampling=True)(**given)
