"""A decoder reads a prompt while tokens leave between its blocks: the pass, and what its attention must know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core import Hard, Plan, Reducer, Tokens
from ...core.masks import hidden
from ...core.place import Place
from ...core.visual import acts_on_visual_rows
from ...hosts import Call, DecoderHost
from ..kv.state import Arrivals, Parked
from .blocks import BlockSite, Pass
from .scan import check_causal

if TYPE_CHECKING:
    from ..kv.layer import ReducedLayer


class DecoderPrefill(Pass):
    """A pass of several tokens over a decoder. The last token of each sample stays whatever a method says: the next
    one is predicted from it. Layers behind a plan store only the rows that reach them, at their own positions."""

    def __init__(
        self, site: BlockSite, x: Tensor, at: Mapping[int, ReducedLayer], valid: Tensor | None, at_rope: Tensor | None,
        front: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(site, x, valid=valid, front=front)
        self.at, self.at_rope = at, at_rope  # what blocks keep of keys and values; nothing without a cache
        self.start = next(iter(at.values())).length if at else 0

    @property
    def decoder(self) -> DecoderHost:
        assert isinstance(self.host, DecoderHost)
        return self.host

    def leaving(self, reducer: Reducer, plan: Plan, x: Tensor, layer: int) -> None:
        """What a reviving method drops behind a block waits before the next one."""
        check_causal(plan)
        next_one = self.at.get(layer + 1)
        if not reducer.revives or next_one is None or not isinstance(plan, Hard):
            return
        gone = plan.row < 0
        if self.tokens.valid is not None:
            gone = gone & self.tokens.valid
        place = self.tokens.place()
        at_rope = self.start + place if self.at_rope is None else self.at_rope.expand(len(place), -1).gather(-1, place)
        fresh = Parked(x, (self.start + place).masked_fill(~gone, -1), at_rope).split(gone)[0]
        next_one.waiting = fresh if next_one.waiting is None else next_one.waiting.joined(fresh)

    def opening(self, tokens: Tokens) -> Tokens:
        return tokens.protect(tokens.last)

    def _all_stay(self, reducer: Reducer, tokens: Tokens, place: Place) -> bool:
        return acts_on_visual_rows(reducer) or super()._all_stay(reducer, tokens, place)  # no visual rows here

    def call(self, layer: int) -> Call:
        call = super().call(layer)
        call.bias = call.fit = call.came = None  # who sees whom is settled in `bias` and by the cache
        return call

    def bias(self, layer: int, full: Tensor | None) -> Tensor | None:
        """The model's mask for the queries that are left, over all keys where a cache maps them to its rows."""
        if not self.steps:
            return full
        place, valid = self.tokens.place(), self.tokens.valid
        if full is not None:
            index = place[:, None, :, None]
            full = full.expand(place.shape[0], -1, -1, -1)
            full = full.gather(2, index.expand(-1, full.shape[1], -1, full.shape[-1]))
        if self.at:
            for slot in self.decoder.slots(layer):
                if slot in self.at:
                    self.at[slot].arriving = Arrivals(place, valid, self.first.n)
            return full
        if full is not None:
            full = full.gather(3, place[:, None, None, :].expand(-1, full.shape[1], place.shape[1], -1))
        if valid is None:
            return full
        if full is None:
            n = place.shape[1]
            full = torch.ones(n, n, dtype=torch.bool, device=place.device).tril()[None, None]
        return hidden(full, ~valid[:, None, None, :])
