"""CDPruner (Zhang et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from fewer.core import Budget, Capacity, Plan, Signals, Tokens, VisualReducer, reducer, select
from fewer.core.visual.question import inverted, resemblance, spread_out


@reducer("cdpruner", paper="arXiv:2506.10967", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class CDPruner(VisualReducer):
    """Tokens that differ from each other and fit the question stay (CDPruner, NeurIPS 2025).

    A determinantal point process whose kernel is r_i cos(x_i, x_j) r_j, of the projected tokens x; its likeliest set is
    built greedily. The relevance r is the cosine of a token to the question, in the joint space of a guide, scaled to
    run from 0 to 1 over the tokens of the image: the authors' code scales over the whole batch, which lets images
    change each other. Without a guide it is the cosine to the mean text embedding in the language model's space, which
    is ours.

    budget: how many stay, per image. theta: in [0, 1), sharpens the relevance to exp(theta r / (2 - 2 theta)), so that
    at 0 only diversity counts; none = r as it is. negate: whether tokens that resemble the question least are the
    relevant ones; none = with a guide, as published, for in CLIP's joint space it is mostly background that does.

    On dense text it falls below a random choice, as published comparisons found; divprune does not.
    """

    budget: Budget = Capacity(64)
    theta: float | None = None
    negate: bool | None = None

    def __post_init__(self) -> None:
        if self.theta is not None and not 0 <= self.theta < 1:
            raise ValueError(f"theta={self.theta} is outside [0, 1); 0 ignores the question, near 1 only it counts")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        relevance = spread_out(inverted(signals, self.negate) * resemblance(signals), tokens.valid)
        if self.theta is not None:
            relevance = (self.theta / (2 * (1 - self.theta)) * (relevance - 1)).exp()
        return select.dpp(signals.hidden, relevance, self.budget, tokens, at=signals.at)
