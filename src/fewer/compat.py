"""What differs between releases of transformers, in one place. Nothing is asked of a version number: names of arguments
and fields are asked of the model, or of transformers' own classes.

Met so far, oldest first:

    5.23   `past_key_values`, Mamba's `cache_params`
    5.24   both are `cache`, in signatures and outputs; the old names warn
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Of a forward's argument and of an output's field, newest first.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


@lru_cache(maxsize=1024)
def _named(function: Any) -> str | None:
    parameters = inspect.signature(function).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """What a forward calls its cache; None where it takes none.

    >>> def forward(self, input_ids, past_key_values=None): ...
    >>> cache_argument(forward)
    'past_key_values'
    """
    return _named(getattr(forward, "__func__", forward))


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, whatever the caller calls it; None where there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments without its cache, under any name."""
    return {name: value for name, value in arguments.items() if name not in CACHE_NAMES}


def _inside(wrapper: Any) -> Any:
    """What PEFT, torch.compile or DDP wrapped; None where nobody did."""
    parts = vars(wrapper).get("_modules", {})
    return next((parts[name] for name in ("base_model", "model", "_orig_mod", "module") if name in parts), None)


def maps_wanted() -> bool:
    """Whether the model that runs on this thread was called with `output_attentions=True`."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collected = capturing._active_collector.get() if capturing is not None else None
    return collected is not None and "attentions" in collected


def virtual_tokens(model: Any) -> int:
    """How many learned rows PEFT puts in front of every input: prefix tuning, prompt tuning and the like."""
    configs: Any = getattr(model, "peft_config", None)
    active = getattr(model, "active_adapter", None)
    config: Any = configs.get(active) if isinstance(configs, Mapping) and isinstance(active, str) else None
    return int(config.num_virtual_tokens or 0) if getattr(config, "is_prompt_learning", False) else 0


def pretrained(model: nn.Module) -> PreTrainedModel:
    """The same model, where it is asked for its config, its embeddings, or to be saved."""
    return cast("PreTrainedModel", model)


def cached(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a model, or its `generate`, a cache: `model(ids, **cached(model, cache))`.

    Raises   TypeError where the model takes none.
    """
    name, inner = cache_argument(model.forward), model
    while name is None and (inner := _inside(inner)) is not None:
        name = cache_argument(inner.forward)
    if name is None:
        raise TypeError(f"{type(model).__name__} takes no cache: its forward names none of {', '.join(CACHE_NAMES)}")
    return {name: cache}


def cache_of(output: Any) -> Any:
    """The cache a model's output holds; None where it holds none."""
    fields: Any = getattr(output, "keys", tuple)()
    return next((output[name] for name in CACHE_NAMES if name in fields), None)


def unchecked(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's bound forward without the gradient checkpointing that transformers wraps around it: who runs the block
    checkpoints it once, not twice."""
    inner: Any = getattr(forward, "__func__", None)
    if getattr(getattr(inner, "__code__", None), "co_name", "") != "forward_with_checkpointing":
        return forward
    while inner.__code__.co_name == "forward_with_checkpointing":
        inner = inner.__wrapped__
    return inner.__get__(cast(MethodType, forward).__self__)
