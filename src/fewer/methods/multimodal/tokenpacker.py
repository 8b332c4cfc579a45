"""TokenPacker, coarse queries that read the fine features of their own region (Li et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fewer.core import Budget, Capacity, Plan, Shape, Signals, Tokens, VisualReducer, reducer
from fewer.core.visual.regions import Regions, granted
from fewer.core.visual.resampler import heads_of, linear_flops, mlp


class Packer(nn.Module):
    """One query per region, attention over the region's cells alone, an MLP to the language model's width.

    channels: of the tower; blocks: those whose outputs, side by side, keys and values are made of; width: of the
    attention; out: channels of the language model.
    """

    def __init__(
        self, channels: int, blocks: tuple[int, ...], width: int, out: int, heads: int, residual: bool
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.heads, self.residual = heads_of(width, max(1, width // heads)), residual
        self.coarse, self.coarse_norm = nn.Linear(channels, width, bias=False), nn.LayerNorm(width, eps=1e-6)
        self.fine = nn.ModuleList(
            nn.Sequential(*mlp(len(blocks) * channels, width, width), nn.LayerNorm(width, eps=1e-6))
            for _ in range(2)  # of keys, of values
        )
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.join = nn.Linear(width, width)
        self.leave = mlp(width, out, out)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, levels: Tensor, regions: Regions) -> Tensor:
        """x: (R, N, C), levels: (R, N, blocks * C) -> (R, M, out)."""
        weight = regions.bilinear()[..., None]
        seed = self.coarse_norm(self.coarse(regions.sum(x.float() * weight).to(x.dtype)))
        key, value = (fine(levels) for fine in self.fine)
        q = regions.spread(self.query(seed)).unflatten(-1, (self.heads, -1))
        k = self.key(key).unflatten(-1, (self.heads, -1))
        p = regions.softmax((q.float() * k.float()).sum(-1) * k.shape[-1] ** -0.5)
        v = self.value(value).unflatten(-1, (self.heads, -1))
        read = self.join(regions.sum((p[..., None].to(v.dtype) * v).flatten(2)))
        return self.leave(seed + read if self.residual else read)

    def flops(self, n: int, m: int) -> int:
        """Linear layers on n cells and m regions, and the attention."""
        width = self.join.weight.shape[0]
        cells = linear_flops(self.fine, n) + linear_flops(self.key, n) + linear_flops(self.value, n)
        rows = sum(linear_flops(layer, m) for layer in (self.coarse, self.query, self.join, self.leave))
        return cells + rows + 4 * n * width


@reducer("tokenpacker", paper="arXiv:2407.02392", acts="distill", on="multimodal", training="required")
@dataclass(frozen=True)
class TokenPacker(VisualReducer):
    """A projector of few coarse queries, each reading finer features of its own region (TokenPacker, IJCV 2025).

    Queries are the map, resized; keys and values are made of several levels of the tower.

    budget: queries of a picture. On 24 x 24 patches 144, 64 and 36 are the paper's scales 2, 3 and 4 (regions of 2 x 2
    to 4 x 4). Any other count is met too, with regions that differ by a row or a column of patches.
    levels: tower blocks that keys and values are made of; None = those the paper takes of 24 (11, 15, 21 and 22), as
    deep in this tower. width: of the attention; None = the tower's. heads: at most, as many as divide the width.
    residual: add the query to what it read. The paper's drawing suggests it; its code leaves it out, and so does this.

    Several tiles and frames each get their share of the queries; lines may differ in length.
    """

    budget: Budget = Capacity(144)
    levels: tuple[int, ...] | None = None
    width: int | None = None
    heads: int = 8
    residual: bool = False
    changes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.heads < 1 or (self.width is not None and self.width < 1):
            raise ValueError(f"heads={self.heads}, width={self.width}: both count from 1 up")

    def taps(self, depth: int) -> tuple[int, ...]:
        if self.levels is not None:
            return self.levels
        return tuple(sorted({max(0, k * depth // 24 - 1) for k in (12, 16, 22, 23)}))

    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        blocks, width = self.taps(shape.depth), self.width or shape.channels
        return {"packer": Packer(shape.channels, blocks, width, shape.width, self.heads, self.residual)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        m, lengths = granted(self.budget, tokens, signals.at)
        return Regions.cut(signals.visual.view, m, lengths).kept()

    def rows(self, signals: Signals, plan: Plan) -> Tensor:
        packer, visual = signals.module("packer"), signals.visual
        signals.at.spend(packer.flops(plan.n, plan.m))
        levels = torch.cat([visual.level(block) for block in packer.blocks], -1)
        return packer(visual.features, levels, Regions.cut(visual.view, plan.m, plan.lengths))
