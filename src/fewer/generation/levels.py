"""Guesses by depth: what the heads, or a pass over a partial cache, say of the places behind a certain token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fewer.compat import cached

from .heads import Chained, Heads, Layers, Read
from .partial import Partial
from .tree import Guess, Kind
from .verifying import SwiftError, Verifier


class Levels:
    """Guesses for the first, second, ... place behind the newest certain token, whatever stands between."""

    drafts = 0

    def before(self, token: int, position: int) -> None:
        """A tree is to grow below a token, which is not in the cache yet."""

    def watching(self, past: int) -> AbstractContextManager[None]:
        """Around the pass that verifies it."""
        return nullcontext()

    def after(self, verifier: Verifier, path: list[int] | None) -> None:
        """The pass is done; path: the nodes that came true. None: it was the prompt's."""

    def guesses(self, depth: int) -> list[Guess]:
        """depth: of the token they are to follow, 0 = the certain one."""
        return []


class OfHeads(Levels):
    """Of heads that look at the pass that verified last. They are asked when a guess is wanted."""

    def __init__(self, model: nn.Module, heads: Heads, read: Read, candidates: int) -> None:
        self.model, self.heads, self.read, self.candidates = model, heads, read, candidates
        with torch.no_grad():
            self.unembedding = heads.unembedding(model)
        self._levels: list[list[Guess]] | None = None

    def after(self, verifier: Verifier, path: list[int] | None) -> None:
        self._levels = None
        self.see(*self.read.take(), path)

    def see(self, x: Tensor, given: Mapping[str, Any], path: list[int] | None) -> None:
        self.x = x[:, -1:] if path is None else x[:, path[-1:]]

    def states(self) -> Tensor:
        """(n, C), of each head behind the newest token."""
        return torch.cat(self.heads(self.x))[:, 0]

    def guesses(self, depth: int) -> list[Guess]:
        if self._levels is None:
            self._levels = listed(self.unembedding(self.states()), self.candidates, "head", 1, self.heads.words)
        return self._levels[depth] if depth < len(self._levels) else []


class OfLayers(OfHeads):
    """Heads that are blocks: each has a cache of its own, of certain tokens only, so nothing is rolled back there."""

    heads: Layers

    def __init__(self, model: nn.Module, heads: Layers, read: Read, candidates: int) -> None:
        from transformers import DynamicCache

        super().__init__(model, heads, read, candidates)
        self.caches = [DynamicCache() for _ in range(heads.count)]
        self.of_block = next(iter(_cache_name(heads.block[0])))

    def see(self, x: Tensor, given: Mapping[str, Any], path: list[int] | None) -> None:
        rows, past = x.shape[1], self.caches[0].get_seq_length()
        if path is not None:
            index = torch.tensor(path, device=x.device)
            x, given = x[:, index], {k: _rows(v, index, rows) for k, v in given.items()}
            if "attention_mask" in given:
                given["attention_mask"] = self._mask(given["attention_mask"], index, past, rows)
        self.x = torch.stack([
            self.heads.state(i, x, {**given, self.of_block: cache})[0, -1] for i, cache in enumerate(self.caches)
        ])  # fmt: skip

    def _mask(self, mask: Tensor | None, index: Tensor, past: int, rows: int) -> Tensor | None:
        """The tree's mask (1, 1, T, S + T), of a path's rows over the cache and themselves."""
        if mask is None:
            return None
        mask = mask[:, :, index]
        return torch.cat([mask[..., : mask.shape[-1] - rows], mask[..., mask.shape[-1] - rows + index]], -1)

    def states(self) -> Tensor:
        return self.x


class OfPartial(Levels):
    """A pass of the model over a partial cache guesses the next token, and heads on it those behind."""

    def __init__(
        self, model: nn.Module, heads: Heads | None, read: Read | None, candidates: int, partial: Partial
    ) -> None:
        self.heads, self.read, self.candidates, self.partial = heads, read, candidates, partial
        self.unembedding = None if heads is None else heads.unembedding(model)
        self._levels: list[list[Guess]] = []

    def before(self, token: int, position: int) -> None:
        logits = self.partial.guess(token, position)
        self._levels = []
        if logits is None:
            return
        self.drafts += 1
        self._levels = listed(logits[None], self.candidates, "draft", 0, None)
        if self.heads is not None and self.read is not None and self.unembedding is not None:
            states = torch.cat(self.heads(self.read.take()[0][:, -1:]))[:, 0]
            self._levels += listed(self.unembedding(states), self.candidates, "head", 1, self.heads.words)

    def watching(self, past: int) -> AbstractContextManager[None]:
        return self.partial.watching(past)

    def after(self, verifier: Verifier, path: list[int] | None) -> None:
        if path is not None:
            self.partial.follow(verifier.cache, len(path))

    def guesses(self, depth: int) -> list[Guess]:
        return self._levels[depth] if depth < len(self._levels) else []


@contextmanager
def levels_of(
    model: nn.Module, heads: Heads | None, budget: int | None, sinks: int, candidates: int
) -> Iterator[Levels]:
    """For one text. Raises SwiftError for blocks as heads beside a partial cache."""
    with ExitStack() as stack:
        if isinstance(heads, Layers) and budget is not None:
            raise SwiftError("heads that are blocks look at every token of the whole text: leave budget= out")
        if budget is not None:
            partial = Partial(model, budget, sinks)  # finds the model's blocks, before anything hooks into them
        read = None if heads is None else stack.enter_context(heads.reading(model))
        if budget is not None:
            yield OfPartial(model, heads, read, candidates, partial)
        elif isinstance(heads, Layers) and read is not None:
            yield OfLayers(model, heads, read, candidates)
        elif isinstance(heads, Chained) and read is not None:
            yield OfHeads(model, heads, read, candidates)
        else:
            yield Levels()


def listed(logits: Tensor, candidates: int, source: str, first: int, words: Tensor | None) -> list[list[Guess]]:
    """The likeliest tokens of each level. logits: (n, W), the first level's number is `first`."""
    chance, place = logits.float().softmax(-1).topk(min(candidates, logits.shape[-1]), dim=-1)
    tokens = place if words is None else words[place]

    def kind(level: int, p: float) -> Kind:
        return (f"{source} {first + level}" if first else source, int(8 * p))

    return [
        [Guess(token, p, kind(level, p)) for token, p in zip(*pair, strict=True)]
        for level, pair in enumerate(zip(tokens.tolist(), chance.tolist(), strict=True))
    ]


def _rows(value: Any, index: Tensor, rows: int) -> Any:
    """Of what a block is given per row, (1, T, ...), some rows; all else as it is."""
    if isinstance(value, tuple):
        return tuple(_rows(each, index, rows) for each in value)
    per_row = isinstance(value, Tensor) and value.dim() in (2, 3) and value.shape[1] == rows
    return value[:, index] if per_row else value


def _cache_name(block: nn.Module) -> dict[str, Any]:
    return cached(block, None)
