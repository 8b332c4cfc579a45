"""What every benchmark is told, and what `fewer bench` measures when nobody says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from fewer.core import Remove
from fewer.hosts import Host
from fewer.models.device import usable
from fewer.registry import names
from fewer.spec import parse, text

UNREDUCED = "unreduced"
DTYPES = ("float32", "bfloat16", "float16")
RANDOM = ("random", "random_cache")  # what nobody may lose to


@dataclass(frozen=True)
class Settings:
    """What to measure and how: what every kind of model knows. The kinds' own settings add to it.

    methods    text forms; empty = the default list, all: the whole of it, not only its telling rows
    limit      items, 0 = all
    repeats    timed comparisons
    threads    torch threads, 0 leaves them; one is timed by its own clock, which other work on the machine does not
               disturb

    Raises   ValueError for a value that cannot be.
    """

    model: str = "vit-fashion"
    data: str = "embedded"
    methods: tuple[str, ...] = ()
    all: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    repeats: int = 4
    limit: int = 1000
    seed: int = 0
    threads: int = 1
    LEAST: ClassVar[Mapping[str, int]] = {"repeats": 1, "limit": 0, "threads": 0}

    def __post_init__(self) -> None:
        for name, least in self.LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: give at least {least}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: give {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
        usable(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


# Four levels on the embedded model (12 blocks, 196 patches and a class token): about 131, 100 and 66 of 197 tokens
# per block, averaged over attention and MLP. `keep=0.7` at blocks 3, 6, 9 and `r=11` in each block both mean 131;
# `keep=0.5` and `r=16` mean 100; `keep=0.15`, `r=26` and ATS, which decides by itself, 66; the last level keeps 8
# patches from block 3 on. Methods that act before a block, not inside it, keep a little more for the same mean. Each
# level has `random`, the method nobody may lose to.
TWO_THIRDS = (
    "random:keep=0.7", "grid:keep=0.7", "radial:keep=0.7", "pool:keep=0.7", "cls_topk:keep=0.7",
    "tome:r=11", "tofu:r=11", "diffrate:r=13", "evit:keep=0.7", "ppt:r=48", "atc:keep=0.7", "tps:keep=0.7",
    "token_transforming:keep=0.7", "dpc_knn:keep=0.7", "kmedoids:keep=0.7", "dynamicvit:keep=0.7", "spvit:keep=0.7",
)  # fmt: skip
HALF = (
    "random:keep=0.5", "cls_topk:keep=0.5", "tome:r=16", "evit:keep=0.5", "atc:keep=0.5", "dynamicvit:keep=0.5",
    "tokenlearner",
)  # fmt: skip
THIRD = ("random:keep=0.15", "cls_topk:keep=0.15", "tome:r=26", "ats")
TELLING = (  # what differs: of two levels with their random row, and of the last
    "random:keep=0.5", "cls_topk:keep=0.5", "tome:r=16", "evit:keep=0.5", "atc:keep=0.5", "dynamicvit:keep=0.5",
    "random:keep=0.15", "cls_topk:keep=0.15", "tome:r=26", "tokenlearner:tokens=8,layers=3",
)  # fmt: skip
EIGHT = ("random:tokens=8,layers=3", "cls_topk:tokens=8,layers=3", "tokenlearner:tokens=8,layers=3")

# KV caches: the newest rows and the sinks, random rows between them, what keys say by themselves, what attention says.
CACHES = (
    "random_cache", "streamingllm", "knorm", "keydiff", "snapkv", "pyramidkv", "adakv", "expected_attention", "tova",
    "h2o",
)  # fmt: skip
CACHE_SHARES = (0.5, 0.25)

REFERENCE_BLOCKS, REFERENCE_PATCHES = 12, 196


def default_methods(host: Host, *, all: bool = True) -> list[str]:
    """The default list for a model: counts that go are rescaled where it has other numbers of blocks or patches.
    all: the whole of it, not only its telling rows."""
    factor = REFERENCE_BLOCKS / len(host.blocks) * host.patches / REFERENCE_PATCHES
    forms = (*TWO_THIRDS, *HALF, *THIRD, *EIGHT) if all else TELLING
    return [_rescaled(form, factor) for form in forms if form.partition(":")[0] in names()]


def cache_methods(*, all: bool = True) -> list[str]:
    """The default list for a language model: every cache method at a quarter of the rows, all: at half of them, too."""
    shares = CACHE_SHARES if all else CACHE_SHARES[-1:]
    return [f"{name}:keep={share}" for share in shares for name in CACHES if name in names()]


def _rescaled(form: str, factor: float) -> str:
    budget = parse(form).budget
    if factor == 1 or not isinstance(budget, Remove) or isinstance(budget.r, tuple):
        return form
    return text(parse(form, r=max(1, round(budget.r * factor))))


def split_forms(written: list[str]) -> list[str]:
    """Text forms given one by one or joined by semicolons; commas separate a form's own parameters.

    >>> split_forms(["tome:r=8,inflect=-1; evit", "random"])
    ['tome:r=8,inflect=-1', 'evit', 'random']
    """
    return [form.strip() for item in written for form in item.split(";") if form.strip()]
