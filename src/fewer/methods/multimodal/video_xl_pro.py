"""Video-XL-Pro: four frames become one, then the rows an instruction cares for stay. arXiv:2503.18478, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, Plan, Shape, Signals, Tokens, VisualReducer, reducer, select
from fewer.core.budgets import Capacity
from fewer.core.learned import ModuleListOf
from fewer.core.plan import on_device, take
from fewer.core.visual.resampler import (
    Attention,
    Formed,
    centres,
    channels_of,
    check_material,
    heads_of,
    lattice,
    linear_flops,
    material,
    mlp,
)

FRAMES = 4


class Timed(nn.Module):
    """Attention of a cell to itself in the other frames, with a learned bias per distance in time. Its output starts at
    zero, so that it first changes nothing."""

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.heads = heads_of(channels, 64)
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(channels),
            nn.Linear(channels, 3 * channels),
            nn.Linear(channels, channels),
        )
        self.bias = nn.Parameter(torch.zeros(self.heads, 2 * frames - 1))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        t = x.shape[1]
        at = torch.arange(t, device=x.device)
        bias = self.bias[:, at - at[:, None] + self.bias.shape[1] // 2]
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))
        return x + self.out(y.transpose(1, 2).flatten(2))


class Stage(nn.Module):
    """Attention over all cells of all frames, attention over time, a 3-D convolution that halves the frames."""

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(channels), Attention(channels, heads_of(channels, 64))
        self.time = Timed(channels, frames)
        self.halve = nn.Conv3d(channels, channels, 3, stride=(2, 1, 1), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) -> (B, T / 2, H, W, C)."""
        b, t, h, w, c = x.shape
        x = x.flatten(1, 3)
        x = x + self.attention(self.norm(x))
        x = x.view(b, t, h * w, c).transpose(1, 2).flatten(0, 1)
        x = self.time(x).view(b, h, w, t, c)
        return self.halve(x.permute(0, 4, 3, 1, 2)).permute(0, 2, 3, 4, 1)

    def flops(self, frames: int, cells: int) -> int:
        n = frames * cells
        c = self.halve.in_channels
        time = 8 * n * c * c + 4 * n * frames * c
        return self.attention.flops(n, n) + time + n * self.halve.weight.numel()  # 2 for each of n / 2 outputs


