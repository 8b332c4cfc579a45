"""SDTP: predictors that judge tokens one by one, their training form, and what training and evaluation share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fewer
from decoders import COMMON, decoder, prompt
from fewer.compat import cache_of, cached
from fewer.core import KeepRatio, Place, Signals, Tokens
from fewer.methods.language.sdtp import SDTP, Judge

FORM = "sdtp:keep=0.6,layers=1+2,sinks=1"
CLOSE = dict(atol=2e-5, rtol=2e-4)


def on(model: nn.Module, form: str = FORM, **more: object) -> fewer.Session:
    torch.manual_seed(1)
    return fewer.apply(model, form, modules="untrained", **more)  # type: ignore[arg-type]


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def test_by_default_seven_blocks_behind_the_first_quarter() -> None:
    assert SDTP().acts_at(32) == (8, 11, 14, 18, 21, 25, 28)
    assert SDTP().acts_at(30)[0] == 7
    assert len(SDTP().acts_at(30)) == 7
    assert SDTP().acts_at(3) == (1, 2)
    with pytest.raises(ValueError, match="hidden=0"):
        SDTP(hidden=0)


def test_the_judges_word_and_what_it_costs() -> None:
    judge = Judge(4, 8)
    x = torch.randn(2, 5, 4)
    logp = judge(x)
    assert logp.shape == (2, 5, 2)
    assert_close(logp.exp().sum(-1), torch.ones(2, 5))
    assert judge.flops(5) == 2 * 5 * (4 * 8 + 8 * 2)
    assert_close(judge(x[:, 2:3]), logp[:, 2:3])


def test_the_least_salient_leave() -> None:
    method = SDTP(KeepRatio(0.5), sinks=1)
    modules = nn.ModuleDict(method.modules(4, 1, 1, 8))
    hidden = torch.randn(1, 8, 4)
    tokens = Tokens.plain(1, 8)
    tokens = tokens.protect(tokens.last)
    signals = Signals(hidden, tokens, Place(layer=1, layers=4, start=7), None, None, modules)
    with torch.no_grad():
        score = modules["judge"](hidden)[0, 1:7, 0]
        plan = method.plan(signals, tokens)
    best = sorted((score.topk(3).indices + 1).tolist())
    assert plan.position.tolist() == [[0, *best, 7]]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_keeping_all_is_the_model_to_the_bit(family: str) -> None:
    model = decoder(family)
    ids, mask = prompt(20, 9, 14)
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        words = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        with on(model, "sdtp:keep=1.0,layers=1+2"):
            assert torch.equal(model(ids, attention_mask=mask).logits, plain)
            assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), words)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_gradients_reach_every_predictor(family: str) -> None:
    model = decoder(family)
    ids, mask = prompt(17, 9)
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    with on(model) as session:
        session.modules.requires_grad_(True)
        model.train()
        try:
            out = model(inputs_embeds=x, attention_mask=mask, position_ids=places(mask), use_cache=False)
            scores = [memory for memory in session.last.memory if memory]
        finally:
            model.eval()
        (out.logits * mask[..., None]).square().mean().backward()
        for name, p in session.modules.named_parameters():
            assert p.grad is not None, name
            assert bool(p.grad.isfinite().all()), name
            if name.endswith("weight"):
                assert bool(p.grad.any()), name
    assert scores
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert not bool(x.grad[mask == 0].any())
    for p in model.parameters():
        p.grad = None


def test_checkpointing_gives_the_same_gradient() -> None:
    model = decoder("llama")
    ids, mask = prompt(17, 9)
    grads = []
    for checkpoint in (False, True):
        with on(model) as session:
            session.modules.requires_grad_(True)
            model.train()
            if checkpoint:
                model.activation_checkpointing_enable({"use_reentrant": False})
            try:
                torch.manual_seed(2)
                out = model(ids, attention_mask=mask, position_ids=places(mask), use_cache=False)
                out.logits.square().mean().backward()
            finally:
                model.activation_checkpointing_disable()
                model.eval()
            grads.append([p.grad.clone() for p in session.modules.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, **CLOSE)
    for p in model.parameters():
        p.grad = None


def test_the_training_form_wants_the_whole_text_in_one_pass() -> None:
    model = decoder("llama")
    ids, _ = prompt(12)
    with on(model), torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
        model.train()
        try:
            with pytest.raises(ValueError, match="one pass"):
                model(ids, **cached(model, cache), use_cache=True)
        finally:
            model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_batch_changes_no_text_and_masking_is_gathering(family: str) -> None:
    model = decoder(family)
    ids, mask = prompt(20, 9, 14)
    with torch.no_grad():
        with on(model) as session:
            together = model(ids, attention_mask=mask, position_ids=places(mask), use_cache=False).logits
            last = session.last.kept(2)
            for i, n in enumerate((20, 9, 14)):
                assert int(last[i].max()) == 19
                assert_close(model(ids[i : i + 1, -n:]).logits[0], together[i, -n:], **CLOSE)
        with on(model, execution="masked"):
            masked = model(ids, attention_mask=mask, position_ids=places(mask), use_cache=False).logits
    for i in range(3):
        kept = last[i][last[i] >= 0]
        assert_close(masked[i, kept], together[i, kept], **CLOSE)


def test_judges_fit_features_that_are_not_heads_times_channels() -> None:
    """Gemma's hidden states are narrower or wider than its heads together."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape = COMMON | {"head_dim": 16}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, sliding_window=12)).eval()
    ids, _ = prompt(15)
    with torch.no_grad(), fewer.apply(model, "sdtp:keep=0.5,layers=1", modules="untrained") as session:
        model(ids)
        assert next(session.modules.parameters()).shape[-1] == 32
