"""A language model that reads contexts and is asked about them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fewer.compat import cached, pretrained
from fewer.evaluation.subject import twin_of
from fewer.runtime.program import SessionError

from .tasks import Context, Ids, Outcome, Probe, judge


class LeftOutError(RuntimeError):
    """Scores were asked for at rows that a method had left out on the way: they foretell nothing."""


@dataclass
class Held:
    """What a cache holds: rows of each layer, mean over samples and heads; bytes of keys and values; tokens seen."""

    rows: list[float]
    bytes: int
    seen: int

    @classmethod
    def of(cls, cache: DynamicCache) -> Held:
        rows, size, seen = [], 0, 0
        layers: list[Any] = cache.layers
        for layer in layers:
            record = getattr(layer, "record", None)
            if record is not None and record.logical:
                rows.append(float(record.stored))
                size += record.bytes
            elif layer.is_initialized:
                rows.append(float(layer.keys.shape[-2]))
                size += sum(x.untyped_storage().nbytes() for x in (layer.keys, layer.values))
            else:
                rows.append(0.0)
            seen = max(seen, layer.get_seq_length())
        return cls(rows, size, seen)


@dataclass(eq=False)
class LanguageSubject:
    """A causal language model on some contexts.

    tokenizer    turns what was written into text again
    tokenwise    whether an answer had to be read token by token since this was last set
    """

    model: nn.Module
    tokenizer: Any
    contexts: Sequence[Context]
    name: str = "model"
    data: str = "texts"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokenwise: bool = False

    @cached_property
    def twin(self) -> nn.Module:
        """The same model a second time, on the same weights: methods go on this one."""
        return twin_of(self.model)

    @property
    def extent(self) -> str:
        """What is measured on, in words."""
        tokens = max(len(context.ids) for context in self.contexts)
        asked = sum(len(context.probes) for context in self.contexts)
        return f"{len(self.contexts)} contexts of up to {tokens:,} tokens from {self.data}, {asked} questions"

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end what is written."""
        settings = getattr(self.model, "generation_config", None)
        stop = getattr(settings, "eos_token_id", None)
        stop = self.tokenizer.eos_token_id if stop is None else stop
        return frozenset(stop if isinstance(stop, (list, tuple)) else () if stop is None else (stop,))

    # -- reading and asking --------------------------------------------------------------------------------------
    def read(self, model: nn.Module, ids: Ids) -> tuple[DynamicCache, Tensor]:
        """A new cache that has read some tokens, and the logits behind the last one, (1, vocabulary)."""
        cache = DynamicCache(config=pretrained(model).config)
        return cache, self.go_on(model, cache, ids, 1)

    def go_on(
        self, model: nn.Module, cache: DynamicCache, ids: Sequence[int], last: int, session: Any = None
    ) -> Tensor:
        """Read more tokens; the logits behind the last few of them, (last, vocabulary). The cache grows.

        session    on the model, if any. Raises LeftOutError where it left out one of these last tokens.
        """
        tokens = torch.tensor([list(ids)], device=self.device)
        logits = model(tokens, **cached(model, cache), use_cache=True, logits_to_keep=last).logits[0, -last:]
        if len(ids) > 1 and (gone := left_out(session, len(ids), last)):
            raise LeftOutError(
                f"{gone} of the last {last} rows were left out on the way: their logits foretell nothing"
            )
        return logits

    def ask(self, model: nn.Module, cache: DynamicCache, behind: Tensor, probe: Probe, session: Any = None) -> Outcome:
        """A probe, asked on a copy of a cache. behind: the logits behind the context, (1, vocabulary).

        Question and answer are read in one pass, so that nothing is evicted between them. Where the session leaves out
        rows inside a pass, the answer is read token by token: a token that is read alone has nobody to give way to.
        """
        logits = []
        for answer in probe.answers:
            found = [] if probe.question else [behind]
            if asked := (*probe.question, *answer[:-1]):
                last = len(answer) - len(found)
                try:
                    found.append(self.go_on(model, copy.deepcopy(cache), asked, last, session))
                except LeftOutError:
                    first, own = len(asked) - last + 1, copy.deepcopy(cache)
                    for ids in (asked[:first], *((token,) for token in asked[first:])):
                        found.append(self.go_on(model, own, ids, 1, session))
                    self.tokenwise = True
            logits.append(torch.cat(found))
        return judge(probe, logits)

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)


def left_out(session: Any, tokens: int, last: int) -> int:
    """How many of the last few tokens of the last pass, of `tokens`, a session dropped on the way; 0 without one, and
    where it acts on the cache alone, which rows leave behind the pass."""
    try:
        origin = None if session is None else session.origin
    except SessionError:
        return 0
    return 0 if origin is None or origin.shape[1] != tokens else int((origin[:, -last:] < 0).sum())
