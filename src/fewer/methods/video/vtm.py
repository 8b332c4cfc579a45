"""Video token merging for long videos: who receives is chosen, everything else joins. arXiv:2410.23782, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fewer.core import Budget, KeepRatio, Plan, PlanError, Reducer, Signals, Tokens, reducer
from fewer.core.learned import remember
from fewer.core.noise import noise
from fewer.core.spacetime import changed, join_into, spread

SHARES = {"centre": 0.5, "boundary": 0.1}
"""Of the targets, those in the middle quarter: one in gamma / 2 there and one in 3 gamma / 2 outside, or the other way
round."""
Targets = Literal["naive", "centre", "boundary", "motion", "learned"]


class Saliency(nn.Module):
    """How salient a token is, in (-1, 1): tanh of its key against one learned vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, keys: Tensor) -> Tensor:
        """keys: (B, H, N, d) -> (B, N) float32."""
        return (keys.transpose(1, 2).flatten(2).float() @ self.direction.float()).tanh()


@reducer("vtm", paper="arXiv:2410.23782", acts="merge", on="video", training="optional",
         exempt={"padding_changes_nothing": "targets are among all patches, so ragged input is refused"})  # fmt: skip
@dataclass(frozen=True)
class VTM(Reducer):
    """Video token merging: a share of the tokens are targets, each of the others joins the most similar one.

    budget: how many targets (the paper's gamma = 6 is a share of 1/6), at each of the layers.
    targets: "naive" every gamma-th token; "centre" half of them in the middle quarter of each frame, "boundary" a
        tenth; "motion" drawn with chances softmax(motion), from pixels instead of a codec's motion vectors;
        "learned" drawn with chances softmax(tanh(key . u)), u trained.
    seed: of the draws, which depend on it, the layer and the token's place alone.

    Rows are plain averages. In training of "learned" no row goes: attention gets the saliencies as a bias, the
    paper's auxiliary path, by which alone u learns. The paper adds the loss of a path that merges.
    """

    budget: Budget = KeepRatio(1 / 6)
    layers: tuple[int, ...] | None = (2,)
    targets: Targets = "naive"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.targets not in ("naive", "centre", "boundary", "motion", "learned"):
            raise ValueError(f"targets={self.targets!r}: naive, centre, boundary, motion or learned")

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        return {"saliency": Saliency(width)} if self.targets == "learned" else {}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        if tokens.irregular:
            raise PlanError("vtm chooses targets among all patches of a clip; samples of different length have none")
        k = self.budget.keep(tokens.free_count, signals.at)
        if self.targets == "learned" and signals.training:
            s = signals.module("saliency")(signals.k)[:, tokens.prefix :]
            policy = torch.cat([s.new_ones(tokens.batch, tokens.prefix), (s - 1).exp()], 1)
            remember(signals, "keep", policy[:, tokens.prefix :])
            return Plan.mask(policy if tokens.policy is None else policy * tokens.policy)
        target = self._targets(signals, tokens, k) + tokens.prefix
        return join_into(signals.key, target, tokens, at=signals.at)

    def _targets(self, signals: Signals, tokens: Tokens, k: int) -> Tensor:
        """(B, K) long, ascending: places among the free tokens."""
        free = tokens.free_count
        if self.targets == "naive":
            return spread(free, k, signals.device).expand(tokens.batch, -1)
        if self.targets in ("centre", "boundary"):
            return self._by_region(signals, tokens, k)
        if self.targets == "motion":
            moved = changed(signals.clip, signals.space).flatten(1)
            place = (tokens.ordinal() - signals.prefix).clamp(min=0)[:, tokens.prefix :]
            logits = moved.gather(1, place)
        else:
            logits = signals.module("saliency")(signals.k)[:, tokens.prefix :].detach()
        uniform = (noise(tokens.ordinal(), self.seed, signals.at.layer)[:, tokens.prefix :] + 0.5) / 2**24
        gumbel = -(-uniform.log()).clamp_min(1e-12).log()  # the k largest are a draw without replacement
        return (logits + gumbel).topk(k, dim=-1).indices.sort(-1).values

    def _by_region(self, signals: Signals, tokens: Tokens, k: int) -> Tensor:
        """A share of the targets evenly spread over the middle quarter of all frames, the others over the rest."""
        t, h, w = signals.space
        middle = t * max(h // 2, 1) * max(w // 2, 1)
        if t * h * w != tokens.free_count:
            raise PlanError(f"vtm:targets={self.targets} needs the whole grid of the clip; some tokens have left")
        row, column = (x[:, tokens.prefix :] for x in signals.cell)
        outside = ~(_half(h, row) & _half(w, column))
        order = outside.to(torch.int8).argsort(dim=-1, stable=True)  # those in the middle first
        inner = max(min(round(k * SHARES[self.targets]), middle), k - (t * h * w - middle))
        device = order.device
        chosen = [spread(middle, inner, device), middle + spread(t * h * w - middle, k - inner, device)]
        return order[:, torch.cat(chosen)].sort(-1).values


def _half(edge: int, place: Tensor) -> Tensor:
    return (place >= edge // 4) & (place < edge // 4 + max(edge // 2, 1))
