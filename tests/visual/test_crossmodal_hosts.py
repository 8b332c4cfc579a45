"""BLIP's towers and ViLT as hosts: nothing else than the reduction, masks and modalities, and a clean exit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fewer
from fewer.core import KeepRatio, Place
from fewer.hosts import HostError, find
from fewer.methods.multimodal.turbo_cross import TurboCross
from fewer.runtime.program import SessionError
from fewer.testing.checks import same_snapshot, snapshot
from fewer.testing.models import images, run, texts, tiny_vit

CLOSE: dict[str, Any] = dict(atol=1e-5, rtol=1e-4)
SIZE: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)


def loud(model: nn.Module) -> nn.Module:
    """Weights large enough that attention is not flat."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return model.eval()


def blip(kind: str = "BlipForImageTextRetrieval") -> Any:
    import transformers

    text = SIZE | dict(vocab_size=50, max_position_embeddings=32, encoder_hidden_size=32, bos_token_id=1,
                       eos_token_id=2, sep_token_id=2, pad_token_id=0)  # fmt: skip
    vision = SIZE | dict(image_size=32, patch_size=8)
    config = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16)
    return loud(getattr(transformers, kind)(config))


def vilt(kind: str, **more: Any) -> Any:
    import transformers

    size = dict(vocab_size=50, max_position_embeddings=32, image_size=32, patch_size=8, num_labels=5)
    config = transformers.ViltConfig(**SIZE | size | more)
    return loud(getattr(transformers, kind)(config))


def prompt(lengths: tuple[int, ...] = (7, 7), width: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def asked(model: nn.Module, **given: Any) -> Any:
    """A pass without gradient; ViLT lays its patches out at random, alike in each."""
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**given)


# -- BLIP's vision tower -----------------------------------------------------------------------------------------------
def test_blip_answers_about_images_with_fewer_tokens() -> None:
    model = blip()
    given = prompt() | {"pixel_values": images()}
    plain = asked(model, **given)
    before = snapshot(model)
    with fewer.apply(model, "tome:r=0") as s:
        assert torch.equal(asked(model, **given).itm_score, plain.itm_score)
        assert s.counts == [17, 17, 17]
    with fewer.apply(model, "tome:r=3") as s:
        out = asked(model, **given)
        assert s.counts == [14, 11, 8]
        assert out.last_hidden_state.shape == (2, 8, 32)
        assert s.restore(out.last_hidden_state).shape == (2, 4, 4, 32)
        assert not torch.equal(out.itm_score, plain.itm_score)
        assert s.ledger.gflops_model < s.ledger.gflops_full
    same_snapshot(before, snapshot(model), "tome on BLIP")
    assert torch.equal(asked(model, **given).itm_score, plain.itm_score)


def test_blip_writes_captions_with_fewer_tokens() -> None:
    model = blip("BlipForConditionalGeneration")
    with fewer.apply(model, "turbo:r=3") as s, torch.no_grad():
        written = model.generate(pixel_values=images(), max_new_tokens=4, min_new_tokens=4)
        assert s.counts == [14, 11, 8]
        assert written.shape[0] == 2


@pytest.mark.parametrize("kind", ["blip", "vilt"])
def test_the_models_own_hooks_and_checkpointing_go_on(kind: str) -> None:
    """Hooks on attention modules fire, gradient checkpointing gives the same gradients."""
    model: Any = tiny_vit(kind, depth=3)
    given = {"pixel_values": images()} if kind == "blip" else _embedded(2)
    heard: list[int] = []
    path = "encoder.layers.1.self_attn" if kind == "blip" else "encoder.layer.1.attention.attention"
    with fewer.apply(model, "tome:r=2"):
        handle = model.get_submodule(path).register_forward_hook(lambda m, a, out: heard.append(out[0].shape[1]))
        asked(model, **given)
        handle.remove()
        assert heard == [15 if kind == "blip" else 16]
        model.train()
        grads = []
        for on in (False, True):
            if on:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.zero_grad()
            model(**given).pooler_output.square().sum().backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert bool(grads[0].any())
        assert_close(grads[1], grads[0], **CLOSE)


def _embedded(batch: int) -> dict[str, Tensor]:
    return {
        "inputs_embeds": texts(batch, 7), "image_embeds": texts(batch, 11, seed=1), "pixel_mask": torch.ones(batch, 11)
    }  # fmt: skip


