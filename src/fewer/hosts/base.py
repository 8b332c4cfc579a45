"""Host: what knows one model family. A family is a table row; a host is that row bound to a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewer.core import Seen, Tokens
from fewer.core.attention import attend, masked_attention
from fewer.core.cached import Rotary

LINEAR = ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear")  # matrices that multiply each token once


class HostError(TypeError):
    """A model no row of the tables describes."""


@dataclass(frozen=True)
class Family:
    """One architecture: where its blocks are and what their parts are called.

    root              class names of the module that owns the blocks
    block             class name of a block
    norm1, attention, norm2, mlp    path from the block to each part; norm2 and mlp None where a block has one branch
    post_norm         whether a norm stands behind the residual addition (BERT) instead of before its branch
    after_attention, after_mlp      what the branch passes through before the residual is added: modules are called,
                                    parameters and numbers multiply
    patch             path from the root to the convolution that cuts patches; its output shape is the grid; None: text
    final_norm        path from the root to the norm after the last block, None where the model has none of its own
    prefix            protected tokens in front, from the root module
    has_cls           whether row 0 is a class token
    pooler            path from the root to an attention module that pools all rows, where there is one
    pooler_mask       (B, N) bool, True = a real row -> keyword arguments that make the pooler look at these only
    pools_from        first row that pooling reads, from the root module; by default the first behind the prefix
    relative_bias     (block, kwargs) -> additive attention bias of the full sequence, or None
    local             (block) -> whether its own mask says more than which tokens are padding
    rotary            (root, layer) -> the rotary embedding of a decoder's layer; None where positions are learned
    library           which driver runs it, see `fewer.hosts.DRIVERS`
    """

    name: str
    root: tuple[str, ...]
    block: str
    norm1: str
    attention: str
    norm2: str | None = None
    mlp: str | None = None
    patch: str | None = None
    prefix: Callable[[Any], int] = lambda m: 0
    has_cls: Callable[[Any], bool] = lambda m: False
    post_norm: bool = False
    after_attention: tuple[str, ...] = ()
    after_mlp: tuple[str, ...] = ()
    final_norm: str | None = None
    pooler: str | None = None
    pooler_mask: Callable[[Tensor], dict[str, Tensor]] | None = None
    pools_from: Callable[[Any], int] | None = None
    relative_bias: Callable[[nn.Module, dict[str, Any]], Tensor | None] | None = None
    local: Callable[[Any], bool] = lambda block: False
    rotary: Callable[[nn.Module, int], Rotary] | None = None
    library: str = "transformers"

    @property
    def text(self) -> bool:
        """Whether tokens are text: prompts are padded, and what reads the output wants one row per input token."""
        return self.patch is None


class Call:
    """One attention call under way: what to add to it, and what it saw.

    bias: (B, 1, 1, N) additive, float32, or None; policy: (B, N) learned mask, or None; watch: whether to remember
    q, k, v;
    split: where rows are packed, runs the kernel sample by sample.
    """

    def __init__(
        self, bias: Tensor | None = None, policy: Tensor | None = None, eps: float = 1e-6, watch: bool = False,
        split: Callable[..., Tensor] | None = None, whole: bool = False,
    ) -> None:  # fmt: skip
        self.bias, self.policy, self.eps, self.watch, self.split, self.whole = bias, policy, eps, watch, split, whole
        self.kernel: Callable[..., Tensor] = attend  # what a library computes attention with
        self.seen: Seen | None = None
        self.real: Tensor | None = None  # (B, N) bool, for mixers without attention; None = as the mask says
        self.branch: Tensor | None = None  # (B, N, C), what such a mixer gave
        self.where: Tensor | None = None  # of whole: the input positions of the rows, (B or 1, 1, S)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, dropout: float) -> Tensor:
        """q: (B, H, N, d), k, v: (B, G, N, d), mask: the model's own bias. Returns (B, H, N, d)."""
        bias = _sum(mask, self.bias, v.dtype)
        if self.watch:
            shown = bias if self.policy is None else _sum(_dropped(self.policy), bias, v.dtype)
            self.seen = Seen(q, k, v, scale, shown)
        if self.policy is not None:
            return masked_attention(q, k, v, scale, bias, self.policy, self.eps)
        if self.split is not None:
            return self.split(q, k, v, scale, bias, dropout)
        return self.kernel(q, k, v, scale, bias, dropout)


