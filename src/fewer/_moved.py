"""Modules under the names they had before the rooms were named anew: importable for one release, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "cache": "runtime.kv.layer",
    "caching": "runtime.sites.kv_cache",
    "core.cached": "core.cache",
    "core.canvas": "core.visual.crops",
    "core.codes": "core.cache.quantised",
    "core.lattice": "core.visual.resampler",
    "core.layout": "core.visual.layout",
    "core.maps": "core.visual.convolution",
    "core.question": "core.visual.question",
    "core.regions": "core.visual.regions",
    "core.relevance": "core.visual.attention",
    "core.rotary": "core.rope",
    "data": "datasets.images",
    "entry": "runtime.apply",
    "guide": "adapters.clip_guide",
    "ledger": "runtime.costs",
    "packaged": "datasets.packages",
    "passes": "runtime.sites.blocks",
    "presses": "adapters.kvpress",
    "scenes": "datasets.scenes",
    "session": "runtime.session",
    "texts": "datasets.texts",
    "trained": "runtime.modules",
    "training.masking": "recipes.masking",
    "training.sparsity": "rewards.zipr1",
    "verify": "runtime.verify",
    "zoo": "models.zoo",
}


class Finder(MetaPathFinder, Loader):
    """Answers for the old names only."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "fewer" and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = f"fewer.{MOVED[old.removeprefix('fewer.')]}"
        warnings.warn(f"{old} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)
