"""Over denoising steps: what an operation, or the whole stack, gave at an earlier step is used again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core import Plan, Signals, Site, Tokens, attention
from ...core.attention import Seen
from ...core.denoising import StepReducer
from ...core.place import Place
from ...core.plan import take
from ...hosts import HostError
from ...hosts.diffusion import Operation, inside
from ..program import Bound
from .denoiser import DenoiserSite, Evaluation, Work, again, at, first


class DenoisingSite(DenoiserSite):
    """What was computed is kept for each call of the pipeline, branch of guidance, block and operation, and used where
    the method says that it still holds. Another shape computes everything anew."""

    title = "denoising steps"

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        method = self.program.methods[0]
        assert isinstance(method, StepReducer), "apply looked whether it is one"
        self.method = method
        if self.method.whole and self.host.stack is None:
            raise HostError(
                f"{self.method.card.name} reuses what a whole stack of blocks adds, and {self.host.name} has none: its "
                "blocks stand on several grids, or between other layers; choose a method that reuses operation by "
                "operation, such as fora"
            )

    # -- an evaluation -------------------------------------------------------------------------------------------------
    def starts(self, now: Evaluation) -> Evaluation:
        memory = now.memory()
        now.renews = not self.method.whole and self.method.renews(now.moment, memory)
        now.held = False
        return now

    def ends(self, now: Evaluation) -> None:
        memory = now.memory()
        full = not now.held if self.method.whole else now.renews
        memory["full"] = memory.get("full", 0) + full
        memory["of"] = memory.get("of", 0) + 1
        now.trace.computed = memory["full"], memory["of"]
        now.trace.before = memory.get("cost", (0, 0, 0))
        memory["cost"] = now.trace.cost

    def _signals(
        self, now: Evaluation, operation: Operation, x: Tensor, memory: dict[str, Any]
    ) -> tuple[Signals, Tokens]:
        grid = self.host.grid(now.extents, x.shape[1])
        tokens = Tokens.plain(x.shape[0], x.shape[1], device=x.device)
        trace = now.trace

        def spend(flops: int) -> None:
            trace.own += flops

        place = Place(operation.block, len(self.host.blocks), operation.block, len(self.host.blocks), x.shape[1], spend,
                      trace.notes.append)  # fmt: skip
        moment = at(now.moment, operation, 1 if grid is None else grid.factor)
        shape = None if grid is None else (grid.frames * grid.height, grid.width)
        return Signals(x, tokens, place, grid=shape, at_step=moment, memory=memory), tokens

    # -- operation by operation ----------------------------------------------------------------------------------------
    def operation(
        self, now: Evaluation, operation: Operation, rows: Tensor, own: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        entered, words = now.block[operation.block]
        beside = kwargs.get("encoder_hidden_states")
        more = beside.shape[1] if isinstance(beside, Tensor) else 0
        keys = {"mlp": 0, "cross": more or (0 if words is None else words.shape[1])}.get(
            operation.kind, rows.shape[1] + more
        )
        work = Work(operation, rows.shape[1], rows.shape[1], rows.shape[1] * keys, rows.shape[1] * keys)
        now.trace.work.append(work)
        if self.method.whole:
            if self.method.early and operation.block == 0 and operation.kind == "attention" and not now.asked:
                self._early(now, operation, rows)
            return own(rows)
        acts = bool(self.program.at(Site.DENOISING, operation.block))
        memory = now.memory(operation.block, operation.path)
        kept = memory.get("out")
        if not acts:
            return own(rows)
        if now.renews or kept is None or not _fits(kept, memory["rows"], rows):
            return self._renewed(now, operation, rows, own, memory)
        if "received" not in memory:
            memory |= {k: v for k, v in now.memory(operation.block).items() if k in ("received", "spread")}
        if rows.shape[1] != entered.shape[1]:
            plan: Plan | None = None
            if operation.kind == "mlp" and not self.method.whole:
                now.trace.notes.append(
                    f"block {operation.block}: words stand among the rows of its MLP, which is reused as a whole"
                )
        else:
            signals, tokens = self._signals(now, operation, rows, memory)
            with torch.no_grad():
                plan = self.method.plan(signals, tokens)
        if plan is None or plan.m == 0:
            work.rows = work.pairs = 0
            return kept
        if plan.m == plan.n:
            return self._renewed(now, operation, rows, own, memory)
        if operation.kind == "attention":
            raise HostError(
                f"{self.method.card.name} asks for some rows of self-attention, whose keys are all rows: all or none "
                "can be computed again"
            )
        work.rows, work.pairs = plan.m, plan.m * keys
        fresh, _ = first(own(take(rows, plan.position)))
        old, rest = first(kept)
        index = plan.position[..., None].expand_as(fresh)
        memory["out"] = again(old.scatter(1, index, fresh.detach().to(old.dtype)), rest)
        return memory["out"]

    def _renewed(
        self, now: Evaluation, operation: Operation, rows: Tensor, own: Callable[..., Any], memory: dict[str, Any]
    ) -> Any:
        """Everything computed, and kept."""
        memory.clear()
        if self.method.attends and operation.kind in ("attention", "cross"):
            noted = now.memory(operation.block)
            noted.clear()
            n = now.block[operation.block][0].shape[1]
            with inside(partial(_watched, noted, operation.kind, n)):
                out = own(rows)
        else:
            out = own(rows)
        memory["out"] = _detached(out)
        memory["rows"] = rows.shape
        return out

    # -- the whole stack -----------------------------------------------------------------------------------------------
    def block(self, now: Evaluation, number: int, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not self.method.whole:
            return own(*args, **kwargs)
        assert self.host.stack is not None
        last, memory = self.host.stack[1], now.memory()
        x, words = now.block[number]
        if number == 0:
            now.asked = False
            now.entry = x
            try:
                out = own(*args, **kwargs)
            except _Holds:
                now.held = True
                now.trace.work.clear()
                self._unrun(now, number, x, words)
                return self._passed(now, number, x, words)
            now.after_first = self._hidden(number, out, x, words)
            if not self.method.early:
                signals, _ = self._signals(now, self.host.operations[0], now.after_first - x, memory)
                with torch.no_grad():
                    now.held = self._stored(memory, x) and self.method.holds(signals)
                now.first = signals
            return out
        if now.held:
            self._unrun(now, number, x, words)
            if number != last:
                return self._passed(now, number, x, words)
            return self._passed(now, number, x + memory["added"], words)
        out = own(*args, **kwargs)
        rows = self._hidden(number, out, x, words)
        if number == last:
            since = now.entry if self.method.early else now.after_first
            memory["added"] = (rows - since).detach()
            if now.first is not None:
                with torch.no_grad():
                    self.method.renewed(now.first)
        return out

    def _early(self, now: Evaluation, operation: Operation, rows: Tensor) -> None:
        now.asked = True
        memory = now.memory()
        signals, _ = self._signals(now, operation, rows, memory)
        now.first = signals
        with torch.no_grad():
            if self.method.holds(signals) and self._stored(memory, now.entry):
                raise _Holds

    @staticmethod
    def _stored(memory: dict[str, Any], x: Tensor) -> bool:
        added = memory.get("added")
        return added is not None and added.shape == x.shape and added.dtype == x.dtype and added.device == x.device

    def _unrun(self, now: Evaluation, number: int, x: Tensor, words: Tensor | None) -> None:
        """Write down what a block that does not run would have computed."""
        n, w = x.shape[1], 0 if words is None else words.shape[1]
        for operation in self.host.operations:
            if operation.block == number:
                keys = {"mlp": 0, "cross": w}.get(operation.kind, n + w)
                now.trace.work.append(Work(operation, n, 0, n * keys, 0))

    def _hidden(self, number: int, out: Any, x: Tensor, words: Tensor | None) -> Tensor:
        """The picture's rows in what a block gives; where they stand is learned once."""
        if isinstance(out, Tensor):
            return out
        key = ("place", number)
        if key not in self._places:
            alike = [i for i, part in enumerate(out) if isinstance(part, Tensor) and part.shape == x.shape]
            if len(alike) > 1 and words is not None:
                alike.sort(key=lambda i: float((out[i] - x).abs().mean()))
            if not alike:
                raise HostError(f"block {number} gives no rows like those it was given, so nothing of it can be reused")
            others = [i for i, part in enumerate(out) if i != alike[0] and isinstance(part, Tensor)]
            self._places[key] = alike[0], others[0] if others else None, len(out)
        mine: Tensor = out[self._places[key][0]]
        return mine

    def _passed(self, now: Evaluation, number: int, x: Tensor, words: Tensor | None) -> Any:
        """Rows and words as a block would give them."""
        assert self.host.stack is not None
        if number == 0 and self.method.early and self.host.stack[1] == 0:
            x = x + now.memory()["added"]
        if (found := self._places.get(("place", number))) is None:
            return x
        mine, other, size = found
        out: list[Any] = [None] * size
        out[mine] = x
        if other is not None:
            out[other] = words
        return tuple(out)

    @property
    def _places(self) -> dict[Any, Any]:
        return self.__dict__.setdefault("places", {})


class _Holds(Exception):
    """The first block need not be finished."""


def _fits(kept: Any, shape: Any, rows: Tensor) -> bool:
    out, _ = first(kept)
    return shape == rows.shape and out.dtype == rows.dtype and out.device == rows.device


def _detached(out: Any) -> Any:
    rows, rest = first(out)
    return again(rows.detach(), tuple(x.detach() if isinstance(x, Tensor) else x for x in rest))


def _watched(noted: dict[str, Any], kind: str, n: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
    """Note what attention says of the rows, without changing it."""
    bias = None if mask is None or mask.dtype == torch.bool else mask
    seen = Seen(q, k, v, q.shape[-1] ** -0.5, bias)
    if kind == "attention" and q.shape[-2] == n:
        noted["received"] = attention.mass(seen).mean(1)
    elif kind == "cross" and q.shape[-2] == n:
        p = (q.float() @ k.float().transpose(-1, -2) * seen.scale).softmax(-1)
        noted["spread"] = -(p * p.clamp_min(1e-12).log()).sum(-1).mean(1)
    return q, k, v, mask, lambda out: out
