"""Sessions on a decoder's KV cache: the passes that open a cache, look at its attention and evict rows from it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .cache import CacheError, Record, ReducedLayer, install
from .compat import CACHE_NAMES, cached, given_cache, without_cache
from .core import Hard, Reducer, Seen, Site
from .core.attention import full_precision
from .core.cached import Attending, CacheReducer, CacheSignals, Ranker, Rereader, Rows, attended
from .core.place import Place
from .core.plan import take
from .hosts import Call, DecoderHost, HostError, Table, Visit, under
from .hosts.decoder import Calls
from .hosts.logical import Unbanded, at_rows
from .hosts.written_out import entered
from .ledger import Ledger
from .passes import Pass
from .presses import Pressed
from .reading import Reading, Revival, added, trained_attention, watched
from .rereading import reread
from .session import Execution, Session, SessionError, check_free
from .spec import text

if TYPE_CHECKING:
    from .looking import Sight


@dataclass
class CacheLedger:
    """What the cache of the last pass holds, and what the method took.

    layers    one record per layer, measured on storage
    flops     the method's own floating-point operations per sample since the cache was new
    reading   cost of the last prompt's way through the blocks, where methods act there
    seconds   the host spent on the method in the last pass; on a GPU this is the launching only
    """

    layers: list[Record]
    flops: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    reading: Ledger | None = None

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(r.bytes for r in self.layers)

    @property
    def full_bytes(self) -> int:
        """Bytes the unreduced cache would hold."""
        return sum(r.full for r in self.layers)

    @property
    def peak_bytes(self) -> int:
        """The most bytes the layers held between their turns."""
        return sum(r.peak for r in self.layers)

    @property
    def stored(self) -> list[float]:
        """Rows held by each layer, averaged over samples and heads."""
        return [r.stored for r in self.layers]

    @property
    def read(self) -> list[float]:
        """Rows each layer's attention read in the last pass, averaged over samples and heads (synchronises)."""
        return [r.stored if r.read is None else float(r.read) for r in self.layers]

    @property
    def logical(self) -> list[int]:
        """Tokens each layer has seen."""
        return [r.logical for r in self.layers]


