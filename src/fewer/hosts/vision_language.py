"""Vision-language models of Hugging Face transformers: which rows of their prompts are visual, and what each shows."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fewer.compat import pretrained
from fewer.core import Seen, Shape
from fewer.core.visual.layout import Item, Layout

from .attention import HostError
from .base import Host
from .bridge import Bridge, bridge, part, readers, windows
from .decoder import DecoderHost
from .discovery import anatomy
from .stacks import Stack, stacks
from .twin_visual import TOKENS, VIDEO_TOKENS, encodes, heights, token_of


class LayoutError(ValueError):
    """It cannot be told which rows of a prompt are visual, or which part of an image they show."""


@dataclass(eq=False)
class Encoding:
    """Images, or videos, on their way through the tower and the projector.

    kind, given    "image" or "video"; the arguments the model encodes them from, by name
    entered        what entered the projector: (T, P, C), or (G, C) where it takes all images end to end
    shapes         of each image's rows in what the encoding gave: (n,), or (tiles, n)
    packed, tiles  where the model packs tiles itself: `coordinates` of each image, packed, (n, 4), and its tiles
    seen, outputs  of the tower's blocks that somebody looks at: attention calls, and what came out
    present, share see `VisualContext`
    """

    kind: str
    given: dict[str, Any]
    entered: Tensor | None = None
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    packed: list[Tensor] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    seen: dict[int, Seen] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    present: Tensor | None = None
    share: tuple[int, int] | None = None

    @property
    def features(self) -> Tensor:
        if self.entered is None:
            raise LayoutError(f"the projector was not called for the {self.kind}s: cannot tell which rows are visual")
        return self.entered

    @property
    def rows(self) -> int:
        """Of all tiles; without features the rows that the encoding gave."""
        return self.made if self.entered is None else math.prod(self.entered.shape[:-1])

    @property
    def made(self) -> int:
        """Rows that the encoding gave."""
        return sum(map(math.prod, self.shapes))


def coordinates(tiles: int, rows: int, across: int) -> Tensor:
    """(T, P, 4) float32, in the place of the features of an image's tiles: plane (0 = the whole image, 1 = its crops),
    row and column in the plane, crops side by side."""
    side = _square(rows)
    cell = torch.arange(rows)
    tile = torch.arange(tiles)[:, None]
    crop = (tile - 1).clamp(min=0)
    row, column = crop // across * side + cell // side, crop % across * side + cell % side
    plane = (tile > 0).expand(-1, rows)
    return torch.stack([plane, row, column, torch.full_like(row, across)], -1).float()


def _square(rows: int) -> int:
    side = math.isqrt(rows)
    if side * side != rows:
        raise LayoutError(
            f"{rows} visual rows per picture form no square: only square pictures of one size are known for this model"
        )
    return side


def _runs(host: VisionLanguageHost, call: Encoding, first: int, given: dict[str, Any]) -> list[Item]:
    """Pictures of several crops that stand behind each other without a word between (InternVL): found by the runs of
    placeholders."""
    tiles, rows = call.features.shape[:2]
    runs = host.runs(given, host.image_token)
    side, items, start = _square(rows), [], first
    times = max(sum(map(sum, runs)) // (tiles * rows), 1)  # beam search repeats each prompt
    for run in (run for prompt in runs[::times] for run in prompt):
        if run % rows:
            raise LayoutError(f"a run of {run} placeholders is no whole number of crops of {rows} rows each")
        items.append(Item.raster(1, side, side, tiles=run // rows, first=first))
        first += run
    if first - start != tiles * rows:
        raise LayoutError(f"{first - start} placeholders stand in the prompts for {tiles * rows} visual rows")
    return items


def _packed(host: VisionLanguageHost, call: Encoding, first: int, given: dict[str, Any]) -> list[Item]:
    """One view of the whole image, then its crops as one canvas without its padding, a separator at the end of each
    line (LLaVA-NeXT, LLaVA-OneVision). The model's own packing told where its rows come from."""
    rows, items = call.features.shape[1], []
    side = _square(rows)
    for packed, tiles in zip(call.packed, call.tiles, strict=True):
        plane, row, column, across = packed.round().long().unbind(-1)
        tile = torch.where(plane == 1, 1 + row // side * across + column // side, 0)
        row, column = row % side, column % side
        items.append(
            Item(
                tile, torch.zeros_like(tile), row, column, first + tile * rows + row * side + column, plane < 0,
                ((tiles - 1) // int(across[0]), int(across[0])) if tiles > 1 else None,
            )
        )  # fmt: skip
        first += tiles * rows
    return items


def _frames(host: VisionLanguageHost, call: Encoding, first: int, given: dict[str, Any]) -> list[Item]:
    """Frames pooled to half the side, a separator behind the last (LLaVA-OneVision)."""
    videos, frames = call.given["pixel_values_videos"].shape[:2]
    side = math.ceil(_square(call.features.shape[1]) / 2)
    full = Item.raster(frames, side, side)
    ended = [torch.cat([x, x[-1:]]) for x in (full.tile, full.time, full.row, full.column)]
    separator = torch.zeros(len(full) + 1, dtype=torch.bool)
    separator[-1] = True
    tile, time, row, column = ended
    return [Item(tile, time, row, column, None, separator) for _ in range(videos)]


def _found(host: VisionLanguageHost, call: Encoding, first: int, given: dict[str, Any]) -> list[Item]:
    """Each picture by itself, its rows where the twin showed that they stand."""
    found = host.bridge
    located = found.order in ("kept", "windows") and call.entered is not None
    sized = call.given.get(found.sizes.replace("image", call.kind)) if found.place == "sizes" else None
    if sized is not None:
        sizes = heights(torch.as_tensor(sized)).tolist()
        grids = [(s[0] if found.frames else 1, s[-2] // found.unit, s[-1] // found.unit) for s in sizes]
        if sum(map(math.prod, grids)) == call.made:  # the encoding may give all images end to end
            return _ordered(host, call, [Item.raster(*grid, first=0) for grid in grids], first, located)
    items = []
    pieces = _pieces(call)
    if len(pieces) == 1 and len(pieces[0]) == 1:  # all pictures end to end: the prompts tell them apart
        runs = host.runs(given, host.token(call))
        times = max(sum(map(sum, runs)) // max(call.made, 1), 1)
        apart: list[tuple[int, ...]] = [(run,) for prompt in runs[::times] for run in prompt]
        pieces = apart if sum(map(sum, apart)) == call.made else pieces
    for shape in pieces:
        rows = shape[-1]
        tiles = math.prod(shape[:-1])
        side = math.isqrt(rows)
        if found.place == "square" and side * side == rows:
            frames = call.kind == "video"
            items.append(Item.raster(tiles if frames else 1, side, side, tiles=1 if frames else tiles, first=0))
        else:
            items.append(Item.in_line(tiles * rows, 0))
    return _ordered(host, call, items, first, located)


def _pieces(call: Encoding) -> list[tuple[int, ...]]:
    """The rows of each picture: the encoding may give those of a whole prompt together, the projector knows better."""
    tile = call.entered.shape[1] if call.entered is not None and call.entered.dim() == 3 else 0
    pieces: list[tuple[int, ...]] = []
    for shape in call.shapes:
        rows = math.prod(shape)
        one = len(shape) == 1 and tile > 1 and rows % tile == 0 and call.rows == call.made
        pieces += [(tile,)] * (rows // tile) if one else [shape] if rows else []
    return pieces


def _ordered(host: VisionLanguageHost, call: Encoding, items: list[Item], first: int, located: bool) -> list[Item]:
    """Items with the rows of the projector's output that they were made of. first: of those, the first of this call."""
    if not located or call.made != call.rows // host.bridge.takes:
        return [replace(item, source=None) for item in items]
    order = windows(host.whole, call.given, f"{call.kind}_grid_thw") if host.bridge.order == "windows" else None
    moved, start = [], first
    for item in items:
        source = torch.arange(len(item)) + first
        first += len(item)
        moved.append(replace(item, source=source if order is None else order[source - start] + start))
    return moved


@dataclass(frozen=True)
class VisionLanguage:
    """What a twin does not show of an architecture: how rows were arranged on their way.

    name, root    in words; class name of the module that owns tower, projector and language model
    images, videos    (host, projector call, first row) -> the images, or videos, in the order of the prompt; None = as
                      found
    """

    name: str
    root: str
    images: Callable[[VisionLanguageHost, Encoding, int, dict[str, Any]], list[Item]] | None = None
    videos: Callable[[VisionLanguageHost, Encoding, int, dict[str, Any]], list[Item]] | None = None


ROWS = (
    VisionLanguage("LLaVA-OneVision", "LlavaOnevisionModel", videos=_frames),
    VisionLanguage("InternVL", "InternVLModel", _runs),
)


class VisionLanguageHost(DecoderHost):
    """The decoder of a vision-language model, with what stands before it."""

    def __init__(self, found: Bridge, whole: nn.Module, path: str, language: Stack) -> None:
        super().__init__(anatomy(language), language.root, f"{path}.{language.path}".strip("."))
        self.bridge, self.whole = found, whole
        self.rule = next((row for row in ROWS if row.root == type(whole).__name__), None)
        self.title = self.rule.name if self.rule is not None else _title(whole)
        self.projector = None if found.projector is None else part(whole, found.projector)
        self.tower_module: nn.Module | None = None if found.tower is None else part(whole, found.tower)
        self.tower_path = f"{path}.{found.tower or ''}".strip(".")
        config: Any = whole.config
        self.image_token, self.video_token = token_of(config), token_of(config, VIDEO_TOKENS)

    @property
    def joins(self) -> bool:
        """Whether rows of the tower's output are joined before they are projected."""
        return self.bridge.joins

    @property
    def tower_has_cls(self) -> bool:
        """Whether the vision tower has a class token whose attention ranks patches."""
        return self.tower is not None and self.tower.has_cls

    @cached_property
    def tower(self) -> Host | None:
        """The tower's blocks, bound; None where it hands on no sequence of one picture's patches."""
        if self.tower_module is None:
            return None
        for stack in stacks(self.tower_module):
            try:
                found = anatomy(stack)
            except HostError:
                continue
            if found.kind == "vision":
                return Host(found, stack.root, f"{self.tower_path}.{stack.path}".rstrip("."))
        return None

    @property
    def cut_off(self) -> int:
        """Rows in front of the patches that are cut off before the projector."""
        cut = getattr(self.whole.config, "vision_feature_select_strategy", "full") == "default"
        return self.tower.prefix if self.tower is not None and cut else 0

    @property
    def used(self) -> int:
        """The tower's block whose output is projected; where there are several, the last one."""
        layer = getattr(self.whole.config, "vision_feature_layer", -1)
        layer = layer if isinstance(layer, int) else layer[-1]
        depth = self._depth
        return depth + layer if layer < 0 else layer - 1

    @property
    def _depth(self) -> int:
        if self.tower is not None:
            return len(self.tower.blocks)
        vision: Any = getattr(self.whole.config, "vision_config", None)
        return int(next((v for n in ("num_hidden_layers", "depth") if (v := getattr(vision, n, None)) is not None), 0))

    def shape(self) -> Shape:
        """For methods with modules of their own."""
        config: Any = self.whole.config
        vision: Any = getattr(config, "vision_config", None)
        if self.projector is None or self.bridge.place == "sizes" or not hasattr(vision, "image_size"):
            raise HostError(
                f"{self.title} takes pictures of any size, or does not show which patch a row is of; modules of one's "
                "own at the bridge are for models whose pictures, or crops, have one size (LLaVA, SmolVLM, InternVL)"
            )
        image, patch = (x if isinstance(x, int) else x[0] for x in (vision.image_size, vision.patch_size))
        joined = getattr(config, "scale_factor", None) or round(1 / getattr(config, "downsample_ratio", 1.0))
        side = image // patch // (joined if self.joins else 1)
        linear = next(m for m in self.projector.modules() if isinstance(m, nn.Linear))
        return Shape(self.channels, self.heads, linear.in_features, self._depth, (side, side))

    def placeholders(self, given: Mapping[str, Tensor], token: int | None) -> Tensor:
        """(B, S) bool on the CPU: the rows that stand for images, or videos. One read of the prompt."""
        if (where := given.get("image_embeds_position_mask")) is not None:
            return where.bool().cpu()
        ids = given.get("input_ids")
        if ids is not None:
            assert token is not None, f"the config of {self.title} names no placeholder"
            return (ids == token).cpu()
        embeds = given["inputs_embeds"]
        own = pretrained(self.whole).get_input_embeddings()(torch.full((), token or 0, device=embeds.device))
        return (embeds == own).all(-1).cpu()

    def token(self, call: Encoding) -> int | None:
        """The placeholder of what was encoded."""
        return self.image_token if call.kind == "image" or self.video_token is None else self.video_token

    def runs(self, given: dict[str, Any], token: int | None) -> list[list[int]]:
        """Lengths of the runs of a placeholder in each prompt."""
        lengths = []
        for row in self.placeholders(given, token).to(torch.int8):
            edges = torch.diff(row, prepend=row.new_zeros(1), append=row.new_zeros(1)).nonzero()[:, 0].tolist()
            lengths.append([stop - start for start, stop in zip(edges[::2], edges[1::2], strict=True)])
        return lengths

    def layout(self, given: dict[str, Any], calls: Sequence[Encoding], shape: tuple[int, int], real: Tensor | None,
               device: torch.device) -> Layout | None:  # fmt: skip
        """The layout of the prompts in a call of the root's forward; None where there are no pictures.

        given: its arguments by name; calls: the images and videos that were encoded for it.
        Raises LayoutError where placeholders and visual rows do not match.
        """
        items: list[Item] = []
        places: list[Tensor] = []
        first = 0
        for call in calls:
            found = self._items(call, first, given)
            first += call.rows // self.bridge.takes
            marked = self.placeholders(given, self.token(call))
            for item, at in zip(*_placed(found, marked, call.kind), strict=True):
                if len(at) and int(at[0]) // shape[1] != int(at[-1]) // shape[1]:
                    raise LayoutError(f"the placeholders of one {call.kind} are spread over two prompts of the batch")
                items.append(item)
                places.append(at)
        return Layout.of(shape, items, places, real, device) if items else None

    def _items(self, call: Encoding, first: int, given: dict[str, Any]) -> list[Item]:
        own = None if self.rule is None else self.rule.images if call.kind == "image" else self.rule.videos
        if own is None and call.packed:
            own = _packed
        return _found(self, call, first, given) if own is None else own(self, call, first, given)

    def describe(self) -> Iterator[tuple[str, str]]:
        found = self.bridge
        yield "vision-language model", self.title
        tower = "its blocks cannot be entered" if self.tower is None else self.tower.name
        yield "vision tower", tower if self.tower_module is None else f"{type(self.tower_module).__name__} ({tower})"
        yield "visual rows", found.why or self._rows_in_words()
        for what, value in super().describe():
            if what == "sites" and not found.why:
                value = f"{value}, the bridge between tower and language model"
            yield what, value

    def _rows_in_words(self) -> str:
        """Where visual rows come from, and what is known of where they stand."""
        found = self.bridge
        places = {"square": "cells of a square", "sizes": f"cells of a grid ({found.sizes})"}
        made = "made together" if found.projector is None else f"from {found.projector}"
        where = "as the model packs its crops" if found.order == "packed" else places.get(found.place)
        joined = ", patches joined" if found.joins else ""
        return f"{made}{joined}; {where or 'in a line, their place in the picture is not known'}"


def _placed(items: list[Item], marked: Tensor, kind: str) -> tuple[list[Item], list[Tensor]]:
    """Items with the places of their rows in the flattened prompts. marked: (B, S) bool, their placeholders.

    Beam search repeats each prompt: its images are then repeated with it."""
    total, have = sum(map(len, items)), int(marked.sum())
    times = have // total if total else 1
    if total == 0 or have != times * total or times == 0 or len(marked) % times:
        raise LayoutError(
            f"{have} {kind} placeholders stand in the prompts for {total} visual rows; give each {kind} as many as the "
            "model's processor does"
        )
    if times > 1:
        counts = marked.sum(-1)[::times].tolist()
        ends, repeated, group = list(torch.tensor(counts).cumsum(0).tolist()), [], []
        seen = 0
        for item in items:
            group.append(item)
            seen += len(item)
            while ends and seen == ends[0]:
                repeated += group * times
                group, ends = [], ends[1:]
        items = repeated
    where = marked.reshape(-1).nonzero()[:, 0]
    return items, list(where.split([len(item) for item in items]))


def _title(whole: nn.Module) -> str:
    """A class in words, without what all are called."""
    return re.sub(r"(Model|For[A-Z]\w*)$", "", type(whole).__name__)


def find(model: nn.Module) -> VisionLanguageHost | None:
    """Bind a vision-language model; None for any other model.

    Raises   HostError where its language model is no decoder that can be entered."""
    whole = _whole(model)
    if whole is None:
        return None
    path, module = whole
    found = bridge(module)
    language = next(stack for stack in readers(module) if stack.path == found.language)
    return VisionLanguageHost(found, module, path, language)


def _whole(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The innermost module that encodes pictures and has a decoder that reads them among words, and its path."""
    from transformers import PreTrainedModel

    for path, module in reversed(list(model.named_modules())):
        if not isinstance(module, PreTrainedModel) or getattr(module.config, "is_encoder_decoder", False):
            continue
        taken = inspect.signature(type(module).forward).parameters
        marks = any(hasattr(module.config, n) for n in TOKENS) or "image_embeds_position_mask" in taken
        if marks and encodes(module) is not None and "input_ids" in taken and readers(module):
            return path, module
    return None


__all__ = ["ROWS", "Encoding", "Host", "LayoutError", "VisionLanguage", "VisionLanguageHost", "find"]
