"""A decoder reads a prompt while tokens leave between its blocks: the pass, and what its attention must know."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cache import Arrivals, Waiting
from .core import Hard, Plan, Reducer, Seen, Signals, Site, Tokens
from .core.attention import full_precision, masked_attention
from .core.place import Place
from .core.visual import looks
from .hosts import Call
from .passes import Pass, check_causal

if TYPE_CHECKING:
    from .cache import ReducedLayer
    from .session import Session


class Reading(Pass):
    """A pass of several tokens over a decoder. The last token of each sample stays whatever a method says: the next
    one is predicted from it. Layers behind a plan store only the rows that reach them, at their own positions."""

    causal = True

    def __init__(
        self, session: Session, x: Tensor, layers: list[ReducedLayer], valid: Tensor | None, at_rope: Tensor | None
    ) -> None:
        super().__init__(session, x, valid=valid)
        self.layers, self.at_rope = layers, at_rope
        self.start = layers[0].length if layers else 0

    def leaving(self, reducer: Reducer, plan: Plan, x: Tensor, layer: int) -> None:
        """What a reviving method drops behind a block waits before the next one."""
        check_causal(plan)
        if not reducer.revives or not self.layers or layer + 1 == len(self.layers) or not isinstance(plan, Hard):
            return
        gone = plan.row < 0
        if self.tokens.valid is not None:
            gone = gone & self.tokens.valid
        place = self.tokens.place()
        at_rope = self.start + place if self.at_rope is None else self.at_rope.expand(len(place), -1).gather(-1, place)
        fresh = Waiting(x, (self.start + place).masked_fill(~gone, -1), at_rope).split(gone)[0]
        old = self.layers[layer + 1].waiting
        self.layers[layer + 1].waiting = fresh if old is None else old.joined(fresh)

    def opening(self, tokens: Tokens) -> Tokens:
        return tokens.protect(tokens.last)

    def _all_stay(self, reducer: Reducer, tokens: Tokens, place: Place) -> bool:
        return looks(reducer) or super()._all_stay(reducer, tokens, place)  # no visual rows here

    def call(self, layer: int) -> Call:
        call = super().call(layer)
        call.bias = None  # who sees whom is settled in `bias` and by the cache
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
        if self.layers:
            for slot in self.host.slots(layer):  # type: ignore[attr-defined]
                self.layers[slot].arriving = Arrivals(place, valid, self.first.n)
            return full
        if full is not None:
            full = full.gather(3, place[:, None, None, :].expand(-1, full.shape[1], place.shape[1], -1))
        if valid is None:
            return full
        if full is None:
            n = place.shape[1]
            full = torch.ones(n, n, dtype=torch.bool, device=place.device).tril()[None, None]
        return hidden(full, ~valid[:, None, None, :])


class Revival:
    """A step of one token through a decoder whose prompt was read with methods that revive. Implements the hosts'
    Visit.

    At each of its blocks such a method chooses anew, among the rows that took part there, who takes part further on.
    Tokens chosen for a layer they never reached are computed on from where they were dropped, once, together with the
    new token. Reads one number per choice (how many come back), as shapes depend on it.
    """

    def __init__(self, session: Session, x: Tensor, layers: list[ReducedLayer], given: Tensor | None) -> None:
        self.session, self.layers, self.given = session, layers, given
        self.start = layers[0].length
        self.place = torch.full((len(x), 1), self.start, device=x.device)
        self.back: Waiting | None = None  # who comes along besides the new token
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
        return Call(watch=self.session.watches(layer), whole=True)

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
            rotary = self.session.rotary(layer)  # type: ignore[attr-defined]
            mine = rotary.tables(self.back.at_rope, tables[0].dtype)
            moved["position_embeddings"] = tuple(
                torch.cat([m, t.expand(b, -1, -1)], 1) for m, t in zip(mine, tables, strict=True)
            )
        return moved

    def splits(self, layer: int) -> bool:
        return False

    def mid(self, layer: int, x: Tensor, call: Call) -> Tensor:
        return x

    def after(self, layer: int, x: Tensor, call: Call) -> Tensor:
        for method, stage, stages in self.session.acting(Site.AFTER_BLOCK, layer):
            reducer = self.session.methods[method]
            if reducer.revives and call.seen is not None and call.where is not None and layer + 1 < len(self.layers):
                x = self._choose(reducer, layer, stage, stages, x, call.seen, call.where)
        return x if layer + 1 < len(self.layers) else x[:, -1:]

    def fork(self) -> Revival:
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
            plan = reducer.plan(Signals(x, tokens, place, replace(seen, bias=_only(seen.bias, valid))), tokens)
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


def _only(bias: Tensor | None, valid: Tensor) -> Tensor:
    """A bias, or none, with all but some keys hidden. valid: (B, S)."""
    gone = ~valid[:, None, None, :]
    return ~gone if bias is None else hidden(bias, gone)


def added(gate: Tensor, mask: Tensor | None, queries: int, rows: int) -> Tensor:
    """Additive logits and a mask, bool or additive, or none for causal attention, as one additive float32 mask."""
    low = torch.finfo(torch.float32).min
    if mask is None:
        ahead = torch.ones(queries, rows, dtype=torch.bool, device=gate.device).triu(rows - queries + 1)
        return gate.masked_fill(ahead, low)
    return gate.masked_fill(~mask, low) if mask.dtype == torch.bool else (gate + mask).clamp_min(low)


def hidden(mask: Tensor, gone: Tensor) -> Tensor:
    """A mask, bool (True = visible) or additive, that hides more. gone: bool, broadcastable, True = out of sight."""
    return mask.masked_fill(gone, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def watched(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, whole: bool) -> Seen:
    """What a method sees of a block's attention: the rows of this pass, as if they were alone; whole: the last query
    and all cached rows."""
    if whole:
        return Seen(q[:, :, -1:], k, v, scale, None if mask is None else mask[:, :, -1:])
    m = q.shape[2]
    mask = None if mask is None else mask[..., k.shape[2] - m :]
    return Seen(q, k[:, :, -m:], v[:, :, -m:], scale, mask, causal=mask is None)


def trained_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, call: Call
) -> tuple[Tensor, None]:
    """Causal attention under a learned mask, as attention modules of transformers return it: (B, N, H, d).

    Raises   ValueError where earlier rows are cached: the training form has one pass over everything.
    """
    n, s = q.shape[2], k.shape[2]
    if n != s or call.policy is None:
        raise ValueError(
            f"the training form of a method reads everything in one pass, here {n} tokens with {s - n} already cached; "
            "call the model with use_cache=False, or model.eval()"
        )
    low: Any = torch.finfo(torch.float32).min
    if mask is None:
        bias = torch.full((n, n), low, device=q.device).triu(1)[None, None]
    elif mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, device=q.device).masked_fill(~mask, low)
    else:
        bias = mask.float()
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return masked_attention(q, k, v, scale, bias, call.policy, call.eps).transpose(1, 2), None
