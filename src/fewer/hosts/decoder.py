"""Decoders of Hugging Face transformers and their KV caches: how a session gets to see their attention.

Nothing is wrapped: attention that asks the table finds the run of its thread. The model's own implementation does the
work, on the rows that are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fewer.core import Seen, Site
from fewer.core.rope import Rotary

from . import rotary
from .anatomy import Anatomy
from .attention import NAME, SUPPORTED, AttentionRun, HostError, running
from .base import Host
from .logical import band_of
from .steps import bound


class DecoderHost(Host):
    """A stack of causal blocks and the cache they fill, bound."""

    def __init__(self, found: Anatomy, root: nn.Module, path: str) -> None:
        super().__init__(found, root, path)
        own = [
            None if layer.attention is None or layer.way is None else self._part(block, layer.attention)
            for block, layer in zip(self.blocks, found.layers, strict=True)
        ]
        read = {slot: self._part(root, part) for part, slot in found.reads}
        #: Of each layer of the cache, the attention that reads it; None where none does.
        self.attentions = [read.get(i) for i in range(max(read) + 1)] if read else own
        config: Any = root.config
        if getattr(config, "add_cross_attention", False):
            raise HostError("a decoder with cross-attention keeps two caches; only the plain one can be reduced")
        if getattr(config, "reorder_and_upcast_attn", False):
            raise HostError("reorder_and_upcast_attn=True bypasses the attention table; set it to False in the config")
        chosen = config._attn_implementation
        if chosen not in (*SUPPORTED, NAME):
            raise HostError(
                f"the attention implementation {chosen!r} cannot take the rows of a reduced cache; load the model with "
                f"attn_implementation={' or '.join(map(repr, SUPPORTED))}"
            )

    def depth(self, site: Site) -> int:
        return len(self.attentions) if site is Site.KV_CACHE else super().depth(site)

    @cached_property
    def calls(self) -> dict[int, list[int]]:
        """By attention module: the layers of the cache that its calls in one pass read, in order."""
        reads = self.found.reads and [(self._part(self.root, part), slot) for part, slot in self.found.reads]
        found: dict[int, list[int]] = {}
        for module, slot in reads or [(m, i) for i, m in enumerate(self.attentions) if m is not None]:
            found.setdefault(id(module), []).append(slot)
        return found

    @cached_property
    def again(self) -> bool:
        """Whether some layer of the cache is read by several attention calls of a pass."""
        slots = [slot for _, slot in self.found.reads]
        return len(set(slots)) < len(slots)

    @property
    def looped(self) -> bool:
        """Whether blocks are run several times in a pass."""
        return any(len(set(slots)) > 1 for slots in self.calls.values())

    def slots(self, layer: int) -> list[int]:
        """The layers of the cache that a block writes."""
        if not self.found.reads:
            return [layer]
        inside = {id(m) for m in self.blocks[layer].modules()}
        return [i for i, m in enumerate(self.attentions) if id(m) in inside]

    def _block_of(self, slot: int) -> int:
        """The block that writes a layer of the cache; its number where it is none of the stack's."""
        return next((i for i in range(len(self.blocks)) if slot in self.slots(i)), slot)

    @cached_property
    def unasking(self) -> dict[int, nn.Module]:
        """Of some layers: attention that is seen while its own code runs, as it asks no attention table."""
        if self.found.reads:
            return {}
        held = enumerate(zip(self.attentions, self.layers, strict=True))
        return {i: m for i, (m, layer) in held if m is not None and layer.way != "table"}

    @cached_property
    def bands(self) -> dict[int, str]:
        """Of some of these: the name of a buffer that says which positions see which, where not all earlier ones do."""
        return {i: name for i, m in self.unasking.items() if (name := band_of(m)) is not None}

    def band(self, layer: int) -> Tensor | None:
        """(..., P, P) bool: that buffer."""
        return self.unasking[layer].get_buffer(self.bands[layer]) if layer in self.bands else None

    def surround(self, run: Callable[[int, Callable[..., Any], dict[str, Any], str], Any], undo: ExitStack) -> None:
        """Have attention that asks no table run by others, until `undo` closes: run(layer, forward, arguments by name,
        the name of the features)."""
        for index, module in self.unasking.items():
            own = self.own_of(module)

            def ours(*args: Any, index: int = index, module: nn.Module = module, own: Any = own, **kwargs: Any) -> Any:
                name, given = bound(module, args, kwargs)
                return run(index, own, given, name)

            self.stand_in(module, ours, undo)

    @contextmanager
    def watched(self, run: AttentionRun) -> Iterator[None]:
        """Until the block ends, every attention call of the model goes through `run.attend`."""
        with ExitStack() as undo:
            self.enter(undo)
            with running(run):
                yield

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer, each shared by heads / kv_heads query heads."""
        first = next((m for m in self.attentions if m is not None), None)
        shared = getattr(first, "num_key_value_groups", None)
        if isinstance(shared, int) and shared:
            return self.heads // shared
        own = vars(self.root.config).get("num_key_value_heads")
        return own if isinstance(own, int) else self.heads

    @cached_property
    def windows(self) -> list[int | None]:
        """Of each layer: how many of the latest tokens it sees; None = all."""
        from transformers import DynamicCache

        config: Any = self.root.config
        held = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
        slots = range(len(self.attentions))  # a loop may write to more than the config says
        at = (i if i < len(held) else self._block_of(i) for i in slots)
        return [held[i] if i < len(held) else None for i in at]

    def slides(self, layer: int) -> bool:
        """Whether a layer sees a window of the latest tokens only."""
        return self.windows[layer] is not None

    def rotary(self, layer: int) -> Rotary | None:
        """A layer's rotary embedding, found once; None where positions are not rotated.

        Raises   HostError where rows cannot be turned by it.
        """
        if layer not in self._rotaries:
            self._rotaries[layer] = self._rotary(layer)
        return self._rotaries[layer]

    @cached_property
    def _rotaries(self) -> dict[int, Rotary | None]:
        return {}

    def _rotary(self, layer: int) -> Rotary | None:
        if self.found.reads:
            if len({one.turns for one in self.layers}) > 1:
                raise HostError(f"{rotary.STRANGE}; {rotary.UNTURNED}")
            layer = min(self._block_of(layer), len(self.layers) - 1)
        turned = self.layers[layer].turns
        told = layer in self.unasking and rotary.found_in(self.root) is not None  # by ALiBi, if its keys do not turn
        if self.found.rotation is not None or turned is False or (turned is None and told):
            raise HostError(f"{self.found.rotation or rotary.STRANGE}; {rotary.UNTURNED}")
        found = rotary.embedding(self.root, layer)
        if found is None or turned:
            return found
        return Rotary(torch.zeros_like(found.frequencies))  # a layer without positions

    def peek(self, layer: int, x: Tensor, given: dict[str, Any], valid: Tensor | None) -> Seen:
        """What a block would attend with, before it runs. x: (B, n, C), its input; given: its other arguments."""
        caught: list[Seen] = []

        class Catch:
            def attend(self, module: nn.Module, plain: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
                       kwargs: dict[str, Any]) -> Any:  # fmt: skip
                bias = None if valid is None else valid[:, None, None, :]
                scale = kwargs.get("scaling")
                caught.append(Seen(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, bias, causal=True))
                raise _Caught

        try:
            with running(Catch()):
                self.own(layer)(x, **given)
        except _Caught:
            pass
        return caught[0]

    def describe(self) -> Iterator[tuple[str, str]]:
        """What was found, as (what, value) rows."""
        for what, value in super().describe():
            if what != "prefix tokens":
                yield what, value if what != "sites" else f"{value}, the KV cache"
        yield "positions", self.positions

    @property
    def positions(self) -> str:
        """How tokens know where they stand, in a word."""
        try:
            return "learned, or none" if self.rotary(0) is None else "rotary"
        except HostError:
            return "rotary, not to be turned back"


class Calls:
    """Which layer of the cache each attention call of one pass reads."""

    def __init__(self, host: DecoderHost) -> None:
        self.of, self.heard = host.calls, dict.fromkeys(host.calls, 0)

    def next(self, module: nn.Module) -> tuple[int, bool, bool] | None:
        """The layer that a call of a module reads, whether it is the first that does and whether the last; None for a
        module that is none of the decoder's attentions."""
        slots = self.of.get(id(module))
        if slots is None:
            return None
        at = self.heard[id(module)] % len(slots)
        self.heard[id(module)] += 1
        first = at == 0 or slots[at - 1] != slots[at]
        last = at + 1 == len(slots) or slots[at + 1] != slots[at]
        return slots[at], first, last


class _Caught(Exception):
    """Ends a block once its attention was reached."""


__all__ = ["Calls", "DecoderHost"]
