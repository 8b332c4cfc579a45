"""Vision transformers of Hugging Face transformers: the table, and how their attention is run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from operator import attrgetter
from typing import Any, ClassVar

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
        "layer_norm2", "mlp", patch="embeddings.patch_embedding", final_norm="post_layernorm",
        pooler="head.attention", pooler_mask=lambda valid: {"key_padding_mask": ~valid},
        prefix=lambda m: 0, has_cls=lambda m: False,
    ),
    Family(
        "BEiT (relative position bias)", ("BeitModel",), "BeitLayer", "layernorm_before", "attention",
        "layernorm_after", "mlp", patch="embeddings.patch_embeddings.projection", final_norm="layernorm",
        after_attention=("dropout", "lambda_1", "drop_path"), after_mlp=("dropout", "lambda_2", "drop_path"),
        relative_bias=_beit_bias, prefix=lambda m: 1, has_cls=lambda m: True,
    ),
)  # fmt: skip


def attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                      attention_mask: Tensor | Carried | None, scaling: float | None = None, dropout: float = 0.0,
                      **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Our entry in the attention table. The call rides in with the mask, which every attention module hands on as it
    is: no state is shared between threads. A module without a session that shares a config with one runs as before."""
    if not isinstance(attention_mask, Carried):
        plain = TransformersDriver.implementation(module)
        return plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attention_mask.call(query, key, value, scale, attention_mask.mask, dropout)
    return out.transpose(1, 2).contiguous(), None


class Carried:
    """A call under way and the model's own mask, in the place of the mask."""

    def __init__(self, call: Call, mask: Tensor | None) -> None:
        self.call, self.mask = call, mask


class TransformersDriver:
    """Runs attention modules of transformers through their attention table, under our name while sessions are on."""

    name: ClassVar[str] = NAME
    _lock = threading.Lock()
    _users = 0
    # By id: the implementation before the first session, sessions, and the config itself: no other may get its id while
    # a session that nobody took off still counts here.
    _configs: ClassVar[dict[int, tuple[str, int, Any]]] = {}

    def attach(self, host: Host, undo: ExitStack) -> None:
        modules = [attrgetter(host.family.attention)(block) for block in host.blocks]
        self.enter_all([host.root.config, *(m.config for m in modules)], undo)

    def enter_all(self, configs: Sequence[Any], undo: ExitStack) -> None:
        """Enter the global tables and put our name into some configs; what `undo` holds takes it out again."""
        self._register(undo)
        for config in {id(c): c for c in configs}.values():
            self._enter(config)
            undo.callback(self._leave, config)

    def _enter(self, config: Any) -> None:
        """Put our name into a config; models may share one, so sessions are counted."""
        with self._lock:
            before, users, _ = self._configs.get(id(config), (config._attn_implementation_internal, 0, config))
            self._configs[id(config)] = (before, users + 1, config)
            config._attn_implementation_internal = self.name

    def _leave(self, config: Any) -> None:
        with self._lock:
            before, users, _ = self._configs.pop(id(config))
            if users > 1:
                self._configs[id(config)] = (before, users - 1, config)
            else:
                config._attn_implementation_internal = before

    @classmethod
    def implementation(cls, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The attention function a module would use without a session."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        before, *_ = cls._configs.get(id(module.config), ("sdpa",))
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(before, eager)

    def _register(self, undo: ExitStack) -> None:
        """Enter the global tables with the first session, leave them with the last."""
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface

        driver = type(self)

        def leave() -> None:
            with self._lock:
                driver._users -= 1
                if not driver._users:
                    AttentionInterface._global_mapping.pop(self.name, None)
                    AttentionMaskInterface._global_mapping.pop(self.name, None)

        with self._lock:
            attention, mask = self.entries()
            AttentionInterface.register(self.name, attention)
            AttentionMaskInterface.register(self.name, mask)
            driver._users += 1
        undo.callback(leave)

    @classmethod
    def entries(cls) -> tuple[Callable, Callable]:
        """Our functions in the attention table and in the mask table."""
        from transformers.masking_utils import sdpa_mask

        return attention_forward, sdpa_mask

    def attention(self, module: nn.Module, x: Tensor, mask: Tensor | None, call: Call, kwargs: dict) -> Tensor:
        extra = {k: v for k, v in kwargs.items() if k not in ("resolution", "interpolate_pos_encoding")}
        return module(x, attention_mask=Carried(call, mask), **extra)[0]

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Query heads, and channels of each."""
        named = next(n for n in ("num_attention_heads", "num_heads", "n_heads", "config") if hasattr(module, n))
        heads = int(module.config.num_attention_heads if named == "config" else getattr(module, named))  # type: ignore
        wide = next(n for n in ("head_dim", "attention_head_size") if hasattr(module, n))
        return heads, int(getattr(module, wide))

    def checkpoint(self, host: Host, layer: int) -> Callable[..., Tensor] | None:
        """The block's gradient-checkpointing function, if that is on and this is training."""
        block = host.blocks[layer]
        if block.gradient_checkpointing and block.training and torch.is_grad_enabled():
            return block._gradient_checkpointing_func  # type: ignore[return-value]
        return None
