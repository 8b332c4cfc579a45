"""BRAVE, one small set of queries that reads several vision encoders (Kar et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fewer.core import Budget, Capacity, Plan, PlanError, Shape, Signals, Tokens, VisualReducer, reducer
from fewer.core.learned import ModuleListOf
from fewer.core.visual.convolution import PixelEncoder
from fewer.core.visual.regions import evenly, granted, queries
from fewer.core.visual.resampler import Block, heads_of, linear_flops


class MEQFormer(nn.Module):
    """Learned queries and the question's words look at each other, and at the features of all encoders in a row.

    channels: of each encoder; words: channels of the language model's word embeddings, 0 = none are read; drop: chance
    that an encoder is left out of a training pass, line by line; the first of a line that would lose all stays.
    """

    def __init__(
        self, channels: Sequence[int], width: int, out: int, rows: int, depth: int, heads: int, words: int, drop: float
    ) -> None:
        super().__init__()
        self.drop = drop
        self.enter = nn.ModuleList(nn.Linear(c, width) for c in channels)
        self.queries = nn.Parameter(torch.randn(rows, width) * 0.02)
        self.words = nn.Linear(words, width) if words else None
        heads = heads_of(width, max(1, width // heads))
        self.blocks = ModuleListOf(Block(width, heads, width) for _ in range(depth))
        self.norm, self.leave = nn.LayerNorm(width), nn.Linear(width, out)

    def forward(
        self, features: Sequence[Tensor | None], m: int, lengths: Tensor | None = None,
        seen: Sequence[Tensor | None] | None = None, words: tuple[Tensor, Tensor] | None = None,
        dropping: bool = False,
    ) -> Tensor:  # fmt: skip
        """(R, m, out), m at most the learned queries.

        features: (R, N_k, C_k) of each encoder, None = it is missing. lengths: (R,) queries of each line that are real.
        seen: (R, N_k) bool of each encoder, False = padding; None = all real. words: (R, T, d), and (R, T) bool.
        dropping: leave encoders out at random.
        """
        there = [k for k, x in enumerate(features) if x is not None]
        given = [self.enter[k](features[k]) for k in there]
        source, lines = torch.cat(given, 1), given[0].shape[0]
        real = [x.new_ones(x.shape[:2], dtype=torch.bool) for x in given]
        if seen is not None:
            real = [r if seen[k] is None else r & seen[k] for r, k in zip(real, there, strict=True)]
        if dropping:
            stays = torch.rand(lines, len(there), device=source.device) >= self.drop
            first = torch.arange(len(there), device=source.device) == 0
            stays = stays | (first & ~stays.any(-1, keepdim=True))
            real = [r & stays[:, i, None] for i, r in enumerate(real)]
        x = self.queries[:m].expand(lines, -1, -1)
        own = x.new_ones(lines, m, dtype=torch.bool)
        if lengths is not None:
            own = torch.arange(m, device=x.device) < lengths[:, None]
        if words is not None and self.words is not None:
            x, own = torch.cat([x, self.words(words[0])], 1), torch.cat([own, words[1]], 1)
        visible, across = own[:, None, None], torch.cat(real, 1)[:, None, None]
        for block in self.blocks:
            x = block(x, source, visible, across)
        return self.leave(self.norm(x[:, :m]))

    def flops(self, sources: Sequence[int], m: int, words: int) -> int:
        """sources: rows of each encoder."""
        enter = sum(linear_flops(layer, n) for layer, n in zip(self.enter, sources, strict=True))
        if self.words is not None:
            enter += linear_flops(self.words, words)
        blocks = sum(block.flops(m + words, sum(sources)) for block in self.blocks)
        return enter + blocks + linear_flops(self.leave, m)


@reducer("brave", paper="arXiv:2404.07204", acts="distill", on="multimodal", training="required")
@dataclass(frozen=True)
class Brave(VisualReducer):
    """A projector of learned queries that read several vision encoders, as many rows for any (BRAVE, ECCV 2024).

    The encoders are the model's tower and small convolutional ones over the same pixels, trained along; the paper has
    five large ones, frozen. Each of them, in the modules' list `encoders`, may be exchanged for a module that maps
    a `Tower` to (T * P, 1, fine_width). Rows stand for the whole picture: their anchors are spread evenly over it.

    budget: rows of a picture; the modules are made for this number. encoders: besides the tower. width: of the
    transformer; None = the tower's (768 in the paper). depth: its blocks. heads: at most, as many as divide the width.
    text: the queries also see the words behind the picture. drop: chance that an encoder is left out in training.
    fine_width, fine_depth: of the further encoders; pixels: side of the patch they see first.

    Where the paper puts attention to the encoders is not known to us: here every block has it, for queries and words.
    """

    budget: Budget = Capacity(160)
    encoders: int = 1
    width: int | None = None
    depth: int = 12
    heads: int = 12
    text: bool = True
    drop: float = 0.2
    fine_width: int = 64
    fine_depth: int = 2
    pixels: int = 8
    changes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, least in {
            "encoders": 0,
            "depth": 1,
            "heads": 1,
            "fine_width": 1,
            "fine_depth": 1,
            "pixels": 1,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: it counts from {least} up")
        if self.width is not None and self.width < 1:
            raise ValueError(f"width={self.width}: it counts from 1 up")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop={self.drop} is a chance, from 0 up and below 1")

    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        width = self.width or shape.channels
        channels = [shape.channels] + [self.fine_width] * self.encoders
        words = shape.width if self.text else 0
        former = MEQFormer(
            channels, width, shape.width, queries(self.budget, shape), self.depth, self.heads, words, self.drop
        )
        further = (
            PixelEncoder(self.fine_width, shape.grid, 1, self.pixels, self.fine_depth) for _ in range(self.encoders)
        )
        return {"former": former, "encoders": nn.ModuleList(further)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        m, lengths = granted(self.budget, tokens, signals.at)
        made = signals.module("former").queries.shape[0]
        if m > made:
            raise PlanError(f"brave has {made} learned queries, {m} are wanted; make modules for this count")
        return evenly(tokens, m, lengths)

    def rows(self, signals: Signals, plan: Plan) -> Tensor:
        former, visual = signals.module("former"), signals.visual
        tower, valid = visual.encoder(), signals.tokens.valid
        features, cost = [visual.features], 0
        for encoder in signals.module("encoders"):
            features.append(encoder(tower)[:, 0][visual.view.source])
            cost += encoder.flops(plan.n) if isinstance(encoder, PixelEncoder) else 0
        words = visual.wording() if self.text else None
        count = 0 if words is None else words[1].shape[1]
        signals.at.spend(cost + former.flops([plan.n] * len(features), plan.m, count))
        return former(features, plan.m, plan.lengths, [valid] * len(features), words, signals.training)
