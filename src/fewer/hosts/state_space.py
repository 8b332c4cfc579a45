"""State-space models of Hugging Face transformers: the table, and how a block without attention is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .base import Call, Family, Host, Visit


def _mamba(name: str, stem: str) -> Family:
    return Family(name, (f"{stem}Model",), f"{stem}Block", "norm", "mixer", final_norm="norm_f", library="state space")


FAMILIES = (_mamba("Mamba", "Mamba"), _mamba("Mamba-2", "Mamba2"))


class StateSpaceDriver:
    """Runs mixers as they are. Padding must come first there: behind the real rows it would wear the state down."""

    def attach(self, host: Host, undo: ExitStack) -> None:
        return None

    def attention(self, module: nn.Module, x: Tensor, mask: Tensor | None, call: Call, kwargs: dict) -> Tensor:
        """mask: (B, N), True = a real row, or the model's own; rows that are no padding may come first."""
        if call.real is None:
            call.branch = module(x, attention_mask=mask, **kwargs)
            return call.branch
        n = x.shape[1]
        where = torch.arange(n, device=x.device)
        gone = n - call.real.sum(-1, keepdim=True)
        behind = ((where - gone) % n)[..., None].expand_as(x)
        y = module(x.gather(1, behind), attention_mask=(where >= gone).to(x.dtype), **kwargs)
        call.branch = y.gather(1, ((where + gone) % n)[..., None].expand_as(y))
        return call.branch

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Channels of the residual stream as one head: a mixer has no query heads."""
        return 1, int(module.hidden_size)  # type: ignore[arg-type]

    def checkpoint(self, host: Host, layer: int) -> Callable[..., Tensor] | None:
        block: Any = host.blocks[layer]
        if block.gradient_checkpointing and block.training and torch.is_grad_enabled():
            return block._gradient_checkpointing_func
        return None


class StateSpaceHost(Host):
    """A Mamba row bound to one model. Its blocks have one branch; attention sites are those around its mixer."""

    def linear_weights(self, layer: int) -> tuple[int, int]:
        """Matrices of the mixer, and what its recurrence multiplies for each token: MACs per token."""
        mixer: Any = self.blocks[layer].mixer
        return super().linear_weights(layer)[0] + 3 * mixer.intermediate_size * mixer.ssm_state_size, 0

    @property
    def pair_width(self) -> int:
        return 0

    @property
    def patches(self) -> int:
        """A state has no longest input."""
        return 0

    def run(self, layer: int, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any], visit: Visit) -> Tensor:
        block: Any = self.blocks[layer]
        x = visit.before(layer, x)
        call, mask = visit.call(layer), visit.bias(layer, mask)
        residual = x.float() if block.residual_in_fp32 else x
        y = block.norm(x.to(block.norm.weight.dtype))
        x = residual + self.driver.attention(block.mixer, y, mask, call, kwargs)
        return visit.after(layer, visit.mid(layer, x, call), call)

    def describe(self) -> Iterator[tuple[str, str]]:
        for what, value in super().describe():
            if what not in ("attention", "prefix tokens"):
                yield what, value
