"""The input text: words leave before the model reads them."""

from __future__ import annotations

import inspect
import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ...compat import given_cache, pretrained
from ...core import Hard, Plan, Signals, Site, Tokens
from ...core.attention import full_precision
from ...core.place import Place
from ...spec import text
from ..program import Bound, SessionError
from ..trace import Step, Trace

BESIDE = ("attention_mask", "position_ids", "token_type_ids", "labels")  # arguments with an entry per token


class TextSite:
    """Methods are shown the embedded tokens of a prompt, and the model is given those that stay.

    Tokens keep their position ids. A prompt that goes on in a cache must come with it, as `generate()` has it: later
    passes are told by it which words of the mask are gone.
    """

    title = "input text"

    def __init__(self, bound: Bound) -> None:
        self.bound, self.host, self.program = bound, bound.host, bound.program
        self.trace: Trace | None = None
        self._names = list(inspect.signature(type(bound.model).forward).parameters)[1:]
        #: By cache: how many tokens came, and (B, M) bool, which rows of those it was given are no padding.
        self._read: weakref.WeakKeyDictionary[Any, tuple[int, Tensor]] = weakref.WeakKeyDictionary()

    def attach(self, undo: ExitStack) -> None:
        undo.callback(self.bound.model.register_forward_pre_hook(self._enter, with_kwargs=True).remove)

    def _enter(self, _model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ids, cache, mask = given.get("input_ids"), given_cache(given), given.get("attention_mask")
        if ids is None:
            raise SessionError(
                f"{text(self.program.methods[0])} acts on the input text, and the model was called without input_ids"
            )
        if cache is not None and cache.get_seq_length():
            if mask is None or (read := self._read.get(cache)) is None:
                return None
            came, filled = read
            given["attention_mask"] = torch.cat([filled.to(mask.dtype), mask[:, came:]], 1)
            return (), given
        valid = None if mask is None or bool((mask != 0).all()) else mask != 0
        index, real = self._kept(ids, valid)
        if index.shape[1] == ids.shape[1]:
            return None
        places = torch.arange(ids.shape[1], device=ids.device)[None] if valid is None else valid.cumsum(-1) - 1
        given["position_ids"] = given.get("position_ids", places.clamp(min=0).expand(len(ids), -1))
        for name in ("input_ids", *BESIDE):
            if (value := given.get(name)) is not None:
                given[name] = value.expand(len(ids), -1).gather(1, index)
        if real is not None:
            given["attention_mask"] = real.to(torch.long)
        if cache is not None:
            self._read[cache] = ids.shape[1], torch.ones_like(index) if real is None else real
        return (), given

    def _kept(self, ids: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, M) long: the tokens that stay, padding in front; and (B, M) bool, which are none, or None."""
        host, (b, n) = self.host, ids.shape
        x = pretrained(self.bound.model).get_input_embeddings()(ids)
        first = Tokens.plain(b, n, 0 if host.kind == "decoder" else host.prefix, device=ids.device, valid=valid)
        first = tokens = host.opening(first) if host.kind == "text" else first.protect(first.last)
        trace = self.trace = Trace(host, first, len(self.program.methods), x.element_size(), None)
        if valid is not None:
            front = Plan.keep((~valid).to(torch.int8).argsort(dim=-1, stable=True), n, valid.sum(-1))
            trace.steps.append(Step(-1, -1, front))
            x, tokens = front.gather(x), tokens.after(front)
        starts = None if valid is None else valid.sum(-1) - n + first.free_count
        for turn in self.program.at(Site.TEXT, 0):
            method = self.program.methods[turn.method]
            place = Place(0, 1, 0, 1, first.free_count, note=trace.notes.append, starts=starts)
            signals = Signals(
                x, tokens, place, modules=self.bound.modules_of(turn.method, 0), training=self.bound.training,
                memory=trace.memory[turn.method], prefix=first.prefix,
            )  # fmt: skip
            with full_precision(x):
                plan = method.plan(signals, tokens)
            if not isinstance(plan, Hard) or plan.averages:
                raise SessionError(f"{text(method)} makes rows that are no words; choose a method that only prunes")
            trace.steps.append(Step(-1, turn.method, plan))
            x, tokens = plan.gather(x), tokens.after(plan)
        trace.tokens = tokens
        lengths = None if tokens.valid is None else tokens.valid.sum(-1)
        for block in trace.blocks:
            block.rows, block.lengths, block.computed = [tokens.n] * 3, [lengths] * 3, [[tokens.n]] * 3
        if tokens.valid is None:
            return tokens.place(), None
        behind = tokens.valid.to(torch.int8).argsort(dim=-1, stable=True)  # padding in front, as decoders want it
        return tokens.place().gather(1, behind), tokens.valid.gather(1, behind)
