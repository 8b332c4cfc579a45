"""How much some rows of a prompt look at its visual rows, with and without what rotary positions do to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import attention
from .. import rope as rotary
from ..errors import SignalError
from ..tokens import Group
from .view import Visual

Score = Literal["rotated", "unrotated", "corrected"]
LEAST = 0.1  # of the gain at distance 0: it nears zero and changes its sign far away, and no score may explode there


def check_score(score: str) -> None:
    """Raises ValueError for an unknown kind of score."""
    if score not in get_args(Score):
        raise ValueError(f"score={score!r}: choose {', '.join(get_args(Score))}")


def attended(visual: Visual, queries: Group, score: Score = "rotated") -> Tensor:
    """Attention of some rows of the sequence on the visual rows, softmax over all keys. Returns (R, H, Q, N), float32.

    queries  places in the sequence, a run or (B, Q)
    score    "rotated": as the model computes it. "unrotated": of queries and keys before the rotary embedding, so that
             distance plays no part. "corrected": the model's, over the gain that rotation alone gives at the distance
             of query and key (see `rotary.gain`), taken as at least a tenth of that at distance 0; the floor is ours
    Raises   SignalError where this block's attention, or for the last two its rotary tables, are not known
    """
    if score == "rotated" or visual.seen is None:
        return visual.attended(queries)
    if visual.tables is None:
        raise SignalError(f"score={score} needs a model with rotary positions, known here; choose score=rotated")
    b, s = visual.hidden.shape[:2]
    cos, sin = (table.expand(b, s, -1) for table in visual.tables())
    if score == "unrotated":
        return replace(visual, seen=rotary.unrotated(visual.seen, cos, sin)).attended(queries)
    view = visual.view
    asking = queries.of(cos)[view.sample], queries.of(sin)[view.sample]
    visual.spend(4 * len(queries) * view.n * cos.shape[-1])
    gain = rotary.gain_between(asking, (view.of(cos), view.of(sin)))
    return visual.attended(queries) / gain.clamp_min(LEAST * cos.shape[-1] ** 0.5)[:, None]


def per_sample(visual: Visual, index: Tensor) -> Group:
    """Places named by line as a group of each sequence, one line a prompt. index: (R, Q) long. Prompts without a line
    ask from place 0, and nobody reads that."""
    wide = index.new_zeros(visual.hidden.shape[0], index.shape[1])
    return Group(index=wide.index_copy(0, visual.view.sample, index))


def strongest(visual: Visual) -> tuple[Tensor, Tensor]:
    """What each visual row receives from the prompt's visual rows and from its text: (R, N) float32 each.

    Of the attention probabilities the largest over the heads counts, then the mean over the rows that ask. Lines are
    prompts. Query rows are taken in chunks, so memory is linear in the length."""
    seen = visual.seen
    view, text = visual.view, visual.text
    if seen is None:
        raise SignalError("attention of the language model is not known at the bridge; act inside one of its blocks")
    _, h, s, d = seen.q.shape
    visual.spend(2 * h * s * s * d)
    there = torch.ones_like(view.index, dtype=torch.bool) if view.valid is None else view.valid
    shown = torch.zeros(len(view.index), s + 1, device=text.device)
    shown = shown.scatter(-1, torch.where(there, view.index, s), 1.0)[:, :s]
    asking = torch.stack([shown, text[view.sample].float()], 1)  # (R, 2, S)
    step = max(1, attention.CHUNK // (h * s * max(1, len(seen.q))))
    total = torch.zeros(len(view.index), 2, s, device=text.device)
    for i in range(0, s, step):
        part = attention.rows(seen, Group(i, min(i + step, s))).amax(1)
        total += asking[:, :, i : i + step] @ part[view.sample]
    received = total / asking.sum(-1, keepdim=True).clamp_min(1)
    index = view.index[:, None].expand(-1, 2, -1)
    own, cross = received.gather(-1, index).unbind(1)
    return own, cross