# -- ViLT --------------------------------------------------------------------------------------------------------------
def test_vilt_knows_words_from_patches() -> None:
    model = vilt("ViltForQuestionAnswering")
    given = prompt((7, 5)) | {"pixel_values": images()}
    plain = asked(model, **given).logits
    before = snapshot(model)
    with fewer.apply(model, "evit:keep=1.0,layers=0") as s:
        assert torch.equal(asked(model, **given).logits, plain)
        first = s.last.first
        assert first.modality is not None
        assert first.modality.tolist() == [[0] * 7 + [1] * 17] * 2
        assert first.images == 17
        assert first.valid is not None
        assert first.valid.sum(1).tolist() == [24, 22]
        assert not bool(first.valid[1, 5:7].any())
        assert first.guarded is not None
        assert first.guarded[0].nonzero().flatten().tolist() == [7]
        assert first.prefix == 1
        assert first.free_count == 24 - 2
    same_snapshot(before, snapshot(model), "evit on ViLT")


@pytest.mark.parametrize("method", ["tome:r=3", "evit:keep=0.6,layers=0+1", "ats:keep=0.6,layers=0+1"])
def test_vilt_padding_decides_nothing(method: str) -> None:
    model = tiny_vit("vilt", depth=3)
    given = _embedded(2)
    given["attention_mask"] = prompt((7, 4))["attention_mask"]
    given["pixel_mask"][1, 8:] = 0
    with fewer.apply(model, method):
        together = asked(model, **given).pooler_output
        one = {"inputs_embeds": given["inputs_embeds"][1:, :4], "image_embeds": given["image_embeds"][1:, :8],
               "pixel_mask": torch.ones(1, 8)}  # fmt: skip
        assert_close(asked(model, **one).pooler_output, together[1:], **CLOSE)


def test_vilt_answers_for_each_word_and_for_two_images() -> None:
    given = prompt() | {"pixel_values": images()}
    words = vilt("ViltForMaskedLM")
    with fewer.apply(words, "pumer:layers=0+1") as s:
        assert asked(words, **given).logits.shape == (2, 7, 50)
        assert s.counts[-1] < 24
    pair = vilt("ViltForImagesAndTextClassification", num_images=2, modality_type_vocab_size=3)
    given["pixel_values"] = torch.stack([images(), images(seed=2)], 1)
    plain = asked(pair, **given).logits
    with fewer.apply(pair, "pumer:layers=0+1") as s:
        assert not torch.equal(asked(pair, **given).logits, plain)
        assert s.counts[-1] < 24
    with fewer.apply(pair, "pumer:keep=1.0,layers=0"):
        assert torch.equal(asked(pair, **given).logits, plain)


def test_vilt_shows_no_attention_maps_but_runs() -> None:
    model = tiny_vit("vilt", depth=3)
    with fewer.apply(model, "tome:r=2"):
        out = asked(model, **_embedded(2), output_attentions=True, output_hidden_states=True)
    assert out.attentions == (None,) * 3
    assert [h.shape[1] for h in out.hidden_states] == [18, 16, 14, 18]


def test_hosts_say_what_they_are() -> None:
    model = vilt("ViltForQuestionAnswering")
    host = find(model)
    assert host.path == "vilt"
    assert host.patches == 31 + 16
    assert host.heads == 4
    assert find(blip()).path == "vision_model"
    assert find(blip()).patches == 16
    with fewer.apply(model, "tome:r=1"), pytest.raises(SessionError, match="already has a session"):
        fewer.apply(model, "tome:r=1")


# -- BLIP's cross-attention --------------------------------------------------------------------------------------------
def test_shares_of_cross_attention_are_the_papers() -> None:
    budget = TurboCross().budget
    counts = [budget.keep(577, Place(stage=i, stages=12, start=577)) for i in range(13)]
    assert counts == [max(int(577 * (1 - 0.8)), int((1 - 0.07 * (i + 1)) * 577)) for i in range(12)] + [115]
    assert TurboCross().acts_at(12) == tuple(range(11))


