"""A model nobody has seen before is found, tried on a twin, and trusted with what it was seen to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama import modeling_llama

import fewer
from fewer.compat import given_cache
from fewer.core import KeepRatio, Site
from fewer.hosts import HostError, anatomy, find, stacks
from fewer.hosts.anatomy import Stream
from fewer.hosts.attention import Call, fused
from fewer.hosts.discovery import SHALLOW, shallow
from fewer.hosts.steps import StepsError, bound, record
from fewer.hosts.twin import build, shrink
from fewer.hosts.watching import inputs_of, observe
from fewer.methods.vision.random import Random
from fewer.runtime import verify
from fewer.testing.checks import same_snapshot, snapshot

INSIDE = {Site.BEFORE_BLOCK, Site.AROUND_BLOCK, Site.MID_BLOCK, Site.AFTER_BLOCK}


def twin(name: str, **options: Any) -> nn.Module:
    cls: Any = getattr(transformers, name)
    return build(cls, shrink(cls.config_class(**options), depth=2))


def trusted(model: nn.Module) -> set[Site]:
    return {site for site, why in verify.verify(find(model)).places.items() if not why}


# -- a stranger --------------------------------------------------------------------------------------------------------
class StrangeConfig(PretrainedConfig):
    model_type = "strange"

    def __init__(self, hidden_size: int = 32, num_hidden_layers: int = 3, num_attention_heads: int = 4,
                 vocab_size: int = 60, **more: Any) -> None:  # fmt: skip
        super().__init__(**more)
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.vocab_size = num_attention_heads, vocab_size


class StrangeAttention(nn.Module):
    """Attention written out by hand, with a bias by distance that the model hands in."""

    def __init__(self, config: StrangeConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.mix, self.out = (
            nn.Linear(config.hidden_size, 3 * config.hidden_size),
            nn.Linear(config.hidden_size, config.hidden_size),
        )

    def forward(self, x: Tensor, far: Tensor, shut: Tensor | None) -> Tensor:
        q, k, v = self.mix(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 - far
        logits = logits if shut is None else logits + shut
        return self.out((F.softmax(logits, -1) @ v).transpose(1, 2).flatten(2))


class StrangeLayer(nn.Module):
    """A post-norm block whose MLP stands in the block itself."""

    def __init__(self, config: StrangeConfig) -> None:
        super().__init__()
        self.acts_on_visual_rows = StrangeAttention(config)
        self.one, self.two = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.up, self.down = nn.Linear(config.hidden_size, 64), nn.Linear(64, config.hidden_size)
        self.gain = 0.7

    def forward(self, states: Tensor, far: Tensor, shut: Tensor | None = None) -> tuple[Tensor, str]:
        states = self.one(states + self.gain * self.acts_on_visual_rows(states, far, shut))
        return self.two(states + self.down(torch.tanh(self.up(states)))), "besides"


class StrangeModel(PreTrainedModel):
    config_class = StrangeConfig
    layer: type[nn.Module] = StrangeLayer

    def __init__(self, config: StrangeConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.tower = nn.ModuleList(self.layer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        n = input_ids.shape[1]
        where = torch.arange(n, device=input_ids.device)
        far = (where[:, None] - where).abs()[None, None] * 0.3
        shut = None if attention_mask is None else (attention_mask[:, None, None].float() - 1) * 1e9
        x = self.words(input_ids)
        for layer in self.tower:
            x, _ = layer(x, far, shut=shut)
        return BaseModelOutput(last_hidden_state=x)


def stranger(cls: type[StrangeModel] = StrangeModel) -> StrangeModel:
    torch.manual_seed(0)
    return cls(StrangeConfig()).eval()


def test_a_model_that_came_out_last_week() -> None:
    """Its own names, attention written out, a bias as an argument, a mask of another name, a post-norm."""
    model = stranger()
    host = find(model)
    assert (host.kind, len(host.blocks), host.layers[0].way, host.layers[0].attention) == (
        "text",
        3,
        "written",
        "acts_on_visual_rows",
    )
    assert trusted(model) == INSIDE
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    before = snapshot(model)
    with torch.no_grad():
        plain = model(ids, mask).last_hidden_state
        with fewer.apply(model, "tome:r=0"):
            assert torch.equal(model(ids, mask).last_hidden_state, plain)
        with fewer.apply(model, "cls_topk:keep=0.5,layers=1") as session:
            got, counts = model(ids, mask).last_hidden_state, session.counts
            alone = model(ids[:1, :7]).last_hidden_state
        assert_close(got[:1, :7], alone, atol=1e-5, rtol=1e-4)
        assert counts[-1].tolist() == [4.0, 6.0] or counts[-1].tolist() == [4, 6]
    same_snapshot(before, snapshot(model), "a stranger")
    assert torch.equal(model(ids, mask).last_hidden_state, plain)


def test_a_causal_text_without_a_cache_keeps_its_order_and_its_last_word() -> None:
    """CLIP says by a flag that its text is causal, and reads the answer from the last word."""
    model: Any = twin("CLIPTextModel")
    assert trusted(model) == INSIDE
    ids = torch.randint(20, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    drop = Random(KeepRatio(0.5, of="current"), (0,), site=Site.AFTER_BLOCK)
    with torch.no_grad(), fewer.apply(model, drop) as session:
        together = model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert bool((session.kept(1) == torch.tensor([6, 11])[:, None]).any(-1).all())
        alone = model(input_ids=ids[:1, :7]).last_hidden_state
    assert_close(together[:1, :7], alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(fewer.SessionError, match="packed"):
        fewer.apply(model, drop, execution="packed")


# -- planted faults: what the trials must catch ------------------------------------------------------------------------
class Counting(StrangeLayer):
    """Its attention scales by how many tokens there are, hidden or not."""

    def forward(self, states: Tensor, far: Tensor, shut: Tensor | None = None) -> tuple[Tensor, str]:
        out, rest = super().forward(states, far, shut)
        return out * (1 + 1 / states.shape[1]), rest


class Convolving(StrangeLayer):
    """A convolution beside the attention mixes neighbours."""

    def forward(self, states: Tensor, far: Tensor, shut: Tensor | None = None) -> tuple[Tensor, str]:
        out, rest = super().forward(states, far, shut)
        return out + F.pad(out, (0, 0, 1, 0))[:, :-1], rest


class Deaf(StrangeLayer):
    """Makes its bias anew from what it is given: positions of tokens that left are not known to it."""

    def forward(self, states: Tensor, far: Tensor, shut: Tensor | None = None) -> tuple[Tensor, str]:
        where = torch.arange(states.shape[1], device=states.device)
        return super().forward(states, (where[:, None] - where).abs()[None, None] * 0.3, shut)


@pytest.mark.parametrize("layer", [Counting, Convolving, Deaf])
def test_what_drops_otherwise_than_it_hides_is_refused(layer: type[nn.Module]) -> None:
    model = stranger(type(f"Strange{layer.__name__}Model", (StrangeModel,), {"layer": layer}))
    assert trusted(model) == set()
    before = snapshot(model)
    with pytest.raises(HostError, match=r"is not trusted in .*: dropping tokens is not what hiding them is"):
        fewer.apply(model, "random:keep=0.5,layers=1")
    same_snapshot(before, snapshot(model), "a refused model")


class Shortened(modeling_llama.LlamaAttention):
    """Turns its queries otherwise where only one looks: a step behind a cache is not what a prompt is."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.shape[1] == 1 and _stored(kwargs) < 14:
            position_embeddings = tuple(t.roll(1, -1) for t in position_embeddings)
        return super().forward(hidden_states, position_embeddings, *args, **kwargs)


