"""Dynamic-LLaVA's image predictor: hard choices, soft gradients, and padding that counts for nothing."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fewer.core import Shape
from fewer.core.attention import masked_attention
from fewer.methods.multimodal.dynamic_llava import DynamicLLaVA, ImagePredictor
from fewer.training.losses import ratio
from insides import alone, inside, kept

SHAPE = Shape(width=8, heads=2, channels=4, depth=2, grid=(3, 4))
SMALL = DynamicLLaVA(width=16, heads=2, inner=24)


def predicted(signals, method=SMALL, seed=0, **changes):
    torch.manual_seed(seed)
    return replace(signals, modules=nn.ModuleDict(method.parts(SHAPE)).eval(), **changes)


def test_the_best_fifth_stays_without_noise():
    signals, tokens = inside((20, 20))
    signals = predicted(signals)
    plan = SMALL.plan(signals, tokens)
    logp = signals.module("predictor")(signals.hidden)
    want = logp[..., 0].topk(4).indices.sort().values
    assert torch.equal(plan.anchor, want)
    assert torch.equal(SMALL.plan(signals, tokens).anchor, want)
    assert_close(logp.exp().sum(-1), torch.ones(2, 20))


def test_a_prompt_alone_is_judged_as_in_a_batch():
    lengths = (20, 11, 15)
    signals, tokens = inside(lengths)
    plan = SMALL.plan(predicted(signals), tokens)
    for line, length in enumerate(lengths):
        one, free = alone(lengths, line)
        assert kept(plan, line) == kept(SMALL.plan(predicted(one), free))
        assert len(kept(plan, line)) == length // 5


def test_half_of_the_channels_are_shared():
    """Changing one token changes the others' answers through the mean and the attention, its own most."""
    predictor = ImagePredictor(8, 16, 2, 24).eval()
    x = torch.randn(1, 6, 8)
    other = x.clone()
    other[0, 2] = torch.randn(8)
    moved = (predictor(x) - predictor(other)).abs().sum((0, 2))
    assert (moved > 1e-6).all()
    there = torch.ones(1, 6)
    there[0, 2] = 0
    assert_close(predictor(x, there)[0, 3:], predictor(other, there)[0, 3:])


def test_a_line_without_tokens_is_no_nan():
    predictor = ImagePredictor(8, 16, 2, 24).eval()
    found = predictor(torch.randn(2, 6, 8), torch.tensor([[1.0] * 6, [0.0] * 6]))
    assert found.isfinite().all()


def test_training_masks_and_learns():
    signals, tokens = inside((20, 11))
    signals = predicted(signals, training=True)
    predictor = signals.module("predictor")
    predictor.generator, predictor.tau = torch.Generator().manual_seed(1), 0.5
    plan = SMALL.plan(signals, tokens)
    assert plan.m == 20
    assert set(plan.policy.detach().unique().tolist()) == {0.0, 1.0}
    assert (plan.policy[1, 11:] == 0).all()
    q, k, v = torch.randn(3, 2, 2, 20, 4).unbind(0)
    out = masked_attention(q, k, v, 0.5, None, plan.policy, 1e-6).square().mean()
    (out + 100 * ratio(signals.memory["keep"], signals.memory["target"])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in predictor.parameters() if p.dim() == 2)
    assert signals.memory["target"] == {0: 0.2}


def test_what_is_dropped_still_sees_itself():
    policy = torch.tensor([[1.0, 0.0, 1.0]])
    q, k, v = torch.randn(3, 1, 1, 3, 4).unbind(0)
    out = masked_attention(q, k, v, 0.5, None, policy, 0.0)
    seen = (q[0, 0, 1] @ k[0, 0].T * 0.5).exp()
    assert_close(out[0, 0, 1], (seen / seen.sum()) @ v[0, 0])
    seen = (q[0, 0, 0] @ k[0, 0].T * 0.5).exp() * policy[0]
    assert_close(out[0, 0, 0], (seen / seen.sum()) @ v[0, 0])


@pytest.mark.parametrize(("depth", "layer"), [(32, 1), (6, 0), (24, 1)])
def test_default_layer_scales_with_depth(depth, layer):
    assert DynamicLLaVA().acts_at(depth) == (layer,)


def test_sizes_are_checked_and_counted():
    with pytest.raises(ValueError, match="width=18"):
        DynamicLLaVA(width=18)
    with pytest.raises(ValueError, match="k=0"):
        DynamicLLaVA(k=0)
    predictor = DynamicLLaVA().parts(SHAPE)["predictor"]
    block = 3 * 512**2 + 512**2 + 2 * 512 * 2048
    weights = 8 * 512 + 2 * block + 512 * 256 + 256 * 128 + 128 * 2
    assert predictor.flops(10) == 2 * 10 * weights + 2 * 4 * 100 * 512
