"""TokenSwift: text, distribution and cache are the plain model's."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor, TextStreamer

import fewer
from decoders import FAMILIES, VOCAB, WINDOW, decoder, prompt
from fewer.compat import cache_of, cached
from fewer.generation import Chained, ContextualPenalty, Layers, Swift, SwiftError, swift
from fewer.generation import writing as module
from fewer.generation.verifying import Verifier
from guessing import exact, heads_for

NEW = 3 * WINDOW


def plain(model: Any, ids: Tensor, **options: Any) -> Tensor:
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW} | options
    return model.generate(ids, **given)


KINDS = [None, "chained", "layers"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_the_plain_models(family: str, kind: str | None) -> None:
    """Greedy; and sampled, for each token takes one draw. Three windows of those models that slide."""
    model, (ids, _) = exact(family), prompt(17)
    heads = heads_for(model, kind)
    greedy = swift(model, ids, heads=heads, max_new_tokens=NEW, least=0.0)
    assert torch.equal(greedy.sequences, plain(model, ids))
    assert greedy.new == NEW
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "min_p": 0.02}
    torch.manual_seed(4)
    want = plain(model, ids, **options)
    torch.manual_seed(4)
    assert torch.equal(swift(model, ids, heads=heads, max_new_tokens=NEW, least=0.0, **options).sequences, want)


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_guesses_come_true(family: str) -> None:
    """On a text that repeats itself, which a random model's greedy text does after a while."""
    model, (ids, _) = exact(family), prompt(17)
    written = swift(model, ids, heads=None, max_new_tokens=200, nodes=12)
    assert written.per_pass > 2
    assert max(written.accepted) > 4
    assert len(written.accepted) == len(written.nodes)
    assert torch.equal(written.sequences, plain(model, ids, max_new_tokens=200))
    tests, hits = written.sources["ngram"]
    # Or one more: a text may end on a token that was guessed, from which no way went on.
    assert hits - (sum(written.accepted) - len(written.accepted)) in (0, 1)
    assert tests >= hits


def test_a_perfect_guesser_is_believed() -> None:
    """Heads that know the text: every pass takes all of them, and the next token."""
    model, (ids, _) = exact("llama"), prompt(17)
    text = plain(model, ids)[0].tolist()

    class Knowing(Chained):
        def forward(self, x: Tensor, given: Any = None) -> list[Tensor]:
            return [x] * self.count

        def unembedding(self, model: nn.Module) -> Any:
            def logits(states: Tensor) -> Tensor:
                at = int(verifier[-1].get_seq_length()) + 1  # behind the newest token, which no cache holds yet
                known = [text[min(at + k, len(text) - 1)] for k in range(self.count)]
                return nn.functional.one_hot(torch.tensor(known), VOCAB).double() * 50

            return logits

    verifier: list[Any] = []
    hook = model.register_forward_pre_hook(
        lambda _m, _a, kwargs: verifier.append(next(v for v in kwargs.values() if isinstance(v, DynamicCache))),
        with_kwargs=True,
    )
    try:
        written = swift(model, ids, heads=Knowing(3, 32), max_new_tokens=NEW, order=0, candidates=1, nodes=4, least=0.0)
    finally:
        hook.remove()
    assert torch.equal(written.sequences[0], torch.tensor(text))
    assert written.accepted[:-1] == [4] * (len(written.accepted) - 1)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", ["chained", "layers", None])
