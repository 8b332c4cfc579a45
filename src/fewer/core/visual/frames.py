"""Frames of visual rows: the same patch at other times, and rows that stand for several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..match import unit
from ..plan import Plan, Soft, take
from ..signals import Signals
from ..tokens import Tokens
from .view import View


def earlier(view: View, real: Tensor, back: Tensor | int) -> tuple[Tensor, Tensor]:
    """The same patch some frames before: (R, N) places, and whether it is there. back: frames, one number or (R, N).

    real: (R, N) bool, False = padding."""
    n, cell = real.shape[1], torch.stack([view.item, view.tile, view.row, view.column])
    cell = cell.clamp(min=0)
    key = torch.zeros_like(view.time)
    for stream in cell:
        key = key * (stream.amax() + 1) + stream
    span = view.time.clamp(min=0).amax() + 1
    key = key * span + view.time.clamp(min=0)
    key = key.masked_fill(~real, torch.iinfo(key.dtype).max)
    ranked, order = key.sort(dim=-1, stable=True)
    wanted = key - back
    at = torch.searchsorted(ranked, wanted).clamp(max=n - 1)
    found = (ranked.gather(-1, at) == wanted) & real & (view.time >= back)
    return order.gather(-1, at), found


def likeness(x: Tensor, partner: Tensor) -> Tensor:
    """(R, N) float32: cosine of each row with its partner's. x: (R, N, C), partner: (R, N) long."""
    u = unit(x)
    return (u * take(u, partner)).sum(-1)


def by_frame(signals: Signals, tokens: Tokens, line: int) -> list[Tensor]:
    """The places of one line's rows, frame by frame in the order of time, as they stand. Reads the device."""
    plane = signals.plane[line]
    real = tokens.unpadded[line].nonzero().flatten()
    plane = plane[real]
    return [real[plane == frame] for frame in plane.unique().tolist()]


def rows_of(lines: Sequence[tuple[Tensor, Tensor]], n: int) -> Soft:
    """A plan of rows made of several. lines: for each the place each row takes, (M,), distinct, and its weights (M, N).

    Rows come in the order of their places."""
    most = max(len(place) for place, _ in lines)
    places, weights = [], []
    for place, weight in lines:
        order = place.argsort()
        places.append(F.pad(place[order], (0, most - len(place))))
        weights.append(F.pad(weight[order], (0, 0, 0, most - len(place))))
    count = torch.tensor([len(place) for place, _ in lines], device=places[0].device)
    same = all(len(place) == most for place, _ in lines)
    return Plan.soft(torch.stack(weights), position=torch.stack(places), lengths=None if same else count)
