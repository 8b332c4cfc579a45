"""Written: tokens as a text, and what someone who reads it makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .budgets import Budget
from .errors import SignalError
from .place import Place
from .plan import Hard, Plan, on_device
from .tokens import Tokens

SCALINGS = 32  # enough for as many different weights
BEFORE, BEHIND = -1, 1 << 30  # numbers of the parts around the contexts: an instruction, a question


Unit = Literal["token", "word", "phrase", "sentence"]


class Walk(Protocol):
    """A reader on the way through a text, who forgets what is left out."""

    def read(self, stop: int) -> Tensor:
        """(B, stop - at) float32: surprisal of the tokens from where the reader stands up to `stop`, each given those
        before it that stay."""

    def keep(self, stays: Tensor) -> None:
        """stays: (B, n) bool, which of the tokens just read are still there when the reader goes on."""


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

    def walk(self, among: Tensor, *, asked: bool = False) -> Walk:
        """From the start of the text, over the tokens among (B, N) bool; asked: with the question in front."""


@dataclass(frozen=True, eq=False)
class Written:
    """reader: who reads. The others say where tokens belong, (B, N) long, ascending along N.

    part       the context (document, demonstration, message) a token is of, from 0; BEFORE and BEHIND for what stands
               around them
    cell, word, phrase, sentence   from 0; a cell is a token, or those that are the bytes of one character
    """

    reader: Reader
    part: Tensor
    cell: Tensor
    word: Tensor
    phrase: Tensor
    sentence: Tensor

    def unit(self, name: Unit) -> Tensor:
        """(B, N) long: what stays or goes as one."""
        return {"token": self.cell, "word": self.word, "phrase": self.phrase, "sentence": self.sentence}[name]

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


def fill(scores: Tensor, unit: Tensor, count: Tensor, free: Tensor, *, rounds: int = 4) -> Tensor:
    """Whole units by falling score until a number of tokens is reached, never beyond it.

    Shapes   scores: (B, N), higher stays, one value per unit; unit: (B, N) long, equal for neighbours that stay or go
             as one; count: (B,) long; free: (B, N) bool, tokens that may be chosen. Returns (B, N) bool.
    Filling  a unit that no longer fits lets smaller ones of lower score pass: of one-token units the number is met.
    Ties     the earlier unit wins.
    """
    unit = numbered(unit)
    n = unit.shape[-1]
    scores = scores.float().nan_to_num(nan=torch.finfo(torch.float32).min).masked_fill(~free, -float("inf"))
    size = torch.zeros_like(unit).scatter_add_(-1, unit, free.long())  # by unit
    value = torch.full_like(scores, -float("inf")).scatter_reduce(-1, unit, scores, "amax")
    order = value.masked_fill(size == 0, -float("inf")).sort(dim=-1, descending=True, stable=True).indices
    size = size.gather(-1, order)
    left, taken = count, torch.zeros_like(size, dtype=torch.bool)
    for _ in range(rounds):
        fits = ~taken & (size > 0) & (size <= left[:, None])
        run = torch.where(fits, size, 0).cumsum(-1)
        new = fits & (run <= left[:, None])
        taken = taken | new
        left = left - torch.where(new, size, 0).sum(-1)
    chosen = torch.zeros(len(unit), n, dtype=torch.bool, device=unit.device).scatter(-1, order, taken)
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


def stepwise(
    written: Written, tokens: Tokens, share: Tensor, unit: Tensor, *, segment: int, asked: bool = False
) -> tuple[Tensor, Tensor]:
    """The text is read in segments, each behind what stays of those before; of each the most surprising units stay.

    Shapes   share: (B, N) in [0, 1], of each token, see `shares`; those with share 0 are not read. unit: (B, N) long.
    asked    the score is how much less surprising a token is behind the question than without it
    Returns  (B, N) bool, which free tokens stay; (B, N) float32, their scores, NaN where nothing was read.
    Counts   the shares summed up to a segment's end and rounded are kept by then, so that the whole is met.
    Source   LLMLingua, arXiv:2310.05736, algorithm 2; LongLLMLingua, arXiv:2310.06839, eq. 3.
    """
    free = share > 0
    protected = tokens.unpadded if tokens.protected is None else tokens.protected & tokens.unpadded
    protected = protected & (tokens.protected is not None)
    there = free | protected
    walks = [written.reader.walk(there, asked=behind) for behind in (False, True)[: 1 + asked]]
    wanted = share.cumsum(-1)
    whole = (numbered(unit).diff(dim=-1) != 0).all(0).tolist()  # behind which token no text's unit is cut
    stays, scores = torch.zeros_like(free), torch.full(free.shape, float("nan"), device=free.device)
    done = torch.zeros(tokens.batch, dtype=torch.long, device=free.device)
    start = 0
    while start < tokens.n:
        stop = min(start + segment, tokens.n)
        stop = next((i for i in range(stop, min(stop + segment, tokens.n)) if whole[i - 1]), stop)
        read = [walk.read(stop) for walk in walks]
        score = read[0] - read[1] if asked else read[0]
        mine, inside = slice(start, stop), unit[:, start:stop]
        group = numbered(inside)
        score = pooled(score, group, free[:, mine])
        count = wanted[:, stop - 1].round().long() - done
        chosen = fill(score, group, count.clamp(min=0), free[:, mine])
        stays[:, mine], scores[:, mine] = chosen, score
        done = done + chosen.sum(-1)
        for walk in walks:
            walk.keep(chosen | protected[:, mine])
        start = stop
    return stays, scores


def plan(stays: Tensor, tokens: Tokens, order: Tensor | None = None) -> Hard:
    """The plan in which some tokens stay, and all protected ones. stays: (B, N) bool. order: (B, N) long, where each
    token's part shall stand, lowest first; None = all as they stood."""
    if tokens.protected is not None:
        stays = stays | tokens.protected
    if tokens.valid is not None:
        stays = stays & tokens.valid
    key = torch.zeros_like(stays, dtype=torch.long) if order is None else order
    place = key.masked_fill(~stays, torch.iinfo(torch.long).max).argsort(dim=-1, stable=True)
    return Plan.keep(place, tokens.n, stays.sum(-1))
