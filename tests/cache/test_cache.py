"""The reduced cache as generation uses it: beams, crops, turns, bytes; what it refuses; what it leaves behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import fewer
from decoders import COMMON, WINDOW, attention_of, decoder, prompt
from fewer.compat import cached
from fewer.core import Budget, KeepRatio, Place, Seen
from fewer.core.budgets import BudgetError
from fewer.core.cache import CacheSignals, Rows
from fewer.core.rope import Rotary
from fewer.hosts import HostError
from fewer.runtime.kv.layer import ReducedLayer
from fewer.runtime.kv.state import CacheError
from fewer.spec import parse, text

GREEDY = dict(max_new_tokens=6, do_sample=False)
HEADWISE = "adakv:keep=0.5,window=3,kernel=3,alpha=0.1"


# -- generation --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "method", ["snapkv:keep=0.5,window=4", HEADWISE, "h2o:keep=0.5", "streamingllm:tokens=10,sinks=2"]
)
def test_beams_follow_their_cache(method):
    """Beam search with a reduced cache finds what it finds when every beam is read again from its own prompt."""
    model = decoder("llama")
    ids, mask = prompt(17, 9)
    with torch.no_grad(), fewer.apply(model, method):
        cache = read(model, ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0))
        order, words = torch.tensor([1, 0, 2, 2]), torch.tensor([[5], [6], [7], [8]])
        grown = torch.cat([mask.repeat_interleave(2, 0), torch.ones(4, 1, dtype=torch.long)], 1)
        first = [[3], [4], [9], [9]]
        place = (grown.cumsum(-1) - 1)[:, -1:]
        model(torch.tensor(first), attention_mask=grown, position_ids=place, **cached(model, cache))
        cache.reorder_cache(order)
        last = torch.cat([grown, torch.ones(4, 1, dtype=torch.long)], 1)[order]
        got = model(words, attention_mask=last, position_ids=place[order] + 1, **cached(model, cache)).logits
        for i, (source, word) in enumerate(zip(order.tolist(), words, strict=True)):
            n = int(mask[source // 2].sum())
            own = read(model, ids[source // 2 : source // 2 + 1, -n:])
            model(torch.tensor([first[source]]), **cached(model, own))
            alone = model(word[None], **cached(model, own)).logits
            assert_close(alone[0], got[i], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("method", ["snapkv:keep=0.5,window=4", HEADWISE])
def test_beam_search_and_sampling_run_as_before(method):
    model = decoder("qwen2")
    ids, mask = prompt(17, 9)
    with fewer.apply(model, method):
        out = model.generate(ids, attention_mask=mask, num_beams=3, num_return_sequences=2, **GREEDY)
        assert out.shape == (4, 23)
    torch.manual_seed(3)
    plain = model.generate(ids, attention_mask=mask, do_sample=True, top_k=9, max_new_tokens=6)
    with fewer.apply(model, "snapkv:keep=1.0"):
        torch.manual_seed(3)
        assert torch.equal(plain, model.generate(ids, attention_mask=mask, do_sample=True, top_k=9, max_new_tokens=6))


def test_words_looked_up_in_the_prompt():
    """Guesses are read several at a time and taken back where they were wrong: passes and crops in turn."""
    model = decoder("llama")
    ids = torch.cat([prompt(25)[0], prompt(25)[0][:, :10]], 1)
    plain = model.generate(ids, **GREEDY)
    with fewer.apply(model, "snapkv:keep=1.0"):
        assert torch.equal(plain, model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY))
    for method in ("snapkv:keep=0.5,window=4", HEADWISE, "h2o:keep=0.5", "streamingllm:tokens=12,sinks=2"):
        with fewer.apply(model, method) as session:
            assert model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY).shape == plain.shape
            assert all(count < 35 for count in session.counts)


@pytest.mark.parametrize("method", ["snapkv:keep=0.5,window=4", HEADWISE, "h2o:keep=0.5"])
def test_repeating_and_selecting_samples(method):
    model = decoder("llama")
    ids, mask = prompt(17, 9)
    word, grown = torch.tensor([[5], [6]]), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    place = (grown.cumsum(-1) - 1)[:, -1:]
    with torch.no_grad(), fewer.apply(model, method):
        wanted = model(word, attention_mask=grown, position_ids=place, **cached(model, read(model, ids, mask))).logits
        cache = read(model, ids, mask)
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([4, 0]))
        got = model(
            word.flip(0), attention_mask=grown.flip(0), position_ids=place.flip(0), **cached(model, cache)
        ).logits
    assert_close(got, wanted.flip(0), atol=1e-5, rtol=1e-5)


def read(model: nn.Module, ids, mask=None) -> DynamicCache:
    """A cache that has read these tokens."""
    cache = DynamicCache(config=model.config)
    place = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=place, **cached(model, cache))
    return cache


def test_chunked_prefill_and_turns_through_generate():
    model = decoder("llama")
    ids, mask = prompt(25)
    plain = model.generate(ids, attention_mask=mask, prefill_chunk_size=10, **GREEDY)
    with fewer.apply(model, "snapkv:keep=1.0"):
        assert torch.equal(plain, model.generate(ids, attention_mask=mask, prefill_chunk_size=10, **GREEDY))
    with fewer.apply(model, "snapkv:keep=0.4,window=4") as session:
        cache = DynamicCache(config=model.config)
        first = model.generate(ids, attention_mask=mask, prefill_chunk_size=10, **cached(model, cache), **GREEDY)
        assert session.counts == [10 + 5] * 3  # 0.4 of 25, then the words; the last one was never fed back
        second = torch.cat([first, prompt(6, seed=2)[0]], 1)
        out = model.generate(second, **cached(model, cache), **GREEDY)
        assert out.shape == (1, 37 + 6)
        assert session.counts == [int(0.4 * 37) + 5] * 3
        assert cache.get_seq_length() == 42


@pytest.mark.parametrize("method", ["snapkv:keep=0.5,window=4", HEADWISE])
def test_cropping_takes_the_newest_back(method):
    model = decoder("llama")
    ids, _ = prompt(25)
    words = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), fewer.apply(model, method) as session:
        cache = read(model, ids)
        before = session.kept(1)
        wanted = model(words[:, :1], **cached(model, cache)).logits
        for i in (1, 2):
            model(words[:, i : i + 1], **cached(model, cache))
        cache.crop(-3)
        assert cache.get_seq_length() == 25
        assert torch.equal(session.kept(1), before)
        assert_close(model(words[:, :1], **cached(model, cache)).logits, wanted)
        cache.crop(-10)  # into what was evicted from: heads are left with different numbers
        kept = session.kept(1)
        assert kept.max() < 16
        assert sorted(kept[0, 0][kept[0, 0] >= 0].tolist()) == [p for p in before[0, 0].tolist() if 0 <= p < 16]
        model(words, **cached(model, cache))
        assert cache.get_seq_length() == 19
        with pytest.raises(CacheError, match="negative"):
            cache.crop(3)


def test_a_read_prompt_can_be_copied_and_used_twice():
    model = decoder("llama")
    ids, _ = prompt(25)
    word = torch.tensor([[5]])
    with torch.no_grad(), fewer.apply(model, HEADWISE):
        cache = read(model, ids)
        other = copy.deepcopy(cache)
        a = model(word, **cached(model, cache)).logits
        model(word, **cached(model, cache))
        assert_close(model(word, **cached(model, other)).logits, a)
        cache.reset()
        assert cache.get_seq_length() == 0
        model(ids, **cached(model, cache))
        assert_close(model(word, **cached(model, cache)).logits, a)


def test_a_plain_cache_with_a_prompt_in_it_is_taken_over():
    model = decoder("gemma3")
    ids, _ = prompt(30)
    with torch.no_grad():
        plain = read(model, ids[:, :20])
        with fewer.apply(model, "knorm:keep=1.0"):
            mine = model(ids[:, 20:], **cached(model, plain)).logits
        assert_close(mine, model(ids[:, 20:], **cached(model, read(model, ids[:, :20]))).logits)
        with fewer.apply(model, "knorm:keep=0.5") as session:
            plain = read(model, ids[:, :20])
            model(ids[:, 20:], **cached(model, plain))
            assert session.counts[1] == 15


# -- bytes -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "rows"),
    [("snapkv:keep=0.5,window=4", 12), ("knorm:tokens=7", 7), (HEADWISE, 12), ("streamingllm:tokens=9,sinks=2", 9),
     ("expected_attention:keep=0.3,alpha=0.2", 7)],
)  # fmt: skip
def test_the_cache_is_as_large_as_the_budget_to_the_byte(method, rows):
    model = decoder("llama")
    ids, _ = prompt(25)
    with torch.no_grad(), fewer.apply(model, method) as session:
        cache = read(model, ids)
        row = 2 * 2 * 8 * 4  # two heads, keys and values of eight numbers of four bytes
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values, *(layer.packed or ()))]
        assert sum(t.untyped_storage().nbytes() for t in tensors) == 3 * rows * row == session.ledger.bytes
        assert session.ledger.full_bytes == 3 * 25 * row
        assert session.counts == [rows] * 3
        assert session.ledger.logical == [25] * 3
        model(torch.tensor([[5]]), **cached(model, cache))
        assert session.ledger.bytes == 3 * row * (rows if "streaming" in method else rows + 1)
    if method == HEADWISE:
        lengths = {tuple((session.kept(layer)[0] >= 0).sum(-1).tolist()) for layer in range(3)}
        assert any(a != b for a, b in lengths)  # heads really differ


def test_pyramid_layers_hold_different_numbers():
    model = decoder("llama")
    ids, _ = prompt(40)
    with torch.no_grad(), fewer.apply(model, "pyramidkv:keep=0.5,window=4,kernel=3") as session:
        read(model, ids)
    assert sum(session.counts) == 3 * 20
    assert session.counts == sorted(session.counts, reverse=True)
    assert session.counts[0] > session.counts[-1]


@pytest.mark.parametrize("fidelity", ["paper", "code", "kvpress"])
@pytest.mark.parametrize(
    ("n", "mean", "layers"), [(100, 40, 8), (1000, 64, 5), (50, 45, 4), (64, 9, 3), (20, 20, 4), (30, 20, 1)]
)
def test_pyramid_budgets_sum_to_what_was_asked(n, mean, layers, fidelity):
    method = parse(f"pyramidkv:tokens={mean},window=8,fidelity={fidelity}")
    counts = [method.allowance.keep(n, Place(i, layers, i, layers, n)) for i in range(layers)]
    assert counts == sorted(counts, reverse=True)
    assert all(min(mean, 8) <= c <= n for c in counts)
    if fidelity == "paper":
        assert sum(counts) == mean * layers
    else:
        assert abs(sum(counts) - mean * layers) <= layers * layers


# -- methods by hand ---------------------------------------------------------------------------------------------------
def signals(q, k, v=None, **more) -> tuple[CacheSignals, Rows]:
    n = k.shape[2]
    rows = Rows(k.shape[0], n, totals=(n,) * k.shape[0], age=torch.arange(n, 0, -1)[None, None])
    seen = Seen(q, k, k if v is None else v, q.shape[-1] ** -0.5, causal=True)
    return CacheSignals(k, rows, Place(start=n), seen, **more), rows


def test_snapkv_keeps_a_span_together():
    q = torch.zeros(1, 1, 30, 4)
    k = torch.zeros(1, 1, 30, 4)
    k[0, 0, 10, 0], q[0, 0, 26:, 0] = 9, 9
    s, rows = signals(q, k)
    assert parse("snapkv:tokens=7,window=4,kernel=3").plan(s, rows).position[0, 0].tolist() == [
        9,
        10,
        11,
        26,
        27,
        28,
        29,
    ]


def test_keydiff_evicts_copies_first_and_ignores_length():
    k = torch.eye(6).repeat_interleave(torch.tensor([1, 1, 8, 1, 1, 1]), 0)[None, None]
    s, rows = signals(k, k)
    plan = parse("keydiff:tokens=5").plan(s, rows)
    assert plan.position[0, 0].tolist() == [0, 1, 10, 11, 12]
    s, rows = signals(k, k * torch.rand(13, 1).add(0.1))
    assert torch.equal(parse("keydiff:tokens=5").plan(s, rows).position, plan.position)


def test_heads_share_what_they_need():
    """One head looks at one key, the other at all of them: the pool goes to the second."""
    q, k = torch.zeros(1, 2, 20, 4), torch.zeros(1, 2, 20, 4)
    q[0, 0, :, 0], k[0, 0, 3, 0] = 9, 9
    s, rows = signals(q, k)
    plan = parse("adakv:tokens=8,window=2,kernel=1,alpha=0.2").plan(s, rows)
    assert plan.lengths.tolist() == [[3, 13]]
    assert plan.position[0, 0, :3].tolist() == [3, 18, 19]
    everywhere = parse("adakv:tokens=8,window=2,kernel=1,alpha=1.0").plan(s, rows)
    assert everywhere.lengths.tolist() == [[8, 8]]


def test_received_attention_adds_up_step_by_step():
    """H2O's running sum over a prompt, a chunk and single words is the column sum of the whole attention."""
    model = decoder("llama")
    ids, _ = prompt(24)
    with torch.no_grad(), fewer.apply(model, "h2o:keep=1.0"):
        cache = DynamicCache(config=model.config)
        for a, b in ((0, 10), (10, 20), (20, 21), (21, 22), (22, 23), (23, 24)):
            model(ids[:, a:b], **cached(model, cache))
    model.set_attn_implementation("eager")
    maps = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for layer, full in zip(cache.layers, maps, strict=True):
        assert_close(layer.received, full.sum(2).unflatten(1, (2, 2)).mean(2), atol=1e-5, rtol=1e-5)


