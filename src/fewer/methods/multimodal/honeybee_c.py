"""Honeybee's C-Abstractor, convolutions around an adaptive average pooling (Cha et al. 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, Capacity, Plan, PlanError, Shape, Signals, Tokens, VisualReducer, reducer
from fewer.core.visual.convolution import ChannelNorm, Positions, as_maps
from fewer.core.visual.regions import Regions, granted, rectangle
from fewer.core.visual.resampler import lattice, linear_flops


class Bottleneck(nn.Module):
    """RegNet's block: 1 x 1, grouped 3 x 3, squeeze-excite, 1 x 1, with LayerNorm over channels and SiLU.

    Groups are 8 channels wide and the squeeze a quarter of what comes in. Source: arXiv:2003.13678.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        squeeze, groups = max(1, round(channels / 4)), width // math.gcd(width, 8)
        self.first, self.first_norm = nn.Conv2d(channels, width, 1, bias=False), ChannelNorm(width)
        self.look = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False)
        self.look_norm = ChannelNorm(width)
        self.squeeze, self.excite = nn.Conv2d(width, squeeze, 1), nn.Conv2d(squeeze, width, 1)
        self.last, self.last_norm = nn.Conv2d(width, width, 1, bias=False), ChannelNorm(width)
        self.beside: nn.Module = nn.Identity()
        if channels != width:
            self.beside = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), ChannelNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, width, h, w)."""
        y = F.silu(self.first_norm(self.first(x)))
        y = F.silu(self.look_norm(self.look(y)))
        gate = self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True))))
        y = self.last_norm(self.last(y * gate.sigmoid()))
        return F.silu(y + self.beside(x))


class CAbstractor(nn.Module):
    """Positions, a stage of bottleneck blocks, adaptive average pooling, another stage, an MLP."""

    def __init__(self, channels: int, width: int, out: int, grid: tuple[int, int], depth: int) -> None:
        super().__init__()
        self.positions = Positions(channels, grid)
        self.before = nn.Sequential(*(Bottleneck(channels if i == 0 else width, width) for i in range(depth)))
        self.behind = nn.Sequential(*(Bottleneck(width, width) for _ in range(depth)))
        self.leave = nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))

    def forward(self, x: Tensor, rows: tuple[int, int]) -> Tensor:
        """(T, C, h, w) -> (T, a * b, out), for rows = (a, b)."""
        y = F.adaptive_avg_pool2d(self.before(self.positions(x)), rows)
        return self.leave(self.behind(y).flatten(2).transpose(1, 2))

    def flops(self, n: int, m: int) -> int:
        return linear_flops(self.before, n) + linear_flops(self.behind, m) + linear_flops(self.leave, m)


@reducer("honeybee_c", paper="arXiv:2312.06742", acts="distill", on="multimodal", training="required")
@dataclass(frozen=True)
class HoneybeeC(VisualReducer):
    """A projector of convolutions: RegNet blocks, adaptive pooling, RegNet blocks (C-Abstractor, CVPR 2024).

    budget: rows of a picture; the paper takes squares (144, 256, 576). Any count that forms a rectangle inside the
    grid will do; the one nearest to the grid's shape is taken. One set of weights serves all counts.
    width: of the convolutions; None = the tower's. depth: blocks before and behind the pooling.

    Convolutions keep what is near together; squeeze-excite alone looks at the whole picture. The paper reads the
    tower's last layer, this reads what enters the model's own projector. Works on whole tiles of one grid, which share
    the rows equally.
    """

    budget: Budget = Capacity(144)
    width: int | None = None
    depth: int = 3
    changes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.depth < 1 or (self.width is not None and self.width < 1):
            raise ValueError(f"depth={self.depth}, width={self.width}: both count from 1 up")

    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        width = self.width or shape.channels
        return {"abstractor": CAbstractor(shape.channels, width, shape.width, shape.grid, self.depth)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        m, _ = granted(self.budget, tokens, signals.at)
        bands, _ = self._rows(signals, tokens, m)
        return Regions.cut(signals.visual.view, m, bands=bands).kept()

    def rows(self, signals: Signals, plan: Plan) -> Tensor:
        abstractor, features = signals.module("abstractor"), signals.visual.features
        signals.at.spend(abstractor.flops(plan.n, plan.m))
        _, h, w = lattice(signals, signals.tokens)
        made = abstractor(as_maps(features, (h, w)), self._rows(signals, signals.tokens, plan.m))
        return made.reshape(features.shape[0], plan.m, -1)

    def _rows(self, signals: Signals, tokens: Tokens, m: int) -> tuple[int, int]:
        """Rows and columns that each tile is pooled to."""
        tiles, h, w = lattice(signals, tokens)
        if m % tiles:
            raise PlanError(f"{m} rows cannot be shared equally by {tiles} tiles; ask for a multiple of {tiles}")
        return rectangle(m // tiles, (h, w))
