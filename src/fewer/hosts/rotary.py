"""The rotary embedding of a decoder's layers, found in its root and tried on its twin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewer.compat import pretrained
from fewer.core.rope import Rotary

from .attention import HostError

UNTURNED = "choose a method that leaves rotations alone (snapkv, h2o, tova, knorm, keydiff)"
IN_SPACE = (
    "the rotary embedding of this model turns rows by their place in time and space (M-RoPE), not by one position"
)
STRANGE = "the rotary embedding of this model arranges what it turns in a way of its own"
STEP = 5  # positions by which the trial moves a text on


def found_in(root: nn.Module) -> Any:
    """The module that makes the rotary tables; None where positions are not rotated."""
    return next((m for m in root.modules() if hasattr(m, "rope_type") or hasattr(m, "inv_freq")), None)


def embedding(root: nn.Module, layer: int) -> Rotary | None:
    """A layer's rotary embedding; None where positions are not rotated.

    Raises   HostError where it changes with the length of the input.
    """
    module = found_in(root)
    if module is None:
        return None
    kind, scale = getattr(module, "rope_type", "default"), "attention_scaling"
    frequencies = getattr(module, "inv_freq", None)
    if isinstance(kind, dict):  # sliding and full layers turn at different speeds
        which = pretrained(root).config.layer_types[layer]
        if which not in kind:  # layers of this kind turn nothing
            return Rotary(torch.zeros_like(getattr(module, f"{next(iter(kind))}_inv_freq")).float())
        kind, frequencies, scale = kind[which], getattr(module, f"{which}_inv_freq", None), f"{which}_{scale}"
    if kind in ("dynamic", "longrope"):
        raise HostError(
            f"the rotary embedding of type {kind!r} changes with the length of the input, so rows cannot be turned "
            f"back; {UNTURNED}"
        )
    if not isinstance(frequencies, Tensor):
        raise HostError(f"{STRANGE}; {UNTURNED}")
    return Rotary(frequencies.float(), float(getattr(module, scale, 1.0)))


def in_space(root: nn.Module) -> bool:
    """Whether rows stand in time and space."""
    config: Any = root.config
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return "mrope_section" in parameters or hasattr(found_in(root), "mrope_section")


def turns(rotary: Rotary, before: Tensor, behind: Tensor) -> bool | None:
    """Whether keys that stand STEP positions further on are the same keys turned; None where they were not turned at
    all. before, behind: (B, G, N, d)."""
    if torch.allclose(before, behind, atol=1e-5, rtol=1e-4):
        return None
    if 2 * rotary.frequencies.shape[-1] != before.shape[-1]:
        return False
    by = torch.full(before.shape[:-1], STEP)
    return torch.allclose(rotary.turn(before, by), behind, atol=1e-3, rtol=1e-3)
