"""LazyLLM: what it keeps while reading, who comes back while writing, and that nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import DynamicCache

import fewer
from decoders import COMMON, VOCAB, WINDOW, decoder, prompt
from fewer.compat import cache_of, cached
from fewer.core import KeepRatio, Place, Plan, Seen, Signals, Site, Tokens, select
from fewer.methods.language.lazyllm import LazyLLM

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2")
CLOSE = dict(atol=2e-5, rtol=2e-4)
GREEDY = dict(max_new_tokens=8, do_sample=False)


@cache
def deep() -> nn.Module:
    """A Llama of six blocks: three stages with blocks between them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**COMMON | dict(num_hidden_layers=6))).eval()
    model.generation_config.eos_token_id = None
    return model


@dataclass(frozen=True)
class Returning(LazyLLM):
    """Drops as LazyLLM does while a prompt is read, and calls everybody back at the first word."""

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        if signals.q.shape[-2] > 1:
            return super().plan(signals, tokens)
        flat = torch.zeros(tokens.batch, tokens.n, device=signals.device)
        return select.top(flat, KeepRatio(1.0), tokens, at=signals.at)


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def read(model: nn.Module, ids: Tensor, mask: Tensor, cache: DynamicCache, seen: int = 0) -> Tensor:
    return model(ids[:, seen:], attention_mask=mask, position_ids=places(mask)[:, seen:], **cached(model, cache)).logits


