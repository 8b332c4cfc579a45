"""Vision-language models: layouts, exactness of dropping before and inside the language model, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

import fewer
from fewer import hosts
from fewer.adapters.clip_guide import Guide
from fewer.compat import cache_of, cached
from fewer.core import Plan, Signals, Tokens
from fewer.core import rope as rotary
from fewer.core.learned import Learned
from fewer.hosts import LayoutError
from fewer.methods.multimodal.fastv import FastV
from fewer.runtime.program import SessionError
from fewer.testing.vision_language import IMAGE, MODELS, alone, prompts, tiny_vlm

torch.set_num_threads(1)
VIDEOS = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CASES = [(name, False) for name in MODELS] + [(name, True) for name in VIDEOS]
cases = pytest.mark.parametrize(("name", "video"), CASES, ids=[f"{n}-video" if v else n for n, v in CASES])
GREEDY: dict[str, Any] = {"do_sample": False, "suppress_tokens": [0, 2, *range(55, 64)]}  # no placeholders, no end
FEW = "random:site=bridge,tokens=3"


def capture(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the language model is given."""
    host = hosts.find(model)
    held: dict[str, Any] = {}
    hook = host.root.register_forward_pre_hook(lambda m, args, kwargs: held.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return held


@cases
def test_keeping_all_is_the_identity_to_the_bit(name: str, video: bool) -> None:
    model = tiny_vlm(name)
    inputs = prompts(model, [1, 2], video=video)
    plain = model(**inputs).logits
    for method in ("random:site=bridge,keep=1.0", "fastv:keep=1.0"):
        with fewer.apply(model, method):
            assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model(**inputs).logits, plain)


@cases
def test_a_shorter_prompt_is_what_the_language_model_reads(name: str, video: bool) -> None:
    """The oracle: the language model alone on the rows that stayed, with their own position ids and deep features."""
    model = tiny_vlm(name)
    inputs = prompts(model, [2], video=video)
    given = capture(model, inputs)
    with fewer.apply(model, FEW) as session, torch.no_grad():
        whole = model(**inputs, output_hidden_states=False)
        kept, seen = session.kept(0)[0, 0], session.seen()
        assert session.layout.visual.sum() - seen.sum() == sum(session.layout.counts) - 6
        text = (~session.layout.visual)[0].nonzero()[:, 0]
        assert set(text.tolist()) <= set(kept.tolist())
    embeds: Tensor = given["inputs_embeds"][:, kept]
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(given["inputs_embeds"].shape[1])[None]
    more: dict[str, Any] = {}
    if given.get("deepstack_visual_embeds") is not None:
        mask = given["visual_pos_masks"]
        rank = mask[0].cumsum(0) - 1
        stays = kept[mask[0, kept]]
        more = {
            "visual_pos_masks": mask[:, kept],
            "deepstack_visual_embeds": [deep[rank[stays]] for deep in given["deepstack_visual_embeds"]],
        }
    with torch.no_grad():
        short = hosts.find(model).root(inputs_embeds=embeds, position_ids=positions[..., kept], **more)
        logits = model.lm_head(short.last_hidden_state)
    torch.testing.assert_close(whole.logits[:, kept], logits, atol=2e-5, rtol=2e-5)


@cases
@pytest.mark.parametrize("method", [FEW, "fastv:keep=0.4"])
def test_dropped_rows_and_masked_rows_give_the_same(name: str, video: bool, method: str) -> None:
    model = tiny_vlm(name)
    inputs = prompts(model, [1, 2], video=video)
    with fewer.apply(model, method) as session, torch.no_grad():
        dropped, seen = model(**inputs, use_cache=False).logits, session.seen()
        real = inputs["attention_mask"].bool() & (~session.layout.visual | seen)
    with fewer.apply(model, method, execution="masked") as session, torch.no_grad():
        masked = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(dropped[real], masked[real], atol=2e-5, rtol=2e-5)


@cases
def test_a_batch_changes_nothing(name: str, video: bool) -> None:
    """Prompts of different lengths, one without a picture, give the same tokens as one by one; so does the cache."""
    model = tiny_vlm(name)
    batch = prompts(model, [1, 0, 2], video=video)
    single = [alone(model, [1, 0, 2], i, video=video) for i in range(3)]
    for method in (FEW, "fastv:keep=0.4"):
        with fewer.apply(model, method):
            together = model.generate(**batch, max_new_tokens=5, **GREEDY)[:, -5:]
            for row, inputs in zip(together, single, strict=True):
                own = model.generate(**inputs, max_new_tokens=5, **GREEDY)[0, -5:]
                assert torch.equal(own, row)


