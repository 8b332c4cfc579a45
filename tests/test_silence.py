"""Nothing happens in silence: a session whose methods did nothing says so, once, where the user looks."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fewer
from decoders import decoder, prompt
from fewer.compat import cache_of, cached
from fewer.runtime.kv.state import CacheError
from fewer.testing.models import tiny_vit
from fewer.testing.vision_language import prompts, tiny_vlm

UNREAD = "the scores of this pass are the unreduced model's"
SNAP = "snapkv:keep=0.5,window=4,kernel=3"


def said(run: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as heard, torch.no_grad():
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in heard if w.category is UserWarning]


def pictures() -> Tensor:
    return torch.randn(2, 3, *[tiny_vit().config.image_size] * 2)


# -- caches ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", [SNAP, "h2o:keep=0.5", "streamingllm:tokens=8,sinks=2", "kvzip:keep=0.5"])
def test_scores_of_the_pass_that_reads_a_prompt_are_said_to_be_the_models_own(form: str) -> None:
    model, (ids, mask) = decoder("llama"), prompt(24)
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
    with fewer.apply(model, form) as session:
        out: list[Any] = []
        first = said(lambda: out.append(model(ids, attention_mask=mask)))
        assert torch.equal(out[0].logits, plain)
        assert sum(UNREAD in line for line in first) == 1
        assert UNREAD in session.report()
        assert any(UNREAD in note for note in session.ledger.notes)
        assert not said(lambda: model(ids, attention_mask=mask)), "it is said once"
        assert UNREAD in session.report()
        words, more = ids[:, :1], torch.cat([mask, mask[:, :1]], 1)
        cache = cache_of(out[0])
        said(lambda: model(words, attention_mask=more, **cached(model, cache)))
        assert UNREAD not in session.report(), "what is read next is read from what is left"


def test_generate_is_not_warned_of() -> None:
    model, (ids, mask) = decoder("llama"), prompt(24)
    with fewer.apply(model, SNAP) as session:
        assert not said(lambda: model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False))
        assert UNREAD not in session.report()


@pytest.mark.parametrize("form", [SNAP, "quest:tokens=6,page=2", "kvzip:keep=0.5"])
def test_without_a_cache_its_methods_say_that_they_did_nothing(form: str) -> None:
    model, (ids, mask) = decoder("llama"), prompt(24)
    with fewer.apply(model, form) as session:
        greedy = dict(attention_mask=mask, max_new_tokens=3, do_sample=False, use_cache=False)
        heard = said(lambda: model.generate(ids, **greedy))
        assert [line for line in heard if "did nothing" in line and "use_cache=False" in line] == heard
        assert len(heard) == 1
        assert "did nothing" in session.report()
        assert "rows" not in session.report()


def test_a_cache_within_its_budget_says_that_nothing_left() -> None:
    model, (ids, mask) = decoder("llama"), prompt(12)
    with fewer.apply(model, "snapkv:tokens=64,window=4,kernel=3") as session:
        assert not said(lambda: model(ids, attention_mask=mask))
        assert "nothing left the cache" in session.report()
        longer, more = prompt(80)
        said(lambda: model(longer, attention_mask=more))
        assert "nothing left the cache" not in session.report()


def test_a_prompt_in_chunks_is_said_to_be_kept_whole_by_a_method_that_reads_again() -> None:
    model, (ids, mask) = decoder("llama"), prompt(32)
    with fewer.apply(model, "kvzip:keep=0.5") as session:
        first: list[Any] = []
        said(lambda: first.append(model(ids[:, :16], attention_mask=mask[:, :16])))
        rest = dict(attention_mask=mask, **cached(model, cache_of(first[0])))
        assert any("later passes are kept whole" in line for line in said(lambda: model(ids[:, 16:], **rest)))
        assert "later passes are kept whole" in session.report()


def test_a_reduced_cache_travels_and_belongs_to_nobody_then() -> None:
    model, (ids, mask) = decoder("llama"), prompt(20)
    with torch.no_grad(), fewer.apply(model, SNAP):
        cache = cache_of(model(ids, attention_mask=mask))
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        back = torch.load(file, weights_only=False)
        assert_close([layer.keys for layer in back.layers], [layer.keys for layer in cache.layers])
        more = torch.cat([mask, mask[:, :1]], 1)
        with pytest.raises(CacheError, match="already reduced by another session"):
            model(ids[:, :1], attention_mask=more, **cached(model, back))
        twin = copy.deepcopy(cache)
        model(ids[:, :1], attention_mask=more, **cached(model, twin))


# -- blocks ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["tome:r=0", "random:keep=1.0,layers=1", "evit:keep=1.0,layers=1+2"])
def test_blocks_in_which_nothing_left_say_so(form: str) -> None:
    model = tiny_vit()
    with fewer.apply(model, form) as session:
        assert not said(lambda: model(pictures()))
        assert "nothing left: the budgets asked for all 16 tokens" in session.report()
    with fewer.apply(model, "tome:r=2") as session:
        said(lambda: model(pictures()))
        assert "nothing left" not in session.report()


def test_what_stands_beside_is_in_the_report() -> None:
    model = tiny_vlm("llava")
    with fewer.apply(model, ["tome:r=2", "fastv:keep=0.5,k=1"]) as session:
        said(lambda: model(**prompts(model, [1])))
        assert "vision tower: tokens 17 -> 15" in session.report()


def test_behind_a_prompt_the_report_of_a_state_space_model_is_the_prompts() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=4, state_size=8, pad_token_id=0)
    model, (ids, _) = MambaForCausalLM(config).eval(), prompt(24)
    with fewer.apply(model, "random:keep=0.5,layers=1") as session:
        said(lambda: model.generate(ids, max_new_tokens=3, do_sample=False))
        assert session.last.first.n == 24
        assert "tokens 24 -> 24 1" in session.report()


# -- passes within passes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["vit", "llama", "bert"])
def test_a_hook_may_call_the_model_while_a_pass_is_under_way(kind: str) -> None:
    if kind == "llama":
        model, method, (given, _) = decoder("llama"), "random:keep=0.6,layers=1+", prompt(20)
        other, block = prompt(9, seed=3)[0], model.model.layers[1]
    elif kind == "vit":
        model, method, given, other = tiny_vit(), "tome:r=3", pictures(), pictures()
        block = next(m for m in model.modules() if type(m).__name__ == "ViTLayer")
    else:
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        model = BertModel(BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
                                     intermediate_size=64)).eval()  # fmt: skip
        method, given, other = "random:keep=0.6,layers=1+", prompt(20)[0], prompt(9, seed=3)[0]
        block = model.encoder.layer[2]
    inner: list[Any] = []

    def again(_m: Any, _a: Any, _o: Any) -> None:
        if not inner:
            inner.append(None)
            inner[0] = model(other)[0]

    with torch.no_grad(), fewer.apply(model, method) as session:
        want, want_inner = model(given)[0], model(other)[0]
        model(given)
        counts = session.counts
        hook = block.register_forward_hook(again)
        got = model(given)[0]
        hook.remove()
        assert torch.equal(got, want)
        assert torch.equal(inner[0], want_inner)
        assert session.counts == counts


@pytest.mark.parametrize(("where", "inside"), [(1, True), (2, True), (3, True), (1, False), (3, False)])
def test_a_pass_goes_on_behind_a_hook_whose_own_call_ended_in_an_error(where: int, inside: bool) -> None:
    """inside: the error is one of the block's parts; otherwise of a hook in front of the block."""
    model, x = tiny_vit(), pictures()
    blocks = [m for m in model.modules() if type(m).__name__ == "ViTLayer"]
    part = next(m for m in blocks[where].modules() if isinstance(m, torch.nn.Linear)) if inside else blocks[where]
    called: list[bool] = []

    def stop(*_: Any) -> None:
        raise RuntimeError("enough")

    def calls(*_: Any) -> None:
        if called:
            return
        called.append(True)
        handle = part.register_forward_pre_hook(stop)
        try:
            model(x.flip(0))
        except RuntimeError:
            return
        finally:
            handle.remove()

    with torch.no_grad(), fewer.apply(model, "tome:r=3"):
        want = model(x)[0]
        hook = blocks[1].register_forward_hook(calls)
        got = model(x)[0]
        hook.remove()
        assert called
        assert torch.equal(got, want)


def test_a_pass_that_an_error_ended_leaves_nothing_behind() -> None:
    model, x = tiny_vit(), pictures()
    blocks = [m for m in model.modules() if type(m).__name__ == "ViTLayer"]

    def stop(*_: Any) -> None:
        raise RuntimeError("enough")

    with torch.no_grad(), fewer.apply(model, "tome:r=3") as session:
        want = model(x)[0]
        for _ in range(20):
            hook = blocks[2].register_forward_pre_hook(stop)
            with pytest.raises(RuntimeError, match="enough"):
                model(x)
            hook.remove()
        assert torch.equal(model(x)[0], want)
        assert len(session._shown._local.passes) <= 8
