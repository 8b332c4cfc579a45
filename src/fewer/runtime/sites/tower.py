"""A look into the vision tower."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core import Seen
from ...hosts import Call


class TowerRecorder:
    """Looks at one block of the vision tower and changes nothing. Implements the hosts' BlockRun."""

    def __init__(self, seen: dict[int, Seen], outputs: dict[int, Tensor], attends: bool) -> None:
        self.seen, self.outputs, self.attends = seen, outputs, attends

    def before(self, layer: int, x: Tensor) -> Tensor:
        return x

    def call(self, layer: int) -> Call:
        return Call(watch=self.attends)

    def bias(self, layer: int, full: Tensor | None) -> Tensor | None:
        return full

    def streams(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs

    def splits(self, layer: int) -> bool:
        return False

    def mid(self, layer: int, x: Tensor, call: Call) -> Tensor:
        return x

    def after(self, layer: int, x: Tensor, call: Call) -> Tensor:
        if call.seen is not None:
            self.seen.setdefault(layer, call.seen)
        self.outputs.setdefault(layer, x)
        return x

    def fork(self) -> TowerRecorder:
        return self
