"""What is measured: a model, its data, and how its answers are read."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fewer import hosts
from fewer.datasets.images import ImageSet
from fewer.hosts import Host

from .knn import knn_hits
from .settings import default_methods

CACHED = 1 << 30  # bytes of pixel values kept in memory between passes


class SubjectError(ValueError):
    """A model and a data set that cannot be measured together."""


@dataclass(eq=False)
class Subject:
    """A model on a data set.

    processor  PIL images -> (B, C, H, W)
    layer      0-based block whose output is read as features; None = the class scores where the model has a head
               for the data's classes, else the features behind the last norm
    notes      what must be known of the data
    """

    model: nn.Module
    processor: Callable[..., Tensor]
    data: ImageSet
    name: str = "model"
    batch: int = 32
    layer: int | None = None
    neighbours: int = 3
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    notes: list[str] = field(default_factory=list)
    unit: ClassVar[str] = "images"
    call: ClassVar[str] = "model(pixel_values)"  # what one writes to run it

    def __post_init__(self) -> None:
        if len(self.data) == 0:
            raise SubjectError(f"{self.data.name} has no images to measure on")
        if self.batch < 1:
            raise SubjectError(f"batch={self.batch}: a batch holds at least one image")
        blocks = len(self.host.blocks)
        if self.layer is not None and not 0 <= self.layer < blocks:
            raise SubjectError(f"layer={self.layer}: the model has blocks 0 to {blocks - 1}")
        if not self.classifies and len(self.data) <= self.neighbours:
            raise SubjectError(f"{len(self.data)} images are too few for {self.neighbours} nearest neighbours")

    @cached_property
    def host(self) -> Host:
        return hosts.find(self.model)

    @cached_property
    def twin(self) -> nn.Module:
        """The same model a second time, on the same weights: methods go on this one."""
        return twin_of(self.model)

    @cached_property
    def twin_host(self) -> Host:
        return hosts.find(self.twin)

    @property
    def classes(self) -> int:
        """Of the model's head; 0 where it has none."""
        return len(class_names(self.model))

    @property
    def classifies(self) -> bool:
        """Whether the answers are scores of the data's classes; else they are features."""
        return self.layer is None and self.classes == len(self.data.classes)

    @property
    def score(self) -> str:
        return "accuracy" if self.classifies else f"{self.neighbours}-NN accuracy"

    @property
    def extent(self) -> str:
        """What is measured on, in words."""
        return f"{len(self.data):,} {self.unit} of {self.data.name}"

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Patches (height, width)."""
        patch = self.host.patch
        assert patch is not None
        with torch.inference_mode():
            height, width = patch(self.pixels(0)[:1]).shape[-2:]
        return int(height), int(width)

    def default_methods(self, *, all: bool = True) -> list[str]:
        """What is measured when nobody says otherwise. all: everything, not only what differs."""
        return default_methods(self.host, all=all)

    def size(self, index: int) -> int:
        """Items in batch `index`."""
        return min(self.batch, len(self.data) - index * self.batch)

    def length(self, index: int) -> int:
        """Tokens of each item in batch `index`, before anything is reduced."""
        return self.host.prefix + math.prod(self.grid)

    # -- images --------------------------------------------------------------------------------
    @cached_property
    def _pixels(self) -> dict[int, Tensor]:
        return {}

    @property
    def batches(self) -> int:
        return -(-len(self.data) // self.batch)

    def pixels(self, index: int) -> Tensor:
        """Batch `index`, (B, C, H, W), on the device and in the dtype of the model."""
        if index not in self._pixels:
            first = index * self.batch
            made = self.data.batch(range(first, min(first + self.batch, len(self.data))), self.processor)
            if made.nbytes * self.batches > CACHED:
                return made.to(self.device, self.dtype)
            self._pixels[index] = made
        return self._pixels[index].to(self.device, self.dtype)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for index in range(self.batches):
            yield index, self.pixels(index)

    # -- answers --------------------------------------------------------------------------------
    def answer(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Class scores (B, classes) or features (B, C) of one batch, by the model or its twin."""
        if self.classifies:
            out = self.forward(model, pixels)
            return out if isinstance(out, Tensor) else out.logits
        host = self.host if model is self.model else self.twin_host
        block = host.blocks[-1 if self.layer is None else self.layer]
        source = block if self.layer is not None or host.final_norm is None else host.final_norm
        seen: list[Tensor] = []
        hook = source.register_forward_hook(lambda _module, _args, out: seen.append(_tensor(out)))
        try:
            self.forward(model, pixels)
        finally:
            hook.remove()
        rows = seen[-1]
        return rows[:, 0] if host.has_cls else rows.mean(1)

    def forward(self, model: nn.Module, pixels: Tensor) -> Any:
        """One forward pass of the model or its twin: with its head where classes are asked for, else the encoder."""
        if self.classifies:
            return model(pixels)
        return (self.host if model is self.model else self.twin_host).root(pixels)

    def hits(self, answers: Tensor) -> np.ndarray:
        """Which images are classified rightly, (N,) bool: by the scores, or by their nearest neighbours' labels.

        An answer that is not finite is wrong.
        """
        labels = self.data.labels
        finite = answers.isfinite().all(-1)
        if self.classifies:
            right = answers.argmax(-1) == labels
        else:
            right = knn_hits(answers.where(finite[:, None], 0), labels, self.neighbours)
        return (right & finite).numpy()


def class_names(model: Any) -> dict[int, str]:
    """What the classes of an image model's head are called, as far as it says; nothing where it has no head."""
    if "ForImageClassification" in type(model).__name__:
        return {int(k): str(name) for k, name in model.config.id2label.items()}
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ()
    head = int(getattr(model, "num_classes", 0))
    return dict(enumerate(names if len(names) == head else (f"LABEL_{k}" for k in range(head))))


def twin_of(model: nn.Module) -> nn.Module:
    """The same model a second time, on the same weights."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _tensor(out: Tensor | Sequence[Tensor]) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]
