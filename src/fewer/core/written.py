"""Written: tokens as a text, and what someone who reads it makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .budgets import Budget, KeepRatio
from .errors import SignalError
from .place import Place
from .plan import Hard, Plan, on_device
from .tokens import Tokens

SCALINGS = 32  # enough for as many different weights
BEFORE, BEHIND = -1, 1 << 30  # numbers of the parts around the contexts: an instruction, a question


Unit = Literal["token", "word", "phrase", "sentence"]


class Walk(Protocol):
    """A reader on the way through a text, who forgets what is left out."""

    def read(self, these: Tensor) -> Tensor:
        """(B, N) float32, nats: surprisal of these tokens, each given those of them before it and all that stay; NaN
        elsewhere. these: (B, N) bool."""

    def keep(self, stays: Tensor) -> None:
        """stays: (B, N) bool, which of the tokens just read are still there when the reader goes on."""


class Reader(Protocol):
    """A model that reads the tokens. What it cannot know raises SignalError.

    surprisal   (B, N) float32, nats: -log p of each token given all before it (self-information)
    asked       (B, N) float32, nats: the same with the question in front of the text
    relevance   (B, parts) float32: minus the mean surprisal of the question behind each part; higher = nearer to it
    wanted      (B, N) float32 in [0, 1]: what a classifier gives each token for staying
    """

    @property
    def surprisal(self) -> Tensor: ...
    @property
    def asked(self) -> Tensor: ...
    @property
    def relevance(self) -> Tensor: ...
    @property
    def wanted(self) -> Tensor: ...
    def apart(self, group: Tensor) -> Tensor:
        """(B, N) float32, nats: surprisal where each group is read alone. group: (B, N) long, ascending."""

    def walk(self, place: Tensor | None = None, *, asked: bool = False) -> Walk:
        """From the start of the text; asked: with the question in front. place: (B, N) long, where each token's part
        stands, lowest first; None = as they stand."""


@dataclass(frozen=True, eq=False)
class Written:
    """reader: who reads. The others say where tokens belong, (B, N) long, ascending along N.

    part       the context (document, demonstration, message) a token is of, from 0; BEFORE and BEHIND for what stands
               around them
    cell, word, phrase, sentence   from 0; a cell is a token, or those that are the bytes of one character. None where
            token ids alone do not say it; `unit` then raises SignalError
    """

    reader: Reader
    part: Tensor
    cell: Tensor
    word: Tensor | None = None
    phrase: Tensor | None = None
    sentence: Tensor | None = None

    def unit(self, name: Unit) -> Tensor:
        """(B, N) long: what stays or goes as one."""
        found = {"token": self.cell, "word": self.word, "phrase": self.phrase, "sentence": self.sentence}[name]
        if found is None:
            raise SignalError(
                f"token ids alone do not say where a {name} ends: choose unit=token (and context=text), or shorten the "
                "text itself with fewer.Compressor"
            )
        return found

    @property
    def context(self) -> Tensor:
        """(B, N) long: the context, 0 for what is in none."""
        return self.part.masked_fill(self.part == BEHIND, 0).clamp(min=0)

    def by_part(self, values: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P): the mean of values over each context's tokens in `real`, NaN where it has none; and how many these
        are. values: (B, N), real: (B, N) bool."""
        parts = int(self.context.amax()) + 1
        empty = torch.zeros(len(values), parts, dtype=values.dtype, device=values.device)
        total = empty.scatter_add(-1, self.context, values.nan_to_num() * real)
        count = empty.scatter_add(-1, self.context, real.to(values.dtype))
        return total / count, count.long()


@dataclass(frozen=True)
class Each(Budget):
    """So many tokens stay of each sample's own. numbers: one per sample."""

    numbers: tuple[int, ...]

    def keep(self, free: int, at: Place) -> int:
        return min(free, max(self.numbers))

    def granted(self, real: Tensor, free: int, at: Place, *, least: int = 0) -> Tensor:
        return torch.minimum(on_device(list(self.numbers), real.device), real)


