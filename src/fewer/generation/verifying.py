"""A model that reads a tree of guesses in one pass, unchanged: by masks and positions, over a cache that rolls back."""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fewer.compat import cached, pretrained
from fewer.runtime.program import SessionError
from fewer.runtime.saving import session_of

from .tree import Guess, Tree

FULL, SLIDING = "full_attention", "sliding_attention"
MASKABLE = ("sdpa", "eager")


class SwiftError(ValueError):
    """Text cannot be written ahead with this model, or with these settings: why, and what else to do."""


class Verifier:
    """A causal language model and the cache of one text.

    cache   of plain layers, sliding ones too: their mask hides what slid out, for rows that are gone cannot come back
    logits  of all nodes of a tree, `read`; of the last token of a text, `prefill`
    """

    def __init__(self, model: nn.Module, cache: Any = None) -> None:
        """cache: to go on from; None = an empty one. Raises SwiftError for models and caches that cannot do this."""
        from transformers import DynamicCache

        self.model, self.config = model, _supported(model)
        self.cache: Any = DynamicCache() if cache is None else cache
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        slides = any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=self.config).layers)
        self.kinds = set(kinds) if kinds else {SLIDING if slides else FULL}
        self.window = window if slides else None
        if cache is not None:
            self._check(cache)

    def _check(self, cache: Any) -> None:
        if strange := {type(layer).__name__ for layer in cache.layers if type(layer).__name__ != "DynamicLayer"}:
            raise SwiftError(
                f"a cache with {', '.join(sorted(strange))} cannot be cut back behind rejected guesses: give a "
                "DynamicCache(), without a config, or none"
            )

    @property
    def rows(self) -> int:
        """Tokens in the cache."""
        return int(self.cache.get_seq_length())

    def prefill(self, ids: Tensor) -> Tensor:
        """Read all tokens of a text, (1, N), that are not in the cache. Returns the last one's logits, (V,)."""
        new = ids[:, self.rows :]
        positions = torch.arange(self.rows, ids.shape[1], device=self.device)[None]
        keep = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(self.model) else {}
        out: Any = self.model(
            new.to(self.device), position_ids=positions, use_cache=True, **cached(self.model, self.cache), **keep
        )
        self._check(self.cache)
        logits: Tensor = out.logits[0, -1]
        return logits

    def read(self, tree: Tree) -> Tensor:
        """Read a tree behind the cache. Returns (T, V) logits, of what follows each node. Its rows stay, see `keep`."""
        past, depths = self.rows, torch.tensor(tree.depths, device=self.device)
        out: Any = self.model(
            torch.tensor([tree.tokens], device=self.device), position_ids=(past + depths)[None], use_cache=True,
            attention_mask=self._masks(tree.sees().to(self.device), depths, past), **cached(self.model, self.cache),
        )  # fmt: skip
        logits: Tensor = out.logits[0]
        return logits

    def keep(self, path: list[int], nodes: int) -> None:
        """Of the last `nodes` rows of the cache keep those of a path, in its order: what the plain model would hold."""
        past, wanted = self.rows - nodes, list(range(len(path)))
        if path != wanted:
            index = torch.tensor(path, device=self.device) + past
            for layer in self.cache.layers:
                for rows in (layer.keys, layer.values):
                    rows[..., past : past + len(path), :] = rows.index_select(-2, index.to(rows.device))
        if nodes > len(path):
            self.cache.crop(len(path) - nodes)

    def _masks(self, sees: Tensor, depths: Tensor, past: int) -> Any:
        """Of the nodes over cache and tree, additive, (1, 1, T, S + T); by kinds of layers where there are two."""
        everything = torch.cat([sees.new_ones(len(depths), past), sees], 1)
        masks = {FULL: everything}
        if self.window is not None:
            at = torch.cat([torch.arange(past, device=self.device), past + depths])
            masks[SLIDING] = everything & (past + depths[:, None] - at < self.window)
        least = torch.finfo(self.dtype).min
        added = {
            kind: torch.zeros(mask.shape, dtype=self.dtype, device=self.device).masked_fill(~mask, least)[None, None]
            for kind, mask in masks.items() if kind in self.kinds
        }  # fmt: skip
        return added if len(added) > 1 else next(iter(added.values()))


def _parameters(model: nn.Module) -> Any:
    return inspect.signature(model.forward).parameters


def _supported(model: nn.Module) -> Any:
    """The config of the model's text part. Raises SwiftError."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or not hasattr(model, "generate") or config.is_encoder_decoder:
        raise SwiftError(f"{name} is no causal language model of transformers: give a decoder (AutoModelForCausalLM)")
    try:
        methods = session_of(model).methods
    except SessionError:
        methods = ()
    if methods:
        raise SwiftError(
            f"a session is on this {name}, whose cache may not hold all rows, and guesses are verified against all: "
            "remove() it first"
        )
    if "position_ids" not in _parameters(model):
        raise SwiftError(f"{name} takes no position_ids, and guesses side by side have the same position")
    chosen = config._attn_implementation
    if chosen not in MASKABLE:
        raise SwiftError(
            f"attention {chosen!r} takes no mask of a tree: load the model with attn_implementation='sdpa' or 'eager'"
        )
    inner = config.get_text_config(decoder=True)
    kinds = set(getattr(inner, "layer_types", None) or {FULL})
    if strange := kinds - {FULL, SLIDING}:
        raise SwiftError(f"{name} has layers of {', '.join(sorted(strange))}, whose state cannot be rolled back")
    return inner


def _words(model: nn.Module) -> int:
    embeddings: Any = pretrained(model).get_input_embeddings()
    return int(embeddings.weight.shape[0])


_TRIED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@torch.no_grad()
def tried(model: nn.Module) -> None:
    """Once for each model: it reads a small tree as it reads its paths. Raises SwiftError where it does not."""
    known = _TRIED.setdefault(model, set())
    verifier = Verifier(model)
    chosen = str(pretrained(model).config._attn_implementation)
    if chosen in known:
        return
    ids = torch.arange(3, 9, device=verifier.device)[None] % _words(model)
    first, root, left, right, below, after = ids[0].tolist()
    verifier.prefill(ids[:, :1])
    tree = Tree([root])
    tree.add(0, Guess(left, 1, ()))
    tree.add(tree.add(0, Guess(right, 1, ())), Guess(below, 1, ()))
    found = [*verifier.read(tree)[[1, 3]]]
    verifier.keep([0, 2, 3], 4)
    found.append(verifier.read(Tree([after]))[0])
    paths = [[first, root, left], [first, root, right, below], [first, root, right, below, after]]
    for path, got in zip(paths, found, strict=True):
        want = Verifier(model).prefill(torch.tensor([path], device=verifier.device))
        far = (got.float() - want.float()).abs().max() / want.float().std().clamp(min=1e-6)
        if far > (1e-3 if verifier.dtype in (torch.float32, torch.float64) else 0.2):
            raise SwiftError(
                f"{type(model).__name__} reads a tree of guesses otherwise than its paths (logits differ by {far:.2g} "
                "of their spread): it does not go by masks and positions alone, so write with generate() as usual"
            )
    known.add(chosen)
