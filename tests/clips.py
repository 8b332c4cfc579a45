"""Visual rows of clips, frame by frame in raster order, with words behind them: for methods that make rows anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fewer.core import Place, Shape, Signals, Tokens, Tower, View, Visual, VisualReducer

WIDTH, CHANNELS = 8, 12


def clip(
    frames: int | Sequence[int] = 1, height: int = 4, width: int = 4, *, lines: int = 2, words: int = 5, seed: int = 0,
    method: VisualReducer | None = None,
) -> Signals:  # fmt: skip
    """One line per sequence: 3 words, the frames, more words. frames: one number, or one per line, padding behind.

    The projector is a fixed random linear layer; with a method come its modules, seeded."""
    draw = torch.Generator().manual_seed(seed)
    counts = [frames] * lines if isinstance(frames, int) else list(frames)
    lines, n = len(counts), max(counts) * height * width
    valid = torch.arange(n) < torch.tensor(counts)[:, None] * height * width
    s = 3 + n + words
    cell = torch.arange(n).expand(lines, n)
    zero = torch.zeros_like(cell)
    view = View(
        torch.arange(lines), cell + 3, zero, zero, cell // (height * width), cell // width % height, cell % width,
        valid=None if valid.all() else valid, source=torch.arange(lines * n).view(lines, n),
    )  # fmt: skip
    text = torch.ones(lines, s, dtype=torch.bool)
    text[:, 3 : 3 + n] = False
    hidden = torch.randn(lines, s, WIDTH, generator=draw)
    matrix = torch.randn(CHANNELS, WIDTH, generator=torch.Generator().manual_seed(seed + 1))
    tower = Tower(torch.randn(lines * n, CHANNELS, generator=draw), lambda x: x @ matrix.to(x.dtype))
    tokens = Tokens.plain(lines, n, valid=view.valid)
    modules = nn.ModuleDict()
    if method is not None:
        torch.manual_seed(seed)
        modules = nn.ModuleDict(method.parts(Shape(WIDTH, 2, CHANNELS, 4, (height, width)))).eval()
    return Signals(
        view.of(hidden), tokens, Place(start=n), modules=modules, beside=Visual(view, hidden, text, tower=tower),
        grid=(height, width),
    )  # fmt: skip


def with_features(signals: Signals, features: Tensor) -> Signals:
    """The same with other tower features. features: (R, N, C)."""
    visual = signals.visual
    assert visual.tower is not None
    tower = replace(visual.tower, features=features.flatten(0, 1))
    return replace(signals, beside=replace(visual, tower=tower), memory={})


def with_words(signals: Signals, seed: int) -> Signals:
    """The same picture, another question."""
    visual = signals.visual
    other = torch.randn(visual.hidden.shape, generator=torch.Generator().manual_seed(seed))
    hidden = torch.where(visual.text[..., None], other.to(visual.hidden.dtype), visual.hidden)
    return replace(signals, beside=replace(visual, hidden=hidden), memory={})


def made(method: VisualReducer, signals: Signals) -> Tensor:
    """The rows a method makes: (R, M, d)."""
    return method.rows(signals, method.plan(signals, signals.tokens))
