"""Who reads a text before it is cut: a causal language model, or an encoder that says which words it wants."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..compat import cache_argument, cached
from ..core.errors import SignalError
from ..core.written import BEHIND, numbered

CHUNK = 512  # tokens whose logits are there at once
FIRST = 10  # tokens of the text that stay in sight when the window slides
LENT = 32  # groups read side by side


@dataclass(eq=False)
class LanguageReader:
    """A causal language model and the tokens it reads.

    model      any that gives logits; with a cache that can be cut, each token is read once, and what stays once more
    ids        (B, N) long; valid: (B, N) bool, padding behind; part: (B, N), see `Written`
    question   per text, what is asked about it, () where nothing is
    promise    what follows a question where documents are ranked: that the answer is in them
    start      what every text begins with for the model, such as a BOS; where there is nothing, the first token's
               surprisal is the mean of the others'
    window     most tokens in sight; the first ones and the latest stay, when a text is longer
    """

    model: nn.Module
    ids: Tensor
    valid: Tensor
    part: Tensor
    question: Sequence[Sequence[int]] = ()
    promise: Sequence[int] = ()
    start: Sequence[int] = ()
    window: int = 1 << 30

    @cached_property
    def surprisal(self) -> Tensor:
        return self._through(asked=False)

    @cached_property
    def asked(self) -> Tensor:
        return self._through(asked=True)

    def _through(self, *, asked: bool) -> Tensor:
        walk, read = self.walk(self.valid, asked=asked), []
        for stop in range(CHUNK, self.ids.shape[1] + CHUNK, CHUNK):
            read.append(walk.read(stop := min(stop, self.ids.shape[1])))
            walk.keep(self.valid[:, stop - read[-1].shape[1] : stop])
        return torch.cat(read, 1)

    @cached_property
    def relevance(self) -> Tensor:
        self._questions()
        parts = int(torch.where(self.part == BEHIND, -1, self.part).amax()) + 1
        score = torch.full((len(self.ids), parts), float("nan"), device=self.ids.device)
        for row in range(len(self.ids)):
            asked = [*self.question[row], *self.promise]
            for part in range(parts):
                mine = self.ids[row, (self.part[row] == part) & self.valid[row]].tolist()
                if mine:
                    mine = mine[-max(1, self.window - len(asked) - len(self.start)) :]
                    score[row, part] = -self._behind([*self.start, *mine], asked)
        return score

    def _behind(self, text: list[int], asked: list[int]) -> Tensor:
        """The mean surprisal of what is asked, behind a text."""
        ids = torch.tensor([[*text, *asked]], device=self.ids.device)
        logits = _logits(self.model, ids, last=len(asked) + 1)[:, :-1]
        return _nats(logits, ids[:, -len(asked) :]).mean()

    def _questions(self) -> None:
        if not self.question or not all(self.question):
            raise SignalError("this method asks what is wanted of a text: give question=")

    @property
    def wanted(self) -> Tensor:
        raise SignalError(
            f"{type(self.model).__name__} is a language model; this method takes an encoder that was trained to say "
            "which words stay (AutoModelForTokenClassification with two labels), see `fewer train compressor`"
        )

    def apart(self, group: Tensor) -> Tensor:
        group = numbered(group)
        found = torch.full(self.ids.shape, float("nan"), device=self.ids.device)
        pieces = []
        for row in range(len(self.ids)):
            for number in group[row, self.valid[row]].unique().tolist():
                where = ((group[row] == number) & self.valid[row]).nonzero()[:, 0]
                pieces += [(row, part) for part in where.split(max(1, self.window - len(self.start)))]
        pieces.sort(key=lambda piece: len(piece[1]))  # of like lengths, so that little is padding
        for first in range(0, len(pieces), LENT):
            some = pieces[first : first + LENT]
            longest = max(len(where) for _, where in some)
            ids = self.ids.new_zeros(len(some), longest)
            there = torch.zeros_like(ids, dtype=torch.bool)
            for i, (row, where) in enumerate(some):
                ids[i, : len(where)], there[i, : len(where)] = self.ids[row, where], True
            own = LanguageReader(self.model, ids, there, torch.zeros_like(ids), start=self.start, window=self.window)
            for i, (row, where) in enumerate(some):
                found[row, where] = own.surprisal[i, : len(where)]
        return found

    def walk(self, among: Tensor, *, asked: bool = False) -> LanguageWalk:
        if asked:
            self._questions()
        return LanguageWalk(self, among & self.valid, self.question if asked else ())


class LanguageWalk:
    """On the way: what stays of what was read is in a cache, but for the latest, which are read once more.

    Rows of the latest segment have seen those that leave it; they are cut off the cache, and what stays is read again,
    in one pass with the next segment, whose logits alone are computed.
    """

    def __init__(self, reader: LanguageReader, among: Tensor, question: Sequence[Sequence[int]]) -> None:
        self.reader, self.among, self.at = reader, among, 0
        b, device = len(among), among.device
        fronts = [[*reader.start, *(question[i] if question else ())] for i in range(b)]
        self._pending, self._there = _leftwards(fronts, device)
        self._cache: DynamicCache | None = _fresh_cache(reader.model)
        self._held = torch.zeros(b, 0, dtype=torch.bool, device=device)  # rows of the cache that are real
        self._count = torch.zeros(b, dtype=torch.long, device=device)  # of these, by text
        self._behind: Tensor | None = None  # (B, V), logits behind the last token that stays
        self._kept = [list(front) for front in fronts]
        self._read: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def read(self, stop: int) -> Tensor:
        reader, inside = self.reader, slice(self.at, stop)
        ids, there = reader.ids[:, inside], self.among[:, inside]
        order = (~there).to(torch.int8).argsort(dim=-1, stable=True)[:, : int(there.sum(-1).amax())]
        ids, real = ids.gather(1, order), there.gather(1, order)
        found = torch.full(there.shape, float("nan"), device=ids.device)
        self._read = ids, order
        self.at = stop
        if not ids.shape[1]:
            return found
        self._slide(ids.shape[1])
        nats = _nats(self._pass(ids, real), ids).masked_fill(~real, float("nan"))
        if self._behind is None:  # nothing stands before the first token
            nats[:, 0] = nats[:, 1:].nanmean(-1).nan_to_num(0.0)
        return found.scatter(1, order, nats)

    def _pass(self, ids: Tensor, real: Tensor) -> Tensor:
        """(B, n, V): logits for each of the new tokens, at the row before it."""
        w, n = self._pending.shape[1], ids.shape[1]
        rows, mask = torch.cat([self._pending, ids], 1), torch.cat([self._there, real], 1)
        whole = torch.cat([self._held, mask], 1)
        logits = _logits(
            self.reader.model, rows, mask=whole, cache=self._cache, last=n + (w > 0),
            places=self._count[:, None] + mask.long().cumsum(-1) - 1,
        )  # fmt: skip
        if w:
            fresh = logits[:, 0]
            self._behind = (
                fresh if self._behind is None else torch.where(self._there.any(-1)[:, None], fresh, self._behind)
            )
            logits = logits[:, 1:]
        if self._cache is not None:  # of the rows just read those of the segment go again
            held = self._held.shape[1] + w
            self._cache.crop(-n)
            self._held, self._count = whole[:, :held], self._count + self._there.sum(-1)
            self._pending, self._there = self._pending[:, :0], self._there[:, :0]
        first = torch.zeros_like(logits[:, :1]) if self._behind is None else self._behind[:, None]
        return torch.cat([first, logits[:, :-1]], 1)

    def keep(self, stays: Tensor) -> None:
        assert self._read is not None
        ids, order = self._read
        new = [row[mine].tolist() for row, mine in zip(ids, stays.gather(1, order), strict=True)]
        self._kept = [[*kept, *more] for kept, more in zip(self._kept, new, strict=True)]
        self._pending, self._there = _leftwards(self._kept if self._cache is None else new, ids.device)

    def _slide(self, coming: int) -> None:
        """Start again with the first tokens and the latest, where the window would overflow."""
        window = self.reader.window
        most = max(len(kept) for kept in self._kept)
        if most + coming <= window:
            return
        room = max(1, (window - coming) // 2)
        if coming >= window:
            raise SignalError(
                f"a segment of {coming} tokens fills the window of {window}: choose a smaller segment, or a model with "
                "a longer context"
            )
        first = min(FIRST, room // 2)
        self._kept = [k if len(k) <= room else [*k[:first], *k[len(k) - (room - first) :]] for k in self._kept]
        self._pending, self._there = _leftwards(self._kept, self.among.device)
        self._cache = None if self._cache is None else _fresh_cache(self.reader.model)
        self._held, self._count = self._held[:, :0], torch.zeros_like(self._count)


@dataclass(eq=False)
class WordReader:
    """An encoder with a head of two labels, leave and stay, that reads texts in pieces.

    model   AutoModelForTokenClassification with labels 0 = leaves, 1 = stays. ids, valid: (B, N), see `LanguageReader`.
    front, behind   what the encoder wants around a piece, such as [CLS] and [SEP]
    sentence  (B, N) long: pieces end where a sentence does, if they can. window: tokens of a piece, those around
              included.
    """

    model: nn.Module
    ids: Tensor
    valid: Tensor
    sentence: Tensor
    front: Sequence[int] = ()
    behind: Sequence[int] = ()
    window: int = 512

    @cached_property
    @torch.no_grad()
    def wanted(self) -> Tensor:
        found = torch.full(self.ids.shape, float("nan"), device=self.ids.device)
        pieces = [(row, start, stop) for row in range(len(self.ids)) for start, stop in self._pieces(row)]
        pieces.sort(key=lambda piece: piece[2] - piece[1])
        for first in range(0, len(pieces), LENT):
            some = pieces[first : first + LENT]
            texts = [[*self.front, *self.ids[r, a:b].tolist(), *self.behind] for r, a, b in some]
            longest = max(map(len, texts))
            ids = torch.tensor([t + [0] * (longest - len(t)) for t in texts], device=self.ids.device)
            mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts], device=self.ids.device)
            wanted = self.model(input_ids=ids, attention_mask=mask).logits.float().softmax(-1)[..., 1]
            for i, (row, start, stop) in enumerate(some):
                found[row, start:stop] = wanted[i, len(self.front) : len(self.front) + stop - start]
        return found

    def _pieces(self, row: int) -> list[tuple[int, int]]:
        """Runs of tokens as long as the window allows, each to the end of a sentence where one ends in it."""
        n, room = int(self.valid[row].sum()), self.window - len(self.front) - len(self.behind)
        ends = (self.sentence[row, :n].diff() != 0).nonzero()[:, 0].add(1).tolist()
        found, start = [], 0
        while start < n:
            stop = min(start + room, n)
            if stop < n:
                stop = max((e for e in ends if start < e <= stop), default=stop)
            found.append((start, stop))
            start = stop
        return found

    def _none(self) -> Any:
        raise SignalError(
            f"{type(self.model).__name__} says which words stay, and has no probabilities of a text; this method takes "
            "a causal language model"
        )

    @property
    def surprisal(self) -> Tensor:
        return self._none()

    @property
    def asked(self) -> Tensor:
        return self._none()

    @property
    def relevance(self) -> Tensor:
        return self._none()

    def apart(self, group: Tensor) -> Tensor:
        return self._none()

    def walk(self, among: Tensor, *, asked: bool = False) -> LanguageWalk:
        return self._none()


def _leftwards(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, w) long and (B, w) bool: texts of different lengths, padding in front."""
    longest = max(map(len, texts))
    ids = [[0] * (longest - len(t)) + list(t) for t in texts]
    there = [[False] * (longest - len(t)) + [True] * len(t) for t in texts]
    shape = (len(texts), longest)
    return (
        torch.tensor(ids, dtype=torch.long, device=device).view(shape),
        torch.tensor(there, dtype=torch.bool, device=device).view(shape),
    )


