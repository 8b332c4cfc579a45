"""HICom: groups of a video pooled by what the instruction asks for, beside a few summaries of all of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, Plan, Shape, SignalError, Signals, Tokens, VisualReducer, reducer
from fewer.core.plan import on_device
from fewer.core.visual.resampler import (
    Attention,
    Formed,
    agree,
    centres,
    channels_of,
    check_material,
    heads_of,
    lattice,
    linear_flops,
    material,
    mean_of,
    mlp,
    runs,
    sines,
)

GUIDES = ("none", "coarse", "fine", "direct")
FRAMES = 256


class Guide(nn.Module):
    """Puts the instruction into queries. Its gate starts at 0, so an untrained one leaves them as they are.

    coarse: (1 - a) q + a P(LayerNorm(q (1 + scale(t)) + shift(t))), t the mean of the words, scale and shift MLPs.
    fine:   q + a attention(LayerNorm(q), words).
    """

    def __init__(self, kind: str, channels: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.norm = nn.LayerNorm(channels)
        self.scale = self.shift = self.leave = self.attention = None
        if kind == "coarse":
            self.scale, self.shift = mlp(width, channels, channels), mlp(width, channels, channels)
            self.leave = nn.Linear(channels, channels)
        else:
            self.attention = Attention(channels, heads_of(channels, 128), width)

    def forward(self, q: Tensor, words: Tensor, real: Tensor) -> Tensor:
        """q: (R, M, C), words: (R, T, d), real: (R, T) bool -> (R, M, C)."""
        if self.attention is not None:
            return q + self.gate * self.attention(self.norm(q), words, real[:, None, None])
        assert self.scale is not None and self.shift is not None and self.leave is not None
        t = mean_of(words, real)[:, None]
        told = self.leave(self.norm(q * (1 + self.scale(t)) + self.shift(t)))
        return (1 - self.gate) * q + self.gate * told

    def flops(self, rows: int, words: int) -> int:
        if self.attention is not None:
            return self.attention.flops(rows, words)
        assert self.scale is not None and self.shift is not None and self.leave is not None
        return linear_flops(self.scale, 1) + linear_flops(self.shift, 1) + linear_flops(self.leave, rows)


class Summaries(nn.Module):
    """Learned queries that look at the whole video, whose features carry sine positions of frame, row and column."""

    def __init__(self, queries: int, channels: int, width: int, guide: str, words: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, channels) * 0.02)
        self.guide = Guide(guide, channels, words) if guide != "none" else None
        self.attention = Attention(channels, heads_of(channels, 128))
        self.leave = mlp(channels, width, width)

    def forward(self, x: Tensor, place: Tensor, words: Tensor, real: Tensor) -> Tensor:
        """x: (R, N, C), place: (N, C), words: (R, T, d), real: (R, T) -> (R, queries, width)."""
        q = self.queries.to(x.dtype).expand(len(x), -1, -1)
        if self.guide is not None:
            q = self.guide(q, words, real)
        return self.leave(q + self.attention(q, x + place.to(x.dtype)))

    def flops(self, n: int, words: int) -> int:
        m = self.queries.shape[0]
        asked = 0 if self.guide is None else self.guide.flops(m, words)
        return asked + self.attention.flops(m, n) + linear_flops(self.leave, m)


@lru_cache(64)
def groups(size: tuple[int, int, int], parts: tuple[int, int, int]) -> tuple[list[list[int]], list[list[bool]]]:
    """The cells of each group of a (T, H, W) line, and which of these entries count: short groups repeat a cell."""
    t, h, w = size
    members = [
        [(f * h + r) * w + c for f in range(*a) for r in range(*b) for c in range(*d)]
        for a in runs(t, parts[0]) for b in runs(h, parts[1]) for d in runs(w, parts[2])
    ]  # fmt: skip
    widest = max(map(len, members))
    real = [[i < len(cells) for i in range(widest)] for cells in members]
    return [cells + [cells[0]] * (widest - len(cells)) for cells in members], real


@lru_cache(64)
def anchors(size: tuple[int, int, int], parts: tuple[int, int, int], queries: int) -> tuple[list[int], list[int]]:
    """Where the rows stand, ascending, and which row stands there: groups in their middle, summaries in the last
    cells that no group has taken."""
    t, h, w = size
    middles = (centres(n, p) for n, p in zip(size, parts, strict=True))
    f, r, c = middles
    taken = [(i * h + j) * w + k for i in f for j in r for k in c]
    rest = sorted(set(range(t * h * w)) - set(taken))
    places = taken + rest[len(rest) - queries :]
    order = sorted(range(len(places)), key=places.__getitem__)
    return [places[i] for i in order], order


@reducer("hicom", paper="arXiv:2503.16036", acts="distill", on="multimodal", training="required")
@dataclass(frozen=True)
class HICom(VisualReducer):
    """HICom, hybrid-level instruction injection (Liu et al. 2025): a row for each block of a video, 32 for all of it.

    Local: the line is cut into blocks of `group` (frames, rows, columns); where a side does not divide, blocks share
    the border and their number is rounded up. A block's query is the features resized to one value per block; it takes
    the instruction in and attends to the block's own features, with these as values. Global: learned queries take the
    instruction in and attend to all features, with sine positions. An image is a video of one frame.

    budget: the count follows from `group` and `queries`; `tokens=` or `keep=` must ask for exactly that many.
    group: frames, rows and columns of a block. queries: rows for the whole line.
    local, globally: how the instruction enters the queries: none; coarse, its mean scales and shifts them; fine, they
        attend to its words; direct (local only), the instruction itself is the query, in the joint space of an
        image-text model. Gates start at 0: until they are trained, coarse and fine are none.

    sees: "tower", the features that enter the projector; "projected", the visual rows themselves, for models whose
        tower shows nothing for each row: videos of LLaVA-OneVision, whose frames are pooled behind the projector.

    The released model is local=direct, globally=coarse; coarse is the default here, for few towers come with a text
    side. The instruction is the text behind the last visual token in the language model's own embeddings, template
    included; the paper embeds it with the tower's text side and keeps answer options out of it. Rows ascend by anchor:
    a block's middle, the last free cells for the summaries. So these come last but for a few blocks of the last
    frame, where the paper puts them behind all others.
    """

    budget: Budget = Formed()
    group: tuple[int, ...] = (4, 3, 3)
    queries: int = 32
    local: str = "coarse"
    globally: str = "coarse"
    sees: str = "tower"
    changes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_material(self.sees)
        if len(self.group) != 3 or min(self.group) < 1:
            raise ValueError(f"group={self.group}: it has frames, rows and columns, each from 1 up, as 4+3+3")
        if self.queries < 0:
            raise ValueError(f"queries={self.queries} is negative; 0 leaves the rows for the whole line out")
        if self.local not in GUIDES or self.globally not in GUIDES[:3]:
            raise ValueError(
                f"local={self.local!r}, globally={self.globally!r}: choose {', '.join(GUIDES)} (direct only locally)"
            )

    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        channels = channels_of(shape, self.sees)
        made: dict[str, nn.Module] = {"leave": mlp(channels, shape.width, shape.width)}
        if self.local in ("coarse", "fine"):
            made["guide"] = Guide(self.local, channels, shape.width)
        if self.queries:
            made["summaries"] = Summaries(self.queries, channels, shape.width, self.globally, shape.width)
        return made

    def cut(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """How many blocks along each side of a (T, H, W) line."""
        t, h, w = (-(-n // g) for n, g in zip(size, self.group, strict=True))
        return t, h, w

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        size = lattice(signals, tokens)
        parts = self.cut(size)
        way_out = "leave the budget out, or choose another group or number of queries"
        agree(self.budget, math.prod(parts) + self.queries, tokens.n, signals.at, way_out)
        where, _ = anchors(size, parts, self.queries)
        return Plan.keep(on_device(where, signals.device).expand(tokens.batch, -1), tokens.n)

    def rows(self, signals: Signals, plan: Plan) -> Tensor:
        size = lattice(signals, signals.tokens)
        parts = self.cut(size)
        x, _ = material(signals, self.sees)
        words, real = signals.visual.wording()
        made = [signals.module("leave")(self._local(signals, x, size, parts, words, real))]
        signals.at.spend(linear_flops(signals.module("leave"), math.prod(parts)))
        if self.queries:
            summaries = signals.module("summaries")
            signals.at.spend(summaries.flops(plan.n, words.shape[1]))
            made.append(summaries(x, positions(size, x.shape[-1], x.device), words, real))
        _, order = anchors(size, parts, self.queries)
        return torch.cat(made, 1)[:, on_device(order, x.device)]

    def _local(
        self, signals: Signals, x: Tensor, size: tuple[int, int, int], parts: tuple[int, int, int], words: Tensor,
        real: Tensor,
    ) -> Tensor:  # fmt: skip
        """(R, G, C): what each block's query reads of the block."""
        cells, there = groups(size, parts)
        index = torch.tensor(cells).to(x.device, non_blocking=True)
        counts = torch.tensor(there).to(x.device, non_blocking=True)
        members = x[:, index]  # (R, G, K, C)
        keys = members
        if self.local == "direct":
            joint, asked = self._joint(signals)
            keys, q = joint[:, index], asked[:, None]
        else:
            volume = x.float().transpose(1, 2).unflatten(2, size)
            q = F.interpolate(volume, parts, mode="trilinear", align_corners=False).flatten(2).transpose(1, 2).to(x)
        if self.local in ("coarse", "fine"):
            guide = signals.module("guide")
            q = guide(q, words, real)
            signals.at.spend(guide.flops(len(cells), words.shape[1]))
        signals.at.spend(2 * index.numel() * (keys.shape[-1] + x.shape[-1]))
        logits = (keys @ q[..., None])[..., 0].float() / math.sqrt(keys.shape[-1])
        share = logits.masked_fill(~counts, float("-inf")).softmax(-1)
        return (share[:, :, None].to(x.dtype) @ members)[:, :, 0]

    @staticmethod
    def _joint(signals: Signals) -> tuple[Tensor, Tensor]:
        """(R, N, J), (R, J): visual rows and the question in the space of an image-text model."""
        if signals.visual.guide is None:
            raise SignalError(
                "local=direct compares the picture with the question in an image-text model, and none is known here; "
                "give apply guide=fewer.Guide(clip, tokenizer), or choose local=coarse"
            )
        joint, pieces = signals.visual.guide
        return joint, pieces.mean(1)


def positions(size: tuple[int, int, int], channels: int, device: torch.device) -> Tensor:
    """(T * H * W, C) float32 sine positions of frame, row and column. Raises SignalError for more than 256 frames."""
    if size[0] > FRAMES:
        raise SignalError(f"{size[0]} frames, but positions end at {FRAMES}; sample fewer frames")
    sides = torch.meshgrid(*(torch.arange(n, device=device) for n in size), indexing="ij")
    return sines([s.flatten() for s in sides], channels)
