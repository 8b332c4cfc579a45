"""Presses of another library: the same interface, the official numbers, and what comes with being a method here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import repeat_kv, rotate_half

import fewer
from decoders import decoder, prompt
from fewer.adapters.kvpress import Press, Pressed, PressError, adapt
from fewer.compat import cache_of, cached
from fewer.core.budgets import BudgetError
from fewer.testing.checks import same_snapshot, snapshot
from kvgoldens import golden, specs, stays

GREEDY = dict(max_new_tokens=6, do_sample=False)


@dataclass
class Norms:
    """Small keys matter."""

    compression_ratio: float = 0.0

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return -keys.norm(dim=-1)


@dataclass
class Window:
    """Votes of the last queries, recomputed from the module's input as such presses do."""

    compression_ratio: float = 0.0
    window: int = 4
    kernel: int = 5
    heard: tuple = ()

    def post_init_from_model(self, model):
        self.heard = (type(model).__name__,)

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        w, n = self.window, keys.shape[2]
        q = module.q_proj(hidden_states[:, -w:]).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        cos, sin = (x[:, -w:, :].unsqueeze(1) for x in kwargs["position_embeddings"])
        q = q * cos + rotate_half(q) * sin
        groups = module.num_key_value_groups
        logits = q @ repeat_kv(keys, groups).transpose(-1, -2) * module.scaling
        logits = logits.masked_fill(torch.arange(n) > torch.arange(n - w, n)[:, None], float("-inf"))
        votes = logits.softmax(-1)[..., :-w].mean(-2)
        votes = F.avg_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2).unflatten(1, (-1, groups)).mean(2)
        assert module.rotary_emb is not None
        assert kwargs["past_key_values"].get_seq_length() == n
        return F.pad(votes, (0, w), value=float("inf"))


@dataclass
class Weighed:
    """Wants attention probabilities as the model's eager attention returns them."""

    compression_ratio: float = 0.0

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return attentions.sum(2).unflatten(1, (keys.shape[1], -1)).mean(2)


@pytest.mark.parametrize("ratio", [3, 5, 7])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["knorm", "snapkv"])
def test_a_press_keeps_what_it_keeps_at_home(name, seed, ratio):
    arrays, config, model = golden(seed)
    ids, question = arrays["input_ids"].long(), arrays["question_ids"].long()
    press = Norms(ratio / 10) if name == "knorm" else Window(ratio / 10, config["w"], config["k"])
    with fewer.apply(model, press) as session, torch.no_grad():
        out = model(ids)
        kept = [stays(session.kept(layer), config["T"]) for layer in range(4)]
        decoded = [model(question[:, i : i + 1], **cached(model, cache_of(out))).logits[:, 0] for i in range(4)]
    for layer, mine in enumerate(kept):
        differs = mine != stays(arrays[f"{name}.r{ratio}.L{layer}.kept"], config["T"])
        near = (name, seed, ratio, layer) in {("snapkv", 1, 5, 2), ("knorm", 0, 7, 2)}  # near-ties at the cut
        assert differs.sum() <= (2 if near else 0)
    assert_close(torch.stack(decoded, 1), arrays[f"{name}.r{ratio}.decode_logits"], atol=2e-4, rtol=2e-4)
    with fewer.apply(model, specs(config, 1 - ratio / 10)[name]) as session, torch.no_grad():
        model(ids)
        assert all(torch.equal(stays(session.kept(i), config["T"]), mine) for i, mine in enumerate(kept))


def test_nothing_of_it_stays_on_the_model():
    model = decoder("llama")
    ids, mask = prompt(30)
    plain, names = model.generate(ids, **GREEDY), list(model.state_dict())
    attention = model.model.layers[0].self_attn
    press = Window(0.5)
    with fewer.apply(model, press) as session:
        assert press.heard == ("LlamaForCausalLM",)
        assert list(model.state_dict()) == names
        assert not torch.equal(model.generate(ids, **GREEDY), plain)
        assert session.counts == [15 + 5] * 3
        assert "Window(compression_ratio=0.5" in session.report()
    assert not hasattr(attention, "rotary_emb")
    assert not attention._forward_pre_hooks
    assert torch.equal(model.generate(ids, **GREEDY), plain)
    with fewer.apply(model, Window(0.0)):
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), plain)


