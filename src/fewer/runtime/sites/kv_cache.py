"""The KV cache of a decoder: the site where passes open a cache, look at its attention and evict rows from it."""

from __future__ import annotations

import inspect
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...adapters.kvpress import Pressed
from ...compat import CACHE_NAMES, cached, given_cache, pretrained, without_cache
from ...core import Site
from ...core.cache import Attending, Rereader
from ...hosts import BlockRun, DecoderHost, Table, under
from ...spec import text
from ..kv.layer import ReducedLayer, install
from ..kv.state import Record
from ..program import Bound, SessionError
from ..trace import CacheTrace
from .blocks import BlockSite
from .cache_run import CacheRun, text_positions
from .prefill import DecoderPrefill
from .reread import reread
from .revival import TokenRevival


class Beside(Protocol):
    """A site whose rows stand in the prompts of a decoder: it tells each pass of them."""

    drops: bool  # whether rows it told of may be missing, though no method acts in the decoder

    def enter(self, run: CacheRun, given: dict[str, Any]) -> None: ...
    def prefill(self, blocks: BlockSite, run: CacheRun, x: Tensor, kwargs: dict[str, Any]) -> BlockRun | None: ...


class KVCacheSite:
    """A decoder whose cache is reduced while it reads and writes, and whose tokens may leave between its blocks.

    `generate()` and the forward pass are called as before. Every pass of several tokens (a prompt, a chunk of one, the
    next turn) ends with the cache at its budget; methods that act while decoding keep it there at every step.
    """

    title = "KV cache"
    host: DecoderHost

    def __init__(self, bound: Bound, beside: Beside | None = None) -> None:
        assert isinstance(bound.host, DecoderHost)
        self.bound, self.host, self.program, self.beside = bound, bound.host, bound.program, beside
        self.between_blocks = self.program.between_blocks or (beside is not None and beside.drops)
        self.blocks = BlockSite(bound, self._begin)
        self._local = threading.local()
        self._records: dict[int, Record] = {}  # by block
        self._notes: list[str] = []
        self._warned: set[str] = set()
        self._idle = ""  # why the methods on the cache have done nothing since it was new,
        self._unread = ""  # or whose scores are not those of what is left
        self._flops = 0
        self._seconds = 0.0
        self.remembered: dict[int, dict[str, Any]] = {}  # what methods noted in the last pass without a cache
        self._names = [p for p in inspect.signature(self.host.root.forward).parameters if p != "kwargs"]

    # -- on ------------------------------------------------------------------------------------------------------------
    def attach(self, undo: ExitStack) -> None:
        """Take part in the decoder's passes until `undo` closes."""
        root, methods = self.host.root, self.program.on_cache
        undo.callback(root.register_forward_pre_hook(self._open, with_kwargs=True).remove)
        self.host.surround(self._around, undo)
        if self.between_blocks:
            self.blocks.attach(undo)
        undo.callback(root.register_forward_hook(self._close, with_kwargs=True, always_call=True).remove)
        attentions = list(dict.fromkeys(m for m in self.host.attentions if m is not None))
        if any(m.attends for m in methods):
            for module in attentions:
                undo.callback(module.register_forward_pre_hook(_attend, with_kwargs=True).remove)
        for method in methods:
            if isinstance(method, Pressed):
                method.attach(self.bound.model, root, attentions, undo)
        if any(m.enters for m in methods):
            undo.callback(self.host.blocks[0].register_forward_pre_hook(_enter, with_kwargs=True).remove)

    @property
    def trace(self) -> CacheTrace:
        """Of the last cache, and of the last prompt."""
        depth, notes = self.host.depth(Site.KV_CACHE), [*self._notes, *filter(None, [self._idle, self._unread])]
        return CacheTrace(self._records, depth, self._flops, self._seconds, notes, self.blocks.trace)

    # -- how rows may be read and kept ---------------------------------------------------------------------------------
    @property
    def plain(self) -> bool:
        """Whether nothing but the fused kernel's answer is asked of attention: no dropout, no maps."""
        return not self.host.root.training and Table.before(self.host.root.config) == "sdpa"

    @property
    def headwise(self) -> bool:
        """Whether heads that keep different numbers may be read one by one."""
        biased = any(layer.anew for layer in self.host.layers)
        return self.program.steady and not (self.host.unasking or self.host.again or biased) and self.plain

    @property
    def unordered(self) -> bool:
        """Whether rows may lie in any order while tokens are written."""
        return self.program.unordered

    @property
    def weighs(self) -> bool:
        """Whether a step's attention is computed here: a method needs its probabilities."""
        return self.program.weighs and self.unordered and self.plain

    # -- called by the passes ------------------------------------------------------------------------------------------
    def spend(self, flops: int) -> None:
        self._flops += flops

    def note(self, line: str) -> None:
        if line not in self._notes:
            self._notes.append(line)

    def warn(self, line: str) -> None:
        """Say something once where the user looks."""
        if line not in self._warned:
            self._warned.add(line)
            warnings.warn(line, stacklevel=2)

    def acted(self) -> None:
        """A method on the cache has done something."""
        self._idle = ""

    @contextmanager
    def clock(self) -> Iterator[None]:
        """What is done here is the methods' own work."""
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def inner(self, run: Any, root: nn.Module, **given: Any) -> None:
        """A pass over the decoder that is part of another one: `run` sees its attention."""
        self._local.inner = run
        root(**given)

    # -- called by the host --------------------------------------------------------------------------------------------
    @property
    def _passes(self) -> list[Any]:
        """What ran on this thread around the passes under way, and in which block's call."""
        passes: list[Any] = self._local.__dict__.setdefault("passes", [])
        return passes

    def _open(self, root: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the decoder runs: find the cache of this pass, or make one, and send the pass along."""
        self.host.renew()
        self._passes.append((under.run, under.call))
        under.run, under.call, self._local.inner = getattr(self._local, "inner", None), None, None
        if under.run is not None:  # a pass of our own
            return args, kwargs
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        own = given_cache(given)
        cache, taken = self._cache(root, given)
        if cache is None and (silent := [m for m in self.program.on_cache if not m.gates]):
            line = (
                f"{', '.join(map(text, silent))} did nothing: a pass with use_cache=False, or a training step, keeps "
                "no cache; call the model with use_cache=True"
            )
            self._records, self._idle, self._unread = {}, line, ""
            self.warn(line)
        if not taken:
            return (), given
        if cache is not None:
            install(cache, [module is not None for module in self.host.attentions], self)
            for layer, window in zip(cache.layers, self.host.windows, strict=False):
                if window is not None and isinstance(layer, ReducedLayer):
                    layer.slide(window)  # a cache that was made without a config does not know
        held, learned = None if cache is None else cache.get_seq_length(), self.host.learned
        front, kept = (0, 0) if learned is None else learned.in_pass(held)
        if not held or kept:
            self._flops, self._notes = 0, []
            self.blocks.forget()
        run = CacheRun(self, cache, given.get("attention_mask"), text_positions(given.get("position_ids")), front)
        for layer in run.layers if kept else ():
            layer.learned = kept
        run.fresh |= bool(kept)
        self._records, self._seconds = {i: layer.record for i, layer in run.at.items()}, 0.0
        under.run, self.remembered = run, run.memory
        self._unread, run.given_none = "", own is None
        if run.fresh and self.program.on_cache:
            self._idle = "nothing left the cache: what it holds is within the budget"
        if self.beside is not None:
            self.beside.enter(run, given)
        return (), given

    def _cache(self, root: nn.Module, given: dict[str, Any]) -> tuple[Any, bool]:
        """The cache of a pass, put into its arguments where it had none, and whether anything of ours takes part."""
        cache: Any = given_cache(given)
        use = given.get("use_cache")
        if use is None:
            use = getattr(root.config, "use_cache", False)
        if self.program.execution == "masked" and self.between_blocks:
            if cache is not None:
                raise SessionError(
                    "execution='masked' hides what is dropped from one pass only; a cache would show it to the next: "
                    "use execution='padded' to generate, or call the model with use_cache=False"
                )
            use = given["use_cache"] = False
        if cache is not None:
            return cache, True
        checkpoints = root.training and getattr(root, "gradient_checkpointing", False)
        if checkpoints and torch.is_grad_enabled():
            for method in self.program.on_cache:
                if method.gates:
                    raise SessionError(
                        f"{text(method)} adds to the attention of all blocks, which gradient checkpointing would "
                        "run again without it; call model.gradient_checkpointing_disable()"
                    )
        if use and root.training and torch.is_grad_enabled() and _padded_behind(given.get("attention_mask")):
            use = given["use_cache"] = False  # a training step: nobody goes on from here
        if not use or checkpoints:
            return None, self.between_blocks or self.program.gates
        from transformers import DynamicCache

        cache = DynamicCache(config=pretrained(root).config)
        rest = without_cache(given) | cached(root, cache)
        given.clear()
        given.update(rest)
        return cache, True

    def _around(self, index: int, own: Callable, given: dict[str, Any], features: str) -> Any:
        """An attention module that asks no table runs: as a part of a pass, if one is under way."""
        run = under.run
        return run.around(index, own, given, features) if isinstance(run, CacheRun) else own(**given)

    def _close(self, root: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """After the decoder has run, or failed: the turn of methods that have the prompt read again."""
        run = under.run
        under.run, under.call = self._passes.pop() if self._passes else (None, None)
        if output is None or not isinstance(run, CacheRun) or not run.layers:
            return
        run.finish()
        self._records = {i: layer.record for i, layer in run.at.items()}  # a hook may have had a cache of its own
        for which, method in enumerate(self.program.methods):
            if not isinstance(method, Rereader):
                continue
            with self.clock():
                if run.fresh:
                    reread(run, which, root, kwargs)
                elif run.layers[0].length - run.layers[0].began > 1:
                    line = f"{text(method)} compresses what an empty cache reads first; later passes are kept whole"
                    self.note(line)
                    self.warn(line)
        if run.fresh and not self._idle and run.layers[0].length > 1 and any(m.evicts for m in self.program.on_cache):
            self._unread = (
                "the scores of this pass are the unreduced model's: rows left the cache behind it; go on from its "
                "cache to see what is left"
            )
            if run.given_none:  # generate() comes with a cache, and goes on
                self.warn(self._unread)

    def _begin(self, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> BlockRun | None:
        """Tokens leave while a prompt is read; a step of one token runs through the blocks as they are."""
        run = under.run
        assert isinstance(run, CacheRun)
        if self.beside is not None and (told := self.beside.prefill(self.blocks, run, x, kwargs)) is not None:
            return told
        if x.shape[1] > 1:
            valid = None if mask is None else run.real(x.shape[1])
            run.prefill = DecoderPrefill(self.blocks, x, run.at, valid, kwargs.get("position_ids"), run.front)
            return run.prefill
        if run.layers and self.program.revives:
            return TokenRevival(self.bound, x, run.layers, run.given)
        return None


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
