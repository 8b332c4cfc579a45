"""SpAtten while writing: importance goes on adding up over blocks and steps, and what went stays away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.core import Budget, Plan, Signals, Tokens, reducer
from fewer.core.budgets import BudgetError, Cascade
from fewer.core.cache import CacheReducer, CacheSignals, Rows, marked


@reducer("spatten_decode", paper="arXiv:2012.09852", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class SpAttenDecode(CacheReducer):
    """Cascade token pruning in the cache: a token that a block has dropped is in no later block and at no later step.

    Importance is the attention a token has received, summed over heads, queries, blocks and steps: one number for all
    blocks. A block keeps the most important of those that the block before it has kept in this step.

    budget   share of all tokens so far that is left in the last block; before it as `spatten` has it. A number
             (tokens=) holds for every block
    recent   newest tokens that always stay

    A block may hold less than its budget: a token that its predecessor dropped is not replaced. The released code for
    Llama is another method (each layer and head for itself, scores of the last pass before the softmax, between
    prompts only) and is not followed. With `spatten` in front, prompts are read with fewer tokens too.
    """

    budget: Budget = Cascade(0.5)
    recent: int = 1
    layers: tuple[int, ...] | None = None
    watches: ClassVar[bool] = True

    if not TYPE_CHECKING:  # at every step: importance that was not added up is lost
        decodes = True

    def __post_init__(self) -> None:
        if self.recent < 1:
            raise BudgetError(
                f"recent={self.recent}: the newest token, which nothing has looked at yet, stays; from 1 up"
            )

    @property
    def least(self) -> int:
        return self.recent

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(signals, CacheSignals) and isinstance(tokens, Rows) and tokens.age is not None
        score, place, real = self._added(signals, tokens)
        alive = signals.memory["alive"].gather(1, place)[..., 0] > 0
        keep = self._most_important(score, alive if real is None else real & alive, signals, tokens)
        signals.memory["alive"] = torch.zeros_like(signals.memory["alive"]).scatter_reduce(
            1, place, keep[..., None].to(score.dtype), "amax"
        )
        return marked(keep[:, None], tokens)

    def watch(self, signals: CacheSignals, rows: Rows) -> None:
        self._added(signals, rows)

    def _added(self, signals: CacheSignals, rows: Rows) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds what this pass gives each row. Returns its importance (B, S), its token (B, S, 1), and whether it is
        real (B, S), None = all. The first block of a pass marks all tokens as alive."""
        assert rows.age is not None
        memory, total = signals.memory, self._seen(signals)
        place = (total - rows.age[:, 0]).clamp(min=0).expand(rows.batch, -1)
        real = None if rows.real is None else rows.real[:, 0].expand_as(place)
        place = place[..., None]
        new = signals.attention_mass_of_all().sum(1)
        new = new if real is None else new * real
        memory["importance"] = _grown(memory.get("importance"), new, total).scatter_add(1, place, new[..., None])
        if not signals.at.stage or "alive" not in memory:
            memory["alive"] = torch.ones_like(memory["importance"])
        return memory["importance"].gather(1, place)[..., 0], place, real

    @staticmethod
    def _seen(signals: CacheSignals) -> int:
        """Tokens seen so far, padding included: a layer with a sliding window does not know."""
        held = signals.memory["importance"].shape[1] if "importance" in signals.memory else 0
        return max(signals.at.start, held + signals.q.shape[2] * (not signals.at.stage))

    def _most_important(self, score: Tensor, candidates: Tensor | None, signals: CacheSignals, rows: Rows) -> Tensor:
        """(B, S) bool: the rows that stay, the newest first, then by score; of equals the earlier."""
        score = score.masked_fill(rows.newest(self.recent)[:, 0], float("inf"))
        if candidates is not None:
            score = score.masked_fill(~(candidates | rows.newest(self.recent)[:, 0]), float("-inf"))
        counts = torch.tensor(rows.counts(self.budget, signals.at, self.least), device=score.device)
        order = score.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(rows.n, device=score.device).expand_as(order))
        return (rank < counts[:, None]) & (score > float("-inf"))


def _grown(held: Tensor | None, like: Tensor, total: int) -> Tensor:
    """What is kept for each token seen, (B, T, 1) float32, with zeros for new ones."""
    if held is None:
        return like.new_zeros(like.shape[0], total, 1)
    return F.pad(held, (0, 0, 0, total - held.shape[1]))
