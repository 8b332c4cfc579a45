"""`fewer show`: one method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .listing import plus
from .output import ACCENT, Json, as_json, facts, grid, out, shown

if TYPE_CHECKING:
    from fewer.core import Reducer

TYPED = {"ratio": "keep", "value": "threshold", "share": "mass"}  # fields of budgets, as the text form calls them


def command(
    method: Annotated[str, typer.Argument(help="A method's name or text form.")], json: Json = False
) -> None:  # fmt: skip
    """One method: its paper, its parameters with their defaults, where it acts."""
    import fewer

    reducer = fewer.parse(method)
    cls, card = type(reducer), reducer.card
    code = f"session = fewer.apply(model, {fewer.text(reducer)!r})"
    known = [
        ("paper", card.paper), ("acts by", card.acts), ("on", card.on), ("training", card.training),
        ("where", reducer.site.value), *_sights(reducer),
    ]  # fmt: skip
    if json:
        parameters = [dict(zip(("name", "default", "meaning"), p, strict=True)) for p in _parameters(cls)]
        as_json({
            "name": card.name, "title": card.title, **dict(known), "parameters": parameters,
            "known limits": dict(card.exempt), "code": code,
        })  # fmt: skip
        return
    out.print(f"[bold {ACCENT}]{shown(card.name)}[/]  {shown(card.title)}\n")
    facts(known)
    out.print()
    grid(("parameter", "default", "what it is"), list(_parameters(cls)))
    for check, why in card.exempt.items():
        out.print(f"[dim]known limit[/] {shown(check)}: {shown(why)}")
    out.print(f"\n[bold]{shown(code)}[/]", soft_wrap=True)


def _sights(reducer: Reducer) -> list[tuple[str, str]]:
    """The blocks a method acts at; for methods on visual tokens, what its budget counts and what it looks at."""
    from fewer.core import VisualReducer

    facts = [] if not reducer.site.in_blocks else [("blocks", _blocks(reducer))]
    if isinstance(reducer, VisualReducer):
        facts.append(("budget of", "each image or video" if reducer.scope == "image" else "each prompt"))
        if reducer.looks_at:
            tower = ("the one whose output is used" if b is None else str(b) for b in reducer.looks_at)
            facts.append(("looks at", f"attention of the vision tower's blocks: {', '.join(tower)}"))
    return facts


def _blocks(reducer: Reducer) -> str:
    """Where a method acts: the blocks it names, or how it finds them."""
    from fewer.core import Reducer

    if reducer.layers is not None:
        return plus(reducer.layers)
    return "every" if type(reducer).acts_at is Reducer.acts_at else "by depth"


def _parameters(cls: type[Reducer]) -> list[tuple[str, str, str]]:
    """(name, default as one types it, what the class says about it) of each parameter."""
    from dataclasses import fields

    from fewer.studio.explained import explained

    _, said = explained(cls)
    return [(f.name, _typed(f.default), said.get(f.name, "")) for f in fields(cls)]


def _typed(value: Any) -> str:
    """A default as one types it."""
    from dataclasses import fields

    from fewer.core import Budget
    from fewer.spec import written

    if not isinstance(value, Budget):
        return written(value)
    return ", ".join(f"{TYPED.get(f.name, f.name)}={written(getattr(value, f.name))}" for f in fields(value))
