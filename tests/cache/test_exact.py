"""A reduced cache is an ordinary one with keys hidden: pass by pass, batch by batch, family by family."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

import fewer
from decoders import FAMILIES, WINDOW, decoder, hiding, prompt
from fewer.compat import cached
from fewer.core import Site
from fewer.core.cache import Rereader

METHODS = (
    "knorm:keep=0.5",
    "keydiff:keep=0.4",
    "keydiff:keep=0.4,block=3",
    "chunkkv:keep=0.5,window=4,chunk=3",
    "chunkkv:keep=0.5,window=3,chunk=4,kernel=3,fidelity=kvpress",
    "streamingllm:tokens=9,sinks=2,positions=original",
    "tova:tokens=10",
    "tova:keep=0.5,recent=2,decodes=false",
    "snapkv:keep=0.5,window=4,kernel=3",
    "snapkv:tokens=11,window=6,kernel=3,pool=max",
    "pyramidkv:keep=0.5,window=3,kernel=3",
    "adakv:keep=0.5,window=3,kernel=3,alpha=0.1",
    "h2o:keep=0.5",
    "h2o:tokens=9,recent=0.3,average=true",
    "expected_attention:keep=0.5,sinks=2,future=16",
    "expected_attention:keep=0.5,sinks=2,future=16,alpha=0.2,epsilon=0.01",
    "random_cache:keep=0.5,sinks=2,recent=3",
    "spatten_decode:keep=0.3",
    "spatten_decode:tokens=9,recent=2",
    "random_cache:tokens=9,sinks=0,recent=2,seed=3,decodes=true",
)


WHOLE = ("llama", "gemma3", "gpt2")  # the others differ from these in what happens before attention
FEW = (
    "knorm:keep=0.5",
    "tova:tokens=10",
    "snapkv:keep=0.5,window=4,kernel=3",
    "adakv:keep=0.5,window=3,kernel=3,alpha=0.1",
)


def pairs(methods: tuple[str, ...]) -> list:
    """Every method on three families and a few on all; the rest is slow for what it adds."""
    return [
        pytest.param(f, m, id=f"{f}-{m}", marks=[] if f in WHOLE or m in FEW else [pytest.mark.slow])
        for f in FAMILIES
        for m in methods
    ]


def test_every_cache_method_is_tested_here():
    cached = {name: cls for name, cls in fewer.registered().items() if cls.site is Site.KV_CACHE and cls.evicts}
    free = {name: cls for name, cls in cached.items() if cls.card.training == "free"}  # others have their own tests
    ours = {name for name, cls in free.items() if not issubclass(cls, Rereader) and cls.card.acts == "prune"}
    assert ours == {m.partition(":")[0] for m in METHODS}


def sliding(model, layer: int) -> bool:
    return DynamicCache(config=model.config).is_sliding[layer] if model.config.model_type != "gpt2" else False


def lost(session, layers: int, batch: int, heads: int, length: int) -> list[torch.Tensor]:
    """What each layer has evicted of the tokens seen so far, (B, G, length) bool."""
    gone = []
    for layer in range(layers):
        kept = session.kept(layer)
        slot = torch.where(kept < 0, length, kept)
        stays = torch.zeros(batch, heads, length + 1, dtype=torch.bool).scatter(-1, slot.expand(batch, heads, -1), True)
        gone.append(~stays[..., :-1])
    return gone


@pytest.mark.parametrize("lengths", [(25,), (9, 25, 17)], ids=["one", "padded"])
@pytest.mark.parametrize(("family", "method"), pairs(METHODS))
def test_every_pass_equals_the_full_cache_with_the_evicted_keys_hidden(family, method, lengths):
    """A prompt in two chunks, some words, a second turn, more words: logits of each pass against the slow twin."""
    model = decoder(family)
    ids, mask = prompt(*lengths)
    more, _ = prompt(*[14] * len(lengths), seed=1)
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    cuts = [0, 17, 25, 26, 27, 28, 35, 36, 37, 38, 39]
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    heads = 4 if family == "gpt2" else 2
    small, full = DynamicCache(config=model.config), DynamicCache()
    gone: list = [None] * 3
    evicted = 0
    with torch.no_grad(), fewer.apply(model, method) as session:
        for a, b in pairwise(cuts):
            given = dict(input_ids=ids[:, a:b], attention_mask=mask[:, :b], position_ids=place[:, a:b])
            mine = model(**given, **cached(model, small)).logits
            session_config = model.config._attn_implementation_internal
            model.config._attn_implementation_internal = "sdpa"
            hook = model.base_model._forward_pre_hooks.popitem()
            with hiding(model, gone):
                twin = model(**given, **cached(model, full)).logits
            model.base_model._forward_pre_hooks[hook[0]] = hook[1]
            model.config._attn_implementation_internal = session_config
            real = mask[:, a:b, None].bool()
            assert_close(
                mine * real, twin * real, rtol=2e-4, atol=2e-4, msg=lambda m, a=a, b=b: f"tokens {a}..{b}: {m}"
            )
            gone = lost(session, 3, len(lengths), heads, b)
            evicted += sum(int(g.sum()) for g in gone)
            assert small.get_seq_length() == b
    assert evicted > 0


@pytest.mark.parametrize(("family", "method"), pairs((*METHODS, "streamingllm:tokens=9,sinks=2")))
def test_a_padded_batch_writes_what_each_prompt_writes_alone(family, method):
    model = decoder(family)
    if family == "gpt2" and method == "streamingllm:tokens=9,sinks=2":
        with pytest.raises(fewer.SessionError, match="positions=original"):
            fewer.apply(model, method)
        return
    lengths = (25, 9, 3, 17)
    ids, mask = prompt(*lengths)
    settings = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with fewer.apply(model, method) as session:
        together = model.generate(ids, attention_mask=mask, **settings)
        kept = [session.kept(layer) for layer in range(3)]
        for i, n in enumerate(lengths):
            alone = model.generate(ids[i : i + 1, -n:], attention_mask=mask[i : i + 1, -n:], **settings)
            assert alone.sequences[0, n:].tolist() == together.sequences[i, 25:].tolist()
            for x, y in zip(alone.logits, together.logits, strict=True):
                assert_close(x[0], y[i], rtol=2e-4, atol=2e-4)
            for layer in range(3):
                pad = 25 - n  # padding that nobody evicted is still there, and so is what just left a window
                first = max(pad, 30 - WINDOW + 1 if sliding(model, layer) else 0)
                for mine, theirs in zip(session.kept(layer)[0] + pad, kept[layer][i], strict=True):
                    assert mine[mine >= first].tolist() == theirs[theirs >= first].tolist()


@pytest.mark.parametrize("method", sorted({m.partition(":")[0] for m in METHODS}))
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_plain_generation_to_the_bit(family, method):
    model = decoder(family)
    ids, mask = prompt(25, 9)
    positions = ",positions=original" if method == "streamingllm" else ""
    settings = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    for inputs in (dict(input_ids=ids, attention_mask=mask), dict(input_ids=ids[:1])):
        plain = model.generate(**inputs, **settings)
        with fewer.apply(model, f"{method}:keep=1.0{positions}") as session:
            kept = model.generate(**inputs, **settings)
            assert session.ledger.bytes == session.ledger.full_bytes or family in ("mistral-sliding", "gemma3")
        assert torch.equal(plain.sequences, kept.sequences)
        assert all(torch.equal(a, b) for a, b in zip(plain.logits, kept.logits, strict=True))


def test_eager_attention_is_left_eager():
    model = decoder("llama")
    ids, mask = prompt(25, 9)
    model.set_attn_implementation("eager")
    try:
        settings = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
        plain = model.generate(ids, attention_mask=mask, **settings)
        with fewer.apply(model, "snapkv:keep=1.0"):
            kept = model.generate(ids, attention_mask=mask, **settings)
        assert all(torch.equal(a, b) for a, b in zip(plain.logits, kept.logits, strict=True))
        with fewer.apply(model, "adakv:keep=0.5,window=3"):
            eager = model.generate(ids, attention_mask=mask, **settings)
        assert model.config._attn_implementation == "eager"
    finally:
        model.set_attn_implementation("sdpa")
    with fewer.apply(model, "adakv:keep=0.5,window=3"):
        sdpa = model.generate(ids, attention_mask=mask, **settings)
    for a, b in zip(eager.logits, sdpa.logits, strict=True):
        assert_close(a, b, rtol=2e-4, atol=2e-4)


def test_a_sliding_layer_never_holds_more_than_its_window():
    model = decoder("gemma3")
    ids, _ = prompt(40)
    with fewer.apply(model, "knorm:tokens=20") as session:
        model.generate(ids, max_new_tokens=20, do_sample=False)
        sliding, whole, _ = session.ledger.layers
    assert sliding.logical == whole.logical == 59
    assert sliding.stored == WINDOW - 1
    assert whole.stored == 20 + 19