def _sum(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))
    if mask is not None and bias is not None:
        bias = mask + bias
    total = mask if bias is None else bias
    return None if total is None else total.to(dtype)


def _dropped(policy: Tensor) -> Tensor:
    """A learned mask as a bias for those who look: dropped keys get no attention. (B, N) -> (B, 1, 1, N), bool."""
    return (policy > 0)[:, None, None, :]


class Visit(Protocol):
    """What a session does at the sites of one forward pass. x: (B, N, C)."""

    def before(self, layer: int, x: Tensor) -> Tensor: ...
    def call(self, layer: int) -> Call: ...
    def bias(self, layer: int, full: Tensor | None) -> Tensor | None: ...
    def streams(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]: ...
    def mid(self, layer: int, x: Tensor, call: Call) -> Tensor: ...
    def after(self, layer: int, x: Tensor, call: Call) -> Tensor: ...
    def fork(self) -> Visit: ...


class Driver(Protocol):
    """How a library's attention is run with a Call in it, and what must be put on and taken off for that."""

    def attach(self, host: Host, undo: ExitStack) -> None: ...
    def attention(self, module: nn.Module, x: Tensor, mask: Tensor | None, call: Call, kwargs: dict) -> Tensor: ...
    def shape(self, module: nn.Module) -> tuple[int, int]: ...
    def checkpoint(self, host: Host, layer: int) -> Callable[..., Tensor] | None: ...


