"""Over denoising steps: rows a method leaves out of a block keep what the block added to them a step before."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core import Site
from ...hosts import Call
from ..program import Bound
from ..state import Lifetime, State
from .blocks import Beside, BlockSite, Pass


class DenoisingSite(BlockSite):
    """Every pass over the blocks is one step. The first of a call, and one of another shape, computes all rows; later
    ones those that the methods choose. Samples of both guidance branches stand side by side in the batch, so that each
    finds its own rows again.
    """

    title = "denoising steps"

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound, kind=DenoisingStep)
        self.state = State()

    def begin(self) -> None:
        """A new call of the pipeline: nothing of the one before is used."""
        self.state.end(Lifetime.CALL)


class DenoisingStep(Pass):
    """One step. What a block added to each row is remembered until the next."""

    site: DenoisingSite

    def _notes(self, layer: int) -> dict[str, Any]:
        return self.site.state.of(Lifetime.CALL, layer)

    def before(self, layer: int, x: Tensor) -> Tensor:
        x = super().before(layer, x)
        if not self.program.at(Site.DENOISING, layer):
            return x
        notes = self._notes(layer)
        notes["entered"], old = x, notes.get("added")
        if old is not None and old.shape == x.shape:
            self.surround(x)
            x, _ = self._at(Site.DENOISING, layer, x, Beside(entry=x + old))
            self._count(layer, 0)
        return x

    def after(self, layer: int, x: Tensor, call: Call) -> Tensor:
        if self.program.at(Site.DENOISING, layer):
            if self._around:
                x = self._undone(x)
            notes = self._notes(layer)
            notes["added"] = (x - notes.pop("entered")).detach()
        return super().after(layer, x, call)
