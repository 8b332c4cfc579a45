"""Encoders of encoder-decoder models: what is left of their rows is what the decoder's cross-attention reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.modeling_outputs import BaseModelOutput

import fewer
from fewer.core import KeepRatio, Signals, Site, Tokens
from fewer.core.tokens import Group
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


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "UMT5ForConditionalGeneration"])
@pytest.mark.parametrize("site", [Site.BEFORE_BLOCK, Site.AFTER_BLOCK])
def test_a_bias_that_blocks_make_themselves_is_made_of_all_tokens(name: str, site: Site) -> None:
    """T5's first block makes it for all, each of UMT5's for itself, of the number of rows they are given."""
    model: Any = model_of(name)
    given = given_to(model)
    inputs = {k: v for k, v in given.items() if not k.startswith("decoder")}
    with torch.no_grad():
        with fewer.apply(model, Random(KeepRatio(0.5, of="start"), (0,), site=site)) as session:
            got, kept = model(**given).encoder_last_hidden_state, session.kept(1)
        assert got.shape[1] == kept.shape[1] < session.last.first.n
        n = session.last.first.n
        stays = torch.zeros(len(kept), n + 1).scatter(1, torch.where(kept < 0, n, kept), 1)[:, :n]
        if site is Site.BEFORE_BLOCK:
            want = model.get_encoder()(**inputs | {"attention_mask": given["attention_mask"] * stays})[0]
        else:
            want = last_alone(model.get_encoder(), inputs, given["attention_mask"] * stays)
    want = want.gather(1, kept.clamp(min=0)[..., None].expand(-1, -1, want.shape[-1]))
    real = (kept >= 0)[..., None]
    assert_close(got * real, want * real, atol=1e-5, rtol=1e-4)


def last_alone(encoder: Any, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
    """An encoder whose last block alone has another mask."""
    own = encoder.block[-1].forward

    def masked(hidden: Tensor, old: Any = None, *args: Any, **kwargs: Any) -> Any:
        return own(hidden, torch.where(mask[:, None, None] > 0, 0.0, torch.finfo(hidden.dtype).min), *args, **kwargs)

    encoder.block[-1].forward = masked
    try:
        return encoder(**inputs)[0]
    finally:
        del encoder.block[-1].forward


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "UMT5ForConditionalGeneration"])
def test_attention_that_is_looked_at_has_the_position_bias(name: str) -> None:
    """What methods rank by is what the model computes."""
    model: Any = model_of(name)
    model.set_attn_implementation("eager")
    given, rows = given_to(model), {}

    @dataclass(frozen=True)
    class Looking(Random):
        def plan(self, signals: Signals, tokens: Tokens) -> Any:
            rows[signals.at.layer] = signals.attention_rows(Group(1, 4))
            return super().plan(signals, tokens)

    with torch.no_grad(), fewer.apply(model, Looking(KeepRatio(0.7), (0, 1), site=Site.AFTER_BLOCK)):
        maps = model(**given, output_attentions=True).encoder_attentions
    for layer, own in enumerate(maps):
        assert_close(rows[layer], own[:, :, 1:4], atol=1e-5, rtol=1e-4)
