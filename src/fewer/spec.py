"""The text form of a method: `tome:r=8,inflect=-1,proportional=false`, lists with +: `evit:keep=0.7,layers=3+6+9`.

A method from outside is named with its module, `my_pkg.mine.Mine:r=8`; `my_pkg.mine:Mine:r=8` is read too."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import fields, replace
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .core import Budget, Capacity, KeepRatio, Mass, Outliers, Reducer, Remove, Site, Threshold
from .registry import WHOLE, lookup, name_of, names

AMOUNTS: dict[str, Callable[[Any], Budget]] = {
    "tokens": Capacity, "threshold": Threshold, "mass": Mass, "outliers": Outliers,
}  # fmt: skip
WORDS = {bool: "true or false", int: "a whole number", float: "a number", NoneType: "none", Budget: "a budget"}
SITES = {site.name.lower().removesuffix("_block"): site for site in Site}  # before, ..., bridge
WORDS[Site] = "one of " + ", ".join(SITES)
OUTSIDE = re.compile(rf"\s*(?P<whole>{WHOLE.pattern})\s*(?::(?P<rest>.*))?", re.DOTALL)
BUDGET_KEYS = ("r", "inflect", "keep", "of", "rounding", *AMOUNTS)


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
    if not isinstance(method, str):
        raise SpecError(f"{method!r} is no method; give a name such as 'tome', a text form, or a reducer: fewer.ToMe()")
    name, rest = divided(method)
    given: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, eq, value = part.partition("=")
        if not eq:
            raise SpecError(f"{part!r} in {method!r} is not key=value; write for example {name}:keep=0.7")
        if key.strip() in given:
            raise SpecError(f"{key.strip()} is given twice in {method!r}")
        given[key.strip()] = value_of(value.strip())
    return _build(lookup(name), {**given, **parameters})


def text(method: Reducer, *, defaults: bool = False) -> str:
    """The shortest text form that `parse` turns back into this method; with `defaults`, every parameter written."""
    parts = []
    for f in fields(method):
        value = getattr(method, f.name)
        if value == f.default and not defaults:
            continue
        parts += _budget_text(value, f.default) if isinstance(value, Budget) else [f"{f.name}={written(value)}"]
    return name_of(type(method)) + (":" + ",".join(parts) if parts else "")


def divided(form: str) -> tuple[str, str]:
    """A text form's name and its parameters."""
    head, _, rest = form.partition(":")
    if head.strip() not in names() and (outside := OUTSIDE.fullmatch(form)):
        return outside["whole"], outside["rest"] or ""
    return head, rest


def _build(cls: type[Reducer], given: dict[str, Any], base: Reducer | None = None) -> Reducer:
    names = {f.name: f for f in fields(cls)}
    own = {k: v for k, v in given.items() if k in names}
    rest = {k: v for k, v in given.items() if k not in names}
    unknown = [k for k in rest if k not in BUDGET_KEYS or "budget" not in names]
    if unknown:
        known = [n for n in names if n != "budget"] + (list(BUDGET_KEYS) if "budget" in names else [])
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise SpecError(f"{cls.card.name} has no parameter {unknown[0]!r}{hint} It takes {', '.join(known)}.")
    for key, value in own.items():
        if "tuple" in str(names[key].type) and value is not None and not isinstance(value, tuple):
            own[key] = tuple(value) if isinstance(value, list) else (value,)
        if "Site" in str(names[key].type) and isinstance(value, str):
            own[key] = SITES.get(value.strip().lower().removesuffix("_block"), value)
    _check(cls, own)
    if rest:
        default = own.get("budget", base.budget if base else names["budget"].default)
        own["budget"] = _budget(rest, default)
    try:
        return replace(base, **own) if base else cls(**own)
    except TypeError as error:
        raise SpecError(f"{cls.card.name}: {error}") from error


