"""timm's vision transformers: no config tells how to build a small one, so a block is copied to see what it does.

Everything else is known from the names that timm gives the parts of all its transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .anatomy import Anatomy, Layer
from .attention import HostError
from .discovery import base
from .steps import record
from .watching import way_in

BATCH, LENGTH = 3, 13
SHARED = "shared_rel_pos_bias"  # an argument of BEiT's blocks: a bias between all tokens that the model makes once
OTHERS = ("forward", "_old_forward", "_hf_hook")  # where accelerate puts a hook, on a module


def is_one(model: nn.Module) -> bool:
    """Whether a module is one of timm's transformers: a stack of blocks behind a patch embedding."""
    return all(hasattr(model, name) for name in ("blocks", "patch_embed", "num_prefix_tokens"))


def anatomy_of(model: Any) -> Anatomy:
    """What is known of such a model.

    Raises   HostError where its blocks do not hand on one sequence, or its attention cannot be entered.
    """
    name = type(model).__name__
    prefix = int(model.num_prefix_tokens)
    rows = getattr(model.patch_embed, "num_patches", 0) + prefix
    shared = {} if getattr(model, "rel_pos_bias", None) is None else {SHARED: model.rel_pos_bias}
    layers = tuple(_layer(f"blocks.{i}", block, rows, shared) for i, block in enumerate(model.blocks))
    shut = [layer.path for layer in layers if layer.way is None]
    if shut:
        block = model.blocks[int(shut[0].rpartition(".")[2])]
        if not getattr(getattr(block, "attn", None), "fused_attn", True):
            raise HostError(
                f"{type(block.attn).__name__} does not use fused attention; set fused_attn=True on it "
                "(timm.layers.set_fused_attn) before applying a method"
            )
        raise HostError(
            f"{name}: the attention of {shut[0]} ({type(block).__name__}) is none over all tokens that could be entered"
        )
    return Anatomy(
        f"timm {name}", "vision", layers,
        prefix=prefix, has_cls=getattr(model, "cls_token", None) is not None,
        patch="patch_embed.proj" if isinstance(getattr(model.patch_embed, "proj", None), nn.Conv2d) else None,
        final_norm="norm" if isinstance(getattr(model, "norm", None), nn.Module) else None,
        pooler="attn_pool" if getattr(model, "attn_pool", None) is not None else None,
        pools_from=0 if getattr(model, "pool_include_prefix", False) else prefix,
    )  # fmt: skip


def _layer(path: str, block: nn.Module, rows: int, shared: Mapping[str, nn.Module]) -> Layer:
    """A block's layer, from a random copy of it. rows: what the model gives it, which is all that a block takes that
    makes a bias between them itself; shared: what makes one for all blocks, by the argument that hands it on."""
    twin = _copy(block).float().eval()
    source = torch.Generator().manual_seed(0)
    norm = next(p for p in twin.parameters() if p.dim() == 1)
    with torch.no_grad():
        for parameter in twin.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=source) * scale + (parameter.dim() == 1))
    way, inside = None, bool(shared)
    beside = {name: _copy(module)().detach() for name, module in shared.items()}
    for length in (rows,) if shared else (LENGTH, rows):
        given = {"x": torch.randn(BATCH, length, norm.shape[0], generator=source)} | beside
        inside = inside or length != LENGTH
        try:
            way = way_in(twin, given, (BATCH, length))
            return Layer(path, "attn", way, not inside, inside, steps=record(twin, given, "attn"))
        except (RuntimeError, TypeError, AssertionError):
            continue
    return Layer(path, "attn", way, not inside, inside)


def _copy(module: nn.Module) -> Any:
    """A module's copy in float32 on the CPU, without weights and without what other libraries put around it or in place
    of its parts: hooks, weights that were moved away, sharded or packed."""
    rows, columns = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(rows, int) and isinstance(columns, int):
        return nn.Linear(rows, columns, bias=getattr(module, "bias", None) is not None)
    twin: Any = nn.Module.__new__(base(type(module)))
    for name, held in vars(module).items():
        if name not in OTHERS:
            vars(twin)[name] = type(held)() if "hooks" in name and isinstance(held, dict) else held
    vars(twin)["_parameters"] = {
        name: None if p is None else nn.Parameter(torch.zeros(p.shape)) for name, p in module._parameters.items()
    }
    vars(twin)["_buffers"] = {
        name: None if b is None else torch.zeros(b.shape) if b.is_meta else b.detach().cpu().clone()
        for name, b in module._buffers.items()
    }
    vars(twin)["_modules"] = {name: None if m is None else _copy(m) for name, m in module._modules.items()}
    return twin


__all__ = ["anatomy_of", "is_one"]
