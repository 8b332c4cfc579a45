"""Guests of the same house: models that other libraries have changed or wrapped, before a session or during it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewer
import fewer.hosts
from decoders import BUILD, decoder, prompt
from fewer.compat import cache_argument, cache_of, cached
from fewer.hosts.base import Stand
from fewer.testing.models import texts
from vit import images, run, tiny_vit

VISION = [("vit", "tome:r=2"), ("timm", "tome:r=2"), ("beit", "evit:keep=0.6,layers=0+1")]
CACHE = "snapkv:keep=0.5,window=4,kernel=3"


def fresh(name: str) -> nn.Module:
    """A decoder of one's own, as `decoder` gives it."""
    model = BUILD[name]().eval()
    model.load_state_dict(decoder(name).state_dict())
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    return model


def written(model: Any, *lengths: int) -> Tensor:
    ids, mask = prompt(*lengths or (20, 11))
    return model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)


def ours(model: nn.Module) -> list[str]:
    """Where something of a session still stands in a model."""
    found = []
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            found.append(f"{path}: hooks")
        found += [f"{path}.{name}" for name, held in vars(module).items() if isinstance(held, Stand)]
        if getattr(getattr(module, "config", None), "_attn_implementation_internal", "") == "fewer":
            found.append(f"{path}.config")
    return found


# -- accelerate --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "method"), VISION)
@pytest.mark.parametrize("order", ["HSsh", "HShs", "SHsh", "SHhs", "HShHsh", "SHhHsh", "HSHsh"])
def test_accelerate_hooks_come_and_go_in_every_order(kind: str, method: str, order: str):
    """S puts a session on and s takes it off, H and h do that with a hook on every block."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Counting(hooks.ModelHook):  # type: ignore[name-defined, misc]
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    model, x, hook = tiny_vit(kind), images(), Counting()
    plain = run(model, x)
    with fewer.apply(model, method):
        reduced = run(model, x)
    blocks = fewer.hosts.find(model).blocks
    session, hooked, on = None, False, False
    for step in order:
        if step in "Hh":
            hooked = step == "H"
            for block in blocks:
                hooks.add_hook_to_module(block, hook) if hooked else hooks.remove_hook_from_module(block)
        elif step == "S":
            session, on = fewer.apply(model, method), True
        else:
            session.remove()
            on = False
        before = hook.calls
        assert torch.equal(run(model, x), reduced if on else plain), step
        assert hook.calls - before == (len(blocks) if hooked else 0), step
    assert not ours(model)


def test_a_hook_that_stays_keeps_no_session_alive():
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_vit("vit")
    session = fewer.apply(model, "tome:r=2")
    for block in fewer.hosts.find(model).blocks:
        hooks.add_hook_to_module(block, hooks.ModelHook())
    session.remove()
    ref = weakref.ref(session)
    del session
    gc.collect()
    assert ref() is None


def _dispatched(model: nn.Module) -> None:
    from accelerate import dispatch_model

    dispatch_model(model, {"": "cpu"}, force_hooks=True)


def _offloaded(model: nn.Module) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("place", [_dispatched, _offloaded])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("kind", "method"), [*VISION, ("dinov2", "random:keep=0.5,layers=0+")])
def test_placed_by_accelerate(kind: str, method: str, late: bool, place: Callable[[nn.Module], None]):
    pytest.importorskip("accelerate")
    model, x = tiny_vit(kind), images()
    plain = run(model, x)
    with fewer.apply(model, method) as session:
        reduced, cost = run(model, x), session.ledger.gflops
    if not late:
        place(model)
    session = fewer.apply(model, method)
    if late:
        place(model)
    assert torch.equal(run(model, x), reduced)
    assert session.ledger.gflops == pytest.approx(cost)
    session.remove()
    assert torch.equal(run(model, x), plain)
    assert not ours(model)


@pytest.mark.parametrize("place", [_dispatched, _offloaded])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("method", [CACHE, "random:keep=0.5,layers=1+"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_decoders_placed_by_accelerate(name: str, method: str, late: bool, place: Callable[[nn.Module], None]):
    pytest.importorskip("accelerate")
    model = fresh(name)
    plain = written(model)
    with fewer.apply(model, method):
        reduced = written(model)
    if not late:
        place(model)
    session = fewer.apply(model, method)
    if late:
        place(model)
    assert torch.equal(written(model), reduced)
    session.remove()
    assert torch.equal(written(model), plain)
    assert not ours(model)


# -- autocast ----------------------------------------------------------------------------------------------------------
CACHED = [
    "adakv:keep=0.5,window=4", "chunkkv:keep=0.5,window=4", "d2o:keep=0.5", "dynamic_context_pruning",
    "expected_attention:keep=0.5", "h2o:keep=0.5", "keydiff:keep=0.5", "knorm:keep=0.5", "kvzip:keep=0.5",
    "ott:group=4,window=4", "pyramidkv:keep=0.5,window=4", "quest:tokens=8,page=4", "random_cache:keep=0.5",
    "snapkv:keep=0.5,window=4", "streamingllm:keep=0.5", "tova:keep=0.5", "tokenbutler", "lazyllm:keep=0.6,layers=1+",
]  # fmt: skip


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", CACHED)
def test_cache_methods_run_under_autocast(method: str, attention: str):
    model = fresh("llama")
    model.set_attn_implementation(attention)  # type: ignore[operator]
    trained = {"modules": "untrained"} if method in ("dynamic_context_pruning", "tokenbutler") else {}
    with fewer.apply(model, method, **trained), autocast():
        assert written(model, 20, 11).shape == (2, 26)
        assert written(model, 20).shape == (1, 26)


@pytest.mark.parametrize("method", ["snapkv:keep=1.0,window=4", "adakv:keep=1.0,window=4", "knorm:keep=1.0"])
def test_a_cache_that_keeps_all_changes_nothing_under_autocast(method: str):
    model = decoder("llama")
    with autocast():
        plain = written(model, 20, 11)
        with fewer.apply(model, method):
            assert torch.equal(written(model, 20, 11), plain)


@pytest.mark.parametrize("execution", ["padded", "packed", "masked"])
@pytest.mark.parametrize("method", ["tome:r=2", "evit:keep=0.6,layers=0+1", "ats:tokens=9,layers=1",
                                    "random:keep=0.6,layers=1", "dynamicvit:keep=0.6,layers=1"])  # fmt: skip
@pytest.mark.parametrize("kind", ["vit", "timm", "bert"])
def test_encoders_run_under_autocast(kind: str, method: str, execution: Any):
    model = tiny_vit(kind)
    x = texts() if kind == "bert" else images()
    trained = {"modules": "untrained"} if method.startswith("dynamicvit") else {}
    with fewer.apply(model, method, execution=execution, **trained):
        exact = run(model, x)
        with autocast():
            rough = run(model, x)
    assert (rough.float() - exact).norm() < 0.3 * exact.norm()


# -- PEFT --------------------------------------------------------------------------------------------------------------
def lora(model: nn.Module, **options: Any) -> Any:
    """A model with LoRA adapters that do something."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
    source = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=source))
    return model.eval()


