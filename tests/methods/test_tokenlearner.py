"""TokenLearner by hand: shapes, hulls, symmetries, and the way back to the grid."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.core import Capacity, Place, PlanError, Signals, Tokens
from fewer.methods.vision.tokenlearner import TokenFuser, TokenLearner
from fewer.testing.models import answer
from vit import images, run, tiny_vit


def planned(method: TokenLearner, x: torch.Tensor, modules: torch.nn.ModuleDict, prefix: int = 1, **options: object):
    tokens = Tokens.plain(x.shape[0], x.shape[1], prefix, **options)
    at = Place(start=tokens.free_count)
    side = int(tokens.free_count**0.5)
    return method.plan(Signals(x, tokens, at, grid=(side, side), modules=modules), tokens)


def made(method: TokenLearner, width: int = 8, free: int = 16) -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict(method.modules(width, 2, 1, free))


def test_every_patch_becomes_part_of_the_summaries_and_the_prefix_stays() -> None:
    method, x = TokenLearner(budget=Capacity(3)), torch.randn(2, 18, 8)
    matrix = planned(method, x, made(method), prefix=2).dense()
    assert matrix.shape == (2, 5, 18)
    assert torch.equal(matrix[:, :2], torch.eye(2, 18).expand(2, 2, 18))
    assert (matrix[:, 2:, :2] == 0).all()
    assert (matrix[:, 2:, 2:] > 0).all()
    assert_close(matrix.sum(-1), torch.ones(2, 5))  # so every summary lies in the hull of the patches


def test_version_1_1_forgets_the_order_of_the_patches_and_1_0_does_not() -> None:
    x = torch.randn(1, 17, 8)
    shuffled = torch.cat([x[:, :1], x[:, 1:][:, torch.randperm(16)]], 1)
    for version, same in (("1.1", True), ("1.0", False)):
        method = TokenLearner(budget=Capacity(3), version=version)
        modules = made(method)
        a = planned(method, x, modules).reduce(x)
        b = planned(method, shuffled, modules).reduce(shuffled)
        assert torch.allclose(a, b, atol=1e-6) == same


def test_version_1_0_gates_the_patches_by_the_formula() -> None:
    method = TokenLearner(budget=Capacity(2), version="1.0", fidelity="code")
    modules, x = made(method), torch.randn(1, 17, 8)
    maps = modules["maps"]
    y = maps.norm(x[:, 1:]).transpose(1, 2).reshape(1, 8, 4, 4)
    for i in (0, 2, 4):
        y = torch.nn.functional.gelu(torch.nn.functional.conv2d(y, maps.convolutions[i].weight, padding=1))
    gate = torch.nn.functional.conv2d(y, maps.convolutions[6].weight, padding=1).sigmoid().flatten(2)
    summed = planned(method, x, modules).reduce(x)[:, 1:]
    assert_close(summed, gate @ x[:, 1:])
    mean = TokenLearner(budget=Capacity(2), version="1.0")
    own = made(mean)
    own.load_state_dict(modules.state_dict())
    assert_close(planned(mean, x, own).reduce(x)[:, 1:], summed / 16)


def test_version_1_0_says_that_it_needs_the_grid() -> None:
    method = TokenLearner(budget=Capacity(2), version="1.0")
    with pytest.raises(PlanError, match=r"version=1.0 convolves over the full patch grid; here are 15 tokens"):
        planned(method, torch.randn(1, 16, 8), made(method))


def test_padding_is_not_summarised() -> None:
    method, x = TokenLearner(budget=Capacity(3)), torch.randn(1, 9, 8)
    modules = made(method)
    alone = planned(method, x[:, :6], modules).reduce(x[:, :6])
    valid = torch.arange(9)[None] < 6
    assert_close(planned(method, x, modules, valid=valid).reduce(x), alone)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_in_a_model_it_counts_trains_and_reaches_every_patch(version: str) -> None:
    model = tiny_vit("vit").train()
    session = fewer.apply(model, f"tokenlearner:tokens=4,layers=2,version={version}", modules="untrained")
    pixels = images(2).requires_grad_()
    answer(model, pixels).square().sum().backward()
    assert session.counts == [17, 17, 5, 5]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in session.modules.parameters())
    patches = pixels.grad.unfold(2, 8, 8).unfold(3, 8, 8).abs().sum((1, 4, 5))
    assert (patches > 0).all()


def test_the_fuser_spreads_summaries_over_the_patches_as_they_were() -> None:
    model = tiny_vit("vit")
    session = fewer.apply(model, "tokenlearner:tokens=4,layers=2,fuser=true", modules="untrained")
    hidden: list[torch.Tensor] = []
    session.host.final_norm.register_forward_hook(lambda _m, _a, out: hidden.append(out))
    run(model, images(2))
    patches = session.last.memory[0]["patches"][0]
    assert patches.shape == (2, 16, 32)
    fuser = session.modules[0][0]["fuser"]
    fused = fuser(hidden[0][:, 1:], patches)
    assert_close(fused, patches + fuser.leave.bias)  # the mixing starts at zero
    torch.nn.init.normal_(fuser.mix.weight)
    moved = fuser(hidden[0][:, 1:], patches)
    assert moved.shape == patches.shape
    assert not torch.allclose(moved, fused)


def test_the_fuser_is_its_formula() -> None:
    fuser, z, x = TokenFuser(8, 3, 5), torch.randn(2, 3, 8), torch.randn(2, 9, 8)
    torch.nn.init.normal_(fuser.mix.weight)
    y = fuser.leave(torch.einsum("ts,bsc->btc", fuser.mix.weight, fuser.enter(z)) + fuser.mix.bias[:, None])
    beta = fuser.gate(fuser.look(x))
    assert beta.min() > 0
    assert beta.max() < 1
    assert_close(fuser(z, x), x + torch.einsum("bms,bsc->bmc", beta, y))


@pytest.mark.parametrize(("wrong", "said"), [({"version": "2"}, "version=2"), ({"fidelity": "x"}, "fidelity='x'")])
def test_parameters_out_of_range_are_named(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TokenLearner(**wrong)
