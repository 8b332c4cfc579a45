"""Signals: what a method may look at. Lazy, computed at most once, never more than asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from . import attention
from .attention import Seen
from .place import Place
from .tokens import Group, Tokens


class SignalError(RuntimeError):
    """A method asked for something this site cannot show."""


@dataclass(eq=False)
class Signals:
    """hidden: (B, N, C), the features the plan will act on. q, k, v: this block's, (B, H or G, N, d).

    grid       (height, width) of the input patches, row-major
    at         the place; pass it on to selectors and matchers
    modules    the method's own trained modules, empty for training-free methods
    training   whether the training form is wanted
    """

    hidden: Tensor
    tokens: Tokens
    at: Place
    seen: Seen | None = None
    grid: tuple[int, int] | None = None
    modules: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    training: bool = False
    memory: dict[str, Any] = field(default_factory=dict)

    def _attention(self, what: str) -> Seen:
        if self.seen is None:
            raise SignalError(f"{what} is not known here: the site comes before this block's attention")
        return self.seen

    @property
    def q(self) -> Tensor:
        return self._attention("q").q

    @property
    def k(self) -> Tensor:
        return self._attention("k").k

    @property
    def v(self) -> Tensor:
        return self._attention("v").v

    @cached_property
    def key(self) -> Tensor:
        """(B, N, d) float32: keys averaged over heads, what a token offers."""
        return self.k.float().mean(dim=1)

    def attention_rows(self, queries: Group) -> Tensor:
        """(B, H, Q, N), float32: probabilities of some queries, all masks and biases applied."""
        seen = self._attention("attention")
        _, h, n, d = seen.q.shape
        self.at.spend(2 * h * len(queries) * n * d)
        return attention.rows(seen, queries)

    @cached_property
    def cls_attention(self) -> Tensor:
        """(B, N), float32: the class token's attention averaged over heads; its own entry included."""
        return self.attention_rows(self.tokens.cls).mean(dim=(1, 2))

    def attention_mass(self, queries: Group | None = None) -> Tensor:
        """(B, H, N), float32: attention received, summed over the queries; memory linear in N."""
        seen = self._attention("attention")
        _, h, n, d = seen.q.shape
        self.at.spend(2 * h * (n if queries is None else len(queries)) * n * d)
        weight = None if self.tokens.valid is None or queries is not None else self.tokens.valid.float()
        return attention.mass(seen, queries, weight)

    @cached_property
    def saliency(self) -> Tensor:
        """(B, N), float32: importance every host can give: class attention where there is a class token, else the
        attention received from all queries, averaged over heads."""
        if self.tokens.has_cls:
            return self.cls_attention
        return self.attention_mass().mean(dim=1)

    def module(self, name: str) -> nn.Module:
        """One of the method's trained modules."""
        if name not in self.modules:
            raise SignalError(f"this method has no module {name!r}; it has {sorted(self.modules)}")
        return self.modules[name]

    @property
    def device(self) -> torch.device:
        return self.hidden.device
