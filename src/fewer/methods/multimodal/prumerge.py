"""LLaVA-PruMerge: the class token's outliers stay and take in what is like them. arXiv:2403.15388."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewer.core import Budget, Outliers, Plan, Signals, Soft, Tokens, VisualReducer, reducer, select
from fewer.core.match import unit
from fewer.core.plan import take

SPREAD = 3  # PruMerge+ samples the grid so many times as densely as it keeps outliers


@reducer("prumerge", paper="arXiv:2403.15388", acts="prune+merge", on="multimodal", training="free")
@dataclass(frozen=True)
class PruMerge(VisualReducer):
    """LLaVA-PruMerge and PruMerge+, adaptive token reduction (Shang et al., ICCV 2025).

    The class token's attention in the tower's last block, all heads taken as one, has outliers: tokens above
    Q3 + 1.5 (Q3 - Q1) of their image. They stay, at least one of them, so a plain image costs little. Each that stays
    takes in its `neighbours` most similar tokens (keys of the last block, cosine; others that stay are among them),
    weighted by their attention; all that do not stay make one row more, where the first of them was. Rows are made in
    front of the projector.

    budget: outliers by default, the extra row comes on top. tokens= and keep= count the extra row: the class token's
    first ones fill the others. plus: PruMerge+: besides the M outliers of N tokens every s-th token stays,
    s = floor(floor(N / M) / 3), in the order of the image; where a count is given, a quarter of it goes by attention
    and the rest is spread evenly over the others. neighbours: tokens each row takes in.

    fidelity: "paper": rows are averages, weighted by attention, and the weight of a token that stays is its own
    attention. "code": as the authors' code has it, a sum: the token itself, plus its neighbours times their attention
    values, which do not sum to one; PruMerge+ leaves the last token out of its samples. The code's threshold is that of
    the whole batch; here an image's own. It fails where more than a third are outliers; here all stay then.

    Rows times tokens floats are formed: at most a quarter of N x N, N x N with plus. Needs a class token.
    """

    budget: Budget = Outliers()
    plus: bool = False
    neighbours: int = 32
    fidelity: Literal["paper", "code"] = "paper"
    looks_at: ClassVar[tuple[int | None, ...]] = (-1,)

    def __post_init__(self) -> None:
        if self.neighbours < 0:
            raise ValueError(f"neighbours={self.neighbours}: a count, from 0 up")
        if self.fidelity not in ("paper", "code"):
            raise ValueError(f"fidelity={self.fidelity!r}: choose 'paper' or 'code'")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        paid = signals.visual.class_attention(-1, wide=True)[:, 0]
        real = tokens.unpadded
        where = torch.arange(tokens.n, device=paid.device)
        if self.budget.adaptive:
            keep, most = self._outliers(paid, signals, tokens, real)
            spare = real & ~keep
            extra = spare.any(-1)
        else:
            count, most = select.allowed(self.budget, tokens, at=signals.at, device=signals.device)
            if tokens.valid is None and most == tokens.n:
                return Plan.identity((tokens.batch,), tokens.n, signals.device)
            extra = (count < real.sum(-1)) & (count > 1)
            keep = self._counted(paid, count - extra.long(), real, self.plus)
            spare = real & ~keep
        home = spare & extra[:, None] & (where == spare.to(torch.int8).argmax(-1, keepdim=True))
        if self.budget.adaptive:
            some = select.marked(keep | home, tokens)
            anchor, lengths = some.anchor[:, :most], some.length
        else:
            kept = select.counted(keep | home, tokens, most)
            anchor, lengths = kept.anchor, kept.length
        return Plan.soft(self._mixed(paid, anchor, spare, home, real, signals), position=anchor, lengths=lengths)

    def _outliers(self, paid: Tensor, signals: Signals, tokens: Tokens, real: Tensor) -> tuple[Tensor, int]:
        """(R, N) bool, who stays, and the most rows that any line can have."""
        n = tokens.n
        keep = select.top(paid, self.budget, tokens, at=signals.at).row >= 0
        length, count = real.sum(-1, keepdim=True), keep.sum(-1, keepdim=True)
        step = length // count.clamp(min=1)
        if self.fidelity == "code":  # there a share is handed on: 196 * (27 / 196) is cut off to 26
            share = count.double() / length.clamp(min=1)
            step = (1 / share.clamp(min=1e-9)).long()
            keep = self._counted(paid, (length * share).long()[:, 0].clamp(min=1), keep, plus=False)
        if not self.plus:
            return keep, min(self.budget.most(n, signals.at) + 1, n)
        step = (step // SPREAD).clamp(min=1)
        place = real.cumsum(-1) - 1
        sampled = real & (place % step == 0)
        if self.fidelity == "code":
            sampled = sampled & (place < length - 1)
        return keep | sampled, n

    @staticmethod
    def _counted(paid: Tensor, count: Tensor, real: Tensor, plus: bool) -> Tensor:
        """(R, N) bool: so many of each line stay."""
        score = paid.masked_fill(~real, float("-inf"))
        rank = select.rank_within(score, torch.zeros_like(score, dtype=torch.long))
        if not plus:
            return real & (rank < count[:, None])
        first = -(-count // (1 + SPREAD))
        keep = real & (rank < first[:, None])
        rest = real & ~keep
        place, length = rest.cumsum(-1), rest.sum(-1, keepdim=True)
        share = place * (count - first)[:, None] // length.clamp(min=1)  # grows by one wherever a sample falls
        before = (place - 1) * (count - first)[:, None] // length.clamp(min=1)
        return keep | (rest & (share > before))

    def _mixed(
        self, paid: Tensor, anchor: Tensor, spare: Tensor, home: Tensor, real: Tensor, signals: Signals
    ) -> Tensor:
        """(R, M, N): what each row is made of. anchor: (R, M) long; spare, home, real: (R, N) bool."""
        n = paid.shape[-1]
        key = unit(signals.visual.offered(-1).transpose(1, 2).flatten(2))
        signals.at.spend(2 * anchor.shape[1] * n * key.shape[-1])
        similar = take(key, anchor) @ key.transpose(-1, -2)
        similar = similar.masked_fill(~real[:, None], float("-inf")).scatter(-1, anchor[..., None], float("-inf"))
        best, near = similar.topk(min(self.neighbours, n - 1), dim=-1)
        weight = paid[:, None].expand_as(similar).gather(-1, near).masked_fill(best == float("-inf"), 0)
        taken = torch.zeros_like(similar).scatter(-1, near, weight)
        self_weight = torch.ones_like(anchor, dtype=paid.dtype) if self.fidelity == "code" else take(paid, anchor)
        rest = paid.masked_fill(~spare, 0)[:, None]
        alone = ~spare.any(-1)[:, None, None]  # a line of which all stay is left as it is
        matrix = torch.where(alone, 0, taken).scatter(-1, anchor[..., None], self_weight[..., None])
        matrix = torch.where(take(home, anchor)[..., None], rest, matrix)
        if self.fidelity == "code":
            return matrix
        total = matrix.sum(-1, keepdim=True)
        own = torch.zeros_like(matrix).scatter(-1, anchor[..., None], 1.0)
        return torch.where(total > 0, matrix / total.clamp(min=1e-30), own)

    def rows(self, signals: Signals, plan: Plan) -> Tensor:
        if not isinstance(plan, Soft):
            return plan.reduce(signals.hidden)
        return signals.visual.project(plan.reduce(signals.visual.features))
