"""What can be read of a pass afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Plan


@dataclass(frozen=True, eq=False)
class Step:
    """A plan that was executed, by which method and after which block's attention.

    left  (B, N, C), what the tokens it dropped keep, where the model's output has a row for each; None elsewhere
    """

    layer: int
    method: int
    plan: Plan
    left: Tensor | None = None
