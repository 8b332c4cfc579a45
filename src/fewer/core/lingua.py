"""Which tokens stay as the published code of LLMLingua and LongLLMLingua has it, where that differs from the papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from .tokens import Tokens
from .written import Walk, Written, fixed, inner

CHUNK = 512  # tokens read at once when all are read
SPARE = 100  # tokens that the contexts chosen may hold beyond what stays
BETWEEN = 2  # tokens the code reckons for what stands between contexts

Run = Sequence[tuple[int, float]]
"""Of one segment: so many tokens, and the share of them that stays."""


def runs(lengths: Sequence[int], shares: Sequence[float], segment: int) -> list[Run]:
    """Contexts cut into segments. lengths: tokens of each; shares: of each, those that stay."""
    found: list[Run] = []
    run: list[tuple[int, float]] = []
    filled = 1  # the first segment is one token short
    for length, share in zip(lengths, shares, strict=True):
        if filled + length < segment:
            run.append((length, share))
            filled += length
            continue
        found.append([*run, (segment - filled, share)])
        filled += length - segment
        if filled > segment:
            found += [[(segment, share)]] * (filled // segment)
            filled %= segment
        run = [(filled, share)] if filled else []
    return [*found, run] if run else found


def cut(first: Tensor, again: Callable[[list[int], int, int], Tensor], plan: Sequence[Run], segment: int) -> list[int]:
    """The places of n tokens that stay.

    first   (n - 1,) scores of all tokens but the first, each given all before it
    again   (kept, start, stop) to (stop - start - 1,): scores of kept[start + 1 : stop], given what is kept before
    plan    see `runs`

    A token stays for the score of the one behind it, where it is above a quantile of all scores known so far: those of
    the tokens that stayed, of the segment, and, as the first reading had them, of all that comes. What is left of the
    last segment stays, and of a text shorter than one nearly all.
    """
    kept, scores, start = list(range(len(first) + 1)), first.clone(), 0
    end = min(segment, len(kept))
    for turn, run in enumerate(plan):
        if end > len(kept):
            break
        if turn:
            scores[start : end - 1] = again(kept, start, end)
        start = max(0, end - segment)
        for length, share in run:
            stop = end - segment + length
            stays = torch.cat([scores > _quantile(scores, share), torch.ones(1, dtype=torch.bool)])
            stays[stop:] = True
            stays[: stop - length] = True  # a negative stop counts from behind, as in the code
            end = stop - int((~stays[:stop]).sum()) + segment
            kept = [place for place, stay in zip(kept, stays.tolist(), strict=True) if stay]
            scores = scores[stays[:-1]]
    return kept


def _quantile(scores: Tensor, share: float) -> float:
    if share == 1 or not len(scores):
        return -float("inf")
    rank = max(0, min(len(scores) - 1, int(len(scores) * share) - 1))
    return float(scores.sort(descending=True).values[rank])


def coded(
    written: Written, tokens: Tokens, there: Tensor, target: Tensor, *, segment: int, ramp: Tensor | None = None,
    asked: bool = False, place: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(B, N) bool: the tokens that stay of those `there` (B, N).

    target: (B,), how many were asked for. ramp: (B, P), what is added to the share of each context. asked, place: as
    for `stepwise`. What is protected beside stays, and is read where it stands among the others.
    """
    stays = torch.zeros_like(there)
    for row, inside in enumerate(inner(there, place)):
        if len(inside) < 2:
            stays[row, inside] = True
            continue
        contexts = [(part, len(list(group))) for part, group in groupby(written.context[row, inside].tolist())]
        lengths = [length for _, length in contexts]
        lengths[-1] += BETWEEN
        share = float(target[row]) / (sum(lengths) + 1)
        more = [0.0 if ramp is None else float(ramp[row, part]) for part, _ in contexts]
        shares = [max(0.0, min(1.0, share + extra)) for extra in more]
        reading = _Reading(written, row, inside, asked, place)
        kept = cut(reading.first(), reading.again, runs(lengths, shares, segment), segment)
        stays[row, [inside[i] for i in kept]] = True
    return stays | fixed(tokens)


class _Reading:
    """What a reader says of one text's tokens. inside: the tokens, in the order they are read."""

    def __init__(self, written: Written, row: int, inside: list[int], asked: bool, place: Tensor | None) -> None:
        self.written, self.row, self.inside, self.place = written, row, inside, place
        self.behind = (False, True)[: 1 + asked]
        self.walks = self._walks()
        self.start: int | None = None

    def _walks(self) -> list[Walk]:
        return [self.written.reader.walk(self.place, asked=asked) for asked in self.behind]

    def _these(self, kept: Sequence[int]) -> Tensor:
        these = torch.zeros_like(self.written.part, dtype=torch.bool)
        these[self.row, [self.inside[i] for i in kept]] = True
        return these

    def _read(self, walks: Sequence[Walk], kept: Sequence[int]) -> Tensor:
        read = [walk.read(self._these(kept))[self.row, [self.inside[i] for i in kept]].cpu() for walk in walks]
        return read[0] if len(read) == 1 else read[0] - read[1]

    def first(self) -> Tensor:
        walks, found = self._walks(), []
        for start in range(0, len(self.inside), CHUNK):
            some = range(start, min(start + CHUNK, len(self.inside)))
            found.append(self._read(walks, some))
            for walk in walks:
                walk.keep(self._these(some))
        return torch.cat(found)[1:]

    def again(self, kept: list[int], start: int, stop: int) -> Tensor:
        for walk in self.walks if self.start is not None else ():
            walk.keep(self._these(kept[self.start : start]))  # what was read with the last segment and is final now
        self.start = start
        return self._read(self.walks, kept[start:stop])[1:]
