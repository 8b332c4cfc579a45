"""fewer: token reduction for transformers. Fewer tokens, better models.

>>> import fewer
>>> fewer.text(fewer.ToMe(budget=fewer.Remove(16)))
'tome:r=16'
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _moved

if TYPE_CHECKING:
    from . import core
    from .adapters.clip_guide import Guide
    from .compression import Compressor
    from .core import (
        Budget,
        Capacity,
        KeepRatio,
        Mass,
        Plan,
        Reducer,
        Remove,
        Signals,
        Site,
        Threshold,
        Tokens,
        reducer,
    )
    from .registry import UnknownMethod, lookup, names, registered
    from .runtime.apply import apply
    from .runtime.loading import load
    from .runtime.program import SessionError
    from .runtime.saving import session_of
    from .runtime.session import Session
    from .spec import SpecError, parse, text

__version__ = "0.1.0"
sys.meta_path.append(_moved.Finder())

__all__ = [
    "Budget", "Capacity", "Compressor", "Guide", "KeepRatio", "Mass", "Plan", "Reducer", "Remove", "Session",
    "SessionError", "Signals", "Site", "SpecError", "Threshold", "Tokens", "UnknownMethod", "apply", "core", "load",
    "lookup", "names", "parse", "reducer", "registered", "session_of", "text",
]  # fmt: skip

_ELSEWHERE = {  # imported when first asked for, so that `fewer --help` does not wait for torch
    **dict.fromkeys(("UnknownMethod", "lookup", "names", "registered"), "registry"),
    "Session": "runtime.session",
    "SessionError": "runtime.program",
    "apply": "runtime.apply",
    "load": "runtime.loading",
    "session_of": "runtime.saving",
    "Guide": "adapters.clip_guide",
    "Compressor": "compression",
    **dict.fromkeys(("SpecError", "parse", "text"), "spec"),
}


def __getattr__(name: str) -> Any:
    """The names above, and reducer classes (`fewer.ToMe`), imported when first asked for."""
    if name == "core":
        return import_module(".core", __name__)
    if name in __all__:
        value = getattr(import_module(f".{_ELSEWHERE.get(name, 'core')}", __name__), name)
        globals()[name] = value
        return value
    if name[:1].isupper():
        for cls in import_module(".registry", __name__).registered().values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'fewer' has no attribute {name!r}")


def __dir__() -> list[str]:
    classes = import_module(".registry", __name__).registered().values()
    return sorted({*globals(), *__all__, *(cls.__name__ for cls in classes)})
