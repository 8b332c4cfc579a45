"""Tokens leave between a decoder's blocks: against the same decoder with those tokens hidden, nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import DynamicCache

import fewer
from decoders import VOCAB, decoder, hiding, prompt
from fewer.compat import cached
from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens
from fewer.runtime.program import SessionError
from fewer.testing import Honest
from fewer.testing.checks import same_snapshot, snapshot
from fewer.testing.faults import norms

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "mistral-sliding")
GREEDY = dict(max_new_tokens=4, do_sample=False)
CLOSE = dict(atol=2e-5, rtol=2e-4)


@dataclass(frozen=True)
class Before(Honest):
    """The longest tokens go on; each is judged by itself, so neighbours, chunks and padding say nothing."""

    budget: Budget = KeepRatio(0.6)
    layers: tuple[int, ...] | None = (1, 2)
    site: ClassVar[Site] = Site.BEFORE_BLOCK


@dataclass(frozen=True)
class Mid(Before):
    layers: tuple[int, ...] | None = (0, 1)
    site: ClassVar[Site] = Site.MID_BLOCK


@dataclass(frozen=True)
class After(Mid):
    site: ClassVar[Site] = Site.AFTER_BLOCK


@dataclass(frozen=True)
class Around(Before):
    """Blocks 1 and 2 run on the longest tokens; the others pass them by."""

    site: ClassVar[Site] = Site.AROUND_BLOCK


@dataclass(frozen=True)
class Uneven(After):
    """Samples keep different numbers: those longer than their own average."""

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        length = norms(signals.hidden)
        real = torch.ones_like(length) if tokens.valid is None else tokens.valid.float()
        short = length < (length * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        kept = (~short & (real > 0)) | (tokens.guarded if tokens.guarded is not None else False)
        order = (~kept).to(torch.int8).argsort(dim=-1, stable=True)
        return Plan.keep(order, tokens.n, kept.sum(-1))

    @property
    def adaptive(self) -> bool:
        return True


SITES = [Before(), Mid(), After()]
ids_of = lambda m: m if isinstance(m, str) else type(m).__name__  # noqa: E731


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def read(model: nn.Module, ids: Tensor, mask: Tensor, cache: DynamicCache | None = None, seen: int = 0) -> Tensor:
    """Logits of the tokens behind the first `seen`, which the cache has read."""
    use = cache is not None
    return model(
        ids[:, seen:], attention_mask=mask, position_ids=places(mask)[:, seen:], **cached(model, cache), use_cache=use
    ).logits


def hidden_from(session: fewer.Session, n: int) -> list[Tensor]:
    """(B, 1, n) bool per layer: the positions that do not reach it. What left a window has reached its layer."""
    late = session.methods[0].site is not Site.BEFORE_BLOCK
    gone = []
    for layer in range(len(session.host.blocks)):
        kept = session.last.kept(layer - late)[:, None]  # no step comes before block 0
        none = torch.ones(kept.shape[0], 1, n + 1, dtype=torch.bool)
        gone.append(none.scatter(-1, torch.where((kept < 0) | (kept >= n), n, kept), False)[..., :n])
    return gone


def held(session: fewer.Session, n: int) -> list[Tensor]:
    """(B, n) bool per layer: the positions that are not in its cache."""
    gone = []
    for layer in range(len(session.host.blocks)):
        kept = session.kept(layer)[:, 0]
        none = torch.ones(kept.shape[0], n + 1, dtype=torch.bool)
        gone.append(none.scatter(-1, torch.where((kept < 0) | (kept >= n), n, kept), False)[..., :n])
    return gone


def with_words(ids: Tensor, mask: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    words = torch.randint(3, VOCAB, (len(ids), count), generator=torch.Generator().manual_seed(5))
    return torch.cat([ids, words], 1), torch.cat([mask, torch.ones_like(words)], 1)


# -- numbers -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [*SITES, Around()], ids=ids_of)
def test_keeping_all_is_the_model_to_the_bit(family: str, method: Reducer) -> None:
    model = decoder(family)
    ids, mask = prompt(17, 9, 13)
    with torch.no_grad():
        plain = read(model, ids, mask)
        words = model.generate(ids, attention_mask=mask, **GREEDY)
        with fewer.apply(model, type(method)(KeepRatio(1.0))) as session:
            assert torch.equal(read(model, ids, mask), plain)
            assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), words)
            assert all(r.kept is None for r in session.ledger.layers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [*SITES, Uneven()], ids=ids_of)
@pytest.mark.parametrize("lengths", [(17,), (20, 9, 14)], ids=str)
def test_what_left_is_seen_by_nobody_and_nothing_else_changes(
    family: str, method: Reducer, lengths: tuple[int, ...]
) -> None:
    """The reference: all tokens in all layers, with those that left out of sight behind the block they left at."""
    model = decoder(family)
    ids, mask = prompt(*lengths)
    n = ids.shape[1]
    more, seen = with_words(ids, mask)
    with torch.no_grad(), fewer.apply(model, method) as session:
        cache = DynamicCache(config=model.config)
        got = read(model, ids, mask, cache)
        gone = hidden_from(session, n)
        if "sliding" not in family and family != "gemma3":
            assert all(torch.equal(a[:, 0], b) for a, b in zip(gone, held(session, n), strict=True))
        assert [int(session.kept(i).max()) for i in range(3)] == [n - 1] * 3  # the last token reaches all layers
        for layer in range(3):
            kept = session.kept(layer)[:, 0]
            rows = torch.where(kept < 0, 10**6, kept)
            assert bool((rows.diff() >= 0).all())
        steps = [read(model, more[:, : n + i + 1], seen[:, : n + i + 1], cache, n + i) for i in range(3)]
        bare = read(model, ids, mask)
    assert bool((gone[2] & (mask > 0)[:, None]).any())
    with torch.no_grad(), hiding(model, gone):
        want = read(model, more, seen)
    there = ~gone[2][:, 0] & (mask > 0)
    assert_close(got[there], want[:, :n][there], **CLOSE)
    assert_close(bare[mask > 0], got[mask > 0], **CLOSE)
    assert_close(torch.cat(steps, 1), want[:, n:], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [*SITES, Around()], ids=ids_of)
def test_masked_and_gathered_execution_agree(family: str, method: Reducer) -> None:
    model = decoder(family)
    ids, mask = prompt(20, 9, 14)
    with torch.no_grad():
        with fewer.apply(model, method) as session:
            gathered, kept = read(model, ids, mask), session.kept(-1)[:, 0]
        with fewer.apply(model, method, execution="masked") as session:
            masked = read(model, ids, mask)
    there = torch.zeros(3, 21, dtype=torch.bool).scatter(-1, kept.masked_fill(kept < 0, 20), True)[:, :20]
    there = mask > 0 if method.site is Site.AROUND_BLOCK else there & (mask > 0)
    assert_close(masked[there], gathered[there], **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("method", SITES, ids=ids_of)
def test_a_dropped_token_keeps_its_last_value(family: str, method: Reducer) -> None:
    model = decoder(family)
    root = model.get_decoder() if family != "gpt2" else model.transformer
    ids, _ = prompt(16)
    seen: list[Tensor] = []
    first = method.acts_at(3)[0]
    with torch.no_grad():
        plain = root(ids, use_cache=False, output_hidden_states=True).hidden_states
        with fewer.apply(model, method) as session:
            norm = session.host.final_norm
            handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            out = root(ids, use_cache=False).last_hidden_state
            handle.remove()
            kept = session.kept(first)[0, 0].tolist()
        assert out.shape == plain[-1].shape
    gone = [i for i in range(16) if i not in kept]
    assert gone
    value = plain[first + (method.site is Site.AFTER_BLOCK)]
    assert_close(seen[0][0, gone], value[0, gone], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [*SITES, Uneven(), "random:keep=0.6,layers=0+1"], ids=ids_of)
def test_a_batch_changes_no_text(family: str, method: Reducer | str) -> None:
    model = decoder(family)
    ids, mask = prompt(20, 9, 14)
    with torch.no_grad(), fewer.apply(model, method):
        logits = read(model, ids, mask)
        words = model.generate(ids, attention_mask=mask, **GREEDY)
        for i, n in enumerate((20, 9, 14)):
            assert_close(read(model, ids[i : i + 1, -n:], mask[i : i + 1, -n:])[0], logits[i, -n:], **CLOSE)
            alone = model.generate(ids[i : i + 1, -n:], attention_mask=mask[i : i + 1, -n:], **GREEDY)
            assert torch.equal(alone[0, n:], words[i, 20:])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("method", [Before(), After(), Around(), "lazyllm:keep=0.6,sinks=1,layers=0+1"], ids=ids_of)
def test_padding_behind_where_nothing_is_cached(family: str, method: Reducer | str) -> None:
    """As in training and scoring; the last real token of each text stays. A cache takes padding in front only."""
    model = decoder(family)
    ids, mask = prompt(20, 9, 14)
    turned = torch.stack([row.roll(n) for row, n in zip(ids, (20, 9, 14), strict=True)])
    real = torch.stack([row.roll(n) for row, n in zip(mask, (20, 9, 14), strict=True)])
    with torch.no_grad(), fewer.apply(model, method):
        got = model(turned, attention_mask=real, use_cache=False).logits
        for i, n in enumerate((20, 9, 14)):
            assert_close(model(ids[i : i + 1, -n:], use_cache=False).logits[0], got[i, :n], **CLOSE)
        with pytest.raises(ValueError, match="pad on the left"):
            model(turned, attention_mask=real, use_cache=True)


def test_a_sliding_layer_sees_the_rows_of_its_window_by_their_place() -> None:
    """Few rows are left: a window of 12 places then holds fewer than 12 of them."""
    model = decoder("gemma3")
    ids, mask = prompt(40)
    more, seen = with_words(ids, mask, 12)
    with torch.no_grad(), fewer.apply(model, Before(KeepRatio(0.4))) as session:
        cache = DynamicCache(config=model.config)
        got = read(model, ids, mask, cache)
        gone = hidden_from(session, 40)
        steps = [read(model, more[:, : 41 + i], seen[:, : 41 + i], cache, 40 + i) for i in range(12)]
    with torch.no_grad(), hiding(model, gone):
        want = read(model, more, seen)
    there = ~gone[2][:, 0]
    assert int(there.sum()) < 10
    assert_close(got[there], want[:, :40][there], **CLOSE)
    assert_close(torch.cat(steps, 1), want[:, 40:], **CLOSE)


# -- generation --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", SITES, ids=ids_of)
def test_turns_and_chunks_hide_what_left_earlier(family: str, method: Reducer) -> None:
    """Three passes over one cache, padded in front; each of them drops some of its own tokens."""
    model = decoder(family)
    ids, mask = prompt(26, 17)
    spans = [(0, 11), (11, 18), (18, 26)]
    with torch.no_grad(), fewer.apply(model, method) as session:
        cache = DynamicCache(config=model.config)
        got = []
        went = [torch.ones(2, 1, 26, dtype=torch.bool) for _ in range(3)]
        for start, stop in spans:
            got.append(read(model, ids[:, :stop], mask[:, :stop], cache, start))
            for layer in range(3):
                rows = session.kept(layer)[:, :1]
                new = (rows >= start) & (rows < stop)
                b, _, m = new.nonzero(as_tuple=True)
                went[layer][b, 0, rows[b, 0, m]] = False
        assert cache.get_seq_length() == 26
    with torch.no_grad(), hiding(model, went):
        want = read(model, ids, mask)
    there = ~went[2][:, 0] & (mask > 0)
    assert bool((~there & (mask > 0)).any())
    assert_close(torch.cat(got, 1)[there], want[there], **CLOSE)


def test_chunks_and_turns_through_generate() -> None:
    model = decoder("llama")
    ids, mask = prompt(25)
    with fewer.apply(model, Before()) as session:
        cache = DynamicCache(config=model.config)
        first = model.generate(ids, attention_mask=mask, prefill_chunk_size=10, **cached(model, cache), **GREEDY)
        assert session.counts[0] == 25 + 3
        assert session.counts[2] < 16
        second = torch.cat([first, prompt(6, seed=2)[0]], 1)
        out = model.generate(second, **cached(model, cache), **GREEDY)
        assert out.shape == (1, 29 + 6 + 4)
        assert cache.get_seq_length() == 38


@pytest.mark.parametrize("method", [*SITES, "lazyllm:keep=0.6,sinks=1,layers=0+1"], ids=ids_of)
def test_beams_follow_their_rows(method: Reducer | str) -> None:
    """Beams in a new order answer as each does when read again from its own prompt."""
    model = decoder("llama")
    ids, mask = (t.repeat_interleave(2, 0) for t in prompt(17, 9))
    first = torch.tensor([[3], [4], [9], [9]])
    order, words = torch.tensor([1, 0, 2, 2]), torch.tensor([[5], [6], [7], [8]])
    grown, twice = (torch.cat([mask, torch.ones(4, w, dtype=torch.long)], 1) for w in (1, 2))
    with torch.no_grad(), fewer.apply(model, method):
        cache = DynamicCache(config=model.config)
        read(model, ids, mask, cache)
        read(model, torch.cat([ids, first], 1), grown, cache, 17)
        cache.reorder_cache(order)
        got = read(model, torch.cat([torch.cat([ids, first], 1)[order], words], 1), twice[order], cache, 18)
        for i, source in enumerate(order.tolist()):
            n = int(mask[source].sum())
            own, text = DynamicCache(config=model.config), torch.cat([ids[source, -n:], first[source], words[i]])[None]
            real = torch.ones_like(text)
            read(model, text[:, :n], real[:, :n], own)
            read(model, text[:, : n + 1], real[:, : n + 1], own, n)
            assert_close(read(model, text, real, own, n + 1)[0], got[i], **CLOSE)


@pytest.mark.parametrize("method", [Before(), After(), "lazyllm:keep=0.6,sinks=1,layers=0+1"], ids=ids_of)
def test_beam_search_and_lookups_run(method: Reducer | str) -> None:
    """Guesses are read several at a time and taken back where they were wrong: passes and crops in turn."""
    model = decoder("llama")
    ids, mask = prompt(17, 9)
    again = torch.cat([prompt(25)[0], prompt(25)[0][:, :10]], 1)
    with fewer.apply(model, method):
        out = model.generate(ids, attention_mask=mask, num_beams=3, num_return_sequences=2, **GREEDY)
        assert out.shape == (4, 21)
        assert model.generate(again, prompt_lookup_num_tokens=3, **GREEDY).shape == (1, 39)


@pytest.mark.parametrize("method", SITES, ids=ids_of)
def test_cropping_takes_the_newest_back(method: Reducer) -> None:
    model = decoder("llama")
    ids, mask = prompt(25, 14)
    more, seen = with_words(ids, mask)
    with torch.no_grad(), fewer.apply(model, method) as session:
        cache = DynamicCache(config=model.config)
        read(model, ids, mask, cache)
        before = [session.kept(i) for i in range(3)]
        wanted = read(model, more[:, :26], seen[:, :26], cache, 25)
        read(model, more, seen, cache, 26)
        cache.crop(-3)
        assert cache.get_seq_length() == 25
        assert all(torch.equal(session.kept(i), b) for i, b in enumerate(before))
        assert_close(read(model, more[:, :26], seen[:, :26], cache, 25), wanted, **CLOSE)
        cache.crop(-8)  # into the prompt: layers are left with what they have of its first tokens
        for i, b in enumerate(before):
            want = [[p for p in own if 0 <= p < 18] for own in b[:, 0].tolist()]
            assert [[p for p in own if p >= 0] for own in session.kept(i)[:, 0].tolist()] == want
        gone = [g[:, None] for g in held(session, 18)]
        short = torch.cat([ids[:, :18], more[:, 25:26]], 1)
        real = torch.cat([mask[:, :18], seen[:, 25:26]], 1)
        got = read(model, short, real, cache, 18)
    with torch.no_grad(), hiding(model, gone):
        assert_close(got, read(model, short, real)[:, -1:], **CLOSE)


# -- methods together --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("inside", SITES, ids=ids_of)
def test_a_cache_method_evicts_from_what_arrived(inside: Reducer) -> None:
    """The reading hides what left between the blocks; the words after it see the rows each head has kept."""
    model = decoder("llama")
    ids, mask = prompt(20, 12)
    more, seen = with_words(ids, mask)
    with torch.no_grad(), fewer.apply(model, [inside, "snapkv:keep=0.25,window=2"]) as session:
        cache = DynamicCache(config=model.config)
        got = read(model, ids, mask, cache)
        left = hidden_from(session, 20)
        lost = []
        for layer in range(3):
            kept = session.kept(layer)
            none = torch.ones(2, 2, 21, dtype=torch.bool)
            lost.append(none.scatter(-1, kept.masked_fill(kept < 0, 20), False)[..., :20])
            assert bool((lost[layer] | ~left[layer]).all())  # nothing is kept that never arrived
            assert bool((lost[layer] & ~left[layer]).any())
        assert session.counts == [4, 4, 4]  # a quarter of the 20 and 12 tokens that were read
        steps = [read(model, more[:, : 21 + i], seen[:, : 21 + i], cache, 20 + i) for i in range(3)]
    with torch.no_grad():
        whole = DynamicCache(config=model.config)
        with hiding(model, left):
            want = read(model, ids, mask, whole)
        with hiding(model, lost):
            later = [read(model, more[:, : 21 + i], seen[:, : 21 + i], whole, 20 + i) for i in range(3)]
    there = ~left[2][:, 0] & (mask > 0)
    assert_close(got[there], want[there], **CLOSE)
    assert_close(torch.cat(steps, 1), torch.cat(later, 1), **CLOSE)


def test_bringing_tokens_back_and_evicting_them_is_refused() -> None:
    model = decoder("llama")
    before = snapshot(model)
    for beside in ("snapkv:keep=0.5,window=4", "h2o:keep=0.5", "quest:tokens=8,page=4"):
        with pytest.raises(SessionError, match="brings dropped tokens back"):
            fewer.apply(model, ["lazyllm:keep=0.7", beside])
    same_snapshot(before, snapshot(model), "a refused session")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("method", [Before(), After(), "lazyllm:keep=0.7", "agile_quant:keep=0.7"], ids=ids_of)
def test_removal_leaves_no_trace(family: str, method: Reducer | str) -> None:
    model = decoder(family)
    ids, mask = prompt(17, 9)
    with torch.no_grad():
        plain = read(model, ids, mask)
        before = snapshot(model)
        session = fewer.apply(model, method)
        model.generate(ids, attention_mask=mask, **GREEDY)
        with pytest.raises(fewer.SessionError, match="already has a session"):
            fewer.apply(model, "snapkv:keep=0.5")
        session.remove()
        session.remove()
        same_snapshot(before, snapshot(model), f"{method} after remove()")
        assert torch.equal(read(model, ids, mask), plain)
        assert session.ledger.stored[0] > 0  # what was traced stays readable


def test_a_reduced_cache_cannot_be_read_without_its_session() -> None:
    model = decoder("llama")
    ids, mask = prompt(17)
    more, seen = with_words(ids, mask)
    with torch.no_grad():
        with fewer.apply(model, Before()):
            cache = DynamicCache(config=model.config)
            read(model, ids, mask, cache)
        with pytest.raises(ValueError, match="reduced by a session"):
            read(model, more[:, :18], seen[:, :18], cache, 17)


# -- cost --------------------------------------------------------------------------------------------------------------
def test_the_ledger_by_hand() -> None:
    """Llama of width 32, 4 query heads and 2 KV heads of 8, MLP of 48, three blocks; 20 tokens, 12 from block 1 on."""
    model = decoder("llama")
    ids, mask = prompt(20)
    with torch.no_grad(), fewer.apply(model, Before(KeepRatio(0.6), layers=(1,))) as session:
        read(model, ids, mask)
        ledger, counts = session.last.ledger, session.last.counts

    def block(n: int) -> int:
        attention = n * (32 * 32 + 2 * 32 * 16 + 32 * 32)
        pairs = n * (n + 1) // 2 * 2 * 32  # causal; q k^T and its product with v
        return attention + pairs + n * 3 * 32 * 48

    assert counts == [20, 12, 12]
    assert ledger.gflops_full * 1e9 == pytest.approx(3 * block(20))
    assert ledger.gflops_model * 1e9 == pytest.approx(block(20) + 2 * block(12))
    assert ledger.ceiling == pytest.approx(3 * block(20) / (block(20) + 2 * block(12)))


def test_the_cache_holds_only_what_arrived() -> None:
    model = decoder("qwen3")
    ids, mask = prompt(20)
    with torch.no_grad(), fewer.apply(model, Before(KeepRatio(0.6))) as session:
        cache = DynamicCache(config=model.config)
        read(model, ids, mask, cache)
        row = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8 channels, 4 bytes
        assert [r.bytes for r in session.ledger.layers] == [20 * row, 12 * row, 7 * row]
        assert session.counts == [20, 12, 7]  # the last one, and 0.6 of the 19 and 11 others
        assert [layer.keys.shape[2] for layer in cache.layers] == [20, 12, 7]
