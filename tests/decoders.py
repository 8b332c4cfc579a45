"""Tiny random decoders of every family the cache host knows, and the slow twin of a reduced cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

VOCAB = 61
WINDOW = 12  # of sliding layers
COMMON = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.25, pad_token_id=0,
              bos_token_id=1, eos_token_id=2)  # fmt: skip


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**COMMON))


def _mistral(window: int | None = None) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**COMMON, sliding_window=window))


def _qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**COMMON))


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=8))


def _gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=WINDOW, layer_types=kinds, query_pre_attn_scalar=8)
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=256, pad_token_id=0,
                                      initializer_range=0.25, bos_token_id=1, eos_token_id=2))  # fmt: skip


BUILD: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama, "mistral": _mistral, "mistral-sliding": lambda: _mistral(WINDOW), "qwen2": _qwen2, "qwen3": _qwen3,
    "gemma3": _gemma3, "gpt2": _gpt2,
}  # fmt: skip
FAMILIES = tuple(BUILD)


@cache
def decoder(name: str) -> nn.Module:
    """One model per family for all tests, in evaluation mode; a test must leave it as it found it."""
    torch.manual_seed(7)
    model = BUILD[name]().eval()
    for part, weight in model.named_parameters():
        if part.endswith("k_norm.weight"):  # fresh ones are all alike and would give every key the same length
            weight.data.uniform_(-0.5, 2.0)
    model.generation_config.eos_token_id = None  # nothing ends early
    return model


def prompt(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Left-padded prompts of these lengths and their attention mask."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=rng)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask.long()


def attention_of(model: nn.Module, layer: int) -> nn.Module:
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    return blocks[layer].attn if hasattr(blocks[layer], "attn") else blocks[layer].self_attn


@contextmanager
def hiding(model: nn.Module, gone: list[Tensor | None]) -> Iterator[None]:
    """The slow twin: nothing is evicted, but keys marked in gone[layer] (B, G, L) get no attention. L may fall short of
    the keys there are: later ones are visible."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    def run(module, q, k, v, mask, **kwargs):
        lost = gone[module.layer_idx]
        if mask is None:
            rows = torch.arange(k.shape[2] - q.shape[2], k.shape[2])
            mask = (torch.arange(k.shape[2]) <= rows[:, None])[None, None].expand(q.shape[0], 1, -1, -1)
        if lost is not None:
            lost = nn.functional.pad(lost, (0, k.shape[2] - lost.shape[-1]))
            mask = mask & ~lost.repeat_interleave(q.shape[1] // lost.shape[1], 1)[:, :, None]
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)

    config = model.config
    AttentionInterface.register("twin", run)
    AttentionMaskInterface.register("twin", sdpa_mask)
    before = config._attn_implementation_internal
    config._attn_implementation_internal = "twin"
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        AttentionInterface._global_mapping.pop("twin")
        AttentionMaskInterface._global_mapping.pop("twin")
