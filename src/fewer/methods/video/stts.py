"""STTS: learned choice of frames, then of one window in each frame. arXiv:2111.11591, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer
from fewer.core.learned import perturbed_top
from fewer.core.spacetime import Rectangle


class Scorer(nn.Module):
    """One score per item, from its own features and the mean of all.

    sigma: of the noise in training; a recipe may let it fall to 0. generator: source of the noise, None = torch's own.
    """

    def __init__(self, entering: int, width: int) -> None:
        super().__init__()
        half, quarter = max(1, width // 2), max(1, width // 4)
        self.own = half
        self.embed = nn.Sequential(nn.LayerNorm(entering), nn.Linear(entering, width), nn.GELU())
        self.decide = nn.Sequential(
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 1)
        )
        self.sigma = 0.1
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, items, C) -> (B, items) float32."""
        h = self.embed(x)
        own, shared = h[..., : self.own], h[..., self.own :].mean(1, keepdim=True)
        shared = shared.expand(-1, h.shape[1], -1)
        return self.decide(torch.cat([own, shared], -1))[..., 0].float()

    def flops(self, n: int) -> int:
        return 2 * n * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))


@reducer("stts", paper="arXiv:2111.11591", acts="prune", on="video", training="required",
         exempt={"budget_is_met": "whole frames, or square windows, stay: at most what the budget grants",
                 "padding_changes_nothing": "it keeps frames or windows, so ragged input is refused"})  # fmt: skip
@dataclass(frozen=True)
class STTS(Reducer):
    """Spatial-temporal token selection: of `frames` the best scored, or of each frame one square of `windows`.

    budget: share of the tokens that stays; rounded down to whole frames, or to the largest square in each frame.
    by: "frames" or "windows". The paper has one of each, "stts:by=frames,layers=0" and "stts:by=windows,layers=4".
    samples: draws of the noise in training, in which soft selectors mix frames or windows (perturbed top-k).
    diagonal: the gradient of the authors' code instead of that of the smoothed choice.
    """

    budget: Budget = KeepRatio(0.625)
    layers: tuple[int, ...] | None = (0,)
    by: Literal["frames", "windows"] = "frames"
    samples: int = 100
    diagonal: bool = False
    site: ClassVar[Site] = Site.BEFORE_BLOCK

    def __post_init__(self) -> None:
        if self.by not in ("frames", "windows"):
            raise ValueError(f"by={self.by!r}: frames or windows")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: at least one draw of noise")

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        return {"scorer": Scorer(2 * width if self.by == "frames" else width, width)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        shape = Rectangle.of(signals, tokens, "stts")
        stays = self.budget.keep(tokens.free_count, signals.at)
        if self.by == "frames":
            return self._frames(signals, tokens, shape, max(1, stays // shape.cells))
        return self._windows(signals, tokens, shape, max(1, stays // shape.frames))

    def _frames(self, signals: Signals, tokens: Tokens, shape: Rectangle, k: int) -> Plan:
        scorer, x = signals.module("scorer"), shape.cube(signals.hidden)
        signals.at.spend(scorer.flops(shape.frames))
        score = _ranged(scorer(torch.cat([x.mean(2), x.amax(2)], -1)))
        Rectangle(k, shape.cells, shape.prefix).keep_in(signals)
        if not signals.training:
            kept = score.topk(k, dim=-1).indices.sort(-1).values
            return shape.of_frames(Plan.keep(kept, shape.frames))
        y = perturbed_top(score, k, sigma=scorer.sigma, samples=self.samples, diagonal=self.diagonal,
                          generator=scorer.generator)  # fmt: skip
        eye = torch.eye(shape.cells, device=y.device)
        whole = torch.einsum("bkt,cd->bkctd", y, eye).flatten(3, 4).flatten(1, 2)
        return shape.soft(whole)

    def _windows(self, signals: Signals, tokens: Tokens, shape: Rectangle, most: int) -> Plan:
        _, height, width = signals.space
        if height * width != shape.cells:
            raise ValueError(
                f"stts:by=windows needs whole frames of {height} x {width} patches; {shape.cells} are left"
            )
        scorer, x = signals.module("scorer"), shape.cube(signals.hidden).flatten(0, 1)  # (B * T, L, C)
        signals.at.spend(shape.frames * scorer.flops(shape.cells))
        cells = windows(height, width, min(isqrt(most), height, width)).to(x.device)  # (W, a * a)
        score = _ranged(scorer(x)[:, cells].mean(-1))  # (B * T, W)
        Rectangle(shape.frames, cells.shape[1], shape.prefix).keep_in(signals)
        if not signals.training:
            kept = cells[score.argmax(-1)]  # (B * T, a * a)
            return shape.of_groups(Plan.keep(kept, shape.cells))
        y = perturbed_top(score, 1, sigma=scorer.sigma, samples=self.samples, diagonal=self.diagonal,
                          generator=scorer.generator)  # fmt: skip
        hot = nn.functional.one_hot(cells, shape.cells).float()  # (W, a * a, L)
        each = torch.einsum("nw,wal->nal", y[:, 0], hot).unflatten(0, (tokens.batch, shape.frames))
        whole = torch.einsum("btal,ts->btasl", each, torch.eye(shape.frames, device=y.device))
        return shape.soft(whole.flatten(3, 4).flatten(1, 2))


def _ranged(score: Tensor) -> Tensor:
    """Between 0 and 1 in each sample. score: (B, items)."""
    low, high = score.amin(-1, keepdim=True), score.amax(-1, keepdim=True)
    return (score - low) / (high - low + 1e-5)


def windows(height: int, width: int, side: int) -> Tensor:
    """(W, side * side) long: the cells of every candidate square, ascending. Candidates are half a remainder apart."""
    step = [max((edge - side) // 2, 1) for edge in (height, width)]
    tops, lefts = (torch.arange(0, edge - side + 1, s) for edge, s in zip((height, width), step, strict=True))
    inside = torch.arange(side)
    square = (inside[:, None] * width + inside).flatten()
    return (tops[:, None] * width + lefts).flatten()[:, None] + square