def _stored(kwargs: dict[str, Any]) -> int:
    cache = given_cache(kwargs)
    return 99 if cache is None else int(cache.layers[0].keys.shape[-2]) + 1


class ShortenedModel(modeling_llama.LlamaModel):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for block in self.layers:
            block.self_attn.__class__ = Shortened


def test_what_evicts_otherwise_than_it_hides_is_refused() -> None:
    config = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=99)
    assert Site.KV_CACHE in trusted(build(modeling_llama.LlamaModel, config))
    model = build(ShortenedModel, config)
    assert trusted(model) == INSIDE
    with pytest.raises(HostError, match="a cache without some rows is not what hiding these rows is"):
        fewer.apply(model, "knorm:keep=0.5")


def test_a_cache_can_be_trusted_where_its_blocks_cannot_and_the_other_way_round() -> None:
    """Cohere's MLP stands beside its attention, Falcon-H1's mixer does: nothing can come between, the cache can go."""
    assert trusted(twin("CohereForCausalLM")) == {*INSIDE, Site.KV_CACHE} - {Site.MID_BLOCK}
    hybrid = twin("FalconH1ForCausalLM")
    assert trusted(hybrid) == {Site.KV_CACHE}
    with pytest.raises(HostError, match=r"lazyllm.* acts after a block.*places that are: the KV cache"):
        fewer.apply(hybrid, "lazyllm:keep=0.5,layers=0")
    shared = twin("DeepseekV32ForCausalLM")
    with pytest.raises(HostError, match=r"snapkv.* acts the KV cache.*index of its keys"):
        fewer.apply(shared, "snapkv:keep=0.5")


