"""timm without torchvision: importing this module imports timm, even where torchvision is not installed.

timm's models need a handful of torchvision names at import and none of them afterwards. They are put in place for the
import only and taken away again, so that nothing else believes torchvision to be there.
"""

from __future__ import annotations

import enum
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import torch

PARTS = (
    "", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc", ".transforms",
    ".transforms.functional", ".utils",
)  # fmt: skip
MODES = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")


class _Anything:
    """Stands for any class that timm only names."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __class_getitem__(cls, _: Any) -> type:
        return cls


class _Stub(types.ModuleType):
    """A package in which every public name exists."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


def _import_timm() -> types.ModuleType:
    if "timm" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        import timm

        return timm
    stubs = {f"torchvision{part}": _Stub(f"torchvision{part}") for part in PARTS}
    for name, module in stubs.items():
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(stubs[parent], leaf, module)
    interpolation = enum.Enum("InterpolationMode", {m.upper().replace("-", "_"): m for m in MODES})  # type: ignore[misc]
    for part in (".transforms", ".transforms.functional"):
        stubs["torchvision" + part].InterpolationMode = interpolation  # type: ignore[attr-defined]
    stubs["torchvision"].__version__ = "0.0"  # type: ignore[attr-defined]
    stubs["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (torch.nn.Module,), {})  # type: ignore[attr-defined]
    sys.modules.update(stubs)
    try:
        import timm
        import timm.models
    finally:
        for name in stubs:
            sys.modules.pop(name, None)
    return timm


timm = _import_timm()
