"""Rows numbered anew where visual ones have left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...hosts import DecoderHost, PlainRun

if TYPE_CHECKING:
    from ..kv.layer import ReducedLayer


class CompactPositions(PlainRun):
    """A pass over text behind a prompt whose rows were renumbered: it stands nearer than its number says, in each layer
    by what was dropped before it. Implements the hosts' BlockRun."""

    def __init__(self, host: DecoderHost, layers: list[ReducedLayer]) -> None:
        self.host, self.layers = host, layers
        self.start = layers[0].length

    def before(self, layer: int, x: Tensor) -> Tensor:
        self.rows = x.shape[1]
        return x

    def streams(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        shift = self.layers[layer].shift
        if shift is None:
            return kwargs
        ids = kwargs.get("position_ids")
        ids = torch.arange(self.start, self.start + self.rows, device=shift.device)[None] if ids is None else ids
        return at_positions(self.host, layer, kwargs, ids - shift[:, None])


def at_positions(host: DecoderHost, layer: int, kwargs: dict[str, Any], at: Tensor) -> dict[str, Any]:
    """A block's arguments with its rows at other positions. at: (B, n) long."""
    rotary = host.rotary(layer)
    assert rotary is not None, "a session numbers rows anew in models that rotate theirs"
    tables = rotary.tables(at, kwargs["position_embeddings"][0].dtype)
    return {**kwargs, "position_ids": at, "position_embeddings": tables}
