"""A small LLaVA with random weights, and prompts for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE = 63
ROWS = 16


def tiny_llava(layers: int = 4, seed: int = 0) -> nn.Module:
    """Images of 24 x 24 give 16 visual rows; a vocabulary of 64, 4 heads that share 2 KV heads."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=6,
        projection_dim=16,
    )  # fmt: skip
    language = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=IMAGE, vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


def prompt(words: tuple[int, ...] = (5, 6, 7, 8), images: int = 1, seed: int = 0) -> dict[str, Any]:
    """Two words, the images, the words."""
    ids = torch.tensor([[1, 2, *[IMAGE] * ROWS * images, *words]])
    pixels = torch.randn(images, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def batched(prompts: list[dict[str, Any]], left: bool) -> dict[str, Any]:
    """Several prompts, padded on one side."""
    width = max(p["input_ids"].shape[1] for p in prompts)

    def padded(name: str) -> torch.Tensor:
        rows = []
        for p in prompts:
            more = width - p[name].shape[1]
            rows.append(torch.nn.functional.pad(p[name], (more, 0) if left else (0, more)))
        return torch.cat(rows)

    pixels = torch.cat([p["pixel_values"] for p in prompts])
    return {name: padded(name) for name in ("input_ids", "attention_mask")} | {"pixel_values": pixels}