def test_heads_that_share_latents_keep_the_same_rows() -> None:
    model: Any = twin("DeepseekV3ForCausalLM")
    ids = torch.randint(20, 90, (2, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), fewer.apply(model, "streamingllm:tokens=7,sinks=2,positions=original") as session:
        model.generate(ids, max_new_tokens=3, do_sample=False)
        assert max(session.counts) == 7
    with (
        torch.no_grad(),
        fewer.apply(model, "snapkv:keep=0.5,window=4"),
        pytest.raises(fewer.SessionError, match=r"latents that its heads share \(MLA\)"),
    ):
        model.generate(ids, max_new_tokens=3, do_sample=False)


# -- streams -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "stream"),
    [
        ((1, 6, 4), Stream("s", (), -2, -3)), ((2, 6, 4), Stream("s", (), -2, -3)),
        ((3, 2, 6), Stream("s", (), -1, -2)),
        ((1, 1, 6, 4), Stream("s", (), -2, -4)), ((2, 3, 6, 6), Stream("s", (), -1, -4, square=True)),
        ((1, 3, 6, 6), Stream("s", (), -1, -4, square=True)), ((6, 6), Stream("s", (), -1, square=True)),
        ((6, 4), Stream("s", (), -2)), ((6, 6, 6), Stream("s", (), -1, square=True, folded=True)),
    ],
)  # fmt: skip
def test_what_travels_beside_the_tokens_is_cut_with_them(shape: tuple[int, ...], stream: Stream) -> None:
    """Against indexing by hand, sample by sample."""
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    place = torch.tensor([[0, 2, 5], [1, 3, 4]])
    got = stream.at(value, place)
    for b, index in enumerate(place):
        if stream.folded:
            mine, have = value.unflatten(0, (2, -1))[b], got.unflatten(0, (2, -1))[b]
        elif stream.batch is None:
            mine, have = value, got[b, 0]
        else:
            axis = stream.batch % value.dim()
            mine, have = value.select(axis, min(b, value.shape[axis] - 1)), got.select(axis, b)
        want = mine.index_select(stream.axis, index)
        assert torch.equal(have, want.index_select(stream.axis - 1, index) if stream.square else want)


# -- steps -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "cut"),
    [("ViTModel", True), ("BertModel", True), ("Gemma2Model", True), ("OPTModel", True), ("MixtralModel", True),
     ("BeitModel", True), ("T5EncoderModel", True), ("Wav2Vec2Model", True), ("GPTNeoXModel", False),
     ("CohereModel", False)],
)  # fmt: skip
def test_a_block_in_steps_is_the_block_to_the_bit(name: str, cut: bool) -> None:
    model = twin(name)
    stack = stacks(model)[0]
    found = anatomy(stack)
    block = stack.root.get_submodule(stack.blocks[-1])
    caught: dict[str, Any] = {}

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        entering, given = bound(module, args, kwargs)
        caught.update({entering: given.pop(entering)} | given)

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        stack.root(**inputs_of(stack.root) | ({"use_cache": False} if found.kind == "decoder" else {}))
        handle.remove()
        given = {k: v for k, v in caught.items() if k not in ("cache", "past_key_values", "use_cache")}
        steps = record(block, given, found.layers[-1].attention)
        x, rest = next(iter(given.values())), dict(list(given.items())[1:])
        want = block(**given)
        assert torch.equal(steps.whole(block, x, rest)[0], want[0] if isinstance(want, tuple) else want)
    assert (steps.cut is not None) == cut


def test_a_forward_that_cannot_be_played_back_says_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y[:, 0] = 0
            return y

    with pytest.raises(StepsError, match="writes into a tensor"):
        record(Odd(), {"x": torch.randn(2, 3, 4)}, "a")


@pytest.mark.parametrize("name", ["T5EncoderModel", "MPNetModel", "RoFormerModel", "EuroBertModel", "DebertaModel"])
def test_packed_rows_are_refused_where_something_travels_beside_them(name: str) -> None:
    """A position bias or a rotary table per token would stand at other rows than the packed ones, and an attention that
    insists on its mask has none there."""
    with pytest.raises(fewer.SessionError, match=r"packed execution does not carry .* bias"):
        fewer.apply(twin(name), Random(KeepRatio(0.5), (0,), site=Site.AFTER_BLOCK), execution="packed")


def test_the_fused_kernel_hears_its_arguments_by_place_and_by_name() -> None:
    q, k, v = (torch.randn(2, 3, 4, 8) for _ in range(3))
    mask, bias = torch.ones(4, 4, dtype=torch.bool).tril(), torch.randn(2, 1, 1, 4)
    heard = torch.nn.functional.scaled_dot_product_attention
    want = heard(q, k, v, bias.masked_fill(~mask, float("-inf")))
    with fused(Call(bias)):
        assert_close(heard(q, k, v, mask[None, None]), want)
        assert_close(heard(query=q, key=k, value=v, attn_mask=mask[None, None]), want)


