"""Token Transforming (M2M-TAG): every token contributes to every anchor. arXiv:2506.05709; a reconstruction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Tokens, reducer, select


@reducer("token_transforming", paper="arXiv:2506.05709", acts="merge", on="vision", training="free")
@dataclass(frozen=True)
class TokenTransforming(Reducer):
    """Many-to-many merging: rows are softmax-weighted sums of all free tokens around informative anchors.

    budget: share of the first free tokens that become anchors, compounding over the layers.
    beta: sharpness. Row i is the average of the tokens x_j with weights s_j exp(beta cos(anchor_i, x_j)); at infinity
    only the anchor is left, which is pruning; at zero every row is the mean of all.
    value_norm: rank anchors by attention times the norm of the value instead of attention alone.
    proportional: later blocks add log(size) to their attention logits; each token's size is shared out among the rows
    in proportion to what it gives them, so that the sum of sizes stays.

    The authors published the matrix view of token reduction but no code and, where we could read, no formulas: the
    choice of anchors, the weights and all defaults here are ours. Anchors are ranked by class attention; without a
    class token by the attention each token receives.
    """

    budget: Budget = KeepRatio(0.7, of="start")
    layers: tuple[int, ...] | None = (3, 6, 9)
    beta: float = 20.0
    value_norm: bool = False
    proportional: bool = True

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"TokenTransforming(beta={self.beta}): beta must be 0 or more; 0 averages everything")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        score = signals.saliency
        if self.value_norm:
            score = score * signals.value_norm
        chosen = select.top(score, self.budget, tokens, at=signals.at)
        anchor, m, n, c = chosen.anchor, chosen.m, tokens.n, signals.hidden.shape[-1]
        signals.at.spend(4 * m * n * c)  # cosines, and the product with the features that carries the plan out
        count: Tensor | int = n if tokens.valid is None else tokens.valid.sum(-1)
        matrix = self.weights(signals.hidden, anchor, tokens, chosen.counted == count)
        return Plan.soft(matrix, position=anchor, lengths=chosen.lengths)

    def weights(self, x: Tensor, anchor: Tensor, tokens: Tokens, whole: Tensor) -> Tensor:
        """(B, M, N), rows summing to one. Protected tokens stay as they are and give nothing to other rows, and so do
        all tokens of a sample that keeps them all. whole: (B,) bool."""
        unit = F.normalize(x.float(), dim=-1)
        own = anchor[..., None].expand(*anchor.shape, x.shape[-1])
        logits = self.beta * (unit.gather(1, own) @ unit.transpose(-1, -2))
        if tokens.size is not None:
            logits = logits + tokens.size.clamp_min(1e-30).log()[:, None]
        movable, protected = tokens.movable, tokens.protected
        soft = (logits if movable is None else logits.masked_fill(~movable[:, None], float("-inf"))).softmax(-1)
        stays = whole[:, None, None]
        if protected is not None:
            stays = stays | protected.expand(anchor.shape[0], -1).gather(1, anchor)[..., None]
        itself = anchor[..., None] == torch.arange(tokens.n, device=anchor.device)
        return torch.where(stays, itself.to(soft.dtype), soft)
