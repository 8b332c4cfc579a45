"""Agile-Quant (Shen et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer, select


@reducer("agile_quant", paper="arXiv:2312.05693", acts="prune", on="language", training="free",
         exempt={"keep_all_is_identity": "activations are rounded whatever stays",
                 "budget_is_met": "the first token stays besides what the budget grants"})  # fmt: skip
@dataclass(frozen=True)
class AgileQuant(Reducer):
    """Prompt tokens that pay little attention to the start token leave, and activations take few bits.

    Behind each of its blocks a token's score is the attention it pays to the first token, summed over heads: a row
    of the map, not the usual column. Tokens that widen the range of activations score low, so fewer bits suffice for
    the rest. The first and the last token stay.

    budget: share of the tokens present that stays at each stage; the number that leaves is rounded down. layers: by
    default blocks 10 to 12 of 32, as shares of the depth. bits: of the inputs of all matrices in the blocks, per token
    and symmetric; None leaves them as they are. The numbers are rounded as a low-bit kernel would have them but
    computed in the model's own precision: quality is measured, speed is not gained by the bits.

    The released code may drop the last token, which carries the answer; here it stays. Weights are left as they are:
    load a model with quantised weights for those.
    """

    budget: Budget = KeepRatio(0.7, rounding="ceil")
    layers: tuple[int, ...] | None = None
    bits: int | None = 8
    site: ClassVar[Site] = Site.AFTER_BLOCK

    def __post_init__(self) -> None:
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} is outside 2 to 8; None computes in full precision")

    @property
    def activation_bits(self) -> int | None:
        return self.bits

    def acts_at(self, depth: int) -> tuple[int, ...]:
        if self.layers is not None:
            return self.layers
        return tuple(sorted({depth * anchor // 32 for anchor in (10, 11, 12)}))

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        start = tokens.first(1)
        scores = signals.attention_paid(start).sum(1)
        return select.top(scores, self.budget, tokens.protect(start), at=signals.at)