def reference(model: Any, given: dict[str, Tensor], shares: tuple[float, ...], by: str = "words") -> Tensor:
    """The text encoder run layer by layer on images cut by hand, one sample at a time without its padding."""
    scores = []
    for b, mask in enumerate(given["attention_mask"]):
        with torch.no_grad():
            seen = model.vision_model(given["pixel_values"][b : b + 1]).last_hidden_state
            full = seen.shape[1]
            x = model.text_encoder.embeddings(given["input_ids"][b : b + 1, : int(mask.sum())])
            for layer, share in zip(model.text_encoder.encoder.layer, shares, strict=True):
                y = layer.attention(x)[0]
                paid = layer.crossattention(y, encoder_hidden_states=seen)[1].sum(1)[0]
                x = layer(x, seen)
                score = paid[0] if by == "cls" else paid.sum(0)
                kept = score.topk(int(full * share)).indices.sort().values
                seen = seen[:, kept]
            scores.append(model.itm_head(x[:, 0]))
    return torch.cat(scores)


@pytest.mark.parametrize("by", ["words", "cls"])
def test_cross_attention_sees_fewer_image_tokens_layer_by_layer(by: str) -> None:
    """Against layers run one by one on images cut by hand; a padded text is what it is alone."""
    model = blip()
    given = prompt((7, 4)) | {"pixel_values": images()}
    method = TurboCross(KeepRatio((0.6, 0.3), of="start", rounding="trunc"), by=by)  # type: ignore[arg-type]
    wanted = reference(model, given, (0.6, 0.3, 0.3), by)
    plain = asked(model, **given).itm_score
    assert_close(plain, reference(model, given, (1, 1, 1)), **CLOSE)
    before = snapshot(model)
    with fewer.apply(model.text_encoder, method) as s:
        assert_close(asked(model, **given).itm_score, wanted, **CLOSE)
        assert s.counts == [10, 5, 5]
        assert s.kept(2).shape == (2, 5)
        assert s.ledger.gflops_model < s.ledger.gflops_full
        assert_close(asked(model, **given, use_itm_head=False).itm_score.shape, (2, 2))  # a text without an image
        with fewer.apply(model, "tome:r=3") as tower:
            asked(model, **given)
            assert tower.counts == [14, 11, 8]
            assert s.counts == [4, 2, 2]
    with fewer.apply(model.text_encoder, "turbo_cross:keep=1.0"):
        assert torch.equal(asked(model, **given).itm_score, plain)
    same_snapshot(before, snapshot(model), "turbo_cross")
    assert not torch.allclose(wanted, plain)


def test_cross_attention_on_masks_gives_the_same() -> None:
    model = blip()
    given = prompt((7, 4)) | {"pixel_values": images()}
    method = TurboCross(KeepRatio((0.6, 0.3), of="start"))
    answers = []
    for execution in ("padded", "masked"):
        with fewer.apply(model.text_encoder, method, execution=execution):  # type: ignore[arg-type]
            answers.append(asked(model, **given).itm_score)
    assert_close(*answers, **CLOSE)


def test_what_cross_attention_refuses() -> None:
    from transformers import BlipTextConfig, BlipTextModel

    with pytest.raises(HostError, match="no cross-attention"):
        find(BlipTextModel(BlipTextConfig(**SIZE, vocab_size=50, is_decoder=False)))
    model = blip("BlipForConditionalGeneration")
    with fewer.apply(model.text_decoder, "turbo_cross:keep=0.5"):
        with pytest.raises(HostError, match="use_cache=False"):
            model.generate(pixel_values=images(), max_new_tokens=3)
        written = model.generate(pixel_values=images(), max_new_tokens=3, min_new_tokens=3, use_cache=False)
        assert written.shape[0] == 2
    with pytest.raises(ValueError, match="by='heads'"):
        fewer.parse("turbo_cross:by=heads")
    model = blip()
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with fewer.apply(model.text_encoder, "turbo_cross:keep=0.5"), pytest.raises(HostError, match="checkpointing"):
        model(**prompt(), pixel_values=images())


def test_run_helper_reads_the_pooled_features() -> None:
    assert run(tiny_vit("blip", depth=2), images()).shape == (2, 32)


def test_cross_attention_methods_are_refused_where_there_is_none():
    from fewer.runtime.program import SessionError
    from fewer.testing.vision_language import tiny_vlm

    with pytest.raises(SessionError, match="looks at itself"):
        fewer.apply(tiny_vlm("llava"), "turbo_cross")
