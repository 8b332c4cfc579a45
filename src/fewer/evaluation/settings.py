"""What `fewer bench` measures when nobody says otherwise."""

from __future__ import annotations

from fewer.core import Remove
from fewer.hosts import Host
from fewer.registry import names
from fewer.spec import parse, text

UNREDUCED = "unreduced"
RANDOM = ("random", "random_cache")  # what nobody may lose to

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
EIGHT = ("random:tokens=8,layers=3", "cls_topk:tokens=8,layers=3", "tokenlearner:tokens=8,layers=3")

# KV caches: the newest rows and the sinks, random rows between them, what keys say by themselves, what attention says.
CACHES = (
    "random_cache", "streamingllm", "knorm", "keydiff", "snapkv", "pyramidkv", "adakv", "expected_attention", "tova",
    "h2o",
)  # fmt: skip
CACHE_SHARES = (0.5, 0.25)

REFERENCE_BLOCKS, REFERENCE_PATCHES = 12, 196


def default_methods(host: Host) -> list[str]:
    """The default list for a model: counts that go are rescaled where it has other numbers of blocks or patches."""
    factor = REFERENCE_BLOCKS / len(host.blocks) * host.patches / REFERENCE_PATCHES
    forms = (*TWO_THIRDS, *HALF, *THIRD, *EIGHT)
    return [_rescaled(form, factor) for form in forms if form.partition(":")[0] in names()]


def cache_methods() -> list[str]:
    """The default list for a language model: every cache method at half and at a quarter of the rows."""
    return [f"{name}:keep={share}" for share in CACHE_SHARES for name in CACHES if name in names()]


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
