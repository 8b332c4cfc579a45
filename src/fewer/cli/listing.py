"""`fewer list`: all methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from .output import Json, as_json, grid, note

if TYPE_CHECKING:
    from fewer.core import Reducer


def command(json: Json = False) -> None:
    """All methods: what they do, what they need, where they come from."""
    import fewer

    found = fewer.registered()
    if json:
        as_json([{**asdict(cls.card), "name": name, "where": where(cls)} for name, cls in found.items()])
        return
    heads = ("method", "acts by", "training", "where", "paper", "what it does")
    cards = [(name, cls.card, where(cls)) for name, cls in found.items()]
    grid(heads, [(name, c.acts, c.training, at, c.paper, c.title) for name, c, at in cards])
    note("\nfewer show METHOD says more; fewer bench measures them.")


def where(cls: type[Reducer]) -> str:
    from fewer.core import Reducer, Site

    if isinstance(cls.site, Site) and not cls.site.in_blocks:
        return cls.site.value
    blocks = cls.layers if "layers" in cls.__dataclass_fields__ else None
    site = cls.site.value if hasattr(cls.site, "value") else "depends on the setting"
    every = "every block" if cls.acts_at is Reducer.acts_at else "blocks by depth"
    return f"{site}, {every}" if blocks is None else f"{site}, blocks {plus(blocks)}"


def plus(numbers: Sequence[int]) -> str:
    """Block numbers as the text form writes them; a run of them by its ends."""
    run = len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if run else "+".join(map(str, numbers))
