"""Rows that nobody wrote: PEFT's prompt tuning puts learned ones in front of every text, prefix tuning puts them into
its KV cache. Whatever a method says, they stay, and no budget counts them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any

from torch import nn

from ..adapters.kvpress import Pressed
from ..compat import virtual_tokens
from ..core import Reducer, Site
from ..core.cache import CacheReducer, Rereader
from ..hosts import DecoderHost, Host, VisionLanguageHost
from ..spec import text
from .program import SessionError

ASKED = "get_prompt"  # what PEFT asks for its rows, right before it hands them to the model


class LearnedRows:
    """The learned rows of a model that PEFT wraps.

    count: rows in front of each text; cached: whether they come as keys and values, in a cache.
    """

    def __init__(self, model: nn.Module, count: int, cached: bool) -> None:
        self.model, self.count, self.cached = model, count, cached
        self._local = threading.local()

    @classmethod
    def of(cls, model: nn.Module) -> LearnedRows | None:
        """Those of a model; None where it has none."""
        count = virtual_tokens(model)
        if not count:
            return None
        kind = getattr(model.active_peft_config, "peft_type", "")
        return cls(model, count, str(getattr(kind, "value", kind)) in ("PREFIX_TUNING", "CARTRIDGE"))

    def check(self, host: Host, methods: Sequence[Reducer]) -> None:
        """Raises SessionError where a method, or a model, cannot be told of them."""
        name, way = type(self.model).__name__, "apply the method to model.get_base_model() and call that"
        told = f"{name} puts {self.count} learned rows in front of every input (prefix or prompt tuning)"
        if isinstance(host, VisionLanguageHost):
            raise SessionError(f"{told}, which cannot be told from rows of pictures; tune with LoRA instead, or {way}")
        if self.cached and not isinstance(host, DecoderHost) and host.reader is None:
            raise SessionError(
                f"{told}, as keys that the blocks of an encoder have no tokens for; use prompt tuning or LoRA, or {way}"
            )
        for method in methods:
            if why := self._against(method):
                raise SessionError(f"{told}; {text(method)} {why}, or {way}")

    def _against(self, method: Reducer) -> str:
        """What a method does that would not leave them alone, and what else to do; empty where it does not."""
        if not (method.site.in_blocks or method.site is Site.KV_CACHE):
            return "does not act in the blocks or the KV cache, where these rows are protected; tune with LoRA instead"
        if not isinstance(method, CacheReducer):
            return ""
        if isinstance(method, Rereader):
            return "has the prompt read again, without these rows; use a method that reads it once"
        if isinstance(method, Pressed):
            return "evicts by itself, these rows as well; use a method of fewer"
        if method.travelling:
            return "moves rows to other positions, where learned ones have none; pass positions='original'"
        return ""

    def attach(self, undo: ExitStack) -> None:
        """Hear of the rows when PEFT asks for them, until `undo` closes."""
        own: Callable[..., Any] = getattr(self.model, ASKED)

        @wraps(own)
        def asked(*args: Any, **kwargs: Any) -> Any:
            self._local.coming = True
            return own(*args, **kwargs)

        vars(self.model)[ASKED] = asked
        undo.callback(vars(self.model).pop, ASKED, None)

    def arriving(self) -> bool:
        """Whether the pass that starts now was given them. They are given once."""
        coming = getattr(self._local, "coming", False)
        self._local.coming = False
        return coming

    def in_front(self) -> int:
        """How many stand in front of the tokens of a pass that starts now, of a model without a cache."""
        return self.count if self.arriving() and not self.cached else 0

    def in_pass(self, held: int | None) -> tuple[int, int]:
        """The same of a decoder that starts with `held` rows in its cache (None: it has no cache): how many of the
        pass's tokens, and how many of the cache's rows, then and behind it, are learned.

        Raises   SessionError where PEFT's rows did not come to where they belong.
        """
        if not self.arriving():
            return 0, 0
        if held is not None and held == (self.count if self.cached else 0):
            return (0 if self.cached else self.count), self.count
        if held is None and not self.cached:
            return self.count, 0
        raise SessionError(
            f"PEFT hands its {self.count} learned rows to a model whose cache holds {held or 0} already: this release "
            "of PEFT does not know where this one of transformers keeps its cache, so that generate() would repeat or "
            "lose them, with or without a method; use releases that fit (transformers 5.23 does), or call the model "
            "without generate()"
        )
