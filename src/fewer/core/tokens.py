"""Tokens: how many there are, which may go, and the streams that stay in step with the features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .plan import Hard, Masked, Plan, take


@dataclass(frozen=True, eq=False)
class Group:
    """Named positions: a run of them, or an index per sample. Knows nothing about features."""

    start: int = 0
    stop: int = 0
    index: Tensor | None = None  # (B, w)

    def __len__(self) -> int:
        return self.stop - self.start if self.index is None else self.index.shape[-1]

    def of(self, x: Tensor, dim: int = -2) -> Tensor:
        """The group's entries of x along dim (the token axis). x: (B, ..., N, ...)."""
        if self.index is None:
            return x.narrow(dim, self.start, len(self))
        dim = dim % x.dim()
        if dim == x.dim() - 2 and x.dim() in (3, 4):  # whole rows are copied several times faster than gathered
            if x.dim() == 4 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
                return take(x.transpose(1, 2).flatten(2), self.index).unflatten(-1, x.shape[1::2]).transpose(1, 2)
            if x.is_contiguous():
                return take(x, self.index if x.dim() == 3 else self.index[:, None].expand(-1, x.shape[1], -1))
        shape = [1] * x.dim()
        shape[0], shape[dim] = self.index.shape
        target = list(x.shape)
        target[dim] = self.index.shape[-1]
        return x.gather(dim, self.index.view(shape).expand(target))


