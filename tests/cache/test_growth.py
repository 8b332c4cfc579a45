"""A cache that grows token by token: no copy of what it holds, no padding of ragged heads, the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

import fewer
from decoders import decoder, prompt
from fewer.compat import cached
from fewer.core import Seen, attention
from fewer.core.cache.selectors import _highest
from fewer.core.ragged import Packing
from fewer.core.tokens import Group
from fewer.runtime.kv import layer as caches
from fewer.runtime.sites.kv_cache import KVCacheSite

ROW = 2 * 2 * 8 * 4  # two heads, keys and values of eight numbers of four bytes
HEADWISE = "adakv:keep=0.5,window=3,kernel=3,alpha=0.1"


def written(session, steps: int, *lengths: int) -> tuple[DynamicCache, list[torch.Tensor]]:
    """A prompt read and some tokens written after it: the cache and the logits of each step."""
    model = session.model
    ids, mask = prompt(*lengths)
    words, _ = prompt(*[steps] * len(lengths), seed=1)
    cache = DynamicCache(config=model.config)
    whole = torch.cat([mask, torch.ones_like(words)], 1)
    place = (whole.cumsum(-1) - 1).clamp(min=0)
    n, out = ids.shape[1], []
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=place[:, :n], **cached(model, cache))
        for i in range(n, n + steps):
            given = dict(attention_mask=whole[:, : i + 1], position_ids=place[:, i : i + 1], **cached(model, cache))
            out.append(model(words[:, i - n : i - n + 1], **given).logits)
    return cache, out


def test_a_step_copies_nothing_and_the_room_is_small():
    model = decoder("llama")
    ids, _ = prompt(160)
    with torch.no_grad(), fewer.apply(model, "knorm:keep=0.5") as session:
        cache = DynamicCache(config=model.config)
        model(ids, **cached(model, cache))
        assert session.ledger.bytes == 3 * 80 * ROW
        places = set()
        for step in range(1, 9):
            model(ids[:, :1], **cached(model, cache))
            rows = 80 + step
            assert session.counts == [rows] * 3
            assert 3 * rows * ROW <= session.ledger.bytes <= 3 * (rows + rows // 32) * ROW
            places.add(cache.layers[1].keys.data_ptr())
        assert len(places) <= 4  # two rows at a time; a freed place may be taken again
        cache.crop(-3)
        assert session.ledger.bytes == 3 * 85 * ROW  # nothing spare is kept
        assert all(layer.room is None for layer in cache.layers)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_room_changes_no_number(family, monkeypatch):
    with fewer.apply(decoder(family), "knorm:keep=0.8") as session:
        _, roomy = written(session, 6, 50, 41)
        monkeypatch.setattr(caches, "SPARE", (0, 32))
        _, tight = written(session, 6, 50, 41)
    for a, b in zip(roomy, tight, strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_copies_of_a_growing_cache_go_their_own_way():
    model = decoder("llama")
    with fewer.apply(model, "knorm:keep=0.5") as session:
        cache, _ = written(session, 3, 160)
        other, word, second = copy.deepcopy(cache), torch.tensor([[5]]), torch.tensor([[9]])
        with torch.no_grad():
            mine = model(word, **cached(model, cache)).logits
            model(second, **cached(model, other))
            theirs = model(word, **cached(model, other)).logits
            fresh, _ = written(session, 3, 160)
            assert_close(model(word, **cached(model, fresh)).logits, mine)
            fresh, _ = written(session, 3, 160)
            model(second, **cached(model, fresh))
            assert_close(model(word, **cached(model, fresh)).logits, theirs)


def test_read_in_inference_mode_written_outside_of_it():
    model = decoder("llama")
    ids, _ = prompt(160)
    logits = []
    with fewer.apply(model, "knorm:keep=0.5"):
        for mode in (torch.inference_mode, torch.no_grad):
            cache = DynamicCache(config=model.config)
            with mode():
                for part in (ids, ids[:, :1]):
                    model(part, **cached(model, cache))
            with torch.no_grad():
                logits.append(model(ids[:, 1:2], **cached(model, cache)).logits)
        assert model(ids[:, 2:3], **cached(model, cache)).logits.requires_grad  # and with a gradient, by copies
    assert_close(*logits)


@pytest.mark.parametrize("lengths", [(60,), (25, 60, 3)], ids=["one", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_heads_read_one_by_one_give_what_padded_heads_give(family, lengths, monkeypatch):
    with fewer.apply(decoder(family), HEADWISE) as session:
        monkeypatch.setattr(KVCacheSite, "headwise", False)
        cache, padded = written(session, 5, *lengths)
        assert any(layer.packing is not None for layer in cache.layers)
        monkeypatch.undo()
        assert session._shown.headwise
        with monkeypatch.context() as inside:
            if family != "gemma3":  # a layer whose rows left its window has no packed ones, but its prompt may
                inside.setattr(Packing, "pad", None)
            _, apart = written(session, 5, *lengths)
    for a, b in zip(padded, apart, strict=True):
        assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_bfloat16_heads_are_read_in_float32():
    torch.manual_seed(0)
    packing = Packing([5, 2], 5, torch.device("cpu"))
    q, k, v = (torch.randn(2, n, 8, dtype=torch.bfloat16) for n in (3, 5, 5))
    late = torch.randn(2, 2, 4, 8, dtype=torch.bfloat16).unbind(0)
    packed = packing.pack(k)[0], packing.pack(v)[0]
    mask = torch.ones(2, 1, 9, dtype=torch.bool)
    mask[0, :, 1] = mask[1, :, 6] = False
    out = packing.read(q, packed, late, 0.3, mask)
    for i, n in enumerate((5, 2)):
        keys, values = (torch.cat([x[i, :n], y[i]]).float() for x, y in zip((k, v), late, strict=True))
        shown = torch.cat([mask[i, :, :n], mask[i, :, 5:]], -1)
        p = (q[i].float() @ keys.T * 0.3).masked_fill(~shown, float("-inf")).softmax(-1)
        assert_close(out[i].float(), p @ values, atol=1e-2, rtol=1e-2)
        added = torch.zeros(2, 1, 9).masked_fill(~mask, -1e9)
        assert_close(packing.read(q, packed, late, 0.3, added)[i], out[i])


def test_the_highest_scores_are_those_a_stable_sort_puts_first():
    torch.manual_seed(0)
    for n, k, values in ((50, 20, 5), (50, 50, 5), (7, 1, 2), (64, 30, 1000)):
        s = torch.randint(values, (2, 3, n)).float()
        s[0, 0, ::3], s[1, 2, 1::4] = float("inf"), float("-inf")
        wanted = s.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(dim=-1).values
        assert torch.equal(_highest(s, k), wanted)


@pytest.mark.parametrize("bias", [None, "bool", "float"])
def test_mass_in_small_pieces_is_the_whole_mass(bias, monkeypatch):
    """Without a gradient a CPU goes head by head through one piece of memory; with one it does not."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 20, 4), torch.randn(2, 3, 20, 4)
    mask = None if bias is None else torch.rand(2, 1, 1, 20) > 0.3
    if bias == "float":
        mask = torch.randn(2, 6, 20, 20)
    weight = torch.rand(2, 20)
    for queries, w in ((None, weight), (Group(13, 20), None)):
        seen = Seen(q, k, k, 0.5, mask, causal=True)
        plain = attention.mass(seen, queries, w)
        with torch.no_grad():
            for near in (1 << 19, 150, 1):
                monkeypatch.setattr(attention, "NEAR", near)
                assert_close(attention.mass(seen, queries, w), plain)


