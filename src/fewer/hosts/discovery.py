"""The anatomy of a stack, found once per class and config: its root is built small and random from the same config, one
forward of that twin is watched, and what was seen is remembered."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from fewer.compat import pretrained

from . import remembered
from .anatomy import FACTS, Anatomy
from .attention import HostError
from .stacks import Stack
from .twin import TwinError, build, cut, shrink
from .watching import observe

SMALL = 20_000_000  # weights: a root of so many is its own measure
SHALLOW = 6  # blocks, or as many as there are kinds of them, stand for a deep stack

_known: dict[tuple[Any, ...], Anatomy | HostError] = {}


def key_of(root: nn.Module) -> str:
    """What decides a root's anatomy besides its classes' code, as text: its class and its config."""
    config = dict(pretrained(root).config.to_dict())
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "id2label",
                 "label2id", "quantization_config", "_attn_implementation"):  # fmt: skip
        config.pop(name, None)
    cls = base(type(root))
    return f"{cls.__module__}.{cls.__qualname__} {json.dumps(config, sort_keys=True, default=str)}"


_forwards: dict[Any, int] = {}  # every forward met, by number: it lives on here, so that no other gets its id


def classes_of(root: nn.Module) -> set[Any]:
    """The classes whose code a root runs. Matrices do not count, however they are stored."""
    kinds: set[Any] = {base(type(m)) for m in root.modules() if not isinstance(getattr(m, "in_features", None), int)}
    return {c for c in kinds if not c.__module__.startswith("torch.")}


def code_of(root: nn.Module) -> tuple[int, ...]:
    """The forwards of a root's classes: a cell of a notebook that runs again makes other ones of the same name, and
    libraries change those of a class."""
    own = {c.forward for c in classes_of(root)}
    return tuple(sorted(_forwards.setdefault(forward, len(_forwards)) for forward in own))


def base(cls: type) -> type:
    """A class as its author wrote it: FSDP2 puts one of its own before it."""
    return next(c for c in cls.__mro__ if not c.__module__.startswith("torch.distributed"))


def anatomy(stack: Stack) -> Anatomy:
    """The anatomy of a stack, from its root's twin; remembered per class and config.

    Raises   HostError where no twin can be built or watched, saying what was found and what failed.
    """
    key = (key_of(stack.root), code_of(stack.root), stack.blocks)
    if key not in _known:
        classes, fact = classes_of(stack.root), f"{key[0]} {' '.join(stack.blocks)}"
        found = remembered.read("anatomy", fact, classes, FACTS)
        if found is None:
            found = _observed(stack)
            if isinstance(found, Anatomy):
                remembered.write("anatomy", fact, classes, found)
        _known[key] = found
    known = _known[key]
    if isinstance(known, HostError):
        raise known.with_traceback(None)
    return known


def _observed(stack: Stack) -> Anatomy | HostError:
    """What is seen of a root's twin, or why nothing is. A root that is small itself needs no smaller twin."""
    why: HostError | None = None
    for smaller in (True, False):
        if not smaller and sum(p.numel() for p in stack.root.parameters()) > SMALL:
            break
        try:
            return replace(observe(twin_of(stack.root, smaller), stack.blocks), shrunk=smaller)
        except Exception as error:  # whatever a stranger's code raises
            known = isinstance(error, (HostError, TwinError))
            said = str(error) if known else f"watching a twin of it ended in {type(error).__name__}: {error}"
            why = why or HostError(said)
    assert why is not None
    return why


def twin_of(root: nn.Module, smaller: bool = True, depth: int | None = None) -> nn.Module:
    """A random model of a root's class and config, as small as they allow. depth: see `shrink`."""
    config: Any = copy.deepcopy(root.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return cut(build(base(type(root)), shrink(config, depth) if smaller else config), root)


def shallow(root: nn.Module, found: Anatomy) -> tuple[nn.Module, Anatomy]:
    """A twin with a few blocks of each kind that a deep root has, and its anatomy; one of all blocks where the few
    would be other ones than the root's.

    Raises   TwinError where there is none.
    """
    if found.shrunk and not found.reads and len(found.layers) > SHALLOW:
        with suppress(Exception):  # whatever a stranger's code raises about a config with fewer layers
            twin = twin_of(root, depth=SHALLOW)
            blocks = tuple(layer.path for layer in found.layers if _there(twin, layer.path))
            seen = observe(twin, blocks)
            if 0 < len(blocks) < len(found.layers) and _kinds(seen) == _kinds(found):
                return twin, seen
    return twin_of(root, found.shrunk), found


def _there(twin: nn.Module, path: str) -> bool:
    try:
        return twin.get_submodule(path) is not None
    except AttributeError:
        return False


def _kinds(found: Anatomy) -> list[Any]:
    """What is known of a stack, without the number and the places of its blocks."""
    kinds: list[Any] = [replace(found, layers=())]
    for layer in found.layers:
        if (kind := replace(layer, path="")) not in kinds:
            kinds.append(kind)
    return kinds