class Synthesiser(nn.Module):
    """Dynamic token synthesiser: groups of four frames, each with its time code, become one frame each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.time = nn.Parameter(torch.randn(FRAMES, channels) * 0.02)
        self.stages = ModuleListOf([Stage(channels, FRAMES), Stage(channels, FRAMES // 2)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) -> (B, ceil(T / 4), H, W, C). A last group that is not full repeats its last frame."""
        b, t = x.shape[:2]
        groups = -(-t // FRAMES)
        if t % FRAMES:
            x = torch.cat([x, x[:, -1:].expand(-1, groups * FRAMES - t, -1, -1, -1)], 1)
        x = x.unflatten(1, (groups, FRAMES)).flatten(0, 1) + self.time[:, None, None].to(x.dtype)
        for stage in self.stages:
            x = stage(x)
        return x.unflatten(0, (b, groups))[:, :, 0]

    def flops(self, frames: int, cells: int) -> int:
        groups = -(-frames // FRAMES)
        return groups * sum(s.flops(FRAMES >> i, cells) for i, s in enumerate(self.stages))


@reducer("video_xl_pro", paper="arXiv:2503.18478", acts="distill+prune", on="multimodal", training="required")
@dataclass(frozen=True)
class VideoXLPro(VisualReducer):
    """Video-XL-Pro (Liu et al. 2025): four frames are woven into one, 2 x 2 cells are averaged, the question picks.

    Groups of four frames (the last frame repeated until a group is full; an image counts as four equal ones) become one
    frame by attention and convolutions over time; the model's projector and 2 x 2 pooling follow. A row's score is the
    mean over the words of its product with an MLP of the word, brought to [0, 1] in each line; it is added to all
    channels of the row, which is how the scorer learns, and the highest stay.

    budget: by default `share` of the rows made, rounded down to a multiple of `step` where there are as many; `tokens=`
        and `keep=` count as everywhere, of the visual tokens that came in, and take what they grant of the rows made.
    share: the paper's code draws it from 0.7 to 0.99 at every pass, in use too. step: 16.
    sees: "tower", the features that enter the projector; "projected", the visual rows themselves, for models whose
        tower shows nothing for each row: videos of LLaVA-OneVision, whose frames are pooled behind the projector.

    Left out: the written time stamps between the groups with their windowed attention, and the rotary code at the end.
    Texts around the frames are the model's own business, and rows keep the positions of their anchors, the middle of
    the cells they come from in the third frame of the group. Semantic-guided masking, the pretraining of the
    synthesiser, is in `fewer.recipes.masking`.
    """

    budget: Budget = Formed()
    share: float = 0.7
    step: int = 16
    sees: str = "tower"
    changes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_material(self.sees)
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} is outside (0, 1]; it is the share of the rows made that stays")
        if self.step < 1:
            raise ValueError(f"step={self.step}: counts are rounded down to multiples of it, from 1 up")

    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        return {
            "synthesiser": Synthesiser(channels_of(shape, self.sees)),
            "asks": mlp(shape.width, shape.width, shape.width),
        }

    def count(self, made: int, signals: Signals, n: int) -> int:
        """How many of the rows made stay, of a line of n visual tokens."""
        if not isinstance(self.budget, Formed):
            granted = self.budget.keep(n, signals.at)
            if granted > made:
                signals.at.note(f"asked for {granted} rows, {made} are made of {n} visual tokens")
            return max(1, min(granted, made))
        kept = max(1, int(round(made * self.share, 9)))
        return kept // self.step * self.step or kept

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        size = lattice(signals, tokens)
        made, scores = self.made(signals, size)
        stay = self.count(made.shape[1], signals, tokens.n)
        few = Tokens.plain(tokens.batch, made.shape[1], device=signals.device)
        chosen = select.top(scores, Capacity(stay), few, at=replace(signals.at, note=lambda _: None))
        where = on_device(anchors(size), signals.device).expand(tokens.batch, -1)
        return Plan.keep(take(where, chosen.position), tokens.n)

    def rows(self, signals: Signals, plan: Plan) -> Tensor:
        size = lattice(signals, signals.tokens)
        made, scores = self.made(signals, size)
        where = on_device(anchors(size), made.device)
        mine = torch.searchsorted(where, plan.position)
        return take(made + scores[..., None].to(made.dtype), mine)

    def made(self, signals: Signals, size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """(R, G, d) and (R, G): the rows made of each line, group by group, and their scores in [0, 1]. Once a pass."""
        visual, memory = signals.visual, signals.memory
        if "made" in memory and memory["made"][0] is visual:
            return memory["made"][1:]
        t, h, w = size
        synthesiser, asks = signals.module("synthesiser"), signals.module("asks")
        x, project = material(signals, self.sees)
        frames = synthesiser(x.unflatten(1, size))
        r, g, c = frames.shape[0], frames.shape[1], frames.shape[-1]
        rows = project(frames.reshape(r, -1, c))
        grid = rows.reshape(r * g, h, w, -1).permute(0, 3, 1, 2)
        pooled = (
            F.adaptive_avg_pool2d(grid, (-(-h // 2), -(-w // 2)))
            .flatten(2)
            .transpose(1, 2)
            .reshape(r, -1, rows.shape[-1])
        )
        words, real = visual.wording()
        wanted = (asks(words).float() * real[..., None]).sum(1) / real.sum(-1, keepdim=True).clamp(min=1)
        score = (pooled.float() @ wanted[..., None])[..., 0]
        low, high = score.amin(-1, keepdim=True), score.amax(-1, keepdim=True)
        score = (score - low) / (high - low).clamp_min(1e-6)
        signals.at.spend(
            synthesiser.flops(t, h * w) + linear_flops(asks, words.shape[1]) + 2 * pooled[0].numel()
        )  # fmt: skip
        memory["made"] = (visual, pooled, score)
        return pooled, score


def anchors(size: tuple[int, int, int]) -> list[int]:
    """Where the rows made of a (T, H, W) line stand, ascending."""
    t, h, w = size
    frames = [min(first + FRAMES // 2, t - 1) for first in range(0, t, FRAMES)]
    rows, columns = centres(h, -(-h // 2)), centres(w, -(-w // 2))
    return [(f * h + r) * w + c for f in frames for r in rows for c in columns]
