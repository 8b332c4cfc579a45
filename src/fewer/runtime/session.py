"""The session `fewer.apply` returns: programs, the sites that carry them out, and what can be read of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ..adapters.clip_guide import Guide
from ..core import Reducer, Site
from ..core.cache.quantised import rounded
from ..core.learned import ModuleListOf, Modules
from ..core.visual.layout import Layout
from ..hosts import MATRICES, DecoderHost, Host, VisionLanguageHost
from ..spec import text
from . import modules as trained
from .costs import CacheLedger, Ledger, StepLedger
from .program import Bound, Execution, Program, SessionError, check_free, check_readers
from .sites import bridge
from .sites.blocks import BlockSite
from .sites.bridge import BridgeSite, Positions
from .sites.denoising import DenoisingSite
from .sites.kv_cache import KVCacheSite
from .sites.loss import LossSite
from .sites.operations import OperationSite
from .sites.scan import StateSpaceRun
from .sites.text import TextSite
from .sites.tower import TowerSite
from .trace import CacheTrace, Readable, Trace

UNSEEN = "no forward pass yet: call the model first"


class ActiveSite(Protocol):
    """A place where tokens leave, with methods on.

    title   of it, in a report
    attach  takes part in the model's passes until `undo` closes; where it fails, what it did before is undone
    trace   what its last pass left to be read; None where there is nothing
    """

    title: str

    def attach(self, undo: ExitStack) -> None: ...
    @property
    def trace(self) -> Readable | None: ...


class Session:
    """A model with methods on. Use it as a context manager, or call `remove()`; both may be done twice.

    model       as it was given to `fewer.apply`
    methods     the reducers, in the order they act at a shared site
    execution   how samples with different counts are run: "padded", "packed" or "masked"
    host        the stack of blocks they act in: of a vision-language model its language model
    modules     the methods' trained modules, one nn.ModuleList each

    What can be read afterwards (counts, kept, origin, restore, ledger, report) is of the last pass of this thread; of
    a decoder, of the last cache.
    """

    def __init__(
        self, methods: Sequence[Reducer], bounds: Sequence[Bound], shown: ActiveSite, beside: Sequence[ActiveSite] = ()
    ) -> None:
        """bounds: the stacks of blocks with methods in them, which share these; the first is the one that is shown."""
        self.methods, self.bounds = tuple(methods), tuple(bounds)
        self._shown, self._sites = shown, (shown, *beside)
        self._undo = ExitStack()
        self.carried: Any = None  # what the model carries of it, see `saving`

    def beside(self, methods: Sequence[Reducer], bound: Bound, site: ActiveSite) -> Session:
        """The same with one more site, whose passes are not shown. methods: all of them, in order."""
        return Session(methods, [*self.bounds, bound], self._shown, [*self._sites[1:], site])

    @property
    def _bound(self) -> Bound:
        return self.bounds[0]

    @property
    def model(self) -> nn.Module:
        return self._bound.model

    @property
    def host(self) -> Host:
        return self._bound.host

    @property
    def execution(self) -> Execution:
        return self._bound.program.execution

    @cached_property
    def modules(self) -> Modules:
        if len(self.bounds) == 1:
            return self._bound.modules
        left = [pair for b in self.bounds for pair in zip(b.program.methods, b.modules, strict=True)]
        found = (next(i for i, (m, _) in enumerate(left) if m is method) for method in self.methods)
        return ModuleListOf(left.pop(i)[1] for i in found)

    @property
    def training(self) -> bool:
        """Whether trained methods take their training form."""
        return self._bound.training

    @property
    def mask_eps(self) -> float:
        """What a learned mask leaves of hidden tokens while it is trained."""
        return self._bound.mask_eps

    @mask_eps.setter
    def mask_eps(self, eps: float) -> None:
        for bound in self.bounds:
            bound.mask_eps = eps

    # -- on and off ----------------------------------------------------------------------------------------------------
    def _attach(self) -> None:
        with ExitStack() as undo:  # if a later step fails, the earlier ones come off again
            self.host.enter(undo)
            if self.host.learned is not None:
                self.host.learned.attach(undo)
            for site in self._sites:
                site.attach(undo)
            for bound in self.bounds:
                _round(bound, undo)
            self._undo = undo.pop_all()

    def remove(self) -> None:
        """Take everything off: the model is as it was, to the bit. What was traced stays readable."""
        self._undo.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def begin(self) -> None:
        """A new call of a pipeline of many steps: what was kept over the steps of the one before is forgotten."""
        for site in self._sites:
            if (begin := getattr(site, "begin", None)) is not None:
                begin()

    def save_modules(self, path: str | Path, card: Mapping[str, str] | None = None) -> list[Path]:
        """Write the methods' trained modules: into a folder, or as one .safetensors file. Returns the files.

        card: what to say about them besides their method and shape, kept in the files' metadata.
        """
        holding = [b for b in self.bounds if any(map(len, b.modules))] or [self._bound]
        return [f for b in holding for f in trained.save(path, b.program.methods, b.modules, b.host, card or {})]

    def save(self, folder: str | Path) -> None:
        """Write model, methods and trained modules into a folder, from which `fewer.load(folder)` gives both back. Of a
        model of transformers `model.save_pretrained(folder)` does the same."""
        if self.carried is None:
            raise SessionError("only a session that fewer.apply has put on can be saved with its model")
        self.carried.save(folder)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the methods' trained modules alone. While the session is on, `model.parameters()` holds them too."""
        return (p for bound in self.bounds for p in bound.modules.parameters())

    # -- the trace -----------------------------------------------------------------------------------------------------
    @property
    def trace(self) -> Readable:
        """What the last pass left to be read.

        Raises   SessionError before the first.
        """
        trace = self._shown.trace
        if trace is None:
            raise SessionError(UNSEEN)
        return trace

    @property
    def last(self) -> Trace:
        """The last pass over the blocks; of a decoder the last over a prompt, where methods act between its blocks."""
        trace = self._shown.trace
        if isinstance(trace, CacheTrace):
            if not self.inside:
                raise SessionError(
                    "a session on the cache traces rows, not features: read kept(layer), counts, ledger, report()"
                )
            trace = trace.prompt
        if not isinstance(trace, Trace):
            raise SessionError(UNSEEN)
        return trace

    @property
    def counts(self) -> list[int] | list[float] | Tensor:
        """Tokens after each block, (layers, B) where samples differ; of a cache the rows each layer holds, averaged
        over samples and KV heads."""
        return self.trace.counts

    @property
    def ledger(self) -> Any:
        """What the last pass cost, a `Ledger`; what the last cache holds, a `CacheLedger`; what a denoiser computed, a
        `StepLedger`."""
        ledger: Ledger | CacheLedger | StepLedger = self.trace.ledger
        return ledger

    @property
    def origin(self) -> Tensor:
        """(B, N0): the final row of each input token, -1 = dropped."""
        return self.trace.origin

    def kept(self, layer: int) -> Tensor:
        """(B, M): the input tokens the rows after `layer` stand for, row by row; of a cache (B, G, M), the input
        positions of the rows the layer holds. -1 pads."""
        trace = self.trace
        return trace.kept(layer if isinstance(trace, CacheTrace) else range(len(self.host.blocks))[layer])

    def restore(self, features: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """Final rows spread back over the patch grid. features: (B, M, C), prefix included.

        Returns (B, height, width, C), or (B, N0 - prefix, C) where the model's patches form no known grid.
        """
        return self.trace.restore(features, fill)

    def report(self) -> str:
        """The last pass in words: methods, tokens or rows, cost, the methods' own share, notes."""
        others = [(site.title, trace) for site in self._sites[1:] if (trace := site.trace) is not None]
        told = [f"{title}: {line}" for title, trace in others for line in trace.lines()]
        return "\n".join([" ".join(map(text, self.methods)), *self.trace.lines(), *told])

    # -- of a decoder --------------------------------------------------------------------------------------------------
    @property
    def inside(self) -> bool:
        """Whether methods act between blocks, not on the cache alone."""
        return not isinstance(self._shown, KVCacheSite) or self._shown.between_blocks

    @property
    def remembered(self) -> dict[int, dict[str, Any]]:
        """What methods on the cache noted in the last pass without one."""
        if not isinstance(self._shown, KVCacheSite):
            raise SessionError(f"{self.host.name} keeps no cache, so methods note nothing for one")
        return self._shown.remembered

    # -- of a vision-language model ------------------------------------------------------------------------------------
    @property
    def _bridge(self) -> BridgeSite:
        site = next((site for site in self._sites if isinstance(site, BridgeSite)), None)
        if site is None:
            raise SessionError(
                f"{self.host.name} is no vision-language model, so nothing stands in its prompts but text"
            )
        return site

    @property
    def guide(self) -> Guide | None:
        """Tells how well a patch fits a question, where one was given."""
        return self._bridge.guide

    def ask(self, questions: Sequence[str] | Tensor) -> None:
        """What the next prompts ask, one question each, for methods that compare patches with it through a guide."""
        self._bridge.ask(questions)

    @property
    def answers(self) -> Tensor | None:
        """(B, S) bool, text that is to be learned: no method may read it."""
        return self._bridge.answers

    @answers.setter
    def answers(self, answers: Tensor | None) -> None:
        self._bridge.answers = answers

    @property
    def layout(self) -> Layout:
        """Where the visual rows of the last prompts stood."""
        return self.last.layout

    def seen(self, layer: int = -1) -> Tensor:
        """(B, S) bool: the visual rows of the last prompts that are left after a block; -1 is the last block's."""
        return self.last.seen(layer)

    @property
    def visual_counts(self) -> list[float]:
        """Visual rows after each block, averaged over the prompts (synchronises)."""
        return self.last.visual_counts


def _round(bound: Bound, undo: ExitStack) -> None:
    """Round what enters the blocks' matrices, for methods that come with few bits."""
    bits = min((m.activation_bits for m in bound.program.methods if m.activation_bits is not None), default=None)
    if bits is None:
        return
    for block in bound.host.blocks:
        for module in block.modules():
            if type(module).__name__ in MATRICES:
                undo.callback(module.register_forward_pre_hook(partial(_rounded_input, bits)).remove)


def _rounded_input(bits: int, _module: nn.Module, args: tuple) -> tuple:
    return (rounded(args[0], bits), *args[1:])


def start(
    model: nn.Module, methods: Sequence[Reducer], execution: Execution, modules: nn.Module | str | Path | None,
    host: Host, guide: Guide | nn.Module | None = None, positions: Positions = "kept",
) -> Session:  # fmt: skip
    """Put methods into a model; `fewer.apply` says what the arguments are and what is raised."""
    check_free(host)
    check_readers(methods)
    session = _composed(model, methods, execution, modules, host, guide, positions)
    session._attach()
    return session


def bind(
    model: nn.Module, host: Host, methods: Sequence[Reducer], execution: Execution,
    modules: nn.Module | str | Path | None,
) -> Bound:  # fmt: skip
    """A program for these methods in a model, with their modules: loaded, handed over or built."""
    program = Program.of(methods, execution, host)
    return Bound(model, host, program, trained.prepare(model, host, program.methods, program.stages, modules))


DOORS: dict[Site, Callable[[Bound], ActiveSite]] = {
    Site.TEXT: TextSite, Site.LOSS: LossSite, Site.AROUND_OPERATION: OperationSite, Site.DENOISING: DenoisingSite,
}  # fmt: skip
"""Places that need no more than a program: what carries it out there."""


def _composed(
    model: nn.Module, methods: Sequence[Reducer], execution: Execution, modules: nn.Module | str | Path | None,
    host: Host, guide: Guide | nn.Module | None, positions: Positions,
) -> Session:  # fmt: skip
    """The sites of a session, by where its methods act and what kind of host it has."""
    for door, opens in DOORS.items():
        there = [method.site is door for method in methods]
        if not any(there):
            continue
        mine, others = trained.divided(modules, there)
        bound = bind(model, host, [m for m in methods if m.site is door], execution, mine)
        bound.guide = guide
        if all(there):
            return Session(methods, [bound], opens(bound))
        rest = [m for m in methods if m.site is not door]
        session = _composed(model, rest, execution, others, host, guide, positions)
        return session.beside(methods, bound, opens(bound))
    if not isinstance(host, DecoderHost):
        bound = bind(model, host, methods, execution, modules)
        return Session(methods, [bound], BlockSite(bound, kind=StateSpaceRun if host.kind == "scan" else None))
    if not isinstance(host, VisionLanguageHost):
        bound = bind(model, host, methods, execution, modules)
        return Session(methods, [bound], KVCacheSite(bound))
    bridge.check(host, methods, positions)
    inside = [m for m in methods if bridge.in_tower(m)]
    behind = [m for m in methods if not bridge.in_tower(m)]
    theirs, mine = trained.divided(modules, [bridge.in_tower(m) for m in methods])
    bound = bind(model, host, behind, execution, mine)
    tower = None
    if inside:
        assert host.tower is not None and host.tower_module is not None, "the check above says so"
        tower = TowerSite(bind(host.tower_module, host.tower, inside, "padded", theirs), host)
    site = BridgeSite(bound, tower, None if isinstance(guide, nn.Module) else guide, positions)
    cache = KVCacheSite(bound, site)
    site.note = cache.note
    return Session(methods, [bound] if tower is None else [bound, tower.bound], cache, [site])
