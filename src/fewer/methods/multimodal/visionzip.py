"""VisionZip: dominant tokens stay, the rest melts into contextual ones. arXiv:2412.04467."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.core import Budget, Capacity, Plan, Signals, Soft, Tokens, VisualReducer, reducer, select
from fewer.core.match import unit
from fewer.core.plan import take


@reducer("visionzip", paper="arXiv:2412.04467", acts="prune+merge", on="multimodal", training="free")
@dataclass(frozen=True)
class VisionZip(VisualReducer):
    """VisionZip, dominant and contextual tokens (Yang et al., CVPR 2025).

    Dominant tokens: the class token itself, and the patches it attends to most. Of the others every s-th becomes a
    target, s as large as it can be; each of the rest joins the target whose key is most similar (heads averaged,
    cosine). A contextual token is its target plus the mean of those that joined it. Rows are made in front of the
    projector.

    budget: how many reach the language model, class token and contextual ones included: 64 are 54 + 10, as 128 are
    108 + 20 and 192 are 162 + 30. contextual: share of them that is contextual, rounded. summed: a target counts as
    much as all that joined it together, so contextual tokens are about twice as long as others: what the authors do and
    report. False takes the mean of the target and those that joined. class_token: whether the class token has a row.

    The class token's row stands where the first token that is neither dominant nor a target was. Of an image cut into
    tiles it is the whole view's; the budget counts for all tiles together (the authors reduce each alone). A tower
    without a class token ranks by attention received and adds no row. An image that has no more tokens than the budget
    is left as it is.
    """

    budget: Budget = Capacity(64)
    contextual: float = 10 / 64
    summed: bool = True
    class_token: bool = True
    looks_at: ClassVar[tuple[int | None, ...]] = (None,)

    def __post_init__(self) -> None:
        if not 0 <= self.contextual <= 1:
            raise ValueError(f"contextual={self.contextual} is outside [0, 1]; it is a share of the budget")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        visual, n = signals.visual, tokens.n
        count, most = select.allowed(self.budget, tokens, at=signals.at, device=signals.device)
        if tokens.valid is None and most == n:
            return Plan.identity((tokens.batch,), n, signals.device)
        real = tokens.unpadded
        length = real.sum(-1)
        with_class = int(self.class_token and visual.encoder().cls is not None)
        extra = torch.where(count < length, with_class, 0).clamp(max=count)  # whole lines get none
        melted = torch.where(count < length, (count * self.contextual + 0.5).floor().long(), 0)
        melted = torch.minimum(melted, count - extra)

        score = visual.importance().masked_fill(~real, float("-inf"))
        rank = select.rank_within(score, torch.zeros_like(visual.view.tile))
        dominant = real & (rank < (count - extra - melted)[:, None])
        rest = real & ~dominant
        place = rest.cumsum(-1) - 1
        every = (rest.sum(-1) // melted.clamp(min=1)).clamp(min=1)[:, None]
        target = rest & (place % every == 0) & (place // every < melted[:, None])
        spare = rest & ~target
        where = torch.arange(n, device=real.device)
        home = (where == spare.to(torch.int8).argmax(-1, keepdim=True)) & spare & (extra > 0)[:, None]
        kept = select.counted(dominant | target | home, tokens, most)

        anchor = kept.anchor
        own = torch.zeros(tokens.batch, kept.m, n, device=real.device).scatter(-1, anchor[..., None], 1.0)
        own = own.masked_fill(take(home, anchor)[..., None], 0)  # the class token's row holds no patch
        key = unit(visual.offered().float().mean(1))
        signals.at.spend(2 * kept.m * n * key.shape[-1])
        host = take(target, anchor) if kept.valid is None else take(target, anchor) & kept.valid
        similar = (take(key, anchor) @ key.transpose(-1, -2)).masked_fill(~host[..., None], float("-inf"))
        joins = (spare & (melted > 0)[:, None]).float()
        joined = torch.zeros_like(own).scatter(1, similar.argmax(1, keepdim=True), joins[:, None])
        number = joined.sum(-1, keepdim=True)
        matrix = own + joined / number.clamp(min=1) if self.summed else (own + joined) / (number + 1)
        return Plan.soft(matrix, position=anchor, lengths=kept.length)

    def rows(self, signals: Signals, plan: Plan) -> Tensor:
        visual = signals.visual
        if not isinstance(plan, Soft):  # nothing was too much
            return plan.reduce(signals.hidden)
        mixed = plan.reduce(visual.features)
        tower, view = visual.encoder(), visual.view
        if tower.cls is not None and self.class_token:
            empty = plan.matrix.gather(-1, plan.position[..., None]) == 0
            if plan.valid is not None:
                empty = empty & plan.valid[..., None]
            whole = view.tile == 0 if view.valid is None else (view.tile == 0) & view.valid
            assert view.source is not None  # the tower is known
            first = take(view.source, whole.to(torch.int8).argmax(-1, keepdim=True))
            token = tower.cls[first // (tower.features.shape[0] // tower.cls.shape[0])]
            mixed = torch.where(empty, token.to(mixed.dtype), mixed)
        return visual.project(mixed)
