"""SPViT by hand: the package token, the heads, and training form against inference form."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.core import Place, Signals, Tokens
from fewer.methods.vision.spvit import Selector, SPViT, ratios_for_latency
from fewer.testing.models import answer
from vit import images, run, tiny_vit


def signals_of(x: torch.Tensor, tokens: Tokens, *, training: bool = False, selector: Selector | None = None) -> Signals:
    modules = torch.nn.ModuleDict({"selector": selector or Selector(x.shape[-1], 2)})
    at = Place(stages=1, start=tokens.free_count)
    return Signals(x, tokens, at, modules=modules, training=training)


def test_the_package_is_the_weighted_mean_of_what_goes() -> None:
    x, tokens = torch.randn(2, 9, 8), Tokens.plain(2, 9, 1)
    signals = signals_of(x, tokens)
    method = SPViT(budget=fewer.Capacity(3))
    plan = method.plan(signals, tokens)
    y = plan.reduce(x)
    assert y.shape == (2, 5, 8)  # class token, package, three patches
    keep = signals.module("selector")(x[:, 1:]).exp()[..., 0]
    for b in range(2):
        best = keep[b].argsort(descending=True)
        kept, gone = best[:3].sort().values, best[3:]
        weight = keep[b, gone] / keep[b, gone].sum()
        assert_close(y[b, 1], (weight[:, None] * x[b, 1 + gone]).sum(0), atol=1e-6, rtol=1e-5)
        assert torch.equal(y[b, 2:], x[b, 1 + kept])
        assert torch.equal(y[b, 0], x[b, 0])
    after = tokens.after(plan)
    assert (after.prefix, after.n) == (2, 5)  # the package is protected from now on


def test_packages_of_earlier_stages_stay_and_are_counted_apart() -> None:
    model = tiny_vit("vit", image=48)
    session = fewer.apply(model, "spvit:keep=0.5+0.25,layers=1+2", modules="untrained")
    run(model, images(2, 48))
    assert session.counts == [37, 1 + 1 + 18, 1 + 2 + 9, 1 + 2 + 9]


def test_training_form_equals_inference_form() -> None:
    model, pixels = tiny_vit("deit", image=48), images(3, 48)
    session = fewer.apply(model, "spvit:keep=0.5+0.25,layers=1+2", modules="untrained")
    with torch.no_grad():
        gathered = answer(model, pixels)
        kept = [session.kept(layer) for layer in (1, 2)]
        session.mask_eps = 0.0
        model.train()
        for stage, modules in enumerate(session.modules[0]):
            places = kept[stage][:, session.host.prefix + stage + 1 :] - session.host.prefix
            forced = torch.zeros(3, 36).scatter(1, places, 1.0)
            noise = torch.stack([forced, 1 - forced], -1) * 1e4  # settles every decision as in inference
            modules["selector"].noise = lambda logp, noise=noise: noise
        masked = answer(model, pixels)
    assert session.last.tokens.n == session.host.prefix + 36 + 2
    assert session.last.tokens.prefix == session.host.prefix + 2
    assert_close(masked, gathered, atol=1e-5, rtol=1e-5)


def test_a_stage_that_drops_nothing_adds_a_masked_finite_package() -> None:
    x, tokens = torch.randn(1, 5, 8), Tokens.plain(1, 5, 1)
    signals = signals_of(x, tokens, training=True)
    signals.module("selector").noise = lambda logp: torch.tensor([1e4, 0.0]).expand_as(logp)
    plan = SPViT(budget=fewer.Capacity(2)).plan(signals, tokens)
    assert plan.policy.tolist() == [[1, 0, 1, 1, 1, 1]]
    y = plan.reduce(x)
    assert y.isfinite().all()
    assert torch.equal(y[:, [0, 2, 3, 4, 5]], x)


def test_every_head_has_weights_of_its_own_and_gets_gradient() -> None:
    model = tiny_vit("vit").train()
    session = fewer.apply(model, "spvit:keep=0.5+0.25,layers=1+2", modules="untrained")
    heads = session.modules[0][0]["selector"].predictors
    assert len({id(p) for head in heads for p in head.parameters()}) == sum(len(list(h.parameters())) for h in heads)
    assert not torch.equal(heads[0].embed[1].weight, heads[1].embed[1].weight)
    answer(model, images(3)).square().sum().backward()
    for name, parameter in session.modules.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_head_sees_its_own_channels_only() -> None:
    torch.manual_seed(0)
    selector, x = Selector(8, 2), torch.randn(1, 6, 8)
    with torch.no_grad():
        selector.matter[2].weight.zero_()  # the heads matter as their biases say,
        selector.matter[2].bias.copy_(torch.tensor([40.0, -40.0]))  # the first alone
    other = x.clone()
    other[..., 4:] += 3
    assert_close(selector(x), selector(other))
    other = x.clone()
    other[..., :4] *= torch.linspace(-1, 1, 6)[:, None]
    assert not torch.allclose(selector(x), selector(other))
    assert_close(selector(x).exp().sum(-1), torch.ones(1, 6))


def test_the_trace_in_training_leads_dropped_tokens_into_the_package() -> None:
    model = tiny_vit("vit").train()
    session = fewer.apply(model, "spvit:keep=0.5,layers=1", modules="untrained")
    answer(model, images(2))
    gone = session.last.memory[0]["keep"][0] == 0
    assert gone.any()
    assert (session.origin[:, 1:][gone] == 1).all()
    assert torch.equal(session.origin[:, 1:][~gone], (torch.arange(16) + 2).expand(2, -1)[~gone])


def test_a_latency_limit_becomes_keep_ratios() -> None:
    table = {1.0: 10.0, 0.7: 7.0, 0.5: 5.0, 0.25: 3.0}
    # 3 blocks full, then 3 blocks each at 0.7, 0.49 (read at 0.5), 0.343 (read at 0.5): 30 + 21 + 15 + 15
    assert ratios_for_latency(table, (3, 6, 9), 12, limit=81.0) == (0.7, 0.49, 0.343)
    assert ratios_for_latency(table, (3, 6, 9), 12, limit=80.9) == (0.5, 0.25, 0.125)
    assert ratios_for_latency(table, (3, 6, 9), 12, limit=120.0) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="limit=40"):
        ratios_for_latency(table, (3, 6, 9), 12, limit=40)