def goal(budget: Budget, tokens: Tokens, at: Place) -> tuple[Tensor, Tensor]:
    """(B,) long, how many of each text's free tokens stay; and (B, N) bool, which are free."""
    if budget.adaptive:
        raise SignalError(f"{budget!r} names no count, and a text is cut to one; give keep, tokens or r")
    movable = tokens.movable
    free = torch.ones(tokens.batch, tokens.n, dtype=torch.bool, device=tokens.device) if movable is None else movable
    free = free.expand(tokens.batch, -1)
    real = free.sum(-1)
    return budget.granted(real, tokens.n, at), free


def share_of(budget: Budget, count: Tensor, free: Tensor) -> Tensor:
    """(B,) double: the share of the free tokens that was asked for, before it became a count."""
    if isinstance(budget, KeepRatio) and not isinstance(budget.ratio, tuple):
        return torch.full_like(count, budget.ratio, dtype=torch.double)
    return count.double() / free.sum(-1).clamp(min=1)


def pooled(values: Tensor, group: Tensor, real: Tensor | None = None) -> Tensor:
    """(B, N): each token's value becomes the mean over its group; of those in `real` only. group: (B, N) long, from 0
    to N - 1."""
    weight = torch.ones_like(values) if real is None else real.to(values.dtype)
    total = torch.zeros_like(values).scatter_add_(-1, group, values.nan_to_num() * weight)
    count = torch.zeros_like(values).scatter_add_(-1, group, weight)
    return (total / count.clamp(min=1)).gather(-1, group)


def numbered(group: Tensor) -> Tensor:
    """Groups counted from 0 in the order they come. group: (B, N), any integers, equal neighbours belong together."""
    return (group.diff(dim=-1, prepend=group[:, :1]) != 0).cumsum(-1)


def fill(scores: Tensor, unit: Tensor, count: Tensor, free: Tensor) -> Tensor:
    """Whole units by falling score until a number of tokens is reached, never beyond it.

    Shapes   scores: (B, N), higher stays, one value per unit; unit: (B, N) long, equal for neighbours that stay or go
             as one; count: (B,) long; free: (B, N) bool, tokens that may be chosen. Returns (B, N) bool.
    Filling  a unit that no longer fits lets smaller ones of lower score pass: of one-token units the number is met.
    Ties     the earlier unit wins.
    """
    unit = numbered(unit)
    scores = scores.float().nan_to_num(nan=torch.finfo(torch.float32).min).masked_fill(~free, -float("inf"))
    size = torch.zeros_like(unit).scatter_add_(-1, unit, free.long())  # by unit
    value = torch.full_like(scores, -float("inf")).scatter_reduce(-1, unit, scores, "amax")
    order = value.sort(dim=-1, descending=True, stable=True).indices
    size = size.gather(-1, order)
    left, taken = count[:, None], torch.zeros_like(size, dtype=torch.bool)
    while True:
        fits = ~taken & (size > 0) & (size <= left)
        new = fits & (torch.where(fits, size, 0).cumsum(-1) <= left)  # up to the first that is too large
        if not bool(new.any()):
            break
        taken = taken | new
        left = left - torch.where(new, size, 0).sum(-1, keepdim=True)
    chosen = torch.zeros_like(free).scatter(-1, order, taken)
    return chosen.gather(-1, unit) & free


def shares(goal: Tensor, free: Tensor, weight: Tensor) -> Tensor:
    """(B, N) in [0, 1]: the share of each free token that shall stay, in proportion to weights and `goal` in all.

    goal: (B,), at most the free tokens of a sample. weight: (B, N), non-negative, equal within a part. What a part
    cannot take, since all of it stays, goes to the others.
    """
    weight = weight.double().clamp(min=0).masked_fill(~free, 0)
    share, goal = torch.zeros_like(weight), goal.double()[:, None]
    for _ in range(SCALINGS):  # each time some parts are full, and the others share what is left
        full = share >= 1
        left = goal - full.sum(-1, keepdim=True)
        factor = left / weight.masked_fill(full, 0).sum(-1, keepdim=True).clamp(min=1e-12)
        share = torch.where(full, 1.0, (weight * factor).clamp(max=1))
    return share


def leading(score: Tensor, size: Tensor, limit: Tensor) -> Tensor:
    """(B, P) bool: parts by falling score until they hold `limit` tokens; the one that reaches it is in, and the first.

    score: (B, P), NaN = no such part; size: (B, P) tokens; limit: (B,).
    """
    order = score.nan_to_num(nan=-float("inf")).sort(dim=-1, descending=True, stable=True).indices
    size = size.gather(-1, order)
    before = size.cumsum(-1) - size
    in_front = (before < limit[:, None]) & (size > 0)
    return torch.zeros_like(in_front).scatter(-1, order, in_front)


