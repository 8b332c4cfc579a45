"""SpAtten: tokens that little attention has gone to, over all blocks so far, leave for good. arXiv:2012.09852."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.core import Budget, Plan, Reducer, Signals, Tokens, reducer, select
from fewer.core.budgets import Cascade


@reducer("spatten", paper="arXiv:2012.09852", acts="prune", on="language", training="free")
@dataclass(frozen=True)
class SpAtten(Reducer):
    """Cascade token pruning: importance is attention received, summed over heads, queries and all blocks so far.

    A token that leaves is in no later block, its row of this block's MLP included. While a prompt is read the cache of
    each block holds what entered its attention; `spatten_decode` goes on while tokens are written.

    budget: share of the first tokens left in the last block. All stay in the first blocks (15 % of them, at least
        three), then linearly fewer (`fewer.core.budgets.Cascade`). Another kind of budget is asked block by block.
    average: divide by the number of queries that could see a token, which takes the advantage from early tokens of a
        causal text. The paper sums.

    What the accelerator does besides is not run here: no head is pruned and no row of V is left out inside a head (a
    model on a CPU or GPU computes all heads of a block in one product, so neither would save anything), and keys are
    not fetched by planes of bits. `fewer cost --hardware spatten` counts what tokens bring there; the rest is in
    `fewer.hardware.spatten`. The slope of the schedule is ours: the paper tunes it for each task.
    """

    budget: Budget = Cascade(0.5, of="start", rounding="ceil")
    layers: tuple[int, ...] | None = None
    average: bool = False
    watches: ClassVar[bool] = True

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        with torch.no_grad():
            score = self.importance(signals, tokens)
        return select.top(score, self.budget, tokens, at=signals.at)

    def importance(self, signals: Signals, tokens: Tokens) -> Tensor:
        """(B, N) float32: what each token has received since the first block."""
        received = signals.attention_mass().sum(1)
        total = _added("received", received, signals, tokens)
        if not self.average:
            return total
        return total / _added("seen", self._seen_by(signals, tokens), signals, tokens).clamp(min=1)

    @staticmethod
    def _seen_by(signals: Signals, tokens: Tokens) -> Tensor:
        """(B, N) float32: how many queries of this block could look at each token."""
        real = tokens.unpadded.float()
        if signals.seen is None or not signals.seen.causal:
            return real.sum(-1, keepdim=True).expand_as(real)
        return real.flip(-1).cumsum(-1).flip(-1)


def _added(name: str, new: Tensor, signals: Signals, tokens: Tokens) -> Tensor:
    """A sum over the blocks, kept for each token that entered, and read for those that are left. new: (B, N)."""
    place, memory = tokens.place().to(new.device), signals.memory
    if tokens.valid is not None:  # what stands for padding may name the place of a token that is there
        new = new.masked_fill(~tokens.valid, 0)
    old = memory.get(name)
    if old is None:
        old = new.new_zeros(tokens.batch, signals.at.start + tokens.n)
    memory[name] = old.scatter_add(1, place, new)
    return memory[name].gather(1, place)
