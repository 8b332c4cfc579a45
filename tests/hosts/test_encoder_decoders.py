"""Encoders of encoder-decoder models: what is left of their rows is what the decoder's cross-attention reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.modeling_outputs import BaseModelOutput

import fewer
from fewer.core import KeepRatio, Site
from fewer.hosts import HostError
from fewer.hosts.twin import build, example, shrink
from fewer.methods.vision.random import Random
from fewer.testing.checks import same_snapshot, snapshot

CLASSES = ("T5ForConditionalGeneration", "BartForConditionalGeneration", "WhisperForConditionalGeneration")
LAST = Random(KeepRatio(0.5, of="start"), (1,), site=Site.AFTER_BLOCK)
GREEDY: dict[str, Any] = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)


def model_of(name: str) -> nn.Module:
    cls: Any = getattr(transformers, name)
    return build(cls, shrink(cls.config_class(), depth=2))


def given_to(model: nn.Module) -> dict[str, Tensor]:
    given = dict(example(model, batch=2, length=11))
    if "attention_mask" in given:
        given["attention_mask"] = given["attention_mask"].clone()
        given["attention_mask"][0, -4:] = 0
    return given


def by_hand(model: Any, given: dict[str, Tensor], kept: Tensor) -> dict[str, Any]:
    """The arguments of a plain model that is given the rows that stay."""
    inputs = {k: v for k, v in given.items() if not k.startswith("decoder")}
    rows = model.get_encoder()(**inputs).last_hidden_state
    rows = rows.gather(1, kept.clamp(min=0)[..., None].expand(-1, -1, rows.shape[-1]))
    mask = given.get("attention_mask")
    mask = torch.ones_like(kept) if mask is None else mask.gather(1, kept.clamp(min=0))
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=rows), "attention_mask": mask * (kept >= 0)}


@pytest.mark.parametrize("name", CLASSES)
def test_the_decoder_reads_the_rows_that_stay(name: str) -> None:
    model = model_of(name)
    given, before = given_to(model), snapshot(model)
    with torch.no_grad():
        plain = model(**given).logits
        with fewer.apply(model, Random(KeepRatio(1.0), (0, 1))):
            assert torch.equal(model(**given).logits, plain)
        with fewer.apply(model, LAST) as session:
            got, kept = model(**given), session.kept(1)
            assert got.encoder_last_hidden_state.shape[1] == kept.shape[1] < session.last.first.n
        hand = by_hand(model, given, kept)
        words = {"decoder_input_ids": given["decoder_input_ids"]}
        if name.startswith("Whisper"):
            hand.pop("attention_mask")
        assert_close(got.logits, model(**hand, **words).logits, atol=1e-5, rtol=1e-4)
        assert torch.equal(model(**given).logits, plain)
    same_snapshot(before, snapshot(model), name)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", CLASSES)
def test_writing_with_fewer_rows_and_a_smaller_cross_attention_cache(name: str, beams: int) -> None:
    model: Any = model_of(name)
    given = {k: v for k, v in given_to(model).items() if not k.startswith("decoder")}
    model.generation_config.decoder_start_token_id = 1
    more = GREEDY | {"num_beams": beams, "return_dict_in_generate": True}
    with torch.no_grad():
        with fewer.apply(model, LAST) as session:
            got, kept = model.generate(**given, **more), session.kept(1)
        hand = by_hand(model, given, kept)
        if name.startswith("Whisper"):
            hand.pop("attention_mask")
        want = model.generate(**hand, **more)
    assert torch.equal(got.sequences, want.sequences)


def test_a_bias_that_the_first_block_makes_is_made_of_all_tokens() -> None:
    model = model_of("T5ForConditionalGeneration")
    with pytest.raises(HostError, match=r"acts before block 0 of T5Stack.*layers=1\+"):
        fewer.apply(model, Random(KeepRatio(0.5), (0,), site=Site.BEFORE_BLOCK))
