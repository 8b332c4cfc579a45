"""TRIM, token reduction using the CLIP metric (Song et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.core import Budget, Hard, Outliers, Plan, Signals, Tokens, VisualReducer, reducer, select
from fewer.core.visual.question import inverted, resemblance


@reducer("trim", paper="arXiv:2409.10994", acts="prune+merge", on="multimodal", training="optional")
@dataclass(frozen=True)
class TRIM(VisualReducer):
    """Patches that fit the question stay, and one token holds the mean of all others (TRIM, COLING 2025).

    The score is the softmax over an image's patches of their similarity to the question, a dot product in the joint
    space of a guide. The others are averaged before the projector, and the projected mean stands where the first of
    them stood; the authors' code puts it last. Without a guide the similarity is the cosine to the mean text embedding
    in the language model's space, which is ours.

    budget: by default as many as have an outstanding score (above the upper quartile by 1.5 times the distance of the
    quartiles), and the mean besides; tokens= and keep= count the mean among what stays. aggregate: whether there is a
    mean. negate: whether patches that resemble the question least stay; none = with a guide, as in the authors' code,
    though their text says the opposite: in CLIP's joint space it is mostly background that resembles a text.
    """

    budget: Budget = Outliers()
    aggregate: bool = True
    negate: bool | None = None

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        score = inverted(signals, self.negate) * resemblance(signals, raw=True)
        if tokens.valid is not None:
            score = score.masked_fill(~tokens.valid, -torch.inf)
        score = score.softmax(-1).nan_to_num(0.0)
        if not self.aggregate:
            return select.top(score, self.budget, tokens, at=signals.at)
        n, real = tokens.n, tokens.unpadded
        if self.budget.adaptive:
            keep, most = select.top(score, self.budget, tokens, at=signals.at).row >= 0, n
        else:
            count, most = select.allowed(self.budget, tokens, at=signals.at, device=signals.device)
            if tokens.valid is None and most == n:
                return Plan.identity((tokens.batch,), n, signals.device)
            own = torch.where(count < real.sum(-1), count - 1, count)
            score = score.masked_fill(~real, -1)
            keep = select.rank_within(score, torch.zeros_like(real, dtype=torch.long)) < own[:, None]
        rest = real & ~keep
        home = rest.to(torch.int8).argmax(-1, keepdim=True)
        stays = keep.scatter(-1, home, keep.gather(-1, home) | rest.gather(-1, home)) & real
        place = stays.cumsum(-1) - 1
        row = torch.where(stays, place, place.gather(-1, home)).masked_fill(~real, -1)
        ragged = self.budget.adaptive or tokens.valid is not None
        return Plan.from_rows(row, most, lengths=stays.sum(-1) if ragged else None)

    def rows(self, signals: Signals, plan: Plan) -> Tensor:
        out = plan.reduce(signals.hidden)
        if not isinstance(plan, Hard) or plan.anchor_weight is None:
            return out
        made = plan.anchor_weight < 1  # the mean's row, where more than one token is in it
        if plan.valid is not None:
            made = made & plan.valid
        slot = made.to(torch.int8).argmax(-1, keepdim=True)
        member = (plan.row == slot).float()
        features = signals.visual.features
        mean = (member / member.sum(-1, keepdim=True).clamp(min=1))[:, None] @ features.float()
        return torch.where(made[..., None], signals.visual.project(mean.to(features.dtype)).to(out.dtype), out)
