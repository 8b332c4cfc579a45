"""The reward for sparsity: right answers only, against their group, and what a bandit makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fewer.training.sparsity import advantages, objective, rewards, smallest

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


def test_only_right_answers_earn_by_being_short():
    right, ratio = torch.tensor([1, 1, 0, 0]), torch.tensor([0.2, 1.0, 0.0, 1.0])
    assert_close(rewards(right, ratio, 0.5), torch.tensor([1.4, 1.0, 0.0, 0.0]))
    assert_close(rewards(right, ratio, 0.0, form=torch.full((4,), 0.1)), torch.tensor([1.1, 1.1, 0.1, 0.1]))
    with pytest.raises(ValueError, match="weight=-1"):
        rewards(right, ratio, -1.0)


def test_a_group_is_judged_by_itself():
    a = advantages(torch.tensor([1.0, 3.0, 5.0, 0.3, 0.3, 0.3]), 3)
    assert_close(a, torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]))
    plain = advantages(torch.tensor([1.0, 3.0, 5.0]), 3, scaled=False)
    assert_close(plain, torch.tensor([-2.0, 0.0, 2.0]))
    with pytest.raises(ValueError, match="groups of 4"):
        advantages(torch.zeros(6), 4)
    with pytest.raises(ValueError, match="two answers"):
        advantages(torch.zeros(6), 1)


def test_equal_rewards_give_no_gradient_to_the_bit():
    logp = torch.randn(6, requires_grad=True)
    objective(logp, logp.detach(), advantages(torch.full((6,), 1 / 3), 6)).backward()
    assert (logp.grad == 0).all()


def test_the_objective_by_hand():
    old = torch.zeros(4)
    logp = torch.tensor([0.5, -0.5, 0.5, -0.5]).requires_grad_()
    gain = torch.tensor([1.0, 1.0, -1.0, -1.0])
    up, down = logp[0].exp().item(), logp[1].exp().item()
    loss = objective(logp, old, gain)
    assert loss.item() == pytest.approx((-1.2 - down + up + 0.8) / 4)
    loss.backward()
    assert (logp.grad != 0).tolist() == [False, True, True, False]  # past the clip nothing pulls any further
    at = torch.tensor([0.0, 0.3])
    penalty = objective(at, at, torch.zeros(2), reference=torch.zeros(2), kl=2.0)
    assert penalty.item() == pytest.approx(2 * (torch.tensor(-0.3).exp().item() + 0.3 - 1) / 2)


def test_padding_and_length_of_an_answer_do_not_count():
    logp = torch.tensor([[0.1, 0.2, 9.0], [0.3, 9.0, 9.0]])
    old = torch.zeros(2, 3)
    real = torch.tensor([[True, True, False], [True, False, False]])
    found = objective(logp, old, torch.tensor([1.0, 2.0]), clip=5.0, real=real)
    expected = -((logp[0, :2].exp().mean()) + 2 * logp[1, 0].exp()) / 2
    assert_close(found, expected)


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
        gain = advantages(rewards(right, ratio, weight), 8)
        logp = logits.log_softmax(-1)[action]
        loss = objective(logp, logp.detach(), gain, reference=before[action], kl=0.01)
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
