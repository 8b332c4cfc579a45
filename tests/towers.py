"""Signals of a vision-language model whose vision tower attends as told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fewer.core import Place, Plan, Seen, Signals, Tokens, Tower, View, Visual

CHANNELS, WIDTH = 6, 8


def call(attention: Tensor, keys: Tensor | None = None) -> Seen:
    """An attention call all of whose queries attend as told. attention: (R, N) or (R, H, N), positive; its class
    token's own share is none. keys: (R, H, N, d)."""
    p = attention[:, None] if attention.dim() == 2 else attention
    r, h, n = p.shape
    k = torch.zeros(r, h, 1 + n, 4) if keys is None else torch.nn.functional.pad(keys, (0, 0, 1, 0))
    bias = torch.nn.functional.pad(p.log(), (1, 0), value=float("-inf"))[:, :, None]
    return Seen(torch.zeros_like(k), k, torch.zeros_like(k), 1.0, bias)


def whole_view(r: int, height: int, width: int) -> View:
    """Images of one tile."""
    cell = torch.arange(height * width).expand(r, -1)
    zero = torch.zeros_like(cell)
    return View(
        torch.arange(r), cell, zero, zero, zero, cell // width, cell % width,
        source=torch.arange(r * height * width).view(r, -1),
    )  # fmt: skip


def cut_view(side: int, crops: tuple[int, int], r: int = 1, drop: Sequence[int] = ()) -> View:
    """Images shown whole and in crops, all of side x side cells. drop: rows of the crops laid side by side that are
    padding, and have no row in the prompt."""
    down, across = crops
    tile = torch.arange(1 + down * across).repeat_interleave(side * side)
    cell = torch.arange(side * side).repeat(1 + down * across)
    row = (tile - 1) // across * side + cell // side
    keep = torch.tensor([t == 0 or y not in drop for t, y in zip(tile.tolist(), row.tolist(), strict=True)])
    n = int(keep.sum())
    streams = (x[keep].expand(r, -1) for x in (torch.zeros_like(tile), tile, torch.zeros_like(tile)))
    item, tile, time = streams
    cell = cell[keep].expand(r, -1)
    return View(
        torch.arange(r), torch.arange(n).expand(r, -1), item, tile, time, cell // side, cell % side,
        source=torch.arange(r * n).view(r, n), crops=torch.tensor([crops] * r),
    )  # fmt: skip


def shown(
    calls: Mapping[int, Seen], view: View, *, features: Tensor | None = None, hidden: Tensor | None = None,
    lengths: Sequence[int] | None = None, cls: Tensor | bool | None = True, layer: int = 2,
) -> tuple[Signals, Tokens]:  # fmt: skip
    """What a method is given at the bridge. features: (R, N, C); hidden: (R, N, d); lengths: real rows of each line."""
    r, n = view.index.shape
    if lengths is not None:
        view.__dict__["valid"] = torch.arange(n) < torch.tensor(lengths)[:, None]
    features = torch.randn(r, n, CHANNELS) if features is None else features
    hidden = torch.randn(r, n, WIDTH) if hidden is None else hidden
    if isinstance(cls, bool):
        cls = torch.randn(r, features.shape[-1]) if cls else None
    matrix = torch.arange(features.shape[-1] * WIDTH).view(-1, WIDTH) / 10
    tower = Tower(features.flatten(0, 1), lambda x: x @ matrix, layer=layer, seen=dict(calls), prefix=1, cls=cls)
    visual = Visual(view, hidden, torch.zeros(r, n, dtype=torch.bool), tower=tower)
    tokens = Tokens.plain(r, n, valid=view.valid)
    return Signals(hidden, tokens, Place(start=n), beside=visual), tokens


def kept(plan: Plan) -> list[list[int]]:
    """The positions each line keeps, padding left out."""
    lengths = [plan.m] * plan.position.shape[0] if plan.lengths is None else plan.lengths.tolist()
    return [p[:k] for p, k in zip(plan.position.tolist(), lengths, strict=True)]


def part(signals: Signals, line: int, length: int) -> tuple[Signals, Tokens]:
    """The same line alone, without its padding."""
    visual = signals.visual
    view, tower = visual.view, visual.encoder()
    names = ("index", "item", "tile", "time", "row", "column", "source")
    streams = {name: getattr(view, name)[line : line + 1, :length] for name in names}
    crops = None if view.crops is None else view.crops[line : line + 1]
    alone = View(torch.zeros(1, dtype=torch.long), crops=crops, **streams)
    hidden = signals.hidden[line : line + 1, :length]
    beside = Visual(alone, hidden, visual.text[line : line + 1, :length], tower=tower)
    tokens = Tokens.plain(1, length)
    return Signals(hidden, tokens, Place(start=length), beside=beside), tokens
