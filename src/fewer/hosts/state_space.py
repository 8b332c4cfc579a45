"""State-space models: blocks with a mixer and no attention, and how padding is kept from wearing their state down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .attention import Call
from .base import BlockRun, Host


class StateSpaceHost(Host):
    """A stack of mixers, bound. Its blocks have one branch; attention sites are those around its mixer."""

    def linear_weights(self, layer: int) -> tuple[int, int]:
        """Matrices of the mixer, and what its recurrence multiplies for each token: MACs per token."""
        mixer: Any = self.blocks[layer].mixer
        return sum(super().linear_weights(layer)) + 3 * mixer.intermediate_size * mixer.ssm_state_size, 0

    @property
    def pair_width(self) -> int:
        return 0

    @property
    def patches(self) -> int:
        """A state has no longest input."""
        return 0

    def run(
        self, layer: int, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any], visit: BlockRun
    ) -> tuple[Tensor, tuple[Any, ...]]:
        block: Any = self.blocks[layer]
        x = visit.before(layer, x)
        call, mask = visit.call(layer), visit.bias(layer, mask)
        residual = x.float() if block.residual_in_fp32 else x
        y = block.norm(x.to(block.norm.weight.dtype))
        x = residual + _mixed(block.mixer, y, mask, call, kwargs)
        return visit.after(layer, visit.mid(layer, x, call), call), ()

    def describe(self) -> Iterator[tuple[str, str]]:
        for what, value in super().describe():
            if what not in ("attention", "prefix tokens"):
                yield what, value


def _mixed(mixer: Any, x: Tensor, mask: Tensor | None, call: Call, kwargs: dict[str, Any]) -> Tensor:
    """What a mixer gives. mask: (B, N), True = a real row, or the model's own; rows that are no padding may come first:
    for the mixer they come last, as padding behind them would wear the state down."""
    if call.real is None:
        call.branch = mixer(x, attention_mask=mask, **kwargs)
        return call.branch
    n = x.shape[1]
    where = torch.arange(n, device=x.device)
    gone = n - call.real.sum(-1, keepdim=True)
    behind = ((where - gone) % n)[..., None].expand_as(x)
    y = mixer(x.gather(1, behind), attention_mask=(where >= gone).to(x.dtype), **kwargs)
    call.branch = y.gather(1, ((where + gone) % n)[..., None].expand_as(y))
    return call.branch
