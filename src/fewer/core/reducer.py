"""Reducer: what a published method declares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeVar

from .budgets import Budget
from .place import Site
from .plan import Plan
from .settings import Settings
from .signals import Signals
from .tokens import Tokens

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Card:
    """What is published about a method.

    acts: prune, merge, pool, distill, or a "+" of them. on: vision, language, ... training: free, optional, required.
    exempt: contract checks the method is known to fail, with the reason.
    """

    name: str
    title: str
    paper: str
    acts: str
    on: str
    training: str
    exempt: dict[str, str] = field(default_factory=dict)


class Reducer(Settings):
    """A published method: a frozen dataclass of its parameters and one `plan`. Subclass and decorate with `reducer`.

    budget        how many stay
    layers        0-based blocks where it acts; None = every block
    site          where in the block
    proportional  later blocks add log(size) to their attention logits
    needs_cls     whether it ranks by a class token and has no answer without one
    needs_reader  whether it asks what a model makes of a text (`Signals.written`)
    revives       whether a decoder keeps what it drops while reading, and asks again at every step who takes part
    one_for_all   whether all its places share one set of trained modules
    across        whether it ranks what another sequence looks at, in cross-attention
    watches       whether it is asked even where all tokens stay, for what it sees there counts later
    extra         rows it adds to those the budget grants (what is dropped, fused into one)
    """

    card: ClassVar[Card]
    layers: tuple[int, ...] | None = None
    proportional: bool = False
    needs_cls: ClassVar[bool] = False
    needs_reader: ClassVar[bool] = False
    revives: ClassVar[bool] = False
    one_for_all: ClassVar[bool] = False
    across: ClassVar[bool] = False
    watches: ClassVar[bool] = False
    if TYPE_CHECKING:  # a field, a constant of the class, or worked out from its fields: all can be read

        @property
        def budget(self) -> Budget: ...
        @property
        def site(self) -> Site: ...
    else:
        site = Site.MID_BLOCK

    def acts_at(self, depth: int) -> tuple[int, ...]:
        """The blocks where it acts in a model of this depth: `layers`, or all of them."""
        return tuple(range(depth)) if self.layers is None else self.layers

    @property
    def activation_bits(self) -> int | None:
        """Bits that the inputs of all matrices in the blocks are rounded to, per token; None = as they are."""
        return None

    @property
    def extra(self) -> int:
        return 0

    @property
    def adaptive(self) -> bool:
        """Whether samples may keep different numbers, so that the budget alone does not tell how many stay."""
        return self.budget.adaptive

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        """The method: look at the signals, say which tokens go where."""
        raise NotImplementedError

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        """The method's own trainable modules for a host of this shape; none for training-free methods."""
        return {}


R = TypeVar("R", bound=type[Reducer])


def reducer(
    name: str, *, paper: str, acts: str, on: str, training: str, exempt: dict[str, str] | None = None
) -> Callable[[R], R]:
    """Declare a method. The decorated class keeps its card; the file it stands in is how it is found."""

    def declare(cls: R) -> R:
        title = (cls.__doc__ or name).strip().splitlines()[0]
        cls.card = Card(name, title, paper, acts, on, training, exempt or {})
        return cls

    return declare
