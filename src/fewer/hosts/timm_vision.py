"""timm's VisionTransformer family: the table, and how its attention is run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .base import Call, Family, Host, HostError

FAMILIES = (
    Family(
        "timm VisionTransformer", ("VisionTransformer", "VisionTransformerDistilled"), "Block", "norm1", "attn",
        "norm2", "mlp", patch="patch_embed.proj", final_norm="norm",
        pooler="attn_pool", pooler_mask=lambda valid: {"attn_mask": valid[:, None, None, :]},
        pools_from=lambda m: 0 if m.pool_include_prefix else m.num_prefix_tokens,
        after_attention=("ls1", "drop_path1"), after_mlp=("ls2", "drop_path2"),
        prefix=lambda m: m.num_prefix_tokens, has_cls=lambda m: m.cls_token is not None, library="timm",
    ),
)  # fmt: skip


class _Intercept(TorchFunctionMode):
    """Hands the fused kernel's arguments to a Call while one attention module runs. Modes are per thread."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        return self.call(q, k, v, scale, kwargs.get("attn_mask"), kwargs.get("dropout_p", 0.0))


class TimmDriver:
    """Runs timm attention modules as they are and steps in where they call the fused kernel."""

    def attach(self, host: Host, undo: ExitStack) -> None:
        for block in host.blocks:
            if not getattr(block.attn, "fused_attn", False):
                raise HostError(
                    f"{type(block.attn).__name__} does not use fused attention; set fused_attn=True on it "
                    "(timm.layers.set_fused_attn) before applying a method"
                )

    def attention(self, module: nn.Module, x: Tensor, mask: Tensor | None, call: Call, kwargs: dict) -> Tensor:
        if kwargs.get("is_causal"):
            raise HostError("causal attention over patches is not supported; call the model with is_causal=False")
        with _Intercept(call):
            return module(x, attn_mask=mask)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return int(module.num_heads), int(module.head_dim)  # type: ignore[arg-type]

    def checkpoint(self, host: Host, layer: int) -> Callable[..., Tensor] | None:
        """timm checkpoints around its blocks, where a second run cannot be told from a new forward pass."""
        if getattr(host.root, "grad_checkpointing", False) and host.root.training and torch.is_grad_enabled():
            raise HostError("timm's gradient checkpointing hides recomputation; call set_grad_checkpointing(False)")
        return None