@pytest.mark.parametrize(("kind", "method"), [("vit", "tome:r=2"), ("vit", "evit:keep=0.6,layers=0+1"),
                                          ("bert", "power_bert:keep=0.7"), ("bert", "tome:r=2")])  # fmt: skip
def test_lora_is_as_if_merged(kind: str, method: str):
    targets = {"vit": ["q_proj", "v_proj", "fc1"], "bert": ["query", "value"]}[kind]
    x = texts() if kind == "bert" else images()
    model = lora(tiny_vit(kind), target_modules=targets)
    inner = model.get_base_model()
    plain = run(inner, x)
    with fewer.apply(model, method) as session:
        beside, cost = run(inner, x), session.ledger
    assert torch.equal(run(inner, x), plain)
    assert not torch.allclose(beside, plain, atol=1e-3)
    added = sum(p.numel() for n, p in model.named_parameters() if "lora" in n and ".0." in n.partition("lora")[0])
    merged = model.merge_and_unload()
    with fewer.apply(merged, method) as session:
        torch.testing.assert_close(run(merged, x), beside, atol=1e-5, rtol=1e-5)
        first, *_ = session.ledger.linear
    assert sum(cost.linear[0]) - sum(first) == added > 0  # once, and not again inside its wrapper


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [CACHE, "random:keep=0.5,layers=1+"])
def test_lora_on_a_decoder(name: str, method: str):
    from transformers import DynamicCache

    model = lora(fresh(name), task_type="CAUSAL_LM")
    ids, mask = prompt(20, 11)

    def write(model: Any) -> Tensor:
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)

    plain = write(model)
    with fewer.apply(model, method) as session:
        beside = write(model)
        model(input_ids=ids, attention_mask=mask, **cached(model, DynamicCache(config=model.config)))
        assert sum(session.counts) < 3 * 20
    assert torch.equal(write(model), plain)
    merged = model.merge_and_unload()
    with fewer.apply(merged, method):
        assert torch.equal(write(merged), beside)