class CachePass:
    """One forward pass over one cache. Implements the hosts' Visit."""

    def __init__(self, session: CacheSession, cache: Any, mask: Tensor | None, positions: Tensor | None) -> None:
        self.session, self.cache, self.given, self.calls = session, cache, mask, Calls(session.host)
        held = enumerate([] if cache is None else cache.layers)  # states of blocks without attention stand between
        self.at: dict[int, ReducedLayer] = {i: layer for i, layer in held if isinstance(layer, ReducedLayer)}
        self.layers = list(self.at.values())
        self.reading: Reading | None = None  # the tokens' way through the blocks, where methods act there
        self.sight: Sight | None = None  # the visual rows among them
        self.visit: Visit | None = None  # the same behind a prompt: dropped tokens may come back, or moved together
        self.position_ids = positions
        self.fresh = cache is not None and cache.get_seq_length() == 0
        self.entry: Tensor | None = None  # (B, Q, C), what entered the first block, where a method wants it
        self.memory: dict[int, dict[str, Any]] = {}  # of each method, where no cache keeps it
        self.attending: Attending | None = None  # the call under way, where a method wants it
        self._padded: bool | None = None
        self._totals: list[int] = []
        for layer in self.layers:
            layer.awaited, layer.steady, layer.apart = True, session.steady, session.apart
            layer.loose = session.loose
        self.weighs = session.weighs and not torch.is_grad_enabled()
        # Behind a cache only a training step has the training form: generation takes the other, whatever the mode.
        self.training = session.training and (cache is None or torch.is_grad_enabled())
        self.weights: Tensor | None = None  # attention of the call under way, where it is computed here

    # -- called by the host -------------------------------------------------------------------------------------------
    def attend(self, module: nn.Module, plain: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
               kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The model's own attention over the stored rows, then the method's turn. q (B, H, Q, d), k, v (B, G, S, d)."""
        read, call = self.calls.next(module), under.call
        if read is None:  # another model's attention, inside this one
            return plain(module, q, k, v, mask, **kwargs)
        index, first, last = read
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
            kwargs = {name: layer.fit(x, q.shape[2]) for name, x in kwargs.items()}
        if call is not None and call.watch:
            call.seen = watched(q, k, v, _scale(q, kwargs), mask, call.whole)
            call.where = layer.positions() if call.whole and layer is not None else None
        if call is not None and call.policy is not None:
            call.no_maps(module)
            out = trained_attention(q, k, v, _scale(q, kwargs), mask, call)
            if layer is not None and last:
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
            if first:
                self._count(layer, q.shape[0])
            shown = self._reading(layer, index, q, k, v, mask, kwargs)
        self.session.seconds += time.perf_counter() - began
        if self.weighs and self._alone(layer, index, q, mask):
            with full_precision(q):
                answer, self.weights = attended(Seen(q, k, v, _scale(q, kwargs)))
            out = answer, None
        else:
            out = plain(module, q, *shown, **kwargs)
        if self.attending is not None:
            self.attending.weights = out[1]
        if last:
            k, v = (k, v) if first else layer.view()  # calls that share keys may share out the values
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
        left = None if self.reading is None or not self.reading.steps else self.reading.tokens.place()
        bias = band = None
        if layer is None:
            if left is None:
                return own(**given)
            band, place = host.band(index), left[:, None]
            assert self.reading is not None
            given, bias = at_rows(
                given, x, place, self.reading.first.n, host.heads, holes=False, band=band, asking=left
            )
        else:
            place = layer.coming(x.shape[1], x.device)
            if layer.reduced or layer.arriving is not None:
                came = x.shape[1] if layer.arriving is None else layer.arriving.total
                asking = None if layer.arriving is None else layer.length + layer.arriving.place
                band, logical = host.band(index), layer.get_mask_sizes(came)[0]
                given, bias = at_rows(given, x, place, logical, host.heads, holes=layer.gappy, band=band, asking=asking)
        call = Call(bias, watch=layer is not None and (x.shape[1] > 1 or not self.session.steady))
        with ExitStack() as around:
            if call.asks:
                around.enter_context(entered(call, batch=len(x), keys=place.shape[-1]))
            if band is not None:
                around.enter_context(Unbanded(band))
            out = own(**given)
        if layer is None:
            return out
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
            index, session.host.depth(Site.KV_CACHE), stage, stages, max(rows.totals), session.spend, session.note
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
            layer.travel(rotary, method.travelling)

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
        if self.fresh and layer.awaited and any(isinstance(m, Rereader) for m in self.session.methods):
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


class CacheSession(Session):
    """A decoder whose cache is reduced while it reads and writes. Use it as a context manager, or call `remove()`.

    `generate()` and the forward pass are called as before. Every pass of several tokens (a prompt, a chunk of one, the
    next turn) ends with the cache at its budget; methods that act while decoding keep it there at every step.
    """

    host: DecoderHost

    def __init__(
        self, model: nn.Module, methods: Sequence[Reducer], execution: Execution, host: DecoderHost,
        modules: nn.Module | str | Path | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, methods, execution, host, modules)
        self._records: dict[int, Record] = {}  # by block
        self._notes: list[str] = []
        self._flops = 0
        self.seconds = 0.0
        self.remembered: dict[int, dict[str, Any]] = {}  # what methods noted in the last pass without a cache
        self._rotary: dict[int, Any] = {}
        self.inside = any(m.site is not Site.KV_CACHE for m in self.methods)
        for method in self.methods:
            if method.extra and method.site is not Site.KV_CACHE:
                raise SessionError(
                    f"{text(method)} melts dropped tokens into one more row, which has no place among the words of a "
                    "causal text; choose a method or a form that only prunes (fuse=false)"
                )
            if method.proportional:
                raise SessionError(
                    f"{text(method)} weighs merged tokens by their size in later attention, which a decoder's cache "
                    "does not remember; choose a method that prunes, or proportional=false"
                )
        cached = [m for m in self.methods if m.site is Site.KV_CACHE]
        if sum(getattr(m, "evicts", True) for m in cached) > 1:
            raise SessionError(
                "two methods that evict cannot share a cache: rows one has taken cannot be judged by the other; give "
                "apply one of them, with methods that only read (quest) or store (ott) beside it"
            )
        if any(m.revives for m in self.methods) and any(
            getattr(m, "evicts", True) or getattr(m, "reads", False) for m in cached
        ):
            raise SessionError(
                "a method that brings dropped tokens back chooses among all rows of a layer; one that evicts or reads "
                "others in each head cannot stand beside it: stack it on one that drops for good, such as sdtp"
            )
        if host.unasking and any(m.revives for m in self.methods):
            raise SessionError(
                f"a method that brings dropped tokens back looks at attention while {host.name} writes, which asks no "
                "attention table; choose one that drops for good, such as sdtp"
            )
        if sum(getattr(m, "reads", False) for m in self.methods) > 1:
            raise SessionError("two methods that choose what is read cannot share a cache; give apply one of them")
        if sum(getattr(m, "codec", None) is not None for m in self.methods) > 1:
            raise SessionError("two methods that store a cache in few bits cannot share it; give apply one of them")
        for method in cached:
            if not isinstance(method, CacheReducer):
                raise SessionError(f"{type(method).__name__} acts on the KV cache but is no CacheReducer")
            method.check()
            if (host.unasking or host.again) and (
                method.reads or method.gates or method.attends or isinstance(method, Rereader)
            ):
                raise SessionError(
                    f"{text(method)} takes part in attention before the softmax, where {host.name} lets nobody in: it "
                    + ("calls attention several times over the same keys" if host.again else "asks no attention table")
                    + "; choose a method that looks and evicts (snapkv, h2o, knorm)"
                )
            if self.inside and isinstance(method, Rereader):
                raise SessionError(
                    f"{text(method)} has the whole prompt read again, which methods inside the network would shorten; "
                    "give apply one of them"
                )
            rotary = self.rotary(0) if method.rotates or method.travelling else None
            if method.travelling and rotary is None:
                raise SessionError(
                    f"{text(method)} moves rows by turning their keys, but {host.name} learns its positions; "
                    "pass positions=original"
                )
        #: Whether no method has to do with the rows of a decoding step.
        busy = (m for m in cached if isinstance(m, CacheReducer))
        self.steady = not any(m.decodes or m.accumulates or m.reads or m.codec is not None for m in busy)
        self._names = [p for p in inspect.signature(host.root.forward).parameters if p != "kwargs"]

    def _attach(self) -> None:
        with ExitStack() as undo:
            self.host.open(self._open, undo)
            self.host.surround(self._around, undo)
            if self.inside:
                self.host.replace(lambda layer: partial(self._block, layer), undo)
            undo.callback(self.host.root.register_forward_hook(self._close, with_kwargs=True, always_call=True).remove)
            if any(getattr(m, "attends", False) for m in self.methods):
                for module in dict.fromkeys(filter(None, self.host.attentions)):
                    undo.callback(module.register_forward_pre_hook(_attend, with_kwargs=True).remove)
            for method in self.methods:
                if isinstance(method, Pressed):
                    method.attach(self.model, self.host.root, [m for m in self.host.attentions if m is not None], undo)
            if any(getattr(m, "enters", False) for m in self.methods):
                undo.callback(self.host.blocks[0].register_forward_pre_hook(_enter, with_kwargs=True).remove)
            self._round(undo)
            self._undo = undo.pop_all()

    # -- called by the host and the pass ------------------------------------------------------------------------------
    def _open(self, root: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the decoder runs: find the cache of this pass, or make one, and send the pass along."""
        self.host.renew()
        self._passes.append(under.run)
        if self._inner is not None:  # a pass of our own
            under.run, self._inner = self._inner, None
            return args, kwargs
        under.run = None
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache: Any = given_cache(given)
        use = given.get("use_cache")
        if use is None:
            use = getattr(root.config, "use_cache", False)
        if self.execution == "masked" and self.inside:
            if cache is not None:
                raise SessionError(
                    "execution='masked' hides what is dropped from one pass only; a cache would show it to the next: "
                    "use execution='padded' to generate, or call the model with use_cache=False"
                )
            use = given["use_cache"] = False
        if cache is None:
            if root.training and getattr(root, "gradient_checkpointing", False) and torch.is_grad_enabled():
                for method in self.methods:
                    if getattr(method, "gates", False):
                        raise SessionError(
                            f"{text(method)} adds to the attention of all blocks, which gradient checkpointing would "
                            "run again without it; call model.gradient_checkpointing_disable()"
                        )
            if use and root.training and torch.is_grad_enabled() and _padded_behind(given.get("attention_mask")):
                use = given["use_cache"] = False  # a training step: nobody goes on from here
            if not use or (root.training and getattr(root, "gradient_checkpointing", False)):
                if not self.inside and not any(getattr(m, "gates", False) for m in self.methods):
                    return (), given
            else:
                from transformers import DynamicCache

                cache = DynamicCache(config=root.config)  # type: ignore[arg-type]
                given = without_cache(given) | cached(root, cache)
        if cache is not None:
            install(cache, [module is not None for module in self.host.attentions], self)
            for layer, window in zip(cache.layers, self.host.windows, strict=False):
                if window is not None and isinstance(layer, ReducedLayer):
                    layer.slide(window)  # a cache that was made without a config does not know
        if cache is None or cache.get_seq_length() == 0:
            self._flops, self._notes, self._latest = 0, [], None
        run = CachePass(self, cache, given.get("attention_mask"), _text_positions(given.get("position_ids")))
        self._records, self.seconds = {i: layer.record for i, layer in run.at.items()}, 0.0
        under.run, self.remembered = run, run.memory
        return (), given

    def _around(self, index: int, own: Callable, given: dict[str, Any], features: str) -> Any:
        """An attention module that asks no table runs: as a part of a pass, if one is under way."""
        run = under.run
        return run.around(index, own, given, features) if isinstance(run, CachePass) else own(**given)

    @property
    def _passes(self) -> list[Any]:
        """What ran on this thread around the passes under way."""
        passes: list[Any] = self._local.__dict__.setdefault("passes", [])
        return passes

    @property
    def _inner(self) -> Any:
        """What sees the attention of the next pass instead of a pass of its own: set by `inner`, for one pass."""
        return getattr(self._local, "inner", None)

    @_inner.setter
    def _inner(self, run: Any) -> None:
        self._local.inner = run

    def inner(self, run: Any, root: nn.Module, **given: Any) -> None:
        """A pass over the decoder that is part of another one: `run` sees its attention."""
        self._inner = run
        root(**given)

    def _close(self, root: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """After the decoder has run, or failed: the turn of methods that have the prompt read again."""
        run = under.run
        under.run = self._passes.pop() if self._passes else None
        if output is None or not isinstance(run, CachePass) or not run.layers:
            return
        for which, method in enumerate(self.methods):
            if not isinstance(method, Rereader):
                continue
            began = time.perf_counter()
            if run.fresh:
                reread(run, which, root, kwargs)
            elif run.layers[0].length - run.layers[0].began > 1:
                self.note(f"{text(method)} compresses what an empty cache reads first; later passes are kept whole")
            self.seconds += time.perf_counter() - began

    def _visit(self, layer: int, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Visit | None:
        """Tokens leave while a prompt is read; a step of one token runs through the blocks as they are."""
        run = under.run
        assert isinstance(run, CachePass)
        if layer == 0:
            valid = None if mask is None else run.real(x.shape[1])
            if x.shape[1] > 1:
                run.reading = Reading(self, x, run.layers, valid, kwargs.get("position_ids"))
            elif run.layers and any(m.revives for m in self.methods):
                run.visit = Revival(self, x, run.layers, run.given)
        return run.reading or run.visit

    @property
    def apart(self) -> bool:
        """Whether heads that keep different numbers may be read one by one: no other attention is asked for."""
        plain = self.steady and not self.host.root.training and not (self.host.unasking or self.host.again)
        return plain and Table.before(self.host.root.config) == "sdpa"

    @property
    def loose(self) -> bool:
        """Whether rows may lie in any order while tokens are written: the only method on the cache does not mind."""
        cached = [m for m in self.methods if isinstance(m, CacheReducer)]
        return len(cached) == 1 and isinstance(cached[0], Ranker) and cached[0].decodes

    @property
    def weighs(self) -> bool:
        """Whether a step's attention is computed here: a method needs its probabilities, and no other is asked for."""
        weighs = self.loose and any(getattr(m, "weighs", False) for m in self.methods)
        return weighs and not self.host.root.training and Table.before(self.host.root.config) == "sdpa"

    def spend(self, flops: int) -> None:
        self._flops += flops

    def note(self, line: str) -> None:
        if line not in self._notes:
            self._notes.append(line)

    def rotary(self, layer: int) -> Any:
        """The rotary embedding of a layer, found once; None where positions are learned."""
        if layer not in self._rotary:
            self._rotary[layer] = self.host.rotary(layer)
        return self._rotary[layer]

    # -- what can be read afterwards ----------------------------------------------------------------------------------
    @property
    def ledger(self) -> CacheLedger:  # type: ignore[override]
        """What the last cache holds, layer by layer."""
        if not self._records and self._latest is None:
            raise SessionError("no forward pass with a cache yet: call the model or generate() first")
        reading = None if self._latest is None else self._latest.ledger
        notes = self._notes if reading is None else [*self._notes, *reading.notes]
        return CacheLedger(list(self._records.values()), self._flops, self.seconds, notes, reading)

    @property
    def last(self) -> Pass:
        """The last pass over a prompt, where methods act between the blocks."""
        if not self.inside:
            raise SessionError(
                "a session on the cache traces rows, not features: read kept(layer), counts, ledger, report()"
            )
        return super().last

    @property
    def counts(self) -> list[float]:  # type: ignore[override]
        """Rows each layer's cache holds, averaged over samples and KV heads; without a cache, tokens after each
        block."""
        if not self._records and self._latest is not None:
            counts = self._latest.counts
            return counts if isinstance(counts, list) else counts.double().mean(1).tolist()  # type: ignore[return-value]
        return self.ledger.stored

    def kept(self, layer: int) -> Tensor:
        """(B, G, M): the input positions of the rows `layer` holds, ascending; -1 pads where heads, samples differ.

        Padding that no plan removed counts as rows, and so do rows of a sliding layer that have just left its window.
        """
        if not self._records and self._latest is not None:
            return self._latest.kept(range(len(self.host.blocks))[layer])[:, None]
        block = range(self.host.depth(Site.KV_CACHE))[layer]
        if block not in self._records:
            raise SessionError(f"block {block} keeps no keys and values: {', '.join(map(str, self._records))} do")
        return self._records[block].positions()

    def report(self) -> str:
        """The last cache in words: rows, bytes, the method's own share, notes; and what reading the prompt cost, where
        methods act between the blocks."""
        ledger, reading = self.ledger, self.ledger.reading
        words = [] if reading is None else [
            f"reading {reading.gflops_full:.2f} -> {reading.gflops:.2f} GFLOPs (ceiling {reading.ceiling:.2f}x)"
        ]  # fmt: skip
        if not ledger.layers:
            return "\n".join([" ".join(text(m) for m in self.methods), *words, *ledger.notes])
        stored = " ".join(f"{s:g}" for s in (round(x, 1) for x in ledger.stored))
        return "\n".join([
            " ".join(text(m) for m in self.methods),
            f"rows {ledger.logical[0]} -> {stored}",
            f"cache {ledger.full_bytes / 1e6:.3f} -> {ledger.bytes / 1e6:.3f} MB "
            f"({ledger.full_bytes / max(ledger.bytes, 1):.2f}x smaller), own work {ledger.flops / 1e9:.3f} GFLOPs",
            *words,
            *ledger.notes,
        ])  # fmt: skip


def _padded_behind(mask: Any) -> bool:
    """Whether some text of a batch ends in padding. Reads one number."""
    return isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask[:, -1] == 0).any())


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


def _attend(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before an attention module: show the pass its call."""
    run = under.run
    if isinstance(run, CachePass):
        hidden = args[0] if args else kwargs["hidden_states"]
        run.attending = Attending(module, hidden, _spoken(kwargs))


def _spoken(kwargs: dict[str, Any]) -> dict[str, Any]:
    """An attention module's arguments as presses of every age read them: the cache under each of its names."""
    cache = given_cache(kwargs)
    return kwargs if cache is None else dict.fromkeys(CACHE_NAMES, cache) | kwargs


def _enter(_block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before the first block: show the pass what enters it."""
    if isinstance(under.run, CachePass):
        under.run.entry = args[0] if args else kwargs["hidden_states"]


def start(
    model: nn.Module, methods: Sequence[Reducer], execution: Execution, modules: nn.Module | str | Path | None,
    host: DecoderHost,
) -> CacheSession:  # fmt: skip
    """Put methods into a decoder, on its cache and between its blocks."""
    check_free(host)
    if execution == "packed":
        raise SessionError("a decoder's cache does not take packed rows; use execution='padded'")
    session = CacheSession(model, methods, execution, host, modules)
    session._attach()
    return session