def test_padding_goes_first_and_later_turns_stay():
    model = decoder("llama")
    ids, mask = prompt(30, 17)
    settings = dict(**GREEDY, return_dict_in_generate=True, output_logits=True)
    with fewer.apply(model, Norms(0.4)) as session:
        together = model.generate(ids, attention_mask=mask, **settings)
        alone = model.generate(ids[1:, -17:], **settings)
        for x, y in zip(alone.logits, together.logits, strict=True):
            assert_close(x[0], y[1], rtol=2e-4, atol=2e-4)
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(ids[:1], **cached(model, cache))
            model(ids[:1, :9], **cached(model, cache))
        assert session.counts == [18 + 9] * 3


def test_probabilities_come_from_eager_attention_only():
    model = decoder("llama")
    ids, _ = prompt(30)
    with fewer.apply(model, Weighed(0.5)), pytest.raises(AttributeError):
        model.generate(ids, **GREEDY)
    model.set_attn_implementation("eager")
    try:
        with fewer.apply(model, Weighed(0.5)) as session, torch.no_grad():
            model(ids)
            kept = session.kept(1)
        with fewer.apply(model, "h2o:keep=0.5,recent=0.0,decodes=false") as session, torch.no_grad():
            model(ids)
            assert torch.equal(session.kept(1), kept)
    finally:
        model.set_attn_implementation("sdpa")


def test_beside_methods_that_read_and_store():
    model = decoder("llama")
    ids, _ = prompt(60)
    stack = [Norms(0.4), "quest:page=4,tokens=16,dense=1", "ott:group=8,window=4"]
    with fewer.apply(model, stack) as session:
        model.generate(ids, **GREEDY)
        assert session.ledger.stored == [41] * 3
        assert session.ledger.read[1] < 41
        assert session.ledger.bytes < 3 * 41 * 2 * 2 * 8 * 4


class ScorerPress(Norms):
    """A base class of that name cuts by scores alone."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        raise AssertionError("not called here")


class AdaKVPress(ScorerPress):
    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        raise AssertionError("not called here")


class Own(AdaKVPress):
    """Somebody's own."""


def test_presses_that_cut_in_their_own_way_are_refused():
    assert isinstance(Norms(), Press)
    assert isinstance(adapt(ScorerPress(0.5)), Pressed)
    with pytest.raises(PressError, match="'adakv' of this package"):
        adapt(AdaKVPress(0.5))
    with pytest.raises(PressError, match=r"Own does not only score rows, it cuts them in its own way$"):
        adapt(Own(0.5))
    press = Norms(0.5)
    press.compression_ratio = 1.5
    with pytest.raises(BudgetError, match=r"1\.5 is outside"):
        fewer.apply(decoder("llama"), press)
    assert adapt("snapkv") == "snapkv"


class PerLayerCompressionPress:
    """As kvpress has it: a list of ratios, and none of its own."""

    compression_ratios: ClassVar[list[float]] = [0.5, 0.2]

    @property
    def compression_ratio(self):
        raise NotImplementedError("one for each layer")

    def forward_hook(self, *args): ...


class DecodingPress:
    """No scores, and a size instead of a ratio."""

    def __init__(self):
        self.compression_ratio = None

    def compress(self, *args): ...


class BasePress:
    """Of which kvpress's are made."""


class Bare(BasePress):
    """Neither ratio nor scores."""


@pytest.mark.parametrize(
    ("press", "why"),
    [
        (PerLayerCompressionPress(), "PerLayerCompressionPress .* give apply a method with layers="),
        (DecodingPress(), "DecodingPress .* methods that act while decoding"),
        (Bare(), "Bare does not only score rows"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_presses_without_scores_are_refused_by_name(press, why):
    model = decoder("llama")
    before = snapshot(model)
    for given in (press, [press], ["snapkv", press]):
        with pytest.raises(PressError, match=why):
            fewer.apply(model, given)
    same_snapshot(before, snapshot(model), "a refused press")
