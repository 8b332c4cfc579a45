"""A limit that counts, a schedule that waits, and a policy that gets shorter round by round."""

from __future__ import annotations

import json

import pytest
import torch

from fewer.rewards import RewardError, Rounds, ThinkPrune, grpo
from fewer.rewards.thinkprune import told

RIGHT = r"therefore \boxed{1}"


def earned(reward: ThinkPrune, lengths: list[int], texts: list[str] | None = None) -> list[float | None]:
    count = len(lengths)
    return reward(completions=texts or [RIGHT] * count, completion_ids=[[0] * n for n in lengths], answer=[1] * count)


def test_the_limit_is_the_last_token_that_counts():
    assert earned(ThinkPrune(8), [1, 7, 8, 9, 4000]) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert earned(ThinkPrune(8), [8, 8], ["no box", r"\boxed{2}"]) == [0.0, 0.0]


def test_what_was_cut_off_stays_with_its_own_grade():
    """A truncated completion is graded as it is and earns a number: None would take it out of the loss."""
    assert earned(ThinkPrune(8), [8, 8], [r"so \boxed{1} or else", r"so \boxed{"]) == [1.0, 0.0]


def test_a_longer_completion_is_graded_by_its_beginning():
    words = ["so", r"\boxed{1}", "or", r"\boxed{2}"]

    def decode(ids):
        return " ".join(words[i] for i in ids)

    given = {"completions": [decode(range(4))], "completion_ids": [[0, 1, 2, 3]], "answer": [1]}
    assert [ThinkPrune(n, decode=decode)(**given) for n in (1, 2, 3, 4)] == [[0.0], [1.0], [1.0], [0.0]]
    assert [ThinkPrune(n)(**given) for n in (1, 2, 3, 4)] == [[0.0]] * 4


def test_a_round_ends_when_the_score_no_longer_rises():
    rounds = Rounds((40, 30, 20), patience=2)
    assert [rounds.observe(score) for score in (0.5, 0.6, 0.6, 0.7, 0.7)] == [False] * 5
    assert (rounds.limit, rounds.round, rounds.best, rounds.done) == (40, 0, None, False)
    assert rounds.observe(0.65)
    assert (rounds.limit, rounds.round, rounds.best, rounds.done) == (30, 1, 3, False)  # the first 0.7
    assert [rounds.observe(score) for score in (0.2, 0.1, 0.1)] == [False, False, True]  # scores of one round do not
    assert (rounds.limit, rounds.best) == (20, 6)  # stand in the way of the next
    assert [rounds.observe(score) for score in (0.3, 0.3, 0.3)] == [False, False, True]
    assert (rounds.limit, rounds.best, rounds.done) == (20, 9, True)
    with pytest.raises(RewardError, match=r"all rounds \(40, 30, 20\) are over"):
        rounds.observe(1.0)


def test_a_rise_may_have_to_be_a_real_one():
    rounds = Rounds((40, 30), patience=1, least=0.05)
    assert [rounds.observe(score) for score in (0.50, 0.56, 0.60)] == [False, False, True]


def test_the_reward_follows_the_rounds():
    rounds = Rounds((8, 4), patience=1)
    reward = ThinkPrune(rounds)
    assert earned(reward, [6]) == [1.0]
    rounds.observe(1.0)
    rounds.observe(1.0)
    assert earned(reward, [6, 4]) == [0.0, 1.0]


def test_rounds_survive_a_restart():
    rounds = Rounds((40, 30, 20), patience=1)
    for score in (0.5, 0.4, 0.3):
        rounds.observe(score)
    again = Rounds((40, 30, 20), patience=1)
    again.load_state_dict(json.loads(json.dumps(rounds.state_dict())))
    assert again == rounds
    assert again.observe(0.2) == rounds.observe(0.2) is True
    with pytest.raises(RewardError, match=r"saved with limits=\(40, 30, 20\), loaded with \(40, 30\)"):
        Rounds((40, 30)).load_state_dict(rounds.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limits": ()}, r"limits=\(\)"),
        ({"limits": (20, 30)}, r"limits=\(20, 30\): .*each below the one before"),
        ({"limits": (20, 20)}, "each below the one before"),
        ({"limits": (20, 0)}, "above 0"),
        ({"patience": 0}, "patience=0: needs a whole number of scores, from 1 up"),
        ({"least": -0.1}, "least=-0.1 is no rise"),
        ({"least": float("nan")}, "least=nan is no rise"),
    ],
)
def test_rounds_that_make_no_sense(settings: dict, message: str):
    with pytest.raises(RewardError, match=message):
        Rounds(**settings)


def test_a_score_that_is_none_is_refused():
    with pytest.raises(RewardError, match="score=nan tells nothing"):
        Rounds().observe(float("nan"))


def test_the_prompt_names_the_limit():
    assert "3000 tokens" in told(3000)


def walk(limits: tuple[int, ...], seed: int) -> list[float]:
    """A policy that may stop after each token and answers right once it has thought for three, trained by the rounds.

    Returns its mean length without any limit but 64 tokens, before the first round and after each."""
    torch.manual_seed(seed)
    going = torch.full((64,), 3.0, requires_grad=True)  # the logit of going on, at each position
    optimiser = torch.optim.Adam([going], lr=0.3)
    rounds = Rounds(limits, patience=3, least=0.01)
    reward = ThinkPrune(rounds)

    def sample(count: int, longest: int) -> torch.Tensor:
        stops = torch.rand(count, longest) > going.detach()[:longest].sigmoid()
        stops[:, -1] = True
        return stops.long().argmax(1) + 1

    def mean() -> float:
        return sample(2000, 64).float().mean().item()

    found = [mean()]
    while not rounds.done:
        lengths = sample(128, rounds.limit)
        cut = lengths == rounds.limit  # no room left for the answer
        texts = [RIGHT if n > 3 and not c else "hm" for n, c in zip(lengths.tolist(), cut.tolist(), strict=True)]
        earns = torch.tensor(earned(reward, lengths.tolist(), texts))
        mask = torch.arange(rounds.limit) < lengths[:, None]
        stop = torch.arange(rounds.limit) == lengths[:, None] - 1
        signs = torch.where(stop, -1.0, 1.0) * going[: rounds.limit]
        logps = torch.nn.functional.logsigmoid(signs).expand(128, -1)
        optimiser.zero_grad()
        grpo.loss(logps, logps.detach(), grpo.advantages(earns, 8), mask.bool()).backward()
        optimiser.step()
        before = rounds.round
        if rounds.observe(earns.mean().item()):
            assert before + 1 == rounds.round or rounds.done
            found.append(mean())
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lengths_fall_round_by_round(seed: int):
    found = walk((24, 12, 6), seed)
    assert len(found) == 4
    assert found == sorted(found, reverse=True), found
    assert found[-1] < found[0] / 2, found