LEARNED = 5
tuned_by = pytest.mark.parametrize("tuning", ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"])


def tuned(tuning: str, model: nn.Module, task: str = "CAUSAL_LM") -> Any:
    """A model with learned rows in front of each text, or in its cache."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    return peft.get_peft_model(model, getattr(peft, tuning)(task_type=task, num_virtual_tokens=LEARNED)).eval()


def read(model: Any, ids: Tensor, mask: Tensor) -> Any:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=True)


ON_LEARNED = [CACHE, "adakv:keep=0.5,window=4", "streamingllm:keep=0.5,sinks=2,positions=original", "d2o:keep=0.5",
              "random:keep=0.5,layers=0,site=before", "random:keep=0.5,layers=1+"]  # fmt: skip


@tuned_by
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ON_LEARNED)
def test_learned_rows_stay_and_are_not_counted(name: str, tuning: str, method: str):
    """Half of the words go, however many rows are learned in front of them."""
    model = tuned(tuning, fresh(name))
    ids, mask = prompt(20, 11)
    plain = read(model, ids, mask).logits
    with fewer.apply(model, method) as session:
        read(model, ids, mask)
        kept, counts = session.kept(2), session.counts[2]
    assert bool((kept[..., None] == torch.arange(LEARNED)).any(-2).all())
    assert counts == LEARNED + (10 if method.startswith("random") else 7.5)  # the longer text, or the mean of 10 and 5
    assert torch.equal(read(model, ids, mask).logits, plain)
    assert not ours(model)
    assert "get_prompt" not in vars(model)


@tuned_by
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("method", [CACHE.replace("0.5", "1.0"), "random:keep=1.0,layers=0+"])
def test_keeping_all_behind_learned_rows_changes_nothing(name: str, tuning: str, method: str):
    model = tuned(tuning, fresh(name))
    ids, mask = prompt(20, 11)
    plain = read(model, ids, mask)
    more = torch.cat([torch.ones(2, LEARNED), mask, torch.ones(2, 1)], 1)
    step = partial(model.get_base_model(), ids[:, -1:], attention_mask=more)
    with torch.no_grad():
        want = step(**cached(model.get_base_model(), cache_of(plain))).logits
        with fewer.apply(model, method):
            got = read(model, ids, mask)
            assert torch.equal(got.logits, plain.logits)
            assert torch.equal(step(**cached(model.get_base_model(), cache_of(got))).logits, want)


@tuned_by
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_evicting_behind_learned_rows_is_hiding(name: str, tuning: str):
    model = tuned(tuning, fresh(name))
    ids, mask = prompt(20, 11)
    more = torch.cat([torch.ones(2, LEARNED), mask, torch.ones(2, 1)], 1)
    inner = model.get_base_model()
    with fewer.apply(model, "streamingllm:keep=0.5,sinks=2,positions=original") as session:
        held = read(model, ids, mask)
        kept = session.kept(0)[:, 0]
        with torch.no_grad():
            got = inner(ids[:, -1:], attention_mask=more, **cached(inner, cache_of(held))).logits
    n = more.shape[1]
    seen = torch.zeros(2, n + 1).scatter(1, torch.where(kept < 0, n, kept), 1)[:, :n]
    seen[:, -1] = 1
    assert seen[:, :LEARNED].all()
    assert seen.sum(-1).tolist() == [LEARNED + 10 + 1, LEARNED + 5 + 1]
    held = read(model, ids, mask)
    with torch.no_grad():
        want = inner(ids[:, -1:], attention_mask=more * seen, **cached(inner, cache_of(held))).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@tuned_by
def test_writing_behind_learned_rows(tuning: str):
    """PEFT looks for the cache under its older name: where transformers has another, it hands its rows in at each
    word anew, or to nobody, and that is said."""
    model = tuned(tuning, fresh("llama"))
    ids, mask = prompt(20, 11)
    write = partial(model.generate, input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    with fewer.apply(model, CACHE) as session:
        if cache_argument(model.get_base_model().forward) != "past_key_values":
            with pytest.raises(fewer.SessionError, match=r"generate\(\) would repeat or lose them"):
                write()
            return
        write()
        kept = session.kept(0)
    assert bool((kept[..., None] == torch.arange(LEARNED)).any(-2).all())
    plain = write()
    with fewer.apply(model, CACHE.replace("0.5", "1.0")):
        assert torch.equal(write(), plain)


@tuned_by
def test_what_is_called_without_them_has_none(tuning: str):
    model, bare = tuned(tuning, fresh("llama")), fresh("llama")
    ids, mask = prompt(20, 11)
    with fewer.apply(bare, CACHE) as session:
        read(bare, ids, mask)
        want = session.kept(0)
    with fewer.apply(model, CACHE) as session:
        read(model, ids, mask)
        read(model.get_base_model(), ids, mask)
        assert torch.equal(session.kept(0), want)
        with model.disable_adapter():
            read(model, ids, mask)
            assert torch.equal(session.kept(0), want)


def test_learned_rows_of_an_encoder():
    from transformers import BertForSequenceClassification

    def bert() -> nn.Module:
        return BertForSequenceClassification(tiny_vit("bert").config).eval()

    model = tuned("PromptTuningConfig", bert(), "SEQ_CLS")
    ids, mask = torch.randint(5, 40, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, -3:] = 0
    with torch.no_grad(), fewer.apply(model, "power_bert:keep=0.5,layers=0+1") as session:
        model(input_ids=ids, attention_mask=mask)
        assert bool((session.kept(1)[..., None] == torch.arange(LEARNED)).any(-2).all())
        assert session.last.first.free_count == 9
    with pytest.raises(fewer.SessionError, match="blocks of an encoder"):
        fewer.apply(tuned("PrefixTuningConfig", bert(), "SEQ_CLS"), "power_bert:keep=0.5")


@pytest.mark.parametrize(("method", "why"), [("kvzip:keep=0.5", "read again"),
                                           ("streamingllm:keep=0.5", "positions='original'")])  # fmt: skip
def test_what_learned_rows_cannot_stand_is_refused(method: str, why: str):
    model = tuned("PrefixTuningConfig", fresh("llama"))
    with pytest.raises(fewer.SessionError, match=f"5 learned rows in front of every input.*{why}"):
        fewer.apply(model, method)
    assert "get_prompt" not in vars(model)
    with fewer.apply(model.get_base_model(), method):
        written(model.get_base_model())


# -- attention, chosen and shown ---------------------------------------------------------------------------------------
def answered(model: Any) -> Tensor:
    if hasattr(model, "generate") and model.main_input_name == "input_ids":
        return written(model)
    return run(model, texts() if model.main_input_name == "input_ids" else images())


@pytest.mark.parametrize(("before", "behind"), [("sdpa", "eager"), ("eager", "sdpa")])
@pytest.mark.parametrize(("kind", "method"), [
    ("vit", "tome:r=2"), ("clip", "evit:keep=0.6,layers=0+1"), ("bert", "tome:r=2"), ("llama", CACHE),
    ("gemma3", "h2o:keep=0.5"), ("llama", "random:keep=0.5,layers=1+"),
])  # fmt: skip
def test_another_attention_may_be_chosen_during_a_session(kind: str, method: str, before: str, behind: str):
    model: Any = fresh(kind) if kind in BUILD else tiny_vit(kind)
    plain, reduced = {}, {}
    for name in (before, behind):
        model.set_attn_implementation(name)
        plain[name] = answered(model)
        with fewer.apply(model, method):
            reduced[name] = answered(model)
    model.set_attn_implementation(before)
    with fewer.apply(model, method):
        assert torch.equal(answered(model), reduced[before])
        model.set_attn_implementation(behind)
        assert torch.equal(answered(model), reduced[behind])
        assert torch.equal(answered(model), reduced[behind])
    assert model.config._attn_implementation == behind
    assert torch.equal(answered(model), plain[behind])
    with fewer.apply(model, method):
        model.set_attn_implementation(before)  # and no pass before it ends
    assert model.config._attn_implementation == before


def shown(model: Any, method: str | None, execution: Any = "padded", **options: Any) -> Any:
    """What a model gives with its maps and features."""
    x = texts() if model.main_input_name == "input_ids" else images()
    given = {"inputs_embeds": x} if x.dim() == 3 else {"pixel_values": x}
    given |= dict(output_attentions=True, output_hidden_states=True)
    with torch.no_grad():
        if method is None:
            return model(**given)
        with fewer.apply(model, method, execution=execution, **options):
            return model(**given)


@pytest.mark.parametrize(
    "kind", ["vit", "deit", "dinov2", "beit", "clip", "siglip", "bert", "distilbert", "modernbert"]
)
def test_maps_are_those_of_the_rows_that_are_there(kind: str):
    model: Any = tiny_vit(kind)
    model.set_attn_implementation("eager")
    n = shown(model, None).attentions[0].shape[-1]
    for method, rows in (("tome:r=2", [n, n - 2, n - 4, n - 6]), ("random:r=5,layers=1", [n, n, n - 5, n - 5])):
        out = shown(model, method)
        assert [m.shape[-2:] for m in out.attentions] == [(r, r) for r in rows]
        assert all(torch.allclose(m.sum(-1), torch.ones(()), atol=1e-5) for m in out.attentions)
        assert [h.shape[1] for h in out.hidden_states[:4]] == rows


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_no_maps_where_the_plain_model_has_none(kind: str):
    model: Any = tiny_vit(kind)  # the fused kernel forms none
    assert shown(model, None).attentions == shown(model, "tome:r=2").attentions == ()


def test_packed_rows_have_no_maps():
    model: Any = tiny_vit("vit")
    model.set_attn_implementation("eager")
    with pytest.raises(fewer.hosts.HostError, match="execution='padded'"):
        shown(model, "ats:tokens=6,layers=1", "packed")
    assert len(shown(model, "random:keep=0.6,layers=1", "masked").attentions) == 4


def test_maps_of_a_decoder():
    model: Any = fresh("llama")
    model.set_attn_implementation("eager")
    ids, mask = prompt(20, 11)
    with fewer.apply(model, "random:keep=0.5,layers=1"):
        out = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    assert [m.shape[-2:] for m in out.attentions] == [(20, 20), (20, 20), (10, 10)]
    with fewer.apply(model, "snapkv:keep=0.5,window=4"):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, output_attentions=True,
                             return_dict_in_generate=True)  # fmt: skip
    assert [maps[0].shape[-2:] for maps in out.attentions] == [(20, 20), (1, 11), (1, 12)]


# -- training ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [CACHE, "h2o:keep=0.5", "random:keep=0.5,layers=1+", "lazyllm:keep=0.6,layers=1+"])
def test_a_decoder_trains_on_batches_padded_on_the_right(method: str):
    model: Any = fresh("llama")
    ids, mask = (x.flip(1) for x in prompt(20, 11))
    labels = ids.masked_fill(mask == 0, -100)
    with fewer.apply(model, method):
        with pytest.raises(ValueError, match="use_cache=False"):
            model(ids, attention_mask=mask, labels=labels)
        loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        model.train()
        trained = model(ids, attention_mask=mask, labels=labels).loss
        trained.backward()
    torch.testing.assert_close(trained, loss)
    if method in (CACHE, "h2o:keep=0.5"):  # one pass reads all of its rows before any goes
        torch.testing.assert_close(loss, model.eval()(ids, attention_mask=mask, labels=labels).loss)


def test_dynamic_context_pruning_generates_in_training_mode():
    model: Any = fresh("llama")
    with fewer.apply(model, "dynamic_context_pruning", modules="untrained"):
        plain = written(model)
        model.train()
        assert torch.equal(written(model), plain)
        ids, mask = prompt(20, 11)
        model(ids, attention_mask=mask, labels=ids).loss.backward()


@pytest.mark.parametrize("method", [CACHE, "h2o:keep=0.5", "quest:tokens=8,page=4", "random:keep=0.5,layers=1+"])
@pytest.mark.parametrize("name", ["mistral-sliding", "gemma3"])
def test_a_cache_made_without_a_config_slides_too(name: str, method: str):
    from transformers import DynamicCache

    from fewer.compat import cached

    model: Any = fresh(name)
    ids, mask = prompt(20, 11)
    seen = []
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        with fewer.apply(model, method) as session:
            out = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, **cached(model, cache))
            seen.append((out.tolist(), session.counts))
    assert seen[0] == seen[1]


def test_the_next_turn_of_a_cache_made_without_a_config():
    from transformers import DynamicCache

    from fewer.compat import cached

    model: Any = fresh("gemma3")
    ids, _ = prompt(20)
    said = []
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        with torch.no_grad():
            model(ids, **cached(model, cache))  # before the session
            with fewer.apply(model, CACHE) as session:
                said.append((model(ids[:, :7], **cached(model, cache)).logits, session.counts))
    assert torch.equal(said[0][0], said[1][0])
    assert said[0][1] == said[1][1]


# -- few bits ----------------------------------------------------------------------------------------------------------
def _torchao(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def _dynamic(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def _bitsandbytes(model: nn.Module, kind: str, **options: Any) -> nn.Module:
    bits = pytest.importorskip("bitsandbytes")
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and "head" not in path and "classifier" not in path:
            parent, _, name = path.rpartition(".")
            bias = module.bias is not None
            packed = getattr(bits.nn, kind)(module.in_features, module.out_features, bias=bias, **options)
            packed.load_state_dict(module.state_dict())
            setattr(model.get_submodule(parent), name, packed.to("cpu"))
    return model


def _int8(model: nn.Module) -> nn.Module:
    return _bitsandbytes(model, "Linear8bitLt", has_fp16_weights=False)


def _nf4(model: nn.Module) -> nn.Module:
    return _bitsandbytes(model, "Linear4bit", quant_type="nf4", compute_dtype=torch.float32)


FEW = [(_torchao, 0.1), (_dynamic, 0.2), (_int8, 0.2), (_nf4, 0.9)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("pack", "error"), FEW)
@pytest.mark.parametrize("kind", ["vit", "timm", "bert"])
def test_packed_weights_cost_what_they_stand_for(kind: str, pack: Callable[[nn.Module], nn.Module], error: float):
    x = texts(width=64) if kind == "bert" else images()
    model = tiny_vit(kind, width=64)
    with fewer.apply(model, "random:keep=0.6,layers=1") as session:
        exact, cost = run(model, x), session.ledger
    model = pack(model)
    plain = run(model, x)
    with fewer.apply(model, "random:keep=0.6,layers=1") as session:
        rough, ledger = run(model, x), session.ledger
    assert ledger.gflops == cost.gflops
    assert ledger.gflops_full == cost.gflops_full
    assert (rough - exact).norm() < error * exact.norm()
    assert torch.equal(run(model, x), plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pack", [pack for pack, _ in FEW if pack is not _int8])
@pytest.mark.parametrize("method", [CACHE, "random:keep=0.5,layers=1+", "kvzip:keep=0.5"])
def test_packed_decoders(method: str, pack: Callable[[nn.Module], nn.Module]):
    model = fresh("llama")
    with fewer.apply(model, method) as session:
        written(model)
        cost = session.ledger
    model = pack(model)
    with fewer.apply(model, method) as session:
        written(model)
        ledger = session.ledger
    assert ledger.flops == cost.flops
    assert ledger.reading is None or ledger.reading.gflops_full == cost.reading.gflops_full
    assert [r.logical for r in ledger.layers] == [r.logical for r in cost.layers]


# -- classes and blocks of somebody's own ------------------------------------------------------------------------------
def _config() -> Any:
    from transformers import ViTConfig

    return ViTConfig(image_size=32, patch_size=8, num_hidden_layers=4, hidden_size=32, num_attention_heads=4,
                     intermediate_size=64)  # fmt: skip


def test_subclasses():
    from transformers import LlamaForCausalLM, ViTModel

    class Mine(LlamaForCausalLM):
        pass

    class Scaled(ViTModel):
        def forward(self, pixel_values: Tensor, scale: float = 1.0, **kwargs: Any) -> Any:
            return super().forward(pixel_values * scale, **kwargs)

    class WithHead(ViTModel):
        def __init__(self, config: Any, head: nn.Module, dropout: float = 0.1) -> None:
            super().__init__(config)
            self.head = head

    own, model = Mine(decoder("llama").config).eval(), decoder("llama")
    own.load_state_dict(model.state_dict())
    own.generation_config.eos_token_id = None
    with fewer.apply(own, CACHE), fewer.apply(model, CACHE):
        assert torch.equal(written(own), written(model))
    for vit in (Scaled(_config()), WithHead(_config(), nn.Linear(3, 3))):
        with fewer.apply(vit.eval(), "tome:r=2") as session:
            vit(images())
            assert session.counts == [15, 13, 11, 9]


def test_a_class_written_anew_is_looked_at_anew():
    from transformers import ViTModel
    from transformers.models.vit.modeling_vit import ViTLayer

    def cell(sign: float) -> nn.Module:
        class Mine(ViTLayer):
            def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                middle = hidden_states + self.attention(self.layernorm_before(hidden_states))[0]
                return middle + sign * self.mlp(self.layernorm_after(middle))

        class Model(ViTModel):
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.layers = nn.ModuleList([Mine(config) for _ in range(4)])

        torch.manual_seed(0)
        return Model(_config()).eval()

    answers = []
    for sign in (1.0, -1.0):
        model: Any = cell(sign)
        plain = model(images()).last_hidden_state
        with fewer.apply(model, "random:keep=1.0,layers=0+"):
            assert torch.equal(model(images()).last_hidden_state, plain)
        with fewer.apply(model, "tome:r=2"):
            answers.append(model(images()).last_hidden_state)
    assert answers[0].shape[1] == 9
    assert not torch.allclose(*answers)


def test_a_class_that_wants_arguments_is_refused_with_the_way_out():
    from transformers import BertConfig, BertModel

    class Classifier(BertModel):
        def __init__(self, config: Any, *, labels: int) -> None:
            super().__init__(config)
            self.out = nn.Linear(config.hidden_size, labels)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.out(super().forward(input_ids).last_hidden_state[:, 0])

    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    with pytest.raises(fewer.hosts.HostError, match="wants labels besides the config; give them defaults"):
        fewer.apply(Classifier(config, labels=3), "power_bert:keep=0.7")


def test_a_replaced_forward_runs_or_is_refused():
    model, x = tiny_vit("vit"), images()
    block = fewer.hosts.find(model).blocks[1]
    own = block.forward

    def louder(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return own(hidden_states, *args, **kwargs) * 1.5

    with fewer.apply(model, "random:r=5,layers=2") as session:
        run(model, x)
        kept = session.kept(2)[0]
    block.forward = louder  # type: ignore[method-assign]
    plain = run(model, x)
    with pytest.raises(fewer.hosts.HostError, match=r"block 1 was replaced by .*louder.*layers="):
        fewer.apply(model, "tome:r=2")
    with fewer.apply(model, "random:r=5,layers=2") as session:  # acts in another block
        reduced = run(model, x)
        assert torch.equal(session.kept(2)[0], kept)
    assert not torch.allclose(reduced, plain)
    assert torch.equal(run(model, x), plain)
    assert vars(block)["forward"] is louder
    assert not ours(model)


def test_blocks_taken_out():
    model: Any = tiny_vit("vit")
    model.vit.layers = model.vit.layers[:2]  # the config still says four
    with fewer.apply(model, "tome:r=2") as session:
        run(model, images())
        assert session.counts == [15, 13]
    decoding: Any = fresh("llama")
    del decoding.model.layers[1]
    decoding.model.layers[1].self_attn.layer_idx = 1
    with fewer.apply(decoding, CACHE) as session:
        written(decoding, 20)
        assert session.counts == [15, 15]


def test_wrapped_blocks_are_refused():
    class Wrapper(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.block(*args, **kwargs)

    model: Any = tiny_vit("vit")
    plain = run(model, images())
    model.vit.layers[0] = Wrapper(model.vit.layers[0])
    with pytest.raises(fewer.hosts.HostError, match="a Wrapper where ViTModel makes a ViTLayer; put a method on"):
        fewer.apply(model, "tome:r=2")
    assert torch.equal(run(model, images()), plain)
    assert not ours(model)


def test_attention_of_somebody_elses_own_is_refused_where_it_is_needed():
    model: Any = tiny_vit("vit")

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            return self.attention(x, x, x)[0], None

    for block in model.vit.layers:
        block.attention = Other()
    plain = run(model, images())
    with (
        fewer.apply(model, "tome:r=2"),
        pytest.raises(fewer.hosts.HostError, match=r"attention of block 0 .* not reached"),
    ):
        run(model, images())
    assert torch.equal(run(model, images()), plain)
    assert not ours(model)


# -- sharded, in parallel, checkpointed --------------------------------------------------------------------------------
@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """This process as a group of its own."""
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _sharded(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("kind", "method"), [*VISION, ("bert", "tome:r=2"), ("llama", CACHE),
                                              ("llama", "random:keep=0.5,layers=1+")])  # fmt: skip
def test_sharded_by_fsdp2(group: None, kind: str, method: str, late: bool):
    model: Any = fresh(kind) if kind in BUILD else tiny_vit(kind)
    answer = written if kind in BUILD else partial(run, x=texts() if kind == "bert" else images())
    plain = answer(model)
    with fewer.apply(model, method) as session:
        reduced = answer(model)
    blocks = session.host.blocks
    if not late:
        _sharded(model, blocks)
    session = fewer.apply(model, method)
    if late:
        _sharded(model, blocks)
    torch.testing.assert_close(answer(model), reduced)
    session.remove()
    torch.testing.assert_close(answer(model), plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("late", [False, True])
def test_in_parallel(group: None, late: bool):
    from torch.nn.parallel import DistributedDataParallel

    model, x = tiny_vit("vit"), images()
    with fewer.apply(model, "tome:r=2"):
        reduced = run(model, x)
    outer: Any = model if late else DistributedDataParallel(model)
    with fewer.apply(outer, "tome:r=2"):
        outer = DistributedDataParallel(model) if late else outer
        logits = outer(pixel_values=x).logits
        torch.testing.assert_close(logits, reduced)
        logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def _gradients(model: Any, **given: Any) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    model.train()
    torch.manual_seed(0)
    loss = model(**given).loss
    loss.backward()
    model.eval()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [CACHE, "random:keep=0.5,layers=1+", "lazyllm:keep=0.6,layers=1+"])
def test_a_checkpointed_decoder_has_its_gradients_or_says_why_not(method: str, reentrant: bool):
    model: Any = fresh("llama")
    ids, mask = (x.flip(1) for x in prompt(20, 11))
    given = dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    with fewer.apply(model, method):
        plain = _gradients(model, **given)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        if reentrant and method != CACHE:
            with pytest.raises(fewer.SessionError, match=r"tokens that are dropped.*use_reentrant"):
                _gradients(model, **given)
        else:
            torch.testing.assert_close(_gradients(model, **given), plain)


def test_what_checkpointing_would_get_wrong_is_refused():
    model: Any = tiny_vit("vit")
    given = dict(pixel_values=images(), labels=torch.tensor([1, 2]))
    with fewer.apply(model, "token_transforming:tokens=6,layers=1"):
        plain = _gradients(model, **given)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(fewer.SessionError, match=r"sizes of merged tokens.*use_reentrant"):
            _gradients(model, **given)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.testing.assert_close(_gradients(model, **given), plain)
    decoding: Any = fresh("llama")
    decoding.gradient_checkpointing_enable({"use_reentrant": False})
    ids, mask = prompt(20, 11)
    refused = pytest.raises(fewer.SessionError, match="gradient_checkpointing_disable")
    with fewer.apply(decoding, "dynamic_context_pruning", modules="untrained"), refused:
        _gradients(decoding, input_ids=ids, attention_mask=mask, labels=ids)


def test_a_budget_that_leaves_nothing_is_refused():
    model = tiny_vit("siglip")
    with (
        fewer.apply(model, "random:r=16,layers=1"),
        pytest.raises(fewer.hosts.HostError, match="random leaves no token"),
    ):
        run(model, images())


# -- pipelines, trainers, sentence encoders ----------------------------------------------------------------------------
SENTENCES = ["w1 w2 w3 w4 w5 w6 w7 w8", "w9 w10", "w3 w4 w5 w6 w30 w31"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(45))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(tmp_path / "vocab.txt"))


def classifier(**options: Any) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    size = dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    return BertForSequenceClassification(BertConfig(**size, pad_token_id=0, **options)).eval()


def test_image_pipeline():
    from PIL import Image
    from transformers import ViTImageProcessorPil, pipeline

    model = tiny_vit("vit")
    pictures = [Image.fromarray((255 * torch.rand(40, 32, 3)).byte().numpy()) for _ in range(3)]
    pipe = pipeline(
        "image-classification", model=model, image_processor=ViTImageProcessorPil(size=dict(height=32, width=32))
    )
    plain = pipe(pictures)
    with fewer.apply(model, "tome:r=2") as session:
        reduced = pipe(pictures, batch_size=2)
        assert session.counts == [15, 13, 11, 9]
    assert reduced != plain
    assert pipe(pictures) == plain


def test_the_packaged_model_in_a_pipeline():
    from PIL import Image
    from transformers import pipeline

    from fewer.models import zoo

    model, processor = zoo.load_model()
    picture = Image.fromarray((255 * torch.rand(28, 28)).byte().numpy())
    pipe = pipeline("image-classification", model=model, image_processor=processor)
    with fewer.apply(model, "tome:r=8") as session:
        best = pipe(picture)[0]
        scores = model(pixel_values=processor(picture)).logits.softmax(-1)
        assert session.counts[0] < session.last.first.n
    assert best["score"] == pytest.approx(scores.max().item(), abs=1e-5)


def test_text_pipelines(tokenizer: Any):
    from transformers import PreTrainedTokenizerFast, pipeline

    model = classifier()
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer)
    plain = pipe(SENTENCES, batch_size=3)
    with fewer.apply(model, "power_bert:keep=0.7") as session:
        reduced = pipe(SENTENCES, batch_size=3)
        assert session.counts[-1].tolist() == [3, 2, 2]
        alone = [pipe(s)[0] for s in SENTENCES]
        assert [r["score"] for r in reduced] == pytest.approx([a["score"] for a in alone], abs=1e-5)
        rows = pipeline("feature-extraction", model=model.bert, tokenizer=tokenizer)(SENTENCES)
        assert [len(r[0]) for r in rows] == [10, 4, 8]
    assert pipe(SENTENCES, batch_size=3) == plain
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]", eos_token="[SEP]",
                                    padding_side="left")  # fmt: skip
    decoding = fresh("llama")
    write = pipeline("text-generation", model=decoding, tokenizer=words)
    options = dict(max_new_tokens=5, do_sample=False, batch_size=3)
    plain = write(SENTENCES, **options)
    with fewer.apply(decoding, "snapkv:keep=0.5,window=2") as session:
        assert len(write(SENTENCES, **options)) == 3
        assert max(session.counts) < 10
    assert write(SENTENCES, **options) == plain


class Items(torch.utils.data.Dataset):
    """Eight training items, texts padded behind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.kind == "vit":
            return dict(pixel_values=images(1, seed=index)[0], labels=index % 7)
        mask = torch.arange(17) < (9, 17, 5)[index % 3]
        ids = torch.randint(5, 50, (17,), generator=torch.Generator().manual_seed(index)) * mask
        labels = index % 2 if self.kind == "bert" else ids.masked_fill(~mask, -100)
        return dict(input_ids=ids, attention_mask=mask.long(), labels=labels)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "method", "options"), [
    ("vit", "tome:r=2", {}), ("vit", "evit:keep=0.6,layers=0+1", dict(bf16=True)),
    ("vit", "tome:r=2", dict(gradient_checkpointing=True)), ("bert", "power_bert:keep=0.7", {}), ("llama", CACHE, {}),
    ("llama", "random:keep=0.5,layers=1+", dict(gradient_checkpointing=True)),
])  # fmt: skip
def test_a_trainer_trains_and_saves(kind: str, method: str, options: dict[str, Any], tmp_path: Path):
    from transformers import Trainer, TrainingArguments

    model: Any = {"vit": lambda: tiny_vit("vit"), "bert": classifier, "llama": lambda: fresh("llama")}[kind]()
    before = [p.clone() for p in model.parameters()]
    with fewer.apply(model, method):
        args = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, save_steps=1, eval_steps=1, use_cpu=True,
            eval_strategy="steps", report_to=[], disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=Items(kind), eval_dataset=Items(kind))
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        trainer.save_model(str(tmp_path / "final"))
        args.max_steps = 3
        Trainer(model, args, train_dataset=Items(kind), eval_dataset=Items(kind)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True) if a.dim() > 1)
    again = type(model).from_pretrained(tmp_path / "final")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert "fewer" not in (tmp_path / "final" / "config.json").read_text()


