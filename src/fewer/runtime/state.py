"""What is remembered between passes, and for how long."""

from __future__ import annotations

from collections.abc import Hashable
from enum import Enum
from typing import Any


class Lifetime(Enum):
    """How long something is remembered."""

    PASS = "one forward pass"
    CALL = "one call of a pipeline, over all its denoising steps"
    SESSION = "as long as the session is on"


class State:
    """Notes by lifetime and by context: a block, a branch of guidance, a method."""

    def __init__(self) -> None:
        self._held: dict[Lifetime, dict[tuple[Hashable, ...], dict[str, Any]]] = {}

    def of(self, lifetime: Lifetime, *context: Hashable) -> dict[str, Any]:
        """The notes of a context, empty at first."""
        return self._held.setdefault(lifetime, {}).setdefault(context, {})

    def end(self, lifetime: Lifetime) -> None:
        """What lived so long is forgotten."""
        self._held.pop(lifetime, None)