@cases
def test_cached_and_uncached_generation_agree(name: str, video: bool) -> None:
    if video and name == "qwen3_vl":
        pytest.skip("the model itself cannot generate from a video without a cache")
    model = tiny_vlm(name)
    inputs = prompts(model, [2], video=video)
    with fewer.apply(model, FEW):
        cached = model.generate(**inputs, max_new_tokens=4, **GREEDY)
        step = dict(inputs)
        for _ in range(4):
            ids = step["input_ids"]
            logits = model(**step, use_cache=False).logits[:, -1]
            logits[:, GREEDY["suppress_tokens"]] = float("-inf")
            token = logits.argmax(-1, keepdim=True)
            step["input_ids"] = torch.cat([ids, token], 1)
            step["attention_mask"] = torch.ones_like(step["input_ids"])
            if "mm_token_type_ids" in step:
                kinds = step["mm_token_type_ids"]
                step["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(1, 1)], 1)
    assert torch.equal(cached, step["input_ids"])


@pytest.mark.parametrize("name", ["llava", "llava_next", "smolvlm", "internvl"])
def test_compact_positions_are_those_of_a_shorter_prompt(name: str) -> None:
    model = tiny_vlm(name)
    inputs = prompts(model, [2])
    given = capture(model, inputs)
    with fewer.apply(model, FEW, positions="compact") as session, torch.no_grad():
        whole, kept = model(**inputs).logits, session.kept(0)[0, 0]
    with torch.no_grad():
        short = hosts.find(model).root(inputs_embeds=given["inputs_embeds"][:, kept])
    torch.testing.assert_close(whole[:, kept], model.lm_head(short.last_hidden_state), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("method", [FEW, "vtw:k=2"])
def test_compact_positions_go_on_behind_the_prompt(method: str) -> None:
    """Cached and uncached generation agree, alone and in a batch, and so does a second turn."""
    model = tiny_vlm("llava")
    batch = prompts(model, [1, 0, 2])
    with fewer.apply(model, method, positions="compact"):
        together = model.generate(**batch, max_new_tokens=5, **GREEDY)[:, -5:]
        for i, row in enumerate(together):
            inputs = alone(model, [1, 0, 2], i)
            own = model.generate(**inputs, max_new_tokens=5, **GREEDY)[0, -5:]
            assert torch.equal(own, row)
            step = dict(inputs)
            for token in own:
                logits = model(**step, use_cache=False).logits[:, -1]
                logits[:, GREEDY["suppress_tokens"]] = float("-inf")
                assert int(logits.argmax(-1)) == int(token)
                step["input_ids"] = torch.cat([step["input_ids"], token.view(1, 1)], 1)
                step["attention_mask"] = torch.ones_like(step["input_ids"])
        inputs = alone(model, [1, 0, 2], 0)
        first = model(**inputs, use_cache=True)
        more = torch.tensor([[7, 8, 9]])
        turned = model(input_ids=more, **cached(model, cache_of(first))).logits[:, -1]
        at_once = model(**{**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1), "attention_mask": None})
    torch.testing.assert_close(turned, at_once.logits[:, -1], atol=2e-5, rtol=2e-5)


@dataclass(frozen=True)
class Unrotated(FastV):
    """Notes the keys of its block before rotary positions, as `tables` lets them be found."""

    budget: Any = Learned()
    layers: tuple[int, ...] | None = (1,)
    noted: list = field(default_factory=list, compare=False)

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        visual = signals.visual
        assert visual.seen is not None
        assert visual.tables is not None
        self.noted.append(rotary.unrotated(visual.seen, *visual.tables()).k)
        return Plan.identity((tokens.batch,), tokens.n, signals.device)


@pytest.mark.parametrize("positions", ["kept", "compact"])
def test_methods_are_given_the_tables_that_turned_the_rows(positions: str) -> None:
    model, method = tiny_vlm("llava"), Unrotated()
    inputs = prompts(model, [2])
    made: list[Tensor] = []
    attention = hosts.find(model).blocks[1].self_attn  # type: ignore[union-attr]
    hook = attention.k_proj.register_forward_hook(lambda module, args, output: made.append(output))
    with fewer.apply(model, [FEW, method], positions=positions), torch.no_grad():  # type: ignore[arg-type]
        model(**inputs)
    hook.remove()
    (keys,) = method.noted
    torch.testing.assert_close(keys.transpose(1, 2).flatten(2), made[0], atol=1e-4, rtol=1e-4)


def test_compact_positions_are_refused_where_rows_stand_in_space() -> None:
    with pytest.raises(hosts.HostError, match="time and space"):
        fewer.apply(tiny_vlm("qwen2_vl"), FEW, positions="compact")
    with pytest.raises(SessionError, match="positions='loose'"):
        fewer.apply(tiny_vlm("llava"), FEW, positions="loose")  # type: ignore[arg-type]


def test_the_layout_of_tiles_is_where_the_features_came_from() -> None:
    """LLaVA-NeXT: rows of the prompt are the projected rows their source names."""
    model = tiny_vlm("llava_next")
    inputs = prompts(model, [2])
    given = capture(model, inputs)
    with fewer.apply(model, "random:site=bridge,tokens=20") as session, torch.no_grad():
        model(**inputs)
        layout = session.layout
    tower = model.model.vision_tower(inputs["pixel_values"].flatten(0, 1), output_hidden_states=True)
    projected = model.model.multi_modal_projector(tower.hidden_states[-2][:, 1:]).flatten(0, 1)
    mine = layout.visual[0]
    torch.testing.assert_close(given["inputs_embeds"][0, mine], projected[layout.source[0, mine]])
    assert layout.crops.tolist() in ([[2, 1], [1, 2]], [[1, 2], [2, 1]])
    first = layout.line[0] == 0
    tile, row, column = (x[0, first] for x in (layout.tile, layout.row, layout.column))
    assert tile.bincount().tolist() == [16, 16, 16]
    assert int(row.max()) == int(column.max()) == 3


def test_video_rows_know_their_frame() -> None:
    model = tiny_vlm("qwen2_5_vl")
    inputs = prompts(model, [1], video=True)
    with fewer.apply(model, FEW) as session:
        model(**inputs)
        mine = session.layout.visual[0]
        assert session.layout.time[0, mine].tolist() == [0] * 4 + [1] * 4
        assert session.layout.row[0, mine].tolist() == [0, 0, 1, 1] * 2


def test_windowed_rows_are_projected_from_their_source() -> None:
    """Qwen2.5-VL sorts patches by window inside its tower; each row's source undoes that."""
    model = tiny_vlm("qwen2_5_vl")
    inputs = prompts(model, [2])
    given = capture(model, inputs)
    entered: list[Tensor] = []
    merger = model.model.visual.merger
    hook = merger.register_forward_hook(lambda m, args, out: entered.append(out))
    with fewer.apply(model, FEW) as session, torch.no_grad():
        model(**inputs)
        layout = session.layout
    hook.remove()
    mine = layout.visual[0]
    torch.testing.assert_close(given["inputs_embeds"][0, mine], entered[0][layout.source[0, mine]])


def test_methods_act_inside_the_tower_too() -> None:
    model = tiny_vlm("llava")
    inputs = prompts(model, [1, 2])
    plain = model(**inputs).logits
    with fewer.apply(model, "tome:r=4") as session:
        model(**inputs)
        assert session.visual_counts == [12.0] * 4  # 16 - 4 - 4 in the two blocks that are used; 1 and 2 images
        model.generate(**inputs, max_new_tokens=3)
    with fewer.apply(model, ["tome:r=4", "random:site=bridge,tokens=3"]) as session:
        model(**inputs)
        assert session.visual_counts == [4.5] * 4
    assert torch.equal(model(**inputs).logits, plain)
    with pytest.raises(SessionError, match="joins patches"):
        fewer.apply(tiny_vlm("internvl"), "tome:r=4")
    video = tiny_vlm("llava_onevision")
    with fewer.apply(video, "tome:r=4"), pytest.raises(SessionError, match="pools the frames"):
        video(**prompts(video, [1, 2], video=True))


def test_blocks_that_the_tower_lacks_are_refused() -> None:
    for method in ("tokenpacker:tokens=4,levels=9", "vscan:shallow=9"):
        with pytest.raises(SessionError, match="block 9 of the vision tower"):
            fewer.apply(tiny_vlm("llava"), method, modules="untrained")


class Features(Guide):
    """A joint space that is the tower's own."""

    def patches(self, features: Tensor) -> Tensor:
        return features


def test_a_guide_needs_one_question_for_each_prompt() -> None:
    model = tiny_vlm("llava")
    inputs = prompts(model, [1, 2])
    channels = model.config.vision_config.hidden_size  # type: ignore[union-attr]
    with fewer.apply(model, "trim:tokens=4", guide=Features(nn.Identity())) as session, torch.no_grad():
        session.ask(torch.ones(3, 1, channels))  # type: ignore[attr-defined]
        with pytest.raises(SessionError, match="3 questions were asked for 2 prompts"):
            model(**inputs)
        session.ask(torch.ones(2, 1, channels))  # type: ignore[attr-defined]
        model(**inputs)
        assert session.visual_counts == [6.0] * 4  # type: ignore[attr-defined]  # 4 of each of 1 and 2 images


def test_a_guide_reads_features_of_another_dtype() -> None:
    small: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    clip = CLIPModel(CLIPConfig(text_config={"vocab_size": 9, **small}, vision_config=small, projection_dim=4))
    assert Guide(clip).patches(torch.randn(1, 3, 8).bfloat16()).dtype == torch.float32


def test_beams_and_several_answers() -> None:
    for name in ("llava", "qwen3_vl", "internvl"):
        model = tiny_vlm(name)
        inputs = prompts(model, [1, 2])
        with fewer.apply(model, FEW):
            out = model.generate(**inputs, max_new_tokens=3, num_beams=2, num_return_sequences=2)
        assert out.shape[0] == 4


def test_caches_of_vision_language_models_shrink_as_well() -> None:
    model = tiny_vlm("qwen2_vl")
    inputs = prompts(model, [1])
    with fewer.apply(model, [FEW, "knorm:keep=0.5"]) as session:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert session.counts[0] < 12


@pytest.mark.parametrize("name", sorted(MODELS))
def test_removal_leaves_no_trace(name: str) -> None:
    model = tiny_vlm(name)
    inputs = prompts(model, [1])
    model(**inputs)  # transformers sets up what it captures at the first call
    before = {path: sorted(m.__dict__) for path, m in model.named_modules()}
    hooks = {path: (len(m._forward_pre_hooks), len(m._forward_hooks)) for path, m in model.named_modules()}
    plain, norm = model(**inputs).logits, hosts.find(model).root.norm
    with fewer.apply(model, FEW):
        model(**inputs)
    with fewer.apply(model, FEW):
        stop = norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
        with pytest.raises(KeyError, match="stop"):
            model(**inputs)
        stop.remove()
    assert {path: sorted(m.__dict__) for path, m in model.named_modules()} == before
    assert {path: (len(m._forward_pre_hooks), len(m._forward_hooks)) for path, m in model.named_modules()} == hooks
    assert torch.equal(model(**inputs).logits, plain)


def test_bad_input_is_told() -> None:
    model = tiny_vlm("llava")
    inputs = prompts(model, [1])
    with fewer.apply(model, FEW):
        encoded = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    outside = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with fewer.apply(model, FEW):
        model(**rest, mm_encoder_outputs={"image": encoded})
        with pytest.raises(LayoutError, match="encoded before this session"):
            model(**rest, mm_encoder_outputs={"image": outside})
        wrong = {**inputs, "input_ids": torch.where(inputs["input_ids"] == IMAGE, 5, inputs["input_ids"])}
        with pytest.raises(ValueError, match="do not match"):
            model(**wrong)
        model(**rest | {"input_ids": wrong["input_ids"]})  # text alone passes as it is
    with pytest.raises(hosts.HostError, match="visual tokens of a vision-language model"):
        fewer.apply(model.model.language_model, FEW)
    with fewer.apply(model, "random:site=bridge,tokens=500") as session:
        model(**inputs)  # more than there are: all stay
        assert session.visual_counts == [16.0] * 4


def test_a_static_cache_is_refused() -> None:
    from transformers import StaticCache

    from fewer.runtime.kv.state import CacheError

    model = tiny_vlm("llava")
    inputs = prompts(model, [1])
    with fewer.apply(model, FEW):
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        with pytest.raises(CacheError, match=r"StaticCache|static"):
            model(**inputs, **cached(model, cache), use_cache=True)


def test_deep_features_reach_the_rows_that_are_left() -> None:
    """Qwen3-VL adds features behind blocks 0 and 1; rows leave behind block 0. Masked rows are the oracle, and features
    that went to other rows would show."""
    model = tiny_vlm("qwen3_vl")
    inputs = prompts(model, [1, 2])
    with fewer.apply(model, "fastv:keep=0.4,k=1") as session, torch.no_grad():
        dropped = model(**inputs, use_cache=False).logits
        stays = inputs["attention_mask"].bool() & (~session.layout.visual | session.seen())
        last = session.last
        shifted = last.beside.deep_index.roll(1, 1)
    with fewer.apply(model, "fastv:keep=0.4,k=1", execution="masked"), torch.no_grad():
        masked = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(dropped[stays], masked[stays], atol=2e-5, rtol=2e-5)
    x = torch.zeros(2, inputs["input_ids"].shape[1], 32)
    place = torch.arange(x.shape[1]).expand(2, -1)
    right = last.beside.deepened(0, x, place)
    last.beside.deep_index = shifted
    assert not torch.equal(right, last.beside.deepened(0, x, place))