def test_the_cache_is_the_plain_models(family: str, kind: str | None) -> None:
    """After each pass as many rows as tokens are certain, and in the end the very rows."""
    model, (ids, _) = exact(family), prompt(17)
    heads, lengths = heads_for(model, kind), list[tuple[int, int]]()

    class Kept(Verifier):
        def keep(self, path: list[int], nodes: int) -> None:
            super().keep(path, nodes)
            lengths.append((self.rows, len(path)))

    own, module.Verifier = module.Verifier, Kept  # type: ignore[misc]
    writer = Swift(heads, least=0.0)
    try:
        out = model.generate(ids, custom_generate=writer, max_new_tokens=NEW, do_sample=False,
                             attention_mask=torch.ones_like(ids), return_dict_in_generate=True)  # fmt: skip
    finally:
        module.Verifier = own  # type: ignore[misc]
    rows = 17
    for held, accepted in lengths:
        rows += accepted
        assert held == rows
    assert rows == 17 + NEW - 1
    mine, want = cache_of(out), DynamicCache()
    with torch.no_grad():
        model(out.sequences[:, :-1], **cached(model, want))
    assert len(mine.layers) == len(want.layers)
    for got, should in zip(mine.layers, want.layers, strict=True):
        assert_close(got.keys, should.keys)
        assert_close(got.values, should.values)


def test_a_text_goes_on_from_its_cache() -> None:
    model, (ids, _) = exact("llama"), prompt(17)
    first = model.generate(ids, custom_generate=Swift(), max_new_tokens=10, do_sample=False,
                           return_dict_in_generate=True, attention_mask=torch.ones_like(ids))  # fmt: skip
    more = swift(model, first.sequences, heads=None, max_new_tokens=NEW - 10, **cached(model, cache_of(first)))
    assert torch.equal(more.sequences, plain(model, ids))


@pytest.mark.parametrize("budget", [24, 40])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("kind", [None, "chained"])
def test_a_partial_cache_changes_guesses_alone(family: str, kind: str | None, budget: int) -> None:
    model, (ids, _) = exact(family), prompt(30)
    heads = heads_for(model, kind)
    written = swift(model, ids, heads=heads, max_new_tokens=NEW, budget=budget, sinks=4, order=0, least=0.05)
    assert torch.equal(written.sequences, plain(model, ids))
    assert written.drafts == len(written.accepted) - 1  # before the first there is nothing to choose rows by
    assert "draft" in written.sources


def test_a_partial_cache_that_holds_all_guesses_right() -> None:
    model, (ids, _) = exact("llama"), prompt(20)
    written = swift(model, ids, heads=None, max_new_tokens=16, budget=400, order=0, candidates=1, nodes=2)
    assert written.accepted[1:-1] == [2] * (len(written.accepted) - 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampled", [False, True])
def test_the_penalty_is_that_of_the_text(kind: str | None, sampled: bool) -> None:
    """A short window, so that a penalty that saw guesses, or forgot the text, would show."""
    model, (ids, _) = exact("qwen3"), prompt(17)
    heads, penalty = heads_for(model, kind), ContextualPenalty(1.8, window=9)
    torch.manual_seed(2)
    want = plain(model, ids, logits_processor=[penalty], do_sample=sampled)
    assert not torch.equal(want, plain(model, ids))
    torch.manual_seed(2)
    got = swift(
        model, ids, heads=heads, max_new_tokens=NEW, penalty=1.8, window=9, do_sample=sampled, least=0.0
    )  # fmt: skip
    assert torch.equal(got.sequences, want)


def test_the_penalty_forgets() -> None:
    text, scores = torch.tensor([[0, 1, 2]]), torch.tensor([[4.0, 4.0, -4.0, 4.0]])
    assert ContextualPenalty(2.0, window=3)(text, scores).tolist() == [[2.0, 2.0, -8.0, 4.0]]
    assert ContextualPenalty(2.0, window=1)(text, scores).tolist() == [[4.0, 4.0, -8.0, 4.0]]
    with pytest.raises(ValueError, match="above 0"):
        ContextualPenalty(0.0)


# -- the distribution --------------------------------------------------------------------------------------------------
@cache
def few_words() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=24, initializer_range=0.6, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    ).eval()  # fmt: skip