@pytest.mark.slow
def test_sentence_transformers(tokenizer: Any, tmp_path: Path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models

    folder = str(tmp_path / "encoder")
    classifier().bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parts = [models.Transformer(folder), models.Pooling(32)]
    model = library.SentenceTransformer(modules=parts, device="cpu")
    plain = model.encode(SENTENCES)
    with fewer.apply(model, "power_bert:keep=0.7") as session:
        reduced = model.encode(SENTENCES)
        assert session.counts[-1].tolist() == [3, 2, 2]
        for row, sentence in zip(reduced, SENTENCES, strict=True):
            assert model.encode([sentence])[0] == pytest.approx(row, abs=1e-5)
    assert (model.encode(SENTENCES) == plain).all()
    folder = str(tmp_path / "ranker")
    classifier(num_labels=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ranker = library.CrossEncoder(folder, device="cpu")
    pairs = [(SENTENCES[0], SENTENCES[1]), (SENTENCES[1], SENTENCES[2])]
    plain = ranker.predict(pairs)
    with fewer.apply(ranker, "power_bert:keep=0.7") as session:
        assert ranker.predict(pairs) != pytest.approx(plain, abs=0)
        assert session.counts[-1].tolist() == [4, 3]
    assert (ranker.predict(pairs) == plain).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapters", [False, True])
def test_supervised_fine_tuning_with_trl(tokenizer: Any, tmp_path: Path, adapters: bool):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]", eos_token="[SEP]")
    model = fresh("llama")
    args = trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, max_length=16,
    )  # fmt: skip
    peft = None if not adapters else pytest.importorskip("peft").LoraConfig(r=2, task_type="CAUSAL_LM")
    data = datasets.Dataset.from_dict({"text": SENTENCES * 2})
    with fewer.apply(model, "random:keep=0.5,layers=1+"):
        trainer = trl.SFTTrainer(model, args, train_dataset=data, processing_class=words, peft_config=peft)
        trainer.train()
        assert trainer.state.global_step == 2
