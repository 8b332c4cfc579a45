"""What was found out about a class, kept in the cache folder, so that the next process need not find out again.

Facts are JSON: nothing is unpickled, and functions are written by their names in torch. An entry holds for one class
and config, one release of torch, transformers and this package, and one state of the class's own source file.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fewer.folders import cache_folder

SPACES: dict[str, Any] = {"Tensor": torch.Tensor, "torch": torch, "functional": F, "nn": torch._C._nn}


class _Unwritable(TypeError):
    """Something that has no written form."""


def read(what: str, key: str, classes: Iterable[type[nn.Module]], kinds: Iterable[type]) -> Any:
    """What is remembered of a model's classes, of one of some kinds of facts; None where nothing is, or nothing that
    holds.

    what: the kind of fact; key: what decides it besides the classes.
    """
    try:
        kept = json.loads(_file(what, key, classes).read_text())
        return _read(kept["fact"], {kind.__name__: kind for kind in kinds}) if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write(what: str, key: str, classes: Iterable[type[nn.Module]], fact: Any) -> None:
    """Remember a fact. What cannot be written, or has no place to be, is found out again next time."""
    try:
        text = json.dumps({"key": key, "fact": _written(fact)})
        file = _file(what, key, classes)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as scratch:
            scratch.write(text)
        os.replace(scratch.name, file)  # all or nothing, whoever else writes it
    except (_Unwritable, OSError, AttributeError):
        return


def _file(what: str, key: str, classes: Iterable[type[nn.Module]]) -> Path:
    """Raises OSError where a class was written in no file, as in a notebook: it may be written anew at any time."""
    sources = {inspect.unwrap(cls.forward).__code__.co_filename for cls in classes}
    state = " ".join([what, key, _releases(), *sorted(_stamp(Path(source)) for source in sources)])
    return cache_folder() / "hosts" / f"{what}-{hashlib.sha256(state.encode()).hexdigest()[:32]}.json"


@cache
def _releases() -> str:
    """Of what decides the facts besides the class: libraries, and this package's own files."""
    import transformers

    versions = f"torch {torch.__version__} transformers {transformers.__version__}"
    here = Path(__file__).parent.parent
    return " ".join([versions, *(_stamp(file) for file in sorted(here.rglob("*.py")))])


def _stamp(file: Path) -> str:
    stat = file.stat()
    return f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}"


def _written(value: Any) -> Any:
    if isinstance(value, Enum):
        return _written(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {"@": type(value).__name__, **{f.name: _written(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, tuple):
        return {"@": "tuple", "of": [_written(v) for v in value]}
    if isinstance(value, list):
        return [_written(v) for v in value]
    if isinstance(value, dict):
        return {"@": "dict", "of": [[_written(k), _written(v)] for k, v in value.items()]}
    if isinstance(value, (torch.dtype, torch.device, torch.memory_format)):
        return {"@": type(value).__name__, "of": str(value).removeprefix("torch.")}
    if value is Ellipsis:
        return {"@": "ellipsis"}
    if isinstance(value, slice):
        return {"@": "slice", "of": [_written(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, type):
        return {"@": "class", "of": [value.__module__, value.__qualname__]}
    name = getattr(value, "__name__", "")
    for space, holder in SPACES.items():
        if name and getattr(holder, name, None) is value:
            return {"@": "function", "of": [space, name]}
    raise _Unwritable(f"{value!r} has no written form")


def _read(kept: Any, kinds: dict[str, type]) -> Any:
    if isinstance(kept, list):
        return [_read(v, kinds) for v in kept]
    if not isinstance(kept, dict):
        return kept
    what: str = kept["@"]
    of: Any = kept.get("of")
    if what in kinds:
        return kinds[what](**{name: _read(v, kinds) for name, v in kept.items() if name != "@"})
    match what:
        case "tuple":
            return tuple(_read(v, kinds) for v in of)
        case "dict":
            return {_read(k, kinds): _read(v, kinds) for k, v in of}
        case "dtype" | "memory_format":
            return getattr(torch, of)
        case "class":  # of a model that is at hand, so that its module is loaded
            return attrgetter(of[1])(sys.modules[of[0]])
        case "device":
            return torch.device(of)
        case "ellipsis":
            return Ellipsis
        case "slice":
            return slice(*(_read(v, kinds) for v in of))
        case "function":
            return getattr(SPACES[of[0]], of[1])
    raise ValueError(f"{what!r} is no kind of fact")
