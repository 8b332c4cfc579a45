"""Sessions on a decoder's KV cache: the passes that open a cache, look at its attention and evict rows from it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .cache import CacheError, Record, ReducedLayer, install
from .core import Reducer, Seen, Site
from .core.cached import CacheReducer, CacheSignals, Rows
from .core.place import Place
from .hosts.decoder import DecoderHost
from .session import Session, SessionError
from .spec import text


@dataclass
class CacheLedger:
    """What the cache of the last pass holds, and what the method took.

    layers    one record per layer, measured on storage
    flops     the method's own floating-point operations per sample since the cache was new
    seconds   the host spent on the method in the last pass; on a GPU this is the launching only
    """

    layers: list[Record]
    flops: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

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
    def logical(self) -> list[int]:
        """Tokens each layer has seen."""
        return [r.logical for r in self.layers]


class CachePass:
    """One forward pass over one cache. Implements the hosts' Visit."""

    def __init__(self, session: CacheSession, cache: Any, mask: Tensor | None, positions: Tensor | None) -> None:
        self.session, self.cache, self.given = session, cache, mask
        self.layers: list[ReducedLayer] = cache.layers
        self.position_ids = positions
        self._padded: bool | None = None
        self._totals: list[int] = []
        for layer in self.layers:
            layer.awaited = True

    # -- called by the host -------------------------------------------------------------------------------------------
    def attend(self, module: nn.Module, plain: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
               kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The model's own attention over the stored rows, then the method's turn. q (B, H, Q, d), k, v (B, G, S, d)."""
        index = int(module.layer_idx)  # type: ignore[arg-type]
        layer = self.layers[index]
        mask = layer.mask(mask, q.shape[1], q.shape[2])
        out = plain(module, q, k, v, mask, **kwargs)
        began = time.perf_counter()
        with torch.no_grad():
            self._count(layer, q.shape[0], q.shape[2])
            for turn in self.session.acting(Site.KV_CACHE, index):
                self._act(layer, index, turn, q, k, v, mask, kwargs)
        layer.settle()
        self.session.seconds += time.perf_counter() - began
        return out

    def _count(self, layer: ReducedLayer, batch: int, queries: int) -> None:
        """How many real tokens each sample has seen. One read of the padding mask per pass of several tokens."""
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
                raise CacheError("padding on the right, or inside a prompt, leaves holes in the cache; pad on the left")
            if backwards:
                raise CacheError("position_ids fall inside a prompt: packed sequences cannot share a cache")
            self._padded = not whole
            self._totals = real.sum(-1).tolist() if self._padded else [length] * batch
        return list(self._totals)

    # -- the method's turn --------------------------------------------------------------------------------------------
    def _act(self, layer: ReducedLayer, index: int, turn: tuple[int, int, int], q: Tensor, k: Tensor, v: Tensor,
             mask: Tensor | None, kwargs: dict[str, Any]) -> None:  # fmt: skip
        which, stage, stages = turn
        method = self.session.methods[which]
        assert isinstance(method, CacheReducer)
        evicts = method.decodes or q.shape[2] > 1
        if not evicts and not method.accumulates:
            return
        rows = self._rows(layer, k)
        place = Place(index, len(self.layers), stage, stages, max(rows.totals), self.session.spend, self.session.note)
        counts = rows.counts(method.allowance, place, method.least)
        everything = counts == list(rows.totals) or (rows.real is None and min(counts) >= rows.n)
        if everything and not method.accumulates:
            return
        asking = None
        if rows.real is not None and self.given is not None:
            asking = self.given[:, -q.shape[2] :] != 0
            asking = None if q.shape[2] == 1 else asking
        scale = kwargs.get("scaling")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        seen = Seen(q, k, v, scale, mask, causal=mask is None and q.shape[2] > 1)
        positions = kwargs.get("position_ids", self.position_ids)
        signals = CacheSignals(
            k, rows, place, seen, asking=asking, at_rope=positions,
            rotary=self.session.rotary(index) if method.rotates else None,
        )  # fmt: skip
        if method.accumulates:
            signals.received = self._receive(layer, signals)
        if not evicts or everything:
            return
        plan = method.plan(signals, rows)
        layer.keep(plan, k, v)  # type: ignore[arg-type]
        if method.travelling:
            rotary = self.session.rotary(index)
            assert rotary is not None
            layer.travel(rotary, method.travelling)

    def _rows(self, layer: ReducedLayer, k: Tensor) -> Rows:
        """What the method must know of the layer's rows."""
        b, s = k.shape[0], k.shape[2]
        place = layer.positions()
        real: Tensor | None = None
        if layer.packing is not None:
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
        return Rows(b, s, device=k.device, totals=tuple(totals), real=real, age=layer.length - place)

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


class CacheSession(Session):
    """A decoder whose cache is reduced while it reads and writes. Use it as a context manager, or call `remove()`.

    `generate()` and the forward pass are called as before. Every pass of several tokens (a prompt, a chunk of one, the
    next turn) ends with the cache at its budget; methods that act while decoding keep it there at every step.
    """

    def __init__(self, model: nn.Module, methods: Sequence[Reducer], host: DecoderHost) -> None:
        self.model, self.methods, self.decoder = model, tuple(methods), host
        self._undo = ExitStack()
        self._records: list[Record] = []
        self._notes: list[str] = []
        self._flops = 0
        self.seconds = 0.0
        self._rotary: dict[int, Any] = {}
        depth = len(host.blocks)
        self._acting: dict[tuple[Site, int], list[tuple[int, int, int]]] = {}
        if len(self.methods) > 1:
            raise SessionError("one method per cache: rows another method evicted cannot be judged; give apply one")
        for index, method in enumerate(self.methods):
            layers = tuple(range(depth)) if method.layers is None else method.layers
            if any(layer < 0 or layer >= depth for layer in layers):
                raise SessionError(
                    f"{text(method)} acts at layers {'+'.join(map(str, layers))}, but the model has {depth} blocks "
                    f"(0 to {depth - 1}); pass layers="
                )
            for stage, layer in enumerate(layers):
                self._acting.setdefault((method.site, layer), []).append((index, stage, len(layers)))
            if not isinstance(method, CacheReducer):
                raise SessionError(f"{type(method).__name__} acts on the KV cache but is no CacheReducer")
            method.check()
            rotary = self.rotary(0) if method.rotates or method.travelling else None
            if method.travelling and rotary is None:
                raise SessionError(
                    f"{text(method)} moves rows by turning their keys, but {host.family.name} learns its positions; "
                    "pass positions=original"
                )
        self._names = [p for p in inspect.signature(host.root.forward).parameters if p != "kwargs"]

    def _attach(self) -> None:
        with ExitStack() as undo:
            self.decoder.attach(self._open, undo)
            self._undo = undo.pop_all()

    # -- called by the host and the pass ------------------------------------------------------------------------------
    def _open(self, root: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the decoder runs: find the cache of this pass, or make one, and send the pass along."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache: Any = given.get("past_key_values")
        use = given.get("use_cache")
        if use is None:
            use = getattr(root.config, "use_cache", False)
        if cache is None:
            if not use or (root.training and getattr(root, "gradient_checkpointing", False)):
                return args, kwargs
            from transformers import DynamicCache

            cache = given["past_key_values"] = DynamicCache(config=root.config)  # type: ignore[arg-type]
        install(cache, len(self.decoder.blocks), self)
        if cache.get_seq_length() == 0:
            self._flops, self._notes = 0, []
        self._records = [layer.record for layer in cache.layers]
        run = CachePass(self, cache, given.get("attention_mask"), given.get("position_ids"))
        self.seconds = 0.0
        given["fewer"] = run
        return (), given

    def spend(self, flops: int) -> None:
        self._flops += flops

    def note(self, line: str) -> None:
        if line not in self._notes:
            self._notes.append(line)

    def rotary(self, layer: int) -> Any:
        """The rotary embedding of a layer, found once; None where positions are learned."""
        if layer not in self._rotary:
            self._rotary[layer] = self.decoder.rotary(layer)
        return self._rotary[layer]

    # -- what can be read afterwards ----------------------------------------------------------------------------------
    @property
    def ledger(self) -> CacheLedger:  # type: ignore[override]
        """What the last cache holds, layer by layer."""
        if not self._records:
            raise SessionError("no forward pass with a cache yet: call the model or generate() first")
        return CacheLedger(list(self._records), self._flops, self.seconds, list(self._notes))

    @property
    def last(self) -> Any:
        raise SessionError(
            "a session on the cache traces rows, not features: read kept(layer), counts, ledger, report()"
        )

    @property
    def counts(self) -> list[float]:  # type: ignore[override]
        """Rows each layer's cache holds, averaged over samples and KV heads."""
        return self.ledger.stored

    def kept(self, layer: int) -> Tensor:
        """(B, G, M): the input positions of the rows `layer` holds, ascending; -1 pads where heads, samples differ.

        Padding that no plan removed counts as rows, and so do rows of a sliding layer that have just left its window.
        """
        return self.ledger.layers[layer].positions()

    def report(self) -> str:
        """The last cache in words: rows, bytes, the method's own share, notes."""
        ledger = self.ledger
        stored = " ".join(f"{s:g}" for s in (round(x, 1) for x in ledger.stored))
        return "\n".join([
            " ".join(text(m) for m in self.methods),
            f"rows {ledger.logical[0]} -> {stored}",
            f"cache {ledger.full_bytes / 1e6:.3f} -> {ledger.bytes / 1e6:.3f} MB "
            f"({ledger.full_bytes / max(ledger.bytes, 1):.2f}x smaller), own work {ledger.flops / 1e9:.3f} GFLOPs",
            *ledger.notes,
        ])  # fmt: skip


def start(model: nn.Module, methods: Sequence[Reducer]) -> CacheSession:
    """Put a method on a decoder's cache."""
    if any(m.site is not Site.KV_CACHE for m in methods):
        raise SessionError("methods on the KV cache and methods inside the network cannot share a session")
    session = CacheSession(model, methods, DecoderHost.find(model))
    session._attach()
    return session
