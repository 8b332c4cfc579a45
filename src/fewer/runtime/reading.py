"""Who reads a text before it is cut: a causal language model, or an encoder that says which words it wants."""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..compat import cache_argument, cached
from ..core.errors import SignalError
from ..core.written import BEHIND, numbered

UNLIMITED = 1 << 30
CHUNK = 512  # tokens whose logits are there at once
FIRST = 10  # tokens of the text that stay in sight when the window slides
ROWS = 4096  # tokens, padding included, that groups read side by side have


@dataclass(eq=False)
class LanguageReader:
    """A causal language model and the tokens it reads.

    model      any that gives logits; with a cache that can be cut, each token is read once, and what stays of a segment
               behind the first token that leaves it once more
    ids        (B, N) long; valid: (B, N) bool, padding behind; part: (B, N), see `Written`
    question   per text, what is asked about it, () where nothing is. joint: what stands between it and the text
    promise    what follows a question where documents are ranked: that the answer is in them
    start      what every text begins with for the model, such as a BOS; where there is nothing, the first token's
               surprisal is the mean of the others'
    window     most tokens in sight; the first ones and the latest stay, when a text is longer
    ranked     what was found out about questions behind texts, by both, for other readers with the same model
    """

    model: nn.Module
    ids: Tensor
    valid: Tensor
    part: Tensor
    question: Sequence[Sequence[int]] = ()
    joint: Sequence[int] = ()
    promise: Sequence[int] = ()
    start: Sequence[int] = ()
    window: int = UNLIMITED
    ranked: MutableMapping[Any, float] = field(default_factory=dict, repr=False)

    @cached_property
    def surprisal(self) -> Tensor:
        return self._through(self.valid, asked=False)

    @cached_property
    def asked(self) -> Tensor:
        return self._through(self.valid, asked=True)

    def _through(self, among: Tensor, *, asked: bool) -> Tensor:
        walk, found = self.walk(asked=asked), torch.full(self.ids.shape, float("nan"), device=self.ids.device)
        chunk = among.long().cumsum(-1).sub(1).div(CHUNK, rounding_mode="floor").masked_fill(~among, -1)
        for turn in range(int(chunk.amax()) + 1):
            found = torch.where(chunk == turn, walk.read(chunk == turn), found)
            walk.keep(chunk == turn)
        return found

    @cached_property
    def relevance(self) -> Tensor:
        self._questions()
        parts = int(torch.where(self.part == BEHIND, -1, self.part).amax()) + 1
        score = torch.full((len(self.ids), parts), float("nan"), device=self.ids.device)
        for row in range(len(self.ids)):
            asked = [*self.question[row], *self.promise]
            room = self.window - len(asked) - len(self.start)
            if room < 1:
                raise SignalError(f"a question of {len(asked)} tokens leaves no room in the window of {self.window}")
            for part in range(parts):
                mine = self.ids[row, (self.part[row] == part) & self.valid[row]].tolist()
                if mine:
                    key = (*self.start, *mine[-room:]), tuple(asked)
                    if key not in self.ranked:
                        self.ranked[key] = float(self._behind([*key[0]], asked))
                    score[row, part] = -self.ranked[key]
        return score

    def _behind(self, text: list[int], asked: list[int]) -> Tensor:
        """The mean surprisal of what is asked, behind a text."""
        ids = torch.tensor([[*text, *asked]], device=self.ids.device)
        logits = _logits(self.model, ids, last=len(asked) + 1)[:, :-1]
        return _nats(logits, ids[:, -len(asked) :]).mean()

    def _questions(self) -> None:
        if not self.question or not all(self.question):
            raise SignalError("this method asks what is wanted of a text: give question= to fewer.Compressor's call")

    @property
    def wanted(self) -> Tensor:
        raise SignalError(
            f"{type(self.model).__name__} is a language model; this method takes an encoder that was trained to say "
            "which words stay (AutoModelForTokenClassification with two labels)"
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
        for some in _batches(pieces, [len(where) for _, where in pieces]):
            longest = max(len(where) for _, where in some)
            ids = self.ids.new_zeros(len(some), longest)
            there = torch.zeros_like(ids, dtype=torch.bool)
            for i, (row, where) in enumerate(some):
                ids[i, : len(where)], there[i, : len(where)] = self.ids[row, where], True
            own = LanguageReader(self.model, ids, there, torch.zeros_like(ids), start=self.start, window=self.window)
            for i, (row, where) in enumerate(some):
                found[row, where] = own.surprisal[i, : len(where)]
        return found

    def walk(self, place: Tensor | None = None, *, asked: bool = False) -> LanguageWalk | Single:
        if asked:
            self._questions()
        question = [[*one, *self.joint] for one in self.question] if asked else [()] * len(self.ids)
        fronts = [[*self.start, *one] for one in question]
        place = torch.zeros_like(self.ids) if place is None else place

        def one(rows: slice) -> LanguageWalk:
            return LanguageWalk(self.model, self.ids[rows], self.valid[rows], place[rows], fronts[rows], self.window)

        if len(self.ids) > 1 and not _side_by_side(self.model):
            return Single([one(slice(row, row + 1)) for row in range(len(self.ids))])
        return one(slice(None))


class LanguageWalk:
    """On the way: what stays of what was read is in a cache, as far as nothing in front of it has left.

    Rows behind a token that leaves have seen it; they are cut off the cache, and what stays of them is read again, in
    one pass with the next segment, whose logits alone are computed.
    """

    def __init__(
        self, model: nn.Module, ids: Tensor, valid: Tensor, place: Tensor, fronts: Sequence[Sequence[int]], window: int
    ) -> None:
        self.model, self.ids, self.valid, self.place, self.window = model, ids, valid, place, window
        self._first = [len(front) + FIRST for front in fronts]
        self._kept = [list(front) for front in fronts]  # all that stays
        self._pending, self._there = _leftwards(self._kept, ids.device)  # what of it is to be read again
        self._fresh()
        self._behind: Tensor | None = None  # (B, V), logits behind the last token that stays
        self._read: tuple[Tensor, Tensor] | None = None  # (B, n) the columns just read, and which are no padding

    def _fresh(self) -> None:
        b, device = len(self.ids), self.ids.device
        self._cache = _fresh_cache(self.model)
        self._held = torch.zeros(b, 0, dtype=torch.bool, device=device)  # rows of the cache that are real
        self._count = torch.zeros(b, dtype=torch.long, device=device)  # of these, by text

    @torch.no_grad()
    def read(self, these: Tensor) -> Tensor:
        these = these & self.valid
        key = self.place.masked_fill(~these, torch.iinfo(torch.long).max)
        order = key.argsort(dim=-1, stable=True)[:, : int(these.sum(-1).amax())]
        ids, real = self.ids.gather(1, order), these.gather(1, order)
        found = torch.full(these.shape, float("nan"), device=ids.device)
        self._read = order, real
        if not ids.shape[1]:
            return found
        self._slide(ids.shape[1])
        nats = self._pass(ids, real).masked_fill(~real, float("nan"))
        if self._behind is None:  # nothing stands before the first token
            nats[:, 0] = nats[:, 1:].nanmean(-1).nan_to_num(0.0)
        return found.scatter(1, order, nats)

    def _pass(self, ids: Tensor, real: Tensor) -> Tensor:
        """(B, n): surprisal of the new tokens, by the logits at the row before each."""
        w, n = self._pending.shape[1], ids.shape[1]
        rows, mask = torch.cat([self._pending, ids], 1), torch.cat([self._there, real], 1)
        self._held = torch.cat([self._held, mask], 1)
        logits = _logits(
            self.model, rows, mask=self._held, cache=self._cache, last=n + (w > 0),
            places=self._count[:, None] + mask.long().cumsum(-1) - 1,
        )  # fmt: skip
        self._count = self._count + mask.sum(-1)
        if w:
            fresh, known = logits[:, 0], self._behind
            self._behind = fresh if known is None else torch.where(self._there[:, -1:], fresh, known)
            logits = logits[:, 1:]
        first = torch.zeros_like(logits[:, 0]) if self._behind is None else self._behind
        return torch.cat([_nats(first[:, None], ids[:, :1]), _nats(logits[:, :-1], ids[:, 1:])], 1)

    def keep(self, stays: Tensor) -> None:
        assert self._read is not None, "keep() follows read()"
        (order, real), self._read = self._read, None
        n = order.shape[1]
        if not n:
            return
        stays = stays.gather(1, order) & real
        ids = self.ids.gather(1, order)
        new = [row[mine].tolist() for row, mine in zip(ids, stays, strict=True)]
        self._kept = [[*kept, *more] for kept, more in zip(self._kept, new, strict=True)]
        if self._cache is None:
            self._pending, self._there = _leftwards(self._kept, ids.device)
            self._held, self._count = self._held[:, :0], torch.zeros_like(self._count)
            return
        whole = _whole(stays, real)
        self._cache.crop(whole - n)
        self._held, self._count = self._held[:, : whole - n], self._count - real[:, whole:].sum(-1)
        done = stays[:, :whole].sum(-1).tolist()
        self._pending, self._there = _leftwards([row[k:] for row, k in zip(new, done, strict=True)], ids.device)

    def _slide(self, coming: int) -> None:
        """Start again with the first tokens and the latest, where the window would overflow."""
        if max(map(len, self._kept)) + coming <= self.window:
            return
        if coming >= self.window:
            raise SignalError(
                f"a segment of {coming} tokens fills the window of {self.window}: choose a smaller segment, or a model "
                "with a longer context"
            )
        room = max(1, (self.window - coming) // 2)
        for i, kept in enumerate(self._kept):
            if len(kept) > room:
                first = min(self._first[i], room)
                self._kept[i] = [*kept[:first], *kept[len(kept) - (room - first) :]]
        self._pending, self._there = _leftwards(self._kept, self.ids.device)
        self._fresh()


class Single:
    """Texts on their way one by one: for models in which padding, or what has left, would count."""

    def __init__(self, walks: Sequence[LanguageWalk]) -> None:
        self.walks = walks

    def read(self, these: Tensor) -> Tensor:
        return torch.cat([walk.read(these[i : i + 1]) for i, walk in enumerate(self.walks)])

    def keep(self, stays: Tensor) -> None:
        for i, walk in enumerate(self.walks):
            walk.keep(stays[i : i + 1])


class Wordless:
    """A reader that says what stays, and has no probabilities of a text: what asks for them needs another."""

    model: nn.Module
    says: ClassVar[str] = "which words stay"

    def _none(self) -> Any:
        raise SignalError(
            f"{type(self.model).__name__} says {self.says}, and has no probabilities of a text; this method takes a "
            "causal language model"
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

    def walk(self, place: Tensor | None = None, *, asked: bool = False) -> LanguageWalk:
        return self._none()


@dataclass(eq=False)
class WordReader(Wordless):
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
        for some in _batches(pieces, [stop - start for _, start, stop in pieces]):
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


@torch.no_grad()
def reads_words(model: nn.Module) -> bool:
    """Whether a model says of each token if it stays (`WordReader`), or else what comes next (`LanguageReader`).

    Two short texts that differ in their last token tell. Raises SignalError for a model that does neither.
    """
    name, device = type(model).__name__, next(model.parameters()).device
    try:
        logits = model(input_ids=torch.tensor([[1, 2], [1, 3]], device=device)).logits
    except Exception as error:  # whatever a model of another kind says to this
        raise SignalError(f"{name} does not read a text by itself: {_TAKES} ({error})") from error
    if logits.ndim != 3 or logits.shape[1] != 2:
        raise SignalError(f"{name} says nothing about each token: {_TAKES}")
    if logits.shape[-1] == 2:
        return True
    first, second = logits[:, 0].float()
    if not torch.allclose(first, second, atol=1e-2 * float(first.abs().max()), rtol=0):
        raise SignalError(f"{name} sees what comes behind a token, and gives no probability of a text: {_TAKES}")
    return False


_TAKES = (
    "give a causal language model (AutoModelForCausalLM), or an encoder with two labels "
    "(AutoModelForTokenClassification)"
)


def window_of(model: nn.Module) -> int:
    """Tokens a model has positions for; very many where it does not count them."""
    config: Any = getattr(model, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(inner, "max_position_embeddings", None) or UNLIMITED)


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


def _whole(stays: Tensor, real: Tensor) -> int:
    """Columns of what was read that no text reads again; of each text the last token that stays is, so that its logits
    come again. stays, real: (B, n) bool."""
    n = stays.shape[1]
    column = torch.arange(n, device=stays.device)
    gone = torch.where(real & ~stays, column, n).amin(-1)
    last = torch.where(stays, column, -1).amax(-1).clamp(min=0)
    return int(torch.where(real.any(-1), torch.minimum(gone, last), n - 1).amin())


def _layers(model: nn.Module) -> list[type] | None:
    """What the layers of a model's cache are; None for a model that has no cache with a row per token."""
    config: Any = getattr(model, "config", None)
    if config is None or cache_argument(model.forward) in (None, "cache_params"):
        return None
    return [type(layer) for layer in DynamicCache(config=config).layers]


def _fresh_cache(model: nn.Module) -> DynamicCache | None:
    """A cache whose rows can be cut off again; None for a model that keeps a state instead, or no cache."""
    layers = _layers(model)
    if layers is None or not {*layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    return DynamicCache()  # without the config: all rows stay, also those that a window hides


def _side_by_side(model: nn.Module) -> bool:
    """Whether texts of different lengths can be read in one pass: nothing but masks tells padding."""
    layers = _layers(model)
    return layers is not None and {*layers} <= {DynamicLayer}


def _batches(items: Sequence[Any], lengths: Sequence[int]) -> list[Sequence[Any]]:
    """Items in turn, side by side as many as ROWS tokens, padding included, allow. lengths: ascending."""
    found, first = [], 0
    while first < len(items):
        stop = first + 1
        while stop < len(items) and lengths[stop] * (stop + 1 - first) <= ROWS:
            stop += 1
        found.append(items[first:stop])
        first = stop
    return found


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
    total = [row.logsumexp(-1) for row in logits.split(1, 1)]  # one by one they stay in a CPU's cache
    return torch.cat([logits.new_zeros(len(ids), 0), *total], 1) - logits.gather(-1, ids[..., None])[..., 0]


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts in front of a text and behind it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:at], whole[at + len(plain) :]
