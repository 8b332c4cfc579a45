"""The KV cache as something to reduce: its rows, what may be looked at, and the selectors that count per KV head.

A cache layer holds S rows per sample and KV head. A plan over them has lead (B, G), or (B, 1) where all heads of a
layer keep the same rows; heads may keep different numbers. Budgets count what a sample's cache holds in the end,
protected rows included: `keep=0.5` of a prompt of 1,000 tokens leaves 500 rows, whatever the observation window is.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..budgets import Budget, BudgetError, Capacity, KeepRatio
from ..place import Place, Site
from ..plan import Hard, Plan
from ..reducer import Reducer
from ..signals import Signals
from ..tokens import Tokens
from .quantised import Codec
from .rows import Rows
from .selectors import lowest, top
from .signals import CacheSignals


class CacheReducer(Reducer):
    """A method that acts on the KV cache. Its plan has lead (B, G) or (B, 1).

    decodes      also acts at every decoding step; else after passes of more than one token only
    accumulates  wants `signals.received`, the attention each row has received so far
    rotates      wants `signals.rotary`, the rotary embedding of the layer
    least        rows that stay whatever the budget says (windows, sinks): the budget is never below it
    travelling   leading rows that are re-rotated to stand right before the others, as if nothing had gone; 0 = none
    evicts       takes rows away, by `plan`; a session holds at most one such method
    reads        chooses the rows that a decoding pass reads, by `read`; nothing is taken away
    gates        adds to the attention logits of every layer that is no sliding window, by `gate`
    enters       wants `signals.entry`, the hidden states that enter the first block
    attends      wants `signals.attending`, the attention module and what it was called with
    once         acts only on the pass that fills an empty cache
    """

    site: ClassVar[Site] = Site.KV_CACHE
    decodes: bool = False
    accumulates: ClassVar[bool] = False
    rotates: ClassVar[bool] = False
    evicts: ClassVar[bool] = True
    reads: ClassVar[bool] = False
    enters: ClassVar[bool] = False
    attends: ClassVar[bool] = False
    once: ClassVar[bool] = False

    @property
    def gates(self) -> bool:
        return False

    @property
    def codec(self) -> Codec | None:
        """How older rows are stored between passes; None: as they are. Sliding-window layers stay as they are."""
        return None

    def watch(self, signals: CacheSignals, rows: Rows) -> None:
        """What a method that `watches` sees in a layer where every token so far stays; it has no plan there."""

    def read(self, signals: CacheSignals, rows: Rows) -> Hard | None:
        """The stored rows this pass's attention reads, a plan of lead (B, G) or (B, 1); None for all.

        Asked before the attention of every layer that is no sliding window, in every pass, so that what a method keeps
        in `signals.memory` stays complete. In a pass of several tokens the answer must be None.
        """
        return None

    def gate(self, signals: CacheSignals, rows: Rows) -> Tensor:
        """(B, 1 or H, Q, S) float32, what to add to the logits of this pass's queries over all rows; 0 = nothing."""
        raise NotImplementedError

    def predictors(self, width: int, heads: int, groups: int, layers: int) -> dict[str, nn.Module]:
        """The method's own trainable modules: one set for all layers of a model of C channels, H query heads and G KV
        heads in each of its layers; none for training-free methods."""
        return {}

    @property
    def least(self) -> int:
        return 0

    @property
    def travelling(self) -> int:
        return 0

    @property
    def allowance(self) -> Budget:
        """The budget as this method spreads it over the layers."""
        return self.budget

    def check(self) -> None:
        """Raises BudgetError for a budget a cache cannot have: too small for what always stays, or of no count."""
        if isinstance(self.budget, Capacity):
            low = min(self.budget.tokens) if isinstance(self.budget.tokens, tuple) else self.budget.tokens
            if low < self.least:
                raise BudgetError(f"tokens={low} is less than the {self.least} rows that always stay; raise tokens")
        if self.budget.adaptive:
            raise BudgetError(f"{self.budget!r} names no count; a cache takes keep, tokens or r")
        if isinstance(self.budget, KeepRatio) and self.budget.of == "start":
            raise BudgetError("of=start compounds from stage to stage; a cache counts all tokens so far, leave of out")


class Ranker(CacheReducer):
    """A method that ranks rows whatever order they lie in, by `Rows.age` where time matters, and keeps the highest.

    While tokens are written, the newest row may take the place of the one that goes, so that no other moves.
    weighs    ranks by the attention of the pass: a session that computes it for the model need not do so twice
    together  looks at the rows' ages, `signals.weights` and `signals.received` alone while tokens are written: then it
              is shown the rows of several layers as the samples of one batch
    """

    weighs: ClassVar[bool] = False
    together: ClassVar[bool] = False

    def ranks(self, signals: CacheSignals, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """Scores (B, 1 or G, S), and what is protected, as `top` takes them."""
        raise NotImplementedError

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(signals, CacheSignals) and isinstance(tokens, Rows)
        scores, protected = self.ranks(signals, tokens)
        return top(scores, self.budget, tokens, at=signals.at, protected=protected, least=self.least)

    def leaver(self, signals: CacheSignals, rows: Rows) -> Tensor:
        """(B, 1 or G, 1) long: the row of each head that goes where one must. All rows are real."""
        scores, protected = self.ranks(signals, rows)
        return lowest(scores, rows, protected)


class Rereader(CacheReducer):
    """A method that has a prompt read once more, behind itself and in chunks, and ranks its rows by that.

    chunk        tokens repeated at a time; overlap: tokens before them that are repeated too
    instruction  token ids fed before each repetition
    """

    chunk: int
    overlap: int
    instruction: tuple[int, ...]

    def votes(self, signals: CacheSignals, rows: Rows, first: int, last: int) -> Tensor:
        """(B, G, last - first) float32: importance of these rows of one layer, from the pass that repeats them.

        signals: of that pass; k and v hold the rows of the prompt, then those of the repetition. rows: the prompt's.
        """
        raise NotImplementedError

    def choose(self, votes: list[Tensor], rows: Rows, at: list[Place]) -> list[Hard]:
        """What stays in each layer where the method acts. votes: (B, G, S) for each of them."""
        raise NotImplementedError