@torch.no_grad()
def probabilities(model: Any, ids: Tensor, length: int, processor: Any = None) -> dict[tuple[int, ...], float]:
    """Of every text of so many tokens, exactly: one pass each."""
    found = {}
    for tail in product(range(4), repeat=length):
        whole = torch.cat([ids, torch.tensor([tail])], 1)
        logits = model(whole).logits[0]
        chance = 1.0
        for i, token in enumerate(tail, ids.shape[1]):
            scores = logits[None, i - 1]
            scores = scores if processor is None else processor(whole[:, :i], scores)
            chance *= float(scores.softmax(-1)[0, token])
        found[tail] = chance
    return found


@pytest.mark.parametrize("penalised", [False, True])
def test_sampled_texts_are_as_likely_as_the_models(penalised: bool) -> None:
    """Chi-square over all 256 texts of four tokens against their exact probabilities, rare ones together; trees that
    hold nearly every path, so that most tokens are guesses that came true."""
    model, ids = few_words(), torch.tensor([[0, 1, 2, 1, 0, 3, 0, 1]])
    processor = ContextualPenalty(1.5, window=3) if penalised else None
    truth = probabilities(model, ids, 4, processor)
    assert abs(sum(truth.values()) - 1) < 1e-5
    torch.manual_seed(5)
    heads = Chained.of(model, 2)
    counts, draws, accepted = Counter[tuple[int, ...]](), 500, 0
    torch.manual_seed(11)
    for _ in range(draws):
        written = swift(
            model, ids, heads=heads, max_new_tokens=4, do_sample=True, least=0.0, top_k=0, nodes=16,
            penalty=1.5 if penalised else 1.0, window=3,
        )  # fmt: skip
        counts[tuple(written.sequences[0, 8:].tolist())] += 1
        accepted += sum(written.accepted) - len(written.accepted)
    assert accepted > 0.5 * draws  # guesses took part
    common = [t for t, p in truth.items() if p * draws >= 5]
    pairs = [(counts[t], truth[t] * draws) for t in common]
    pairs.append((draws - sum(n for n, _ in pairs), draws - sum(e for _, e in pairs)))
    statistic = sum((n - e) ** 2 / e for n, e in pairs if e > 0)
    degrees = len(pairs) - 1
    assert degrees >= 12
    # Wilson-Hilferty: this many standard deviations above the mean; a fair sampler is above 3.3 once in 2,000.
    z = ((statistic / degrees) ** (1 / 3) - 1 + 2 / (9 * degrees)) / (2 / (9 * degrees)) ** 0.5
    assert z < 3.3


# -- as generate has it ------------------------------------------------------------------------------------------------
class Heard(TextStreamer):
    def __init__(self) -> None:
        self.got: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.got += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streams_stops_and_scores_as_generate_does() -> None:
    model, (ids, _) = exact("qwen2"), prompt(17)
    whole = plain(model, ids)[0].tolist()
    end = whole[17 + 11]
    end_at = whole.index(end, 17)
    stream = Heard()
    written = swift(model, ids, heads=None, max_new_tokens=NEW, eos_token_id=end, pad_token_id=0, streamer=stream)
    assert written.sequences[0].tolist() == whole[: end_at + 1] == stream.got
    assert stream.ended
    options: dict[str, Any] = dict(
        max_new_tokens=NEW, do_sample=False, attention_mask=torch.ones_like(ids), return_dict_in_generate=True,
        output_scores=True, output_logits=True, repetition_penalty=1.3,
    )  # fmt: skip
    want, got = model.generate(ids, **options), model.generate(ids, custom_generate=Swift(least=0.0), **options)
    assert torch.equal(want.sequences, got.sequences)
    assert_close(got.scores, want.scores, atol=1e-5, rtol=1e-5)
    assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-5)


def test_one_token_is_the_prompts() -> None:
    written = swift(exact("llama"), prompt(5)[0], heads=None, max_new_tokens=1)
    assert (written.new, written.accepted, written.per_pass) == (1, [], 1.0)


