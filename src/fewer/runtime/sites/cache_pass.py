"""One forward pass over one KV cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...core import Hard, Reducer, Seen, Site
from ...core.attention import full_precision
from ...core.cache import Attending, CacheReducer, CacheSignals, Ranker, Rereader, Rows, attended
from ...core.masks import added
from ...core.place import Place
from ...core.plan import take
from ...hosts import BlockRun, Call, HostError, under
from ...hosts.logical import Unbanded, at_rows
from ...hosts.written_out import entered
from ...spec import text
from ..kv.attention import trained_attention, watched
from ..kv.layer import ReducedLayer
from ..kv.state import CacheError
from ..program import SessionError
from .prefill import DecoderPrefill

if TYPE_CHECKING:
    from .kv_cache import CacheSession
    from .visual_context import VisualContext


class CacheRun:
    """One forward pass over one cache. Implements the hosts' BlockRun."""

    def __init__(self, session: CacheSession, cache: Any, mask: Tensor | None, positions: Tensor | None) -> None:
        self.session, self.cache, self.given = session, cache, mask
        held = enumerate([] if cache is None else cache.layers)  # states of blocks without attention stand between
        self.at: dict[int, ReducedLayer] = {i: layer for i, layer in held if isinstance(layer, ReducedLayer)}
        self.layers = list(self.at.values())
        self.reading: DecoderPrefill | None = None  # the tokens' way through the blocks, where methods act there
        self.sight: VisualContext | None = None  # the visual rows among them
        self.visit: BlockRun | None = None  # the same behind a prompt: dropped tokens may come back, or moved together
        self.position_ids = positions
        self.fresh = cache is not None and cache.get_seq_length() == 0
        self.entry: Tensor | None = None  # (B, Q, C), what entered the first block, where a method wants it
        self.memory: dict[int, dict[str, Any]] = {}  # of each method, where no cache keeps it
        self.attending: Attending | None = None  # the call under way, where a method wants it
        self._padded: bool | None = None
        self._totals: list[int] = []
        for layer in self.layers:
            layer.expected, layer.steady, layer.apart = True, session.steady, session.apart
            layer.loose = session.loose
        self.weighs = session.weighs and not torch.is_grad_enabled()
        # Behind a cache only a training step has the training form: generation takes the other, whatever the mode.
        self.training = session.training and (cache is None or torch.is_grad_enabled())
        self.weights: Tensor | None = None  # attention of the call under way, where it is computed here

    # -- called by the host -------------------------------------------------------------------------------------------
    def attend(self, module: nn.Module, plain: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
               kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The model's own attention over the stored rows, then the method's turn. q (B, H, Q, d), k, v (B, G, S, d)."""
        index, call = self.session.host.index(module), under.call
        if index is None:  # another model's attention, inside this one
            return plain(module, q, k, v, mask, **kwargs)
        if call is not None:
            call.entered = True
        layer = self.at[index] if self.at else None
        if layer is not None and layer.headwise(q.shape[2]):
            with full_precision(q):
                out = layer.attention(q, _scale(q, kwargs), mask), None
            self._count(layer, q.shape[0])
            layer.settle()
            return out
        if layer is not None:
            mask = layer.mask(mask, q.shape[1], q.shape[2])
        if call is not None and call.watch:
            call.seen = watched(q, k, v, _scale(q, kwargs), mask, call.whole)
            call.where = layer.positions() if call.whole and layer is not None else None
        if call is not None and call.policy is not None:
            call.no_maps(module)
            out = trained_attention(q, k, v, _scale(q, kwargs), mask, call)
            if layer is not None:
                self._count(layer, q.shape[0])
                layer.settle()
            return out
        with full_precision(q):
            mask = self._gated(layer, index, q, k, v, mask, kwargs)
        if layer is None:
            self.attending = None
            return plain(module, q, k, v, mask, **kwargs)
        began = time.perf_counter()
        with torch.no_grad(), full_precision(q):
            self._count(layer, q.shape[0])
            read = self._reading(layer, index, q, k, v, mask, kwargs)
        self.session.seconds += time.perf_counter() - began
        if self.weighs and self._alone(layer, index, q, mask):
            with full_precision(q):
                answer, self.weights = attended(Seen(q, k, v, _scale(q, kwargs)))
            out = answer, None
        else:
            out = plain(module, q, *read, **kwargs)
        if self.attending is not None:
            self.attending.weights = out[1]
        self._turns(layer, index, q, k, v, mask, kwargs)
        return out

    def _turns(self, layer: ReducedLayer, index: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
               kwargs: dict[str, Any]) -> None:  # fmt: skip
        """What the methods do once a layer's attention is known: rows go, what is left is stored."""
        began = time.perf_counter()
        with torch.no_grad(), full_precision(q):
            for turn in self.session.acting(Site.KV_CACHE, index):
                self._act(layer, index, turn, q, k, v, mask, kwargs)
            self._store(layer, index)
        layer.settle()
        self.attending = self.weights = None
        self.session.seconds += time.perf_counter() - began

    def around(self, index: int, own: Callable, given: dict[str, Any], features: str) -> Any:
        """The same for an attention module that asks no table. own: its code; given: its arguments by name, those over
        logical positions among them, and the features (B, Q, C). They are told of the stored rows while it runs, and
        its attention is looked at where a method may act."""
        layer, host, x = self.at.get(index), self.session.host, given[features]
        if layer is None:
            return own(**given)
        place, bias, band = layer.coming(x.shape[1], x.device), None, None
        if layer.reduced or layer.arriving is not None:
            came = x.shape[1] if layer.arriving is None else layer.arriving.total
            band, logical = host.band(index), layer.get_mask_sizes(came)[0]
            given, bias = at_rows(given, x, place, logical, host.heads, holes=layer.gappy, band=band)
        call = Call(bias, watch=x.shape[1] > 1 or not self.session.steady)
        with ExitStack() as around:
            if call.asks:
                around.enter_context(entered(call, batch=len(x), keys=place.shape[-1]))
            if band is not None:
                around.enter_context(Unbanded(band))
            out = own(**given)
        with torch.no_grad():
            self._count(layer, len(x))
        if not call.watch:
            layer.settle()
            return out
        if call.seen is None:
            raise HostError(
                f"the attention of block {index} ({type(host.attentions[index]).__name__}) was not reached: it is "
                "written out in a way that was not found; call the model with use_cache=False"
            )
        k, v = layer.view()
        seen = call.seen
        self._turns(layer, index, seen.q.to(k.dtype), k, v, seen.bias, {**given, "scaling": seen.scale})
        return out

    def _alone(self, layer: ReducedLayer, index: int, q: Tensor, mask: Tensor | None) -> bool:
        """Whether one query reads all rows of a layer where a method acts, and some are gone: before that the model's
        own attention stays what it is, to the bit."""
        single = q.shape[2] == 1 and mask is None and layer.reduced
        return single and bool(self.session.acting(Site.KV_CACHE, index))

    def _gated(self, layer: ReducedLayer | None, index: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
               kwargs: dict[str, Any]) -> Tensor | None:  # fmt: skip
        """The mask with what methods add to the logits; as it was where none does."""
        if self.session.host.slides(index):
            return mask
        for turn in self.session.acting(Site.KV_CACHE, index):
            method = self.session.methods[turn[0]]
            assert isinstance(method, CacheReducer)
            if not method.gates:
                continue
            if layer is None:
                age = torch.arange(k.shape[2], 0, -1, device=k.device)[None, None]
                rows = Rows(len(k), k.shape[2], device=k.device, totals=(k.shape[2],) * len(k), age=age)
            else:
                self._count(layer, q.shape[0])
                rows = self._rows(layer, k)
            gate = method.gate(
                self._signals(layer, turn, self._place(index, turn, rows), rows, q, k, v, mask, kwargs), rows
            )
            mask = added(gate, mask, q.shape[2], k.shape[2]).to(q.dtype)
        return mask

    def real(self, n: int) -> Tensor | None:
        """(B, N) bool: which of this pass's tokens are no padding; None = all, as far as can be told."""
        if not isinstance(self.given, Tensor) or self.given.dim() != 2:
            return None
        return self.given[:, -n:] != 0

    def _count(self, layer: ReducedLayer, batch: int) -> None:
        """How many real tokens each sample has seen. One read of the padding mask per pass of several tokens."""
        queries = layer.length - layer.began
        if queries == 1 and layer.totals:
            layer.totals = [t + 1 for t in layer.totals]
            return
        layer.totals = self._seen(batch, layer.length, queries)

    def _seen(self, batch: int, length: int, queries: int) -> list[int]:
        given = self.given
        if given is None:
            return [length] * batch
        if not isinstance(given, Tensor) or given.dim() != 2:
            raise CacheError(
                "the session must know which tokens are padding: pass attention_mask as (batch, length), not a mask of "
                + (f"{given.dim()} dimensions" if isinstance(given, Tensor) else f"type {type(given).__name__}")
            )
        if given.shape[-1] != length:
            raise CacheError(
                f"attention_mask speaks of {given.shape[-1]} tokens, the cache has seen {length}: it must cover the "
                "evicted ones too, as generate() passes it"
            )
        if self._padded is None:
            real = given != 0
            new = real[:, -queries:]
            facts = [real.all(), (new[:, :-1] & ~new[:, 1:]).any()]
            if self.position_ids is not None and self.position_ids.shape[-1] == queries:
                p = self.position_ids
                facts.append(((p[:, 1:] <= p[:, :-1]) & new[:, :-1] & new[:, 1:]).any())
            whole, right, backwards = [*torch.stack(facts).tolist(), False][:3]
            if right:
                raise CacheError(
                    "padding on the right, or inside a prompt, leaves holes in the cache; pad on the left, or call the "
                    "model with use_cache=False where nothing is to be generated (config.use_cache = False in training)"
                )
            if backwards:
                raise CacheError("position_ids fall inside a prompt: packed sequences cannot share a cache")
            self._padded = not whole
            self._totals = real.sum(-1).tolist() if self._padded else [length] * batch
        return list(self._totals)

    # -- the method's turn --------------------------------------------------------------------------------------------
    def _reading(self, layer: ReducedLayer, index: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
                 kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Keys, values and mask of the rows this pass reads: all that are stored, or those a method chose."""
        layer.record.read = None
        if layer.window is not None:
            return k, v, mask
        for turn in self.session.acting(Site.KV_CACHE, index):
            method = self.session.methods[turn[0]]
            assert isinstance(method, CacheReducer)
            if not method.reads:
                continue
            rows = self._rows(layer, k)
            plan = method.read(self._signals(layer, turn, self._place(index, turn, rows), rows, q, k, v, mask, kwargs),
                               rows)  # fmt: skip
            if plan is None:
                continue
            if q.shape[2] > 1:
                raise SessionError(f"{text(method)} chose rows for a pass of {q.shape[2]} tokens; only one may choose")
            lengths = plan.lengths
            layer.record.read = plan.m if lengths is None else lengths.float().mean()
            return _picked(plan, k, v, mask, q.shape[1])
        return k, v, mask

    def _place(self, index: int, turn: tuple[int, int, int], rows: Rows) -> Place:
        _, stage, stages = turn
        session = self.session
        return Place(
            index, len(session.host.blocks), stage, stages, max(rows.totals), session.spend, session.note
        )  # fmt: skip

    def _signals(
        self, layer: ReducedLayer | None, turn: tuple[int, int, int], place: Place, rows: Rows, q: Tensor, k: Tensor,
        v: Tensor, mask: Tensor | None, kwargs: dict[str, Any],
    ) -> CacheSignals:  # fmt: skip
        """What the method of this turn may look at."""
        method = self.session.methods[turn[0]]
        assert isinstance(method, CacheReducer)
        asking = None
        if rows.real is not None and self.given is not None and q.shape[2] > 1:
            left = self.reading is not None and self.reading.steps
            asking = self.reading.tokens.valid if left else self.real(q.shape[2])  # type: ignore[union-attr]
        return CacheSignals(
            k, rows, place, Seen(q, k, v, _scale(q, kwargs), mask, causal=mask is None and q.shape[2] > 1),
            modules=self.session.modules_of(turn[0], 0), asking=asking, entry=self.entry,
            attending=self.attending, weights=self.weights,
            at_rope=kwargs.get("position_ids", self.position_ids),
            rotary=self.session.rotary(place.layer) if method.rotates else None,
            training=self.training,
            memory=(self.memory if layer is None else self.layers[0].memory).setdefault(turn[0], {}),
            local={} if layer is None else layer.local.setdefault(turn[0], {}),
        )  # fmt: skip

    def _act(self, layer: ReducedLayer, index: int, turn: tuple[int, int, int], q: Tensor, k: Tensor, v: Tensor,
             mask: Tensor | None, kwargs: dict[str, Any]) -> None:  # fmt: skip
        method = self.session.methods[turn[0]]
        assert isinstance(method, CacheReducer)
        if not method.evicts or isinstance(method, Rereader) or (method.once and not self.fresh):
            return
        if method.gates and (self.training or self.session.host.slides(index)):
            return
        evicts = method.decodes or q.shape[2] > 1
        if not evicts and not method.accumulates:
            return
        rows = self._rows(layer, k)
        place = self._place(index, turn, rows)
        counts = rows.counts(method.allowance, place, method.least)
        everything = counts == list(rows.totals) or (rows.real is None and min(counts) >= rows.n)
        everything = everything and not method.budget.adaptive
        if everything and not method.accumulates:
            return
        signals = self._signals(layer, turn, place, rows, q, k, v, mask, kwargs)
        if method.accumulates:
            signals.received = self._receive(layer, signals)
        if not evicts or everything:
            return
        if isinstance(method, Ranker) and counts[0] == rows.n - 1 and rows.even and layer.replaces(k):
            layer.replace(method.leaver(signals, rows))
        else:
            plan = method.plan(signals, rows)
            assert isinstance(plan, Hard)
            layer.keep(plan, *self._held(layer, method, plan, k, v))
        if method.travelling:
            rotary = self.session.rotary(index)
            assert rotary is not None
            layer.rerotate(rotary, method.travelling)

    @staticmethod
    def _held(layer: ReducedLayer, method: Reducer, plan: Hard, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What a plan is executed on: keys and values as attention had them, or what the cache holds instead of them.

        Raises   SessionError where heads that share what is held keep different rows.
        """
        keys, values = layer.view()
        if all(a.shape[1] == b.shape[1] and a.shape[-1] == b.shape[-1] for a, b in ((k, keys), (v, values))):
            return k, v
        if plan.lead[1] > keys.shape[1]:
            raise SessionError(
                f"{text(method)} keeps other rows in each head, and this model's cache holds latents that its heads "
                "share (MLA); choose a method that keeps the same rows in all heads, such as streamingllm:"
                "positions=original"
            )
        return keys, values

    def _store(self, layer: ReducedLayer, index: int) -> None:
        """What is left by all methods is stored as one of them says."""
        if self.fresh and layer.expected and any(isinstance(m, Rereader) for m in self.session.methods):
            return  # the prompt is read again before
        for which, *_ in self.session.acting(Site.KV_CACHE, index):
            codec = self.session.methods[which].codec  # type: ignore[attr-defined]
            if codec is not None and layer.window is None:
                layer.encode(codec, self._rows(layer, layer.keys).real)

    def _rows(self, layer: ReducedLayer, k: Tensor) -> Rows:
        """What the method must know of the layer's rows."""
        b, s = k.shape[0], k.shape[2]
        place = layer.positions()
        real: Tensor | None = None
        if layer.packing is not None or layer.holes:
            real = place >= 0
        if self._holes(layer):
            assert self.given is not None
            mask = (self.given != 0)[:, None].expand(b, place.shape[1], -1)
            shown = mask.gather(-1, place.clamp(min=0).expand(b, -1, -1))
            real = shown if real is None else real & shown
        totals = layer.totals
        if layer.window is not None:
            totals = [min(t, layer.window - 1) for t in totals]
            if s > layer.window - 1:
                alive = (torch.arange(s, device=k.device) >= s - layer.window + 1)[None, None]
                real = alive.expand(b, 1, -1) if real is None else real & alive
        age = layer.length - place
        return Rows(b, s, device=k.device, totals=tuple(totals), real=real, age=age, shuffled=layer.shuffled)

    def _holes(self, layer: ReducedLayer) -> bool:
        """Whether some stored row may be padding."""
        return self.given is not None and any(t != layer.length for t in layer.totals)

    @staticmethod
    def _receive(layer: ReducedLayer, signals: CacheSignals) -> Tensor:
        """The attention each row has received so far, this pass included: (B, G, S)."""
        new = signals.per_group(signals.attention_mass_of_all())
        old = layer.received
        if old is not None:
            new[..., : old.shape[-1]] += old
        layer.received = new
        return new


def _picked(plan: Hard, k: Tensor, v: Tensor, mask: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows of a plan, gathered, and the mask over them. k, v: (B, G, S, d), mask: (B or 1, 1 or H, Q, S)."""
    b, g = k.shape[:2]
    index, valid = plan.position, plan.valid
    if mask is not None:
        lead = 1 if mask.shape[1] == index.shape[1] == 1 else heads
        at = index.repeat_interleave(lead // index.shape[1], dim=1)[:, :, None].expand(-1, -1, mask.shape[2], -1)
        mask = mask.expand(b, lead, -1, -1).gather(-1, at)
    if valid is not None:
        valid = valid.expand(b, index.shape[1], -1)
        shown = (valid if valid.shape[1] == 1 else valid.repeat_interleave(heads // valid.shape[1], dim=1))[:, :, None]
        if mask is None:
            mask = shown
        else:
            mask = mask.masked_fill(~shown, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
    index = index.expand(b, g, -1)
    return take(k, index), take(v, index), mask


def _text_positions(ids: Tensor | None) -> Tensor | None:
    """Position ids as (B, N); None where rows stand in space and time instead (M-RoPE), unless the text's are given
    beside."""
    if ids is None or ids.dim() == 2:
        return ids
    return ids[0] if ids.shape[0] == 4 else None


def _scale(q: Tensor, kwargs: dict[str, Any]) -> float:
    """The factor on q k^T that an attention module gave its function."""
    scale = kwargs.get("scaling")
    return q.shape[-1] ** -0.5 if scale is None else scale