class Host:
    """A family row bound to one model."""

    def __init__(self, family: Family, root: nn.Module, path: str, driver: Driver) -> None:
        self.family, self.root, self.path, self.driver = family, root, path, driver
        self.blocks = [m for m in root.modules() if type(m).__name__ == family.block]
        self.prefix, self.has_cls = family.prefix(root), family.has_cls(root)
        self.pools_from = self.prefix if family.pools_from is None else family.pools_from(root)
        self.heads, self.head_dim = driver.shape(self._part(self.blocks[0], family.attention))
        self.width = self.heads * self.head_dim
        self._parts: list[tuple[Any, ...]] = [
            tuple(None if name is None else self._part(block, name) for name in
                  (family.norm1, family.attention, family.norm2, family.mlp))
            for block in self.blocks
        ]  # fmt: skip
        self._after = [(self._steps(b, family.after_attention), self._steps(b, family.after_mlp)) for b in self.blocks]

    @staticmethod
    def _part(module: nn.Module, path: str) -> Any:
        return attrgetter(path)(module)

    @staticmethod
    def _steps(block: nn.Module, names: tuple[str, ...]) -> tuple[Any, ...]:
        parts = (attrgetter(name)(block) for name in names)
        return tuple(p for p in parts if not isinstance(p, nn.Identity) and not isinstance(p, float))

    def opening(self, tokens: Tokens) -> Tokens:
        """The tokens that enter a pass, with what this host knows of them: modalities, what else must stay."""
        return tokens

    def entering(self, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The rows that are reduced and the mask that tells their padding, from what the first block gets."""
        return x, mask

    @property
    def channels(self) -> int:
        """Of the features that travel from block to block."""
        return self.width

    @property
    def pair_width(self) -> int:
        """Channels that each pair of a query and a key multiplies, twice; 0 where there are no pairs."""
        return self.width

    @property
    def patch(self) -> nn.Module | None:
        """The convolution that cuts patches; None for text."""
        return None if self.family.patch is None else self._part(self.root, self.family.patch)

    @property
    def patches(self) -> int:
        """Tokens at the model's own image size, without the prefix; for text the most it was made for."""
        if self.family.patch is None:
            return int(self.root.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
        return int(self._part(self.root, f"{self.family.patch.rpartition('.')[0]}.num_patches"))

    @property
    def final_norm(self) -> nn.Module | None:
        return None if self.family.final_norm is None else self._part(self.root, self.family.final_norm)

    @property
    def pooler(self) -> nn.Module | None:
        """The attention module that pools all rows, None where the model has none."""
        part: Any = None if self.family.pooler is None else self.root
        for name in (self.family.pooler or "").split("."):
            part = getattr(part, name, None)
        return part

    def linear_weights(self, layer: int) -> tuple[int, int]:
        """Weights multiplied once per token in attention and in the MLP of a block: MACs per token."""

        def count(name: str | None, behind: tuple[str, ...]) -> int:
            parts = [] if name is None else [self._part(self.blocks[layer], n) for n in (name, *behind)]
            within = (m for part in parts if isinstance(part, nn.Module) for m in part.modules())
            return sum(m.weight.numel() for m in within if type(m).__name__ in LINEAR)  # type: ignore[operator, union-attr, misc]

        family = self.family
        return count(family.attention, family.after_attention), count(family.mlp, family.after_mlp)

    @cached_property
    def arguments(self) -> list[str]:
        """Names of what a block's forward takes besides the features, in order."""
        return list(inspect.signature(type(self.blocks[0]).forward).parameters)[2:]

    def run(self, layer: int, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any], visit: Visit) -> Tensor:
        """One block from its parts, with the visit's plans executed at its sites. x: (B, N, C)."""
        family, block = self.family, self.blocks[layer]
        norm1, attention, norm2, mlp = self._parts[layer]
        x = visit.before(layer, x)
        call = visit.call(layer)
        if family.relative_bias is not None:
            own = family.relative_bias(block, kwargs)
            mask = own if mask is None else mask if own is None else mask + own
        mask, kwargs = visit.bias(layer, mask), visit.streams(layer, kwargs)
        after_attention, after_mlp = self._after[layer]
        y = self.driver.attention(attention, x if family.post_norm else norm1(x), mask, call, kwargs)
        x = x + _through(after_attention, y)
        x = visit.mid(layer, norm1(x) if family.post_norm else x, call)
        if mlp is not None:
            y = mlp(x if family.post_norm else norm2(x))
            x = x + _through(after_mlp, y)
            x = norm2(x) if family.post_norm else x
        return visit.after(layer, x, call)

    def attach(self, forward: Callable[[int], Callable[..., Tensor]], undo: ExitStack) -> None:
        """Give every block the forward of its layer; what `undo` holds takes it off again."""
        self.driver.attach(self, undo)
        self.replace(forward, undo)

    def replace(self, forward: Callable[[int], Callable[..., Tensor]], undo: ExitStack) -> None:
        """The same without what the driver needs."""
        for layer, block in enumerate(self.blocks):
            block.__dict__["forward"] = forward(layer)
            undo.callback(block.__dict__.pop, "forward", None)

    def describe(self) -> Iterator[tuple[str, str]]:
        """What was found, as (what, value) rows."""
        yield "family", self.family.name
        yield "root", f"{self.path or '(the model itself)'}: {type(self.root).__name__}"
        yield "blocks", f"{len(self.blocks)} x {self.family.block}"
        yield "attention", f"{self.heads} heads x {self.head_dim} channels"
        yield "prefix tokens", f"{self.prefix}" + (", the first is the class token" if self.has_cls else "")
        yield "sites", "before a block, around it, between attention and MLP, after it"


def _through(steps: tuple[Any, ...], y: Tensor) -> Tensor:
    for step in steps:
        y = step(y) if isinstance(step, nn.Module) else y * step
    return y
