"""PruneVid, in front of the language model: still patches become one, others gather in clusters. arXiv:2412.16117."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.core import Budget, KeepRatio, Plan, Signals, Tokens, VisualReducer, cluster, reducer
from fewer.core.match import unit
from fewer.core.visual.frames import by_frame, rows_of

FEW = 14  # tokens of which no clusters are made


@reducer("prunevid", paper="arXiv:2412.16117", acts="merge", on="multimodal", training="free")
@dataclass(frozen=True)
class PruneVid(VisualReducer):
    """Spatial-temporal token merging. Frames are clustered by their means and cut into segments where the cluster
    changes; in a segment a patch is still if its tokens are alike over all frames. Still patches become their mean over
    time; they, and the other tokens of each frame, are clustered and become the means of their clusters.

    budget: share of the tokens that stays in each clustering. segments: share of the frames that are cluster centres.
    alike: mean cosine over pairs of frames above which a patch is still. neighbours: of the density peaks.

    Up to 14 tokens are left as they are. The paper's second stage, by the text's attention inside the model, is no part
    of this: `fastv` at layer 10 is close to it. Frames of different sizes are segments by themselves.
    """

    budget: Budget = KeepRatio(0.5)
    segments: float = 0.25
    alike: float = 0.8
    neighbours: int = 7

    def __post_init__(self) -> None:
        if not 0 < self.segments <= 1:
            raise ValueError(f"segments={self.segments}: a share of the frames, above 0 and at most 1")
        if not -1 <= self.alike <= 1:
            raise ValueError(f"alike={self.alike} is no cosine; it lies in [-1, 1]")
        if self.neighbours < 1:
            raise ValueError(f"neighbours={self.neighbours}: at least one")

    @property
    def adaptive(self) -> bool:
        return True

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        lines = []
        for line, x in enumerate(signals.hidden.float()):
            frames = by_frame(signals, tokens, line)
            groups = [g for part in self._segments(x, frames) for g in self._groups(x, part, signals)]
            place = torch.stack([g[0] for g in groups])
            weight = torch.zeros(len(groups), tokens.n, device=x.device)
            for row, members in zip(weight, groups, strict=True):
                row[members] = 1 / len(members)
            lines.append((place, weight))
        return rows_of(lines, tokens.n)

    def _segments(self, x: Tensor, frames: list[Tensor]) -> list[list[Tensor]]:
        """Runs of frames of one cluster and one size."""
        k = max(1, int(self.segments * len(frames)))
        means = torch.stack([x[f].mean(0) for f in frames])
        label = self._clusters(means, k).tolist() if len(frames) > 1 else [0]
        parts: list[list[Tensor]] = []
        for t, frame in enumerate(frames):
            if t and label[t] == label[t - 1] and len(frame) == len(frames[t - 1]):
                parts[-1].append(frame)
            else:
                parts.append([frame])
        return parts

    def _groups(self, x: Tensor, frames: list[Tensor], signals: Signals) -> list[Tensor]:
        """The tokens each row is the mean of, each ascending."""
        if len(frames) == 1:
            return self._gathered(x, [m[None] for m in frames[0]], signals)
        place = torch.stack(frames)  # (T, L)
        u = unit(x[place])
        t = len(frames)
        alike = (u.sum(0).square().sum(-1) - t) / (t * (t - 1))  # mean cosine over pairs of frames
        still = alike > self.alike
        out = self._gathered(x, list(place[:, still].T), signals)
        for frame in place[:, ~still]:
            out += self._gathered(x, [m[None] for m in frame], signals)
        return out

    def _gathered(self, x: Tensor, items: list[Tensor], signals: Signals) -> list[Tensor]:
        """Items, each some tokens, joined by cluster."""
        if len(items) <= FEW:
            return items
        k = max(1, self.budget.keep(len(items), signals.at.quiet))
        label = self._clusters(torch.stack([x[m].mean(0) for m in items]), k)
        joined = [torch.cat([items[i] for i in (label == c).nonzero().flatten().tolist()]) for c in label.unique()]
        return [members.sort().values for members in joined]

    def _clusters(self, x: Tensor, k: int) -> Tensor:
        """(F,) long: the cluster of each row of x (F, C)."""
        d = cluster.Distances(x[None], scale=x.shape[-1])
        return cluster.density_peaks(d, k, min(self.neighbours, len(x)))[0][0]
