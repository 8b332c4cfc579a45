"""A denoiser under way: which call of a pipeline, which step, which branch of guidance; and what was computed."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ...core import Plan, Signals
from ...core.denoising import Moment
from ...hosts import HostError
from ...hosts.diffusion import DiffusionHost, Operation
from ..costs import StepLedger
from ..program import Bound, SessionError
from ..state import Lifetime, State

PUT_BACK = "a denoiser's rows are all put back behind every operation"


@dataclass
class Work:
    """What one operation computed in one evaluation. rows: of how many; pairs: of a query and a key."""

    operation: Operation
    full: int
    rows: float
    full_pairs: float
    pairs: float
    own: int = 0


@dataclass(eq=False)
class StepTrace:
    """Of one evaluation of a denoiser.

    plans    by block, what entered it to the rows its operations ran on
    work     of each operation, in order
    """

    host: DiffusionHost
    moment: Moment
    plans: dict[int, Plan] = field(default_factory=dict)
    work: list[Work] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    own: int = 0
    computed: tuple[int, int] = (0, 0)
    before: tuple[int, int, int] = (0, 0, 0)
    seconds: float | None = None
    own_seconds: float = 0.0
    began: float = field(default_factory=time.thread_time)

    def clocked(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function of the method itself gives; its seconds are written down."""
        if torch.compiler.is_compiling():
            return function(*args)
        began = time.thread_time()
        out = function(*args)
        self.own_seconds += time.thread_time() - began
        return out

    @property
    def counts(self) -> list[float]:
        """Rows in each block's first operation."""
        first: dict[int, float] = {}
        for work in self.work:
            first.setdefault(work.operation.block, work.rows)
        return [first.get(i, 0.0) for i in range(len(self.host.blocks))]

    @property
    def cost(self) -> tuple[int, int, int]:
        """Multiply-adds of the unreduced operations, of those computed, and operations of the method itself: of this
        evaluation and, where methods act over steps, of those before it in this call and branch."""
        full, part, own = self.before
        for work in self.work:
            macs, width = self.host.macs(work.operation)
            full += int(work.full * macs + 2 * work.full_pairs * width)
            part += int(work.rows * macs + 2 * work.pairs * width)
        return full, part, own + self.own

    @property
    def ledger(self) -> StepLedger:
        full, part, own = self.cost
        notes = list(dict.fromkeys(self.notes))
        return StepLedger(full / 1e9, part / 1e9, own / 2e9, self.computed, notes, self.seconds, self.own_seconds)

    @property
    def origin(self) -> Tensor:
        raise SessionError(f"{PUT_BACK}, so no token has left; kept(layer) says which rows a block's operations ran on")

    def kept(self, layer: int) -> Tensor:
        """(B, M): the tokens that the rows of a block's operations stand for."""
        if layer not in self.plans:
            raise SessionError(f"block {layer} was not reduced in the last evaluation: all its rows were computed")
        return self.plans[layer].position

    def restore(self, features: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        raise SessionError(f"{PUT_BACK}: there is nothing to restore")

    def lines(self) -> list[str]:
        ledger, shown = self.ledger, [f"{c:g}" for c in self.counts]
        done, of = ledger.computed
        told = [] if of < 2 else [f"{done} of {of} evaluations in this call computed every row"]
        own = f", own work {ledger.gflops_own:.3f} GFLOPs" if ledger.gflops_own else ""
        return [
            f"rows per block {' '.join(shown)}",
            f"{ledger.gflops_full:.2f} -> {ledger.gflops:.2f} GFLOPs in the blocks' operations "
            f"(ceiling {ledger.ceiling:.2f}x{own})",
            *told,
            *ledger.notes,
        ]


class Evaluation:
    """One call of the denoiser. notes: by block and operation, of this call and branch."""

    def __init__(self, site: DenoiserSite, given: dict[str, Any], moment: Moment, branch: Any, state: State) -> None:
        self.site, self.host, self.moment, self.branch, self.state = site, site.host, moment, branch, state
        self.extents = site.host.extents(given)
        self.trace = StepTrace(site.host, moment)
        self.block: dict[int, tuple[Tensor, Tensor | None]] = {}  # what entered each
        self.plans: dict[int, Plan | None] = {}
        self.renews = self.held = self.asked = False  # over steps: all is computed; the stack is not; that was decided
        self.entry = self.after_first = torch.empty(0)  # of the stack: what entered it, and left its first block
        self.first: Signals | None = None

    def memory(self, *context: Any) -> dict[str, Any]:
        """What is remembered over the steps of this call, in this branch."""
        return self.state.of(Lifetime.CALL, self.branch, *context)


class DenoiserSite:
    """What the places in a denoiser share: they are told of every evaluation, every block and every operation.

    A call of a pipeline begins where its scheduler sets its steps. Without one it begins where the time rises, or the
    input's shape, dtype or device changes; `session.begin()` says so itself. Branches of guidance that are asked one
    after the other are told apart by the pipeline's cache context, or else by being asked about the same sample.
    """

    title = "denoiser"

    def __init__(self, bound: Bound) -> None:
        if not isinstance(bound.host, DiffusionHost):
            raise HostError(
                f"{' and '.join(m.card.name for m in bound.program.methods)} acts in a denoiser, and {bound.host.name} "
                "is none; a UNet or transformer of diffusers is, or a pipeline with one"
            )
        self.bound, self.host, self.program = bound, bound.host, bound.program
        self._local = threading.local()
        self._latest: StepTrace | None = None

    # -- on ------------------------------------------------------------------------------------------------------------
    def attach(self, undo: ExitStack) -> None:
        host = self.host
        undo.callback(host.root.register_forward_pre_hook(self._begins, with_kwargs=True).remove)
        undo.callback(host.root.register_forward_hook(self._ended, always_call=True).remove)
        for number, block in enumerate(host.blocks):
            host.stand_in(block, partial(self._block, number, host.own_of(block)), undo)
        for operation in host.operations:
            part = host.part(operation)
            host.stand_in(part, partial(self._operation, operation, host.own_of(part)), undo)
        if (context := getattr(host.root, "cache_context", None)) is not None:
            vars(host.root)["cache_context"] = self._named(context)
            undo.callback(vars(host.root).pop, "cache_context", None)
        if (own := getattr(host.scheduler, "set_timesteps", None)) is not None:
            kept = vars(host.scheduler).get("set_timesteps")
            vars(host.scheduler)["set_timesteps"] = wraps(own)(partial(self._steps_set, own))
            if kept is None:
                undo.callback(vars(host.scheduler).pop, "set_timesteps", None)
            else:
                undo.callback(vars(host.scheduler).__setitem__, "set_timesteps", kept)

    @property
    def trace(self) -> StepTrace | None:
        mine: StepTrace | None = getattr(self._local, "trace", None)
        return mine or self._latest

    # -- where the run is ----------------------------------------------------------------------------------------------
    @property
    def _run(self) -> _Call:
        run: _Call | None = getattr(self._local, "call", None)
        if run is None:
            run = self._local.call = _Call()
        return run

    def begin(self) -> None:
        """A new call of the pipeline: nothing of the one before is used."""
        self._local.call = _Call()

    def _steps_set(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The pipeline sets its steps."""
        out = own(*args, **kwargs)
        self.begin()
        steps = getattr(self.host.scheduler, "timesteps", None)
        self._run.planned = None if steps is None else len(steps)
        return out

    def _named(self, own: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
            before, self._local.context = getattr(self._local, "context", None), name
            try:
                with own(name, **kwargs):
                    yield
            finally:
                self._local.context = before

        return cache_context

    def _begins(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self.host.call(args, kwargs)
        sample = next((v for v in given.values() if isinstance(v, Tensor)), None)
        if sample is None:
            self._local.now = None
            return
        order = int(getattr(self.host.scheduler, "order", 1) or 1)
        time = given.get(self.host.timed)
        run = self._run
        if run.over(sample, time):
            self.begin()
            run = self._run
        branch, number = run.place(sample, time, getattr(self._local, "context", None))
        alone = getattr(self._local, "context", None) is not None
        branches = 1 if alone else self.host.branches(len(sample))
        moment = Moment(number, run.planned, number // order, branches=branches)
        self._local.now = self.starts(Evaluation(self, given, moment, branch, run.state))

    def starts(self, now: Evaluation) -> Evaluation:
        """An evaluation begins."""
        return now

    def ends(self, now: Evaluation) -> None:
        """An evaluation came to its end."""

    def _ended(self, _module: nn.Module, _args: Any, output: Any) -> None:
        now: Evaluation | None = getattr(self._local, "now", None)
        self._local.now = None
        if now is not None and output is not None:
            self.ends(now)
            now.trace.seconds = time.thread_time() - now.trace.began
            self._local.trace = self._latest = now.trace

    # -- blocks and operations -----------------------------------------------------------------------------------------
    def _block(self, number: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        now: Evaluation | None = getattr(self._local, "now", None)
        rows, words = self.host.rows_of(number, args, kwargs)
        if now is None or rows is None:
            return own(*args, **kwargs)
        now.block[number] = rows, words
        try:
            return self.block(now, number, own, args, kwargs)
        finally:
            now.block.pop(number, None)

    def _operation(self, operation: Operation, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        now: Evaluation | None = getattr(self._local, "now", None)
        if now is None or operation.block not in now.block:
            return own(*args, **kwargs)
        names = ("hidden_states", "x", "hidden")
        rows = args[0] if args else next((kwargs[n] for n in names if n in kwargs), None)
        if not isinstance(rows, Tensor) or rows.dim() != 3:
            return own(*args, **kwargs)

        def called(rows: Tensor, **more: Any) -> Any:
            if args:
                return own(rows, *args[1:], **kwargs | more)
            return own(**kwargs | {next(n for n in names if n in kwargs): rows} | more)

        return self.operation(now, operation, rows, called, args, kwargs)

    def block(self, now: Evaluation, number: int, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A block's turn; what it gives."""
        return own(*args, **kwargs)

    def operation(
        self, now: Evaluation, operation: Operation, rows: Tensor, own: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """An operation's turn; what it gives. own: runs it on other rows."""
        return own(rows)


class _Call:
    """One call of a pipeline so far."""

    def __init__(self) -> None:
        self.state = State()
        self.planned: int | None = None
        self.counts: dict[Any, int] = {}
        self._time: float | None = None
        self._shape: Any = None
        self._sample: Callable[[], Any] = lambda: None
        self._version = self._branch = 0

    def over(self, sample: Tensor, time: Any) -> bool:
        """Whether this sample belongs to another call."""
        shape = (sample.shape[-2:] if sample.dim() > 3 else sample.shape[1:], sample.dtype, sample.device)
        other, self._shape = self._shape not in (None, shape), shape
        if self.planned is not None:
            return other or (bool(self.counts) and max(self.counts.values()) >= 2 * self.planned)
        now = _number(time)
        risen = None not in (now, self._time) and now > self._time  # type: ignore[operator]
        return other or risen

    def place(self, sample: Tensor, time: Any, context: str | None) -> tuple[Any, int]:
        """The branch of guidance, and the number of this evaluation in it."""
        version = 0 if sample.is_inference() else sample._version
        same = self._sample() is sample and self._version == version
        self._branch = self._branch + 1 if same and context is None else 0
        self._sample, self._version = _weak(sample), version
        self._time = _number(time)
        self._shape = (sample.shape[-2:] if sample.dim() > 3 else sample.shape[1:], sample.dtype, sample.device)
        branch = (context or self._branch, sample.shape[0])
        number = self.counts.get(branch, 0)
        self.counts[branch] = number + 1
        return branch, number


def _weak(sample: Tensor) -> Callable[[], Any]:
    return weakref.ref(sample)


def _number(time: Any) -> float | None:
    """A time as a number, where that asks nothing of a device."""
    if isinstance(time, Tensor):
        if time.device.type != "cpu" or time.numel() == 0:
            return None
        return float(time.detach().reshape(-1)[0])
    return float(time) if isinstance(time, (int, float)) else None


def at(moment: Moment, operation: Operation, factor: int) -> Moment:
    """The same moment, of one operation."""
    return replace(moment, operation=operation.kind, factor=factor)


def first(out: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """An operation's rows, and what it gives besides."""
    return (out[0], tuple(out[1:])) if isinstance(out, (tuple, list)) else (out, ())


def again(rows: Tensor, rest: tuple[Any, ...]) -> Any:
    return (rows, *rest) if rest else rows


def log_size(size: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, 1, M): what makes a key count as often as there are tokens in it."""
    return size.clamp_min(1e-6).log()[:, None, None].to(dtype)
