"""Denoisers: models of diffusers whose blocks run attention and MLPs on all tokens of a picture or clip, many times.

Nothing here knows an architecture by name. A block is whatever has attention among its direct parts; what its parts do
is told by what they hold and by how they are called.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fewer.core import Site

from .anatomy import Anatomy, Layer
from .attention import ARGUMENTS, HostError
from .base import Host
from .weights import multiplied

Kind = Literal["attention", "cross", "mlp"]
MLP = re.compile(r"(^|_)(ff|ffn|mlp|feed_forward)$")
"""What parts are called that treat each token by itself; those of the words beside (ff_context) are none."""
ROTARY = re.compile(r"rotary|rope|freqs")
PARTS = ("unet", "transformer", "prior", "decoder")
"""What pipelines call the part that is run at every denoising step."""


@dataclass(frozen=True)
class Operation:
    """A part of a block that takes rows and gives as many. kind: "attention" among the tokens, or of tokens and words
    together; "cross", of tokens to words; "mlp"."""

    block: int
    path: str
    kind: Kind


@dataclass(frozen=True)
class Grid:
    """Where the tokens of a block stand. factor: how much coarser than the finest grid in the model."""

    frames: int
    height: int
    width: int
    factor: int

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


def denoiser(model: Any) -> tuple[nn.Module, Any]:
    """The part of a pipeline that is run at every step, and the pipeline; a model as it is, and None.

    Raises   HostError for a pipeline with none that is known, naming the parts it has.
    """
    if isinstance(model, nn.Module) or not isinstance(parts := getattr(model, "components", None), dict):
        return model, None
    for name in PARTS:
        if isinstance(part := parts.get(name), nn.Module) and is_one(part):
            return part, model
    held = ", ".join(f"{name} ({type(part).__name__})" for name, part in parts.items() if part is not None)
    raise HostError(
        f"{type(model).__name__} is a pipeline in which no denoiser was found; it holds {held or 'nothing'}. One is "
        f"called {', '.join(PARTS[:-1])} or {PARTS[-1]} and has blocks with attention: give fewer.apply that part"
    )


def is_one(model: nn.Module) -> bool:
    """Whether a model is a denoiser: of diffusers, called with a time, and with attention in its blocks."""
    names = inspect.signature(type(model).forward).parameters
    timed = bool({"timestep", "timesteps", "sigma", "t"} & names.keys())
    ours = any(cls.__module__.partition(".")[0] == "diffusers" for cls in type(model).__mro__)
    return ours and timed and next(_blocks(model), None) is not None


def is_attention(module: nn.Module) -> bool:
    return (hasattr(module, "to_q") and hasattr(module, "to_k")) or hasattr(module, "to_qkv")


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) or is_attention(module):
            continue
        if any(map(is_attention, module.children())) and _rows_argument(module) is not None:
            yield path, module


def _rows_argument(block: nn.Module) -> str | None:
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    return next((n for n in ("hidden_states", "x", "hidden") if n in names), None)


def _operations(number: int, block: nn.Module) -> Iterator[Operation]:
    for path, part in block.named_children():
        if is_attention(part):
            yield Operation(number, path, "cross" if _crosses(part) else "attention")
        elif MLP.search(path) and "context" not in path and any(isinstance(m, nn.Linear) for m in part.modules()):
            yield Operation(number, path, "mlp")


def _crosses(attention: Any) -> bool:
    """Whether keys and values come from another sequence alone."""
    own = getattr(attention, "is_cross_attention", None)
    if own is not None:
        return bool(own)
    q, k = getattr(attention, "to_q", None), getattr(attention, "to_k", None)
    return q is not None and k is not None and getattr(q, "in_features", 0) != getattr(k, "in_features", 0)


class DiffusionHost(Host):
    """A denoiser, bound. Its blocks may work on grids of different sizes."""

    def __init__(self, root: nn.Module, pipe: Any = None) -> None:
        """pipe: the pipeline, where the model came in one.

        Raises   HostError where no block with attention is found.
        """
        found = list(_blocks(root))
        if not found:
            raise HostError(
                f"{type(root).__name__} has no block with attention in it, so no tokens that could be fewer"
            )
        layers = tuple(Layer(path, next(_operations(0, block)).path) for path, block in found)
        super().__init__(Anatomy(type(root).__name__, "diffusion", layers, features=False), root, "")
        self.operations = tuple(op for i, block in enumerate(self.blocks) for op in _operations(i, block))
        self.pipe = pipe
        self._front: dict[int, int] = {}

    # -- what is known of it -------------------------------------------------------------------------------------------
    @property
    def text(self) -> bool:
        return False

    @property
    def patches(self) -> int:
        return 0

    @property
    def scheduler(self) -> Any:
        return getattr(self.pipe, "components", {}).get("scheduler")

    def branches(self, batch: int) -> int:
        """Samples of a batch that belong to one picture, as far as the pipeline says: two where it is guided."""
        guided = bool(getattr(self.pipe, "do_classifier_free_guidance", False))
        return 2 if guided and batch % 2 == 0 else 1

    def _heads(self) -> tuple[int, int]:
        part = self._part(self.blocks[0], self.layers[0].attention or "")
        width = int(getattr(getattr(part, "to_q", None), "out_features", 0)) or self.channels
        heads = getattr(part, "heads", 1)
        heads = heads if isinstance(heads, int) and heads else 1
        return heads, width // heads

    @cached_property
    def timed(self) -> str:
        """The argument that says the time."""
        names = inspect.signature(type(self.root).forward).parameters
        return next(n for n in ("timestep", "timesteps", "sigma", "t") if n in names)

    def part(self, operation: Operation) -> Any:
        return self._part(self.blocks[operation.block], operation.path)

    def macs(self, operation: Operation) -> tuple[int, int]:
        """Weights multiplied once per token, and channels that each pair of a query and a key multiplies, twice."""
        part = self.part(operation)
        return multiplied(part), int(getattr(getattr(part, "to_q", None), "out_features", 0))

    @cached_property
    def stack(self) -> tuple[int, int] | None:
        """The first and the last of the blocks that hand on to each other, where all blocks do: then what they add to
        the features can be reused as a whole. None for a network with convolutions and other grids in between."""
        places = [layer.path.rpartition(".")[0] for layer in self.layers]
        lists = list(dict.fromkeys(places))
        others = any("temporal" in path or "refiner" in path for path in lists)
        return None if others or any("." in path for path in lists) else (0, len(self.blocks) - 1)

    def depth(self, site: Site) -> int:
        return len(self.blocks)

    def describe(self) -> Iterator[tuple[str, str]]:
        kinds = list(dict.fromkeys(type(b).__name__ for b in self.blocks))
        yield "root", f"(the model itself): {self.name}"
        yield "blocks", f"{len(self.blocks)} x {', '.join(kinds)}"
        yield "attention", f"{self.heads} heads x {self.head_dim} channels"
        counts = {kind: sum(op.kind == kind for op in self.operations) for kind in ("attention", "cross", "mlp")}
        yield "operations", ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
        yield "sites", "around an operation, over denoising steps" + (" (also the whole stack)" if self.stack else "")

    # -- one call ------------------------------------------------------------------------------------------------------
    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the model was called with, by name."""
        names = list(inspect.signature(type(self.root).forward).parameters)[1:]
        return dict(zip(names, args, strict=False)) | kwargs

    def extents(self, given: dict[str, Any]) -> tuple[int, int, int] | None:
        """Frames, height and width of the finest grid of tokens, from what the model was called with."""
        sample = next((v for n in ("sample", "hidden_states", "x") if isinstance(v := given.get(n), Tensor)), None)
        if sample is None:
            return None
        if sample.dim() == 3:  # tokens already: their places say where they stand
            ids = given.get("img_ids")
            if not isinstance(ids, Tensor):
                return None
            ids = ids[0] if ids.dim() == 3 else ids
            most = [int(v) + 1 for v in (ids.amax(0) - ids.amin(0)).tolist()[-3:]]
            frames, height, width = [1] * (3 - len(most)) + most
            return frames, height, width
        config: Any = getattr(self.root, "config", {})
        patch = config.get("patch_size") if isinstance(config, dict) or hasattr(config, "get") else None
        sizes = (patch,) if isinstance(patch, int) else tuple(patch or (1,))
        edge = sizes[-1]
        deep = sizes[0] if len(sizes) == 3 else config.get("patch_size_t") or 1
        if sample.dim() == 4:
            return 1, -(-sample.shape[-2] // edge), -(-sample.shape[-1] // edge)
        axis = 1 if sample.shape[2] == config.get("in_channels") and sample.shape[1] != sample.shape[2] else 2
        return -(-sample.shape[axis] // deep), -(-sample.shape[-2] // edge), -(-sample.shape[-1] // edge)

    @staticmethod
    def grid(extents: tuple[int, int, int] | None, tokens: int) -> Grid | None:
        """Where so many tokens stand: one frame or all, on the finest grid or one that is so many times coarser."""
        if extents is None:
            return None
        frames, height, width = extents
        for factor in range(1, max(height, width) + 1):
            h, w = -(-height // factor), -(-width // factor)
            if tokens in (h * w, frames * h * w):
                return Grid(tokens // (h * w), h, w, factor)
            if frames * h * w < tokens:
                break
        return None

    def rows_of(self, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """The rows a block gets, (B, N, C), and the words beside them, where they travel with them."""
        names = list(inspect.signature(type(self.blocks[block]).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        rows = given.get(_rows_argument(self.blocks[block]) or "")
        words = given.get("encoder_hidden_states")
        fine = isinstance(rows, Tensor) and rows.dim() == 3
        return rows if fine else None, words if isinstance(words, Tensor) else None

    # -- attention that rotates its rows, or reads words with them -----------------------------------------------------
    @staticmethod
    def rotates(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an attention is given positions to turn its queries and keys by: then its rows cannot be averaged
        before they are turned."""
        named = any(ROTARY.search(name) and value is not None for name, value in kwargs.items())
        return named or any(isinstance(a, tuple) and a and isinstance(a[0], Tensor) for a in args[1:])

    def front(self, attention: nn.Module, rows: Tensor, words: Tensor) -> int:
        """How many words stand in front of the rows where an attention reads both: all, or none of them. Tried once,
        on two equal rows and a word: the rows' values are then equal."""
        key = id(attention)
        if key not in self._front:
            seen: list[Tensor] = []

            class Look(TorchFunctionMode):
                def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                    given = dict(zip(ARGUMENTS, args, strict=False)) | (kwargs or {})
                    if func is F.scaled_dot_product_attention:
                        seen.append(given["value"])
                    return func(*args, **kwargs or {})

            with torch.no_grad(), Look():
                self.own_of(attention)(
                    hidden_states=rows[:1, :1].expand(-1, 2, -1), encoder_hidden_states=words[:1, :1]
                )
            if not seen or seen[0].shape[-2] != 3:
                raise HostError(
                    f"{type(attention).__name__} reads words and picture tokens together in an order that cannot be "
                    "told; give the method other operations"
                )
            value = seen[0]
            self._front[key] = int(not torch.equal(value[..., 0, :], value[..., 1, :]))
        return self._front[key] * words.shape[1]

    @contextmanager
    def joining(self, block: int, rows: Tensor, words: Tensor | None) -> Iterator[None]:
        """While this is open, a block that joins rows and words before its attention is seen doing so, once."""
        key = -1 - block
        if words is None or key in self._front:
            yield
            return
        self._front[key] = 1  # words first, as most have it, where no part is given both
        n = rows.shape[1]

        def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(given, Tensor) and given.dim() == 3 and given.shape[1] == n + words.shape[1]:
                if torch.equal(given[:, :n], rows):
                    self._front[key] = 0
                elif not torch.equal(given[:, -n:], rows):
                    return
                while hooks:
                    hooks.pop().remove()

        hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in self.blocks[block].children()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def words_first(self, block: int) -> bool:
        """Whether a block that joins rows and words has the words in front."""
        return bool(self._front.get(-1 - block, 1))


class inside(TorchFunctionMode):
    """While this is open, the fused kernel runs on what `change` makes of its queries, keys and values, all turned to
    their positions already. change: (q, k, v, mask) -> (q, k, v, mask, what puts the answer back), each
    (B, H, N, d)."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change, self.entered = change, False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        self.entered = True
        q, k, v, mask, back = self.change(given["query"], given["key"], given["value"], given.get("attn_mask"))
        return back(func(**given | {"query": q, "key": k, "value": v, "attn_mask": mask}))
