"""Learned token pruning: a token stays where its attention score passes the block's threshold. arXiv:2107.00910."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fewer.core import Budget, Hard, Plan, Reducer, Signals, Site, Threshold, Tokens, reducer, select
from fewer.core.learned import remember

FLOOR = 1e-5  # a threshold is never lower


class Offset(nn.Module):
    """What a block adds to its threshold on the ramp; zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(()))


@reducer("ltp", paper="arXiv:2107.00910", acts="prune", on="language", training="optional")
@dataclass(frozen=True)
class LTP(Reducer):
    """Thresholds prune, so that easy inputs keep fewer tokens than hard ones.

    A token's score is the attention it receives, averaged over heads and the tokens of the sequence. The threshold of
    block l of L (from 0) is t l / L, plus what was learned for the block, and at least 1e-5.

    budget: `threshold=t`; with any other budget the highest scores stay, as many as it grants.
    learned: whether trained modules shift the thresholds; false = the plain ramp, without training.
    soft: the paper's first stage: no token goes, every block's output is multiplied by
        sigmoid((score - threshold) / temperature). Its thresholds are then used with soft=false.
    temperature: of the soft stage; the paper searches 1e-4 to 2e-3.
    fidelity: scores are averages over the tokens the sequence had. "code": over its padded length, as in the authors'
        code, where padding makes scores smaller.

    The class token always stays (the authors' code may drop it). Scores of tokens that went are not averaged in, so
    what is left scores no higher for it.
    """

    budget: Budget = Threshold(0.01)
    layers: tuple[int, ...] | None = None
    learned: bool = True
    soft: bool = False
    temperature: float = 1e-3
    fidelity: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: it must be above 0; the paper's are 1e-4 to 2e-3")
        if self.fidelity not in ("paper", "code"):
            raise ValueError(f"fidelity={self.fidelity!r}: it is paper or code")
        if self.soft and not isinstance(self.budget, Threshold):
            raise ValueError(f"soft=true multiplies by how far a threshold is passed; {self.budget!r} has none")

    @property
    def site(self) -> Site:
        # A factor before the MLP would be undone by the norm behind it; dropped tokens need no MLP.
        return Site.AFTER_BLOCK if self.soft else Site.MID_BLOCK

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        return {"offset": Offset()} if self.learned and isinstance(self.budget, Threshold) else {}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        with torch.set_grad_enabled(self.soft and torch.is_grad_enabled()):
            score = self.score(signals, tokens)
        if not isinstance(self.budget, Threshold):
            return select.top(score, self.budget, tokens, at=signals.at)
        limit = self.limit(self.budget, signals)
        if not self.soft:
            return select.marked(score > limit, tokens)
        keep = ((score - limit) / self.temperature).sigmoid()
        if tokens.movable is not None:
            keep = keep.masked_fill(~tokens.movable, 1)
        remember(signals, "keep", keep)
        here = torch.arange(tokens.n, device=score.device).expand(tokens.batch, -1)
        return Hard(tokens.n, here, anchor_weight=keep)

    def score(self, signals: Signals, tokens: Tokens) -> Tensor:
        """(B, N) float32: attention received, averaged over heads and the tokens of the sequence."""
        memory = signals.memory
        if "length" not in memory:  # the first block's tokens; later blocks divide by the same number
            memory["length"] = tokens.n if tokens.valid is None else tokens.valid.sum(-1, keepdim=True)
            memory["width"] = tokens.n
        received = signals.attention_mass().mean(dim=1)
        return received / memory["width" if self.fidelity == "code" else "length"]

    def limit(self, budget: Threshold, signals: Signals) -> Tensor | float:
        """This block's threshold."""
        ramp = budget.value * signals.at.layer / signals.at.layers
        if not self.learned:
            return max(ramp, FLOOR)
        offset: Offset = signals.module("offset")
        return (ramp + offset.delta.float()).clamp(min=FLOOR)
