"""apply: the one door. It asks where the methods act and opens the session for that place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from torch import nn

from .. import hosts
from ..adapters.clip_guide import Guide
from ..adapters.kvpress import Press, adapt
from ..core import Reducer, Site
from ..core.denoising import OperationReducer, StepReducer
from ..core.visual import acts_on_visual_rows
from ..spec import parse, text
from . import saving, verify, verify_visual
from .learned_rows import LearnedRows
from .modules import UNTRAINED, ModulesError
from .program import Execution, SessionError
from .session import Session, start
from .sites.bridge import Positions, in_tower


def apply(
    model: nn.Module,
    method: str | Reducer | Press | Sequence[str | Reducer | Press],
    *,
    execution: Execution = "padded",
    modules: nn.Module | str | Path | None = None,
    guide: Guide | nn.Module | None = None,
    positions: Positions = "kept",
    **parameters: Any,
) -> Session:
    """Put a method, or several, into a model. The model is then called as before, `generate()` included.

    model       a model of transformers, timm or diffusers, or a pipeline of diffusers; see `fewer doctor`
    method      a name with its parameters as keywords, a text form ("tome:r=8", "snapkv:keep=0.5,window=64"), a
                reducer, a press of kvpress (see `fewer.adapters.kvpress`), or a list of these
    execution   how samples with different counts are run; see Session
    modules     trained modules of the method: `session.modules` of an earlier session (moved to the model's device
                and dtype), a file or folder written by `save_modules`, a packaged model's name, or "untrained" for
                random ones. By default those the package has for the packaged model at hand.
    guide       who knows more about which tokens matter, where a method asks: for vision-language models how well
                patches fit a question (see `fewer.Guide`); for methods on the training loss a reference model
    positions   for vision-language models: "kept", or "compact" to number rows anew where visual ones have left

    Raises   UnknownMethod, SpecError, BudgetError for the method; HostError for the model; ModulesError for missing
             or unfitting trained modules; SessionError for a second session on the same model. The model is left as
             it was.

    >>> session = fewer.apply(model, "tome", r=8)  # doctest: +SKIP
    """
    items = list(method) if isinstance(method, Sequence) and not isinstance(method, str) else [method]
    if not items:
        raise SessionError("the list of methods is empty: give at least one")
    if parameters and len(items) > 1:
        raise SessionError("give parameters inside each method when several are stacked, e.g. 'tome:r=8'")
    reducers = [parse(adapt(item), **parameters) for item in items]
    if execution not in get_args(Execution):
        raise SessionError(f"execution={execution!r}: choose {', '.join(get_args(Execution))}")
    model, pipe = hosts.denoiser(model)
    host = hosts.find(model)
    if isinstance(host, hosts.DiffusionHost):
        host.pipe = pipe
    host.learned = LearnedRows.of(model)
    if host.learned is not None:
        host.learned.check(host, reducers)
    opened = _open(model, host, reducers, execution, modules, guide, positions)
    try:
        if isinstance(modules, str | Path) and modules != UNTRAINED and not any(True for _ in opened.parameters()):
            raise ModulesError(f"{', '.join(map(text, reducers))}: no trained modules to load; leave modules= out")
        if not isinstance(host, hosts.DiffusionHost):
            saving.carry(opened, saving.Setup(tuple(reducers), execution, positions, guide), apply)
    except BaseException:
        opened.remove()
        raise
    return opened


def _open(
    model: nn.Module, host: hosts.Host, reducers: list[Reducer], execution: Execution,
    modules: nn.Module | str | Path | None, guide: Guide | nn.Module | None, positions: Positions,
) -> Session:  # fmt: skip
    """The session of the place where the methods act."""
    if _in_denoiser(host, reducers):
        return start(model, reducers, execution, modules, host, guide)
    if isinstance(host, hosts.VisionLanguageHost):
        for reducer in reducers:
            verify_visual.check(host, reducer, text(reducer))
        verify.check(host, [r for r in reducers if not in_tower(r)], text)
        if host.tower is not None:
            verify.check(host.tower, [r for r in reducers if in_tower(r)], text)
        return start(model, reducers, execution, modules, host, guide, positions)
    if (guide is not None and not any(r.site is Site.LOSS for r in reducers)) or positions != "kept":
        raise SessionError(
            f"guide= and positions= are for vision-language models, and {host.name} is none; "
            "beside these, methods on the training loss take a reference model as guide="
        )
    if visual := [text(reducer) for reducer in reducers if acts_on_visual_rows(reducer)]:
        raise hosts.HostError(
            f"{', '.join(visual)} acts on the visual tokens of a vision-language model, and {host.name} is "
            "none; a whole one is (AutoModelForImageTextToText)"
        )
    cached = [text(reducer) for reducer in reducers if reducer.site is Site.KV_CACHE]
    if cached and not isinstance(host, hosts.DecoderHost):
        raise hosts.HostError(
            f"{', '.join(cached)} acts on the KV cache of a decoder, and {host.name} keeps none; a model with a causal "
            "language model inside (AutoModelForCausalLM, AutoModelForImageTextToText) does"
        )
    verify.check(host, reducers, text)
    if any(reducer.site.in_blocks for reducer in reducers):
        read = verify.reading(model, host)
        if read.why:
            raise hosts.HostError(
                f"what stands behind the blocks of {host.name} in {type(model).__name__} cannot do with fewer rows "
                f"({read.why}); apply the method to the model inside, and put rows back with session.restore"
            )
        host.reads, host.reads_fillers = read.rows, read.fillers
    return start(model, reducers, execution, modules, host, guide)


def _in_denoiser(host: hosts.Host, reducers: Sequence[Reducer]) -> bool:
    """Whether this is a denoiser.

    Raises   HostError where a method is for one and the host is none, or the other way round; SessionError for several.
    """
    theirs = [isinstance(r, OperationReducer | StepReducer) for r in reducers]
    one = isinstance(host, hosts.DiffusionHost)
    if wrong := [text(r) for r, mine in zip(reducers, theirs, strict=True) if mine != one]:
        raise hosts.HostError(
            f"{', '.join(wrong)} shortens the sequence from block to block, and {host.name} is a denoiser, which needs "
            "all its rows: choose a method that puts them back, such as tomesd"
            if one
            else f"{', '.join(wrong)} acts in a denoiser, and {host.name} is none: give a UNet or transformer of "
            "diffusers, or a pipeline with one"
        )
    if one and len(reducers) > 1:
        raise SessionError(
            f"{' and '.join(map(text, reducers))}: a denoiser takes one method at a time, for what one puts back or "
            "reuses the other would have to know"
        )
    return one
