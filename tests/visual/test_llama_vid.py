"""LLaMA-VID: two tokens a frame, one of them the question's."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import fewer
from clips import clip, made, with_features, with_words
from fewer.core import BudgetError, SignalError
from fewer.methods.multimodal.llama_vid import LLaMAVID


@pytest.mark.parametrize("queries", [0, 4])
@pytest.mark.parametrize("frames", [1, 3, 7])
def test_frames_become_exactly_two_rows_each(frames: int, queries: int):
    method = LLaMAVID(hidden=16, queries=queries)
    signals = clip(frames, method=method)
    plan = method.plan(signals, signals.tokens)
    assert made(method, signals).shape == (2, 2 * frames, 8)
    assert plan.m == 2 * frames
    assert plan.lengths is None
    anchor = plan.position[0]
    assert (anchor.diff() > 0).all()
    assert (anchor // 16).tolist() == [f for f in range(frames) for _ in range(2)]  # in its own frame


@pytest.mark.parametrize("queries", [0, 4])
def test_another_question_changes_the_context_tokens_alone(queries: int):
    method = LLaMAVID(hidden=16, queries=queries, content=2)
    signals = clip(2, method=method)
    one, other = made(method, signals), made(method, with_words(signals, 9))
    context = torch.arange(10) % 5 == 0
    assert torch.equal(one[:, ~context], other[:, ~context])
    assert ((one - other)[:, context].abs().amax(-1) > 1e-4).all()


def test_content_is_the_projected_mean_of_its_cells():
    signals = clip(2, method=LLaMAVID(hidden=16))
    features, project = signals.visual.features.unflatten(1, (2, 4, 4)), signals.visual.project
    assert_close(made(LLaMAVID(hidden=16), signals)[:, 1::2], project(features.mean((2, 3))))
    four = made(LLaMAVID(hidden=16, content=2), signals).unflatten(1, (2, 5))
    assert_close(four[:, :, 2], project(features[:, :, :2, 2:].mean((2, 3))))


def test_the_context_token_is_attention_over_raw_features():
    """The slow twin: words one by one, the mean afterwards."""
    method = LLaMAVID(hidden=16)
    signals = clip(2, method=method)
    net = signals.modules["context"]
    words, real = signals.visual.wording()
    asked = net.query(net.words(words, real))
    features = signals.visual.features.unflatten(1, (2, 16))
    for r, f in ((0, 0), (1, 1)):
        x = features[r, f]
        found = [((q @ net.key(x).T) / 12**0.5).softmax(0) @ x for q in asked[r]]
        assert_close(made(method, signals)[r, 2 * f], net.leave(torch.stack(found).mean(0)))


def test_a_clip_alone_and_beside_a_longer_one():
    method = LLaMAVID(hidden=16)
    both = clip((1, 3), method=method)
    plan = method.plan(both, both.tokens)
    assert plan.lengths.tolist() == [2, 6]
    rows = method.rows(both, plan)
    assert (rows[0, 2:] == 0).all()
    alone = clip(1, lines=1, method=method)
    alone = with_features(alone, both.visual.features[:1, :16])
    alone.beside.hidden = torch.cat([both.visual.hidden[:1, :19], both.visual.hidden[:1, 51:]], 1)
    assert_close(made(method, alone), rows[:1, :2])


def test_no_words_and_half_precision():
    method = LLaMAVID(hidden=16)
    signals = clip(1, words=0, method=method)
    signals.beside.text[:] = False
    rows = made(method, signals)
    assert_close(rows[:, 0], signals.modules["context"].leave.bias.expand(2, -1))
    half = clip(1, method=method)
    half.beside.hidden, half.modules = half.visual.hidden.bfloat16(), half.modules.bfloat16()
    assert made(method, with_features(half, half.visual.features.bfloat16())).dtype == torch.bfloat16


def test_everything_learns():
    method = LLaMAVID(hidden=16, queries=3)
    signals = clip(2, method=method)
    made(method, signals).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in signals.modules.parameters()
               if p.numel() > 1 and p is not signals.modules["context"].key.bias)  # fmt: skip


def test_counts_that_cannot_be():
    signals = clip(2, method=LLaMAVID(hidden=16))
    with pytest.raises(BudgetError, match="asks for 6"):
        LLaMAVID(budget=fewer.Capacity(6)).plan(signals, signals.tokens)
    assert fewer.parse("llama_vid:tokens=4").plan(signals, signals.tokens).m == 4
    with pytest.raises(BudgetError, match="content=4"):
        LLaMAVID(content=4).plan(signals, signals.tokens)
    with pytest.raises(ValueError, match="content=0"):
        LLaMAVID(content=0)
    signals.grid = (3, 5)
    with pytest.raises(SignalError, match="full frames of 3 x 5"):
        LLaMAVID().plan(signals, signals.tokens)
    signals.grid = (2, 8)
    with pytest.raises(SignalError, match="row by row"):
        LLaMAVID().plan(signals, signals.tokens)