def test_expected_attention_is_the_mean_over_sampled_queries():
    torch.manual_seed(5)
    q, k = 0.6 * torch.randn(1, 2, 400, 8) + torch.randn(1, 2, 1, 8), torch.randn(1, 1, 400, 8)
    rotary = Rotary(10.0 ** -torch.arange(4.0))
    turned = rotary.turn(q, torch.arange(400).expand(1, 2, 400))
    s, rows = signals(turned, k, rotary=rotary, at_rope=torch.arange(400)[None])
    method = parse("expected_attention:sinks=0,future=64")
    z = method._logits(s, rows, rows.sinks(0))[0, 0]
    pick = torch.randint(400, (20000,))
    ahead = 400 + torch.randint(64, (20000,))
    for head in range(2):
        sampled = rotary.turn(q[0, head, pick], ahead)
        mean = (sampled @ k[0, 0].T / 8**0.5).exp().mean(0)
        assert torch.corrcoef(torch.stack([z[head].exp(), mean]))[0, 1] > 0.9
        assert_close(s.plain_queries(), q, atol=1e-4, rtol=1e-4)


def test_sinks_travel_so_that_no_gap_is_left():
    """A stream far longer than its cache: logits are those of the kept tokens alone, at the positions of their rows."""
    for family in ("llama", "gemma3", "qwen3"):
        model = decoder(family)
        ids, _ = prompt(30)
        with torch.no_grad(), fewer.apply(model, "streamingllm:tokens=10,sinks=3") as session:
            cache = read(model, ids[:, :20])
            for i in range(20, 29):
                model(ids[:, i : i + 1], **cached(model, cache))
            rotary = session.host.rotary(1)
            keys, kept = cache.layers[1].keys, session.kept(1)
        assert kept[0, 0].tolist() == [0, 1, 2, *range(22, 29)]
        back = rotary.turn(keys, -torch.arange(19, 29).expand(1, 2, 10))
        with torch.no_grad(), fewer.apply(model, "streamingllm:tokens=10,sinks=3,positions=original"):
            stay = read(model, ids[:, :20])  # sinks were read before anything left: the same keys, in both
            original = stay.layers[1].keys[:, :, :3]
        assert_close(back[:, :, :3], rotary.turn(original, -torch.arange(3).expand(1, 2, 3)), atol=1e-4, rtol=1e-4)


