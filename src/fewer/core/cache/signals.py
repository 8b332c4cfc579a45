"""What a method on the KV cache may look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import attention
from ..attention import Seen
from ..errors import SignalError
from ..rope import Rotary
from ..signals import Signals, lazy
from ..tokens import Group
from .rows import Rows


@dataclass(eq=False)
class Attending:
    """A call of an attention module. hidden: (B, Q, C), its input; arguments: by keyword; weights: (B, H, Q, S), where
    the model's own attention gives them (eager), else None."""

    module: nn.Module
    hidden: Tensor
    arguments: dict[str, Any]
    weights: Tensor | None = None


@dataclass(eq=False)
class CacheSignals(Signals):
    """What a method may look at in one cache layer: k, v (B, G, S, d) are the stored rows, the newest last; q
    (B, H, Q, d) are the queries of this pass, which stand at the last Q rows.

    asking    (B, Q) bool, which queries are real; None = all
    received  (B, G, S) float32: attention each row has received since it came, mean over the query heads of a group
    rotary    this layer's rotary embedding, for methods that declare `rotates`; None where the model has none
    at_rope   (B or 1, Q): the position each query was rotated by
    entry     (B, Q, C): hidden states that entered the first block in this pass, for methods that declare `enters`
    attending the attention module's own call, for methods that declare `attends`
    weights   (B, H, 1, S) float32: attention of the only query, where it was computed for the model; None elsewhere
    memory    what the method keeps for the life of the cache, one dict for all layers. Tensors in it are (B, ..., T, C)
              with one row for each of the T tokens seen, and follow the cache when samples are picked or tokens cropped
    local     what the method keeps for this layer's stored rows: tensors (B, ...), which follow when samples are
              picked. Emptied whenever rows go, for then the rows have new numbers
    """

    asking: Tensor | None = None
    received: Tensor | None = None
    rotary: Rotary | None = None
    at_rope: Tensor | None = None
    entry: Tensor | None = None
    attending: Attending | None = None
    weights: Tensor | None = None
    local: dict[str, Any] = field(default_factory=dict)
    _memo: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def query_scale(self) -> float:
        """The factor on q k^T."""
        return self._attention("the scale").scale

    def per_group(self, x: Tensor) -> Tensor:
        """(B, H, ...) -> (B, G, ...): mean over the query heads that share a KV head."""
        return x if x.shape[1] == self.kv_heads else x.unflatten(1, (self.kv_heads, -1)).mean(2)

    def _last(self, width: int) -> tuple[Group, Tensor | None]:
        """The last `width` real queries as a group, and (B, width) weights that are zero where there are fewer."""
        q = self.q.shape[-2]
        width = min(width, q)
        if self.asking is None:
            return Group(q - width, q), None
        order = self.asking.to(torch.int8).argsort(dim=-1, stable=True)[:, q - width :]  # real ones last, ascending
        return Group(index=order), self.asking.gather(-1, order).float()

    def window_mass(self, width: int) -> Tensor:
        """(B, H, S) float32: attention the last `width` real queries of this pass give each row, averaged over them.

        A pass with fewer queries uses all of them. Memory is linear in S.
        """
        if self.weights is not None:
            return self.weights.squeeze(2)
        if width not in self._memo:
            group, weight = self._last(width)
            _, h, _, d = self.q.shape
            self.at.spend(2 * h * len(group) * self.k.shape[-2] * d)
            mass = attention.mass(self._attention("attention"), group, weight)
            number = len(group) if weight is None else weight.sum(-1).clamp(min=1)[:, None, None]
            self._memo[width] = mass / number
        return self._memo[width]

    def attention_mass_of_all(self) -> Tensor:
        """(B, H, S) float32: attention all real queries of this pass give each row, summed; memory linear in S."""
        if self.weights is not None:
            return self.weights.sum(2)
        n, h, d = self.q.shape[-2], self.q.shape[1], self.q.shape[-1]
        self.at.spend(2 * h * n * self.k.shape[-2] * d)
        weight = None if self.asking is None else self.asking.float()
        return attention.mass(self._attention("attention"), None, weight)

    def before(self, rows: Rows, width: int) -> Tensor:
        """(1 or B, 1 or H, S) bool: the real rows older than the newest `width`."""
        older = ~rows.newest(width) if rows.real is None else rows.real & ~rows.newest(width)
        return older if older.shape[1] == 1 else older.repeat_interleave(self.q.shape[1] // older.shape[1], dim=1)

    @lazy
    def _back(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine that turn this pass's queries back, each (B or 1, 1, Q, d / 2), over the model's scale."""
        assert self.rotary is not None
        if self.at_rope is None:
            raise SignalError("the positions of this pass are not known; pass position_ids to the model")
        cos, sin = self.rotary.angles(-self.at_rope[:, None])
        return cos / self.rotary.scale, sin / self.rotary.scale

    def plain_queries(self, heads: slice = slice(None)) -> Tensor:
        """(B, H, Q, d) float32: this pass's queries, of all heads or some, as before the rotary embedding."""
        q = self.q[:, heads].float()
        return q if self.rotary is None else self.rotary.turn_by(q, *self._back)


def attended(seen: Seen) -> tuple[Tensor, Tensor]:
    """Attention of one query that sees every row: (B, 1, H, d), and its probabilities, (B, H, 1, S) float32.

    The query heads that share a KV head stand as its queries. No bias is looked at."""
    (b, h, _, d), g = seen.q.shape, seen.k.shape[1]
    q = seen.q.view(b, g, h // g, d).float() * seen.scale
    p = (q @ seen.k.float().transpose(-1, -2)).softmax(-1)
    out = p.to(seen.v.dtype) @ seen.v
    return out.view(b, 1, h, -1), p.view(b, h, 1, -1)
