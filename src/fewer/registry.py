"""The registry: methods are found by looking at the files of `fewer/methods`, imported only when asked for."""

from __future__ import annotations

import difflib
import importlib
from functools import cache
from pathlib import Path

from .core import Reducer

METHODS = Path(__file__).parent / "methods"


class UnknownMethod(ValueError):
    """No method of that name."""


@cache
def names() -> dict[str, str]:
    """Every method's name and the module it lives in: one file per method, named after it. Nothing is imported."""
    found = {}
    for path in sorted(METHODS.glob("*/[a-z]*.py")):
        found[path.stem] = f"fewer.methods.{path.parent.name}.{path.stem}"
    return found


def lookup(name: str) -> type[Reducer]:
    """The reducer of a name. Raises UnknownMethod with the nearest names."""
    key = name.strip().lower().replace("-", "_")
    if key not in names():
        near = difflib.get_close_matches(key, names(), n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UnknownMethod(f"no method named {name!r}{hint} (fewer list shows all {len(names())})")
    module = importlib.import_module(names()[key])
    for value in vars(module).values():
        if not (isinstance(value, type) and issubclass(value, Reducer) and value.__module__ == module.__name__):
            continue
        if getattr(value, "card", None) and value.card.name == key:
            return value
    raise UnknownMethod(f"{module.__name__} declares no reducer named {key!r}: check its @reducer line")


def registered() -> dict[str, type[Reducer]]:
    """All methods, imported."""
    return {name: lookup(name) for name in names()}
