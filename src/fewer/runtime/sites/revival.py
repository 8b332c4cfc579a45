"""A decoding step in which dropped tokens may come back."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core import Reducer, Seen, Signals, Site, Tokens
from ...core.attention import full_precision
from ...core.masks import only
from ...core.place import Place
from ...hosts import Call, DecoderHost, PlainRun
from ..kv.state import Arrivals, Parked
from ..program import Bound

if TYPE_CHECKING:
    from ..kv.layer import ReducedLayer


class TokenRevival(PlainRun):
    """A step of one token through a decoder whose prompt was read with methods that revive. Implements the hosts'
    BlockRun.

    At each of its blocks such a method chooses anew, among the rows that took part there, who takes part further on.
    Tokens chosen for a layer they never reached are computed on from where they were dropped, once, together with the
    new token. Reads one number per choice (how many come back), as shapes depend on it.
    """

    def __init__(self, bound: Bound, x: Tensor, layers: list[ReducedLayer], given: Tensor | None) -> None:
        self.bound, self.program, self.layers, self.given = bound, bound.program, layers, given
        self.start = layers[0].length
        self.place = torch.full((len(x), 1), self.start, device=x.device)
        self.back: Parked | None = None  # who comes along besides the new token
        self.wanted: Tensor | None = None  # (B, logical) bool, who takes part from here on; None = all

    def before(self, layer: int, x: Tensor) -> Tensor:
        waiting = self.layers[layer].waiting
        if self.wanted is None or waiting is None:
            return x
        chosen = (waiting.place >= 0) & self.wanted.gather(-1, waiting.place.clamp(min=0))
        come, self.layers[layer].waiting = waiting.split(chosen)
        if come.place.shape[1] == 0:
            return x
        self.back = come if self.back is None else self.back.joined(come)
        return torch.cat([x[:, :-1], come.hidden.to(x.dtype), x[:, -1:]], 1)

    def call(self, layer: int) -> Call:
        return Call(watch=self.program.looks_on(layer), whole=True)

    def bias(self, layer: int, full: Tensor | None) -> Tensor | None:
        """Who sees whom over all logical positions: those who take part, not before their time."""
        place = self.rows()
        if self.back is not None:
            holes = place >= 0
            self.layers[layer].arriving = Arrivals(place - self.start, holes, 1)
        if self.wanted is None:
            return full
        seen = self.wanted
        if self.given is not None:
            seen = seen & (self.given != 0)
        where = torch.arange(self.start + 1, device=place.device)
        seen = seen[:, None, None] & (where <= place[:, None, :, None])
        window = self.layers[layer].window
        if window is not None:
            seen = (seen & (where > place[:, None, :, None] - window))[..., max(self.start - window + 1, 0) :]
        if full is not None and full.dtype != torch.bool:
            return torch.zeros(seen.shape, dtype=full.dtype, device=seen.device).masked_fill(
                ~seen, torch.finfo(full.dtype).min
            )
        return seen

    def rows(self) -> Tensor:
        """(B, R + 1): where the rows under way stand in the input; -1 = padding."""
        return self.place if self.back is None else torch.cat([self.back.place, self.place], 1)

    def streams(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self.back is None:
            return kwargs
        moved, b = dict(kwargs), len(self.place)
        if (ids := kwargs.get("position_ids")) is not None:
            moved["position_ids"] = torch.cat([self.back.at_rope, ids.expand(b, -1)], 1)
        if (tables := kwargs.get("position_embeddings")) is not None:
            assert isinstance(self.bound.host, DecoderHost)
            rotary = self.bound.host.rotary(layer)
            assert rotary is not None
            mine = rotary.tables(self.back.at_rope, tables[0].dtype)
            moved["position_embeddings"] = tuple(
                torch.cat([m, t.expand(b, -1, -1)], 1) for m, t in zip(mine, tables, strict=True)
            )
        return moved

    def after(self, layer: int, x: Tensor, call: Call) -> Tensor:
        for method, stage, stages in self.program.at(Site.AFTER_BLOCK, layer):
            reducer = self.program.methods[method]
            if reducer.revives and call.seen is not None and call.where is not None and layer + 1 < len(self.layers):
                x = self._choose(reducer, layer, stage, stages, x, call.seen, call.where)
        return x if layer + 1 < len(self.layers) else x[:, -1:]

    def fork(self) -> TokenRevival:
        """A copy, for running a block once more."""
        return copy.copy(self)

    def _choose(
        self, reducer: Reducer, layer: int, stage: int, stages: int, x: Tensor, seen: Seen, where: Tensor
    ) -> Tensor:
        """The method looks at the rows that took part in this layer and says which of them do in the next. where:
        (B or 1, 1, S), their places in the input. Rows a sliding layer cannot see are not judged: those that reached
        the next layer go on taking part."""
        b, rows = len(x), where[:, 0].expand(len(x), -1)
        valid = rows >= 0
        if self.wanted is not None:
            valid = valid & self.wanted.gather(-1, rows.clamp(min=0))
        if self.given is not None:
            valid = valid & (self.given != 0).gather(-1, rows.clamp(min=0))
        window, far = self.layers[layer].window, None
        if window is not None:
            valid = valid & (rows > self.start - window)
            far = self._far(layer, self.start - window, x.device)
        tokens = Tokens.plain(b, rows.shape[1], device=x.device, valid=valid)
        tokens = tokens.protect(tokens.last)
        real = valid.sum(-1)
        place = Place(layer, len(self.layers), stage, stages, rows.shape[1], starts=real)
        with full_precision(x):
            plan = reducer.plan(Signals(x, tokens, place, replace(seen, bias=only(seen.bias, valid))), tokens)
        kept = rows.gather(-1, plan.position)
        if plan.valid is not None:
            kept = kept.masked_fill(~plan.valid, self.start + 1)
        none = torch.zeros(b, self.start + 2, dtype=torch.bool, device=x.device)
        chosen = none.scatter(-1, kept.clamp(min=0), True)[:, :-1]
        self.wanted = chosen if far is None else chosen | far
        if self.back is not None:  # who came along and is not wanted further on waits again
            carried = replace(self.back, hidden=x[:, :-1])
            stays = (carried.place >= 0) & self.wanted.gather(-1, carried.place.clamp(min=0))
            come, left = carried.split(stays)
            old = self.layers[layer + 1].waiting
            self.layers[layer + 1].waiting = left if old is None else old.joined(left)
            self.back = come if come.place.shape[1] else None
            x = torch.cat([come.hidden, x[:, -1:]], 1)
        return x

    def _far(self, layer: int, edge: int, device: torch.device) -> Tensor:
        """(B, logical) bool: up to `edge`, who took part so far and does not wait in front of the next layer."""
        far = (torch.arange(self.start + 1, device=device) <= edge).expand(len(self.place), -1)
        if self.wanted is not None:
            far = far & self.wanted
        waiting = self.layers[layer + 1].waiting
        if waiting is None:
            return far
        where = torch.where(waiting.place < 0, self.start + 1, waiting.place)
        out = torch.zeros(len(far), self.start + 2, dtype=torch.bool, device=device).scatter(-1, where, True)
        return far & ~out[:, :-1]
