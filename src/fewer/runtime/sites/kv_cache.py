"""Sessions on a decoder's KV cache: the passes that open a cache, look at its attention and evict rows from it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...adapters.kvpress import Pressed
from ...compat import CACHE_NAMES, cached, given_cache, without_cache
from ...core import Reducer, Site
from ...core.cache import Attending, CacheReducer, Ranker, Rereader
from ...hosts import BlockRun, DecoderHost, Table, under
from ...spec import text
from ..costs import CacheLedger
from ..kv.layer import ReducedLayer, install
from ..kv.state import Record
from ..program import Execution, SessionError, check_free
from ..session import Session
from .blocks import Pass
from .cache_pass import CacheRun, _text_positions
from .prefill import DecoderPrefill
from .reread import reread
from .revival import TokenRevival

if TYPE_CHECKING:
    pass


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
            if host.unasking and (method.reads or method.gates or method.attends or isinstance(method, Rereader)):
                raise SessionError(
                    f"{text(method)} takes part in attention before the softmax, where {host.name} lets nobody in: it "
                    "asks no attention table; choose a method that looks and evicts (snapkv, h2o, knorm)"
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
                for module in filter(None, self.host.attentions):
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
        run = CacheRun(self, cache, given.get("attention_mask"), _text_positions(given.get("position_ids")))
        self._records, self.seconds = {i: layer.record for i, layer in run.at.items()}, 0.0
        under.run, self.remembered = run, run.memory
        return (), given

    def _around(self, index: int, own: Callable, given: dict[str, Any], features: str) -> Any:
        """An attention module that asks no table runs: as a part of a pass, if one is under way."""
        run = under.run
        return run.around(index, own, given, features) if isinstance(run, CacheRun) else own(**given)

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
        if output is None or not isinstance(run, CacheRun) or not run.layers:
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

    def _visit(self, layer: int, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> BlockRun | None:
        """Tokens leave while a prompt is read; a step of one token runs through the blocks as they are."""
        run = under.run
        assert isinstance(run, CacheRun)
        if layer == 0:
            valid = None if mask is None else run.real(x.shape[1])
            if x.shape[1] > 1:
                run.reading = DecoderPrefill(self, x, run.layers, valid, kwargs.get("position_ids"))
            elif run.layers and any(m.revives for m in self.methods):
                run.visit = TokenRevival(self, x, run.layers, run.given)
        return run.reading or run.visit

    @property
    def apart(self) -> bool:
        """Whether heads that keep different numbers may be read one by one: no other attention is asked for."""
        plain = self.steady and not self.host.root.training and not self.host.unasking
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
        block = range(len(self.host.blocks))[layer]
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


def _attend(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before an attention module: show the pass its call."""
    run = under.run
    if isinstance(run, CacheRun):
        hidden = args[0] if args else kwargs["hidden_states"]
        run.attending = Attending(module, hidden, _spoken(kwargs))


def _spoken(kwargs: dict[str, Any]) -> dict[str, Any]:
    """An attention module's arguments as presses of every age read them: the cache under each of its names."""
    cache = given_cache(kwargs)
    return kwargs if cache is None else dict.fromkeys(CACHE_NAMES, cache) | kwargs


def _enter(_block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before the first block: show the pass what enters it."""
    if isinstance(under.run, CacheRun):
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
