"""Rows in few bits: what is coded, what stays exact, what it weighs, and that it is still the same cache."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

import fewer
from decoders import FAMILIES, decoder, prompt
from fewer.compat import cached
from fewer.core.cache.quantised import Codec, Codes, dequantise, pack, quantise, unpack
from fewer.runtime.kv.state import CacheError
from fewer.spec import parse, text

GREEDY = dict(max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_numbers_survive_packing_and_take_the_bytes_they_should(bits):
    x = torch.randint(0, 2**bits, (3, 13), generator=torch.Generator().manual_seed(0))
    packed = pack(x, bits)
    assert packed.shape == (3, -(-13 * bits // 8))
    assert torch.equal(unpack(packed, bits, 13).long(), x)
    assert pack(torch.tensor([[1, 2, 3, 0]]), 2).tolist() == [[1 + 2 * 4 + 3 * 16]]


def test_two_bits_by_hand():
    x = torch.tensor([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0], [4.5, 5.0]])
    codes, grid = quantise(x, 2, 0)
    assert grid.tolist() == [[1.5, 0.0], [0.0, 5.0]]  # scale, smallest; the second channel has no range
    assert codes.tolist() == [[0, 0], [1, 0], [1, 0], [3, 0]]
    assert dequantise(codes, grid, 0, torch.float32).tolist() == [[0, 5], [1.5, 5], [1.5, 5], [4.5, 5]]


def planted(n: int = 256, small: int = 3, group: int = 64, d: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that spread little around their channel's mean, and in each group a few that are near zero."""
    rng = torch.Generator().manual_seed(0)
    mean = 4 * torch.randn(1, 1, 1, d, generator=rng).sign() + torch.randn(1, 1, 1, d, generator=rng)
    k = mean + 0.3 * torch.randn(2, 2, n, d, generator=rng)
    where = torch.rand(2, 2, n // group, group, generator=rng).argsort(-1)[..., :small]
    where = (where + torch.arange(n // group)[:, None] * group).flatten(2)
    small_ones = 0.05 * torch.randn(2, 2, where.shape[-1], d, generator=rng)
    k.scatter_(2, where[..., None].expand(-1, -1, -1, d), small_ones)
    return k, torch.randn(2, 2, n, d, generator=rng), where


def coded(codec: Codec, k: Tensor, v: Tensor, real: Tensor | None = None, steps: int = 1) -> Codes:
    codes = Codes.empty(codec, k)
    for part in torch.arange(k.shape[2]).chunk(steps):
        codes.append(k[:, :, part], v[:, :, part], None if real is None else real[..., part])
    return codes


def test_a_pool_of_the_small_keys_makes_the_others_five_times_more_exact():
    k, v, where = planted()
    plain = coded(Codec(2, 64, 0, 3, 0), k, v).decode()[0]
    pooled = coded(Codec(2, 64, 0, 3, 12), k, v).decode()
    others = torch.ones(k.shape[:3], dtype=torch.bool).scatter(-1, where, False)
    assert (plain - k)[others].square().mean() > 5 * (pooled[0] - k)[others].square().mean()
    for mine, theirs in zip(pooled, (k, v), strict=True):
        assert torch.equal(mine[~others], theirs[~others])  # to the bit


def slowly(k: Tensor, v: Tensor, group: int, outliers: int, limit: int) -> tuple[Tensor, Tensor, list[int]]:
    """One head, row by row: (n, d) decoded keys and values and the rows of the pool."""
    out_k, out_v, pool = k.clone(), v.clone(), []
    size = k.abs().sum(-1).tolist()
    for first in range(0, k.shape[0], group):
        rows = list(range(first, first + group))
        smallest = sorted(rows, key=lambda i: (size[i], i))[:outliers]
        every = sorted(pool + smallest, key=lambda i: (size[i], i < first, i))
        new = every[:limit]
        back = [i for i in pool if i not in new]
        pool = new
        members = [i for i in rows if i not in pool] + back
        part = k[members]
        low, scale = part.amin(0).half().float(), ((part.amax(0) - part.amin(0)) / 3).half().float()
        out_k[members] = ((part - low) / scale).round().clamp(0, 3) * scale + low
        for i in members:
            low, scale = v[i].amin().half().float(), ((v[i].amax() - v[i].amin()) / 3).half().float()
            out_v[i] = ((v[i] - low) / scale).round().clamp(0, 3) * scale + low
    return out_k, out_v, pool


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize(("outliers", "pool"), [(3, 5), (3, 3), (4, 24), (1, 2), (5, 3)])
def test_the_pool_keeps_the_smallest_rows_and_sends_the_others_back(outliers, pool, steps):
    rng = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 2, 128, 8, generator=rng) * torch.rand(2, 2, 128, 1, generator=rng), torch.randn(2, 2, 128, 8)
    codes = coded(Codec(2, 16, 0, outliers, pool), k, v, steps=steps)
    mine = codes.decode()
    for b in range(2):
        for g in range(2):
            *theirs, kept = slowly(k[b, g], v[b, g], 16, outliers, pool)
            assert sorted(codes.pool_row[b, g].tolist()) == sorted(kept)
            for x, y in zip(mine, theirs, strict=True):
                assert_close(x[b, g], y, atol=1e-5, rtol=1e-5)
    if pool < 8 * outliers:
        assert (codes.home >= 0).any()  # rows really came back


def test_padding_widens_no_range_and_takes_no_place_from_a_row():
    k, v, _ = planted(n=128)
    real = torch.ones(2, 1, 128, dtype=torch.bool)
    real[1, :, :20] = False
    wild = k.masked_fill(~real[..., None], 1e3)
    tame = torch.where(real[..., None], k, k[:, :, 30:31])
    codes = [coded(Codec(2, 64, 0, 3, 6), x, v, real) for x in (wild, tame)]
    a, b = (c.decode()[0] for c in codes)
    shown = real.expand(-1, 2, -1)
    assert torch.equal(a[shown], b[shown])
    zero = coded(Codec(2, 64, 0, 3, 6), k.masked_fill(~real[..., None], 0.0), v, real)
    assert not ((zero.pool_row[1] >= 0) & (zero.pool_row[1] < 20)).any()  # the smallest sums there are, and yet
    all_gone = coded(Codec(2, 64, 0, 3, 6), k, v, torch.zeros_like(real))
    assert all_gone.decode()[0].isfinite().all()


def read(model, ids, mask=None) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    place = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=place, **cached(model, cache))
    return cache


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pool_for_everything_is_plain_generation_to_the_bit(family):
    model = decoder(family)
    ids, mask = prompt(41, 20)
    plain = model.generate(ids, attention_mask=mask, **GREEDY)
    with fewer.apply(model, "ott:group=8,window=4,outliers=8,pool=500"):
        assert torch.equal(plain, model.generate(ids, attention_mask=mask, **GREEDY))
    with fewer.apply(model, "ott:window=500"):
        assert torch.equal(plain, model.generate(ids, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize("bits", [2, 4])
def test_attention_reads_what_was_stored_and_the_ledger_weighs_it(bits):
    model = decoder("llama")
    ids, _ = prompt(45)
    word = torch.tensor([[5]])
    with torch.no_grad(), fewer.apply(model, f"ott:bits={bits},group=8,window=6,outliers=2,pool=5") as session:
        cache = read(model, ids)
        codes, window, d = 32, 13, 8  # four groups leave the window of 6 and up to 7 more
        per_head = 2 * codes * (d * bits // 8) + codes // 8 * 2 * d * 2 + codes * 2 * 2  # codes, grids of keys, values
        per_head += 5 * (2 * d * 4 + 4 + 4) + window * 2 * d * 4  # the pool with rows and sizes, the window
        moves = sum(c.slot.numel() + c.home.numel() for layer in cache.layers for c in layer.codes) * 4
        assert session.ledger.bytes == 3 * 2 * per_head + moves
        assert session.ledger.full_bytes == 3 * 2 * 45 * 2 * d * 4
        assert session.ledger.bytes < session.ledger.full_bytes
        assert session.counts == [45] * 3
        assert session.kept(0)[0, 0].tolist() == list(range(45))
        assert all(layer.keys.shape[-2] == window for layer in cache.layers)
        twin = DynamicCache()
        for index, layer in enumerate(cache.layers):
            k, v = layer.codes[0].decode()
            twin.update(torch.cat([k, layer.keys], -2), torch.cat([v, layer.values], -2), index)
        got = model(word, **cached(model, cache)).logits
        assert cache.get_seq_length() == 46
        for _ in range(8):
            model(word, **cached(model, cache))
        assert cache.layers[0].codes[0].rows == 48  # two groups more
        assert cache.layers[0].keys.shape[-2] == 6
    with torch.no_grad():
        assert_close(model(word, **cached(model, twin)).logits, got, atol=1e-5, rtol=1e-5)


def test_more_bits_come_closer():
    model = decoder("llama")
    ids, mask = prompt(60, 41)
    word = torch.tensor([[5], [6]])
    grown = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    given = dict(attention_mask=grown, position_ids=(grown.cumsum(-1) - 1)[:, -1:])
    with torch.no_grad():
        plain = model(word, **cached(model, read(model, ids, mask)), **given).logits
        error = []
        for bits in (1, 2, 4, 8):
            with fewer.apply(model, f"ott:bits={bits},group=8,window=4,outliers=1,pool=2"):
                got = model(word, **cached(model, read(model, ids, mask)), **given).logits
            error.append((got - plain).square().mean().item())
    assert error == sorted(error, reverse=True)
    assert error[-1] < error[0] / 100


def test_copies_crops_and_beams():
    model = decoder("llama")
    ids, mask = prompt(47, 30)
    words = torch.tensor([[5, 6], [7, 8]])

    def step(cache, i, which=slice(None)):
        whole = torch.cat([mask, torch.ones(2, i + 1, dtype=torch.long)], 1)[which]
        place = (whole.cumsum(-1) - 1)[:, -1:]
        return model(words[which, i : i + 1], attention_mask=whole, position_ids=place, **cached(model, cache)).logits

    with torch.no_grad(), fewer.apply(model, "ott:group=8,window=6,outliers=2,pool=3") as session:
        cache = read(model, ids, mask)
        other = copy.deepcopy(cache)
        wanted = step(cache, 0)
        weight = session.ledger.bytes
        step(cache, 1)
        cache.crop(-2)
        assert cache.layers[1].coded == 40  # still in few bits
        assert_close(step(cache, 0), wanted, atol=1e-5, rtol=1e-5)
        assert session.ledger.bytes == weight
        other.reorder_cache(torch.tensor([1, 0, 1]))
        assert_close(step(other, 0, torch.tensor([1, 0, 1])), wanted[[1, 0, 1]], atol=1e-5, rtol=1e-5)
        cache.crop(-20)  # into what was coded: it is exact numbers again until the next pass
        assert cache.get_seq_length() == 28
        assert cache.layers[0].keys.shape[-2] == 28
        step(other, 1, torch.tensor([1, 0, 1]))
        grown = torch.cat([mask[:, :28], torch.ones(2, 2, dtype=torch.long)], 1)
        model(words, attention_mask=grown, **cached(model, cache))
        assert cache.layers[0].codes[0].rows == 24
        assert model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY).shape == (2, 55)
        assert model.generate(ids[:1], prompt_lookup_num_tokens=3, **GREEDY).shape == (1, 55)


def test_beside_a_method_that_evicts_and_one_that_reads():
    model = decoder("llama")
    ids, _ = prompt(60)
    for order in (1, -1):
        exact, pages = "ott:group=8,window=6,outliers=8,pool=500", "quest:page=4,tokens=16,dense=1"
        stack = ["snapkv:keep=0.5,window=4", exact, pages]
        with fewer.apply(model, stack[::order]) as session:
            got = model.generate(ids, **GREEDY)
            assert session.ledger.stored == [37] * 3
            assert session.ledger.read[1] < 37
        with fewer.apply(model, [stack[0], stack[2]]):  # with all rows in the pool the codec changes nothing
            assert torch.equal(model.generate(ids, **GREEDY), got)
    with fewer.apply(model, ["h2o:keep=0.5", "ott:group=8,window=6,outliers=1,pool=2"]) as session:
        model.generate(ids, **GREEDY)
        assert max(session.ledger.stored) <= 34
    with (
        fewer.apply(model, ["adakv:keep=0.5,window=4", "ott:group=8"]),
        pytest.raises(CacheError, match="evicts evenly"),
    ):
        model.generate(ids, **GREEDY)
    with pytest.raises(fewer.SessionError, match="few bits"):
        fewer.apply(model, ["ott", "ott:bits=4"])


@pytest.mark.parametrize(
    ("spec", "say"),
    [("bits=3", "bits=3"), ("group=0", "group=0"), ("outliers=9,group=8", "outliers=9"), ("pool=-1", "pool=-1")],
)
def test_numbers_that_cannot_be(spec, say):
    with pytest.raises(ValueError, match=say):
        parse(f"ott:{spec}")
    assert text(parse("ott:pool=0,bits=4")) == "ott:bits=4,pool=0"
