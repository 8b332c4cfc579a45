"""A prompt is read a second time, behind itself, for methods that rank its rows by what the repetition attends to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...compat import cached, pretrained
from ...core import Site
from ...core.attention import full_precision
from ...core.cache import Rereader, Rows
from ...hosts.decoder import Calls
from ..kv.state import Access
from ..program import SessionError
from .cache_run import LayerCall

if TYPE_CHECKING:
    from .cache_run import CacheRun


class RepeatedRun:
    """One pass over a part of the prompt, once more. Takes part in attention; nothing is evicted in it."""

    def __init__(self, run: CacheRun, which: int, rows: Rows, part: tuple[int, int], asking: Tensor | None) -> None:
        self.run, self.which, self.rows, self.part, self.asking = run, which, rows, part, asking
        self.calls = Calls(run.host)
        self.votes: list[Tensor] = []  # of each layer where the method acts, (B, G, chunk)
        for layer in run.layers:
            layer.access = Access()

    def attend(self, module: nn.Module, plain: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
               kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        run = self.run
        read = self.calls.next(module)
        if read is None:
            return plain(module, q, k, v, mask, **kwargs)
        index = read[0]
        layer, method = run.at[index], run.program.methods[self.which]
        assert isinstance(method, Rereader)
        out = plain(module, q, k, v, mask, **kwargs)
        call = LayerCall(run, index, layer, q, k, v, mask, kwargs, rows=self.rows)
        for turn in call.turns:
            if turn.method == self.which:
                signals = call.signals(turn)
                signals.asking = self.asking
                with full_precision(q):
                    self.votes.append(method.votes(signals, self.rows, *self.part))
        layer.totals = [t + q.shape[2] for t in layer.totals]
        layer.settle()
        return out


@torch.no_grad()
def reread(run: CacheRun, which: int, root: nn.Module, given: dict[str, Any]) -> None:
    """Compress what a pass has put into an empty cache. given: the arguments the decoder was called with."""
    method, layers = run.program.methods[which], run.layers
    assert isinstance(method, Rereader)
    name = "input_ids" if given.get("input_ids") is not None else "inputs_embeds"
    tokens: Tensor = given[name]
    if any(layer.window is not None for layer in layers):
        raise SessionError(
            f"{method.card.name} takes the rows of a second reading back, which a sliding-window layer cannot; choose "
            "another method for this model (snapkv, expected_attention)"
        )
    rows = run.rows(layers[0], layers[0].keys)
    turns = [(i, t) for i in range(len(layers)) for t in run.program.at(Site.KV_CACHE, i) if t.method == which]
    places = [run.place(index, turn, rows) for index, turn in turns]
    if all(rows.counts(method.budget, place, method.least) == list(rows.totals) for place in places):
        return
    cue = torch.tensor(method.instruction, dtype=torch.long, device=tokens.device).expand(len(tokens), -1)
    head = cue if name == "input_ids" else pretrained(root).get_input_embeddings()(cue)
    real = None if rows.real is None else rows.real[:, 0]
    totals = torch.tensor(rows.totals, device=tokens.device)[:, None]
    weights = sum(sum(run.host.linear_weights(i)) for i in range(len(run.host.blocks)))
    votes: list[list[Tensor]] = []
    for first in range(0, rows.n, method.chunk):
        last = min(first + method.chunk, rows.n)
        span = slice(max(first - method.overlap, 0), last)
        again = torch.cat([head, tokens[:, span]], 1)
        length = again.shape[1]
        limit = getattr(root.config, "max_position_embeddings", None)
        if run.host.rotary(0) is None and limit is not None and rows.n + length > limit:
            raise SessionError(
                f"{method.card.name} reads {length} tokens behind {rows.n}, but the model has learned positions for "
                f"{limit}; pass a smaller chunk="
            )
        asking = None if real is None else torch.cat([torch.ones_like(cue, dtype=torch.bool), real[:, span]], 1)
        behind = torch.arange(length, device=tokens.device)[None] if asking is None else asking.cumsum(-1) - 1
        visit = RepeatedRun(run, which, rows, (first, last), asking)
        run.site.inner(visit, root, **{
            name: again, **cached(root, run.cache), "use_cache": True, "position_ids": totals + behind.clamp(min=0),
            "attention_mask": None if asking is None or real is None else torch.cat([real, asking], 1).long(),
        })  # fmt: skip
        for layer in layers:
            layer.crop(-length)
        run.site.spend(2 * weights * length)
        votes.append(visit.votes)
    plans = method.choose([torch.cat(parts, -1) for parts in zip(*votes, strict=True)], rows, places)
    run.site.acted()
    for (index, _), plan in zip(turns, plans, strict=True):
        layers[index].keep(plan, layers[index].keys, layers[index].values)
    for index, layer in enumerate(layers):
        run._store(layer, index)
        layer.settle()
