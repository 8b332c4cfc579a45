"""Vision transformers of Hugging Face transformers: the table, and how their attention is run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .base import Call, Family, Host

NAME = "fewer"  # our key in the attention tables while a session is on


def _beit_bias(block: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
    """A BEiT layer's own relative position bias, (1, H, N, N) over the full sequence."""
    if block.relative_position_bias is None:
        return None
    height, width = kwargs["resolution"]
    window = (height // block.patch_size, width // block.patch_size)
    n = window[0] * window[1] + 1
    return block.relative_position_bias(window, kwargs.get("interpolate_pos_encoding", False), dim_size=n)  # type: ignore[operator]


FAMILIES = (
    Family(
        "ViT", ("ViTModel",), "ViTLayer", "layernorm_before", "attention", "layernorm_after", "mlp",
        patch="embeddings.patch_embeddings.projection", final_norm="layernorm",
        after_attention=("dropout",), after_mlp=("dropout",),
        prefix=lambda m: 1, has_cls=lambda m: True,
    ),
    Family(
        "DeiT (class and distillation token)", ("DeiTModel",), "DeiTLayer", "layernorm_before", "attention",
        "layernorm_after", "mlp", patch="embeddings.patch_embeddings.projection", final_norm="layernorm",
        after_attention=("dropout",), after_mlp=("dropout",),
        prefix=lambda m: 2, has_cls=lambda m: True,
    ),
    Family(
        "DINOv2", ("Dinov2Model",), "Dinov2Layer", "norm1", "attention", "norm2", "mlp",
        patch="embeddings.patch_embeddings.projection", final_norm="layernorm",
        after_attention=("layer_scale1", "drop_path"), after_mlp=("layer_scale2", "drop_path"),
        prefix=lambda m: 1, has_cls=lambda m: True,
    ),
    Family(
        "DINOv2 with registers", ("Dinov2WithRegistersModel",), "Dinov2WithRegistersLayer", "norm1", "attention",
        "norm2", "mlp", patch="embeddings.patch_embeddings.projection", final_norm="layernorm",
        after_attention=("layer_scale1", "drop_path"), after_mlp=("layer_scale2", "drop_path"),
        prefix=lambda m: 1 + m.config.num_register_tokens, has_cls=lambda m: True,  # type: ignore[union-attr]
    ),
    Family(
        "CLIP vision", ("CLIPVisionModel",), "CLIPEncoderLayer", "layer_norm1", "self_attn", "layer_norm2", "mlp",
        patch="embeddings.patch_embedding", prefix=lambda m: 1, has_cls=lambda m: True,
    ),
    Family(
        "SigLIP vision (no class token)", ("SiglipVisionModel",), "SiglipEncoderLayer", "layer_norm1", "self_attn",
        "layer_norm2", "mlp", patch="embeddings.patch_embedding", final_norm="post_layernorm", pooler="head",
        prefix=lambda m: 0, has_cls=lambda m: False,
    ),
    Family(
        "BEiT (relative position bias)", ("BeitModel",), "BeitLayer", "layernorm_before", "attention",
        "layernorm_after", "mlp", patch="embeddings.patch_embeddings.projection", final_norm="layernorm",
        after_attention=("dropout", "lambda_1", "drop_path"), after_mlp=("dropout", "lambda_2", "drop_path"),
        relative_bias=_beit_bias, prefix=lambda m: 1, has_cls=lambda m: True,
    ),
)  # fmt: skip


def attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      scaling: float | None = None, dropout: float = 0.0, fewer: Call | None = None,
                      **kwargs: Any) -> tuple[Tensor, None]:  # fmt: skip
    """Our entry in the attention table: the call rides in as a keyword, so no state is shared between threads."""
    if fewer is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = fewer(query, key, value, scale, attention_mask, dropout)
    return out.transpose(1, 2).contiguous(), None


class TransformersDriver:
    """Runs attention modules of transformers through their attention table, under our name while sessions are on."""

    _lock = threading.Lock()
    _users = 0

    def attach(self, host: Host, undo: ExitStack) -> None:
        modules = [getattr(block, host.family.attention) for block in host.blocks]
        configs = {id(c): c for c in [host.root.config, *(m.config for m in modules)]}
        self._register(undo)
        for config in configs.values():
            undo.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation_internal)
            config._attn_implementation_internal = NAME

    def _register(self, undo: ExitStack) -> None:
        """Enter the global tables with the first session, leave them with the last."""
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
        from transformers.modeling_utils import AttentionInterface

        def leave() -> None:
            with self._lock:
                TransformersDriver._users -= 1
                if not TransformersDriver._users:
                    AttentionInterface._global_mapping.pop(NAME, None)
                    AttentionMaskInterface._global_mapping.pop(NAME, None)

        with self._lock:
            AttentionInterface.register(NAME, attention_forward)
            AttentionMaskInterface.register(NAME, sdpa_mask)
            TransformersDriver._users += 1
        undo.callback(leave)

    def attention(self, module: nn.Module, x: Tensor, mask: Tensor | None, call: Call, kwargs: dict) -> Tensor:
        extra = {k: v for k, v in kwargs.items() if k not in ("resolution", "interpolate_pos_encoding")}
        return module(hidden_states=x, attention_mask=mask, fewer=call, **extra)[0]

    def shape(self, module: nn.Module) -> tuple[int, int]:
        heads = getattr(module, "num_attention_heads", None) or module.num_heads
        return int(heads), int(module.head_dim)  # type: ignore[arg-type]

    def checkpoint(self, host: Host, layer: int) -> Callable[..., Tensor] | None:
        """The block's gradient-checkpointing function, if that is on and this is training."""
        block = host.blocks[layer]
        if block.gradient_checkpointing and block.training and torch.is_grad_enabled():
            return block._gradient_checkpointing_func  # type: ignore[return-value]
        return None
