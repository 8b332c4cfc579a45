"""Length-Adaptive Transformer: one model for any lengths, which a search then picks. arXiv:2010.07003, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Tokens, reducer, select


@reducer("length_adaptive", paper="arXiv:2010.07003", acts="prune", on="language", training="optional")
@dataclass(frozen=True)
class LengthAdaptive(Reducer):
    """Tokens that receive most attention, from all heads and all real tokens, stay; the class token besides.

    budget: tokens that stay in each block: a share of those that are left, rounded up (0.8 is the smallest model of
        the paper's training, where each block drops at most a fifth), or a configuration, `keep=1+0.9+0.75`, from the
        search.

    Works on any encoder; the paper's training (`LengthDrop`: random lengths, distilled from the full model) makes the
    model stand it better, and an evolutionary search finds good configurations. Both are in `fewer.recipes.encode`.
    Dropped tokens are handed back as they were, so that heads which answer for every token work too.
    """

    budget: Budget = KeepRatio(0.8, rounding="ceil")
    layers: tuple[int, ...] | None = None

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        with torch.no_grad():
            score = signals.attention_mass().mean(dim=1)
        return select.top(score, self.budget, tokens, at=signals.at)
