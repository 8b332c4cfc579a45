"""GRPO's arithmetic: TRL's numbers with their gradients, closed forms, and wrong variants that the goldens catch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fewer.rewards import Overlong, Repetition, grpo

GOLDENS = Path(__file__).parents[1] / "goldens"
NEAR = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(params=[0, 2])
def golden(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    with np.load(GOLDENS / f"trl_grpo_s{request.param}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def parts(golden: dict[str, Tensor], which: str) -> tuple[Tensor, Tensor]:
    """The rewards (B, K) of a golden case, and their weights."""
    right, long = golden["accuracy"].clone(), golden["overlong"].clone()
    if which == "acc":
        return right[:, None], torch.ones(1)
    both = torch.stack([right, long], 1)
    if which == "nan":
        both[3] = torch.nan
        both[5, 1] = torch.nan
    return both, golden["reward_weights"]


@pytest.mark.parametrize("which", ["acc", "accpen", "nan"])
def test_advantages_are_those_of_trl(golden: dict[str, Tensor], which: str):
    rewards, weights = parts(golden, which)
    group = int(golden["num_generations"])
    total = grpo.total(rewards, weights)
    assert_close(total, golden[f"reward.{which}"], equal_nan=True, **NEAR)
    for scale in ("group", "batch", "none"):
        assert_close(grpo.advantages(total, group, scale=scale), golden[f"adv.{which}.{scale}"], **NEAR)
    each = grpo.normalised_each(rewards, group, weights)
    assert_close(each, golden[f"adv.{which}.normalize_then_sum"], **NEAR)


CASES = [(kind, "token") for kind in grpo.LOSSES] + [("grpo", "sequence")]


def run(loss: Callable[..., Tensor], golden: dict[str, Tensor], kind: str, level: str, beta: float) -> list[Tensor]:
    """A loss and its gradient on a golden case."""
    logps = golden["logps"].clone().requires_grad_()
    value = loss(
        logps, golden["old_logps"], golden["adv.accpen.group"], golden["mask"], loss_type=kind, level=level, longest=10,
        reference=golden["ref_logps"], beta=beta,
    )  # fmt: skip
    return [value.detach(), *torch.autograd.grad(value, logps)]


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(("kind", "level"), CASES)
def test_losses_and_gradients_are_those_of_trl(golden: dict[str, Tensor], kind: str, level: str, beta: float):
    value, gradient = run(grpo.loss, golden, kind, level, beta)
    name = f"loss.{kind}.{level}.beta{beta}"
    assert_close(value, golden[name], **NEAR)
    assert_close(gradient, golden[f"{name}.grad"], **NEAR)


def test_every_golden_loss_is_looked_at(golden: dict[str, Tensor]):
    there = {name for name in golden if name.startswith("loss.") and not name.endswith(".grad")}
    assert there == {f"loss.{kind}.{level}.beta{beta}" for kind, level in CASES for beta in (0.0, 0.04)}


def symmetric(*args, **kwargs):
    return grpo.loss(*args, **kwargs, clip=(0.2, 0.2))


def uncapped(*args, **kwargs):
    return grpo.loss(*args, **kwargs, cap=1.28)


def by_tokens(*args, loss_type, **kwargs):
    return grpo.loss(*args, loss_type="bnpo" if loss_type == "grpo" else "grpo", **kwargs)


def no_level(*args, level, **kwargs):
    return grpo.loss(*args, level="token" if level == "sequence" else "sequence", **kwargs)


def other_way(logps, old, *args, reference, **kwargs):
    return grpo.loss(logps, old, *args, reference=2 * logps.detach() - reference, **kwargs)


def all_tokens(logps, old, advantages, mask, **kwargs):
    return grpo.loss(logps, old, advantages, torch.ones_like(mask), **kwargs)


@pytest.mark.parametrize(
    ("wrong", "kind", "level"),
    [
        (symmetric, "dapo", "token"), (uncapped, "cispo", "token"), (by_tokens, "grpo", "token"),
        (by_tokens, "bnpo", "token"), (no_level, "grpo", "sequence"), (no_level, "grpo", "token"),
        (other_way, "dapo", "token"), (all_tokens, "grpo", "token"), (all_tokens, "dr_grpo", "token"),
    ],
)  # fmt: skip
def test_goldens_catch_wrong_variants(wrong: Callable[..., Tensor], kind: str, level: str):
    """Each planted fault misses the golden number or its gradient, on one seed or the other."""
    missed = 0
    for seed in (0, 2):
        with np.load(GOLDENS / f"trl_grpo_s{seed}.npz") as file:
            golden = {name: torch.from_numpy(file[name]) for name in file.files}
        value, gradient = run(wrong, golden, kind, level, 0.04)
        name = f"loss.{kind}.{level}.beta0.04"
        right = torch.allclose(value, golden[name], **NEAR) and torch.allclose(gradient, golden[f"{name}.grad"], **NEAR)
        missed += not right
    assert missed


def test_the_shaped_rewards_are_those_of_trl(golden: dict[str, Tensor]):
    ids = [[0] * int(n) for n in golden["completion_len"]]
    overlong = Overlong(int(golden["overlong_max"]), int(golden["overlong_cache"]))
    found = overlong(completions=[""] * 12, completion_ids=ids)
    assert_close(torch.tensor(found), golden["overlong"], **NEAR)
    ids = [[i for i in row if i >= 0] for row in golden["repetition_ids"].tolist()]
    found = Repetition(int(golden["repetition_ngram"]))(completions=[""] * 12, completion_ids=ids)
    assert_close(torch.tensor(found), golden["repetition"], **NEAR)


# -- closed forms -----------------------------------------------------------------------------------------------------


def test_a_group_is_judged_by_itself():
    a = grpo.advantages(torch.tensor([1.0, 3.0, 5.0, 0.3, 0.3, 0.3]), 3, eps=0)
    assert_close(a, torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]))
    assert_close(grpo.advantages(torch.tensor([1.0, 3.0, 5.0]), 3, scale="none"), torch.tensor([-2.0, 0.0, 2.0]))
    assert grpo.advantages(torch.tensor([1.0, 4.0]), 1).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="6 rewards in groups of 4"):
        grpo.advantages(torch.zeros(6), 4)


def test_groups_that_teach_nothing_are_counted():
    rewards = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0, 1.0, 0.0, torch.nan, 2.0, 2.0])
    assert grpo.flat(rewards, 3).tolist() == [True, False, True]
    assert (grpo.advantages(rewards, 3)[[0, 1, 2, 6, 7, 8]] == 0).all()  # to the bit: no noise of a mean is blown up
    assert grpo.flat(torch.full((2,), torch.nan), 2).tolist() == [True]


@given(st.lists(st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4), min_size=1, max_size=4))
def test_advantages_of_a_group_sum_to_zero(groups: list[list[float]]):
    rewards = torch.tensor(groups).flatten()
    for scale in ("group", "batch", "none"):
        sums = grpo.advantages(rewards, 4, scale=scale).unflatten(0, (-1, 4)).sum(1)
        assert_close(
            sums, torch.zeros(len(groups)), atol=1e-2, rtol=0
        )  # a deviation of 0 leaves only 1e-4 to divide by


@given(st.permutations(range(4)), st.floats(-5, 5))
def test_order_and_a_shared_constant_do_not_count(order: list[int], shift: float):
    rewards = torch.tensor([0.0, 1.0, 0.25, 2.0])
    assert_close(grpo.advantages(rewards[order], 4), grpo.advantages(rewards, 4)[order])
    assert_close(grpo.advantages(rewards + shift, 4), grpo.advantages(rewards, 4), atol=1e-4, rtol=1e-4)


def test_why_sums_come_first():
    """Of four right answers one is a little longer: compared first, that counts as much as being wrong."""
    right = torch.tensor([1.0, 1.0, 1.0, 0.0] + [1.0] * 4)
    length = torch.tensor([0.0] * 7 + [-0.001])
    rewards = torch.stack([right, length], 1)
    first = grpo.normalised_each(rewards, 4)
    summed = grpo.advantages(grpo.total(rewards), 4, scale="none")
    assert first[3].item() == pytest.approx(first[7].item(), rel=0.2)
    assert summed[3].item() < 500 * summed[7].item() < 0
    shared = grpo.advantages(grpo.total(torch.stack([right, torch.full((8,), -0.5)], 1)), 4)
    assert_close(shared, grpo.advantages(right, 4))  # what a whole group pays moves nothing; added afterwards it would


def batch(seed: int = 0, b: int = 4, t: int = 6) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, t + 1, (b, 1), generator=draw)
    return {
        "logps": -torch.rand(b, t, generator=draw) * 2, "old": -torch.rand(b, t, generator=draw) * 2,
        "advantages": torch.randn(b, generator=draw), "mask": torch.arange(t) < lengths,
    }  # fmt: skip


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", grpo.LOSSES)
def test_on_policy_it_is_reinforce_with_a_baseline(kind: str, level: str):
    one = batch()
    logps = one["logps"].requires_grad_()
    value = grpo.loss(logps, logps.detach(), one["advantages"], one["mask"], loss_type=kind, level=level, longest=6)
    (gradient,) = torch.autograd.grad(value, logps)
    plain = -(one["advantages"][:, None] * logps * one["mask"])
    own = one["mask"].sum(1)
    divided = {"grpo": (plain.sum(1) / own).mean(), "dr_grpo": plain.sum() / 24}.get(kind, plain.sum() / own.sum())
    assert_close(gradient, *torch.autograd.grad(divided, logps))


@pytest.mark.parametrize("kind", grpo.LOSSES)
@pytest.mark.parametrize("garbage", [0.0, 7.0, math.nan, -math.inf])
def test_padding_changes_nothing(kind: str, garbage: float):
    one = batch()
    more = {
        name: torch.cat([x, torch.full((4, 3), garbage).to(x.dtype) if name != "mask" else torch.zeros(4, 3).bool()], 1)
        for name, x in one.items() if name != "advantages"
    }  # fmt: skip
    for name in ("logps", "old"):
        more[name] = more[name].masked_fill(~more["mask"], garbage)
    found = []
    for x in (one, more | {"advantages": one["advantages"]}):
        logps = x["logps"].clone().requires_grad_()
        value = grpo.loss(
            logps, x["old"], x["advantages"], x["mask"], loss_type=kind, longest=6, reference=x["old"], beta=0.1
        )
        (gradient,) = torch.autograd.grad(value, logps)
        found.append((value, gradient.masked_select(x["mask"])))
        assert (gradient[~x["mask"]] == 0).all()
    assert_close(found[0], found[1])


def test_the_clip_by_hand():
    logps = torch.tensor([[0.5], [-0.5], [0.5], [-0.5]]).requires_grad_()
    gain = torch.tensor([1.0, 1.0, -1.0, -1.0])
    up, down = math.exp(0.5), math.exp(-0.5)
    value = grpo.loss(logps, torch.zeros(4, 1), gain, torch.ones(4, 1), clip=(0.2, 0.28))
    assert value.item() == pytest.approx((-1.28 - down + up + 0.8) / 4)
    value.backward()
    assert (logps.grad != 0).flatten().tolist() == [False, True, True, False]  # past the clip nothing pulls any further


@given(st.floats(-8, 8), st.floats(-8, 8))
def test_kl_is_never_negative_and_zero_where_equal(a: float, b: float):
    x, y = torch.tensor([a]), torch.tensor([b])
    assert grpo.kl(x, y).item() >= -1e-6
    assert grpo.kl(x, x).item() == 0
    assert grpo.kl(x, y).item() == pytest.approx(math.exp(b - a) - (b - a) - 1, rel=1e-3, abs=1e-5)


def test_the_penalty_may_differ_from_group_to_group():
    one = batch()
    reference = one["logps"] - 0.3
    beta = torch.tensor([0.0, 0.1, 0.2, 0.3])

    def at(beta):
        return grpo.loss(
            one["logps"], one["logps"], torch.zeros(4), one["mask"], loss_type="grpo", reference=reference, beta=beta
        )

    each = math.exp(-0.3) + 0.3 - 1
    assert at(beta).item() == pytest.approx(each * 0.15)
    assert at(0.15).item() == pytest.approx(each * 0.15)
    assert at(torch.tensor(0.15)).item() == pytest.approx(each * 0.15)
    with pytest.raises(ValueError, match=r"beta of shape \(3,\) for 4 completions"):
        at(beta[:3])


def test_two_processes_give_the_loss_of_one():
    """Means over processes, as gradients are averaged: with the tokens of all of them, long and short halves add up."""
    one = batch(b=6)
    logps = one["logps"].requires_grad_()
    rest = [one[name] for name in ("old", "advantages", "mask")]
    for kind in ("dapo", "cispo"):
        whole = grpo.loss(logps, *rest, loss_type=kind)
        tokens = one["mask"].sum() / 2
        halves = [
            grpo.loss(logps[i : i + 3], *(x[i : i + 3] for x in rest), loss_type=kind, tokens=tokens) for i in (0, 3)
        ]
        assert_close(sum(halves) / 2, whole)
    assert one["mask"][:3].sum() != one["mask"][3:].sum()  # else every divisor would do


def test_the_least_certain_tokens():
    entropy = torch.tensor([[0.1, 0.9, 0.5, 99.0], [0.7, 0.3, 99.0, 99.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert grpo.entropy_mask(entropy, mask, 0.4).long().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert torch.equal(grpo.entropy_mask(entropy, mask, 1.0), mask.bool())
    assert not grpo.entropy_mask(entropy, torch.zeros(2, 4), 0.5).any()
    with pytest.raises(ValueError, match=r"share=0 is outside \(0, 1\]"):
        grpo.entropy_mask(entropy, mask, 0)


def test_tokens_that_are_not_learnt_from_keep_their_place_and_penalty():
    one = batch()
    learn = torch.rand(4, 6) > 0.5
    logps = one["logps"].requires_grad_()
    given = {"loss_type": "dapo", "clip": (1.0, 99.0)}  # nothing is clipped, so that the rest is a sum
    args = (logps, one["old"], one["advantages"], one["mask"])
    some = grpo.loss(*args, learn=learn, **given)
    others = grpo.loss(*args, learn=~learn, **given)
    assert_close(some + others, grpo.loss(*args, **given))
    nothing = grpo.loss(*args, learn=torch.zeros(4, 6).bool(), reference=one["old"], beta=1.0, **given)
    away = (grpo.kl(one["logps"], one["old"]) * one["mask"]).sum() / one["mask"].sum()
    assert_close(nothing, away)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type='ppo'.*'grpo', 'bnpo'"),
        ({"level": "word"}, "level='word'.*'token', 'sequence'"),
        ({"loss_type": "dr_grpo"}, "longest=None.*give them"),
        ({"beta": 0.1}, "beta=0.1 and no reference"),
        ({"clip": (1.5, 0.2)}, r"clip=\(1.5, 0.2\)"),
        ({"cap": 0.0}, "cap=0.0 lets no token count"),
        ({"advantages": torch.zeros(3)}, r"logps has shape \(4, 6\), advantages \(3,\)"),
        ({"mask": torch.ones(4, 5)}, r"'mask': \(4, 5\)"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        grpo.loss(**batch() | changes)


def test_empty_completions_cost_nothing():
    one = batch()
    one["mask"] = torch.zeros(4, 6)
    for kind in grpo.LOSSES:
        assert grpo.loss(**one, loss_type=kind, longest=6).item() == 0
