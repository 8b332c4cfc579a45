"""Dynamic Context Pruning: the sparse sigmoid, the mask of a whole text against step-by-step generation, gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.testing import assert_close

import fewer
from decoders import decoder, prompt
from fewer.methods.language.dynamic_context_pruning import sparse_sigmoid

GREEDY = dict(max_new_tokens=8, do_sample=False)


def pruned(model, beta, rank=4):
    torch.manual_seed(1)
    return fewer.apply(model, f"dynamic_context_pruning:beta={beta},rank={rank}", modules="untrained")


# -- the sparse sigmoid -----------------------------------------------------------------------------------------------
def test_sparse_sigmoid_has_its_known_forms():
    z = torch.linspace(-3, 3, 25)
    assert_close(sparse_sigmoid(z, 2.0), ((z + 1) / 2).clamp(0, 1), atol=1e-6, rtol=0)
    assert_close(sparse_sigmoid(z, 1 + 1e-4), z.sigmoid(), atol=1e-3, rtol=0)
    assert_close(sparse_sigmoid(z, math.inf), (z > 0).float())


@pytest.mark.parametrize("alpha", [1.2, 1.5, 3.0])
def test_sparse_sigmoid_gradient_is_its_slope(alpha):
    z = torch.linspace(-0.3, 0.3, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(sparse_sigmoid(z, alpha).sum(), z)
    with torch.no_grad():
        slope = (sparse_sigmoid(z + 1e-2, alpha) - sparse_sigmoid(z - 1e-2, alpha)) / 2e-2
    assert_close(gradient, slope, atol=1e-2, rtol=1e-2)


def test_alpha_of_one_is_refused():
    with pytest.raises(ValueError, match="alpha=1"):
        sparse_sigmoid(torch.zeros(2), 1)


# -- on models ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_the_mask_of_a_whole_text_equals_generation_with_freed_rows(kind):
    model = decoder(kind)
    ids, _ = prompt(19)
    with torch.no_grad(), pruned(model, 0.0) as session:
        written = model.generate(ids, return_dict_in_generate=True, output_logits=True, **GREEDY)
        stored = session.counts
        whole = model(written.sequences, use_cache=False).logits[:, 18:-1]
    assert min(stored) < 19 / 2, "something must have been freed"
    assert_close(whole, torch.stack(written.logits, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_batch_of_padded_prompts_equals_each_alone(kind):
    model = decoder(kind)
    ids, mask = prompt(19, 12, 7)
    with torch.no_grad(), pruned(model, 0.0):
        together = model.generate(ids, attention_mask=mask, **GREEDY)[:, -8:]
        for row, words, own in zip(together, ids, mask, strict=True):
            alone = model.generate(words[None, own.bool()], **GREEDY)[0, -8:]
            assert alone.equal(row)


def test_a_large_bias_keeps_everything_and_the_memory_is_freed_with_a_small_one():
    model = decoder("llama")
    ids, _ = prompt(19)
    with torch.no_grad():
        plain = model.generate(ids, **GREEDY)
        with pruned(model, 50.0) as session:
            assert model.generate(ids, **GREEDY).equal(plain)
            assert session.ledger.bytes == session.ledger.full_bytes
        with pruned(model, -50.0) as session:
            model.generate(ids, **GREEDY)
            assert session.counts == [1.0] * len(session.counts), "only the newest token never drops itself"
            assert session.ledger.bytes < session.ledger.full_bytes / 10


def test_keeping_is_learned_and_its_share_falls_with_the_bias():
    model = copy.deepcopy(decoder("llama")).train().requires_grad_(False)
    ids, _ = prompt(19)
    shares = []
    for beta in (6.0, 1.0):
        with pruned(model, beta) as session:
            session.modules.requires_grad_(True)
            loss = model(ids, labels=ids, use_cache=False).loss
            share = torch.stack(list(session.remembered[0]["share"].values())).mean()
            (loss + share).backward()
            shares.append(share.item())
            for parameter in session.modules.parameters():
                assert parameter.grad is not None
                assert parameter.grad.isfinite().all()
                assert parameter.grad.abs().sum() > 0
    assert 1 > shares[0] > shares[1] > 0


def test_rank_is_checked():
    with pytest.raises(ValueError, match="rank=0"):
        fewer.parse("dynamic_context_pruning:rank=0")
