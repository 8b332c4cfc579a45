"""One forward pass: the state a session keeps while a model runs, and what can be read from it afterwards."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .core import Hard, Masked, Plan, Reducer, Seen, Signals, Site, Soft, Tokens
from .core.attention import full_precision, size_bias
from .core.place import Place
from .core.plan import take
from .core.ragged import Packing
from .hosts import Call, HostError, Stream, placed, reach
from .ledger import Entry, Ledger

if TYPE_CHECKING:
    from .session import Session


@dataclass(frozen=True, eq=False)
class Step:
    """A plan that was executed, by which method and after which block's attention.

    left  (B, N, C), what the tokens it dropped keep, where the model's output has a row for each; None elsewhere
    """

    layer: int
    method: int
    plan: Plan
    left: Tensor | None = None


class Pass:
    """Everything one forward pass needs and leaves. Implements the hosts' Visit.

    valid: (B, N) bool, which tokens of a text are no padding; None = all. Real rows need not come first: the first
    plan that is executed moves them there.
    """

    causal = False

    def __init__(
        self, session: Session, x: Tensor, grid: tuple[int, int] | None = None, valid: Tensor | None = None
    ) -> None:
        host = session.host
        self.session, self.host = session, host
        b, n = x.shape[:2]
        self.first = self.opening(Tokens.plain(b, n, host.prefix, has_cls=host.has_cls, device=x.device, valid=valid))
        self.tokens = self.first
        self.itemsize = x.element_size()
        self.grid = grid if grid is not None and grid[0] * grid[1] == n - host.prefix else None
        self._entry: Tensor | None = None  # text: the block's input, what tokens dropped inside it keep
        self._starts = None if valid is None else (valid.sum(-1) - n + self.first.free_count).clamp(min=0)
        # To undo behind a block: steps before its plans, and tokens, masked rows and features as they were.
        self._around: list[tuple[int, Tokens, Hard | None, Tokens, Tensor]] = []
        self._moved: dict[tuple[int, str, tuple], tuple[Any, Any, Any]] = {}  # what `streams` gave last
        self.steps: list[Step] = []
        self.packing: Packing | None = None
        self.live: Hard | None = None  # masked execution: the rows still there,
        self.compact = self.first  # and the tokens they are
        self.proportional = False
        self.memory: list[dict] = [{} for _ in session.methods]
        self.notes: list[str] = []
        self._cost = [[0, 0, 0] for _ in host.blocks]  # rows in attention, rows in the MLP, FLOPs of the methods
        self._out = [0 for _ in host.blocks]
        self._lengths: list[list[Tensor | None]] = [[None, None, None] for _ in host.blocks]  # the same and out, ragged
        self._clock = x.device.type == "cpu" and not torch.compiler.is_compiling()
        self._start = time.perf_counter() if self._clock else 0.0
        self._own = 0.0
        self.seconds: float | None = None
        self.counted = True  # False in a block's second run by gradient checkpointing

    def leaving(self, reducer: Reducer, plan: Plan, x: Tensor, layer: int) -> None:
        """A plan is about to be executed behind, inside or before a block. x: (B, N, C), its input."""

    def opening(self, tokens: Tokens) -> Tokens:
        """The tokens that enter, with what else must stay."""
        return self.host.opening(tokens)

    # -- the sites ----------------------------------------------------------------------------------------------------
    def before(self, layer: int, x: Tensor) -> Tensor:
        x = self._at(Site.BRIDGE, layer, x, None)
        x = self._at(Site.BEFORE_BLOCK, layer, x, None)
        if self.session.acting(Site.AROUND_BLOCK, layer):
            self._around.append((len(self.steps), self.tokens, self.live, self.compact, x))
            x = self._at(Site.AROUND_BLOCK, layer, x, None)
        self._entry = x if self.host.dense else None
        self._cost[layer][0], self._lengths[layer][0] = self._count(), self._live_lengths()
        return x

    def call(self, layer: int) -> Call:
        """What this block's attention must add, and whether it is watched."""
        tokens = self.tokens
        bias = None
        if self.proportional and tokens.size is not None:
            size = tokens.size if self.packing is None else self.packing.pack(tokens.size[..., None])[..., 0]
            bias = size_bias(size, torch.float32)
        if self.packing is None and tokens.valid is not None and self.steps:  # before, the model's own mask hides it
            bias = _hidden(bias, tokens.valid)
        policy = tokens.policy
        eps = self.session.mask_eps if policy is not None and policy.requires_grad else 0.0
        split = None if self.packing is None else self.packing.attention
        return Call(
            bias,
            policy,
            eps,
            self.session.watches(layer),
            split,
            fit=self._fit if self.host.layers[layer].inside else None,
        )

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
        return bool(self.session.acting(Site.MID_BLOCK, layer))

    def streams(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What travels beside the features, at the tokens that are left: rotary tables, position ids and the like."""
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
        x = self._at(Site.MID_BLOCK, layer, x, call.seen, call.branch)
        if not self.session.acting(Site.AFTER_BLOCK, layer):
            call.seen = None  # nobody will look again: q, k and v need not live through the MLP
        self._cost[layer][1], self._lengths[layer][1] = self._count(), self._live_lengths()
        return x

    def after(self, layer: int, x: Tensor, call: Call) -> Tensor:
        self._entry = None
        x = self._at(Site.AFTER_BLOCK, layer, x, call.seen, call.branch)
        if self.session.acting(Site.AROUND_BLOCK, layer):
            x = self._undone(x)
        self._out[layer], self._lengths[layer][2] = self._count(), self._live_lengths()
        return x if layer + 1 < len(self.host.blocks) else self._finish(x)

    def _undone(self, x: Tensor) -> Tensor:
        """Behind a block that ran on fewer rows: all rows of before, those that stayed out as they were."""
        if self.packing is not None:
            x, self.packing = self.packing.pad(x), None
        before, tokens, live, compact, entered = self._around.pop()
        if self.live is not None and len(self.steps) > before:
            x = take(x, self.live.anchor)
        while len(self.steps) > before:
            step = self.steps.pop()
            plan = step.plan.pruned() if isinstance(step.plan, Hard) and step.plan.front else step.plan
            x = plan.restore(x, 0.0 if step.left is None else step.left)
        if live is not None and self.live is not live:  # masked before too: those rows return to their places
            slot = live.anchor if compact.valid is None else _slots(live.anchor, compact.valid, entered)
            x = _placed(entered, slot, x)
        self.tokens, self.live, self.compact = tokens, live, compact
        return x

    def _finish(self, x: Tensor) -> Tensor:
        if self._clock:
            self.seconds = time.perf_counter() - self._start
        if self.packing is not None:
            x = self.packing.pad(x)
            self.packing = None
        if self.host.dense:
            x = self._spread(x)
        if self.counted:
            self.session.finished(self)
        return x

    def _spread(self, x: Tensor) -> Tensor:
        """A row for each input token: those that were dropped keep their last value."""
        for step in reversed(self.steps):
            if self.live is not None and step.method >= 0:
                continue  # masked rows are all there; where padding came first, it does so again
            if not isinstance(step.plan, Masked):
                x = step.plan.restore(x, 0.0 if step.left is None else step.left)
        return x

    def _count(self) -> int:
        return self.tokens.n if self.live is None else self.live.m

    def _live_lengths(self) -> Tensor | None:
        valid = self.tokens.valid if self.live is None else self.compact.valid
        return None if valid is None else valid.sum(-1)

    def _at(
        self, site: Site, layer: int, x: Tensor, seen: Seen | None, branch: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        acting = self.session.acting(site, layer)
        if not acting:
            return x
        began = time.perf_counter() if self._clock else 0.0
        if self.packing is not None:
            x, seen = self.packing.pad(x), _padded(seen, self.packing)
            branch = None if branch is None else self.packing.pad(branch)
            if self._entry is not None and site is Site.MID_BLOCK:
                self._entry = self.packing.pad(self._entry)
        for turn, (method, stage, stages) in enumerate(acting):
            with full_precision(x):
                x, plan = self._act(method, stage, stages, layer, site, x, seen, branch)
            branch = None if branch is None or plan is None else plan.gather(branch)
            if seen is not None and plan is not None and turn + 1 < len(acting):
                seen = seen.gathered(plan.position)
                if self.tokens.valid is not None:
                    seen.bias = _hidden(seen.bias, self.tokens.valid)
        if self.session.execution == "packed" and self.tokens.valid is not None and len(x):
            lengths = self.tokens.valid.sum(-1).tolist()
            self.packing = Packing(lengths, self.tokens.n, x.device)
            x = self.packing.pack(x)
        if self._clock:
            self._own += time.perf_counter() - began
        return x

    def _act(
        self,
        method: int,
        stage: int,
        stages: int,
        layer: int,
        site: Site,
        x: Tensor,
        seen: Seen | None,
        branch: Tensor | None = None,
    ) -> tuple[Tensor, Plan | None]:
        """One method at one site: signals, plan, execution. Returns the features and the plan whose rows they are."""
        reducer: Reducer = self.session.methods[method]
        entry = self._cost[layer]

        def spend(flops: int) -> None:
            entry[2] += flops

        tokens, hidden = self.tokens, x
        if self.live is not None:
            tokens, hidden = self.compact, take(x, self.live.anchor)
            seen = None if seen is None else seen.gathered(self.live.anchor)
            if seen is not None and tokens.valid is not None:
                seen.bias = _hidden(seen.bias, tokens.valid)
        place = Place(
            layer, len(self.host.blocks), stage, stages, self.first.free_count, spend, self.notes.append, self._starts
        )
        if self._all_stay(reducer, tokens, place):
            return x, None  # keeping all is the identity, for every method
        if not self.steps and tokens.valid is not None and self.live is None:
            x, seen = self._gathered(x, seen, tokens.valid, layer)
            tokens, hidden = self.tokens, x
            branch = None if branch is None else self.steps[-1].plan.gather(branch)
        plan, hidden = self._planned(method, hidden, tokens, place, seen, branch)
        self.proportional = self.proportional or reducer.proportional
        left = None
        if self.host.dense:
            left = self._entry if self._entry is not None and site is Site.MID_BLOCK else hidden
        self.steps.append(Step(layer, method, plan, left))
        self.leaving(reducer, plan, hidden, layer)
        if plan.m == 0:
            raise HostError(
                f"{reducer.card.name} leaves no token at all in block {layer}: {self.host.name} has none in front "
                "that always stay; give it a budget that keeps some"
            )
        if self.session.execution == "masked" and isinstance(plan, Hard):
            return self._act_masked(x, hidden, plan, tokens), None
        x, self.live = plan.reduce(hidden), None  # only hard plans have a masked form; what was masked goes here
        self.tokens = tokens.after(plan)
        if self._entry is not None and site is Site.MID_BLOCK:
            self._entry = plan.gather(self._entry)  # for the next method here
        return x, None if isinstance(plan, Masked) else plan

    def _all_stay(self, reducer: Reducer, tokens: Tokens, place: Place) -> bool:
        """Whether a method drops nothing here, as far as shapes tell."""
        return not reducer.adaptive and reducer.budget.keep(tokens.free_count, place) == tokens.free_count

    def _planned(
        self, method: int, hidden: Tensor, tokens: Tokens, place: Place, seen: Seen | None, branch: Tensor | None
    ) -> tuple[Plan, Tensor]:
        """A method's plan, and the features it is executed on."""
        modules = self.session.modules_of(method, place.stage)
        weight = next(modules.parameters(), None)
        signals = Signals(
            hidden if weight is None else hidden.to(weight.dtype), tokens, place, seen, self.grid, modules,
            self.session.training, self.memory[method], self.first.prefix, branch,
        )  # fmt: skip
        return self.session.methods[method].plan(signals, tokens), hidden

    def _gathered(self, x: Tensor, seen: Seen | None, valid: Tensor, layer: int) -> tuple[Tensor, Seen | None]:
        """A text's real tokens in front of its padding, as plans expect them, wherever the tokenizer put it."""
        plan = Plan.keep((~valid).to(torch.int8).argsort(dim=-1, stable=True), self.tokens.n, valid.sum(-1))
        self.steps.append(Step(layer, -1, plan, x if self._entry is None else self._entry))
        self.tokens = self.tokens.after(plan)
        self._entry = None if self._entry is None else plan.gather(self._entry)
        if seen is not None:
            seen = seen.gathered(plan.position)
            seen.bias = _hidden(seen.bias, self.tokens.valid)  # type: ignore[arg-type]
        return plan.gather(x), seen

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

    # -- what can be read afterwards -----------------------------------------------------------------------------------
    @property
    def counts(self) -> list[int] | Tensor:
        """Tokens after each block: Python integers, or (layers, B) where samples differ."""
        if all(lengths is None for _, _, lengths in self._lengths):
            return list(self._out)
        full = [
            torch.full((self.first.batch,), count) if lengths is None else lengths.cpu()
            for count, (_, _, lengths) in zip(self._out, self._lengths, strict=True)
        ]
        return torch.stack(full)

    @property
    def ledger(self) -> Ledger:
        entries = []
        for (attention, mlp, own), (la, lm, _) in zip(self._cost, self._lengths, strict=True):
            a = attention if la is None else la.double().mean().item()
            m = mlp if lm is None else lm.double().mean().item()
            pairs = attention**2 if la is None else la.double().square().mean().item()
            entries.append(Entry(a, m, own, pairs))
        ledger = Ledger.of(self.host, entries, self.first.n, self.itemsize)
        ledger.causal = self.causal
        ledger.seconds, ledger.own_seconds = self.seconds, (self._own if self._clock else None)
        ledger.notes = list(dict.fromkeys(self.notes))
        return ledger

    def rows(self, layer: int | None = None) -> Tensor:
        """(B, N0): the row each input token is in after `layer` (the last by default), -1 = dropped."""
        row = torch.arange(self.first.n, device=self.first.device).expand(self.first.batch, -1)
        for step in self.steps:
            if layer is None or step.layer <= layer:
                row = torch.where(row < 0, -1, step.plan.row.gather(-1, row.clamp(min=0)))
        if layer is None and self.live is not None:  # masked execution: the rows of the output are all still there
            row = torch.where(row < 0, -1, self.live.anchor.gather(-1, row.clamp(min=0)))
            if self.steps and self.steps[0].method < 0:  # and where they were, wherever padding is
                row = torch.where(row < 0, -1, self.steps[0].plan.position.gather(-1, row.clamp(min=0)))
        return row

    def kept(self, layer: int) -> Tensor:
        """(B, M): the input token each row stands for after `layer`, row by row; -1 pads ragged samples."""
        place = torch.arange(self.first.n, device=self.first.device).expand(self.first.batch, -1)
        valid: Tensor | None = None
        for step in self.steps:
            if step.layer <= layer:
                place = step.plan.gather(place)
                own = step.plan.valid
                valid = own if own is not None else None if valid is None else step.plan.gather(valid)
                if isinstance(step.plan, Masked):
                    valid = step.plan.policy > 0
        return place if valid is None else place.masked_fill(~valid, -1)

    def restore(self, features: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """Spread rows back over the input tokens. features: (B, M, C) -> (B, N0, C)."""
        if self.live is not None:
            features = take(features, self.live.anchor)
        for step in reversed(self.steps):
            features = step.plan.restore(features, fill)
        return features

    def fork(self) -> Pass:
        """A copy of the state as it is now, for running a block once more without touching this pass."""
        other = copy.copy(self)
        other.steps, other.notes, other._moved = list(self.steps), list(self.notes), {}
        other._cost, other._lengths = [list(c) for c in self._cost], [list(c) for c in self._lengths]
        other._out, other.counted = list(self._out), False
        other.memory = [dict(m) for m in self.memory]
        return other


def _slots(anchor: Tensor, valid: Tensor, x: Tensor) -> Tensor:
    """Where rows are written among those of x; padding goes nowhere."""
    return torch.where(valid, anchor, x.shape[1])


def _placed(onto: Tensor, slot: Tensor, rows: Tensor) -> Tensor:
    """Rows written to their slots; slot N is nowhere. onto: (B, N[, C]), slot: (B, M), rows: (B, M[, C])."""
    roomy = torch.cat([onto, onto[:, :1]], 1)
    index = slot if rows.dim() == 2 else slot[..., None].expand_as(rows)
    return roomy.scatter(1, index, rows)[:, :-1]


def _hidden(bias: Tensor | None, valid: Tensor) -> Tensor:
    """An additive bias, or none, with padding's keys hidden. valid: (B, N). Returns (B, 1 or H, 1 or N, N)."""
    if bias is None:
        bias = torch.zeros(valid.shape, device=valid.device)[:, None, None, :]
    return bias.masked_fill(~valid[:, None, None, :], False if bias.dtype == torch.bool else float("-inf"))


def _padded(seen: Seen | None, packing: Packing) -> Seen | None:
    if seen is None:
        return None
    bias = None if seen.bias is None else packing.pad(seen.bias.transpose(-1, -2)).transpose(-1, -2)
    q, k, v = (packing.pad(x) for x in (seen.q, seen.k, seen.v))
    return replace(seen, q=q, k=k, v=v, bias=_hidden(bias, packing.valid))


def check_causal(plan: Plan) -> None:
    """Raises HostError for rows that are made of all tokens at once."""
    if isinstance(plan, Soft):
        raise HostError(
            "the rows of this method are mixtures of all tokens, and none of them has a place in a causal text; choose "
            "a method that prunes or merges"
        )


class Scan(Pass):
    """A pass over a state-space model: no mask but which rows are real. The last token of each sample stays: the next
    one is predicted from it."""

    def opening(self, tokens: Tokens) -> Tokens:
        return tokens.protect(tokens.last)

    def leaving(self, reducer: Reducer, plan: Plan, x: Tensor, layer: int) -> None:
        check_causal(plan)

    def call(self, layer: int) -> Call:
        if self.tokens.policy is not None:
            raise HostError(
                "a state-space model cannot leave out masked rows, which the training form of a method needs; call "
                "model.eval(), or train on a model with attention"
            )
        call = Call()
        call.real = self.tokens.valid if self.steps else None
        return call

    def bias(self, layer: int, full: Tensor | None) -> Tensor | None:
        return None if self.steps else full
