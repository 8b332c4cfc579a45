"""SeTok: as many visual tokens as a picture has things, found as peaks of density. arXiv:2406.05127, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, Plan, Shape, Signals, Tokens, VisualReducer, cluster, reducer
from fewer.core.learned import ModuleListOf
from fewer.core.visual.resampler import Block, Formed, channels_of, check_material, heads_of, material, sines


class Merger(nn.Module):
    """Patches talk within their cluster, the cluster's mean is its token, tokens talk to each other, then the width.

    Positions (frame or tile, row, column; sines) are added to the patches first.
    """

    def __init__(self, channels: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        heads = heads_of(channels, max(1, channels // heads))
        self.within = ModuleListOf(Block(channels, heads) for _ in range(depth))
        self.between = ModuleListOf(Block(channels, heads) for _ in range(depth))
        self.leave = nn.Linear(channels, width)

    def forward(self, x: Tensor, place: Tensor, plan: Plan) -> Tensor:
        """x: (R, N, C), place: (R, N, C) positions, plan: to M rows -> (R, M, width)."""
        x = x + place.to(x.dtype)
        cluster_of = plan.row
        together = (cluster_of[:, :, None] == cluster_of[:, None]) & (cluster_of >= 0)[:, None]
        for block in self.within:
            x = block(x, visible=together[:, None])
        y = plan.reduce(x)
        real = None if plan.valid is None else plan.valid[:, None, None]
        for block in self.between:
            y = block(y, visible=real)
        y = self.leave(y)
        return y if plan.valid is None else y.masked_fill(~plan.valid[..., None], 0)

    def flops(self, n: int, m: int) -> int:
        """Of N patches and M rows, padding counted, attention as if nothing were masked."""
        within, between = (sum(b.flops(k) for b in part) for part, k in ((self.within, n), (self.between, m)))
        return within + between + 2 * m * self.leave.weight.numel()


@reducer("setok", paper="arXiv:2406.05127", acts="merge", on="multimodal", training="optional")
@dataclass(frozen=True)
class SeTok(VisualReducer):
    """SeTok, semantic-equivalent tokenizer (Wu et al. 2025): one row for every density peak among the tower's features.

    A token is a peak if it is dense, exp(-mean squared distance to its nearest `neighbours`), and far from anything
    denser; the product of density and distance is its score. Every other token joins its nearest peak.

    budget: by default each picture gets as many rows as it has peaks, told by `threshold` or `quantile`; `tokens=` and
        `keep=` take exactly so many of the highest peaks.
    threshold: scores above it are peaks. quantile: instead, those above this quantile of the picture's own scores.
    fallback: rows for a picture without any peak, the highest scores.
    neighbours: tokens the density is taken over. normalise: bring every feature vector to mean 0 and variance 1 first,
        so that one threshold serves towers whose features differ in scale; the paper's code takes them as they are.
    trained: False averages the projected tokens of a cluster. True is the paper's tokenizer: a transformer within each
        cluster, its mean, one between the clusters, a linear layer.
    heads, depth: of these transformers.

    sees: "tower", the features that enter the projector; "projected", the visual rows themselves, for models whose
        tower shows nothing for each row: videos of LLaVA-OneVision, whose frames are pooled behind the projector.

    Of two equally dense tokens the earlier counts as denser, where the paper's code draws lots. Distances do not
    include positions, so a cluster may lie in several places. Clusters carry no gradient, their rows do.
    """

    budget: Budget = Formed()
    threshold: float = 0.5
    quantile: float | None = None
    neighbours: int = 64
    fallback: int = 64
    normalise: bool = True
    trained: bool = False
    sees: str = "tower"
    heads: int = 2
    depth: int = 2

    def __post_init__(self) -> None:
        check_material(self.sees)
        if self.quantile is not None and not 0 <= self.quantile < 1:
            raise ValueError(f"quantile={self.quantile} is outside [0, 1); 0.9 makes a tenth of the tokens peaks")
        if min(self.neighbours, self.fallback, self.heads, self.depth) < 1:
            raise ValueError(
                f"neighbours={self.neighbours}, fallback={self.fallback}, heads={self.heads}, depth={self.depth}: "
                "all count from 1 up"
            )

    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        return (
            {"merger": Merger(channels_of(shape, self.sees), shape.width, self.heads, self.depth)}
            if self.trained
            else {}
        )

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        x = material(signals, self.sees)[0].detach().float()
        if self.normalise:
            x = F.layer_norm(x, x.shape[-1:])
        if not isinstance(self.budget, Formed):
            return cluster.dpc_knn(x, self.budget, tokens, at=signals.at, neighbours=self.neighbours)
        n = tokens.n
        signals.at.spend(2 * n * n * x.shape[-1])
        with torch.no_grad():
            real = tokens.unpadded
            d = cluster.Distances(x, real, x.shape[-1])
            score = cluster.peaks(d, self.neighbours, real)
            count = (score > self._fence(score, real)).sum(-1)
            count = torch.where(count > 0, count, real.sum(-1).clamp(max=self.fallback))
            label = cluster.nearest(d, score.sort(dim=-1, descending=True, stable=True).indices, count)
            field = cluster.Field(0, None, n, n, real, count)
            return field.plan(label, replace(tokens, valid=real), None)

    def _fence(self, score: Tensor, real: Tensor) -> float | Tensor:
        """What a peak's score lies above: a number, or (R, 1)."""
        if self.quantile is None:
            return self.threshold
        return score.masked_fill(~real, float("nan")).nanquantile(self.quantile, dim=-1, keepdim=True)

    def rows(self, signals: Signals, plan: Plan) -> Tensor:
        if not self.trained:
            return super().rows(signals, plan)
        merger, view = signals.module("merger"), signals.visual.view
        signals.at.spend(merger.flops(plan.n, plan.m))
        x, _ = material(signals, self.sees)
        return merger(x, sines([view.time + view.tile, view.row, view.column], x.shape[-1]), plan)
