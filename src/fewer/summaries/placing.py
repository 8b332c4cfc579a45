"""Positions of rows that are no tokens: models with a table of positions can leave them out, others turn every row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Placing:
    """How a model places its rows.

    nowhere   (C,): what the model adds to a row at position id `free`; None where positions are not added
    free      the id given to rows that are to have no position
    """

    nowhere: Tensor | None = None
    free: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> Placing:
        """OPT's and GPT-2's tables of positions are known; every other model is taken to place all rows.

        Raises   ValueError for an OPT that projects its embeddings before it adds positions (opt-350m).
        """
        for name, module in model.named_modules():
            offset = getattr(module, "offset", None)
            if isinstance(module, nn.Embedding) and (isinstance(offset, int) or name.endswith("wpe")):
                if any(n.endswith("project_in") for n, _ in model.named_modules()):
                    raise ValueError(
                        f"{type(model).__name__} projects embeddings before it adds positions, so that its states "
                        "cannot stand as its input: take a model whose embeddings are as wide as its layers"
                    )
                free = -1 if offset else 0
                return cls(module.weight[free + (offset or 0)], free)
        return cls()

    @property
    def learned(self) -> bool:
        """Whether positions are added to rows, which summaries then go without."""
        return self.nowhere is not None

    def placed(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B, M, C) and position ids (B, M) for the model. at: (B, M) long, below 0 = nowhere.

        What the table holds at `free` is taken off the row beforehand: nothing is left of it but rounding.
        """
        if self.nowhere is None:
            return x, at
        off = at < 0
        return torch.where(off[..., None], x - self.nowhere.to(x), x), at.masked_fill(off, self.free)
