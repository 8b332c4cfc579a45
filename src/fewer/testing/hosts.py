"""What a check is given besides the method: a small model, images, and settings that fit both."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fewer.core import Budget, Capacity, KeepRatio, Mass, Reducer, Remove, Threshold
from fewer.hosts import Host, find
from fewer.runtime.apply import apply
from fewer.runtime.session import Session

from .models import TEXTS, VIDEOS, Shape, answer, clips, images, texts, tiny_vit

DEPTH = 3
LAYERS = (1, 2)  # where a method acts that does not act in every block
PLENTY = 10**6


@cache
def _built(kind: str) -> nn.Module:
    return tiny_vit(kind, depth=DEPTH)


@dataclass(frozen=True)
class TinyHost:
    """A kind of tiny model, see KINDS and TEXTS in `fewer.testing.models`, and how a check runs a method on it.

    device: where the checks run; synchronisation is only seen in full on a GPU.
    """

    kind: str = "vit"
    device: str = "cpu"

    def model(self) -> nn.Module:
        """A fresh copy, in eval mode."""
        return copy.deepcopy(_built(self.kind)).to(self.device)

    @property
    def batch(self) -> Tensor:
        """Three images, (3, 3, 32, 32), clips, (3, 8, 3, 16, 16), or the embeddings of three texts, (3, 17, 32); of
        words and patches, one more: the class token of the image."""
        if self.kind in VIDEOS:
            return clips(3).to(self.device)
        tokens = 18 if self.kind == "vilt" else 17
        return (texts(3, tokens) if self.kind in TEXTS else images(3)).to(self.device)

    @property
    def found(self) -> Host:
        return find(_built(self.kind))

    @property
    def patches(self) -> int:
        """Tokens that may go: patches, or words."""
        return Shape().patches

    @property
    def lengths(self) -> Tensor | None:
        """(3, N) bool, False = padding, for a batch of texts of different lengths; None where there are none."""
        if self.kind not in TEXTS or self.kind == "vilt":
            return None
        n = self.batch.shape[1]
        return (torch.arange(n) < torch.tensor([n, n - 5, n - 8])[:, None]).to(self.device)

    @property
    def guarded(self) -> int:
        """Tokens behind the first that must stay: the last one of a causal model, an image's class token."""
        return int(self.kind in TEXTS and (self.kind == "vilt" or not self.found.prefix))

    def session(self, model: nn.Module, method: Reducer, **options: Any) -> Session:
        """The method put into the model. Trained methods get random modules, the same ones every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return apply(model, method, modules="untrained", **options)

    def run(self, method: Reducer, x: Tensor, **options: Any) -> Tensor:
        """The answer of a fresh model with the method on, without gradient."""
        model = self.model()
        with torch.no_grad(), self.session(model, method, **options):
            return answer(model, x)

    @contextmanager
    def passed(self, method: Reducer, **options: Any) -> Iterator[Session]:
        """A session that has just run the batch."""
        model = self.model()
        with torch.no_grad(), self.session(model, method, **options) as session:
            answer(model, self.batch)
            yield session


def fitted(method: type[Reducer] | Reducer) -> Reducer:
    """A method with a budget and layers that suit a tiny host: a moderate reduction in its own convention."""
    method = method() if isinstance(method, type) else method
    changes: dict[str, Any] = {"budget": _moderate(method.budget)}
    if method.layers is not None:
        changes["layers"] = LAYERS[: len(method.layers)]
    if hasattr(method, "sinks"):  # tokens it protects on its own are not counted by the checks
        changes["sinks"] = 0
    return replace(method, **changes)


def keep_all(method: Reducer) -> Reducer:
    """The same method with a budget that keeps everything."""
    return replace(method, budget=_everything(method.budget))


def _moderate(budget: Budget) -> Budget:
    if isinstance(budget, Remove):
        return Remove(3)
    if isinstance(budget, KeepRatio):
        return replace(budget, ratio=(0.7, 0.5) if isinstance(budget.ratio, tuple) else 0.6)
    if isinstance(budget, Mass):
        return Mass(0.7)
    return budget if isinstance(budget, Threshold) else Capacity((9, 6))


def _everything(budget: Budget) -> Budget:
    match budget:
        case Remove():
            return Remove(0)
        case KeepRatio():
            return replace(budget, ratio=1.0)
        case Capacity():
            return Capacity(PLENTY)
        case Mass():
            return Mass(1.0)
        case Threshold():
            return Threshold(float("-inf"))
    raise TypeError(f"{type(budget).__name__}: say in fewer.testing which of its values keeps everything")


def text_hosts(device: str = "cpu") -> list[TinyHost]:
    """One host per way a model of text can differ: the norm's place, windows, positions, the kind of mixer, an image
    behind it."""
    return [TinyHost(kind, device) for kind in TEXTS]


def video_hosts(device: str = "cpu") -> list[TinyHost]:
    """One host per way a model of videos can differ: no class token, one, positions told to the blocks."""
    return [TinyHost(kind, device) for kind in VIDEOS]


def tiny_hosts(device: str = "cpu") -> list[TinyHost]:
    """One host per way a model can differ: prefix tokens, no class token, layer scale, relative bias, how attention is
    computed, the library."""
    kinds = ["vit", "deit", "dinov2_registers", "siglip", "beit", "blip"]
    try:
        import timm  # noqa: F401
    except ImportError:
        return [TinyHost(kind, device) for kind in kinds]
    return [TinyHost(kind, device) for kind in [*kinds, "timm_mean", "timm_registers"]]
