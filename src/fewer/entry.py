"""apply: the one door. It asks where the methods act and opens the session for that place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from . import session
from .core import Reducer, Site
from .session import Execution, Session, SessionError
from .spec import parse


def apply(
    model: nn.Module,
    method: str | Reducer | Sequence[str | Reducer],
    *,
    execution: Execution = "padded",
    modules: nn.Module | str | Path | None = None,
    **parameters: Any,
) -> Session:
    """Put a method, or several, into a model. The model is then called as before, `generate()` included.

    model       a model of transformers or timm; see `fewer doctor`
    method      a name with its parameters as keywords, a text form ("tome:r=8", "snapkv:keep=0.5,window=64"), a
                reducer, or a list of these. Methods on the KV cache of a decoder ("snapkv", "streamingllm", ...) give a
                `CacheSession`.
    execution   how samples with different counts are run; see Session
    modules     trained modules of the method: `session.modules` of an earlier session (moved to the model's device
                and dtype), a file or folder written by `save_modules`, a packaged model's name, or "untrained" for
                random ones. By default those the package has for the packaged model at hand.

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
    reducers = [parse(item, **parameters) for item in items]
    if any(reducer.site is Site.KV_CACHE for reducer in reducers):
        from . import caching  # needs transformers, which methods inside the network may do without

        return caching.start(model, reducers)
    return session.start(model, reducers, execution, modules)
