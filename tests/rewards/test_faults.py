"""What must hold for each reward, and a planted fault for each, which must be seen."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from fewer.rewards import DAST, FAST, LCPO, Batch, Kimi, O1Pruner, Overlong, Repetition, Reward, Sum, ThinkPrune, ZipR1
from fewer.rewards.batch import Rewards

Answers = list[tuple[bool, int]]


def earned(reward: Reward, answers: Answers, prompts: str | None = None, **columns: Any) -> list[Any]:
    """What (right, tokens) earn; each letter of `prompts` is a prompt."""
    return reward(
        prompts=list(prompts or "a" * len(answers)), answer=[1] * len(answers),
        completions=[r"\boxed{1}" if right else "no" for right, _ in answers],
        completion_ids=[[0] * n for _, n in answers], **columns,
    )  # fmt: skip


def the_last_token_counts(reward: Reward) -> None:
    assert earned(reward, [(True, 7), (True, 8), (True, 9)]) == [1, 1, 0]


def a_wrong_answer_never_earns(reward: Reward) -> None:
    found = earned(reward, [(True, 10), (True, 30), (False, 10), (False, 30)])
    assert max(found[2:]) <= 0
    assert found[2] >= found[3]


def another_prompt_changes_nothing(reward: Reward) -> None:
    alone = earned(reward, [(True, 10), (True, 30)])
    assert earned(reward, [(True, 10), (True, 30), (True, 500), (False, 1)], "aabb")[:2] == pytest.approx(alone)


def no_jumps(reward: Reward) -> None:
    found = earned(reward, [(True, n) for n in range(70, 120)])
    assert max(abs(a - b) for a, b in itertools.pairwise(found)) <= 1 / 20 + 1e-9


def both_sides_alike(reward: Reward) -> None:
    below, above, at = earned(reward, [(True, 900), (True, 1100), (True, 1000)], num_tokens=[1000] * 3)
    assert below == pytest.approx(above)
    assert at > below


def right_outweighs_short(reward: Reward) -> None:
    found = earned(reward, [(True, 150), (False, 50), (True, 100), (False, 100)])
    assert min(found[0], found[2]) > max(found[1], found[3])


def reading_nothing_is_not_enough(reward: Reward) -> None:
    found = earned(reward, [(True, 5), (True, 5), (False, 5)], token_ratio=[0.2, 1.0, 0.0])
    assert found[0] > found[1] > found[2]


def thinking_longer_pays_where_it_is_hard(reward: Reward) -> None:
    easy, hard = [(True, 10), (True, 30)], [(False, 10), (False, 30)]
    found = earned(reward, easy + hard, "aabb")
    assert found[0] > found[1]
    assert found[2] < found[3]


def only_repeats_pay(reward: Reward) -> None:
    texts = {"completions": ["", ""], "completion_ids": [[1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1, 2]]}
    found = reward(**texts)
    assert found[0] == 0 > found[1]


def weights_weigh(reward: Reward) -> None:
    right, wrong = earned(reward, [(True, 100), (False, 1)])
    assert right > wrong  # the length term is at most a tenth


class LimitLeavesItsTokenOut(ThinkPrune):
    def judge(self, batch: Batch) -> Rewards:
        assert isinstance(self.limit, int)
        return ThinkPrune(self.limit - 1).judge(batch)


class PaysForGivingUp(Kimi):
    def judge(self, batch: Batch) -> Rewards:
        return Kimi(self.weight, correct=lambda *_: True).judge(batch)


class OnePot(Kimi):
    def judge(self, batch: Batch) -> Rewards:
        return super().judge(Batch(["?"] * len(batch), batch.completions, batch.ids, batch.columns))


class OnePotOfDAST(DAST):
    def judge(self, batch: Batch) -> Rewards:
        return super().judge(Batch(["?"] * len(batch), batch.completions, batch.ids, batch.columns))


class FallsAtOnce(Overlong):
    def judge(self, batch: Batch) -> Rewards:
        return [0.0 if n <= self.longest else -1.0 for n in batch.lengths]


class NoAbsoluteValue(LCPO):
    def judge(self, batch: Batch) -> Rewards:
        return [1 - self.alpha * (n - 1000) for n in batch.lengths]


class PaysForReadingNothing(ZipR1):
    def judge(self, batch: Batch) -> Rewards:
        return ZipR1(2.0, gated=False).judge(batch)


class AlwaysBrief(FAST):
    def judge(self, batch: Batch) -> Rewards:
        return FAST(correct=lambda *_: True, complexity=None).judge(batch)


class SingleTokens(Repetition):
    def judge(self, batch: Batch) -> Rewards:
        return Repetition(1).judge(batch)


class WeightsForgotten(Sum):
    def __call__(self, *args: Any, **given: Any) -> Rewards:
        return Sum(self.parts)(*args, **given)


class PerToken(Overlong):
    """Not faulty: a length term without a bound."""

    def judge(self, batch: Batch) -> Rewards:
        return [-float(n) / 50 for n in batch.lengths]


PARTS = (ThinkPrune(4000), PerToken(2, 1))
CASES: list[tuple[Callable[[Reward], None], Reward, Reward]] = [
    (the_last_token_counts, ThinkPrune(8), LimitLeavesItsTokenOut(8)),
    (a_wrong_answer_never_earns, Kimi(), PaysForGivingUp()),
    (another_prompt_changes_nothing, Kimi(), OnePot()),
    (another_prompt_changes_nothing, DAST(1000), OnePotOfDAST(1000)),
    (no_jumps, Overlong(100, 20), FallsAtOnce(100, 20)),
    (both_sides_alike, LCPO("exact"), NoAbsoluteValue("exact")),
    (right_outweighs_short, O1Pruner(lam=3.0), O1Pruner(lam=0.5)),
    (right_outweighs_short, DAST(1000), Overlong(1000, 1000)),
    (reading_nothing_is_not_enough, ZipR1(0.5), PaysForReadingNothing()),
    (thinking_longer_pays_where_it_is_hard, FAST(), AlwaysBrief()),
    (only_repeats_pay, Repetition(2), SingleTokens(2)),
    (weights_weigh, Sum(PARTS, (1.0, 0.05)), WeightsForgotten(PARTS, (1.0, 0.05))),
]
IDS = [f"{check.__name__}-{type(sound).__name__}" for check, sound, _ in CASES]


@pytest.mark.parametrize(("check", "sound", "faulty"), CASES, ids=IDS)
def test_it_holds_and_its_fault_is_seen(check: Callable[[Reward], None], sound: Reward, faulty: Reward):
    check(sound)
    with pytest.raises(AssertionError):
        check(faulty)
