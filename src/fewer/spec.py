"""The text form of a method: `tome:r=8,inflect=-1,proportional=false`, lists with +: `evit:keep=0.7,layers=3+6+9`."""

from __future__ import annotations

import difflib
from dataclasses import fields, replace
from typing import Any

from .core import Budget, Capacity, KeepRatio, Mass, Reducer, Remove, Threshold
from .registry import lookup

BUDGET_KEYS = ("r", "inflect", "keep", "of", "rounding", "tokens", "threshold", "mass")


class SpecError(ValueError):
    """A text form or keyword that a method does not understand."""


def parse(method: str | Reducer, **parameters: Any) -> Reducer:
    """A reducer from its text form, its name and keywords, or itself with some fields replaced.

    `keep` is the share that stays, `tokens` a count that stays, `r` a count that goes; `threshold` and `mass` let
    samples keep different numbers. They set the method's budget; every other key is a field of the method.

    >>> text(parse("tome:r=8+8+4,proportional=false"))
    'tome:r=8+8+4,proportional=false'
    """
    if isinstance(method, Reducer):
        return _build(type(method), parameters, method)
    name, _, rest = method.partition(":")
    given: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, eq, value = part.partition("=")
        if not eq:
            raise SpecError(f"{part!r} in {method!r} is not key=value; write for example {name}:keep=0.7")
        given[key.strip()] = _value(value.strip())
    return _build(lookup(name), {**given, **parameters})


def text(method: Reducer) -> str:
    """The shortest text form that `parse` turns back into this method."""
    parts = []
    for f in fields(method):  # type: ignore[arg-type]
        value = getattr(method, f.name)
        if value == f.default:
            continue
        parts += _budget_text(value, f.default) if isinstance(value, Budget) else [f"{f.name}={_written(value)}"]
    return method.card.name + (":" + ",".join(parts) if parts else "")


def _build(cls: type[Reducer], given: dict[str, Any], base: Reducer | None = None) -> Reducer:
    names = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    own = {k: v for k, v in given.items() if k in names}
    rest = {k: v for k, v in given.items() if k not in names}
    unknown = [k for k in rest if k not in BUDGET_KEYS or "budget" not in names]
    if unknown:
        known = [n for n in names if n != "budget"] + (list(BUDGET_KEYS) if "budget" in names else [])
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SpecError(f"{cls.card.name} has no parameter {unknown[0]!r}{hint} It takes {', '.join(known)}.")
    for key, value in own.items():
        if "tuple" in str(names[key].type) and value is not None and not isinstance(value, tuple):
            own[key] = tuple(value) if isinstance(value, list) else (value,)
    if rest:
        default = own.get("budget", base.budget if base else names["budget"].default)
        own["budget"] = _budget(rest, default)
    try:
        return replace(base, **own) if base else cls(**own)  # type: ignore[type-var]
    except TypeError as error:
        raise SpecError(f"{cls.card.name}: {error}") from error


def _budget(given: dict[str, Any], default: Budget) -> Budget:
    """The budget some keys ask for, keeping the method's own convention where the kind is the same."""
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    kinds = [k for k in ("r", "keep", "tokens", "threshold", "mass") if k in given]
    if len(kinds) > 1:
        raise SpecError(f"{' and '.join(kinds)} both say how many stay; give one")
    kind = kinds[0] if kinds else None
    for key, value in given.items():
        items = value if isinstance(value, tuple) else (value,)
        if key not in ("of", "rounding") and any(isinstance(v, (str, bool)) for v in items):
            raise SpecError(f"{key}={_written(value)}: {key} takes a number, or numbers joined by +")
    if kind == "r" or (kind is None and "inflect" in given and isinstance(default, Remove)):
        start = default if isinstance(default, Remove) else Remove()
        return replace(start, r=given.get("r", start.r), inflect=given.get("inflect", 0.0))
    if "inflect" in given:
        raise SpecError("inflect shapes the schedule of r; give r too")
    if kind == "keep" or (kind is None and isinstance(default, KeepRatio)):
        ratio = default if isinstance(default, KeepRatio) else KeepRatio()
        changes = {k: given[k] for k in ("of", "rounding") if k in given}
        return replace(ratio, **({"ratio": given["keep"]} if kind else {}), **changes)
    if kind == "tokens":
        return Capacity(given["tokens"])
    if kind == "threshold":
        return Threshold(given["threshold"])
    if kind == "mass":
        return Mass(given["mass"])
    raise SpecError(f"{', '.join(given)} say how `keep` counts; give keep too")


def _budget_text(budget: Budget, default: Any) -> list[str]:
    if isinstance(budget, Remove):
        inflect = [f"inflect={_written(budget.inflect)}"] if budget.inflect else []
        return [f"r={_written(budget.r)}", *inflect]
    if isinstance(budget, KeepRatio):
        base = default if isinstance(default, KeepRatio) else KeepRatio()
        extra = [f"{k}={getattr(budget, k)}" for k in ("of", "rounding") if getattr(budget, k) != getattr(base, k)]
        return [f"keep={_written(budget.ratio)}", *extra]
    key = {Capacity: "tokens", Threshold: "threshold", Mass: "mass"}[type(budget)]
    return [f"{key}={_written(getattr(budget, fields(budget)[0].name))}"]


def _value(written: str) -> Any:
    if "+" in written.lstrip("+"):
        return tuple(_value(part) for part in written.split("+"))
    low = written.lower()
    if low in ("true", "false"):
        return low == "true"
    if low == "none":
        return None
    for kind in (int, float):
        try:
            return kind(written)
        except ValueError:
            continue
    return written


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_written, value))
    return str(value).lower() if isinstance(value, bool) or value is None else f"{value:g}" if isinstance(value, float) else str(value)  # fmt: skip
