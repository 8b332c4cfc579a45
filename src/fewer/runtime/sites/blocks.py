"""Between and inside the blocks of a stack: the site, and one pass over it."""

from __future__ import annotations

import copy
import inspect
import math
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ...core import Group, Hard, Masked, Plan, Reducer, Seen, Signals, Site, Soft, Tokens
from ...core.attention import full_precision, size_bias
from ...core.masks import hiding
from ...core.place import Place
from ...core.plan import take
from ...core.ragged import Packing
from ...hosts import BlockRun, Call, HostError, Stream, placed, reach, running, under
from ..program import Bound, SessionError, Turn
from ..trace import ATTENTION, BEHIND, MLP, Step, Trace

REENTRANT = 'call gradient_checkpointing_enable({"use_reentrant": False})'  # the way out
NESTED = 8  # passes of one thread that may be under way at once
Opener = Callable[[Tensor, Tensor | None, dict[str, Any]], "BlockRun | None"]


class BlockSite:
    """A stack of blocks with methods on.

    opens: what runs when a pass reaches the first block, given its features, mask and other arguments; by default a
    pass of this kind.
    """

    title = "blocks"

    def __init__(self, bound: Bound, opens: Opener | None = None, kind: type[Pass] | None = None) -> None:
        self.bound, self.host, self.program = bound, bound.host, bound.program
        self._opens, self._kind = opens or self._open, kind or Pass
        self._local = threading.local()
        self._latest: Trace | None = None

    # -- on ------------------------------------------------------------------------------------------------------------
    def attach(self, undo: ExitStack) -> None:
        """Take part in the blocks until `undo` closes."""
        self.host.replace(lambda layer: partial(self._block, layer), undo)
        patch, norm, pooler = self.host.patch, self.host.final_norm, self.host.pooler
        if patch is not None:
            undo.callback(patch.register_forward_hook(self._see_grid).remove)
        if norm is not None and not self.host.dense:
            undo.callback(norm.register_forward_hook(self._fill_padding).remove)
        if self.host.reader is not None:
            undo.callback(self.host.reader.register_forward_pre_hook(self._follow, with_kwargs=True).remove)
        if pooler is not None:
            undo.callback(pooler.register_forward_pre_hook(self._mask_pooler, with_kwargs=True).remove)
        if (own := getattr(self.host.root, "forward_intermediates", None)) is not None:  # timm's maps of all blocks
            vars(self.host.root)["forward_intermediates"] = wraps(own)(partial(self._mapped, own))
            undo.callback(vars(self.host.root).pop, "forward_intermediates", None)

    def _mapped(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._local.mapped = True
        try:
            return own(*args, **kwargs)
        finally:
            self._local.mapped = False

    @property
    def mapped(self) -> bool:
        """Whether maps are made of what each block gives, so that it must have all rows."""
        return self.host.reads == "each" or getattr(self._local, "mapped", False)

    @property
    def trace(self) -> Trace | None:
        """Of this thread's last finished pass, else of the last of any thread."""
        mine: Trace | None = getattr(self._local, "shown", None)
        return mine or self._latest

    def forget(self) -> None:
        """Nothing has been seen yet."""
        self._local.finished = self._local.shown = self._latest = None

    def finished(self, trace: Trace) -> None:
        """A forward pass came to its end: what the session shows from now on. Behind a prompt that is the prompt still:
        a step of one token has nothing that could leave."""
        self._local.finished = trace
        if trace.first.n > 1 or self.trace is None:
            self._local.shown = self._latest = trace

    # -- called by the host --------------------------------------------------------------------------------------------
    def _block(self, layer: int, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Any, ...]]:
        """Stands in for a block's forward."""
        host = self.host
        kwargs |= dict(zip(host.arguments, args, strict=False))
        if layer == 0:
            host.renew()
        mask = None if host.found.mask is None else kwargs.pop(host.found.mask, None)
        checkpoint = host.checkpoint(layer)
        visit = self._reached(layer, x, mask, kwargs)
        try:
            return self._run(layer, x, mask, kwargs, visit, checkpoint)
        except BaseException:
            self._gave_up(layer, visit)
            raise

    def _run(
        self, layer: int, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any], visit: BlockRun | None,
        checkpoint: Callable[..., Any] | None,
    ) -> tuple[Tensor, tuple[Any, ...]]:  # fmt: skip
        """A block with a pass in it."""
        host = self.host
        if visit is None:
            out = host.own(layer)(x, **({} if host.found.mask is None else {host.found.mask: mask}), **kwargs)
            return (out[0], tuple(out[1:])) if isinstance(out, tuple) else (out, ())
        last = layer + 1 == len(host.blocks) and host.final_norm is None and not host.dense
        if checkpoint is None:
            x, rest = host.run(layer, x, mask, kwargs, visit)
            return self._filled(x) if last else x, rest
        # The backward pass runs the block once more: from a copy of the state at its entry, leaving the trace alone.
        entry, visits, under_way = visit.fork(), [visit], under.run

        def run(x: Tensor) -> Any:
            apart = bool(visits) and not torch.is_grad_enabled()  # reentrant: a graph of its own for every block
            if apart and any(p.requires_grad for p in self.bound.modules.parameters()):
                raise SessionError(f"reentrant checkpointing loses the gradient of learned masks; {REENTRANT}")
            with running(under_way):
                out = host.run(layer, x, mask, kwargs, visits.pop() if visits else entry.fork())
            if apart and (what := self._beside(visit)):
                raise SessionError(f"reentrant checkpointing loses the gradient of {what}; {REENTRANT}")
            return out

        x, rest = checkpoint(run, x)
        return self._filled(x) if last else x, rest

    def _beside(self, visit: BlockRun) -> str | None:
        """What reaches later blocks or the output beside the features, and carries a gradient."""
        steps = visit.trace.steps if isinstance(visit, Pass) else []
        steps = [step for step in steps if step.method >= 0 or step.plan.m < step.plan.n]  # else padding has moved
        if steps and self.host.text:
            return "tokens that are dropped and have a row in the output"
        return "the sizes of merged tokens" if any(isinstance(step.plan, Soft) for step in steps) else None

    def _reached(self, layer: int, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> BlockRun | None:
        """The pass that reaches a block; None where no method acts in it.

        A hook may call the model anew while a pass is under way: the innermost one that waits for this block goes on.
        What an error inside a block left behind waits for nothing any more, and is forgotten; what one between two
        blocks left is told apart by the block it waited for.
        """
        passes: list[tuple[int, BlockRun | None]] = self._local.__dict__.setdefault("passes", [])
        if layer == 0:
            x, mask = self.host.entering(x, mask, kwargs)
            run = self._opens(x, mask, kwargs)
            del passes[: len(passes) - NESTED]
        else:
            while passes and passes[-1][0] != layer:
                passes.pop()
            if not passes:
                raise SessionError(f"block {layer} was called before block 0; run the model from its first block")
            run = passes.pop()[1]
        if layer + 1 < len(self.host.blocks):
            passes.append((layer + 1, run))
        return run

    def _gave_up(self, layer: int, visit: BlockRun | None) -> None:
        """An error ended a pass inside a block: it does not wait for the next one, for which another may wait, too."""
        passes = self._local.passes
        if passes and passes[-1][0] == layer + 1 and passes[-1][1] is visit:
            passes.pop()

    def _open(self, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Pass:
        if self.host.text:
            shown = self.host.upright(mask)
            front = 0 if self.host.learned is None else self.host.learned.in_front()
            return self._kind(self, x, valid=None if shown is None else _seen_by_any(shown), front=front)
        run = self._kind(self, x, getattr(self._local, "grid", None))
        run.pixels, self._local.pixels = getattr(self._local, "pixels", None), None
        return run

    def _follow(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """A decoder that looks at the encoder's rows looks at those that are left: its mask of them follows. Beams
        repeat each sample."""
        names = list(inspect.signature(type(decoder).forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        rows, last = given.get("encoder_hidden_states"), self.trace
        if rows is None or last is None or not last.steps or rows.shape[1] != last.tokens.n:
            return None
        place = last.kept(len(self.host.blocks) - 1).repeat_interleave(max(len(rows) // last.first.batch, 1), 0)
        mask = given.get("encoder_attention_mask")
        if mask is not None and mask.dim() == 2 and mask.shape[-1] == last.first.n:
            return (), {**given, "encoder_attention_mask": mask.gather(1, place.clamp(min=0)) * (place >= 0)}
        if last.tokens.valid is None:
            return None
        if "encoder_attention_mask" not in names:
            raise SessionError(
                f"samples keep different numbers of rows, and {type(decoder).__name__} takes no mask of its encoder's "
                "rows; use a budget that keeps the same number in all samples"
            )
        return (), {**given, "encoder_attention_mask": (place >= 0).long()}

    def _see_grid(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        if output.dim() > 3:
            self._local.grid = tuple(output.shape[2:])
            self._local.pixels = _args[0] if _args and isinstance(_args[0], Tensor) else None

    def _fill_padding(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return self._filled(output)

    def _filled(self, x: Tensor) -> Tensor:
        """Rows that are padding or masked take the mean of the sample's real patch rows: mean pooling stays exact."""
        real = self._real(x)
        if real is None:
            return x
        if self.host.reads_fillers and real.dtype == torch.bool:
            raise HostError(
                f"samples keep numbers of rows of their own, and what reads those behind the blocks of "
                f"{self.host.name} takes padding for rows; use a budget that counts (keep=, tokens=, r=)"
            )
        weight = real.to(x.dtype)[..., None]
        pooled, share = x[:, self.host.pools_from :], weight[:, self.host.pools_from :]
        mean = (pooled * share).sum(1, keepdim=True) / share.sum(1, keepdim=True).clamp_min(1)
        return torch.where(weight > 0, x, mean)

    def _mask_pooler(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """An attention-pooling head looks at real rows only."""
        x = args[-1]
        real = self._real(x)
        if real is None:
            return None
        mask = self.host.pooler_mask(real[:, -x.shape[1] :] > 0)
        if not mask.keys() <= inspect.signature(module.forward).parameters.keys():
            raise HostError(
                f"{type(module).__name__} pools all rows and takes no mask; use a budget that keeps the same number in "
                "all samples"
            )
        return args, kwargs | mask

    def _real(self, x: Tensor) -> Tensor | None:
        """(B, N) how much each final row is there, bool or the learned policy; None where all rows are."""
        trace: Trace | None = getattr(self._local, "finished", None)
        if trace is None or x.dim() != 3 or x.shape[1] != trace.tokens.n:
            return None
        tokens = trace.tokens
        return tokens.policy if tokens.policy is not None else tokens.valid


@dataclass
class Beside:
    """What goes with the features through the plans at a site.

    seen    the block's attention, of the rows that are there; branch: (B, N, C), what a mixer without attention gave
    entry   (B, N, C), the block's input, where tokens dropped inside it keep that
    """

    seen: Seen | None = None
    branch: Tensor | None = None
    entry: Tensor | None = None

    def gathered(self, plan: Plan, valid: Tensor | None, *, watched: bool) -> Beside:
        """At the rows of a plan. valid: (B, M) bool, those that are no padding. watched: whether anybody looks on."""
        if not watched:
            return Beside()
        seen = None if self.seen is None else self.seen.gathered(plan.position)
        if seen is not None and valid is not None:
            seen.bias = hiding(seen.bias, valid)
        branch = None if self.branch is None else plan.gather(self.branch)
        return Beside(seen, branch, None if self.entry is None else plan.gather(self.entry))

    def padded(self, packing: Packing) -> Beside:
        """Out of packed rows."""
        seen = self.seen
        if seen is not None:
            bias = None if seen.bias is None else packing.pad(seen.bias.transpose(-1, -2)).transpose(-1, -2)
            q, k, v = (packing.pad(x) for x in (seen.q, seen.k, seen.v))
            seen = replace(seen, q=q, k=k, v=v, bias=hiding(bias, packing.valid))
        branch, entry = (None if x is None else packing.pad(x) for x in (self.branch, self.entry))
        return Beside(seen, branch, entry)


class Pass:
    """One forward pass over the blocks. Implements the hosts' BlockRun.

    valid: (B, N) bool, which tokens of a text are no padding; None = all. Real rows need not come first: the first
    plan that is executed moves them there. front: how many rows in front are learned ones, and stay.
    """

    def __init__(
        self, site: BlockSite, x: Tensor, grid: tuple[int, ...] | None = None, valid: Tensor | None = None,
        front: int = 0,
    ) -> None:  # fmt: skip
        host = site.host
        self.site, self.bound, self.host, self.program = site, site.bound, host, site.program
        b, n = x.shape[:2]
        came = Tokens.plain(b, n, host.prefix, has_cls=host.has_cls, device=x.device, valid=valid)
        self.first = self.opening(came.protect(Group(host.prefix, front)) if front > host.prefix else came)
        self.tokens = self.first
        grid = grid if grid is not None and math.prod(grid) == n - host.prefix else None
        self.trace = Trace(host, self.first, len(self.program.methods), x.element_size(), grid)
        self.mapped = site.mapped
        self.dense = host.dense or self.mapped
        self._handed: tuple[Tensor, Tensor] | None = None  # mapped: all rows as handed on, and those that are left
        self._entry: Tensor | None = None  # text: the block's input, what tokens dropped inside it keep
        self._starts = None if valid is None else (valid.sum(-1) - n + self.first.free_count).clamp(min=0)
        # To undo behind a block: steps before its plans, and tokens, masked rows and features as they were.
        self._around: list[tuple[int, Tokens, Hard | None, Tokens, Tensor]] = []
        self._moved: dict[tuple[int, str, tuple], tuple[Any, Any, Any]] = {}  # what `streams` gave last
        self.packing: Packing | None = None
        self.live: Hard | None = None  # masked execution: the rows still there,
        self.compact = self.first  # and the tokens they are
        self.proportional = False
        self._clock = x.device.type == "cpu" and not torch.compiler.is_compiling()
        self._start = time.perf_counter() if self._clock else 0.0
        self._own = 0.0
        self.pixels: Tensor | None = None  # what entered the patch embedding
        self._acted = False  # whether any method had its say
        self.counted = True  # False in a block's second run by gradient checkpointing

    @property
    def steps(self) -> list[Step]:
        return self.trace.steps

    def leaving(self, reducer: Reducer, plan: Plan, x: Tensor, layer: int) -> None:
        """A plan is about to be executed behind, inside or before a block. x: (B, N, C), its input."""

    def opening(self, tokens: Tokens) -> Tokens:
        """The tokens that enter, with what else must stay."""
        return self.host.opening(tokens)

    # -- the sites ----------------------------------------------------------------------------------------------------
    def before(self, layer: int, x: Tensor) -> Tensor:
        if self.mapped:
            x = self._taken_up(x)
        x, _ = self._at(Site.BRIDGE, layer, x, Beside())
        x, _ = self._at(Site.BEFORE_BLOCK, layer, x, Beside())
        if self.program.at(Site.AROUND_BLOCK, layer):
            self.surround(x)
            x, _ = self._at(Site.AROUND_BLOCK, layer, x, Beside())
        self._entry = x if self.dense else None
        self._count(layer, ATTENTION)
        return x

    def surround(self, x: Tensor) -> None:
        """What methods do from here on is undone behind the block. x: (B, N, C), its input."""
        self._around.append((len(self.steps), self.tokens, self.live, self.compact, x))

    def call(self, layer: int) -> Call:
        """What this block's attention must add, and whether it is watched."""
        tokens = self.tokens
        bias = None
        if self.proportional and tokens.size is not None:
            size = tokens.size if self.packing is None else self.packing.pack(tokens.size[..., None])[..., 0]
            bias = size_bias(size, torch.float32)
        if self.packing is None and tokens.valid is not None and self.steps:  # before, the model's own mask hides it
            bias = hiding(bias, tokens.valid)
        policy = tokens.policy
        eps = self.bound.mask_eps if policy is not None and policy.requires_grad else 0.0
        split = None if self.packing is None else self.packing.attention
        known = self.host.layers[layer]
        fit = self._fit if known.inside or known.anew else None
        return Call(bias, policy, eps, self.program.looks_on(layer), split, fit=fit, came=self.first.n)

    def bias(self, layer: int, full: Tensor | None) -> Tensor | None:
        """The model's own (B or 1, 1 or H, N0, N0) bias at the tokens that are left: each row keeps its
        representative's. A text's mask that tells padding only is not needed once `call` hides it."""
        if full is None or not self.steps or full.shape[-1] == 1:
            return full
        known = self.host.layers[layer]
        if self.host.text and known.bare and (known.way == "table" or self.packing is not None):
            return None  # written out, attention may insist on a mask
        return self._fit(full)

    def _fit(self, full: Tensor) -> Tensor:
        """A bias between all tokens, (B or 1, 1 or H, N0 or 1, N0), between those that are left; also without the
        heads' axis, or that of the queries."""
        if full.shape[-1] != self.first.n or not self.steps:
            return full
        place = self.tokens.place()
        if full.dim() < 4:
            fitted = self._fit(full[:, None] if full.dim() == 3 else full[:, None, None])
            return fitted[:, 0] if full.dim() == 3 else fitted[:, 0, 0]
        rows = full.expand(place.shape[0], *full.shape[1:])
        if full.shape[2] > 1:
            index = place[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[-1])
            rows = rows.gather(2, index)
        return rows.gather(3, place[:, None, None, :].expand(-1, rows.shape[1], rows.shape[2], -1))

    def splits(self, layer: int) -> bool:
        """Whether a method acts between this block's attention and its MLP."""
        return bool(self.program.at(Site.MID_BLOCK, layer))

    def streams(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What travels beside the features, at the tokens that are left: rotary tables, position ids and the like."""
        counts = self.host.found.counts
        if counts is not None and kwargs.get(counts) is None:  # who would count the rows is told what they are
            kwargs = {**kwargs, counts: self.tokens.place()}
        if not self.steps or not self.host.found.streams:
            return kwargs
        moved = dict(kwargs)
        for stream in self.host.found.streams:
            if kwargs.get(stream.name) is not None:
                moved[stream.name] = self._at_rows(stream, moved[stream.name], kwargs[stream.name])
        return moved

    def _at_rows(self, stream: Stream, value: Any, own: Any) -> Any:
        """An argument with one of its parts at the tokens that are left. own: as the block was given it."""
        key = (id(own), stream.name, stream.path)
        tokens, _, moved = self._moved.get(key, (None, None, None))
        if tokens is not self.tokens:  # blocks share their tables: they are gathered once after each plan
            part = reach(own, stream.path)
            whole = isinstance(part, Tensor) and part.shape[stream.axis] == self.first.n - stream.lacks
            moved = stream.at(part, self.tokens.place()) if whole else None
            self._moved[key] = (self.tokens, own, moved)
        return value if moved is None else placed(value, stream.path, moved)

    def mid(self, layer: int, x: Tensor, call: Call) -> Tensor:
        x, beside = self._at(Site.MID_BLOCK, layer, x, Beside(call.seen, call.branch, self._entry))
        call.seen, call.branch, self._entry = beside.seen, beside.branch, beside.entry
        if not self.program.at(Site.AFTER_BLOCK, layer):
            call.seen = call.branch = None  # nobody will look again: q, k and v need not live through the MLP
        self._count(layer, MLP)
        return x

    def after(self, layer: int, x: Tensor, call: Call) -> Tensor:
        self._entry = None
        x, _ = self._at(Site.AFTER_BLOCK, layer, x, Beside(call.seen, call.branch))
        if self.program.at(Site.AROUND_BLOCK, layer):
            x = self._undone(x)
        self._count(layer, BEHIND)
        if layer + 1 == len(self.host.blocks):
            return self._finish(x)
        return self._handed_on(x) if self.mapped else x

    def _handed_on(self, x: Tensor) -> Tensor:
        """All rows, for who makes a map of them; those that are left wait for the next block."""
        if not self.steps or self.live is not None:
            return x
        full = self._spread(x if self.packing is None else self.packing.pad(x))
        self._handed = full, x
        return full

    def _taken_up(self, x: Tensor) -> Tensor:
        """Those that are left, of what was handed on, or made of it in between."""
        if not self.steps or self.live is not None:
            return x
        if self._handed is not None and self._handed[0] is x:
            return self._handed[1]
        rows = take(x, self.tokens.place())
        return rows if self.packing is None else self.packing.pack(rows)

    def _undone(self, x: Tensor) -> Tensor:
        """Behind a block that ran on fewer rows: all rows of before, those that stayed out as they were."""
        if self.packing is not None:
            x, self.packing = self.packing.pad(x), None
        before, tokens, live, compact, entered = self._around.pop()
        acted = len(self.steps) > before
        if self.live is not None and acted:
            x = take(x, self.live.anchor)
        while len(self.steps) > before:
            step = self.steps.pop()
            plan = step.plan.pruned() if isinstance(step.plan, Hard) and step.plan.front else step.plan
            x = plan.restore(x, 0.0 if step.left is None else step.left)
        if live is not None and acted:  # masked before too: those rows return to their places
            slot = live.anchor if compact.valid is None else _slots(live.anchor, compact.valid, entered)
            x = _placed(entered, slot, x)
        self.tokens, self.live, self.compact = tokens, live, compact
        return x

    def _finish(self, x: Tensor) -> Tensor:
        trace = self.trace
        if self._clock:
            trace.seconds, trace.own_seconds = time.perf_counter() - self._start, self._own
        trace.tokens, trace.live = self.tokens, self.live
        if not self._acted and self.first.n > 1:
            trace.notes.append(f"nothing left: the budgets asked for all {self.first.free_count} tokens")
        if self.packing is not None:
            x = self.packing.pad(x)
            self.packing = None
        if self.dense:
            x = self._spread(x)
        if self.counted:
            self.site.finished(self.trace)
        return x

    def _spread(self, x: Tensor) -> Tensor:
        """A row for each input token: those that were dropped keep their last value, in masked execution too."""
        if self.live is not None:
            x = take(x, self.live.anchor)
        for step in reversed(self.steps):
            if not isinstance(step.plan, Masked):
                x = step.plan.restore(x, 0.0 if step.left is None else step.left)
        return x

    def _count(self, layer: int, which: int) -> None:
        """Write down how many rows are there."""
        block, valid = self.trace.blocks[layer], self.tokens.valid if self.live is None else self.compact.valid
        block.rows[which] = self.tokens.n if self.live is None else self.live.m
        block.lengths[which] = None if valid is None else valid.sum(-1)
        block.computed[which] = [self.tokens.n] if self.packing is None else self.packing.lengths

    # -- plans --------------------------------------------------------------------------------------------------------
    def _at(self, site: Site, layer: int, x: Tensor, beside: Beside) -> tuple[Tensor, Beside]:
        """All methods at a site of a block, one after the other: each is shown what the others left."""
        turns = self.program.at(site, layer)
        if not turns:
            return x, beside
        began = time.perf_counter() if self._clock else 0.0
        if self.packing is not None:
            x, beside = self.packing.pad(x), beside.padded(self.packing)
        further = site is Site.MID_BLOCK and bool(self.program.at(Site.AFTER_BLOCK, layer))
        for number, turn in enumerate(turns, 1):
            with full_precision(x):
                x, beside = self._act(turn, layer, site, x, beside, watched=further or number < len(turns))
        if self.program.execution == "packed" and self.steps and self.tokens.valid is not None and len(x):
            lengths = self.tokens.valid.sum(-1).tolist()
            self.packing = Packing(lengths, self.tokens.n, x.device)
            x = self.packing.pack(x)
            beside = self._packed(beside, self.packing) if further else beside
        if self._clock:
            self._own += time.perf_counter() - began
        return x, beside

    @staticmethod
    def _packed(beside: Beside, packing: Packing) -> Beside:
        """Into packed rows, as what comes behind the MLP finds it."""
        seen = beside.seen
        if seen is not None:
            q, k, v = (_rows_packed(x, packing) for x in (seen.q, seen.k, seen.v))
            bias = None if seen.bias is None else _rows_packed(seen.bias.transpose(-1, -2), packing).transpose(-1, -2)
            seen = replace(seen, q=q, k=k, v=v, bias=bias)
        branch, entry = (None if x is None else packing.pack(x) for x in (beside.branch, beside.entry))
        return Beside(seen, branch, entry)

    def _act(
        self, turn: Turn, layer: int, site: Site, x: Tensor, beside: Beside, *, watched: bool
    ) -> tuple[Tensor, Beside]:
        """One method at one site: signals, plan, execution. watched: whether another will look at this attention."""
        reducer, block = self.program.methods[turn.method], self.trace.blocks[layer]

        def spend(flops: int) -> None:
            block.own += flops

        place = Place(
            layer, len(self.host.blocks), turn.stage, turn.stages, self.first.free_count, spend,
            self.trace.notes.append, self._starts,
        )  # fmt: skip
        tokens = self.tokens if self.live is None else self.compact
        self.proportional = self.proportional or reducer.proportional  # for all samples alike, whoever loses rows here
        if self._all_stay(reducer, tokens, place):
            return x, beside  # keeping all is the identity, for every method
        if not self.steps and tokens.valid is not None and self.live is None:
            x, beside = self._gathered(x, beside, tokens.valid, layer)
            tokens = self.tokens
        hidden, there = x, beside
        if self.live is not None:
            hidden, there = take(x, self.live.anchor), beside.gathered(self.live, tokens.valid, watched=True)
        self._acted = True
        plan, hidden = self._planned(turn.method, hidden, tokens, place, there.seen, there.branch)
        left = None
        if self.dense or site is Site.AROUND_BLOCK:
            left = hidden if there.entry is None else there.entry
        self.steps.append(Step(layer, turn.method, plan, left))
        self.leaving(reducer, plan, hidden, layer)
        if plan.m == 0:
            raise HostError(
                f"{reducer.card.name} leaves no token at all in block {layer}: {self.host.name} has none in front "
                "that always stay; give it a budget that keeps some"
            )
        if self.program.execution == "masked" and isinstance(plan, Hard):
            return self._act_masked(x, hidden, plan, tokens), beside
        x, self.live = plan.reduce(hidden), None  # only hard plans have a masked form; what was masked goes here
        self.tokens = tokens.after(plan)
        return x, there if isinstance(plan, Masked) else there.gathered(plan, self.tokens.valid, watched=watched)

    def _all_stay(self, reducer: Reducer, tokens: Tokens, place: Place) -> bool:
        """Whether a method drops nothing here, as far as shapes tell, and need not be asked."""
        return not reducer.watches and not reducer.adaptive and reducer.budget.spares(tokens.free_count, place)

    def _planned(
        self, method: int, hidden: Tensor, tokens: Tokens, place: Place, seen: Seen | None, branch: Tensor | None
    ) -> tuple[Plan, Tensor]:
        """A method's plan, and the features it is executed on."""
        modules = self.bound.modules_of(method, place.stage)
        weight, whole = next(modules.parameters(), None), self.trace.grid
        frames, grid = (1, None) if whole is None else (whole[0] if len(whole) == 3 else 1, (whole[-2], whole[-1]))
        signals = Signals(
            hidden if weight is None else hidden.to(weight.dtype), tokens, place, seen, grid, modules,
            self.bound.training, self.trace.memory[method], self.first.prefix, branch, pixels=self.pixels,
            frames=frames, shared=self.trace.shared,
        )  # fmt: skip
        return self.program.methods[method].plan(signals, tokens), hidden

    def _gathered(self, x: Tensor, beside: Beside, valid: Tensor, layer: int) -> tuple[Tensor, Beside]:
        """A text's real tokens in front of its padding, as plans expect them, wherever the tokenizer put it."""
        plan = Plan.keep((~valid).to(torch.int8).argsort(dim=-1, stable=True), self.tokens.n, valid.sum(-1))
        self.steps.append(Step(layer, -1, plan, x if beside.entry is None else beside.entry))
        self.tokens = self.tokens.after(plan)
        return plan.gather(x), beside.gathered(plan, self.tokens.valid, watched=True)

    def _act_masked(self, x: Tensor, hidden: Tensor, plan: Hard, tokens: Tokens) -> Tensor:
        """The plan's training form: N rows stay, the dropped ones are masked out of attention. hidden: those of x that
        were still there, as the plan takes them."""
        n = x.shape[1]
        live = Plan.identity((x.shape[0],), n, x.device) if self.live is None else self.live
        rows = plan.reduce(hidden)
        anchor = live.anchor.gather(-1, plan.anchor)
        self.compact = tokens.after(plan)
        valid, size = self.compact.valid, self.compact.size
        self.live = Plan.keep(anchor, n, None if valid is None else valid.sum(-1))
        slot = anchor if valid is None else _slots(anchor, valid, x)
        policy = _placed(torch.zeros(x.shape[:2], device=x.device), slot, torch.ones(slot.shape, device=x.device))
        if size is not None:
            size = _placed(torch.ones(x.shape[:2], device=x.device), slot, size)
        self.tokens = replace(self.tokens, policy=policy, size=size)
        return _placed(x, slot, rows)

    def fork(self) -> Pass:
        """A copy of the state as it is now, for running a block once more without touching this pass."""
        other = copy.copy(self)
        other.trace, other._moved, other.counted = self.trace.fork(), {}, False
        other._around = list(self._around)
        return other


def _seen_by_any(mask: Tensor) -> Tensor:
    """(B, N) bool: the tokens some query may look at, all but padding. mask: (B, 1, N, N), True or 0 = visible; or
    (B, N)."""
    if mask.dim() == 2:
        return mask != 0
    return (mask if mask.dtype == torch.bool else mask >= 0)[:, 0].any(-2)


def _slots(anchor: Tensor, valid: Tensor, x: Tensor) -> Tensor:
    """Where rows are written among those of x; padding goes nowhere."""
    return torch.where(valid, anchor, x.shape[1])


def _placed(onto: Tensor, slot: Tensor, rows: Tensor) -> Tensor:
    """Rows written to their slots; slot N is nowhere. onto: (B, N[, C]), slot: (B, M), rows: (B, M[, C])."""
    roomy = torch.cat([onto, onto[:, :1]], 1)
    index = slot if rows.dim() == 2 else slot[..., None].expand_as(rows)
    return roomy.scatter(1, index, rows)[:, :-1]


def _rows_packed(x: Tensor, packing: Packing) -> Tensor:
    """(B, H, N, d) -> (1, H, T, d)."""
    b, h, n, d = x.shape
    return packing.pack(x.transpose(1, 2).reshape(b, n, h * d)).unflatten(-1, (h, d)).transpose(1, 2)
