"""Quest: bounds hold, pages are the best ones, what is read is what attention sees, and nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

import fewer
from decoders import FAMILIES, WINDOW, decoder, hiding, prompt
from fewer.compat import cached
from fewer.core import Budget, Hard, KeepRatio, Place, Plan, Seen
from fewer.core.cache import CacheReducer, CacheSignals, Rows
from fewer.spec import parse

GREEDY = dict(max_new_tokens=8, do_sample=False)


def seen(n: int, heads: int = 4, groups: int = 2, d: int = 8, batch: int = 2, seed: int = 0, real: Tensor | None = None,
         k: Tensor | None = None):  # fmt: skip
    """One decoding step's signals and rows, at layer 2."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, 1, d, generator=rng)
    k = torch.randn(batch, groups, n, d, generator=rng) if k is None else k
    totals = (n,) * batch if real is None else tuple(real[:, 0].sum(-1).tolist())
    rows = Rows(batch, n, totals=totals, real=real)
    return CacheSignals(k, rows, Place(2, 4, 2, 4, n), Seen(q, k, k, d**-0.5)), rows


def test_the_bound_is_at_least_every_logit_of_its_page_and_met_by_one_channel():
    signals, rows = seen(37, heads=2)
    quest = parse("quest:page=5,tokens=10")
    bound = quest.score(signals, quest.bounds(signals, rows, 8))  # (B, G, 8)
    logits = (signals.q @ signals.k.transpose(-1, -2))[:, :, 0]
    for page in range(8):
        part = logits[..., page * 5 : page * 5 + 5]
        assert (bound[..., page] >= part.amax(-1) - 1e-5).all()
    narrow, rows = seen(37, heads=2, d=1)  # with one channel the bound is the maximum itself
    bound = quest.score(narrow, quest.bounds(narrow, rows, 8))
    logits = (narrow.q @ narrow.k.transpose(-1, -2))[:, :, 0]
    wanted = torch.stack([logits[..., i : i + 5].amax(-1) for i in range(0, 37, 5)], -1)
    assert_close(bound, wanted)