def _budget(given: dict[str, Any], default: Budget) -> Budget:
    """The budget some keys ask for, keeping the method's own convention where the kind is the same."""
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    kinds = [k for k in ("r", "keep", *AMOUNTS) if k in given]
    if len(kinds) > 1:
        raise SpecError(f"{' and '.join(kinds)} both say how many stay; give one")
    kind = kinds[0] if kinds else None
    for key, value in given.items():
        items = value if isinstance(value, tuple) else (value,)
        if key not in ("of", "rounding") and (not items or any(isinstance(v, (str, bool)) for v in items)):
            raise SpecError(f"{key}={written(value)}: {key} takes a number, or numbers joined by +")
    if kind == "r" or (kind is None and "inflect" in given and isinstance(default, Remove)):
        start = default if isinstance(default, Remove) else Remove()
        return replace(start, r=given.get("r", start.r), inflect=given.get("inflect", 0.0))
    if "inflect" in given:
        raise SpecError("inflect shapes the schedule of r; give r too")
    if kind == "keep" or (kind is None and isinstance(default, KeepRatio)):
        ratio = default if isinstance(default, KeepRatio) else KeepRatio()
        changes = {k: given[k] for k in ("of", "rounding") if k in given}
        return replace(ratio, **({"ratio": given["keep"]} if kind else {}), **changes)
    if kind is not None:
        if isinstance(given[kind], tuple) and kind != "tokens":
            raise SpecError(f"{kind}={written(given[kind])}: {kind} takes one number")
        return AMOUNTS[kind](given[kind])
    raise SpecError(f"{' and '.join(given)} would say how `keep` counts; give keep too")


def _check(cls: type[Reducer], given: dict[str, Any]) -> None:
    """Raises SpecError where a value is not what a field's annotation says. Choices are left to the method to judge."""
    hints = get_type_hints(cls)
    for key, value in given.items():
        if not _fits(value, hints[key]):
            wanted = " or ".join(_wanted(kind) for kind in get_args(hints[key]) or [hints[key]])
            if get_origin(hints[key]) is tuple:
                wanted = _wanted(hints[key])
            raise SpecError(f"{cls.card.name}: {key}={written(value)} does not fit; {key} takes {wanted}")


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = get_origin(hint), get_args(hint)
    if kind is tuple:
        return isinstance(value, tuple) and all(_fits(v, inner[0]) for v in value)
    if kind in (Union, UnionType):
        return any(_fits(value, h) for h in inner)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _wanted(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return f"{_wanted(get_args(hint)[0]).removeprefix('a ')}s joined by +"
    return WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _budget_text(budget: Budget, default: Any) -> list[str]:
    if isinstance(budget, Remove):
        inflect = [f"inflect={written(budget.inflect)}"] if budget.inflect else []
        return [f"r={_amount(budget.r)}", *inflect]
    if isinstance(budget, KeepRatio):
        base = default if isinstance(default, KeepRatio) else KeepRatio()
        extra = [f"{k}={getattr(budget, k)}" for k in ("of", "rounding") if getattr(budget, k) != getattr(base, k)]
        return [f"keep={_amount(budget.ratio)}", *extra]
    keys = [key for key, kind in AMOUNTS.items() if type(budget) is kind]  # none: a method's own, its default
    return [f"{key}={_amount(getattr(budget, fields(budget)[0].name))}" for key in keys]


def _amount(value: Any) -> str:
    """A budget's number or list of numbers; a list of one keeps its +, for it means something else than the number."""
    return written(value) + ("+" if isinstance(value, tuple) and len(value) == 1 else "")


def value_of(form: str) -> Any:
    """The value a piece of text stands for: a number, a truth value, none, a list joined by +, else the text."""
    if form == "+":
        return ()
    if "+" in form.lstrip("+"):
        return tuple(value_of(part) for part in form.removesuffix("+").split("+"))
    low = form.lower()
    if low in ("true", "false"):
        return low == "true"
    if low == "none":
        return None
    for kind in (int, float):
        try:
            return kind(form)
        except ValueError:
            continue
    return form


def written(value: Any) -> str:
    """The text `value_of` turns back into this value; a place is written by its name."""
    if isinstance(value, tuple):
        return "+".join(map(written, value)) or "+"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, Site):
        return next(name for name, site in SITES.items() if site is value)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
