"""Turbo: merge what is alike, but not what the class token looks at. arXiv:2407.11717, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fewer.core import Budget, Plan, Reducer, Remove, Signals, Tokens, match, reducer

FACTOR = 30.0  # of the authors' code, between a cosine and an attention probability
TOKENS = 577  # of the images it was set for: BLIP at 384 pixels


@reducer("turbo", paper="arXiv:2407.11717", acts="merge", on="vision", training="free")
@dataclass(frozen=True)
class Turbo(Reducer):
    """Turbo, merging by information degree [Ju et al., ECCV 2024].

    Token merging whose pairs are ranked by E = cos(key, its partner's key) - w alpha N A / c: the redundancy of the
    token that would go, less what it means to the image. A is its attention from the class token, averaged over heads.
    Who its partner is stays as in `tome`, and alpha=0 is `tome` to the bit.

    budget: `Remove(r)` tokens per block, as in ToMe; at most half of the free ones go.
    alpha: weight of meaning. The authors' scripts take 5, their interface 1.
    beta, gamma: w = beta^|gamma - l| for the l-th place where tokens go, from 0; beta=1 weights all places alike.
    c: the scale of N A. The authors' code has the fixed factor 30 instead of N / c; at its 577 tokens the two are
    equal. N follows the number of tokens, because attention thins out as 1 / N.
    least: blocks with fewer rows than this merge nothing (the authors' code: 40).
    proportional: later blocks add log(size) to their attention logits.
    fidelity: "paper", or "code": the fixed factor, and the order of rows of `tome`'s.

    Without a class token A is the attention a token receives from all, on average. The side of the paper that shortens
    what a text encoder's cross-attention sees is `turbo_cross`. Its form for image generation, with copies put back
    behind each block, is not here.
    """

    budget: Budget = Remove(30)
    layers: tuple[int, ...] | None = None
    alpha: float = 5.0
    beta: float = 1.0
    gamma: float = 0.0
    c: float = TOKENS / FACTOR
    least: int = 0
    proportional: bool = True
    fidelity: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        if self.c <= 0:
            raise ValueError(f"c={self.c}: the scale of attention is positive; {TOKENS / FACTOR:.4g} is the authors'")
        if self.beta < 0:
            raise ValueError(f"beta={self.beta}: weights of places are not negative; 1 weights all alike")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        if tokens.n < self.least:
            return Plan.identity((tokens.batch,), tokens.n, signals.device)
        order: match.Order = "ranked" if self.fidelity == "code" and not tokens.has_cls else "halves"
        weight = self.alpha * self.beta ** abs(self.gamma - signals.at.stage)
        penalty = self._meaning(signals, tokens) * weight if weight else None
        return match.bipartite(signals.key, self.budget, tokens, at=signals.at, order=order, penalty=penalty)

    def _meaning(self, signals: Signals, tokens: Tokens) -> Tensor:
        """(B, N) float32: attention from the class token on the scale of a cosine."""
        count: Tensor | int = tokens.n if tokens.valid is None else tokens.valid.sum(-1, keepdim=True)
        attention = signals.saliency
        if not tokens.has_cls:  # summed over the queries, so one on average: what N A is with a class token
            attention = attention / count
        return attention * (FACTOR if self.fidelity == "code" else count / self.c)
