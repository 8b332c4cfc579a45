"""Hosts: which models a plan can be executed in. `find` binds a model to its row, or says what is supported."""

from __future__ import annotations

from torch import nn

from . import (
    decoder,
    state_space,
    timm_vision,
    transformers_crossmodal,
    transformers_text,
    transformers_vision,
    vision_language,
)
from .base import LINEAR, Call, Driver, Family, Host, HostError, Visit
from .decoder import DecoderDriver, DecoderHost
from .vision_language import LayoutError, VisionLanguageHost

DRIVERS: dict[str, Driver] = {
    "transformers": transformers_vision.TransformersDriver(),
    "timm": timm_vision.TimmDriver(),
    "decoder": decoder.DecoderDriver(),
    "state space": state_space.StateSpaceDriver(),
    **dict.fromkeys(("BLIP", "ViLT", "cross-attention"), transformers_crossmodal.WrittenOutDriver()),
}
FAMILIES: tuple[Family, ...] = (
    *transformers_vision.FAMILIES,
    *timm_vision.FAMILIES,
    *transformers_text.FAMILIES,
    *transformers_crossmodal.FAMILIES,
    *decoder.FAMILIES,
    *state_space.FAMILIES,
)
BOUND: dict[str, type[Host]] = {
    "decoder": DecoderHost,
    "state space": state_space.StateSpaceHost,
    "ViLT": transformers_crossmodal.ViltHost,
    "cross-attention": transformers_crossmodal.CrossHost,
}

__all__ = [
    "FAMILIES", "LINEAR", "Call", "DecoderHost", "Family", "Host", "HostError", "LayoutError", "VisionLanguageHost",
    "Visit", "find",
]  # fmt: skip


def find(model: nn.Module) -> Host:
    """Bind a model to its family.

    Raises   HostError if no row fits, naming what was found and what is supported.
    """
    if not isinstance(model, nn.Module):
        raise HostError(
            f"{model!r} is not a model but a {type(model).__name__}; load it first, then apply a method to it"
        )
    driver = DRIVERS["decoder"]
    assert isinstance(driver, DecoderDriver)
    if (seeing := vision_language.find(model, FAMILIES, driver)) is not None:
        return seeing
    for path, module in model.named_modules():
        for family in FAMILIES:
            if type(module).__name__ not in family.root:
                continue
            blocks = [m for m in module.modules() if type(m).__name__ == family.block]
            if blocks:
                host = BOUND.get(family.library, Host)
                return host(family, module, path, DRIVERS[family.library])
    supported = ", ".join(f.name for f in FAMILIES)
    raise HostError(
        f"{type(model).__name__} is not a model fewer knows: no known encoder or decoder inside it. Supported: "
        f"{supported}. "
        "Window models (Swin) have no global token sequence to reduce. A family is one table row: see CONTRIBUTING.md"
    )
