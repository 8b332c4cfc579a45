"""Dynamic-LLaVA, its image part (Huang et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, KeepRatio, Plan, Shape, Signals, Site, Tokens, VisualReducer, reducer, select
from fewer.core.learned import gumbel, keep_decision, present, training_policy
from fewer.core.visual import Scope


class ImagePredictor(nn.Module):
    """Keep or drop, from a visual token among all that are present.

    z = GELU(Linear(LayerNorm(x))); two transformer encoder blocks on z; half of the channels are the token's own, the
    other half is averaged over the present tokens; both go through width -> width/2 -> width/4 -> 2 with GELU.

    tau: temperature of the sampled decisions, set by the recipe. generator: source of the training noise; None =
    torch's global one.
    """

    def __init__(self, channels: int, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width), nn.GELU())
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, inner, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.decide = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU(),
            nn.Linear(width // 4, 2),
        )  # fmt: skip
        self.tau, self.width = 1.0, width
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        """x: (R, N, C); there: (R, N) in [0, 1], None = all. -> (R, N, 2), float32 log-probabilities, 0 = keep."""
        z, gone = self.enter(x), None
        if there is not None:
            z = z * there[..., None].to(z.dtype)
            gone = there.detach() == 0
            gone = gone & ~gone.all(-1, keepdim=True)  # a line of nothing but padding sees it, to be no NaN
        for block in self.blocks:
            z = block(z, src_key_padding_mask=gone)
        own, shared = z.chunk(2, dim=-1)
        if there is None:
            mean = shared.mean(1, keepdim=True)
        else:
            weight = there[..., None].to(z.dtype)
            mean = (shared * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1e-6)
        return F.log_softmax(self.decide(torch.cat([own, mean.expand_as(shared)], -1)).float(), dim=-1)

    def flops(self, n: int) -> int:
        """Matrices on n tokens and the encoder's attention."""
        weights = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        return 2 * n * weights + len(self.blocks) * 4 * n * n * self.width


@reducer("dynamic_llava", paper="arXiv:2412.00876", acts="prune", on="multimodal", training="required")
@dataclass(frozen=True)
class DynamicLLaVA(VisualReducer):
    """A trained predictor keeps the visual tokens worth computing on (Dynamic-LLaVA, its half for prompts).

    `dynamic_llava_decode` is the other half. The predictor judges a token by its own features and the mean of all,
    behind two small transformer blocks. The best stay, with their position ids; nothing is drawn at random then.

    budget: share of the prompt's visual tokens that stays; a fifth, rounded down. k: blocks that see everything; by
    default a sixteenth of the depth (2 of 32), at least one. width, heads, inner: of the predictor and its blocks.

    In training decisions are sampled (Gumbel-softmax, straight-through), no row goes, and those dropped are masked as
    keys for all but themselves. `fewer.recipes.exits.train_predictor` trains the predictor inside a frozen model; the
    paper tunes the language model too.
    """

    budget: Budget = KeepRatio(0.2)
    k: int | None = None
    width: int = 512
    heads: int = 8
    inner: int = 2048
    site: ClassVar[Site] = Site.AFTER_BLOCK
    scope: ClassVar[Scope] = "prompt"

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise ValueError(f"k={self.k}: the predictor stands behind a block; k counts those that see everything")
        if self.width < 4 or self.width % 4 or self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of 4 and of heads={self.heads}")

    def acts_at(self, depth: int) -> tuple[int, ...]:
        return (max(1, round(depth / 16)) - 1 if self.k is None else self.k - 1,)

    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        return {"predictor": ImagePredictor(shape.width, self.width, self.heads, self.inner)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        predictor: ImagePredictor = signals.module("predictor")
        logp = predictor(signals.hidden.to(next(predictor.parameters()).dtype), present(tokens))
        signals.at.spend(predictor.flops(tokens.n))
        if signals.training:
            decision = keep_decision(logp, gumbel(logp, predictor.generator), predictor.tau)
            return Plan.mask(training_policy(signals, tokens, self.budget, decision))
        return select.top(logp[..., 0] - logp[..., 1], self.budget, tokens, at=signals.at)
