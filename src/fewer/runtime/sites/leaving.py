"""Rows that leave a cache while a token is written: those of all layers at once.

Each layer gives up a row for its new one, and each would pay for the same few operations on small tensors. So the
layers wait until the last one has run; then those that are alike stand as the samples of one batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.cache import CacheSignals, Ranker, Rows, allowed
from ...core.place import Place
from ..kv.layer import ReducedLayer, exchange, placed

if TYPE_CHECKING:
    from .cache_run import CacheRun, LayerCall


class Leaving:
    """The layers of one pass that wait for their turn.

    method: the only one on the cache, where what it ranks by can wait; else None, and no layer does.
    """

    def __init__(self, run: CacheRun) -> None:
        self.run = run
        self.waiting: dict[tuple, list[tuple[LayerCall, ReducedLayer, Place]]] = {}
        program = run.program
        one = program.on_cache[0] if program.unordered and not run.host.again else None
        together = isinstance(one, Ranker) and one.together and one.codec is None and not (one.once or one.gates)
        self.method = one if isinstance(one, Ranker) and together else None

    def takes(self, call: LayerCall, layer: ReducedLayer) -> bool:
        """Whether a layer waits, or has no row to give up, so that nothing else is to be done for it now."""
        method, n = self.method, call.k.shape[2]
        if method is None or call.q.shape[2] > 1 or not call.turns:
            return False
        if layer.position is None or layer.totals[0] != layer.length or not layer.replaces(call.k):
            return False
        if call.weights is None and (method.weighs or method.accumulates):
            return False
        at = self.run.place(call.index, call.turns[0], layer.length)
        kept = allowed(method.allowance, layer.length, at, method.least)
        if kept < n - 1:
            return False
        if kept >= n and not method.accumulates:
            layer.settle()
            return True
        received = None if layer.received is None else layer.received.shape
        alike = kept, call.k.shape, call.k.device, layer.length, layer.position.shape, received, layer.shuffled
        self.waiting.setdefault(alike, []).append((call, layer, at))
        return True

    def leave(self) -> None:
        """All that wait have their turn."""
        for (kept, shape, *_), group in self.waiting.items():
            calls, layers, places = zip(*group, strict=True)
            self._turn(calls, layers, places[0], exchanges=kept < shape[2])
            for layer in layers:
                layer.settle()
        self.waiting = {}

    def _turn(self, calls: tuple[LayerCall, ...], layers: tuple[ReducedLayer, ...], at: Place, exchanges: bool) -> None:
        method, (b, g, n, _), length = self.method, calls[0].k.shape, layers[0].length
        assert method is not None
        weights = None if calls[0].weights is None else torch.cat([c.weights for c in calls])  # type: ignore[misc]
        received: Tensor | None = None
        if method.accumulates:
            assert weights is not None
            received = weights.sum(2).unflatten(1, (g, -1)).mean(2)
            if before := [x.received for x in layers if x.received is not None]:
                received[..., : before[0].shape[-1]] += torch.cat(before)
        if not exchanges:
            assert received is not None
            for layer, own in zip(layers, received.split(b), strict=True):
                layer.received = own
            return
        self.run.site.acted()
        place = placed(torch.cat([x.position for x in layers]), length, n)  # type: ignore[misc]
        rows = Rows(
            len(place), n, device=place.device, totals=(length,) * len(place), age=length - place,
            shuffled=layers[0].shuffled,
        )  # fmt: skip
        shown = place.new_empty(len(place), g, n, 0)  # nobody looks at keys
        signals = CacheSignals(shown, rows, at, weights=weights, received=received)
        exchange(layers, place, method.leaver(signals, rows), received)
        if method.travelling:
            for call, layer in zip(calls, layers, strict=True):
                rotary = self.run.host.rotary(call.index)
                assert rotary is not None
                layer.rerotate(rotary, method.travelling)
