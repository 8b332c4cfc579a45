"""HeatViT by hand: the selector, the package that is packed again, images that keep different numbers, training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import fewer
from fewer.core import Place, Signals, Tokens
from fewer.core.budgets import BudgetError
from fewer.hardware import heatvit as hardware
from fewer.methods.vision.heatvit import HeatViT, Selector
from fewer.testing.models import answer
from vit import images, run, tiny_vit


def signals_of(x, tokens, memory=None, stage=0, selector=None) -> Signals:
    modules = torch.nn.ModuleDict({"selector": selector or Selector(x.shape[-1], 2)})
    at = Place(stage=stage, stages=2, start=tokens.free_count)
    return Signals(x, tokens, at, modules=modules, memory={} if memory is None else memory)


def test_a_selector_token_by_token() -> None:
    torch.manual_seed(0)
    selector, x = Selector(16, 2), torch.randn(1, 5, 16)
    want = []
    for i in range(5):
        opinions, weights = [], selector.matter(torch.stack([x[0, i, :8].mean(), x[0, i, 8:].mean()]))
        for h, judge in enumerate(selector.judges):
            own = [F.gelu(judge.local[0](x[0, j, 8 * h : 8 * h + 8])) for j in range(5)]
            pair = judge.decide(torch.cat([own[i], sum(own) / 5]))
            opinions.append(pair.softmax(-1)[0])
        want.append((opinions[0] * weights[0] + opinions[1] * weights[1]) / weights.sum())
    assert_close(selector(x)[0], torch.stack(want))


def test_a_selector_costs_what_the_hardware_model_says() -> None:
    assert Selector(384, 6).flops(100) == 2 * 100 * hardware.selector_macs(384, 6)


def test_what_goes_is_packed_and_a_package_is_packed_again() -> None:
    torch.manual_seed(0)
    x, tokens, memory = torch.randn(2, 9, 16), Tokens.plain(2, 9, 1), {}
    method = HeatViT(budget=fewer.Capacity((5, 3)))
    first = signals_of(x, tokens, memory)
    plan = method.plan(first, tokens)
    score = first.module("selector")(x[:, 1:])
    y = plan.reduce(x)
    assert y.shape == (2, 7, 16)  # class token, five patches, the package
    for b in range(2):
        gone = score[b].argsort(descending=True)[5:]
        weight = score[b, gone] / score[b, gone].sum()
        assert_close(y[b, -1], (weight[:, None] * x[b, 1 + gone]).sum(0), atol=1e-6, rtol=1e-5)
        assert y[b, -1].norm() <= x[b, 1 + gone].norm(dim=-1).max()
    after = tokens.after(plan)
    second = signals_of(y, after, memory, 1)
    plan = method.plan(second, after)
    assert plan.m == 5
    assert bool((plan.row[:, 6] == 4).all())  # whatever it scores, it goes into the new package


def test_a_selector_that_keeps_all_packs_nothing() -> None:
    x, tokens = torch.randn(2, 9, 16), Tokens.plain(2, 9, 1)
    plan = HeatViT(budget=fewer.Threshold(0.0)).plan(signals_of(x, tokens), tokens)
    assert plan.counted.tolist() == [9, 9]
    assert torch.equal(plan.reduce(x)[:, :9], x)


def test_images_keep_different_numbers_and_do_not_mind_each_other() -> None:
    torch.manual_seed(1)
    model, pixels = tiny_vit("vit", image=48), images(4, 48)
    with fewer.apply(model, "heatvit:threshold=0.5,layers=1+2", modules="untrained") as session:
        for stage in session.modules[0]:  # untrained selectors say the same of all tokens: tell them apart
            for judge in stage["selector"].judges:
                judge.decide[-1].weight.data.mul_(80)
                judge.decide[0].weight.data.mul_(8)
        together = run(model, pixels)
        counts = session.counts
        alone = torch.cat([run(model, one) for one in pixels.split(1)])
    assert len(counts[-1].unique()) > 1
    assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_training_form_equals_inference_form() -> None:
    model, pixels = tiny_vit("deit", image=48), images(3, 48)
    session = fewer.apply(model, "heatvit:keep=0.5+0.25,layers=1+2", modules="untrained")
    with torch.no_grad():
        gathered = answer(model, pixels)
        p = session.host.prefix
        kept = [session.kept(layer)[:, p:-1] - p for layer in (1, 2)]  # the package is the last row
        session.mask_eps = 0.0
        model.train()
        for stage, modules in enumerate(session.modules[0]):
            forced = torch.zeros(3, 36).scatter(1, kept[stage], 1.0)
            noise = torch.stack([forced, 1 - forced], -1) * 1e4  # settles every decision as in inference
            modules["selector"].noise = lambda logp, noise=noise: noise
        masked = answer(model, pixels)
    assert_close(masked, gathered, atol=1e-5, rtol=1e-5)


def test_every_part_learns() -> None:
    model = tiny_vit("vit").train()
    session = fewer.apply(model, "heatvit:keep=0.5+0.25,layers=1+2", modules="untrained")
    answer(model, images(3)).square().sum().backward()
    for name, parameter in session.modules.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("form", ["heatvit:keep=0", "heatvit:threshold=nan"])
def test_budgets_that_cannot_be(form: str) -> None:
    with pytest.raises(BudgetError):
        fewer.parse(form)