STEPPING = [
    "streamingllm:tokens={n},sinks=3", "streamingllm:keep=0.5,positions=original", "tova:tokens={n},recent=2",
    "tova:keep=0.6", "h2o:tokens={n}", "h2o:keep=0.5,average=true,recent=0.3", "tova:tokens={n},layers=1",
]  # fmt: skip


@pytest.mark.parametrize("form", STEPPING)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_token_takes_the_place_of_the_one_that_goes(family, form, monkeypatch):
    """The same rows stay and the same numbers come out as where all others are copied."""
    form = form.format(n=20)
    if family == "gpt2" and form.startswith("streamingllm") and "original" not in form:
        form += ",positions=original"  # learned positions cannot be moved
    with fewer.apply(decoder(family), form) as session:
        monkeypatch.setattr(KVCacheSite, "unordered", False)
        _, copied = written(session, 9, 40, 40)
        wanted = [session.kept(i) for i in range(3)]
        monkeypatch.undo()
        monkeypatch.setattr(caches, "SPARE", (4, 1))
        cache, placed = written(session, 9, 40, 40)
        assert any(layer.shuffled for layer in cache.layers)
        for i in range(3):
            assert torch.equal(session.kept(i), wanted[i])
    for a, b in zip(copied, placed, strict=True):
        assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("form", ["streamingllm:tokens=40,sinks=3", "tova:tokens=40", "h2o:tokens=40"])
def test_a_step_at_the_budget_moves_nothing(form):
    model = decoder("llama")
    ids, _ = prompt(60)
    with torch.no_grad(), fewer.apply(model, form) as session:
        cache = DynamicCache(config=model.config)
        model(ids, **cached(model, cache))
        places = []
        for _ in range(5):
            model(ids[:, :1], **cached(model, cache))
            places.append([layer.keys.data_ptr() for layer in cache.layers])
            assert session.counts == [40] * 3
            assert session.ledger.bytes == 3 * 41 * ROW  # one spare row
        assert places == places[:1] * 5


@pytest.mark.parametrize("form", ["streamingllm:tokens=20,sinks=3", "tova:tokens=20", "h2o:tokens=20,recent=0.3"])
def test_shuffled_rows_stand_in_order_for_all_that_comes_after(form, monkeypatch):
    """Copies, beams, crops and a further turn find what they would find without."""
    model = decoder("llama")
    more, _ = prompt(4, 4, seed=3)
    beams = torch.tensor([1, 0, 1])

    def after(session):
        cache, _ = written(session, 7, 40, 40)
        other, third = copy.deepcopy(cache), copy.deepcopy(cache)
        with torch.no_grad():
            out = [model(more, **cached(model, cache)).logits]
            other.reorder_cache(beams)
            for i in range(3):
                out.append(model(more[beams, i : i + 1], **cached(model, other)).logits)
            third.crop(-2)
            assert not any(layer.shuffled for layer in third.layers)
            out.append(model(more[:, :1], **cached(model, third)).logits)
        return out

    with fewer.apply(model, form) as session:
        monkeypatch.setattr(KVCacheSite, "unordered", False)
        wanted = after(session)
        monkeypatch.undo()
        monkeypatch.setattr(caches, "SPARE", (4, 1))
        for a, b in zip(after(session), wanted, strict=True):
            assert_close(a, b, atol=2e-5, rtol=2e-5)
