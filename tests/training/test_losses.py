"""Losses, costs and schedules against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fewer.core.learned import straight_through
from fewer.training import costs, losses


def test_the_ratio_loss_averages_stages_and_samples() -> None:
    keep = {0: torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]]), 1: torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])}
    by_hand = ((0.5 - 0.7) ** 2 + (1 - 0.7) ** 2 + (0.25 - 0.5) ** 2 + (0 - 0.5) ** 2) / 4
    assert losses.ratio(keep, {0: 0.7, 1: 0.5}).item() == pytest.approx(by_hand)


def test_logit_kl_is_from_the_teacher() -> None:
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert_close(losses.logit_kl(student, teacher), (p * (p / q).log()).sum(-1).mean())
    assert losses.logit_kl(teacher, teacher).item() == pytest.approx(0, abs=1e-7)


def test_token_losses_see_kept_tokens_only() -> None:
    student, teacher = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    keep = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1]], requires_grad=True)
    rows = keep.detach() > 0
    p, q = teacher[rows].softmax(-1), student[rows].softmax(-1)
    assert_close(losses.token_kl(student, teacher, keep), (p * (p / q).log()).sum(-1).mean())
    mse = losses.token_mse(student, teacher, keep)
    assert_close(mse, (student[rows] - teacher[rows]).square().mean())
    assert not mse.requires_grad
    assert losses.token_mse(student, teacher, torch.zeros(2, 4)).item() == 0


def test_straight_through_has_one_value_and_the_other_gradient() -> None:
    soft = torch.tensor([0.3, 0.7], requires_grad=True)
    value = straight_through(torch.tensor([0.0, 1.0]), soft * 2)
    assert value.tolist() == [0, 1]
    value.sum().backward()
    assert soft.grad.tolist() == [2, 2]


def test_the_cost_of_published_models() -> None:
    """DeiT-S at 4.60 GFLOPs, with DynamicViT keep 0.7 at 2.88; tokens as in the fact sheets, class token included."""
    linear, rest = [(4 * 384**2, 8 * 384**2)] * 12, 196 * 768 * 384
    full = costs.vit_macs([197] * 12, [197] * 12, linear, 384, rest)
    assert round(full / 1e9, 2) == 4.60
    stages = [197] * 3 + [138] * 3 + [97] * 3 + [68] * 3
    assert round(costs.vit_macs(stages, stages, linear, 384, rest) / 1e9, 2) == 2.88


def test_the_cost_has_the_gradient_of_its_formula() -> None:
    n = torch.tensor(10.0, requires_grad=True)
    costs.vit_macs([17, n], [n, n], [(3, 5), (3, 5)], 4, 7).backward()
    assert n.grad.item() == 5 + 3 + 2 * 4 * 2 * 10 + 5
