"""Twins: small random models that keep the structure of the config they are made from."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers as tf
from torch import nn

from fewer.hosts import twin
from fewer.hosts.twin import TwinError, build, example, shrink


def run(cls, config, length=12, **kwargs):
    model = build(cls, config)
    with torch.no_grad():
        return model(**example(model, length=length), **kwargs)


def test_the_config_given_is_left_alone_and_nested_ones_are_copied():
    config = tf.LlavaConfig(text_config=tf.LlamaConfig().to_dict(), vision_config=tf.CLIPVisionConfig().to_dict())
    before = copy.deepcopy(config.to_dict())
    small = shrink(config, depth=2)
    assert config.to_dict() == before
    assert small.text_config is not config.text_config
    assert small.text_config.hidden_size < 512 > small.vision_config.hidden_size


def test_what_decides_behaviour_stays():
    config = tf.Gemma2Config(sliding_window=4096, query_pre_attn_scalar=224)
    small = shrink(config)
    for name in (
        "num_hidden_layers", "head_dim", "layer_types", "attn_logit_softcapping", "final_logit_softcapping",
        "query_pre_attn_scalar", "hidden_activation", "attention_dropout", "rms_norm_eps", "tie_word_embeddings",
        "rope_parameters", "max_position_embeddings",
    ):  # fmt: skip
        assert getattr(small, name) == getattr(config, name), name
    assert small.sliding_window == twin.WINDOW < 24
    assert shrink(tf.MistralConfig(sliding_window=None)).sliding_window is None


@pytest.mark.parametrize(
    ("heads", "shared", "small"), [(32, 32, (2, 2)), (32, 8, (4, 2)), (32, 1, (2, 1)), (1, 1, (1, 1))]
)
def test_the_kind_of_attention_stays(heads, shared, small):
    config = shrink(tf.LlamaConfig(hidden_size=4096, num_attention_heads=heads, num_key_value_heads=shared))
    assert (config.num_attention_heads, config.num_key_value_heads) == small


def test_head_widths_stay_where_they_follow_from_the_width():
    small = shrink(tf.ViTConfig())
    assert small.hidden_size // small.num_attention_heads == 768 // 12
    assert small.intermediate_size == 4 * small.hidden_size
    assert small.image_size == 4 * small.patch_size


def test_special_tokens_find_places_of_their_own():
    text = tf.LlamaConfig(vocab_size=50_000, pad_token_id=0, bos_token_id=49_000, eos_token_id=[2, 49_001])
    config = tf.LlavaConfig(text_config=text.to_dict(), image_token_id=49_500)
    small = shrink(config)
    tokens = [small.text_config.pad_token_id, small.text_config.bos_token_id, *small.text_config.eos_token_id]
    tokens.append(small.image_token_id)
    assert len(set(tokens)) == len(tokens)
    assert max(tokens) < small.text_config.vocab_size <= 128
    assert tokens[0] == 0
    assert tokens[2] == 2
    assert shrink(tf.LlamaConfig(pad_token_id=None)).pad_token_id is None


def test_every_kind_of_layer_is_left_at_small_depth():
    gemma = shrink(tf.Gemma3TextConfig(num_hidden_layers=26), depth=2)
    assert set(gemma.layer_types) == {"sliding_attention", "full_attention"}
    assert gemma.num_hidden_layers == len(gemma.layer_types) == 2

    deepseek = build(tf.DeepseekV3ForCausalLM, shrink(tf.DeepseekV3Config(), depth=2))
    assert len({type(layer.mlp) for layer in deepseek.model.layers}) == 2

    jamba = build(tf.JambaForCausalLM, shrink(tf.JambaConfig(), depth=2))
    assert {type(layer).__name__ for layer in jamba.model.layers} == {
        "JambaMambaDecoderLayer",
        "JambaAttentionDecoderLayer",
    }
    assert len({type(layer.feed_forward) for layer in jamba.model.layers}) == 2

    bart = shrink(tf.BartConfig(encoder_layers=12, decoder_layers=6), depth=3)
    assert (bart.encoder_layers, bart.decoder_layers) == (3, 3)


def test_lists_by_layer_are_cut_together():
    moe = shrink(tf.Qwen3MoeConfig(num_hidden_layers=24, mlp_only_layers=[0, 5]), depth=3)
    assert moe.num_hidden_layers == 3
    assert moe.mlp_only_layers == [0]
    llama = shrink(tf.Llama4TextConfig(), depth=2)
    assert len(llama.layer_types) == len(llama.no_rope_layers) == llama.num_hidden_layers
    assert set(llama.no_rope_layers) == {0, 1}


def test_random_state_dtype_and_warnings_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    level = tf.utils.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.set_default_dtype(torch.float64)
        try:
            model = build(tf.LlamaForCausalLM, shrink(tf.LlamaConfig(dtype="bfloat16"), depth=2))
            assert torch.get_default_dtype() == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
    example(model)
    assert torch.equal(torch.rand(4), expected)
    assert tf.utils.logging.get_verbosity() == level
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


def test_a_seed_says_which_twin():
    small = shrink(tf.BertConfig(), depth=1)
    one, same, other = (build(tf.BertForMaskedLM, small, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(one[name], other[name])


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (tf.LlamaForCausalLM, tf.LlamaConfig()),
        (tf.GPT2LMHeadModel, tf.GPT2Config()),
        (tf.BertForMaskedLM, tf.BertConfig()),
        (tf.ViTForImageClassification, tf.ViTConfig()),
        (tf.Dinov2WithRegistersForImageClassification, tf.Dinov2WithRegistersConfig()),
        (tf.Wav2Vec2ForCTC, tf.Wav2Vec2Config()),
    ],
)
def test_a_twin_of_full_depth_is_lively(cls, config):
    """Nothing is constant, nothing explodes, and after all layers the tokens of a row and the rows still differ."""
    model = build(cls, shrink(config))
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 1 or float(parameter.detach().std()) > 0, name
        assert float(parameter.detach().abs().max()) > 0, name
    with torch.no_grad():
        states = model(**example(model, length=24), output_hidden_states=True).hidden_states
    assert len(states) == config.num_hidden_layers + 1
    last = states[-1]  # (B, N, d)
    assert 0.1 < float(last.std()) < 20
    assert float((last - last.mean(1, keepdim=True)).std()) > 0.2 * float(last.std())
    assert float((last[0] - last[1]).std()) > 0.2 * float(last.std())


def test_attention_is_not_flat():
    model = build(tf.LlamaForCausalLM, shrink(tf.LlamaConfig()))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**example(model, length=24), output_attentions=True).attentions  # of each layer (B, H, N, N)
    for attention in maps:
        assert 0.15 < float(attention[:, :, -1].amax(-1).mean()) < 0.99


@pytest.mark.parametrize(
    ("cls", "config", "shape"),
    [
        (tf.T5ForConditionalGeneration, tf.T5Config(), (2, 12, 112)),
        (tf.WhisperForConditionalGeneration, tf.WhisperConfig(), (2, 12, 112)),
        (tf.Wav2Vec2ForCTC, tf.Wav2Vec2Config(), (2, 12, 32)),
        (tf.ASTForAudioClassification, tf.ASTConfig(), (2, 2)),
        (tf.SwinForImageClassification, tf.SwinConfig(), (2, 2)),
        (tf.VideoMAEForVideoClassification, tf.VideoMAEConfig(), (2, 2)),
        (tf.LayoutLMForMaskedLM, tf.LayoutLMConfig(), (2, 12, 112)),
        (tf.Mamba2ForCausalLM, tf.Mamba2Config(), (2, 12, 112)),
    ],
)
def test_each_gets_what_it_takes(cls, config, shape):
    assert run(cls, shrink(config, depth=2)).logits.shape == shape


def test_an_example_has_no_special_tokens_and_rows_that_differ():
    model = build(tf.MistralForCausalLM, shrink(tf.MistralConfig(), depth=1))
    words = example(model, batch=3, length=40)["input_ids"]
    assert not set(words.flatten().tolist()) & {model.config.bos_token_id, model.config.eos_token_id}
    assert not torch.equal(words[0], words[1])
    assert torch.equal(words, example(model, batch=3, length=40)["input_ids"])


def test_a_class_that_cannot_be_built_is_named():
    class Stubborn(tf.LlamaForCausalLM):
        def __init__(self, config):
            raise KeyError("no such part")

    with pytest.raises(TwinError, match=r"Stubborn.*LlamaConfig.*KeyError.*no such part"):
        build(Stubborn, shrink(tf.LlamaConfig(), depth=1))


def test_a_class_of_ones_own_is_built_by_itself():
    class Mine(tf.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.gate = nn.Parameter(torch.zeros(config.hidden_size))

    model = build(Mine, shrink(tf.LlamaConfig(), depth=1))
    assert type(model) is Mine
    assert float(model.gate.detach().abs().min()) > 0
