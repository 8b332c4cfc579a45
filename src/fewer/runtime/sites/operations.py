"""Around an operation of a denoiser: a plan in front of it, all rows back behind it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core import Hard, Plan, Signals, Site, Tokens
from ...core.denoising import OperationReducer
from ...core.place import Place
from ...hosts import HostError
from ...hosts.diffusion import Operation, inside
from .denoiser import DenoiserSite, Evaluation, Work, again, at, first, log_size


class OperationSite(DenoiserSite):
    """One plan for each block and step, from what enters the block; every chosen operation runs on what it leaves."""

    title = "operations"

    def block(self, now: Evaluation, number: int, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with self.host.joining(number, *now.block[number]):
            return own(*args, **kwargs)

    def operation(
        self, now: Evaluation, operation: Operation, rows: Tensor, own: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        entered, words = now.block[operation.block]
        n, words_inside = entered.shape[1], rows.shape[1] - entered.shape[1]
        turns = self.program.at(Site.AROUND_OPERATION, operation.block)
        method = self.program.methods[turns[0].method] if turns else None
        plan = None
        if isinstance(method, OperationReducer) and operation.kind in method.operations and words_inside >= 0:
            plan = self._plan(now, operation, method, turns[0].method, entered)
        keys = self._keys(operation, rows, words, kwargs)
        if plan is None:
            now.trace.work.append(
                Work(operation, rows.shape[1], rows.shape[1], rows.shape[1] * keys, rows.shape[1] * keys)
            )
            return own(rows)
        m, gone = plan.m + words_inside, n - plan.m
        left = keys if operation.kind != "attention" else keys - gone
        now.trace.work.append(Work(operation, rows.shape[1], m, rows.shape[1] * keys, m * left))
        size = plan.sizes(None) if method is not None and method.proportional else None
        if operation.kind != "attention":
            return self._beside(now, plan, self._front(operation, rows, words_inside, None), own, rows)
        joined = kwargs.get("encoder_hidden_states")
        if words_inside or self.host.rotates(args, kwargs):
            front = self._front(operation, rows, words_inside, joined)
            now.trace.work[-1].rows = rows.shape[1]  # projections see all rows, pairs of them are fewer
            return self._turned(plan, front, size, own, rows, operation)
        masked = next((kwargs[k] for k in ("attention_mask", "mask") if isinstance(kwargs.get(k), Tensor)), None)
        if masked is not None and masked.shape[-1] != 1 and joined is None:
            now.trace.notes.append(f"block {operation.block}: its attention is masked, so nothing was reduced in it")
            return own(rows)
        if size is None:
            return self._around(now, plan, own, rows)
        front = 0 if joined is None else self.host.front(self.host.part(operation), rows, joined)
        behind = 0 if joined is None else joined.shape[1] - front
        bias = F.pad(log_size(size, rows.dtype), (front, behind))

        def weighed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
            return q, k, v, bias if mask is None else mask + bias, lambda out: out

        with inside(weighed) as mode:
            out = self._around(now, plan, own, rows)
        self._reached(mode, operation)
        return out

    @staticmethod
    def _around(now: Evaluation, plan: Plan, own: Callable[..., Any], rows: Tensor) -> Any:
        """Merge, run, put back."""
        clocked = now.trace.clocked
        out, rest = first(own(clocked(plan.reduce, rows)))
        return again(clocked(plan.restore, out), rest)

    # -- plans ---------------------------------------------------------------------------------------------------------
    def _plan(
        self, now: Evaluation, operation: Operation, method: OperationReducer, number: int, x: Tensor
    ) -> Plan | None:
        """The block's plan; None where all rows stay."""
        key = operation.block
        if key not in now.plans:
            now.plans[key] = self._planned(now, operation, method, x)
            if (plan := now.plans[key]) is not None:
                now.trace.plans[operation.block] = plan
        return now.plans[key]

    def _planned(self, now: Evaluation, operation: Operation, method: OperationReducer, x: Tensor) -> Plan | None:
        grid, trace = self.host.grid(now.extents, x.shape[1]), now.trace

        def spend(flops: int) -> None:
            trace.own += flops

        if grid is None:
            trace.notes.append(
                f"block {operation.block} has {x.shape[1]} tokens, which form no grid that is known of this input: "
                "nothing was reduced there"
            )
            return None
        if grid.factor > method.max_downsample:
            return None
        turn = self.program.at(Site.AROUND_OPERATION, operation.block)[0]
        place = Place(
            operation.block, len(self.host.blocks), turn.stage, turn.stages, x.shape[1], spend, trace.notes.append
        )
        if method.budget.spares(x.shape[1], place):
            return None
        tokens = Tokens.plain(x.shape[0], x.shape[1], device=x.device)
        signals = Signals(
            x, tokens, place, grid=(grid.frames * grid.height, grid.width),
            at_step=at(now.moment, operation, grid.factor), memory=now.memory(turn.method, operation.block),
        )  # fmt: skip
        with torch.no_grad():
            plan: Plan = trace.clocked(method.plan, signals, tokens)
        return None if isinstance(plan, Hard) and plan.m == plan.n and not plan.averages else plan

    @staticmethod
    def _keys(operation: Operation, rows: Tensor, words: Tensor | None, kwargs: dict[str, Any]) -> int:
        """Keys of each query; 0 where there are none."""
        if operation.kind == "mlp":
            return 0
        beside = kwargs.get("encoder_hidden_states")
        more = beside.shape[1] if isinstance(beside, Tensor) else 0
        if operation.kind == "cross":
            return more or (words.shape[1] if words is not None else 0)
        return rows.shape[1] + more

    # -- attention that turns its rows to their positions --------------------------------------------------------------
    def _front(self, operation: Operation, rows: Tensor, words_inside: int, joined: Any) -> int:
        """How many words stand in front of the rows inside an operation."""
        if isinstance(joined, Tensor):
            return self.host.front(self.host.part(operation), rows, joined)
        return words_inside if self.host.words_first(operation.block) else 0

    def _beside(self, now: Evaluation, plan: Plan, front: int, own: Callable[..., Any], rows: Tensor) -> Any:
        """An operation that treats each row by itself; words among them stay."""
        if rows.shape[1] == plan.n:
            return self._around(now, plan, own, rows)
        before, mine, behind = rows.split([front, plan.n, rows.shape[1] - front - plan.n], 1)
        out = own(torch.cat([before, plan.reduce(mine), behind], 1))
        before, mine, behind = out.split([front, plan.m, out.shape[1] - front - plan.m], 1)
        return torch.cat([before, plan.restore(mine), behind], 1)

    def _turned(
        self, plan: Plan, front: int, size: Tensor | None, own: Callable[..., Any], rows: Tensor, operation: Operation
    ) -> Any:
        """Attention on all rows until they are turned, and on what the plan leaves from there."""
        n = plan.n
        with inside(partial(_folded, plan, front, n, size)) as mode:
            out = own(rows)
        self._reached(mode, operation)
        return out

    def _reached(self, mode: inside, operation: Operation) -> None:
        if not mode.entered:
            part = self.host.part(operation)
            raise HostError(
                f"the attention of block {operation.block} ({type(part).__name__}) does not ask torch's fused kernel, "
                "so its rows cannot be merged behind their rotation; choose torch's attention (set_attention_backend("
                "'native'), no xformers)"
            )