def with_words(ids: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    words = torch.randint(3, VOCAB, (len(ids), count), generator=torch.Generator().manual_seed(5))
    return torch.cat([ids, words], 1), torch.cat([mask, torch.ones_like(words)], 1)


def plan_for(method: LazyLLM, attention: Tensor) -> Plan:
    """What the method makes of one head whose last query attends like this. attention: (N,)."""
    n = len(attention)
    q = torch.zeros(1, 1, n, n)
    q[0, 0, -1] = attention.log()
    seen = Seen(q, torch.eye(n)[None, None], torch.eye(n)[None, None], 1.0, causal=True)
    tokens = Tokens.plain(1, n)
    tokens = tokens.protect(tokens.last)
    signals = Signals(torch.zeros(1, n, 4), tokens, Place(layer=1, layers=4, start=n), seen)
    return method.plan(signals, tokens)


def test_the_last_token_decides_and_sinks_stay() -> None:
    attention = torch.tensor([0.02, 0.3, 0.05, 0.2, 0.03, 0.25, 0.1, 0.05])
    assert plan_for(LazyLLM(KeepRatio(0.5), sinks=0), attention).position.tolist() == [[1, 3, 5, 7]]  # 3 of the 7
    assert plan_for(LazyLLM(KeepRatio(0.5), sinks=1), attention).position.tolist() == [[0, 1, 3, 5, 7]]
    with pytest.raises(ValueError, match="sinks=-1"):
        LazyLLM(sinks=-1)


def test_by_default_three_blocks_at_30_50_and_70_percent_of_the_depth() -> None:
    assert LazyLLM().acts_at(32) == (9, 16, 22)
    assert LazyLLM().acts_at(6) == (1, 3, 4)
    assert LazyLLM(layers=(2,)).acts_at(6) == (2,)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_is_the_model_to_the_bit(family: str) -> None:
    model = decoder(family)
    ids, mask = prompt(20, 9, 14)
    with torch.no_grad():
        plain = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **GREEDY)
        with fewer.apply(model, "lazyllm:keep=1.0"):
            kept = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(plain.sequences, kept.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, kept.logits, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("lengths", [(20,), (20, 9, 14)], ids=str)
def test_who_all_come_back_make_the_dense_cache(family: str, lengths: tuple[int, ...]) -> None:
    """Dropped behind block 0, called back at the first word: all layers hold each token once, and up to the first block
    they had not reached the keys are those of the whole text."""
    model = decoder(family)
    ids, mask = prompt(*lengths)
    n = ids.shape[1]
    more, seen = with_words(ids, mask, 1)
    with torch.no_grad(), fewer.apply(model, Returning(KeepRatio(0.5), layers=(0,), sinks=1)) as session:
        lazy = DynamicCache(config=model.config)
        read(model, ids, mask, lazy)
        gone = [set(range(n)) - set(own) for own in session.kept(1)[:, 0].tolist()]
        assert all(gone)
        read(model, more, seen, lazy, n)
        for layer in range(3):
            held = session.kept(layer)[:, 0]
            for own, real in zip(held.tolist(), seen.tolist(), strict=True):
                assert [p for p in own if p >= 0 and real[p]] == [p for p in range(n + 1) if real[p]]
        keys = [layer.keys.clone() for layer in lazy.layers]
        order = [layer.positions() for layer in lazy.layers]
    dense = DynamicCache(config=model.config)
    with torch.no_grad():
        read(model, more, seen, dense)
    for layer in (0, 1):  # block 1 is the first they had not reached
        place = order[layer].expand(len(ids), -1, -1)
        real = (place >= 0) & (seen[:, None].gather(-1, place.clamp(min=0)) > 0)
        index = place.clamp(min=0)[..., None].expand(-1, keys[layer].shape[1], -1, keys[layer].shape[3])
        want = dense.layers[layer].keys.gather(2, index)
        pick = real[..., None].expand_as(keys[layer])
        assert_close(keys[layer][pick], want[pick], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_by_the_last_choice_and_back_is_dense(family: str) -> None:
    """A choice behind the last block but one, where only the last word's row of the last block is read: once all are
    back their keys, values and logits are those of the whole text."""
    model = decoder(family)
    ids, mask = prompt(11, 9)
    more, seen = with_words(ids, mask, 3)
    with torch.no_grad(), fewer.apply(model, Returning(KeepRatio(0.4), layers=(1,), sinks=1)) as session:
        lazy = DynamicCache(config=model.config)
        read(model, ids, mask, lazy)
        assert session.kept(2).shape[-1] < 8
        got = [read(model, more[:, : 12 + i], seen[:, : 12 + i], lazy, 11 + i) for i in range(3)]
    with torch.no_grad():
        want = model(more, attention_mask=seen, position_ids=places(seen), use_cache=False).logits
    assert_close(torch.cat(got, 1), want[:, 11:], **CLOSE)


def counts(made: list[int], layer: int) -> Callable:
    """A hook that adds up the rows a projection is given."""

    def hook(_module: nn.Module, args: tuple, _output: Tensor) -> None:
        made[layer] += args[0].shape[1]

    return hook


@pytest.mark.parametrize("model", ["llama", "gemma3", "gpt2", "deep"])
@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_no_token_passes_a_layer_twice(model: str, keep: float) -> None:
    """Counted where keys are made: over a prompt and many words, no layer makes more keys than there are tokens."""
    net = deep() if model == "deep" else decoder(model)
    ids, mask = prompt(20)
    depth = net.config.num_hidden_layers
    made = [0] * depth
    with torch.no_grad(), fewer.apply(net, f"lazyllm:keep={keep},sinks=1") as session:
        handles = [attention.k_proj.register_forward_hook(counts(made, i)) if hasattr(attention, "k_proj")
                   else attention.c_attn.register_forward_hook(counts(made, i))
                   for i, attention in enumerate(session.host.attentions)]  # fmt: skip
        net.generate(ids, attention_mask=mask, **GREEDY | dict(max_new_tokens=12))
        for handle in handles:
            handle.remove()
        logical = session.ledger.logical[0]
        assert logical == 31
        for layer in range(depth):
            held = [p for p in session.kept(layer)[0, 0].tolist() if p >= 0]
            assert len(held) == len(set(held)) <= logical
            assert held == sorted(held)
            assert made[layer] <= logical
            if session.host.name != "Gemma3TextModel":
                assert len(held) == made[layer]
        assert made[0] == logical
        assert made[-1] < logical or keep > 0.5


@pytest.mark.parametrize("model", ["llama", "qwen3", "gemma3", "gpt2", "deep"])
@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_a_batch_changes_no_text(model: str, keep: float) -> None:
    net = deep() if model == "deep" else decoder(model)
    ids, mask = prompt(20, 9, 14)
    more, seen = with_words(ids, mask, 5)
    with torch.no_grad(), fewer.apply(net, f"lazyllm:keep={keep},sinks=1"):
        cache = DynamicCache(config=net.config)
        got = [read(net, ids, mask, cache)[:, -1:]]
        got += [read(net, more[:, : 21 + i], seen[:, : 21 + i], cache, 20 + i) for i in range(5)]
        for i, n in enumerate((20, 9, 14)):
            own, text, real = DynamicCache(config=net.config), more[i : i + 1, 20 - n :], seen[i : i + 1, 20 - n :]
            alone = [read(net, text[:, :n], real[:, :n], own)[:, -1:]]
            alone += [read(net, text[:, : n + 1 + j], real[:, : n + 1 + j], own, n + j) for j in range(5)]
            assert_close(torch.cat(alone, 1)[0], torch.cat(got, 1)[i], **CLOSE)


def test_a_second_prompt_and_words_after_it() -> None:
    net = deep()
    ids, mask = prompt(20, 12)
    more, seen = with_words(ids, mask, 10)
    with torch.no_grad(), fewer.apply(net, "lazyllm:keep=0.6,sinks=1") as session:
        cache = DynamicCache(config=net.config)
        read(net, ids, mask, cache)
        read(net, more[:, :21], seen[:, :21], cache, 20)
        read(net, more[:, :27], seen[:, :27], cache, 21)  # six tokens at once
        got = read(net, more[:, :28], seen[:, :28], cache, 27)
        for layer in range(6):
            held = [p for p in session.kept(layer)[1, 0].tolist() if p >= 0]
            assert held == sorted(set(held))
        n, text, real = 12, more[1:, 8:], seen[1:, 8:]
        own = DynamicCache(config=net.config)
        read(net, text[:, :n], real[:, :n], own)
        read(net, text[:, :13], real[:, :13], own, 12)
        read(net, text[:, :19], real[:, :19], own, 13)
        assert_close(read(net, text[:, :20], real[:, :20], own, 19)[0], got[1], **CLOSE)


@pytest.mark.parametrize("beside", ["ott", "random:keep=0.8,layers=2"])
def test_beside_methods_that_store_or_drop_for_good(beside: str) -> None:
    net = deep()
    ids, mask = prompt(30, 22)
    with torch.no_grad(), fewer.apply(net, ["lazyllm:keep=0.6,sinks=1", beside]):
        words = net.generate(ids, attention_mask=mask, **GREEDY)
        alone = net.generate(ids[1:, 8:], attention_mask=mask[1:, 8:], **GREEDY)
    assert torch.equal(alone[0, 22:], words[1, 30:])


def test_cropping_forgets_who_waits() -> None:
    net = deep()
    ids, mask = prompt(20)
    more, _ = with_words(ids, mask, 2)
    with torch.no_grad(), fewer.apply(net, "lazyllm:keep=0.5,sinks=1") as session:
        cache = DynamicCache(config=net.config)
        read(net, ids, mask, cache)
        assert session.ledger.layers[2].waiting_bytes > 0
        cache.crop(-8)
        for layer in range(6):
            waiting = cache.layers[layer].waiting
            assert waiting is None or int(waiting.place.max()) < 12
            assert int(session.kept(layer).max()) < 12
        word = torch.cat([ids[:, :12], more[:, 20:21]], 1)
        assert read(net, word, torch.ones_like(word), cache, 12).isfinite().all()
        for layer in range(6):
            held = [p for p in session.kept(layer)[0, 0].tolist() if p >= 0]
            assert held == sorted(set(held))
            assert held[-1] == 12


def test_at_a_sliding_layer_the_rows_of_its_window_are_judged_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two texts, so that holes keep rows in the cache that have left the window."""
    judged: list[Tensor] = []
    plan = Returning.plan

    def counts(self: Returning, signals: Signals, tokens: Tokens) -> Plan:
        if signals.q.shape[-2] == 1:
            judged.append(tokens.unpadded.sum(-1))
        return plan(self, signals, tokens)

    monkeypatch.setattr(Returning, "plan", counts)
    model = decoder("mistral-sliding")
    ids, mask = prompt(30, 22)
    more, seen = with_words(ids, mask, 6)
    with torch.no_grad(), fewer.apply(model, Returning(KeepRatio(0.7), layers=(0, 1), sinks=1)):
        cache = DynamicCache(config=model.config)
        read(model, ids, mask, cache)
        for i in range(6):
            read(model, more[:, : 31 + i], seen[:, : 31 + i], cache, 30 + i)
    assert torch.stack(judged).amax() == WINDOW, "the new token and those it sees"


def test_it_acts_behind_blocks() -> None:
    assert LazyLLM.site is Site.AFTER_BLOCK
    assert LazyLLM.revives


def test_masked_execution_does_not_generate() -> None:
    """It hides what is dropped from one pass; a cache would show it to the next."""
    model = decoder("llama")
    ids, _ = prompt(15)
    with torch.no_grad(), fewer.apply(model, "lazyllm:keep=0.5,layers=1", execution="masked") as session:
        assert cache_of(model(ids)) is None
        with pytest.raises(fewer.SessionError, match="use_cache=False"):
            model.generate(ids, max_new_tokens=2, do_sample=False)
        assert "GFLOPs" in session.report()


def test_the_report_tells_what_reading_cost() -> None:
    model = decoder("llama")
    ids, _ = prompt(40)
    with torch.no_grad(), fewer.apply(model, "lazyllm:keep=0.5,layers=1") as session:
        model(ids)
        cost = session.ledger.reading
        assert cost is not None
        assert cost.ceiling > 1
        assert f"ceiling {cost.ceiling:.2f}x" in session.report()
