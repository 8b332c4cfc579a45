"""Random: keep tokens by a seeded draw. The baseline every ranking must beat."""

from __future__ import annotations

from dataclasses import dataclass

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer, select
from fewer.core.noise import noise


@reducer("random", paper="baseline", acts="prune", on="vision", training="optional")
@dataclass(frozen=True)
class Random(Reducer):
    """A random subset stays: another one at every layer, the same one for every image.

    budget: share of the first free tokens that stays, to the power of the stage (1, 2, 3), rounded down.
    seed: of the draw. A token's number depends on the seed, the layer and its place in the input alone, so neither
    the batch nor the device changes who stays.
    site: where in the block; "bridge" is once, in front of the language model of a vision-language model, whatever
    `layers` says: there it draws from the visual tokens of each image.
    """

    budget: Budget = KeepRatio(0.7, of="start")
    layers: tuple[int, ...] | None = (3, 6, 9)
    seed: int = 0
    site: Site = Site.MID_BLOCK

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        return select.top(noise(tokens.ordinal(), self.seed, signals.at.layer), self.budget, tokens, at=signals.at)
