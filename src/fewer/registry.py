"""The registry: where methods are found. In files of `fewer/methods`, at entry points of the group `fewer.methods` that
other packages declare, or in any module, named whole: `my_pkg.mine.Mine`. Imported only when asked for."""

from __future__ import annotations

import difflib
import importlib
import re
import warnings
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TypeGuard

from .core import Reducer

METHODS = Path(__file__).parent / "methods"
GROUP = "fewer.methods"
WHOLE = re.compile(r"(?P<module>\w+(?:\.\w+)*)[.:](?P<name>[^\W\d]\w*)")
"""A class with its module: `my_pkg.mine.Mine`, or `my_pkg.mine:Mine` as entry points have it."""
_places: dict[str, str] = {}  # of methods that were named whole


class UnknownMethod(ValueError):
    """No method of that name, or none that can be used."""


@cache
def names() -> dict[str, str]:
    """Every method's name and where it lives: its module, for one file per method, named after it; or `module:Class`,
    of an entry point. Nothing is imported. An entry point whose name is taken is left out, with a warning."""
    found = {}
    for path in sorted(METHODS.glob("*/[a-z]*.py")):
        found[path.stem] = f"fewer.methods.{path.parent.name}.{path.stem}"
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        name, place = _key(point.name), point.value
        if found.setdefault(name, place) != place:
            warnings.warn(f"the entry point {point.name} = {point.value} is left out: {found[name]} has that name; "
                          "rename one of them", stacklevel=2)  # fmt: skip
    return found


def lookup(name: str) -> type[Reducer]:
    """The reducer of a name, or of a class named whole. Raises UnknownMethod: with the nearest names; for a module that
    does not import; for a second class of a name, with both places."""
    place = names().get(_key(name))
    if place is None and (whole := WHOLE.fullmatch(name.strip())):
        return _named(whole["module"], whole["name"])
    if place is None:
        near = difflib.get_close_matches(_key(name), names(), n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UnknownMethod(f"no method named {name!r}{hint} (fewer list shows all {len(names())})")
    key = _key(name)
    if ":" in place:
        try:
            cls = _class(*place.split(":"))
        except UnknownMethod as error:
            raise UnknownMethod(f"the entry point {key} = {place}: {error}") from error
        if cls.card.name != key:
            raise UnknownMethod(f"the entry point {key} = {place}: the class calls itself {cls.card.name!r}")
        return cls
    module = _imported(place)
    found = [v for v in vars(module).values() if _declared(v) and v.__module__ == place and v.card.name == key]
    if not found:
        raise UnknownMethod(f"{place} declares no reducer named {key!r}: check its @reducer line")
    if len(found) > 1:
        raise UnknownMethod(f"{place} declares {key!r} twice: {' and '.join(cls.__name__ for cls in found)}")
    return found[0]


def registered() -> dict[str, type[Reducer]]:
    """All methods that have a name, imported. An entry point that fails is left out, with a warning."""
    found = {}
    for name, place in names().items():
        try:
            found[name] = lookup(name)
        except UnknownMethod as error:
            if place.startswith(f"{__package__}.methods."):
                raise
            warnings.warn(str(error), stacklevel=2)
    return found


def name_of(cls: type[Reducer]) -> str:
    """What `lookup` finds a class by: its name, or `module.Class` for one from outside that is not registered."""
    whole = f"{cls.__module__}.{cls.__qualname__}"
    outside = cls.__module__.partition(".")[0] != __package__
    return whole if outside and names().get(cls.card.name, "").replace(":", ".") != whole else cls.card.name


def _key(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _declared(value: object) -> TypeGuard[type[Reducer]]:
    """Whether something is a class with a @reducer line of its own."""
    return isinstance(value, type) and issubclass(value, Reducer) and "card" in vars(value)


def _named(module: str, name: str) -> type[Reducer]:
    """A class named whole, if no other has the name it calls itself by."""
    cls = _class(module, name)
    whole, own = f"{cls.__module__}.{cls.__qualname__}", cls.card.name
    other = names().get(own) or _places.setdefault(own, whole)
    if other.replace(":", ".") not in (whole, cls.__module__):
        raise UnknownMethod(f"{whole} calls itself {own!r}, and so does {other}: rename one in its @reducer line")
    return cls


def _class(module: str, name: str) -> type[Reducer]:
    value = getattr(_imported(module), name, None)
    if value is None:
        classes = [key for key, each in vars(importlib.import_module(module)).items() if _declared(each)]
        raise UnknownMethod(f"{module} has no {name}; its methods: {', '.join(classes) or 'none'}")
    if not _declared(value):
        raise UnknownMethod(f"{module}.{name} is no method: a class with a @fewer.reducer line of its own is one")
    return value


def _imported(module: str) -> ModuleType:
    """Raises UnknownMethod, whatever the module's own code raises."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UnknownMethod(f"{module} cannot be imported: {error}") from error
        near = difflib.get_close_matches(module, names(), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UnknownMethod(
            f"no method and no module named {module!r}{hint}: install its package, or put its folder on PYTHONPATH"
        ) from error
    except Exception as error:
        raise UnknownMethod(f"{module} cannot be imported: {type(error).__name__}: {error}") from error