# -- memory ------------------------------------------------------------------------------------------------------------
def test_what_was_found_out_is_not_found_out_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In another process: nothing is known there but what the cache folder holds."""
    from fewer.hosts import anatomy as seen
    from fewer.hosts import remembered

    where = __import__("importlib").import_module("fewer.hosts.discovery")
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    monkeypatch.setattr(where, "_known", {})
    monkeypatch.setattr(verify, "_verdicts", {})
    model = twin("BertModel", num_labels=3)
    first, places = seen(stacks(model)[0]), verify.verify(find(model)).places
    files = sorted((tmp_path / "hosts").iterdir())
    assert [f.name.partition("-")[0] for f in files] == ["anatomy", "verdict"]

    def fail(*_: Any) -> Any:
        raise AssertionError("looked again")

    where._known.clear()
    verify._verdicts.clear()
    with monkeypatch.context() as patch:
        patch.setattr(where, "observe", fail)
        patch.setattr(verify, "_tried", fail)
        assert seen(stacks(model)[0]) == first
        assert verify.verify(find(model)).places == places
    with fewer.apply(model, "tome:r=3") as session:  # steps that were read back are as good as those recorded
        model(input_ids=torch.randint(20, 90, (1, 9)))
        assert session.counts == [6, 4]
    for spoilt in ("", "{", "[]", '{"key": "another", "fact": null}', files[0].read_text()[:-40]):
        files[0].write_text(spoilt)
        where._known.clear()
        assert seen(stacks(model)[0]) == first
    monkeypatch.setattr(remembered, "_releases", lambda: "torch of next month")
    where._known.clear()
    assert seen(stacks(model)[0]) == first
    assert len(list((tmp_path / "hosts").iterdir())) == 3
    monkeypatch.setenv("FEWER_CACHE", str(files[0]))  # no folder can be made there
    where._known.clear()
    assert seen(stacks(model)[0]) == first


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("SwinModel", r"do not hand on one sequence of features"), ("FNetModel", "no run of blocks with attention"),
        ("XLMModel", "no run of blocks with attention"), ("PvtV2Model", "one sequence of features"),
        ("LongformerModel", "cannot be entered"), ("ParakeetEncoder", "hiding them"),
    ],
)  # fmt: skip
def test_families_that_are_refused_say_what_was_found(name: str, why: str) -> None:
    model = twin(name)
    before = snapshot(model)
    with pytest.raises(HostError, match=why):
        fewer.apply(model, Random(KeepRatio(0.5), (0,), site=Site.AFTER_BLOCK))
    same_snapshot(before, snapshot(model), name)


def test_the_users_weights_are_never_run() -> None:
    """A model without weights is found and tried as one with them."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=99))
    assert trusted(model.eval()) == {*INSIDE, Site.KV_CACHE}


# -- deep stacks -------------------------------------------------------------------------------------------------------
def deep(**more: Any) -> nn.Module:
    kinds = ["sliding_attention"] * 11 + ["full_attention"]
    config = transformers.Gemma3TextConfig(num_hidden_layers=12, layer_types=kinds, sliding_window=64, **more)
    return build(transformers.Gemma3ForCausalLM, shrink(config))


def test_a_few_blocks_of_each_kind_stand_for_a_deep_stack():
    host = find(deep())
    twin, found = shallow(host.root, host.found)
    assert len(host.layers) == 12
    assert len(found.layers) == len(twin.layers) == SHALLOW
    assert twin.config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert trusted(deep()) == INSIDE | {Site.KV_CACHE}


def test_a_deep_stack_is_tried_whole_where_few_blocks_are_others(monkeypatch):
    """As where what a block is follows from how many there are."""
    where: Any = __import__("importlib").import_module("fewer.hosts.discovery")
    host = find(deep())

    def otherwise(root: nn.Module, paths: Any) -> Any:
        seen = observe(root, paths)
        return replace(seen, layers=(*seen.layers[:-1], replace(seen.layers[-1], bare=not seen.layers[-1].bare)))

    monkeypatch.setattr(where, "observe", otherwise)
    twin, found = shallow(host.root, host.found)
    assert found is host.found
    assert len(twin.layers) == 12


def test_a_verdict_on_few_blocks_is_the_verdict_on_all(monkeypatch):
    where: Any = __import__("importlib").import_module("fewer.hosts.discovery")
    host = find(deep())
    few = verify._tried(host)
    monkeypatch.setattr(where, "SHALLOW", 100)
    assert verify._tried(host) == few
