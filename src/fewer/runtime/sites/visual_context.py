"""What is known of the visual rows of a batch of prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core import Tower, View
from ...core.visual.layout import Layout

Guide = Callable[[View], tuple[Tensor, Tensor] | None]


@dataclass(eq=False)
class VisualContext:
    """What is known of the visual rows of a batch of prompts besides the rows themselves.

    layout    where they stand
    tower     what the vision tower gave; None where it shows nothing
    present   (T * P,) bool: rows of the tower's output that were not dropped inside it; None = all
    share     (kept, of): the same as a share of each tile, where all tiles keep the same number
    deep      features added to the visual rows behind the first layers, (V, d) each, V rows of the batch in order
    embedded  (B, S, d), the prompts as they entered the first block
    guide     a view -> its rows and the question in a joint space, see `Visual`
    """

    layout: Layout
    tower: Tower | None = None
    present: Tensor | None = None
    share: tuple[int, int] | None = None
    deep: list[Tensor] = field(default_factory=list)
    deep_index: Tensor | None = None  # (B, S) long, which of those V rows is added to a row; -1 = none
    embedded: Tensor | None = None
    guide: Guide = lambda shown: None

    def deepened(self, layer: int, x: Tensor, place: Tensor) -> Tensor:
        """What a layer gave, with the deep features of the rows that are left. place: (B, n), their places."""
        if layer >= len(self.deep) or self.deep_index is None:
            return x
        which = self.deep_index.gather(-1, place)
        more = self.deep[layer].to(x.dtype)[which.clamp(min=0)]
        return torch.where((which >= 0)[..., None], x + more, x)