@pytest.mark.parametrize("padded", [False, True])
def test_bounds_kept_step_by_step_are_those_of_all_rows_at_once(padded):
    real = None
    if padded:
        real = torch.ones(2, 1, 40, dtype=torch.bool)
        real[1, :, :7] = False
    whole, rows = seen(40, real=real)
    quest = parse("quest:page=4,tokens=8")
    wanted = quest.bounds(whole, rows, 10)
    local: dict = {}
    for n in (23, 24, 25, 31, 40):
        signals, rows = seen(n, k=whole.k[:, :, :n], real=None if real is None else real[..., :n])
        signals.local = local
        got = quest.bounds(signals, rows, -(-n // 4))
    assert torch.equal(got, wanted)
    for sample, pad in ((0, 0), (1, 7 if padded else 0)):
        first = whole.k[sample, :, pad : pad + 4]
        assert torch.equal(got[sample, :, 0], torch.cat([first.amax(1), (-first).amax(1)], -1))


@pytest.mark.parametrize("group", ["mean", "max"])
@pytest.mark.parametrize("n", [40, 43])
def test_the_pages_read_are_the_best_ones_and_the_newest(n, group):
    signals, rows = seen(n)
    plan = parse(f"quest:page=4,tokens=17,group={group}").read(signals, rows)  # 17 rows are 4 pages
    assert plan is not None
    tail = 4 if n % 4 == 0 else n % 4
    assert plan.lead == (2, 2)
    assert plan.m == 3 * 4 + tail
    for b in range(2):
        for g in range(2):
            bounds = []
            for page in range(0, n - tail, 4):
                part = signals.k[b, g, page : page + 4]
                each = [
                    sum(max(float(q * part[:, c].max()), float(q * part[:, c].min())) for c, q in enumerate(query))
                    for query in signals.q[b, 2 * g : 2 * g + 2, 0]
                ]
                bounds.append(max(each) if group == "max" else sum(each) / 2)
            best = sorted(sorted(range(len(bounds)), key=lambda i: -bounds[i])[:3])
            wanted = [4 * page + i for page in best for i in range(4)] + list(range(n - tail, n))
            assert plan.position[b, g].tolist() == wanted


def test_padding_shifts_no_page():
    whole, _ = seen(50, batch=1)
    pad = torch.full((1, 2, 13, 8), 100.0)  # would win every page if it counted
    both = torch.cat([torch.cat([pad, whole.k[:, :, :37]], 2), whole.k], 0)
    real = torch.ones(2, 1, 50, dtype=torch.bool)
    real[0, :, :13] = False
    signals, rows = seen(50, k=both, real=real)
    alone, own = seen(37, k=whole.k[:, :, :37], batch=1)
    alone.seen.q = signals.q[:1]
    quest = parse("quest:page=4,keep=0.5")
    together, single = quest.read(signals, rows), quest.read(alone, own)
    assert together.lengths[0].tolist() == [single.m] * 2
    assert torch.equal(together.position[0, :, : single.m] - 13, single.position[0])


def test_prompts_first_layers_and_short_caches_are_read_whole():
    quest = parse("quest:page=4,tokens=8")
    signals, rows = seen(40)
    assert quest.read(signals, rows) is not None
    signals.at = Place(1, 4, 1, 4, 40)
    assert quest.read(signals, rows) is None
    assert quest.read(*seen(12)) is None  # three pages always are
    assert parse("quest:page=4,keep=1.0").read(*seen(43)) is None
    many, rows = seen(40)
    many.seen.q = torch.randn(2, 4, 5, 8)
    assert quest.read(many, rows) is None


@dataclass(frozen=True)
class Given(CacheReducer):
    """Reads the rows a test says, in every decoding pass."""

    wanted: Hard
    budget: Budget = KeepRatio(1.0)
    evicts: ClassVar[bool] = False
    reads: ClassVar[bool] = True
    enters: ClassVar[bool] = True
    at: int = 1
    log: tuple[list, ...] = ([],)

    def read(self, signals, rows):
        self.log[0].append((signals.at.layer, signals.entry))
        return None if signals.q.shape[2] > 1 or signals.at.layer != self.at else self.wanted


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("lengths", [(20,), (9, 20)])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_rows_that_are_not_read_get_no_attention(family, lengths, ragged, attention):
    model = decoder(family)
    ids, mask = prompt(*lengths)
    b, n, g = len(lengths), 21, 4 if family == "gpt2" else 2
    rng = torch.Generator().manual_seed(3)
    index = torch.rand(b, g, n - 1, generator=rng).argsort(-1)[..., :11]
    index = torch.cat([index.sort(-1).values, torch.full((b, g, 1), n - 1)], -1)  # the newest is always read
    lengths_read = torch.tensor([[12, 7, 5, 9], [4, 12, 12, 3]])[:b, :g] if ragged else None
    if ragged:
        index = index.flip(-1)
    lost = torch.ones(b, g, n, dtype=torch.bool)
    for i in range(b):
        for j in range(g):
            lost[i, j, index[i, j, : 12 if lengths_read is None else lengths_read[i, j]]] = False
    word, full = torch.full((b, 1), 5), torch.cat([mask, torch.ones(b, 1, dtype=torch.long)], 1)
    given = dict(attention_mask=full, position_ids=(full.cumsum(-1) - 1)[:, -1:])
    first = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    plain = DynamicCache()
    with torch.no_grad(), hiding(model, [None] * 3):
        model(ids, **cached(model, plain), **first)
    with torch.no_grad(), hiding(model, [None, lost, None]):
        wanted = model(word, **cached(model, plain), **given).logits
    method = Given(Plan.keep(index, n, lengths_read))
    type(method).card = parse("quest").card
    method.log[0].clear()
    model.set_attn_implementation(attention)
    try:
        with torch.no_grad(), fewer.apply(model, method) as session:
            cache = DynamicCache(config=model.config)
            model(ids, **cached(model, cache), **first)
            got = model(word, **cached(model, cache), **given).logits
            assert session.ledger.read[1] == (12 if lengths_read is None else lengths_read.float().mean().item())
            assert session.ledger.stored[1] == n
    finally:
        model.set_attn_implementation("sdpa")
    assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    sliding = {0, 2} if family == "gemma3" else set()
    assert [layer for layer, _ in method.log[0]] == [i for i in range(3) if i not in sliding] * 2
    if family == "llama":
        assert torch.equal(method.log[0][0][1], model.model.embed_tokens(ids))
        assert torch.equal(method.log[0][-1][1], model.model.embed_tokens(word))
    assert not model.base_model._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_as_large_as_the_cache_is_plain_generation_to_the_bit(family):
    model = decoder(family)
    for lengths in ((41,), (41, 17)):
        ids, mask = prompt(*lengths)
        plain = model.generate(ids, attention_mask=mask, **GREEDY)
        with fewer.apply(model, "quest:keep=1.0,page=4,dense=0") as session:
            assert torch.equal(plain, model.generate(ids, attention_mask=mask, **GREEDY))
            assert session.ledger.read == session.ledger.stored


@pytest.mark.parametrize("method", ["quest:tokens=12,page=4,dense=1", "quest:keep=0.4,page=4,dense=1,group=max"])
@pytest.mark.parametrize("beside", [None, "snapkv:keep=0.6,window=4", "adakv:keep=0.6,window=4", "h2o:keep=0.6"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_padded_batch_writes_what_each_prompt_writes_alone(family, beside, method):
    model = decoder(family)
    lengths = (40, 18, 29)
    ids, mask = prompt(*lengths)
    settings = dict(**GREEDY, return_dict_in_generate=True, output_logits=True)
    with fewer.apply(model, [beside, method] if beside else [method]) as session:
        together = model.generate(ids, attention_mask=mask, **settings)
        for i, n in enumerate(lengths):
            alone = model.generate(ids[i : i + 1, -n:], **settings)
            for x, y in zip(alone.logits, together.logits, strict=True):
                assert_close(x[0], y[i], rtol=2e-4, atol=2e-4)
        read, stored = session.ledger.read, session.ledger.stored
        assert read[0] == stored[0]
        assert read[1] < stored[1]
        assert (read[2] < stored[2]) == (family != "gemma3")  # sliding there
        if beside is None:
            assert stored[1] == 29 + 7  # the last one alone: nothing was evicted
            assert session.ledger.bytes == session.ledger.full_bytes or family == "gemma3"
            assert stored[0] == (WINDOW - 1 if family == "gemma3" else 36)


def test_beams_and_crops_carry_the_pages_along():
    model = decoder("llama")
    ids, mask = prompt(41, 20)
    words = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    order = torch.tensor([1, 0, 1])

    def steps(cache, some, which, first, last):
        for i in range(first, last):
            whole = torch.cat([mask, torch.ones(2, i + 1, dtype=torch.long)], 1)[which]
            place = (whole.cumsum(-1) - 1)[:, -1:]
            out = model(some[:, i : i + 1], attention_mask=whole, position_ids=place, **cached(model, cache)).logits
        return out

    with torch.no_grad(), fewer.apply(model, "quest:tokens=12,page=4,dense=1"):
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for cache in caches:
            model(ids, attention_mask=mask, position_ids=place, **cached(model, cache))
        wanted = steps(caches[0], words, slice(None), 0, 4)[order]
        steps(caches[1], words, slice(None), 0, 2)
        caches[1].reorder_cache(order)
        steps(caches[1], 60 - words[order], order, 2, 4)
        caches[1].crop(-2)
        assert_close(steps(caches[1], words[order], order, 2, 4), wanted, atol=1e-5, rtol=1e-5)


def test_two_that_evict_or_two_that_read_are_refused():
    model = decoder("llama")
    with pytest.raises(fewer.SessionError, match="two methods that evict"):
        fewer.apply(model, ["snapkv", "knorm"])
    with pytest.raises(fewer.SessionError, match="choose what is read"):
        fewer.apply(model, ["quest", "quest:page=4"])
    with pytest.raises(ValueError, match="page=0"):
        parse("quest:page=0")

    @fewer.core.reducer("greedy", paper="none", acts="prune", on="kv-cache", training="free")
    class Greedy(Given):
        def read(self, signals, rows):
            return Plan.keep(torch.arange(3)[None, None], rows.n)

    method = Greedy(Plan.keep(torch.arange(3)[None, None], 5))
    with fewer.apply(model, method), pytest.raises(fewer.SessionError, match="only one may choose"):
        model(prompt(9)[0])
