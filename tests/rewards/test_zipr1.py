"""The reward for sparsity: right answers only, against their group, and what a bandit makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fewer.rewards import RewardError, ZipR1, grpo
from fewer.rewards.zipr1 import kept_share, smallest, zipped

SHARES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 1.0)


def test_the_smallest_set_that_holds_the_share():
    attention = torch.tensor(
        [[0.1, 0.5, 0.1, 0.3], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]]
    )
    assert smallest(attention, (0.8, 0.5, 0.9, 1.0)).long().tolist() == [
        [0, 1, 0, 1],
        [1, 1, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 1],
    ]
    valid = torch.tensor([[True, False, True, True]])
    assert smallest(attention[:1], (0.5,), valid).tolist() == [[False, False, False, True]]
    with pytest.raises(ValueError, match="2 shares for 4"):
        smallest(attention, (0.5, 0.5))


def test_the_share_is_counted_over_the_layers():
    keeps = [torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool(), torch.tensor([[1, 0, 0, 0], [1, 0, 0, 1]]).bool()]
    assert kept_share(keeps).tolist() == [3 / 8, 6 / 8]
    valid = torch.tensor([[True, True, False, False], [True, True, True, True]])
    assert kept_share(keeps, valid).tolist() == [3 / 4, 6 / 8]
    everything = smallest(torch.rand(2, 5), (1.0, 1.0))
    assert kept_share([everything, everything]).tolist() == [1.0, 1.0]  # a share of 1 is dense
    attention = torch.tensor([[0.91, 0.03, 0.03, 0.03], [0.25, 0.25, 0.25, 0.25]])
    peaked, even = kept_share([smallest(attention, (0.9, 0.9))]).tolist()
    assert (peaked, even) == (0.25, 1.0)


def test_only_right_answers_earn_by_being_short():
    right, ratio = torch.tensor([1, 1, 0, 0]), torch.tensor([0.2, 1.0, 0.0, 1.0])
    assert_close(zipped(right, ratio, 0.5), torch.tensor([1.4, 1.0, 0.0, 0.0]))
    assert_close(zipped(right, ratio, 0.0, form=torch.full((4,), 0.1)), torch.tensor([1.1, 1.1, 0.1, 0.1]))
    with pytest.raises(RewardError, match="weight=-1"):
        zipped(right, ratio, -1.0)


def test_the_reward_of_a_trainer_says_the_same():
    texts, answers = [r"\boxed{1}", r"\boxed{1}", r"\boxed{2}", r"\boxed{2}"], [1, 1, 1, None]
    ratio = [0.2, 1.0, 0.0, 0.5]
    found = ZipR1(0.5)(completions=texts, answer=answers, token_ratio=ratio)
    assert found == [pytest.approx(1.4), 1.0, 0.0, None]
    assert found[:3] == pytest.approx(zipped(torch.tensor([1, 1, 0]), torch.tensor(ratio[:3]), 0.5).tolist())
    assert ZipR1(0.5, gated=False)(completions=texts, answer=answers, token_ratio=ratio)[2] == 0.5  # empty-handed, paid
    with pytest.raises(RewardError, match=r"token_ratio\[1\]=1.5 is outside \[0, 1\]"):
        ZipR1()(completions=texts, answer=answers, token_ratio=[1.0, 1.5, 1.0, 1.0])
    with pytest.raises(RewardError, match="no column 'token_ratio'; there are: answer"):
        ZipR1()(completions=texts, answer=answers)


def scene(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Attention of n prompts over 16 tokens, and the token each answer needs: the second most attended one.

    A fifth of the attention or so is spread thinly over all the others, so that much can go and little should."""
    draw = torch.Generator().manual_seed(seed)
    attention = 0.2 * torch.rand(n, 16, generator=draw).softmax(-1)
    two = torch.rand(n, 16, generator=draw).argsort(dim=-1)[:, :2]
    heights = torch.tensor([0.5, 0.3]) + 0.05 * torch.rand(n, 2, generator=draw)
    attention = attention.scatter(1, two, heights)
    return attention / attention.sum(-1, keepdim=True), two[:, 1]


def play(weight: float, shares: tuple[float, ...] = SHARES, steps: int = 40) -> tuple[list[float], list[float], Tensor]:
    """A policy that draws the share of attention to keep, and nothing else, on 6 prompts a step with 8 rollouts each.

    Returns the mean kept ratio and the accuracy of every step, and by how much the policy's logits have moved."""
    torch.manual_seed(0)
    start = torch.linspace(-2, 2, len(shares))  # at first it reads nearly everything
    logits = start.clone().requires_grad_()
    before = start.log_softmax(-1)
    optimiser = torch.optim.Adam([logits], lr=0.1)
    ratios, accuracies = [], []
    for step in range(steps):
        attention, needed = (x.repeat_interleave(8, 0) for x in scene(6, step))
        action = torch.multinomial(logits.detach().softmax(-1), len(attention), replacement=True)
        keep = smallest(attention, [shares[a] for a in action.tolist()])
        right, ratio = keep.gather(1, needed[:, None])[:, 0], keep.float().mean(-1)
        gain = grpo.advantages(zipped(right, ratio, weight), 8)
        logp = logits.log_softmax(-1)[action][:, None]
        loss = grpo.loss(logp, logp.detach(), gain, torch.ones_like(logp), reference=before[action][:, None], beta=0.01)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        ratios.append(ratio.mean().item())
        accuracies.append(right.float().mean().item())
    return ratios, accuracies, (logits.detach() - start).abs()


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_a_bandit_reads_less_and_stays_right():
    ratios, accuracies, _ = play(weight=1.0)
    assert mean(ratios[:5]) > 0.5
    assert mean(ratios[-10:]) < 0.2  # two tokens of sixteen are what it takes
    assert mean(accuracies[-10:]) >= mean(accuracies[:5])


def test_without_the_reward_it_does_not_read_less():
    ratios, accuracies, _ = play(weight=0.0)
    assert mean(ratios[-10:]) >= mean(ratios[:5])
    assert mean(accuracies[-10:]) >= mean(accuracies[:5])


def test_without_the_reward_a_policy_that_is_always_right_stays_where_it_is():
    _, accuracies, moved = play(weight=0.0, shares=(0.8, 0.9, 0.95, 1.0), steps=10)
    assert set(accuracies) == {1.0}
    assert moved.max() < 1e-6
    assert play(weight=1.0, shares=(0.8, 0.9, 0.95, 1.0), steps=10)[2].max() > 0.1
