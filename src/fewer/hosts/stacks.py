"""Runs of blocks, found in a model's modules: nothing here knows a model by name."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

MIXES = re.compile(r"attention|attn|mixer", re.IGNORECASE)  # in the class name of what mixes tokens
PART = re.compile(
    r"(attention|attn|mixer)(?!\w*(layer|block))\w*$", re.IGNORECASE
)  # the class name of a part of a block, not of one


@dataclass(frozen=True, eq=False)
class Stack:
    """A run of blocks in a model. path: of the root; blocks: paths from it."""

    root: nn.Module
    path: str
    blocks: tuple[str, ...]


def _mixes(block: nn.Module) -> bool:
    return mixer(block) is not None


def mixer(block: nn.Module) -> str | None:
    """The outermost part of a block that mixes tokens, told by what its class is called, or what it is called there:
    norms and the like, which have no parts, may be called after what they stand beside."""
    parts = [(p, m) for p, m in block.named_modules() if p]
    by_class = (p for p, m in parts if MIXES.search(type(m).__name__))
    by_name = (p for p, m in parts if MIXES.search(p.rpartition(".")[2]) and list(m.children()))
    return next(by_class, None) or next(by_name, None)


def stacks(model: nn.Module) -> list[Stack]:
    """All runs of blocks of a model, by the models that own them, outermost first."""
    from transformers import PreTrainedModel

    found: list[Stack] = []
    inside: list[str] = []
    owners = [(path, m) for path, m in model.named_modules() if isinstance(m, PreTrainedModel) and _starts(m)]
    for path, module in model.named_modules():
        if any(path.startswith(f"{p}.") for p in inside) or not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        if not any(map(_mixes, module)) or any(PART.search(type(m).__name__) for m in module):
            continue
        if isinstance(module, nn.Sequential) and len({type(m) for m in module}) > 1:
            continue
        inside.append(path)
        owner = [(p, m) for p, m in owners if not p or path.startswith(f"{p}.")]
        if not owner:
            continue
        at, root = owner[-1]
        start = len(at) + 1 if at else 0
        found.append(Stack(root, at, tuple(f"{path}.{i}"[start:] for i in range(len(module)))))
    return found


def in_lists(model: nn.Module) -> bool:
    """Whether attention parts stand in a list of their own, without what else makes a block."""
    lists = (list(m) for m in model.modules() if isinstance(m, nn.ModuleList))
    return any(len(parts) > 1 and all(PART.search(type(m).__name__) for m in parts) for parts in lists)


def _starts(model: Any) -> bool:
    """Whether a model can be called with what a user has, and not with features of another part of it."""
    parameters = inspect.signature(type(model).forward).parameters
    return getattr(model, "main_input_name", "input_ids") in parameters or "input_ids" in parameters
