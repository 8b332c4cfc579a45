"""Honeybee's D-Abstractor, queries that sample the map around their own place (Cha et al. 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, Capacity, Plan, PlanError, Shape, Signals, Tokens, View, VisualReducer, reducer
from fewer.core.learned import ModuleListOf
from fewer.core.visual.convolution import Positions, as_maps
from fewer.core.visual.regions import Regions, granted, queries
from fewer.core.visual.resampler import heads_of, lattice, linear_flops, mlp


class DeformableAttention(nn.Module):
    """Each query reads the map at a few places around its reference point; where, and how much, it says itself.

    Source   Deformable DETR, arXiv:2010.04159, eq. 2, on a single scale. At the start offsets depend on no query: head
             by head they point in another direction, point by point one cell farther.
    """

    def __init__(self, width: int, heads: int, points: int) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.offset, self.weight = nn.Linear(width, heads * points * 2), nn.Linear(width, heads * points)
        self.value, self.join = nn.Linear(width, width), nn.Linear(width, width)
        angle = torch.arange(heads) * (2 * math.pi / heads)
        towards = torch.stack([angle.cos(), angle.sin()], -1)
        towards = towards / towards.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, points + 1)[:, None]
        with torch.no_grad():
            self.offset.bias.copy_((towards[:, None] * steps).flatten())
        for module in (self.offset, self.weight):
            nn.init.zeros_(module.weight)
        nn.init.zeros_(self.weight.bias)

    def forward(self, query: Tensor, place: Tensor, x: Tensor) -> Tensor:
        """query: (B, M, W); place: (M, 2), column and row from 0 to 1; x: (B, W, h, w) -> (B, M, W).

        Sampling is done in float32; beyond the map's border there is nothing."""
        h, w = x.shape[-2:]
        value = self.value(x.movedim(1, -1)).movedim(-1, 1).unflatten(1, (self.heads, -1)).flatten(0, 1)
        offset = self.offset(query).float().unflatten(-1, (self.heads, self.points, 2))
        at = place.float()[:, None, None] + torch.stack([offset[..., 0] / w, offset[..., 1] / h], -1)
        at = (2 * at - 1).transpose(1, 2).flatten(0, 1)  # (B * heads, M, points, 2)
        read = F.grid_sample(value.float(), at, mode="bilinear", padding_mode="zeros", align_corners=False)
        p = self.weight(query).float().unflatten(-1, (self.heads, self.points)).softmax(-1)
        read = (read * p.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)  # (B * heads, W / heads, M)
        return self.join(read.unflatten(0, (-1, self.heads)).flatten(1, 2).transpose(1, 2).to(query.dtype))

    def flops(self, n: int, m: int) -> int:
        own = sum(linear_flops(layer, m) for layer in (self.offset, self.weight, self.join))
        return own + linear_flops(self.value, n) + 10 * m * self.points * self.join.in_features


class Layer(nn.Module):
    """Deformable attention and an MLP, each added to what came in and followed by a LayerNorm."""

    def __init__(self, width: int, heads: int, points: int) -> None:
        super().__init__()
        self.attention, self.norm = DeformableAttention(width, heads, points), nn.LayerNorm(width)
        self.mlp, self.mlp_norm = mlp(width, 4 * width, width), nn.LayerNorm(width)

    def forward(self, content: Tensor, position: Tensor, place: Tensor, x: Tensor) -> Tensor:
        content = self.norm(content + self.attention(content + position, place, x))
        return self.mlp_norm(content + self.mlp(content))


