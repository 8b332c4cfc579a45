"""What is known of a stack of blocks: where they are, how their attention is reached, what travels beside the features,
which rows stand in front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .steps import Given, Own, Size, Step, Steps, Value


@dataclass(frozen=True)
class Stream:
    """An argument of the blocks that has an entry per token.

    path     into a tuple or dict
    axis     the tokens', from the end; batch: the samples' (of size one where all share), or None
    lacks    rows in front that it has no entry for
    square   whether the axis before is the tokens' too, as that of queries
    folded   whether samples and heads share the first axis, sample by sample
    """

    name: str
    path: tuple[Any, ...]
    axis: int
    batch: int | None = None
    lacks: int = 0
    square: bool = False
    folded: bool = False

    def at(self, value: Tensor, place: Tensor) -> Tensor:
        """The entries of some tokens. place: (B, M)."""
        if self.lacks:
            place = place[:, self.lacks :] - self.lacks
        if self.folded:
            whole = replace(self, batch=-value.dim() - 1, folded=False)
            return whole.at(value.unflatten(0, (len(place), -1)), place).flatten(0, 1)
        if self.batch is None:  # one table for all: every sample gets its own, for all heads
            if self.square:
                return value[place[:, :, None], place[:, None, :]][:, None]
            return value[place][:, None] if value.dim() == 2 else value[place]
        axis, batch = self.axis % value.dim(), self.batch % value.dim()
        value = value.movedim(batch, 0)
        axis = axis + 1 if axis < batch else axis
        value = value.expand(place.shape[0], *value.shape[1:])
        for one in (axis - 1, axis) if self.square else (axis,):
            index = place.view(len(place), *(1,) * (one - 1), -1, *(1,) * (value.dim() - one - 1))
            value = value.gather(one, index.expand(*value.shape[:one], -1, *value.shape[one + 1 :]))
        return value.movedim(0, batch)


def outward(layout: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that take samples, tokens and channels back to where a block has them."""
    return tuple(layout.index(i) for i in range(len(layout)))


def reach(value: Any, path: Sequence[Any]) -> Any:
    """A part of a tuple or dict, by the keys that lead there; None where they lead nowhere."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def placed(value: Any, path: Sequence[Any], part: Any) -> Any:
    """A tuple or dict with another part at the end of a path; the one given stays as it is."""
    if not path:
        return part
    key, *rest = path
    if isinstance(value, Mapping):
        return {**value, key: placed(value[key], rest, part)}
    parts = list(value)
    parts[key] = placed(parts[key], rest, part)
    return type(value)(parts) if type(value) in (tuple, list) else type(value)(*parts)


@dataclass(frozen=True)
class Layer:
    """One block.

    attention   path of the part that mixes tokens
    way         how it is reached: "table", "fused", "written", or None
    bare        whether its mask says no more than which tokens are padding, and may be left out where none is
    inside      whether the block makes a bias between all tokens itself, from none of its arguments
    anew        whether its attention is given a bias between tokens besides, which the block makes itself
    turns       of a decoder: whether keys at other positions are keys turned; None = positions change nothing
    steps       its forward in steps
    """

    path: str
    attention: str | None = None
    way: str | None = None
    bare: bool = True
    inside: bool = False
    turns: bool | None = True
    steps: Steps | None = None
    anew: bool = False


@dataclass(frozen=True)
class Anatomy:
    """A stack of blocks.

    name       of the class it is in, as messages say it
    kind       "vision" | "text" | "sound" | "decoder" | "scan" | "cross"
    layers     its blocks, in order
    mask       the argument of a block that masks its attention
    streams    arguments that have an entry per token
    tuples     how many things a block gives in a tuple; 0 = a tensor
    prefix     protected tokens in front; has_cls: whether the first of them is a class token
    patch, final_norm, pooler   paths from the root
    dense      whether what reads the output of a vision stack wants one row per patch, as a backbone's map does
    causal     of a text: whether a token sees only those before it; its last one stays then, as much is read from it
    rotation   why keys cannot be turned to other positions, if they cannot in any layer
    shrunk     whether the twin that was watched is smaller than the model
    features   whether the blocks hand on one sequence of features, (B, N, C)
    inverted   whether a mask of bools is True where a key is out of sight
    layout     which axes of what blocks are given are samples, tokens and channels, where these are not the order
    keys       the names of what a block gives, where that is a dict
    second     a second sequence that blocks hand on beside the features: its argument, and which of the things a block
               gives it is; the two travel as one, channel behind channel
    counts     an argument that tells blocks the place of each token, which they count themselves where it is None
    reads      of a decoder: the attention calls of one pass in order, as the path of the module and the cache layer it
               reads; empty where the attention of block i reads layer i, once
    """

    name: str
    kind: str
    layers: tuple[Layer, ...]
    mask: str | None = None
    streams: tuple[Stream, ...] = ()
    tuples: int = 0
    prefix: int = 0
    has_cls: bool = False
    patch: str | None = None
    final_norm: str | None = None
    pooler: str | None = None
    pools_from: int | None = None
    head_dim: int = 0
    rotation: str | None = None
    dense: bool = False
    causal: bool = False
    shrunk: bool = True
    features: bool = True
    inverted: bool = False
    layout: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    second: tuple[str, int] | None = None
    reads: tuple[tuple[str, int], ...] = ()
    counts: str | None = None

    @property
    def acts(self) -> set[str]:
        """What all blocks that mix tokens offer."""
        mixing = [layer for layer in self.layers if layer.attention is not None] or list(self.layers)
        found = {"block"} if self.features else set()
        if all(layer.way is not None for layer in mixing):
            found.add("attention")
        if all(layer.steps is not None and layer.steps.cut is not None for layer in mixing):
            found.add("middle")
        return found


FACTS = (Anatomy, Layer, Stream, Steps, Step, Value, Given, Own, Size)
