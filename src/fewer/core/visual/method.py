"""What a method on visual tokens declares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..place import Site
from ..plan import Plan
from ..reducer import Reducer
from ..signals import Signals
from .view import Scope


@dataclass(frozen=True)
class Shape:
    """Of a vision-language model, for methods with modules of their own.

    width     channels of the language model;  heads of it
    channels  of the vision tower's features that enter the projector;  depth: blocks of the tower
    grid      (height, width) of a tile's rows
    """

    width: int
    heads: int
    channels: int
    depth: int
    grid: tuple[int, int]


class VisualReducer(Reducer):
    """A method on the visual tokens of a vision-language model. `signals.visual` shows what surrounds them.

    site       BRIDGE, between projector and language model; or before or behind its blocks
    scope      "image": its budget counts per image or video; "prompt": per prompt
    looks_at   blocks of the vision tower whose attention it looks at; None = the one whose output is used
    changes    whether it is asked even where all rows stay: they come to hold something else, or it remembers them
    """

    site: ClassVar[Site] = Site.BRIDGE
    scope: ClassVar[Scope] = "image"
    changes: ClassVar[bool] = False

    @property
    def looks_at(self) -> tuple[int | None, ...]:
        return ()

    def acts_at(self, depth: int) -> tuple[int, ...]:
        return (0,) if self.site is Site.BRIDGE else super().acts_at(depth)

    def taps(self, depth: int) -> tuple[int, ...]:
        """Blocks of a tower of this depth whose output it wants, besides what enters the projector."""
        return ()

    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        """The method's own trainable modules for a model of this shape; none for training-free methods."""
        return {}

    def rows(self, signals: Signals, plan: Plan) -> Tensor:
        """(R, M, d): what the plan's rows hold. By default what the plan makes of the features at this site."""
        return plan.reduce(signals.hidden)


def acts_on_visual_rows(reducer: Reducer) -> bool:
    """Whether a method is shown the visual rows of a prompt only."""
    return reducer.site is Site.BRIDGE or isinstance(reducer, VisualReducer)
