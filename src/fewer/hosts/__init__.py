"""Hosts: which models a plan can be executed in. `find` binds a model to what is discovered of it, or says what is
missing."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from . import diffusion, timm_vision, transformers_crossmodal, vision_language
from .anatomy import Anatomy, Layer, Stream, placed, reach
from .attention import Call, HostError, Table, running, under
from .base import BlockRun, Host, PlainRun
from .decoder import DecoderHost
from .diffusion import DiffusionHost, denoiser
from .discovery import anatomy
from .stacks import Stack, in_lists, stacks
from .state_space import StateSpaceHost
from .vision_language import LayoutError, VisionLanguageHost
from .weights import PLAIN as MATRICES

__all__ = [
    "MATRICES",
    "Anatomy",
    "BlockRun",
    "Call",
    "DecoderHost",
    "DiffusionHost",
    "Host",
    "HostError",
    "Layer",
    "LayoutError",
    "PlainRun",
    "Stack",
    "Stream",
    "Table",
    "VisionLanguageHost",
    "bind",
    "denoiser",
    "find",
    "placed",
    "reach",
    "running",
    "stacks",
    "under",
]  # fmt: skip


def find(model: nn.Module) -> Host:
    """Bind a model: find its blocks, and what they do with their tokens.

    Raises   HostError where there are none that can be entered, saying what was found, what is missing and what else
             could be done.
    """
    if not isinstance(model, nn.Module):
        raise HostError(
            f"{model!r} is not a model but a {type(model).__name__}; load it first, then apply a method to it"
        )
    if diffusion.is_one(model):
        return DiffusionHost(model)
    if (seeing := vision_language.find(model)) is not None:
        return seeing
    for path, module in model.named_modules():
        if type(module).__name__ == "BlipTextModel" and not _images(model):
            return transformers_crossmodal.CrossHost(module, path)
        if timm_vision.is_one(module):
            return Host(timm_vision.anatomy_of(module), module, path)
    why: list[str] = []
    for stack in sorted(stacks(model), key=_rank):
        try:
            host = bind(stack)
        except HostError as error:
            why.append(str(error))
        else:
            host.reader = _reader(model, host)
            return host
    if not why:
        lists = "its attention, norms and MLPs stand in lists of their own, so that there are no blocks; "
        none = "no run of blocks with attention inside, in a model of transformers or timm"
        why.append(f"{lists if in_lists(model) else ''}{none}")
    raise HostError(
        f"{type(model).__name__} is not a model fewer knows: {'; '.join(dict.fromkeys(why))}. `fewer doctor MODEL` "
        "shows what was found; an inner model (model.vision_model, model.encoder) may be one"
    )


def bind(stack: Stack, found: Anatomy | None = None) -> Host:
    """A stack of blocks as the host it is. found: what is known of it, where it need not be looked up."""
    found = found or anatomy(stack)
    if found.kind == "decoder":
        return DecoderHost(found, stack.root, stack.path)
    if found.kind == "scan":
        return StateSpaceHost(found, stack.root, stack.path)
    if type(stack.root).__name__ == "ViltModel":
        return transformers_crossmodal.ViltHost(found, stack.root, stack.path)
    return Host(found, stack.root, stack.path)


def _rank(stack: Stack) -> tuple[int, int]:
    """Pictures before words where a model has both, encoders before decoders, then the deeper stack."""
    config: Any = stack.root.config
    pictures = "pixel" in str(getattr(stack.root, "main_input_name", ""))
    decodes = bool(getattr(config, "is_decoder", False)) or "Decoder" in type(stack.root).__name__
    return (0 if pictures else 2 if decodes else 1, -len(stack.blocks))


def _reader(model: nn.Module, host: Host) -> nn.Module | None:
    """The decoder whose cross-attention looks at what an encoder gives, in a model that has both."""
    if host.kind not in ("text", "sound") or not getattr(host.root.config, "is_encoder_decoder", False):
        return None
    inside = {id(m) for m in host.root.modules()}
    around = [m for m in model.modules() if id(m) not in inside and host.root not in set(m.modules())]
    looking = (m for m in around if hasattr(m, "config") and "encoder_hidden_states" in _named(m))
    return next(looking, None)


def _named(module: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(type(module).forward).parameters)


def _images(model: nn.Module) -> bool:
    return any(type(m).__name__ == "BlipVisionModel" for m in model.modules())
