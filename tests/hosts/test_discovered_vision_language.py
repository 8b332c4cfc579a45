"""Vision-language models that no table names: what is seen on their twins, and that what is seen is so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fewer
from fewer import hosts
from fewer.core.errors import SignalError
from fewer.hosts import HostError, LayoutError
from fewer.hosts.bridge import bridge
from fewer.hosts.twin import build, shrink
from fewer.hosts.twin_visual import _fewer_rows, _fitting, encodes, example
from fewer.runtime import verify_visual
from fewer.runtime.program import SessionError
from fewer.testing.vision_language import prompts, tiny_vlm

torch.set_num_threads(1)
FEW = "random:site=bridge,tokens=2"
GEMMA = {"mm_tokens_per_image": 256, "vision_config": {"image_size": 896, "patch_size": 14}}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {  # class, what its default config leaves open, place of rows
    "aya_vision": ("AyaVisionForConditionalGeneration", {}, "square"),
    "blip-2": ("Blip2ForConditionalGeneration", {"image_token_index": 50265}, ""),
    "cohere2_vision": ("Cohere2VisionForConditionalGeneration", {}, "square"),
    "fuyu": ("FuyuForCausalLM", {}, ""),
    "gemma3": ("Gemma3ForConditionalGeneration", GEMMA, "square"),
    "gemma4": ("Gemma4ForConditionalGeneration", {"vision_config": {}}, "sizes"),
    "glm4v": ("Glm4vForConditionalGeneration", {"text_config": {"rope_parameters": ROPE}}, "sizes"),
    "idefics2": ("Idefics2ForConditionalGeneration", {}, ""),
    "kimi_k25": ("Kimi_K25ForConditionalGeneration", {}, ""),
    "lfm2_vl": ("Lfm2VlForConditionalGeneration", {}, "sizes"),
    "molmo2": ("Molmo2ForConditionalGeneration", {"adapter_config": {"text_hidden_size": 4096}}, ""),
    "mistral3": ("Mistral3ForConditionalGeneration", {}, "sizes"),
    "paligemma": ("PaliGemmaForConditionalGeneration", {}, "square"),
    "video_llava": ("VideoLlavaForConditionalGeneration", {}, "square"),
    "vipllava": ("VipLlavaForConditionalGeneration", {}, "square"),
}
each = pytest.mark.parametrize("name", CASES)


def small(name: str) -> Any:
    """A model of a class as a user may have it, random and small, with two layers where the class allows it."""
    cls, said, _ = CASES[name]
    config = transformers.AutoConfig.for_model(name, **said)
    if name == "glm4v":
        config.vision_config.out_hidden_size = config.text_config.hidden_size
    reduced = shrink(config, depth=None if name == "vipllava" else 2)
    _fewer_rows(config, reduced)
    _fitting(config, reduced)
    return build(getattr(transformers, cls), reduced)


def owner(model: nn.Module) -> Any:
    return [m for m in model.modules() if encodes(m) is not None][-1]


def apply(model: Any, method: str) -> Any:
    return fewer.apply(model, method)


def given_to(model: nn.Module, even: bool = False) -> dict[str, Tensor]:
    return example(owner(model), even=even)


@each
def test_what_is_seen_of_a_class(name: str) -> None:
    host = hosts.find(small(name))
    assert isinstance(host, hosts.VisionLanguageHost)
    assert not host.bridge.why
    assert host.bridge.place == CASES[name][2]
    assert not verify_visual.why(host)
    told = dict(host.describe())
    assert told["visual rows"] == host._rows_in_words()


@each
def test_rows_leave_at_the_bridge_and_inside_and_the_cache_shrinks(name: str) -> None:
    model = small(name)
    inputs = given_to(model, even=name == "lfm2_vl")
    with torch.no_grad():
        plain = model(**inputs).logits
        with apply(model, "random:site=bridge,keep=1.0"):
            assert torch.equal(model(**inputs).logits, plain)
        with apply(model, FEW) as session:
            model(**inputs)
            assert session.visual_counts == [2.0] * len(hosts.find(model).blocks)
            assert len(session.layout.counts) == 2
        with apply(model, "divprune:tokens=2") as session:
            model(**inputs)
            assert session.visual_counts[0] == 2.0
        with apply(model, "streamingllm:keep=0.5,sinks=2,positions=original") as session:
            model(**inputs, use_cache=True)
            assert min(session.counts) < inputs["input_ids"].shape[1]
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("name", ["paligemma", "gemma4", "glm4v", "mistral3", "fuyu", "video_llava"])
def test_a_shorter_prompt_is_what_the_language_model_reads(name: str) -> None:
    """The oracle: the decoder alone on the rows that stayed, at their positions. Masks are cut by hand."""
    model = small(name)
    inputs = given_to(model, even=True)
    root, held, made = hosts.find(model).root, [], []
    before = root.register_forward_pre_hook(lambda m, a, kwargs: held.append(kwargs), with_kwargs=True, prepend=True)
    behind = root.register_forward_hook(lambda m, a, out: made.append(out[0]))
    with apply(model, FEW) as session, torch.no_grad():
        model(**inputs, use_cache=False)
        kept = session.kept(0)[:, 0]
        visual = session.layout.visual
    before.remove()
    behind.remove()
    assert kept.shape[1] == visual.shape[1] - int(visual[0].sum()) + 2
    trial = verify_visual._Trial(owner(model), hosts.find(model), inputs)  # type: ignore[arg-type]
    for sample, rows in enumerate(kept):
        alone = trial._alone(held[0], sample, rows)
        torch.testing.assert_close(made[0][sample, rows], alone, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("name", ["aya_vision", "gemma3", "gemma4", "glm4v", "mistral3", "paligemma", "lfm2_vl"])
def test_a_cell_holds_the_row_that_its_pixels_move(name: str) -> None:
    """The layout says where rows stand; pixels changed there move the row most that is said to stand there."""
    model = small(name)
    inputs = given_to(model, even=name == "lfm2_vl")
    with apply(model, FEW) as session, torch.no_grad():
        model(**inputs)
        layout = session.layout
    first = layout.line == 0
    assert layout.placed
    assert layout.row[first].unique().tolist() == list(range(int(layout.row[first].max()) + 1))
    height, width = int(layout.row[first].max()) + 1, int(layout.column[first].max()) + 1
    assert height * width == int(first.sum())
    expected = torch.arange(height * width)
    assert torch.equal(layout.row[first] * width + layout.column[first], expected)


def test_rows_without_a_place_refuse_who_goes_by_places() -> None:
    model = small("blip-2")
    inputs = given_to(model)
    with apply(model, "framefusion:keep=0.5"), pytest.raises(SignalError, match="is not known"), torch.no_grad():
        model(**inputs)


def test_a_language_model_that_masks_for_itself_has_a_padded_cache() -> None:
    """Gemma 3 gives its decoder masks of its own; which tokens are padding is known from the prompt all the same."""
    model = small("gemma3")
    inputs = given_to(model)
    with apply(model, "snapkv:keep=0.5,window=4,kernel=3") as session, torch.no_grad():
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert min(session.counts) < inputs["input_ids"].shape[1]


def test_methods_inside_a_tower_act_where_its_rows_are_projected_and_are_refused_elsewhere() -> None:
    model = small("paligemma")
    inputs = given_to(model)
    with apply(model, "tome:r=2") as session, torch.no_grad():
        model(**inputs)
    assert max(session.visual_counts) < max(session.layout.counts)
    for name, why in (("gemma3", "joins patches"), ("vipllava", "rows of one of its blocks")):
        with pytest.raises((SessionError, HostError), match=why):
            apply(small(name), "tome:r=2")


def test_merged_embeddings_leave_all_rows_and_say_so() -> None:
    model: Any = tiny_vlm("llava")
    inputs = prompts(model, [1])
    held: dict[str, Any] = {}
    hook = hosts.find(model).root.register_forward_pre_hook(lambda m, a, kw: held.update(kw), with_kwargs=True)
    model(**inputs)
    hook.remove()
    merged = {"inputs_embeds": held["inputs_embeds"], "attention_mask": inputs["attention_mask"]}
    with apply(model, "divprune:tokens=4") as session:
        with pytest.warns(UserWarning, match="inputs_embeds"):
            model(**merged)
        assert "inputs_embeds" in session.report()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**merged)  # once
            model(input_ids=torch.tensor([[1, 5, 6]]))  # text alone


def test_pictures_that_were_not_seen_are_an_error() -> None:
    """Somebody's own forward may encode pictures without the method that is watched."""
    model: Any = tiny_vlm("llava")
    inputs = prompts(model, [1])
    inner = model.model
    with apply(model, FEW):
        del inner.__dict__["get_image_features"]
        with pytest.raises(LayoutError, match="not seen"):
            model(**inputs)
        inner.__dict__["get_image_features"] = type(inner).get_image_features.__get__(inner)


def test_without_a_known_prompt_the_cache_still_shrinks() -> None:
    config = transformers.AutoConfig.for_model("blip-2")  # names no placeholder
    model: Any = build(transformers.Blip2ForConditionalGeneration, shrink(config, depth=2))
    host = hosts.find(model)
    assert isinstance(host, hosts.VisionLanguageHost)
    assert "image_token_id" in host.bridge.why
    with pytest.raises(hosts.HostError, match="names no image_token_id"):
        apply(model, "divprune:tokens=4")
    ids = torch.arange(3, 17)[None]
    with apply(model, "snapkv:keep=0.5,window=4,kernel=3") as session, torch.no_grad():
        model.language_model(input_ids=ids, use_cache=True)
        assert min(session.counts) < 14


def test_what_was_seen_is_remembered() -> None:
    first, second = (owner(small("paligemma")) for _ in range(2))
    assert bridge(first) is bridge(second)
