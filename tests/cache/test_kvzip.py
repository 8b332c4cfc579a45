"""KVzip: the second reading leaves no trace, votes are what the paper says, and the budget is met over all heads."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

import fewer
from decoders import decoder, hiding, prompt
from fewer.compat import cached
from fewer.core import Place, Seen
from fewer.core.cache import CacheSignals, Rows
from fewer.spec import parse, text

FULL = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
GREEDY = dict(max_new_tokens=6, do_sample=False)


def read(model, ids, mask=None, **more) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    place = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    model(**more or dict(input_ids=ids), attention_mask=mask, position_ids=place, **cached(model, cache))
    return cache


def by_hand(q, k, n, first, last, sinks, scale) -> torch.Tensor:
    """(G, last - first): one sample, one query after the other."""
    h, repeats, _ = q.shape
    g = k.shape[0]
    best = torch.zeros(g, last - first)
    for head in range(h):
        group = head // (h // g)
        for i in range(repeats):
            rows = sorted({*range(sinks), *range(first, last)}) + list(range(n, n + i + 1))
            p = (k[group, rows] @ q[head, i] * scale).softmax(-1)
            for row, value in zip(rows, p, strict=True):
                if first <= row < last:
                    best[group, row - first] = max(best[group, row - first], value)
    return best


@pytest.mark.parametrize(("first", "last"), [(0, 9), (9, 18), (18, 23)])
def test_votes_are_the_largest_probability_of_any_query_and_head(first, last):
    rng = torch.Generator().manual_seed(0)
    n, repeats = 23, last - first + 3
    q, k = torch.randn(2, 4, repeats, 8, generator=rng), torch.randn(2, 2, n + repeats, 8, generator=rng)
    rows = Rows(2, n, totals=(n, n))
    signals = CacheSignals(k, rows, Place(0, 1), Seen(q, k, k, 0.5))
    got = parse("kvzip:sinks=4").votes(signals, rows, first, last)
    for b in range(2):
        assert_close(got[b], by_hand(q[b], k[b], n, first, last, 4, 0.5))


def test_padding_neither_votes_nor_is_voted_for():
    rng = torch.Generator().manual_seed(0)
    n, pad, first, last = 23, 10, 8, 23
    q, k = torch.randn(1, 4, 15, 8, generator=rng), torch.randn(1, 2, n + 15, 8, generator=rng)
    real = (torch.arange(n) >= pad)[None, None]
    rows = Rows(1, n, totals=(n - pad,), real=real)
    signals = CacheSignals(k, rows, Place(0, 1), Seen(q, k, k, 0.5), asking=real[:, 0, first:last])
    kvzip = parse("kvzip:sinks=4")
    got = kvzip.votes(signals, rows, first, last)
    own = k[:, :, [*range(pad, n), *range(n + 2, n + 15)]]
    few = Rows(1, n - pad, totals=(n - pad,))
    alone = kvzip.votes(CacheSignals(own, few, Place(0, 1), Seen(q[:, :, 2:], own, own, 0.5)), few, 0, n - pad)
    assert_close(got[..., 2:], alone)


def test_each_chunk_is_read_behind_the_end_of_the_one_before(monkeypatch):
    """40 tokens in chunks of 16 with 5 of overlap, behind an instruction of 2."""
    seen, votes = [], type(parse("kvzip")).votes

    def counted(self, signals, rows, first, last):
        seen.append((signals.q.shape[2], first, last))
        return votes(self, signals, rows, first, last)

    monkeypatch.setattr(type(parse("kvzip")), "votes", counted)
    model = decoder("llama")
    with torch.no_grad(), fewer.apply(model, "kvzip:keep=0.5,chunk=16,overlap=5,instruction=7+8"):
        read(model, prompt(40)[0])
    assert seen[::3] == [(18, 0, 16), (23, 16, 32), (15, 32, 40)]


@pytest.mark.parametrize("family", FULL)
def test_a_second_reading_leaves_no_trace(family):
    """With everything kept but one row, the rows that are left are those of a plain prompt, to the bit."""
    model = decoder(family)
    ids, _ = prompt(40)
    with torch.no_grad():
        plain = read(model, ids)
        wanted = model(ids).logits
        with fewer.apply(model, "kvzip:keep=0.98,share=head,chunk=16,instruction=7+8") as session:
            cache = DynamicCache(config=model.config)
            assert_close(model(ids, **cached(model, cache)).logits, wanted, atol=1e-5, rtol=1e-5)
            assert cache.get_seq_length() == 40
            assert session.counts == [39] * 3
            for index, layer in enumerate(cache.layers):
                kept = session.kept(index)[..., None].expand(-1, -1, -1, 8)
                assert torch.equal(layer.keys, plain.layers[index].keys.gather(2, kept))
                assert torch.equal(layer.values, plain.layers[index].values.gather(2, kept))
                assert layer.totals == [40]
        assert not model.base_model._forward_hooks


@pytest.mark.parametrize("share", ["model", "layer", "head"])
@pytest.mark.parametrize("lengths", [(40,), (40, 23)])
def test_the_budget_is_met_and_decoding_reads_what_was_kept(share, lengths):
    model = decoder("llama")
    ids, mask = prompt(*lengths)
    b = len(lengths)
    word = torch.full((b, 1), 5)
    grown = torch.cat([mask, torch.ones(b, 1, dtype=torch.long)], 1)
    given = dict(attention_mask=grown, position_ids=(grown.cumsum(-1) - 1)[:, -1:])
    with torch.no_grad(), fewer.apply(model, f"kvzip:keep=0.4,share={share},chunk=16,overlap=3") as session:
        cache = read(model, ids, mask)
        kept = [session.kept(layer).expand(b, 2, -1) for layer in range(3)]
        got = model(word, **cached(model, cache), **given).logits
    counts = torch.stack([(k >= 0).sum(-1) for k in kept], 1)  # (B, L, G)
    want = torch.tensor([int(0.4 * n) for n in lengths])
    if share == "model":
        assert torch.equal(counts.sum((1, 2)), 6 * want)
    elif share == "layer":
        assert torch.equal(counts.sum(2), 2 * want[:, None].expand(-1, 3))
    else:
        assert torch.equal(counts, want[:, None, None].expand(-1, 3, 2))
    assert counts.min() >= 4
    if share != "head":
        assert counts.unique().numel() > b
    for k in kept:
        for i, n in enumerate(lengths):
            for rows in k[i]:
                assert set(range(40 - n, 44 - n)) <= set(rows.tolist())  # sinks
                assert all(row >= 40 - n or row == -1 for row in rows.tolist())  # no padding
    slots = [torch.where(k < 0, 40, k) for k in kept]
    gone = [~torch.zeros(b, 2, 41, dtype=torch.bool).scatter(-1, slot, True)[..., :40] for slot in slots]
    plain = DynamicCache()
    with torch.no_grad():
        with hiding(model, [None] * 3):
            model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **cached(model, plain))
        with hiding(model, gone):
            assert_close(model(word, **cached(model, plain), **given).logits, got, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["kvzip:keep=0.4,chunk=64", "kvzip:keep=0.4,chunk=64,share=head,instruction=9+7"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_padded_batch_writes_what_each_prompt_writes_alone(family, method):
    model = decoder(family)
    lengths = (40, 18, 29)
    ids, mask = prompt(*lengths)
    settings = dict(**GREEDY, return_dict_in_generate=True, output_logits=True)
    with fewer.apply(model, method):
        together = model.generate(ids, attention_mask=mask, **settings)
        for i, n in enumerate(lengths):
            alone = model.generate(ids[i : i + 1, -n:], **settings)
            for x, y in zip(alone.logits, together.logits, strict=True):
                assert_close(x[0], y[i], rtol=2e-4, atol=2e-4)


def test_keeping_everything_costs_nothing_and_changes_nothing():
    model = decoder("llama")
    ids, mask = prompt(40, 20)
    plain = model.generate(ids, attention_mask=mask, **GREEDY)
    with fewer.apply(model, "kvzip:keep=1.0") as session:
        assert torch.equal(plain, model.generate(ids, attention_mask=mask, **GREEDY))
        assert session.ledger.flops == 0
    with fewer.apply(model, "kvzip:keep=0.5") as session:
        model.generate(ids, attention_mask=mask, **GREEDY)
        assert session.ledger.flops > 2 * 40 * sum(p.numel() for p in model.model.layers.parameters())


def test_one_cache_serves_many_questions():
    model = decoder("llama")
    ids, _ = prompt(40)
    with torch.no_grad(), fewer.apply(model, "kvzip:keep=0.5,share=layer") as session:
        cache = read(model, ids)
        held = session.kept(1)
        for seed in (1, 2):
            question = torch.cat([ids, prompt(7, seed=seed)[0]], 1)
            out = model.generate(question, **cached(model, cache), **GREEDY)
            assert out.shape == (1, 53)
            assert session.counts == [20 + 7 + 5] * 3  # the context compressed, the question and the answer not
            assert any("later passes are kept whole" in note for note in session.ledger.notes)
            cache.crop(-12)
            assert torch.equal(session.kept(1), held)
        inputs = read(model, None, inputs_embeds=model.model.embed_tokens(ids))
        assert torch.equal(session.kept(1), held)
        assert inputs.get_seq_length() == 40


def test_beside_a_method_that_stores_and_one_that_reads():
    model = decoder("llama")
    ids, _ = prompt(60)
    stack = ["kvzip:keep=0.6,share=head", "quest:page=4,tokens=16,dense=1", "ott:group=8,window=4,outliers=8,pool=99"]
    with fewer.apply(model, stack[:2]) as session:
        wanted = model.generate(ids, **GREEDY)
        assert session.ledger.read[1] < session.ledger.stored[1] == 36 + 5
    with fewer.apply(model, stack) as session, torch.no_grad():
        assert torch.equal(model.generate(ids, **GREEDY), wanted)
        assert read(model, ids).layers[0].coded == 32


def test_what_cannot_be():
    model = decoder("gemma3")
    with fewer.apply(model, "kvzip"), pytest.raises(fewer.SessionError, match="sliding-window"):
        model.generate(prompt(30)[0], **GREEDY)
    model = decoder("gpt2")
    with fewer.apply(model, "kvzip:chunk=100"), pytest.raises(fewer.SessionError, match="learned positions for 256"):
        model(torch.full((1, 200), 5))
    with pytest.raises(ValueError, match="sinks=0"):
        parse("kvzip:sinks=0")
    with pytest.raises(ValueError, match="share='heads'"):
        fewer.KVzip(share="heads")
    assert text(parse("kvzip:instruction=5+6,keep=0.5")) == "kvzip:keep=0.5,instruction=5+6"
