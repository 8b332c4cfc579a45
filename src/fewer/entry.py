"""apply: the one door. It asks where the methods act and opens the session for that place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from . import session
from .core import Reducer, Site
from .session import Execution, Session
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
    modules     trained modules of the method, see `fewer.session.apply`

    Raises   UnknownMethod, SpecError, BudgetError for the method; HostError for the model; ModulesError for missing
             or unfitting trained modules; SessionError for a second session on the same model. The model is left as
             it was.

    >>> session = fewer.apply(model, "tome", r=8)  # doctest: +SKIP
    """
    items = list(method) if isinstance(method, Sequence) and not isinstance(method, str) else [method]
    reducers = [parse(item, **(parameters if len(items) == 1 else {})) for item in items]
    if any(reducer.site is Site.KV_CACHE for reducer in reducers):
        from . import caching  # needs transformers, which methods inside the network may do without

        return caching.start(model, reducers)
    return session.apply(model, method, execution=execution, modules=modules, **parameters)