def _fresh_cache(model: nn.Module) -> DynamicCache | None:
    """A cache whose rows can be cut off again; None for a model that keeps a state instead, or no cache."""
    name = cache_argument(model.forward)
    config: Any = getattr(model, "config", None)
    if name is None or name == "cache_params" or config is None:
        return None
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    own = DynamicCache(config=config)
    whole = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in own.layers)
    return DynamicCache() if whole else None


def _logits(
    model: nn.Module, ids: Tensor, *, last: int, mask: Tensor | None = None, cache: DynamicCache | None = None,
    places: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(B, last, V): of the last rows. Padding is masked only where there is some, so that fused attention stays."""
    known = inspect.signature(type(model).forward).parameters
    given: dict[str, Any] = {"use_cache": cache is not None}
    if cache is not None:
        given |= cached(model, cache)
    if mask is not None and not bool(mask.all()):
        given["attention_mask"] = mask.long()
        if places is not None and "position_ids" in known:
            given["position_ids"] = places.clamp(min=0)
    if "logits_to_keep" in known:
        given["logits_to_keep"] = last
    with torch.no_grad():
        return model(input_ids=ids, **given).logits[:, -last:].float()


def _nats(logits: Tensor, ids: Tensor) -> Tensor:
    """(B, n) float32: -log p of each token. logits: (B, n, V)."""
    return logits.logsumexp(-1) - logits.gather(-1, ids[..., None])[..., 0]
