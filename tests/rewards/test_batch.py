"""What rewards are given, and how they find their way in it."""

from __future__ import annotations

import pickle
import re
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewer import rewards
from fewer.rewards import LCPO, Batch, Correct, Kimi, Overlong, Reward, RewardError, Sum, ThinkPrune

ALL: list[Reward] = [
    rewards.Correct(), rewards.Cosine(100), rewards.DAST(100), rewards.FAST(), rewards.Kimi(), rewards.LCPO("exact"),
    rewards.LCPO("max"), rewards.O1Pruner(), rewards.Overlong(20, 5), rewards.Repetition(2), rewards.ThinkPrune(8),
    rewards.ZipR1(), rewards.Sum((rewards.Correct(), rewards.Overlong(20, 5)), (1.0, 0.5)),
]  # fmt: skip


def named(reward: Reward) -> str:
    """A name that is the same in every process: a repr may hold the address of a function."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(reward))


TEXTS = [r"<think>a</think>\boxed{1}", r"\boxed{2}", "no", r"\boxed{1}", r"\boxed{1}", "1", "", r"\boxed{1"]
GIVEN: dict[str, Any] = {
    "prompts": ["one"] * 4 + ["two"] * 4,
    "completions": TEXTS,
    "completion_ids": [list(range(n)) for n in (9, 4, 1, 12, 5, 5, 1, 20)],
    "answer": [1] * 8,
    "num_tokens": [10] * 8,
    "token_ratio": [0.5] * 8,
    "trainer_state": SimpleNamespace(global_step=3, max_steps=10),
    "log_extra": print,
    "log_metric": print,
}


def test_nothing_is_left_out():
    named = {cls for cls in vars(rewards).values() if isinstance(cls, type) and issubclass(cls, Reward)}
    assert {type(reward) for reward in ALL} == named - {rewards.Reward, rewards.Graded, rewards.Grouped}


@pytest.mark.parametrize("reward", ALL, ids=named)
def test_texts_and_messages_earn_the_same(reward: Reward):
    """As TRL calls them: by keyword, with columns nobody asked for; plain, and as a conversation."""
    plain = reward(**GIVEN)
    assert len(plain) == 8
    assert all(isinstance(r, float) for r in plain)
    messages = {
        "prompts": [[{"role": "user", "content": p}] for p in GIVEN["prompts"]],
        "completions": [[{"role": "assistant", "content": c}] for c in TEXTS],
    }
    assert reward(**GIVEN | messages) == plain
    in_parts = [[{"role": "assistant", "content": [{"type": "text", "text": c}]}] for c in TEXTS]
    assert reward(**GIVEN | {"completions": in_parts}) == plain


@pytest.mark.parametrize("reward", ALL, ids=named)
def test_rewards_are_values_with_names(reward: Reward):
    again = pickle.loads(pickle.dumps(reward))  # trainers send them to other processes
    assert again == reward
    assert again(**GIVEN) == reward(**GIVEN)
    assert reward.__name__.islower()
    assert type(reward).__name__ in repr(reward)


@pytest.mark.parametrize(
    "reward", [r for r in ALL if not isinstance(r, rewards.Overlong | rewards.Repetition)], ids=named
)
def test_without_a_right_answer_there_is_no_reward(reward: Reward):
    """None, which trainers leave out, and the others are judged as if it were not there."""
    given = GIVEN | {"answer": [1, 1, None, 1] + [None] * 4}
    found = reward(**given)
    if isinstance(reward, Sum):  # the part that needs no answer still tells something
        assert found[2] is not None
        return
    assert [r is None for r in found] == [False, False, True, False] + [True] * 4
    kept = [0, 1, 3]
    alone = {k: [v[i] for i in kept] if isinstance(v, list) else v for k, v in given.items()}
    assert [found[i] for i in kept] == pytest.approx(reward(**alone))


@pytest.mark.parametrize("reward", ALL, ids=named)
def test_no_completions_no_rewards(reward: Reward):
    empty = {k: [] if isinstance(v, list) else v for k, v in GIVEN.items()}
    assert reward(**empty) == []


@pytest.mark.parametrize("reward", ALL, ids=named)
def test_what_does_not_fit_is_refused(reward: Reward):
    with pytest.raises(RewardError, match=r"judges completions: pass completions="):
        reward(prompts=["one"])
    with pytest.raises(RewardError, match="7 completion_ids for 8 completions"):
        reward(**GIVEN | {"completion_ids": GIVEN["completion_ids"][:7]})
    with pytest.raises(RewardError, match="its padding would count as tokens"):
        reward(**GIVEN | {"completion_ids": torch.zeros(8, 20)})


def test_what_is_missing_is_named():
    with pytest.raises(RewardError, match=r"completion_ids is missing.*TRL gives it"):
        Overlong(20, 5)(completions=["a"])
    with pytest.raises(RewardError, match=r"no column 'answer'; there are: solution. Add it"):
        Correct()(completions=["a"], solution=[1])
    with pytest.raises(RewardError, match="column 'answer' is str: needs a list of 1 values"):
        Correct()(completions=["a"], answer="1")
    with pytest.raises(RewardError, match="column 'answer' is list: needs a list of 1 values"):
        Correct()(completions=["a"], answer=[1, 2])
    with pytest.raises(RewardError, match="a completion is int"):
        Correct()(completions=[3], answer=[1])
    assert Correct(answer="solution")(completions=[r"\boxed{1}"], solution=torch.tensor([1])) == [1.0]


def test_a_checker_of_your_own():
    def even(text: str, answer: Any) -> bool | None:
        return None if text == "?" else len(text) % 2 == 0

    assert Correct(correct=even)(completions=["ab", "a", "?"], answer=[0, 0, 0]) == [1.0, 0.0, None]
    with pytest.raises(RewardError, match="correct='guess': needs 'boxed'"):
        Correct(correct="guess")


def test_the_text_of_a_conversation():
    turns = [
        {"role": "assistant", "content": "let me look", "tool_calls": []},
        {"role": "tool", "content": r"\boxed{9}"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": [{"type": "text", "text": "it is "}, {"type": "text", "text": r"\boxed{4}"}]},
    ]
    assert Batch(None, [turns], None).texts == ["let me look\n\nit is \\boxed{4}"]  # not what the tool said


def test_groups_by_prompt_and_by_number():
    batch = Batch(["a", "a", "b", "b", "b", "a"], [""] * 6, None)
    assert batch.groups(None) == [[0, 1], [2, 3, 4], [5]]
    assert Batch(None, [""] * 4, None).groups(2) == [[0, 1], [2, 3]]
    assert Batch(["a"] * 4, [""] * 4, None).groups(2) == [[0, 1], [2, 3]]  # a prompt that is there twice
    with pytest.raises(RewardError, match="6 completions are no whole groups of num_generations=4: a group was torn"):
        batch.groups(4)
    with pytest.raises(RewardError, match="completions 2 to 3 answer different prompts, and num_generations=2"):
        Batch(["a", "a", "b", "c"], [""] * 4, None).groups(2)
    with pytest.raises(RewardError, match="neither prompts nor num_generations"):
        Batch(None, [""], None).groups(None)
    tensors = [[{"role": "user", "content": torch.zeros(2)}], [{"role": "user", "content": torch.zeros(2)}]]
    with pytest.raises(RewardError, match="cannot be compared: say num_generations"):
        Batch(tensors, ["", ""], None).groups(None)


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_group_sizes_that_are_none(size: Any):
    with pytest.raises(RewardError, match=r"num_generations=.*or None to go by the prompts"):
        Kimi(num_generations=size)


def test_a_sum():
    both = Sum((Correct(), Overlong(20, 10)), (1.0, 0.5))
    given = {"completions": [r"\boxed{1}", "", ""], "completion_ids": [[0] * 15, [0] * 30, [0] * 5]}
    assert both(**given, answer=[1, 1, None]) == [0.75, -0.5, 0.0]
    assert Sum((Correct(), lambda completions, **_: [None, 1, None]))(**given, answer=[1, 1, None]) == [1.0, 1.0, None]
    assert both.__name__ == "correct+overlong"
    nested = Sum((both, Correct()))
    assert nested(**given, answer=[1, 1, 1])[0] == 1.75
    with pytest.raises(RewardError, match="1 weights for 2 parts"):
        Sum((Correct(), Correct()), (1.0,))
    with pytest.raises(RewardError, match="a sum of no rewards"):
        Sum(())


@pytest.mark.parametrize("reward", ALL, ids=named)
def test_numbers_that_are_none_are_refused(reward: Reward):
    """NaN in any field that holds a number."""
    for field in fields(reward):
        if isinstance(getattr(reward, field.name), float):
            with pytest.raises(RewardError, match=f"{field.name}=nan"):
                type(reward)(**{f.name: getattr(reward, f.name) for f in fields(reward)} | {field.name: float("nan")})


def test_settings_outside_their_range():
    cases: list[tuple[Any, str]] = [
        (lambda: ThinkPrune(0), "limit=0: needs a whole number"),
        (lambda: ThinkPrune(1.5), "limit=1.5: needs a whole number"),
        (lambda: Overlong(10, 0), r"cache=0 is outside \(0, 10\]"),
        (lambda: Overlong(10, 11), r"cache=11 is outside \(0, 10\]"),
        (lambda: rewards.Repetition(0), "n=0: an n-gram has a whole number"),
        (lambda: rewards.Repetition(2, 1.0), r"most=1.0 is outside \[-inf, 0\]: .*minus sign"),
        (lambda: rewards.Cosine(0), r"longest=0 is outside \[1, inf\]"),
        (lambda: rewards.Cosine(10, right=(1.0, 2.0)), "rewards long right answers"),
        (lambda: rewards.Cosine(10, wrong=(0.0, -1.0)), "rewards giving up early"),
        (lambda: rewards.DAST(0), "longest=0: needs a whole number"),
        (lambda: rewards.FAST(hard=1.1), r"hard=1.1 is outside \[0, 1\]: it is a quantile"),
        (lambda: rewards.FAST(quota=-0.1), r"quota=-0.1 is outside \[0, 1\]"),
        (lambda: rewards.FAST(form_weight=-1.0), r"form_weight=-1.0 is outside \[0, inf\]"),
        (lambda: rewards.FAST(average="all"), "average='all' is neither 'group' nor 'batch'"),
        (lambda: rewards.FAST(fidelity="exact"), "fidelity='exact' is neither 'paper' nor 'code'"),
        (lambda: Kimi(-1.0), r"weight=-1.0 is outside \[0, inf\]"),
        (lambda: Kimi(warmup=-1), "warmup=-1: needs a whole number of steps"),
        (lambda: LCPO("most"), "mode='most' is neither 'exact' nor 'max'"),
        (lambda: LCPO(alpha=0.0), r"alpha=0.0 is outside \(0, inf\]"),
        (lambda: LCPO(delta=2.0), r"delta=2.0 is outside \[0, 1\]"),
        (lambda: LCPO(fidelity="exact"), "fidelity='exact'"),
        (lambda: rewards.O1Pruner(-1.0), r"lam=-1.0 is outside \[0, inf\]"),
        (lambda: rewards.O1Pruner(reference=("a",)), "needs two columns"),
        (lambda: rewards.ZipR1(-0.1), r"weight=-0.1 is outside \[0, inf\]"),
    ]
    for make, message in cases:
        with pytest.raises(RewardError, match=message):
            make()
