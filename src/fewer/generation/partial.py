"""A short cache to guess with: sinks, the rows the newest query looks at most, and what came since."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fewer.compat import cached
from fewer.core.attention import grouped_product
from fewer.hosts.decoder import Calls


class Partial:
    """At most `budget` rows of each layer of a cache. What it holds decides what is guessed, never what is written.

    The first `sinks` rows, and up to three quarters of the budget those with the highest q k of the newest certain
    token, summed over the query heads of a KV head. New rows fill the rest; when it is full, all are chosen anew, in
    the pass that verifies and reads the whole cache anyway. Source: TokenSwift, arXiv:2502.18890, sec. 3.2.
    """

    def __init__(self, model: nn.Module, budget: int, sinks: int = 16) -> None:
        """Raises ValueError for a budget without room, HostError where the model's attention cannot be entered."""
        from fewer import hosts

        self.budget, self.sinks, self.chosen_rows = budget, sinks, budget - budget // 4
        if self.chosen_rows <= sinks:
            raise ValueError(f"budget={budget}: a quarter is for new rows, and the rest must be above {sinks} sinks")
        self.model, host = model, hosts.find(model)
        if not isinstance(host, hosts.DecoderHost):
            raise hosts.HostError(f"{host.name} keeps no cache to choose rows of; leave budget= out")
        self.host, self.past = host, 0
        self.cache: Any = None
        self._calls: Calls | None = None
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def rows(self) -> int:
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    def watching(self, past: int) -> AbstractContextManager[None]:
        """Around a pass that verifies, over a cache of `past` rows: rows are chosen in it where that is due."""
        if self.cache is not None and self.rows < self.budget:
            return nullcontext()
        self.past, self._calls, self._chosen = past, Calls(self.host), {}
        return self.host.watched(self)

    def attend(self, module: nn.Module, plain: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
               kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Called by the host for every attention of such a pass."""
        assert self._calls is not None
        slot = self._calls.next(module)
        if slot is not None:
            self._chosen[slot[0]] = self._choice(q[:, :, :1], k[:, :, : self.past], v[:, :, : self.past])
        return plain(module, q, k, v, mask, **kwargs)

    def _choice(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q: (1, H, 1, d), k, v: (1, G, S, d)."""
        count = min(self.chosen_rows, k.shape[2])
        scores = grouped_product(q, k)[:, :, 0].unflatten(1, (k.shape[1], -1)).sum(2)  # (1, G, S)
        scores[..., : self.sinks] = torch.inf
        rows = scores.topk(count, dim=-1).indices.sort(dim=-1).values[..., None].expand(-1, -1, -1, k.shape[-1])
        return k.gather(2, rows), v.gather(2, rows)

    def follow(self, cache: Any, new: int) -> None:
        """The last `new` rows of the whole cache are certain now."""
        from transformers import DynamicCache

        if self._chosen:
            self.cache = DynamicCache()
            for slot, (keys, values) in sorted(self._chosen.items()):
                self.cache.update(keys, values, slot)
            self._chosen = {}
        if self.cache is not None and new:
            for slot, layer in enumerate(cache.layers):
                self.cache.update(layer.keys[..., -new:, :], layer.values[..., -new:, :], slot)

    def guess(self, token: int, position: int) -> Tensor | None:
        """(V,) logits of what follows a token, by the short cache; None before there is one."""
        if self.cache is None:
            return None
        device = next(self.model.parameters()).device
        out: Any = self.model(
            torch.tensor([[token]], device=device), position_ids=torch.tensor([[position]], device=device),
            use_cache=True, **cached(self.model, self.cache),
        )  # fmt: skip
        self.cache.crop(-1)
        logits: Tensor = out.logits[0, -1]
        return logits
