"""LLaMA-VID: a picture is worth two tokens, one for the question and one for the rest. arXiv:2311.17043, sec. 3."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, BudgetError, Plan, Shape, Signals, Tokens, VisualReducer, reducer
from fewer.core.learned import ModuleListOf
from fewer.core.plan import on_device
from fewer.core.visual.resampler import (
    Block,
    Formed,
    Wording,
    agree,
    centres,
    channels_of,
    check_material,
    heads_of,
    lattice,
    material,
)


class Asking(nn.Module):
    """Learned queries that read the words beside them, and a frame: the Q-Former form of the text side."""

    def __init__(self, queries: int, width: int, channels: int, depth: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.blocks = ModuleListOf(Block(width, heads_of(width, 64), channels) for _ in range(depth))

    def forward(self, words: Tensor, real: Tensor, patches: Tensor) -> Tensor:
        """words: (R, T, width), real: (R, T) bool, patches: (R, P, C) -> (R, queries, width)."""
        n = self.queries.shape[0]
        x = torch.cat([self.queries.to(words.dtype).expand(len(words), -1, -1), words], 1)
        visible = torch.cat([real.new_ones(len(real), n), real], 1)[:, None, None]
        for block in self.blocks:
            x = block(x, patches, visible)
        return x[:, :n]

    def flops(self, words: int, patches: int) -> int:
        return sum(b.flops(self.queries.shape[0] + words, patches) for b in self.blocks)


class Context(nn.Module):
    """The context token: what the words look for in a frame. Eq. 1 of the paper.

    Each text query attends to the patches, softmax(Q K(X)^T / sqrt(C)) X with raw features as values; the mean over
    the real queries goes through a linear layer to the language model's width.
    """

    def __init__(self, width: int, channels: int, hidden: int, depth: int, queries: int) -> None:
        super().__init__()
        self.words = Wording(width, hidden, depth)
        self.asking = Asking(queries, hidden, channels, depth) if queries else None
        self.query, self.key = nn.Linear(hidden, channels), nn.Linear(channels, channels)
        self.leave = nn.Linear(channels, width)

    def forward(self, patches: Tensor, words: Tensor, real: Tensor) -> Tensor:
        """patches: (R, T, P, C), words: (R, L, d), real: (R, L) bool -> (R, T, d)."""
        r, t, _, c = patches.shape
        read = self.words(words, real)
        if self.asking is not None:
            many = (x.repeat_interleave(t, 0) for x in (read, real))
            read = self.asking(*many, patches.flatten(0, 1)).unflatten(0, (r, t))
            real = real.new_ones(r, read.shape[2])
        else:
            read = read[:, None]
        logits = (self.query(read) @ self.key(patches).transpose(-1, -2)).float() / math.sqrt(c)
        share = logits.softmax(-1) * real[:, None, :, None]
        share = share.sum(2) / real.sum(-1).clamp(min=1)[:, None, None]
        return self.leave((share[:, :, None].to(patches.dtype) @ patches)[:, :, 0])

    def flops(self, frames: int, patches: int, words: int) -> int:
        c, h = self.key.in_features, self.query.in_features
        m = words if self.asking is None else self.asking.queries.shape[0]
        sides = 1 if self.asking is None else frames
        asked = 0 if self.asking is None else frames * self.asking.flops(words, patches)
        linear = 2 * (sides * m * h * c + frames * patches * c * c + frames * c * self.leave.out_features)
        return self.words.flops(words) + asked + linear + 2 * frames * patches * c * (m + 1)


@reducer("llama_vid", paper="arXiv:2311.17043", acts="distill", on="multimodal", training="required")
@dataclass(frozen=True)
class LLaMAVID(VisualReducer):
    """LLaMA-VID (Li et al. 2024): every frame becomes one token that the question picks and a few that show the frame.

    The context token is attention from the words of the prompt to the frame's features; the content tokens are the
    features averaged over a grid of cells and sent through the model's projector. Each frame, image or tile gives its
    context token first, frames in order: 1 + content * content rows, two by default.

    content: cells along each side of the grid that is averaged; 1 = the mean of the whole frame.
    budget: the count follows from `content`; `tokens=` or `keep=` must ask for exactly that many.
    queries: 0 lets the words themselves ask, as the paper's BERT form; else so many learned queries read words and
        frame first, its Q-Former form (32).
    depth, hidden: blocks and width of the text encoder.
    sees: "tower", the features that enter the projector; "projected", the visual rows themselves, for models whose
        tower shows nothing for each row: videos of LLaVA-OneVision, whose frames are pooled behind the projector.

    The words are the text tokens behind the last visual one, template included, in the language model's own embeddings;
    the paper's encoder is a pretrained BERT that is given the user's question alone. The context token is anchored at
    its frame's first cell, a content token at the middle of its cells.
    """

    budget: Budget = Formed()
    content: int = 1
    queries: int = 0
    depth: int = 2
    hidden: int = 256
    sees: str = "tower"
    changes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_material(self.sees)
        if self.content < 1 or self.depth < 1 or self.queries < 0 or self.hidden < 1:
            raise ValueError(
                f"content={self.content}, depth={self.depth}, hidden={self.hidden}, queries={self.queries}: the first "
                "three count from 1 up, queries from 0"
            )

    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        channels = channels_of(shape, self.sees)
        return {"context": Context(shape.width, channels, self.hidden, self.depth, self.queries)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        t, h, w = lattice(signals, tokens, padded=True)
        each = 1 + self.content**2
        if self.content > min(h, w) or each > h * w:
            raise BudgetError(
                f"content={self.content}: {each} rows for a frame of {h} x {w} visual tokens are more than there are; "
                "choose a smaller content"
            )
        if tokens.valid is None or not isinstance(self.budget, Formed):
            agree(self.budget, t * each, tokens.n, signals.at, "leave the budget out, or choose another content")
        frame = [0] + [r * w + c for r in centres(h, self.content) for c in centres(w, self.content)]
        where = [f * h * w + cell for f in range(t) for cell in frame]
        index = on_device(where, signals.device).expand(tokens.batch, -1)
        lengths = None if tokens.valid is None else tokens.valid.sum(-1) // (h * w) * each
        return Plan.keep(index, tokens.n, lengths)

    def rows(self, signals: Signals, plan: Plan) -> Tensor:
        _, h, w = lattice(signals, signals.tokens, padded=True)
        visual, context = signals.visual, signals.module("context")
        x, project = material(signals, self.sees)
        patches = x.unflatten(1, (-1, h * w))
        r, t, p, c = patches.shape
        words, real = visual.wording()
        asked = context(patches, words, real)
        cells = F.adaptive_avg_pool2d(patches.flatten(0, 1).transpose(1, 2).unflatten(2, (h, w)), self.content)
        shown = project(cells.flatten(2).transpose(1, 2).reshape(r, -1, c)).unflatten(1, (t, -1))
        signals.at.spend(context.flops(t, p, words.shape[1]))
        made = torch.cat([asked[:, :, None].to(shown.dtype), shown], 2).flatten(1, 2)
        return made if plan.valid is None else made.masked_fill(~plan.valid[..., None], 0)
