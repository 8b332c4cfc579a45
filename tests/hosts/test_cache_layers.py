"""Decoders whose attention calls do not go with their blocks one by one: which layer of the cache each call reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from typer.testing import CliRunner

import fewer
from fewer import hosts, verify
from fewer.compat import cache_of
from fewer.core import Site
from fewer.hosts import twin
from fewer.hosts.decoder import Calls
from fewer.spec import parse

torch.set_num_threads(1)
SINKS = "streamingllm:keep=0.5,sinks=2,positions=original"
CLASSES = {
    "diffllama": "DiffLlamaForCausalLM",  # two calls over the same keys, each with half of the values
    "longcat_flash": "LongcatFlashForCausalLM",  # two attentions in a block, a layer of the cache for each
    "hrm_text": "HrmTextForCausalLM",  # two stacks that are run several times, a layer for each time
    "dory": "DoryForCausalLM",  # a loop that appends copies of layers to its cache
}
each = pytest.mark.parametrize("name", CLASSES)


def small(name: str) -> Any:
    if not hasattr(transformers, CLASSES[name]):
        pytest.skip(f"transformers {transformers.__version__} has no {CLASSES[name]}")
    config = transformers.AutoConfig.for_model(name)
    return twin.build(getattr(transformers, CLASSES[name]), twin.shrink(config, depth=2))


def words(model: Any, length: int = 20) -> torch.Tensor:
    return twin.example(model, batch=2, length=length)["input_ids"]


def written(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)


@each
def test_every_layer_of_the_cache_is_reduced_and_all_is_as_before(name: str) -> None:
    model = small(name)
    ids = words(model)
    plain = written(model, ids)
    with torch.no_grad():
        held = len(cache_of(model(ids, use_cache=True)).layers)
    with fewer.apply(model, "streamingllm:keep=1.0,sinks=2,positions=original"):
        assert torch.equal(written(model, ids), plain)
    with fewer.apply(model, SINKS) as session, torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
        assert len(session.counts) == len(cache.layers) == held == hosts.find(model).depth(Site.KV_CACHE)
        assert max(session.counts) <= 10
        for layer in range(held):
            kept = session.kept(layer)
            assert kept.shape[-1] == cache.layers[layer].keys.shape[-2]
            assert kept.max() == 19
    assert torch.equal(written(model, ids), plain)


def test_blocks_with_two_attentions_store_what_reaches_them_in_both_layers() -> None:
    model = small("longcat_flash")
    ids = words(model)
    with fewer.apply(model, "random:keep=0.5,layers=1,site=before") as session, torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
        rows = [layer.keys.shape[-2] for layer in cache.layers]
        assert rows[:2] == [20, 20]
        assert rows[2] == rows[3] < 20
        assert torch.equal(session.kept(2), session.kept(3))


def test_calls_that_share_keys_let_no_method_choose_what_each_reads() -> None:
    model = small("diffllama")
    with pytest.raises(fewer.SessionError, match="several times over the same keys"):
        fewer.apply(model, "quest")
    assert not hosts.find(model).occupied


def test_rows_that_go_before_the_last_call_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of ours: the first call is taken for the last, and the second meets another cache than its mask."""
    model = small("diffllama")
    host = hosts.find(model)
    right = Calls.next

    def hasty(self: Calls, module: Any) -> Any:
        read = right(self, module)
        return None if read is None else (read[0], True, True)

    monkeypatch.setattr(Calls, "next", hasty)
    monkeypatch.setattr(verify, "_verdicts", {})
    verdict = verify._tried(host)
    assert verdict.places[Site.KV_CACHE]


def test_calls_that_are_taken_for_those_of_other_layers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of a loop: every turn taken for the first."""
    host = hosts.find(small("hrm_text"))
    right = Calls.next

    def same(self: Calls, module: Any) -> Any:
        read = right(self, module)
        return None if read is None else (self.of[id(module)][0], *read[1:])

    monkeypatch.setattr(Calls, "next", same)
    verdict = verify._tried(host)
    assert verdict.places[Site.KV_CACHE]


def test_more_digits_do_not_excuse_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is off by more than rounding stays off in float64."""
    from fewer.runtime.kv.layer import ReducedLayer

    host = hosts.find(small("dory"))
    assert not verify._tried(host).places[Site.KV_CACHE]
    right = ReducedLayer.keep

    def shifted(self: Any, plan: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        right(self, plan, keys, values * 1.01)

    monkeypatch.setattr(ReducedLayer, "keep", shifted)
    assert "is not what hiding" in verify._tried(host).places[Site.KV_CACHE]


def test_doctor_on_a_folder_whose_tokenizer_makes_no_tokens(tmp_path: Path) -> None:
    from fewer.cli import app

    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())  # the table breaks its lines
    assert "the KV cache verified" in told
    assert "makes no tokens of a text" in told


@pytest.mark.parametrize("method", ["adakv:keep=0.5,window=2", "snapkv:keep=0.5,window=2", "knorm:keep=0.5"])
def test_a_position_bias_beside_the_mask_is_read_with_every_layout_of_rows(method: str) -> None:
    """Inkling: heads that keep different numbers, and one query over all rows, are read by code of our own."""
    if Version(transformers.__version__) < Version("5.24"):
        pytest.skip("its masks in 5.23 are for the rows of its window alone; verification refuses its cache there")
    config = transformers.AutoConfig.for_model("inkling_text")
    model = twin.build(transformers.InklingForCausalLM, twin.shrink(config, depth=2))
    root = hosts.find(model).root
    bound = hosts.find(root)
    assert all(layer.anew for layer in bound.layers)
    verify.Trial(root, bound)._evicted(parse(method))  # raises where it is not what hiding the rows is
