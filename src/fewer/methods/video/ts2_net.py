"""TS2-Net's token selection: of every frame the few patches a trained scorer picks. arXiv:2207.07852, sec. 3.3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer
from fewer.core.learned import perturbed_top
from fewer.core.spacetime import Rectangle


class Selector(nn.Module):
    """Scores in (-1, 1) for the patches of a frame, from their own features and the frame's.

    sigma: of the noise in training. generator: source of the noise, None = torch's own.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = max(1, width // 2)
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, half, bias=False), nn.GELU())
        self.decide = nn.Sequential(nn.Linear(2 * half, half), nn.GELU(), nn.Linear(half, 1), nn.Tanh())
        self.sigma = 0.05
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor, whole: Tensor) -> Tensor:
        """x: (B, L, C), whole: (B, 1, C), what stands for the frame -> (B, L) float32."""
        h, g = self.embed(x), self.embed(whole)
        return self.decide(torch.cat([h, g.expand_as(h)], -1))[..., 0].float()

    def flops(self, n: int) -> int:
        return 2 * n * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))


@reducer("ts2_net", paper="arXiv:2207.07852", acts="prune", on="video", training="required",
         exempt={"budget_is_met": "every frame keeps as many patches: at most what the budget grants",
                 "padding_changes_nothing": "frames keep as many patches, so ragged input is refused"})  # fmt: skip
@dataclass(frozen=True)
class TS2Net(Reducer):
    """Every frame keeps the same number of patches, those a trained scorer finds most informative.

    budget: share of the tokens that stays, rounded down to as many in every frame (the paper's 3 of 49).
    samples: draws of the noise in training (perturbed top-k). Without it the choice is hard; the authors' code keeps
        the noise at test time too.
    diagonal: the gradient of the authors' code instead of that of the smoothed choice.

    A frame is judged against its class token in the paper; against the mean of its patches here, for encoders of whole
    clips have no class token per frame. The paper's shift of tokens between frames, which gives an image tower a view
    of time, removes none and is no part of this.
    """

    budget: Budget = KeepRatio(0.5)
    layers: tuple[int, ...] | None = (2,)
    samples: int = 100
    diagonal: bool = False
    site: ClassVar[Site] = Site.BEFORE_BLOCK

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: at least one draw of noise")

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        return {"selector": Selector(width)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        shape = Rectangle.of(signals, tokens, "ts2_net")
        k = max(1, self.budget.keep(tokens.free_count, signals.at) // shape.frames)
        selector, x = signals.module("selector"), shape.cube(signals.hidden).flatten(0, 1)
        signals.at.spend(shape.frames * selector.flops(shape.cells + 1))
        score = selector(x, x.mean(1, keepdim=True))
        Rectangle(shape.frames, k, shape.prefix).keep_in(signals)
        if not signals.training:
            return shape.of_groups(Plan.keep(score.topk(k, dim=-1).indices.sort(-1).values, shape.cells))
        y = perturbed_top(score, k, sigma=selector.sigma, samples=self.samples, diagonal=self.diagonal,
                          generator=selector.generator).unflatten(0, (tokens.batch, shape.frames))  # fmt: skip
        whole = torch.einsum("btkl,ts->btksl", y, torch.eye(shape.frames, device=y.device))
        return shape.soft(whole.flatten(3, 4).flatten(1, 2))