def segments(there: Tensor, unit: Tensor, size: int, place: Tensor | None = None) -> Tensor:
    """(B, N) long: the number of the segment a token is read in, -1 for those not there.

    there: (B, N) bool. unit: (B, N) long; a segment has `size` tokens, and more where a unit goes on, up to twice as
    many. A rest of less than half of that is read with the last one: few tokens are no choice, and a pass saved.
    place: (B, N) long, see `Reader.walk`.
    """
    found = torch.full(there.shape, -1, dtype=torch.long)
    for row, inside in enumerate(inner(there, place)):
        mine, units = found[row], unit[row].tolist()
        number, length, last = 0, 0, -1
        for i in inside:
            if length >= 2 * size or (length >= size and units[i] != last):
                number, length = number + 1, 0
            mine[i], last = number, units[i]
            length += 1
        if number and 2 * length < size:
            mine[mine == number] = number - 1
    return found.to(there.device)


def inner(there: Tensor, place: Tensor | None = None) -> list[list[int]]:
    """By sample, the tokens that are there, in the order they are read."""
    order = (torch.zeros_like(there, dtype=torch.long) if place is None else place).argsort(dim=-1, stable=True)
    return [row[mine[row]].tolist() for row, mine in zip(order, there, strict=True)]


def fixed(tokens: Tokens) -> Tensor:
    """(B, N) bool: tokens that stay whatever a method says."""
    none = torch.zeros(tokens.batch, tokens.n, dtype=torch.bool, device=tokens.device)
    return none if tokens.protected is None else tokens.protected & tokens.unpadded | none


def stepwise(
    written: Written, tokens: Tokens, share: Tensor, unit: Tensor, *, segment: int, asked: bool = False,
    place: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The text is read in segments, each behind what stays of those before; of each the most surprising units stay.

    Shapes   share: (B, N) in [0, 1], of each token, see `shares`; those with share 0 are not read. unit: (B, N) long.
             place: (B, N) long, see `Reader.walk`.
    asked    the score is how much less surprising a token is behind the question than without it
    Returns  (B, N) bool, which free tokens stay; (B, N) float32, their scores, NaN where nothing was read.
    Counts   the shares summed up to a segment's end and rounded are kept by then, so that the whole is met.
    Source   LLMLingua, arXiv:2310.05736, algorithm 2; LongLLMLingua, arXiv:2310.06839, eq. 3.
    """
    free, guarded = share > 0, fixed(tokens)
    walks = [written.reader.walk(place, asked=behind) for behind in (False, True)[: 1 + asked]]
    number = segments(free | guarded, unit, segment, place)
    stays, scores = torch.zeros_like(free), torch.full(free.shape, float("nan"), device=free.device)
    last = int(number.amax())
    for turn in range(last + 1):
        these = number == turn
        mine = these & free
        read = [walk.read(these) for walk in walks]
        score = pooled(read[0] - read[1] if asked else read[0], numbered(unit), mine)
        due = (share * ((number >= 0) & (number <= turn))).sum(-1)
        count = (due + 0.5 + 1e-6).floor().long() - stays.sum(-1)
        chosen = fill(score, unit, count, mine)
        stays, scores = stays | chosen, torch.where(mine, score, scores)
        if turn < last:
            for walk in walks:
                walk.keep(chosen | guarded & these)
    return stays, scores


def plan(stays: Tensor, tokens: Tokens, order: Tensor | None = None) -> Hard:
    """The plan in which some tokens stay, and all protected ones. stays: (B, N) bool. order: (B, N) long, where each
    token's part shall stand, lowest first; None = all as they stood."""
    stays = (stays | fixed(tokens)) & tokens.unpadded
    key = torch.zeros_like(stays, dtype=torch.long) if order is None else order
    rows = key.masked_fill(~stays, torch.iinfo(torch.long).max).argsort(dim=-1, stable=True)
    length = stays.sum(-1)
    most = int(length.amax())
    return Plan.keep(rows[:, :most], tokens.n, None if bool((length == most).all()) else length)