def test_what_it_cannot_do_is_said() -> None:
    model, (ids, mask) = exact("llama"), prompt(9, 6)
    with pytest.raises(SwiftError, match="2 texts at once"):
        swift(model, ids, heads=None)
    with pytest.raises(SwiftError, match="2 texts at once"):
        swift(model, ids[:1], heads=None, do_sample=True, num_return_sequences=2)
    with pytest.raises(SwiftError, match="padded"):
        swift(model, ids[1:], heads=None, attention_mask=mask[1:])
    with pytest.raises(SwiftError, match="num_beams=2"):
        swift(model, ids[:1], heads=None, num_beams=2)
    with pytest.raises(SwiftError, match="use_cache=False"):
        swift(model, ids[:1], heads=None, use_cache=False)
    with pytest.raises(SwiftError, match="do not ask"):
        swift(model, ids[:1], heads=None, output_hidden_states=True, return_dict_in_generate=True)
    with pytest.raises(SwiftError, match="leave budget="):
        swift(model, ids[:1], heads=Layers.of(model, 2), budget=64)
    with pytest.raises(ValueError, match="above 16 sinks"):
        swift(model, ids[:1], heads=None, budget=16)
    for bad, words in ({"nodes": 0}, "nodes=0"), ({"least": 2.0}, "least=2.0"), ({"order": -1}, "order=-1"):
        with pytest.raises(SwiftError, match=words):
            Swift(**bad)  # type: ignore[arg-type]
    sliding = exact("gemma3")
    held = DynamicCache(config=sliding.config)
    with torch.no_grad():
        sliding(ids[:1, :3], **cached(sliding, held))
    with pytest.raises(SwiftError, match="DynamicSlidingWindowLayer"):
        swift(sliding, ids[:1], heads=None, **cached(sliding, held))
    reduced = copy.deepcopy(decoder("llama"))
    with fewer.apply(reduced, "snapkv:keep=0.5"), pytest.raises(SwiftError, match="a session is on"):
        swift(reduced, ids[:1], heads=None)


def test_models_that_do_not_read_trees_are_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM, T5Config, T5ForConditionalGeneration

    ids = prompt(9)[0]
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2))
    with pytest.raises(SwiftError, match="takes no position_ids"):
        swift(bloom, ids, heads=None)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(SwiftError, match="no causal language model"):
        Verifier(t5)
    deaf = copy.deepcopy(decoder("llama"))  # goes by its own positions, whatever it is told
    own = deaf.model.rotary_emb.forward
    deaf.model.rotary_emb.forward = lambda x, position_ids: own(
        x, position_ids[:, :1] + torch.arange(position_ids.shape[1])
    )
    with pytest.raises(SwiftError, match="otherwise than its paths"):
        swift(deaf, ids, heads=None)


def test_eager_attention_too() -> None:
    model, (ids, _) = copy.deepcopy(exact("gemma3")), prompt(17)
    model.set_attn_implementation("eager")
    assert torch.equal(swift(model, ids, heads=None, max_new_tokens=NEW).sequences, plain(exact("gemma3"), ids))


def test_processors_see_the_text_once_for_each_token() -> None:
    model, (ids, _) = exact("llama"), prompt(17)
    seen = []

    class Looking(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
            seen.append(input_ids[0].tolist())
            return scores

    written = swift(model, ids, heads=None, max_new_tokens=NEW, logits_processor=[Looking()])
    text = written.sequences[0].tolist()
    assert seen == [text[:n] for n in range(17, 17 + NEW)]


def test_a_generation_config_is_heard() -> None:
    model, (ids, _) = exact("llama"), prompt(17)
    config = GenerationConfig(max_new_tokens=7, do_sample=False, repetition_penalty=1.5)
    want = model.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids))
    got = model.generate(
        ids, generation_config=config, attention_mask=torch.ones_like(ids), custom_generate=Swift(least=0.0)
    )
    assert torch.equal(want, got)
