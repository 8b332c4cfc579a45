"""FastVID: a video in segments, each with salient tokens and a few centres of context. arXiv:2503.11187."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.core import Budget, KeepRatio, Plan, Signals, Tokens, VisualReducer, cluster, reducer
from fewer.core.match import unit
from fewer.core.visual import Scope
from fewer.core.visual.frames import by_frame, rows_of


@reducer("fastvid", paper="arXiv:2503.11187", acts="merge+prune", on="multimodal", training="free")
@dataclass(frozen=True)
class FastVID(VisualReducer):
    """Dynamic density pruning. Frames are cut into segments where they change; each frame keeps the tokens that receive
    most attention in the vision tower, and the anchor frames of a segment keep centres of density, among the rest, for
    the whole segment. Every token that is not salient joins its nearest centre in each anchor frame.

    budget: share of a frame's tokens. context: of these, the share for centres. cut: cosine of neighbouring frames
        below which a segment ends; cuts: so many of the lowest ones end one anyway. every: frames from one anchor to
        the next, from the end of the segment. own: what a centre itself weighs at least. neighbours: of density.

    Positions are those of the tokens that stay. Needs the tower's attention for each token: image lists, and videos
    whose frames the tower sees one by one.
    """

    budget: Budget = KeepRatio(0.1)
    context: float = 0.4
    cut: float = 0.9
    cuts: int = 7
    every: int = 4
    own: float = 0.6
    neighbours: int = 4
    scope: ClassVar[Scope] = "prompt"
    looks_at: ClassVar[tuple[int | None, ...]] = (None,)

    def __post_init__(self) -> None:
        for name in ("context", "own"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a share, from 0 to 1")
        if self.cuts < 0 or self.every < 1 or self.neighbours < 1:
            raise ValueError(
                f"cuts={self.cuts}, every={self.every}, neighbours={self.neighbours}: whole numbers from 1"
            )

    @property
    def adaptive(self) -> bool:
        return True

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        paid, lines = signals.visual.importance(), []
        for line, x in enumerate(signals.hidden.float()):
            rows = []
            for part in self._segments(x, by_frame(signals, tokens, line)):
                rows += self._rows(x, paid[line], part, signals)
            place = torch.stack([where for where, _ in rows])
            lines.append((place, torch.stack([weight for _, weight in rows])))
        return rows_of(lines, tokens.n)

    def _segments(self, x: Tensor, frames: list[Tensor]) -> list[list[Tensor]]:
        means = unit(torch.stack([x[f].mean(0) for f in frames]))
        like = (means[1:] * means[:-1]).sum(-1)
        ends = like < self.cut
        ends[like.argsort()[: self.cuts]] = True
        parts = [[frames[0]]]
        for frame, end in zip(frames[1:], ends.tolist(), strict=True):
            if end:
                parts.append([frame])
            else:
                parts[-1].append(frame)
        return parts

    def _rows(self, x: Tensor, paid: Tensor, frames: list[Tensor], signals: Signals) -> list[tuple[Tensor, Tensor]]:
        """Places and weights of a segment's rows."""
        n, quiet = len(x), signals.at.quiet
        rows, rest, context = [], [], 0
        for frame in frames:
            whole = max(1, self.budget.keep(len(frame), quiet))
            centres = int(self.context * whole)
            first = paid[frame].argsort(descending=True, stable=True)
            salient = frame[first[: whole - centres]]
            rows += [(p, torch.nn.functional.one_hot(p, n).float()) for p in salient]
            rest.append(frame[first[whole - centres :]].sort().values)
            context += centres
        anchors = list(range(len(frames) - 1, -1, -self.every))
        loose = torch.cat(rest)
        for number, t in enumerate(anchors):
            mine = context // len(anchors) + (number < context % len(anchors))
            mine = min(mine, len(rest[t]))
            if mine == 0:
                continue
            d = cluster.Distances(x[rest[t]][None], scale=x.shape[-1])
            score = cluster.peaks(d, min(self.neighbours, len(rest[t])))[0]
            centre = rest[t][score.argsort(descending=True, stable=True)[:mine]]
            near = (unit(x[loose]) @ unit(x[centre]).T).argmax(-1)
            signals.at.spend(2 * len(loose) * mine * x.shape[-1])
            for c, place in enumerate(centre):
                members = loose[(near == c) & (loose != place)]
                keep = max(self.own, 1 / (len(members) + 1)) if len(members) else 1.0
                weight = torch.zeros(n, device=x.device)
                if len(members):
                    weight[members] = (1 - keep) / len(members)
                weight[place] += keep
                rows.append((place, weight))
        return rows