def test_tova_evicts_the_row_the_newest_token_looks_at_least():
    model = decoder("llama")
    ids, _ = prompt(12)
    with torch.no_grad(), fewer.apply(model, "tova:tokens=8") as session:
        cache = read(model, ids[:, :8])
        assert session.kept(0)[0, 0].tolist() == list(range(8))
        model(ids[:, 8:9], **cached(model, cache))
        kept = session.kept(0)
    model.set_attn_implementation("eager")
    row = model(ids[:, :9], output_attentions=True).attentions[0][0, :, -1].mean(0)
    model.set_attn_implementation("sdpa")
    gone = set(range(9)) - set(kept[0, 0].tolist())
    assert gone == {int(row.argmin())}
    assert torch.equal(kept[0, 0], kept[0, 1])


def test_long_scores_never_form_a_square():
    """A pass of 4,096 tokens: the largest tensor any score makes is far below the square of the length."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.most = max(self.most, out.numel())
            return out

    n = 4096
    q, k = torch.randn(1, 2, n, 4), torch.randn(1, 1, n, 4)
    s, rows = signals(q, k, rotary=Rotary(torch.ones(2)), at_rope=torch.arange(n)[None])
    with Largest() as seen:
        for spec in (
            "snapkv:tokens=64,window=32",
            "expected_attention:tokens=64",
            "keydiff",
            "knorm",
            "tova:tokens=64",
        ):
            parse(spec).plan(s, rows)
        s.attention_mass_of_all()
    assert seen.most <= n * n / 3


# -- what is refused ---------------------------------------------------------------------------------------------------
def test_caches_that_cannot_shrink_are_refused():
    model = decoder("llama")
    ids, _ = prompt(10)
    with fewer.apply(model, "knorm"):
        for kind in ("static", "offloaded"):
            with pytest.raises(CacheError, match=r"offloaded|StaticCache"):
                model.generate(ids, cache_implementation=kind, **GREEDY)
        with pytest.raises(CacheError, match="StaticCache"):
            model(ids, **cached(model, StaticCache(config=model.config, max_cache_len=20)))
        quantised = DynamicCache(config=model.config)
        quantised.layers[1] = type("QuantizedLayer", (type(quantised.layers[0]),), {})()
        with pytest.raises(CacheError, match="QuantizedLayer"):
            model(ids, **cached(model, quantised))
        with pytest.raises(CacheError, match="4 dimensions"):
            model(ids, attention_mask=torch.ones(1, 1, 10, 10, dtype=torch.bool).tril())
        with pytest.raises(CacheError, match="pad on the left"):
            model(ids.repeat(2, 1), attention_mask=torch.tensor([[1] * 10, [1] * 7 + [0] * 3]))
        with pytest.raises(CacheError, match="position_ids"):
            model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]))


def test_a_reduced_cache_has_one_owner():
    model = decoder("llama")
    ids, _ = prompt(20)
    word = torch.tensor([[5]])
    with torch.no_grad():
        with fewer.apply(model, "knorm:keep=0.5"):
            cache, whole = read(model, ids), DynamicCache(config=model.config)
            model(ids[:, :1], **cached(model, whole))
        with pytest.raises(CacheError, match="not on this model any more"):
            model(word, **cached(model, cache))
        with fewer.apply(model, "snapkv:keep=0.5"), pytest.raises(CacheError, match="another session"):
            model(word, **cached(model, cache))
        assert model(word, **cached(model, whole)).logits.shape == (
            1,
            1,
            61,
        )  # nothing was gone: an ordinary cache again


def test_an_unreduced_cache_lives_on_without_its_session():
    model = decoder("gemma3")
    ids, _ = prompt(40)
    with torch.no_grad():
        with fewer.apply(model, "knorm:keep=1.0"):
            mine = read(model, ids[:, :20])
        plain = read(model, ids[:, :20])
        for a, b in ((20, 21), (21, 30), (30, 31)):
            given = ids[:, a:b]
            assert torch.equal(model(given, **cached(model, mine)).logits, model(given, **cached(model, plain)).logits)


def test_removal_in_the_middle_of_a_generation_is_said():
    model = decoder("llama")
    ids, _ = prompt(20)
    session = fewer.apply(model, "knorm:keep=0.5")
    calls = []

    def stop(module, args):
        calls.append(1)
        if len(calls) == 3:
            session.remove()

    handle = model.register_forward_pre_hook(stop)
    with pytest.raises(CacheError, match="keep the session"):
        model.generate(ids, **GREEDY)
    handle.remove()


def test_models_and_settings_that_do_not_fit():
    model = decoder("llama")
    with pytest.raises(HostError, match="is not a model fewer knows"):
        fewer.apply(nn.Linear(2, 2), "knorm")
    with pytest.raises(fewer.SessionError, match="pass layers="):
        fewer.apply(model, "knorm:layers=0+7")
    with pytest.raises(fewer.SessionError, match="cannot share a cache"):
        fewer.apply(model, ["knorm", "keydiff"])
    with pytest.raises(fewer.SessionError, match="proportional"):
        fewer.apply(model, ["knorm", "tome"])
    with fewer.apply(model, "knorm"), pytest.raises(fewer.SessionError, match="already has a session"):
        fewer.apply(model, "keydiff")
    own = model.config._attn_implementation_internal
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(HostError, match="flash_attention_2"):
        fewer.apply(model, "knorm")
    model.config._attn_implementation_internal = own


def test_rotations_that_change_with_the_length_are_left_alone():
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = LlamaForCausalLM(LlamaConfig(**COMMON, rope_parameters=rope)).eval()
    for spec in ("expected_attention", "streamingllm"):
        with pytest.raises(HostError, match="'dynamic'"):
            fewer.apply(model, spec)
    ids, _ = prompt(20)
    with fewer.apply(model, "snapkv:keep=0.5,window=4") as session:
        model.generate(ids, **GREEDY)
        assert session.counts == [15] * 3


@pytest.mark.parametrize(
    ("spec", "said"),
    [("snapkv:tokens=16,window=32", "32 rows that always stay"), ("streamingllm:tokens=3", "4 rows that always stay"),
     ("snapkv:kernel=4", "odd"), ("snapkv:pool=sum", "pool='sum'"), ("snapkv:window=0", "at least one query"),
     ("adakv:alpha=1.5", "alpha=1.5"), ("h2o:recent=2.0", "recent=2"), ("streamingllm:sinks=-1", "negative"),
     ("streamingllm:positions=new", "neither"), ("knorm:threshold=0.1", "names no count"),
     ("expected_attention:future=0", "ahead"),
     ("pyramidkv:beta=0.5", "beta"), ("pyramidkv:fidelity=mine", "none of"), ("h2o:keep=0.2,of=start", "leave of out")],
)  # fmt: skip
def test_parameters_out_of_range(spec, said):
    with pytest.raises(ValueError, match=said):
        fewer.apply(decoder("llama"), spec)


def test_a_prompt_shorter_than_the_window_stays_and_the_ledger_says_so():
    model = decoder("llama")
    ids, _ = prompt(6)
    with torch.no_grad(), fewer.apply(model, "snapkv:keep=0.5,window=8") as session:
        read(model, ids)
    assert session.counts == [6] * 3
    assert "asks for 3 of 6 rows, 6 always stay" in session.report()


def test_a_sliding_layer_asked_for_more_than_its_window():
    model = decoder("mistral-sliding")
    ids, _ = prompt(30)
    with torch.no_grad(), fewer.apply(model, "snapkv:tokens=25,window=4") as session:
        read(model, ids)
    assert session.counts == [WINDOW - 1] * 3


# -- nothing is left behind --------------------------------------------------------------------------------------------
def trace(model: nn.Module) -> list:
    """Everything a session could have touched."""
    parts = []
    for name, module in model.named_modules():
        hooks = [len(getattr(module, h)) for h in vars(module) if h.endswith("_hooks")]
        parts.append((name, sorted(module.__dict__), hooks))
    config = {k: v for k, v in model.config.__dict__.items()}
    tables = sorted(AttentionInterface._global_mapping), sorted(AttentionMaskInterface._global_mapping)
    return [parts, copy.deepcopy(config), tables, DynamicCache(config=model.config).layers[0].__class__]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_removal_leaves_no_trace(family):
    model = decoder(family)
    ids, mask = prompt(20, 11)
    model.generate(ids, attention_mask=mask, **GREEDY)
    before, plain = trace(model), model.generate(ids, attention_mask=mask, **GREEDY)
    session = fewer.apply(model, HEADWISE)
    with pytest.raises(fewer.SessionError):
        pickle.dumps(model)
    model.generate(ids, attention_mask=mask, **GREEDY)
    assert trace(model) != before
    session.remove()
    session.remove()
    assert trace(model) == before
    assert torch.equal(plain, model.generate(ids, attention_mask=mask, **GREEDY))
    handle = attention_of(model, 1).register_forward_hook(boom)
    with pytest.raises(RuntimeError, match="boom"), fewer.apply(model, "knorm"):
        model.generate(ids, attention_mask=mask, **GREEDY)
    handle.remove()
    assert trace(model) == before


def boom(*_):
    raise RuntimeError("boom")


def test_no_cache_no_method():
    """Training and generation without a cache are left alone, gradients included."""
    model = decoder("llama")
    ids, _ = prompt(12)
    plain = model.generate(ids, use_cache=False, **GREEDY)
    with fewer.apply(model, "knorm:keep=0.2") as session:
        assert torch.equal(plain, model.generate(ids, use_cache=False, **GREEDY))
        loss = model(ids, labels=ids, use_cache=False).loss
        (grad,) = torch.autograd.grad(loss, [model.lm_head.weight])
        assert grad.isfinite().all()
        with pytest.raises(fewer.SessionError, match="no forward pass"):
            _ = session.ledger


def test_bfloat16():
    model = copy.deepcopy(decoder("llama")).to(torch.bfloat16)
    ids, mask = prompt(20, 11)
    with fewer.apply(model, HEADWISE) as session:
        model.generate(ids, attention_mask=mask, **GREEDY)
        assert session.ledger.bytes < session.ledger.full_bytes


def test_report_and_text():
    model = decoder("llama")
    ids, _ = prompt(20)
    with torch.no_grad(), fewer.apply(model, "snapkv", keep=0.5, window=4) as session:
        read(model, ids)
    assert session.report().splitlines()[:2] == ["snapkv:keep=0.5,window=4", "rows 20 -> 10 10 10"]
    assert "2.00x smaller" in session.report()
    assert text(parse("snapkv:keep=0.5,rounding=trunc")) == "snapkv:keep=0.5,rounding=trunc"
    assert isinstance(parse("snapkv:keep=0.5").budget, KeepRatio)
    with pytest.raises(fewer.SessionError, match="rows"):
        _ = session.last
    assert issubclass(BudgetError, ValueError)
    assert issubclass(CacheError, ValueError)
    assert ReducedLayer(session).get_max_length() == -1
    assert isinstance(parse("pyramidkv").allowance, Budget)


@pytest.mark.parametrize("lengths", [(30,), (30, 22)])
@pytest.mark.parametrize("method", ["knorm:keep=0.5", "h2o:keep=0.5", "snapkv:keep=0.5,window=4,kernel=3"])
def test_in_a_sliding_layer_a_budget_is_of_its_window(method: str, lengths: tuple[int, ...]) -> None:
    """Of the 11 rows that the next token sees half stay; those that left the window are neither counted nor kept."""
    model = decoder("mistral-sliding")
    with torch.no_grad(), fewer.apply(model, method) as session:
        read(model, *prompt(*lengths))
        assert session.counts == [(WINDOW - 1) // 2] * 3
        for layer in range(3):
            place = session.kept(layer)
            assert place[place >= 0].min() > 30 - WINDOW
