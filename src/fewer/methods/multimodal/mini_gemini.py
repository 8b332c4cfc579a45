"""Mini-Gemini, patches that mine finer features of their own place (Li et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fewer.core import Budget, KeepRatio, Plan, Shape, Signals, Tokens, VisualReducer, reducer
from fewer.core.visual.convolution import PixelEncoder
from fewer.core.visual.resampler import linear_flops


class Mining(nn.Module):
    """Every patch attends to the block of finer features under it: y = x + softmax(q k / sqrt(C)) v.

    The values' layer starts at zero, so that a model begins as it is; the paper does not say how it starts.
    """

    def __init__(self, channels: int, fine: int) -> None:
        super().__init__()
        self.channels = channels
        self.query = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels))
        self.key = nn.Sequential(nn.LayerNorm(fine), nn.Linear(fine, channels))
        self.value = nn.Sequential(nn.LayerNorm(fine), nn.Linear(fine, channels))
        for parameter in self.value[1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, block: Tensor) -> Tensor:
        """x: (P, C), block: (P, r, C') -> (P, C)."""
        logits = torch.einsum("pc,prc->pr", self.query(x).float(), self.key(block).float()) * x.shape[-1] ** -0.5
        return x + torch.einsum("pr,prc->pc", logits.softmax(-1).to(x.dtype), self.value(block))

    def flops(self, patches: int, block: int) -> int:
        fine = linear_flops(self.key, patches * block) + linear_flops(self.value, patches * block)
        return linear_flops(self.query, patches) + fine + 4 * patches * block * self.channels


@reducer("mini_gemini", paper="arXiv:2403.18814", acts="distill", on="multimodal", training="required")
@dataclass(frozen=True)
class MiniGemini(VisualReducer):
    """Before the projector, every patch adds what finer features of its own place show (Mini-Gemini, 2024).

    The finer features come from a small convolutional encoder trained along, where the paper has a frozen ConvNeXt at
    more than twice the resolution; here both see the same pixels, so what is gained is detail the tower's patches blur.

    Everything stays; put another method behind, `["mini_gemini", "divprune:tokens=64"]`, to have fewer.

    fine: finer features under a patch, fine x fine. width: of the encoder. depth: its blocks. pixels: side of what one
    finer feature sees at first; a picture is resized to fit.
    """

    budget: ClassVar[Budget] = KeepRatio(1.0)
    fine: int = 4
    width: int = 64
    depth: int = 2
    pixels: int = 4
    changes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("fine", "width", "depth", "pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it counts from 1 up")

    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        encoder = PixelEncoder(self.width, shape.grid, self.fine, self.pixels, self.depth)
        return {"encoder": encoder, "mining": Mining(shape.channels, self.width)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        if tokens.valid is None:
            return Plan.identity((tokens.batch,), tokens.n, tokens.device)
        where = torch.arange(tokens.n, device=tokens.valid.device).expand(tokens.batch, tokens.n)
        return Plan.keep(where, tokens.n, tokens.valid.sum(-1))

    def rows(self, signals: Signals, plan: Plan) -> Tensor:
        encoder, mining, visual = signals.module("encoder"), signals.module("mining"), signals.visual
        tower = visual.encoder()
        signals.at.spend(encoder.flops(plan.n) + mining.flops(plan.n, encoder.fine**2))
        mined = mining(tower.features, encoder(tower))
        return visual.project(mined[visual.view.source])
