"""fewer: token reduction for transformers. Fewer tokens, better models.

>>> import fewer
>>> fewer.ToMe(budget=fewer.Remove(16))
ToMe(budget=Remove(r=16, inflect=0.0), layers=None, proportional=True)
"""

from __future__ import annotations

from typing import Any

from . import core
from .core import Budget, Capacity, KeepRatio, Mass, Plan, Reducer, Remove, Signals, Site, Threshold, Tokens, reducer
from .registry import UnknownMethod, lookup, names, registered
from .session import Session, SessionError, apply
from .spec import SpecError, parse, text

__version__ = "0.1.0"

__all__ = [
    "Budget", "Capacity", "KeepRatio", "Mass", "Plan", "Reducer", "Remove", "Session", "SessionError", "Signals", "Site",
    "SpecError", "Threshold", "Tokens", "UnknownMethod", "apply", "core", "lookup", "names", "parse", "reducer",
    "registered", "text",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Reducer classes by name (`fewer.ToMe`), imported when first asked for."""
    if not name.startswith("_"):
        for cls in registered().values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'fewer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *(cls.__name__ for cls in registered().values())])