class DAbstractor(nn.Module):
    """Learned queries with learned places on the map, layers of deformable attention, a linear layer."""

    def __init__(
        self, channels: int, width: int, out: int, grid: tuple[int, int], rows: int, depth: int, heads: int, points: int
    ) -> None:
        super().__init__()
        self.positions = Positions(channels, grid)
        self.enter = nn.Linear(channels, width)
        self.content = nn.Parameter(torch.randn(rows, width) * 0.02)
        self.place = nn.Parameter(torch.logit(middles(rows, grid)))
        heads = heads_of(width, max(1, width // heads))
        self.layers = ModuleListOf(Layer(width, heads, points) for _ in range(depth))
        self.leave = nn.Linear(width, out)

    def forward(self, x: Tensor, regions: Regions) -> Tensor:
        """(R, C, h, w) -> (R, M, out). regions: of the same cells, whose means are the queries' positions."""
        x = self.enter(self.positions(x).movedim(1, -1))
        cells = x.flatten(1, 2)
        position = regions.sum(cells) / regions.sum(torch.ones_like(cells[..., :1])).clamp_min(1)
        content = self.content.expand(x.shape[0], -1, -1)
        for layer in self.layers:
            content = layer(content, position, self.place.sigmoid(), x.movedim(-1, 1))
        return self.leave(content)

    def flops(self, n: int, m: int) -> int:
        layers = sum(layer.attention.flops(n, m) + linear_flops(layer.mlp, m) for layer in self.layers)
        return linear_flops(self.enter, n) + layers + linear_flops(self.leave, m)


def middles(rows: int, grid: tuple[int, int]) -> Tensor:
    """(rows, 2) float32: column and row, from 0 to 1, of the middle of each of a grid's regions."""
    h, w = grid
    cell = torch.arange(h * w)[None]
    none = torch.zeros_like(cell)
    view = View(none[:, 0], cell, none, none, none, cell // w, cell % w)
    row, column = Regions.cut(view, rows).middle
    return torch.stack([(column[0] + 1) / (2 * w), (row[0] + 1) / (2 * h)], -1)


@reducer("honeybee_d", paper="arXiv:2312.06742", acts="distill", on="multimodal", training="required")
@dataclass(frozen=True)
class HoneybeeD(VisualReducer):
    """A projector of learned queries, each sampling the map around its own place (D-Abstractor, CVPR 2024).

    They sample by deformable attention. Their places start as the middles of equal regions and are learned, as are
    their contents; positions are the means of those regions. Queries do not see each other.

    budget: queries of a picture; any number that the grid has cells for; the modules are made for it.
    width: of the layers; None = the tower's. depth: layers. heads: at most, as many as divide the width. points: read
    by each head.

    The MLP of a layer is four times as wide as the layer. The paper reads the tower's last layer, this reads what
    enters the model's own projector. Works on pictures of one whole tile.
    """

    budget: Budget = Capacity(144)
    width: int | None = None
    depth: int = 6
    heads: int = 8
    points: int = 4
    changes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("depth", "heads", "points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it counts from 1 up")
        if self.width is not None and self.width < 1:
            raise ValueError(f"width={self.width}: it counts from 1 up")

    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        rows = min(queries(self.budget, shape), shape.grid[0] * shape.grid[1])
        made = DAbstractor(
            shape.channels, self.width or shape.channels, shape.width, shape.grid, rows, self.depth, self.heads,
            self.points,
        )  # fmt: skip
        return {"abstractor": made}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        m, _ = granted(self.budget, tokens, signals.at)
        tiles, h, w = lattice(signals, tokens)
        made = signals.module("abstractor").content.shape[0]
        if tiles > 1 or m != made:
            raise PlanError(
                f"honeybee_d was made for {made} rows of one tile; here {m} are wanted of {tiles} tiles of {h} x {w}. "
                "Use honeybee_c or tokenpacker, or modules made for this count"
            )
        return Regions.cut(signals.visual.view, m).kept()

    def rows(self, signals: Signals, plan: Plan) -> Tensor:
        abstractor, visual = signals.module("abstractor"), signals.visual
        signals.at.spend(abstractor.flops(plan.n, plan.m))
        _, h, w = lattice(signals, signals.tokens)
        return abstractor(as_maps(visual.features, (h, w)), Regions.cut(visual.view, plan.m))
