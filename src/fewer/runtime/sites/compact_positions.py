"""Rows numbered anew where visual ones have left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...hosts import Call

if TYPE_CHECKING:
    from ..kv.layer import ReducedLayer
    from ..session import Session


class CompactPositions:
    """A pass over text behind a prompt whose rows were renumbered: it stands nearer than its number says, in each layer
    by what was dropped before it. Implements the hosts' BlockRun."""

    def __init__(self, session: Session, layers: list[ReducedLayer]) -> None:
        self.session, self.layers = session, layers
        self.start = layers[0].length

    def before(self, layer: int, x: Tensor) -> Tensor:
        self.rows = x.shape[1]
        return x

    def call(self, layer: int) -> Call:
        return Call()

    def bias(self, layer: int, full: Tensor | None) -> Tensor | None:
        return full

    def streams(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        shift = self.layers[layer].shift
        if shift is None:
            return kwargs
        ids = kwargs.get("position_ids")
        ids = torch.arange(self.start, self.start + self.rows, device=shift.device)[None] if ids is None else ids
        return at_positions(self.session, layer, kwargs, ids - shift[:, None])

    def splits(self, layer: int) -> bool:
        return False

    def mid(self, layer: int, x: Tensor, call: Call) -> Tensor:
        return x

    def after(self, layer: int, x: Tensor, call: Call) -> Tensor:
        return x

    def fork(self) -> CompactPositions:
        return self


def at_positions(session: Session, layer: int, kwargs: dict[str, Any], at: Tensor) -> dict[str, Any]:
    """A block's arguments with its rows at other positions. at: (B, n) long."""
    tables = session.rotary(layer).tables(at, kwargs["position_embeddings"][0].dtype)  # type: ignore[attr-defined]
    return {**kwargs, "position_ids": at, "position_embeddings": tables}