@dataclass(frozen=True, eq=False)
class Tokens:
    """What a plan must know of the sequence besides its features.

    batch, n   samples, rows per sample (counting padding and masked rows)
    prefix     the first `prefix` rows are protected (CLS, distillation, registers, package tokens)
    has_cls    row 0 is a class token whose attention ranks the others
    size       (B, N) float32, input tokens each row stands for; None = one each
    valid      (B, N) bool, False = padding; None = all real
    policy     (B, N) in [0, 1], the learned masks' keep decisions in training form; None outside training
    guarded    (B, N) bool, further protected rows; None = none
    guarded_count  how many of the free rows `guarded` protects in every sample
    modality   (B, N) int, 0 = text, 1 = image; None = one modality
    images     how many of the rows are image tokens, where samples differ the most in any; None = not known
    position   (B, N) long, the input token each row stands for; None = its own index
    ahead      (B, 1) long, padding in front of each sample's first token in the input; None = none that is known
    """

    batch: int
    n: int
    prefix: int = 0
    has_cls: bool = False
    size: Tensor | None = None
    valid: Tensor | None = None
    policy: Tensor | None = None
    guarded: Tensor | None = None
    guarded_count: int = 0
    modality: Tensor | None = None
    images: int | None = None
    position: Tensor | None = None
    ahead: Tensor | None = None
    device: torch.device | None = None

    @classmethod
    def plain(cls, batch: int, n: int, prefix: int = 0, **streams: Any) -> Tokens:
        """Tokens with nothing special about them: the usual start, and what tests use."""
        return cls(batch, n, prefix, has_cls=streams.pop("has_cls", prefix > 0), **streams)

    # -- named groups -------------------------------------------------------------------------------------------------
    @property
    def cls(self) -> Group:
        """The class token."""
        if not self.has_cls:
            raise ValueError("this model has no class token; choose a method that does not rank by class attention")
        return Group(0, 1)

    @property
    def free(self) -> Group:
        """Everything behind the protected prefix."""
        return Group(self.prefix, self.n)

    @property
    def all(self) -> Group:
        return Group(0, self.n)

    @property
    def last(self) -> Group:
        """The last real token of each sample."""
        return self.recent(1)

    def recent(self, width: int) -> Group:
        """The last `width` real tokens of each sample."""
        width = min(width, self.n)
        if self.valid is None:
            return Group(self.n - width, self.n)
        where = torch.arange(self.n, device=self.valid.device)
        last = torch.where(self.valid, where, -1).amax(-1, keepdim=True)
        offset = torch.arange(width - 1, -1, -1, device=self.valid.device)
        return Group(index=(last - offset).clamp(min=0))

    def first(self, width: int) -> Group:
        """The first `width` real tokens of each sample."""
        width = min(width, self.n)
        if self.valid is None:
            return Group(0, width)
        return Group(index=(~self.valid).to(torch.int8).argsort(dim=-1, stable=True)[:, :width])

    @property
    def free_count(self) -> int:
        """Tokens that may go (an upper bound where samples are ragged)."""
        return self.n - self.prefix - self.guarded_count

    @property
    def protected(self) -> Tensor | None:
        """(B or 1, N) bool, True = must stay; None when nothing is protected."""
        if self.prefix == 0 and self.guarded is None:
            return None
        head = (torch.arange(self.n, device=self.device) < self.prefix)[None]
        return head if self.guarded is None else head | self.guarded

    @property
    def movable(self) -> Tensor | None:
        """(B or 1, N) bool, True = may be dropped or merged (not protected, not padding); None when all are."""
        protected = self.protected
        if protected is None:
            return self.valid
        return ~protected if self.valid is None else ~protected & self.valid

    @property
    def unpadded(self) -> Tensor:
        """(B, N) bool, True = no padding."""
        if self.valid is not None:
            return self.valid
        return torch.ones(self.batch, self.n, dtype=torch.bool, device=self.device)

    @property
    def irregular(self) -> bool:
        """Whether the free tokens are anything else than all rows behind the prefix."""
        return self.guarded is not None or self.valid is not None

    def free_index(self) -> Tensor:
        """(B, free_count) long: positions of the unprotected tokens, ascending; padding is not told apart."""
        if self.protected is None:
            return torch.arange(self.n, device=self.device).expand(self.batch, self.n)
        order = self.protected.to(torch.int8).argsort(dim=-1, stable=True)
        return order[:, : self.free_count].expand(self.batch, -1)

    def where(self, group: Group) -> Tensor:
        """The group as a mask, (B, N) bool."""
        mask = torch.zeros(self.batch, self.n, dtype=torch.bool, device=self.device)
        if group.index is None:
            mask[:, group.start : group.stop] = True
            return mask
        return mask.scatter(1, group.index, True)

    def protect(self, group: Group) -> Tokens:
        """The same tokens with one more group that must stay (counted as if it did not overlap the prefix)."""
        mask = self.where(group)
        guarded = mask if self.guarded is None else self.guarded | mask
        return replace(self, guarded=guarded, guarded_count=self.guarded_count + len(group))

    def unsized(self) -> Tokens:
        """The same tokens, each standing for itself only."""
        return replace(self, size=None)

    def place(self) -> Tensor:
        """(B, N): the input token each row stands for."""
        if self.position is not None:
            return self.position
        return torch.arange(self.n, device=self.device).expand(self.batch, self.n)

    def ordinal(self) -> Tensor:
        """(B, N): the how-manieth of its own sample that token is, from 0; padding in front does not count."""
        ahead = self._ahead()
        return self.place() if ahead is None else self.place() - ahead

    def _ahead(self) -> Tensor | None:
        if self.valid is None or self.position is not None:
            return self.ahead
        return self.valid.to(torch.int8).argmax(-1, keepdim=True)

    def unchanged(self, device: torch.device | None = None) -> Hard:
        """The plan in which every token stays where it is; padding is dropped."""
        if self.valid is None:
            return Plan.identity((self.batch,), self.n, device)
        return Plan.keep((~self.valid).to(torch.int8).argsort(dim=-1, stable=True), self.n, self.valid.sum(-1))

    def after(self, plan: Plan) -> Tokens:
        """The tokens a plan leaves, every stream moved in step."""
        if isinstance(plan, Masked):
            size = plan.sizes(self.size) if plan.change is not None or self.size is not None else None
            masked = replace(self, policy=plan.policy, size=size)
            return masked if not plan.front else masked._with_front(plan)
        merges = not (isinstance(plan, Hard) and not plan.averages)
        size = plan.sizes(self.size) if merges or self.size is not None else None
        valid = plan.valid
        if self.valid is not None and valid is None:
            valid = plan.gather(self.valid)
        guarded = None if self.guarded is None else plan.gather(self.guarded)
        if guarded is not None and plan.valid is not None:  # what stands for padding is arbitrary
            guarded = guarded & plan.valid
        return replace(
            self,
            n=plan.m,
            prefix=self.prefix + getattr(plan, "front", 0),
            size=size,
            valid=valid,
            guarded=guarded,
            modality=None if self.modality is None else plan.gather(self.modality),
            images=self.images if plan.m == self.n else None,
            position=plan.gather(self.place()),
            ahead=self._ahead(),
        )

    def _with_front(self, plan: Masked) -> Tokens:
        """The streams behind a masked plan that adds protected rows."""
        return replace(
            self,
            n=plan.m,
            prefix=self.prefix + plan.front,
            valid=None if self.valid is None else plan.gather(self.valid),
            guarded=None if self.guarded is None else plan.gather(self.guarded),
            modality=None if self.modality is None else plan.gather(self.modality),
            position=plan.gather(self.place()),
            ahead=self._ahead(),
        )
