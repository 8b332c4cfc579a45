"""LazyLLM (Fu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewer.core import Budget, Group, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer, select


@reducer("lazyllm", paper="arXiv:2407.14057", acts="prune", on="language", training="free")
@dataclass(frozen=True)
class LazyLLM(Reducer):
    """A prompt is read with fewer and fewer tokens; those left out may come back at any later step.

    Behind each of its blocks the tokens that the last one attends to most go on, scored by its attention averaged over
    heads. The others wait with what they had computed so far. While writing, the new token's attention chooses again
    at each of these blocks; a chosen token that never got that far is computed on from there, so that no token passes
    a layer twice and the work never exceeds that of reading everything.

    budget: share of the tokens present that stays at each stage. layers: where; by default three blocks at 30, 50 and
    70 % of the depth. sinks: first tokens that always stay.

    The paper tunes shares and layers per task and names none; the ones here, and the sinks, are ours. It has no
    released code: how tokens come back follows its section 3.2 as we read it.
    """

    budget: Budget = KeepRatio(0.7)
    layers: tuple[int, ...] | None = None
    sinks: int = 4
    site: ClassVar[Site] = Site.AFTER_BLOCK
    revives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks}: the number of first tokens that always stay, from 0 up")

    def acts_at(self, depth: int) -> tuple[int, ...]:
        if self.layers is not None:
            return self.layers
        return tuple(sorted({min(depth * share // 10, depth - 1) for share in (3, 5, 7)}))

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        scores = signals.attention_rows(asking(signals, tokens)).mean(dim=(1, 2))
        tokens = tokens.protect(tokens.first(min(self.sinks, tokens.n - 1)))
        return select.top(scores, self.budget, tokens, at=signals.at)


def asking(signals: Signals, tokens: Tokens) -> Group:
    """The last token's query; while writing there is no other."""
    return Group(0, 1) if signals.q.shape[-2] == 1 else tokens.last
