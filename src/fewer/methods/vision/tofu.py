"""ToFu: prune duplicates early, merge them norm-preservingly late. arXiv:2312.01026."""

from __future__ import annotations

from dataclasses import dataclass

from fewer.core import Budget, Plan, Reducer, Remove, Signals, Tokens, match, reducer


@reducer("tofu", paper="arXiv:2312.01026", acts="prune+merge", on="vision", training="optional")
@dataclass(frozen=True)
class ToFu(Reducer):
    """Token fusion: ToMe's pairs, of which early layers keep one token and later layers an MLERP average.

    budget: `Remove(r)` tokens per block; at most half of the free ones go.
    split: first layer that merges; the layers before it prune, because there the rest of the network is far from
    linear between two inputs. None = half the depth.
    proportional: later blocks add log(size) to their attention logits; tokens pruned early leave no size behind.

    MLERP is the plain mean of a group, rescaled to the largest norm among its members: the paper's formula knows no
    sizes. No code of the authors is public. The split at half the depth follows re-implementations; whether the paper
    uses proportional attention could not be checked, and ToMe's choice is the default.
    """

    budget: Budget = Remove(8)
    layers: tuple[int, ...] | None = None
    split: int | None = None
    proportional: bool = True

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        pairs = match.bipartite(signals.key, self.budget, tokens.unsized(), at=signals.at, order="halves")
        split = signals.at.layers // 2 if self.split is None else self.split
        return pairs.pruned() if signals.at.layer < split else pairs.norm_preserving()