def _folded(
    plan: Plan, front: int, n: int, size: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Any:
    """Queries, keys and values of the rows that a plan leaves, with the words beside them as they are."""
    if mask is not None and mask.shape[-1] == k.shape[-2] and mask.shape[-2] not in (1,):
        raise HostError("attention with a mask between all pairs of tokens cannot be reduced; leave the mask out")
    q, k, v = (torch.cat([x[..., :front, :], _rows(plan.reduce, x[..., front : front + n, :]),
                          x[..., front + n :, :]], -2) for x in (q, k, v))  # fmt: skip
    if mask is not None and mask.shape[-1] > 1:
        mine = mask[..., front : front + n].expand(plan.lead[0], *mask.shape[1:-1], n)
        kept = mine.gather(-1, plan.position[:, None, None].expand(*mine.shape[:-1], plan.m))
        outer = [part.expand(plan.lead[0], *part.shape[1:]) for part in (mask[..., :front], mask[..., front + n :])]
        mask = torch.cat([outer[0], kept, outer[1]], -1)
    if size is not None:
        bias = F.pad(log_size(size, q.dtype), (front, k.shape[-2] - front - plan.m))
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
        mask = bias if mask is None else mask + bias

    def back(out: Tensor) -> Tensor:
        mine = _rows(plan.restore, out[..., front : front + plan.m, :])
        return torch.cat([out[..., :front, :], mine, out[..., front + plan.m :, :]], -2)

    return q, k, v, mask, back


def _rows(change: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, H, M, d): a change of rows, the same for all heads."""
    heads = x.shape[1]
    return change(x.transpose(1, 2).flatten(2)).unflatten(-1, (heads, -1)).transpose(1, 2)
