"""Visual rows inside a language model, by hand: what a method acting behind one of its blocks is shown."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fewer.core import Place, Seen, Signals, Tokens, View, Visual


def inside(
    lengths: tuple[int, ...] = (12, 12), before: int = 3, words: int = 5, d: int = 8, heads: int = 2, seed: int = 0,
    left: int | None = None, **more,
) -> tuple[Signals, Tokens]:  # fmt: skip
    """One prompt per line: text, visual rows, text, padding. lengths: visual rows of each; their numbers differ from
    line to line, so a line's random numbers are drawn by itself.

    left: padding rows to stand behind, at least; more: goes into Place."""
    n = max(lengths)
    s = before + n + words + (left or 0)
    parts = [_line(length, before, words, d, heads, s, n, seed + i) for i, length in enumerate(lengths)]
    hidden, q, k, text, real, index, valid, embedded = (torch.stack(p) for p in zip(*parts, strict=True))
    whole = len(set(lengths)) == 1
    zero = torch.zeros_like(index)
    lines = len(lengths)
    view = View(torch.arange(lines), index, zero, zero, zero, zero, index - before, None if whole else valid)
    seen = Seen(q, k, k, d**-0.5, None if bool(real.all()) else real[:, None, None], causal=True)
    visual = Visual(view, hidden, text, embedded, None if bool(real.all()) else real, seen)
    tokens = Tokens.plain(lines, n, valid=None if whole else valid)
    starts = None if whole else torch.tensor(lengths)
    place = Place(**{"start": n, "starts": starts, "stages": 1, **more})
    return Signals(view.of(hidden), tokens, place, beside=visual), tokens


def _line(length: int, before: int, words: int, d: int, heads: int, s: int, n: int, seed: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    real = before + length + words

    def draw(*shape: int, rows: int) -> Tensor:
        x = torch.randn(rows, *shape, generator=g)
        return torch.cat([x, torch.full((s - rows, *shape), 9.0)])  # padding must not count, so it is large

    hidden, embedded = draw(d, rows=real), draw(d, rows=real)
    q, k = (draw(heads, d, rows=real).transpose(0, 1) for _ in range(2))
    where = torch.arange(s)
    text = (where < real) & ((where < before) | (where >= before + length))
    index = torch.arange(n).clamp(max=length - 1) + before
    return hidden, q, k, text, where < real, index, torch.arange(n) < length, embedded


def alone(lengths: tuple[int, ...], line: int, **given) -> tuple[Signals, Tokens]:
    """One line of `inside(lengths)`, without the others and without padding."""
    return inside((lengths[line],), seed=given.pop("seed", 0) + line, **given)


def with_visual(signals: Signals, **changes) -> Signals:
    """The same signals with some fields of their Visual replaced."""
    return replace(signals, beside=replace(signals.visual, **changes))


def kept(plan, line: int = 0) -> list[int]:
    """The sources that stay in a line."""
    length = plan.m if plan.lengths is None else int(plan.lengths[line])
    return plan.anchor[line, :length].tolist()
