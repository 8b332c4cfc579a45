"""Where a plan is executed: the kind of site, and which one of them this is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

from torch import Tensor


class Site(Enum):
    """Kinds of places at which a host can execute a plan."""

    BEFORE_BLOCK = "before a block"
    AROUND_BLOCK = "around a block"
    MID_BLOCK = "between attention and MLP"
    AFTER_BLOCK = "after a block"
    KV_CACHE = "the KV cache"
    BRIDGE = "between vision tower and language model"
    TEXT = "the input text"
    LOSS = "the training loss"
    AROUND_OPERATION = "around an operation"
    DENOISING = "over denoising steps"

    @property
    def sees_attention(self) -> bool:
        """Whether this block's queries and keys exist when the plan is made."""
        return self in (Site.MID_BLOCK, Site.AFTER_BLOCK, Site.KV_CACHE)

    @property
    def in_blocks(self) -> bool:
        """Whether there is one in every block; else there is one in the model."""
        return self not in (Site.BRIDGE, Site.TEXT, Site.LOSS)


def _ignore(_: int | str) -> None:
    return None


@dataclass(frozen=True)
class Place:
    """One site of one forward pass.

    layer, layers   0-based block index, number of blocks
    stage, stages   0-based index among the blocks where the method acts, their number
    start           free tokens that entered the model, counting padding
    starts          (B,) long, the same without padding; None where there was none
    spend           called with FLOPs per sample the method costs here (closed forms; feeds the ledger)
    note            called with a sentence when a request could not be met as asked
    """

    layer: int = 0
    layers: int = 1
    stage: int = 0
    stages: int = 1
    start: int = 0
    spend: Callable[[int], None] = field(default=_ignore, compare=False, repr=False)
    note: Callable[[str], None] = field(default=_ignore, compare=False, repr=False)
    starts: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def quiet(self) -> Place:
        """The same place for questions that are no request: nothing is noted."""
        return replace(self, note=_ignore)
