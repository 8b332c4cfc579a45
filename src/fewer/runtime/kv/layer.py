"""The cache layer a session puts into a transformers cache: it may hold fewer rows than it has seen.

Logical length, rows seen, is what `get_seq_length` and `get_mask_sizes` report, so positions and masks of the model
stay right. Stored length is what memory holds. `mask` maps the model's mask from one to the other.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from ...core import Hard
from ...core.cache.quantised import Codec, Codes
from ...core.plan import take
from ...core.ragged import Packing
from ...core.rope import Rotary
from .state import SPARE, Access, Arrivals, CacheError, GrowthBuffer, Parked, Record


def _nobody() -> None:
    """The owner of a cache that was read from a file."""


class ReducedLayer(DynamicLayer):
    """One layer's keys and values, some of them gone.

    The rows are the P that survived the last eviction, then those that came since. `position` (B, 1 or G, P), int32,
    says where the first ones stood in the input (-1: a hole); None while nothing was evicted. They ascend, but for
    methods that take them in any order: then a token written may lie where the one it displaced lay (`shuffled`).
    Where heads or samples keep different numbers, the survivors lie packed, head after head, and `keys`, `values` hold
    only what came since.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, owner: object, window: int | None = None) -> None:
        super().__init__()
        self.owner = weakref.ref(owner)
        self.is_sliding = window is not None
        self.window = window
        self.record = Record()
        self.arriving: Arrivals | None = None  # set by the session for one pass, where not all of its tokens come
        self.access: Access | None = None  # the same: it will see this layer's attention, and what it may do
        self._clear()

    def __getstate__(self) -> dict[str, Any]:
        """Without the session it was reduced by, which does not travel: what is read back belongs to nobody."""
        return {**vars(self), "owner": _nobody, "access": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> ReducedLayer:
        """A copy in the same process goes on with the same session."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def _clear(self) -> None:
        self.length = 0
        self.began = 0  # tokens seen before the pass under way
        self.waiting: Parked | None = None  # tokens that were dropped before they reached this layer
        self.shift: Tensor | None = None  # (B,) by how much later tokens stand nearer than their number says
        self.holes = False  # whether some rows of a view are padding, besides those of ragged heads
        self.shuffled = False  # whether the rows lie in another order than they came
        self.position: Tensor | None = None
        self.rotated_by: Tensor | None = None  # (B, 1 or G, P): by how much a row was rotated on from its position
        self.received: Tensor | None = None
        self.packing: Packing | None = None
        self.packed: tuple[Tensor, Tensor] | None = None
        self.room: GrowthBuffer | None = None
        self.totals: list[int] = []  # real tokens seen, per sample
        self.memory: dict[int, dict[str, Any]] = {}  # of each method, by logical tokens: see CacheSignals
        self.local: dict[int, dict[str, Any]] = {}  # of each method, by stored rows
        self.codes: list[Codes] = []  # the oldest rows in few bits, where a method stores them so: see `encode`
        self.coded = 0  # how many rows at the front are in the codes alone; none of them during a pass

    @classmethod
    def adopt(cls, layer: DynamicLayer, owner: object) -> ReducedLayer:
        """A layer of an ordinary dynamic cache, with what it holds."""
        new = cls(owner, layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None)
        if layer.is_initialized and layer.keys is not None and layer.values is not None and layer.keys.numel():
            new.lazy_initialization(layer.keys, layer.values)
            new.keys, new.values = layer.keys, layer.values
            new.length = layer.get_seq_length()
            new.totals = [new.length] * layer.keys.shape[0]
        return new

    def slide(self, window: int) -> None:
        """Be a layer that sees the latest tokens only, if not one already."""
        if self.window is None and not self.reduced:
            self.is_sliding, self.window = True, window
            if self.length:
                self._trim()

    # -- what the model asks ------------------------------------------------------------------------------------------
    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` takes the newest tokens back. Rows that went before they came stay away, as they should."""
        return not self.is_sliding

    @property
    def reduced(self) -> bool:
        """Whether rows are missing."""
        return self.position is not None

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = self._offset(self.length)
        return self.length - offset + query_length, offset

    def _offset(self, length: int) -> int:
        """First logical position a mask speaks of, before a pass, when `length` tokens were seen."""
        return 0 if self.window is None else max(length - self.window + 1, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; returns all rows, (B, G, S, d). Holes of ragged heads are zero: `mask` hides them."""
        if self.access is None and self.reduced:
            raise CacheError(
                "this cache was reduced by a session that is not on this model any more: its rows do not stand where "
                "the model's mask expects them. Start a new cache, or keep the session until the generation is over"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._decode()
        if key_states.shape[-2] > 1:
            self._arrange()
        self.began = self.length
        if self.arriving is None:
            self.length += key_states.shape[-2]
        else:
            self._arrive(self.arriving)
        self._append(key_states, value_states)
        if self.headwise(key_states.shape[-2]):
            return key_states, value_states
        rows = self.view()
        if self.access is None:
            self._trim()
        return rows

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """New rows behind the others. While tokens come one by one, with some room for the next ones: where no row
        will go, or where the one that goes makes place for the new one."""
        spare = min(SPARE[0], self.keys.shape[-2] // SPARE[1]) if self.keys.dim() == 4 else 0
        access = self.access or Access()
        loose = access.unordered and self.packing is None and not self.holes and len(set(self.totals)) == 1
        if (
            not ((access.steady or loose) and spare and keys.shape[-2] == 1)
            or self.window is not None
            or torch.is_grad_enabled()
        ):
            self.keys, self.values = torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
            return
        if self.room is None or not self.room.holds(self.keys):
            self.room = GrowthBuffer(self.keys, self.values, spare)
        self.keys, self.values = self.room.add(keys, values)

    def headwise(self, queries: int) -> bool:
        """Whether `attention` reads the rows of this pass where they lie, so that no view of them is needed."""
        apart = self.access is not None and self.access.headwise
        return apart and self.packing is not None and queries == 1 and self.keys.device.type == "cpu"

    def attention(self, q: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """One query over heads of different lengths, none of them padded. q: (B, H, 1, d), mask: the model's own.

        Returns (B, 1, H, d), the order of an attention function of transformers.
        """
        assert self.packing is not None and self.packed is not None
        b, g = self.keys.shape[:2]
        mapped = None if mask is None else self.mask(mask, g, 1)
        if mapped is not None:
            mapped = mapped.expand(b, g, 1, -1).flatten(0, 1)
        late = (self.keys.flatten(0, 1), self.values.flatten(0, 1))
        out = self.packing.read(q.unflatten(1, (g, -1)).flatten(0, 1)[:, :, 0], self.packed, late, scale, mapped)
        return out.view(b, 1, q.shape[1], -1)

    def _arrive(self, new: Arrivals) -> None:
        """Rows come, not all tokens of the pass: write down where they stand."""
        b = new.place.shape[0]
        earlier = self.positions().expand(b, -1, -1) if self.length else new.place[:, None, :0]
        if self.packing is not None:
            (self.keys, self.values), self.packing, self.packed, self.holes = self.view(), None, None, True
        came = (self.length + new.place)[:, None]
        if new.valid is not None:
            came, self.holes = came.masked_fill(~new.valid[:, None], -1), True
        self.position = torch.cat([earlier, came.expand(-1, earlier.shape[1], -1)], -1).to(torch.int32)
        self.length += new.total

    # -- few bits -----------------------------------------------------------------------------------------------------
    def encode(self, codec: Codec, real: Tensor | None) -> None:
        """Store all rows but the newest ones in few bits, until the next pass. real: (B, 1 or G, S) bool, see Codes.

        All samples are coded together, or one by one where more padding stands before some than before others: groups
        count from a sample's first token, so that it is coded as if it were alone.
        """
        b, _, s, _ = self.keys.shape
        apart = self.holes and b > 1 and s - codec.window >= codec.group  # some groups would run over holes
        if self.packing is not None or apart:
            raise CacheError(
                "heads or samples that keep different numbers of rows cannot be stored in few bits; choose a method "
                "that evicts evenly (snapkv, not adakv), and prompts of one length"
            )
        if not self.codes:
            first = [0 if self.position is not None else self.length - t for t in self.totals]
            alike = len(set(first)) == 1
            self.codes = [
                Codes.empty(codec, k, n) for k, n in zip(self.keys.split(b if alike else 1), first, strict=False)
            ]
        for codes, part in self._coded():
            start = codes.first + codes.rows
            stop = start + max(s - codec.window - start, 0) // codec.group * codec.group
            if stop > start:
                shown = None if real is None else real.expand(b, -1, -1)[part, :, start:stop]
                codes.append(self.keys[part, :, start:stop], self.values[part, :, start:stop], shown)
        self._leave_coded()

    def _coded(self) -> list[tuple[Codes, slice]]:
        """The codes and the samples they hold."""
        alone = len(self.codes) > 1
        return [(codes, slice(i, i + 1) if alone else slice(None)) for i, codes in enumerate(self.codes)]

    def _leave_coded(self) -> None:
        """Rows that are in the codes of all samples are held nowhere else."""
        self.coded = min((c.first + c.rows for c in self.codes), default=0)
        if self.coded:
            self.keys, self.values = self.keys[:, :, self.coded :].clone(), self.values[:, :, self.coded :].clone()

    def _decode(self) -> None:
        """All rows stand in `keys` and `values` again; those of padding as zeros."""
        if self.coded:
            keys, values = (F.pad(x, (0, 0, self.coded, 0)) for x in (self.keys, self.values))
            for codes, part in self._coded():
                where = slice(codes.first, codes.first + codes.rows)
                keys[part, :, where], values[part, :, where] = codes.decode()
            self.keys, self.values, self.coded = keys, values, 0

    # -- what the session asks ----------------------------------------------------------------------------------------
    @property
    def evicted_width(self) -> int:
        """P, the columns of a view that `position` speaks of."""
        return 0 if self.position is None else self.position.shape[-1]

    def positions(self) -> Tensor:
        """(B, 1 or G, S) long: the input position of each row of a view, -1 for holes; (1, 1, S) if nothing is gone."""
        tail = self.keys.shape[-2] - (0 if self.packing is not None else self.evicted_width)
        late = torch.arange(self.length - tail, self.length, device=self.keys.device)
        if self.position is None:
            return late[None, None]
        return torch.cat([self.position.long(), late.expand(*self.position.shape[:2], -1)], -1)

    def coming(self, tokens: int, device: torch.device) -> Tensor:
        """Where the rows of a view will stand once `update` is given `tokens` more: (B or 1, 1 or G, S) long, counted
        as a mask counts its keys; below zero = out of sight."""
        self._decode()
        if tokens > 1:
            self._arrange()
        new = torch.arange(self.length, self.length + tokens, device=device)[None, None]
        if self.arriving is not None:
            new = (self.length + self.arriving.place)[:, None]
            if self.arriving.valid is not None:
                new = new.masked_fill(~self.arriving.valid[:, None], -1)
        if self.length:
            earlier = self.positions()
            b, g = max(len(earlier), len(new)), earlier.shape[1]
            new = torch.cat([earlier.expand(b, -1, -1), new.expand(b, g, -1)], -1)
        return new - self._offset(self.length)

    @property
    def gappy(self) -> bool:
        """Whether rows of a view may be out of sight though its mask does not say so: holes, what left a window."""
        arrives = self.arriving is not None and self.arriving.valid is not None
        return self.packing is not None or self.holes or self.is_sliding or arrives

    def mask(self, mask: Tensor | None, heads: int, queries: int) -> Tensor | None:
        """The model's mask over logical positions, over the stored rows instead.

        mask: (B or 1, 1, Q, logical), bool or additive, or None. heads: query heads. Returns (B, 1 or H, Q, S) or None.
        """
        if self.position is None:
            return mask
        ragged = self.packing is not None or self.holes
        if mask is None and not ragged:
            return None
        place = self.positions()
        if mask is None:
            mapped = (place >= 0)[:, :, None, :].expand(-1, -1, queries, -1)
            if queries > 1:
                mapped = mapped & (place[:, :, None, :] <= place[:, :, -queries:, None])
        else:
            place = place - self._offset(self.began)
            mapped = self._at(place, mask, queries)
            if ragged or self.is_sliding:
                gone = (place < 0)[:, :, None, :]
                low = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
                mapped = mapped.masked_fill(gone, low)
        g = mapped.shape[1]
        return mapped if g == 1 else mapped.repeat_interleave(heads // g, dim=1)

    @staticmethod
    def _at(place: Tensor, x: Tensor, queries: int) -> Tensor:
        """The entries of some keys. place: (B, G, S); x: (B or 1, 1 or G, Q, keys)."""
        b, g, s = place.shape
        index = place.clamp(min=0)[:, :, None, :].expand(b, g, queries, s)
        return x.expand(b, g, queries, x.shape[-1]).gather(-1, index)

    def fit(self, x: Any, queries: int) -> Any:
        """Something else that attention is told of each pair of a query and a logical key, such as a position bias, of
        the stored rows instead. x: (B or 1, 1 or H, Q, logical); anything else is as it was."""
        logical = self.length - self._offset(self.began)
        if self.position is None or not isinstance(x, Tensor) or x.dim() != 4 or x.shape[-2:] != (queries, logical):
            return x
        place = self.positions() - self._offset(self.began)
        return self._at(place.repeat_interleave(max(x.shape[1] // place.shape[1], 1), 1), x, queries)

    def keep(self, plan: Hard, keys: Tensor, values: Tensor) -> None:
        """Execute a plan on the rows of a view, as `update` returned it. Ragged plans read their lengths: one sync."""
        self.local.clear()
        self.codes = []  # rows are not where they were coded: they are coded anew
        b, g = keys.shape[:2]
        place = self.positions()
        heads = max(place.shape[1], plan.lead[1])
        index, lengths = plan.position.expand(b, heads, -1), None
        place = take(place.expand(b, heads, -1), index)
        rotated_by = self._rotated_by(keys.shape[-2])
        if plan.lengths is not None:
            lengths = plan.lengths.expand(b, g).reshape(-1).tolist()
            if len(set(lengths)) == 1:
                index, place, lengths = index[..., : lengths[0]], place[..., : lengths[0]], None
            else:
                assert plan.valid is not None
                place = place.masked_fill(~plan.valid, -1)
        if rotated_by is not None:
            self.rotated_by = take(rotated_by.expand(b, heads, -1), index)
        full = index.expand(b, g, -1)
        if self.received is not None:
            self.received = take(self.received, full)
        if plan.averages:  # rows may be folded into those that stay
            keys, values = (plan.reduce(x)[:, :, : index.shape[-1]] for x in (keys, values))
        else:
            keys, values = take(keys, full), take(values, full)
        self.position = place.to(torch.int32)
        if lengths is None:
            self.packing = self.packed = None
            self.keys, self.values = keys, values
        else:
            self.packing = Packing(lengths, index.shape[-1], keys.device)
            k, v = (self.packing.pack(x.flatten(0, 1))[0] for x in (keys, values))
            self.packed = k, v
            self.keys, self.values = keys[:, :, :0].clone(), values[:, :, :0].clone()

    def replaces(self, keys: Tensor) -> bool:
        """Whether the newest of these rows, as `update` returned them, may take the place of one that goes."""
        loose = self.access is not None and self.access.unordered
        return loose and keys is self.keys and self.room is not None and keys is self.room.keys

    def replace(self, gone: Tensor) -> None:
        """The newest row takes the place of another, and nothing else moves. gone: (B, 1 or G, 1) long, which."""
        assert self.room is not None
        self.local.clear()
        b, g = self.keys.shape[:2]
        place = self.positions()
        heads = max(place.shape[1], gone.shape[1])
        place, own = place.expand(b, heads, -1), gone.expand(b, heads, 1)
        rotated_by = self._rotated_by(place.shape[-1])
        if rotated_by is not None:
            self.rotated_by = rotated_by.expand(b, heads, -1).scatter(-1, own, 0)[..., :-1]
        self.position = place.to(torch.int32).scatter(-1, own, self.length - 1)[..., :-1]
        gone = gone.expand(b, g, 1)
        if self.received is not None:
            self.received = self.received.scatter(-1, gone, self.received[..., -1:])[..., :-1]
        self.keys, self.values = self.room.replace(gone)
        self.shuffled = True

    def _arrange(self) -> None:
        """The rows in the order they came, where they lie in another."""
        if self.shuffled:
            order = self.positions().argsort(dim=-1)
            self.keep(Hard(order.shape[-1], order), self.keys, self.values)
            self.shuffled = False

    def _rotated_by(self, rows: int) -> Tensor | None:
        if self.rotated_by is None:
            return None
        return F.pad(self.rotated_by, (0, rows - self.rotated_by.shape[-1]))

    def rerotate(self, rotary: Rotary, rows: int, where: Tensor | None = None) -> None:
        """Turn the first `rows` rows of each head on, so that they stand right before the others: no gap is left.

        where: (B, 1 or G, 1) bool, heads in which there is one; None = all.
        """
        if self.position is None:
            return
        lead = self.position[..., :rows].long()
        real = lead >= 0
        held = (self.position >= 0).sum(-1, keepdim=True)
        came = self.length - (self.keys.shape[-2] - (0 if self.packing is not None else self.evicted_width))
        target = came - held + torch.arange(lead.shape[-1], device=lead.device)
        rotated_by = torch.zeros_like(self.position, dtype=torch.long) if self.rotated_by is None else self.rotated_by
        by = (target - lead - rotated_by[..., : lead.shape[-1]]).masked_fill(
            ~(real if where is None else real & where), 0
        )
        self.rotated_by = torch.cat([rotated_by[..., : lead.shape[-1]] + by, rotated_by[..., lead.shape[-1] :]], -1)
        if self.packing is None:
            self.keys[:, :, : lead.shape[-1]] = rotary.turn(self.keys[:, :, : lead.shape[-1]], by)
        else:
            assert self.packed is not None
            b, g = self.keys.shape[:2]
            keys = self.packing.pad(self.packed[0][None]).unflatten(0, (b, g))
            keys[:, :, : lead.shape[-1]] = rotary.turn(keys[:, :, : lead.shape[-1]], by.expand(b, g, -1))
            self.packed = (self.packing.pack(keys.flatten(0, 1))[0], self.packed[1])

    def settle(self) -> None:
        """The end of this layer's part of a pass: rows that left the window go, and the record is written."""
        self.access = None
        self.arriving = None
        self._trim()
        self._note()

    def _trim(self) -> None:
        """A sliding layer holds no more than its window can see."""
        if self.window is None or self.holes or self.keys.shape[-2] <= self.window - 1:
            return  # rows behind holes cannot be told apart by their number: masks hide what left the window
        self.local.clear()
        drop = self.keys.shape[-2] - self.window + 1
        self.keys, self.values = self.keys[:, :, drop:], self.values[:, :, drop:]
        if drop > 1:  # one row more while decoding is freed by the next step; a whole prompt must not stay
            self.keys, self.values = self.keys.clone(), self.values.clone()
        self.received = None if self.received is None else self.received[..., -self.keys.shape[-2] :]
        if self.position is None:
            return
        if self.packing is None:
            left = max(self.evicted_width - drop, 0)
        else:  # as many rows came since as the window holds: the packed ones are out of sight
            left, self.packing, self.packed = 0, None, None
        self.position = self.position[..., self.evicted_width - left :]
        self.rotated_by = None if self.rotated_by is None else self.rotated_by[..., self.rotated_by.shape[-1] - left :]

    def _note(self) -> None:
        if self.room is not None and self.room.keys is not self.keys:
            self.room = None  # its rows stand elsewhere now
        r, tensors = self.record, [self.keys, self.values, *(self.packed or ())]
        tensors += [x for codes in self.codes for x in codes.tensors()]
        b, g, tail, _ = self.keys.shape
        tail += self.coded
        r.logical, r.heads = self.length, (b, g)
        r.bytes = sum(x.untyped_storage().nbytes() for x in tensors)
        r.peak = max(r.peak, r.bytes)
        r.stored = tail + (0 if self.packing is None else sum(self.packing.lengths) / (b * g))
        seen = self.length if self.window is None else min(self.length, self.window - 1)
        r.full = b * g * seen * (self.keys.shape[-1] + self.values.shape[-1]) * self.keys.element_size()
        r.kept, r.index_bytes = self.position, 0 if self.position is None else self.position.untyped_storage().nbytes()
        r.waiting_bytes = 0 if self.waiting is None else self.waiting.hidden.untyped_storage().nbytes()
        r.tail = (self.length - (tail if self.packing is not None else tail - self.evicted_width), self.length)

    # -- what generation does to a cache ------------------------------------------------------------------------------
    def reset(self) -> None:
        super().reset()
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, those of them that are still there. Negative, as everywhere in transformers."""
        if tokens_to_remove > 0:
            raise CacheError(f"crop({tokens_to_remove}): give the number of tokens to forget as a negative number")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        gone = min(-tokens_to_remove, self.length)
        self._decode()
        self._arrange()
        if self.window is not None and self.length >= self.window:
            raise CacheError("a sliding-window layer past its window cannot be cropped: what stood before it is gone")
        tail = self.keys.shape[-2] - (0 if self.packing is not None else self.evicted_width)
        if self.position is not None and gone > tail:
            place = self.positions()
            stays = (place < self.length - gone) & (place >= 0)
            order = (~stays).to(torch.int8).argsort(dim=-1, stable=True)
            self.keep(Hard(order.shape[-1], order, length=stays.sum(-1)), *self.view())
        else:
            cut = self.keys.shape[-2] - gone
            self.keys, self.values = self.keys[:, :, :cut].clone(), self.values[:, :, :cut].clone()
            self.received = None if self.received is None else self.received[..., :-gone]
        self.local.clear()
        self.memory = {
            m: {k: t[..., : self.length - gone, :] if isinstance(t, Tensor) else t for k, t in kept.items()}
            for m, kept in self.memory.items()
        }
        self.length -= gone
        self.waiting = None if self.waiting is None else self.waiting.before(self.length)
        self.totals = [max(t - gone, 0) for t in self.totals]
        held = self.keys.shape[-2]
        self.codes = [c if c.first + c.rows <= held else c.emptied() for c in self.codes]
        self._leave_coded()
        self._note()

    def view(self) -> tuple[Tensor, Tensor]:
        """All rows as one (B, G, S, d) each, without adding any."""
        if self.packing is None:
            return self.keys, self.values
        assert self.packed is not None
        b, g = self.keys.shape[:2]
        k, v = (self.packing.pad(x[None]).unflatten(0, (b, g)) for x in self.packed)
        return torch.cat([k, self.keys], -2), torch.cat([v, self.values], -2)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.length:
            self._select(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        """Samples in a new order, some more than once, some not at all. rows: (B',)."""
        if not self.length:
            return
        rows = rows.to(self.keys.device)
        g = self.keys.shape[1]
        if self.packing is not None or len(set(self.totals)) > 1:
            chosen: Sequence[int] = rows.tolist()
            self.totals = [self.totals[i] for i in chosen]
            if self.packing is not None:
                assert self.packed is not None
                lengths = self.packing.lengths
                sizes = [sum(lengths[i : i + g]) for i in range(0, len(lengths), g)]
                k, v = (torch.cat([x.split(sizes)[i] for i in chosen]) for x in self.packed)
                self.packed = k, v
                lengths = [n for i in chosen for n in lengths[i * g : (i + 1) * g]]
                self.packing = Packing(lengths, self.packing.width, self.keys.device)
        else:
            self.totals = self.totals[:1] * len(rows)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        if len(self.codes) == 1:
            self.codes[0].select(rows)
        elif self.codes:
            self.codes = [copy.copy(self.codes[i]) for i in rows.tolist()]
        for kept in (*self.memory.values(), *self.local.values()):
            kept.update({k: t.index_select(0, rows) for k, t in kept.items() if isinstance(t, Tensor)})
        self.waiting = None if self.waiting is None else self.waiting.of(rows)
        self.shift = None if self.shift is None else self.shift.index_select(0, rows)
        for name in ("position", "rotated_by", "received"):
            if (stream := getattr(self, name)) is not None:
                setattr(self, name, stream.index_select(0, rows))
        self._note()


class LayerBesideState(LinearAttentionLayer, ReducedLayer):  # type: ignore[misc, override]
    """The same for a block in which a mixer with a state of its own stands beside the attention (Falcon-H1, Zamba)."""

    def __init__(self, layer: Any, owner: object) -> None:
        ReducedLayer.__init__(self, owner, getattr(layer, "sliding_window", None))
        held = vars(self)
        held.update({name: value for name, value in vars(layer).items() if name not in held})

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return not self.is_sliding and super().is_croppable

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Keys and values come by place, what a state needs by name."""
        (ReducedLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        ReducedLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        ReducedLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, cast(torch.LongTensor, beam_idx))
        ReducedLayer.reorder_cache(self, beam_idx)


NOT_ALONE = {
    "DynamicIndexedLayer": "it keeps an index of its keys beside them, by which sparse attention (DSA) picks rows",
    "DummyLayer": "it has no keys and values of its own and reads those of another layer",
    **dict.fromkeys(
        ("DeepseekV4HCACache", "DeepseekV4CSACache"), "it keeps the keys of several tokens as one, compressed"
    ),
}


def install(cache: Any, which: Sequence[bool], owner: object) -> None:
    """Put reduced layers into a dynamic cache, in place: the generation loop holds it already.

    which: of each block, whether it keeps keys and values; other blocks keep their states as they are.
    Raises CacheError for every other kind of cache, and for one another session has reduced.
    """
    if type(cache) is not DynamicCache:
        kind = type(cache).__name__ if isinstance(cache, Cache) else f"{type(cache).__name__} (no transformers cache)"
        raise CacheError(
            f"a {kind} cannot be reduced: only a DynamicCache grows and shrinks. Pass DynamicCache(config=...), "
            "or call generate() without cache_implementation"
        )
    if cache.offloading:
        raise CacheError("an offloaded cache cannot be reduced: its rows move while it is used; pass offloading=False")
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, ReducedLayer):
            if layer.owner() is owner:
                continue
            if layer.reduced:
                raise CacheError(
                    "this cache was already reduced by another session; a method cannot judge rows that are gone. "
                    "Start a new cache for each session"
                )
            layer.owner = weakref.ref(owner)
        elif index >= len(which) or not which[index]:  # the config may count more blocks than there are
            continue
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            cache.layers[index] = ReducedLayer.adopt(cast(DynamicLayer, layer), owner)
        elif isinstance(layer, LinearAttentionLayer) and isinstance(layer, DynamicLayer):
            if layer.get_seq_length():
                raise CacheError(
                    "a cache of attention beside mixers cannot be taken over once it is filled: start a new one"
                )
            cache.layers[index] = LayerBesideState(layer, owner)
        else:
            kind = type(layer).__name__
            why = NOT_ALONE.get(kind, "only plain dynamic ones can")
            raise CacheError(f"a cache layer of type {kind} cannot be reduced: {why}")
    cache.layers.extend(ReducedLayer(owner) for _ in range(len(which) - len(cache.layers)))
