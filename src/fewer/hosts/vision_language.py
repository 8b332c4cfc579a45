"""Vision-language models of Hugging Face transformers: the table, and which rows of their prompts are visual."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fewer.core import Seen, Shape
from fewer.core.layout import Item, Layout

from .anatomy import Stack, anatomy, stacks
from .attention import HostError
from .base import Host
from .decoder import DecoderHost


class LayoutError(ValueError):
    """It cannot be told which rows of a prompt are visual, or which part of an image they show."""


@dataclass(eq=False)
class Encoding:
    """Images, or videos, on their way through the tower and the projector.

    kind, given    "image" or "video"; the arguments the model encodes them from, by name
    entered        what entered the projector: (T, P, C), or (G, C) where it takes all images end to end
    packed, tiles  where the model packs tiles itself: `coordinates` of each image, packed, (n, 4), and its tiles
    seen, outputs  of the tower's blocks that somebody looks at: attention calls, and what came out
    present, share see `Sight`
    """

    kind: str
    given: dict[str, Any]
    entered: Tensor | None = None
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
        """Of all tiles."""
        return math.prod(self.features.shape[:-1])


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


@dataclass(frozen=True)
class VisionLanguage:
    """One architecture.

    root      class name of the module that owns tower, projector and language model
    language, tower, projector    paths from it
    joins     whether rows of the tower's output are joined before they are projected
    images    (host, arguments of the root's forward, projector call) -> the images, in the order of the prompt
    videos    the same for videos; None where it takes none
    """

    name: str
    root: str
    images: Callable[[VisionLanguageHost, Encoding, dict[str, Any]], list[Item]]
    videos: Callable[[VisionLanguageHost, Encoding, int], list[Item]] | None = None
    language: str = "language_model"
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    joins: bool = False


def _square(rows: int) -> int:
    side = math.isqrt(rows)
    if side * side != rows:
        raise LayoutError(
            f"{rows} visual rows per picture form no square: only square pictures of one size are known for this model"
        )
    return side


def _tiles(host: VisionLanguageHost, call: Encoding, given: dict[str, Any]) -> list[Item]:
    """Each picture by itself (LLaVA, Idefics 3, SmolVLM: their crops are pictures of their own)."""
    tiles, rows = call.features.shape[:2]
    if call.given.get("image_sizes") is not None and tiles == 1:  # a tower that takes pictures of any size (Pixtral)
        patch = host.tower_module.config.patch_size  # type: ignore[union-attr]
        items, first = [], 0
        for height, width in torch.as_tensor(call.given["image_sizes"]).tolist():
            items.append(Item.raster(1, height // patch, width // patch, first=first))
            first += len(items[-1])
        return items
    side = _square(rows)
    return [Item.raster(1, side, side, first=t * rows) for t in range(tiles)]


def _runs(host: VisionLanguageHost, call: Encoding, given: dict[str, Any]) -> list[Item]:
    """Pictures of several crops that stand behind each other without a word between (InternVL): found by the runs of
    placeholders."""
    tiles, rows = call.features.shape[:2]
    runs = host.runs(given)
    side, items, first = _square(rows), [], 0
    times = max(sum(map(sum, runs)) // (tiles * rows), 1)  # beam search repeats each prompt
    for run in (run for prompt in runs[::times] for run in prompt):
        if run % rows:
            raise LayoutError(f"a run of {run} placeholders is no whole number of crops of {rows} rows each")
        items.append(Item.raster(1, side, side, tiles=run // rows, first=first))
        first += run
    if first != tiles * rows:
        raise LayoutError(f"{first} placeholders stand in the prompts for {tiles * rows} visual rows")
    return items


def _packed(host: VisionLanguageHost, call: Encoding, given: dict[str, Any]) -> list[Item]:
    """One view of the whole image, then its crops as one canvas without its padding, a separator at the end of each
    line (LLaVA-NeXT, LLaVA-OneVision). The model's own packing told where its rows come from."""
    rows, items, first = call.features.shape[1], [], 0
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


def _frames(host: VisionLanguageHost, call: Encoding, first: int) -> list[Item]:
    """Frames pooled to half the side, a separator behind the last (LLaVA-OneVision)."""
    videos, frames = call.given["pixel_values_videos"].shape[:2]
    side = math.ceil(_square(call.features.shape[1]) / 2)
    full = Item.raster(frames, side, side)
    ended = [torch.cat([x, x[-1:]]) for x in (full.tile, full.time, full.row, full.column)]
    separator = torch.zeros(len(full) + 1, dtype=torch.bool)
    separator[-1] = True
    tile, time, row, column = ended
    return [Item(tile, time, row, column, None, separator) for _ in range(videos)]


def _sizes(call: Encoding, key: str) -> Tensor:
    """(images, 3): frames, height and width in patches."""
    found = call.given.get(key, call.given.get("image_grid_thw"))
    if found is None:
        raise LayoutError(f"{key} is missing: it says how many patches each {call.kind} has")
    return torch.as_tensor(found)


def _grids(call: Encoding, key: str, merge: int, first: int, order: Tensor | None = None) -> list[Item]:
    """Frames of merged patches, row by row (Qwen-VL). order: where the rows of the projector's output stand."""
    items = []
    for t, h, w in _sizes(call, key).tolist():
        item = Item.raster(t, h // merge, w // merge, first=first)
        items.append(item)
        first += len(item)
    if order is None:
        return items
    offset, moved = items[0].source[0] if items and items[0].source is not None else 0, []
    for item in items:
        assert item.source is not None
        moved.append(Item(item.tile, item.time, item.row, item.column, order[item.source - offset] + offset))
    return moved


def _qwen_images(host: VisionLanguageHost, call: Encoding, given: dict[str, Any]) -> list[Item]:
    return _grids(call, "image_grid_thw", host.merge, 0)


def _qwen_videos(host: VisionLanguageHost, call: Encoding, first: int) -> list[Item]:
    return _grids(call, "video_grid_thw", host.merge, first)


def _windowed(host: VisionLanguageHost, key: str, call: Encoding) -> Tensor:
    """Where each merged patch stands in a tower that sorts patches by window."""
    from transformers.vision_utils import get_vision_window_index

    tower: Any = host.tower_module
    index, _ = get_vision_window_index(
        _sizes(call, key).cpu(), spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size,
        patch_size=tower.patch_size,
    )  # fmt: skip
    return torch.as_tensor(index).argsort()


def _window_images(host: VisionLanguageHost, call: Encoding, given: dict[str, Any]) -> list[Item]:
    return _grids(call, "image_grid_thw", host.merge, 0, _windowed(host, "image_grid_thw", call))


def _window_videos(host: VisionLanguageHost, call: Encoding, first: int) -> list[Item]:
    return _grids(call, "video_grid_thw", host.merge, first, _windowed(host, "video_grid_thw", call))


_QWEN: Any = {"tower": "visual", "projector": "visual.merger", "joins": True}

ROWS = (
    VisionLanguage("LLaVA", "LlavaModel", _tiles),
    VisionLanguage("LLaVA-NeXT", "LlavaNextModel", _packed),
    VisionLanguage("LLaVA-OneVision", "LlavaOnevisionModel", _packed, _frames),
    VisionLanguage("Qwen2-VL", "Qwen2VLModel", _qwen_images, _qwen_videos, **_QWEN),
    VisionLanguage(
        "Qwen2.5-VL", "Qwen2_5_VLModel", _window_images, _window_videos, **_QWEN
    ),
    VisionLanguage("Qwen3-VL", "Qwen3VLModel", _qwen_images, _qwen_videos, **_QWEN),
    VisionLanguage(
        "SmolVLM", "SmolVLMModel", _tiles, language="text_model", tower="vision_model",
        projector="connector.modality_projection", joins=True,
    ),
    VisionLanguage(
        "Idefics 3", "Idefics3Model", _tiles, language="text_model", tower="vision_model",
        projector="connector.modality_projection", joins=True,
    ),
    VisionLanguage("InternVL", "InternVLModel", _runs, joins=True),
)  # fmt: skip


class VisionLanguageHost(DecoderHost):
    """The decoder of a vision-language model, with what stands before it."""

    def __init__(self, seer: VisionLanguage, whole: nn.Module, path: str, language: Stack) -> None:
        at = f"{path}.{seer.language}".lstrip(".")
        super().__init__(anatomy(language), language.root, f"{at}.{language.path}".rstrip("."))
        self.seer, self.whole = seer, whole
        self.tower_module: nn.Module = attrgetter(seer.tower)(whole)
        self.projector: nn.Module = attrgetter(seer.projector)(whole)
        self.tower_path = f"{path}.{seer.tower}".lstrip(".")
        config: Any = whole.config
        self.image_token, self.video_token = config.image_token_id, getattr(config, "video_token_id", None)

    @property
    def merge(self) -> int:
        """Patches along each side that the projector joins to one row."""
        return int(self.tower_module.spatial_merge_size)  # type: ignore[union-attr, arg-type]

    @property
    def joins(self) -> bool:
        """Whether rows of the tower's output are joined before they are projected."""
        return self.seer.joins

    @property
    def tower_has_cls(self) -> bool:
        """Whether the vision tower has a class token whose attention ranks patches."""
        return self.tower is not None and self.tower.has_cls

    @cached_property
    def tower(self) -> Host | None:
        """The tower's blocks, bound; None where it hands on no sequence of one picture's patches."""
        for stack in stacks(self.tower_module):
            try:
                found = anatomy(stack)
            except HostError:
                continue
            if found.kind == "vision":
                return Host(found, stack.root, f"{self.tower_path}.{stack.path}".rstrip("."))
        return None

    @property
    def used(self) -> int:
        """The tower's block whose output is projected; where there are several, the last one."""
        layer = getattr(self.whole.config, "vision_feature_layer", -1)
        layer = layer if isinstance(layer, int) else layer[-1]
        depth = self._depth
        return depth + layer if layer < 0 else layer - 1

    @property
    def _depth(self) -> int:
        vision: Any = self.whole.config.vision_config  # type: ignore[union-attr]
        return int(next(getattr(vision, n) for n in ("num_hidden_layers", "depth") if hasattr(vision, n)))

    def shape(self) -> Shape:
        """For methods with modules of their own."""
        config: Any = self.whole.config
        if self.seer.projector == "visual.merger":
            raise HostError(
                f"{self.seer.name} takes pictures of any size; modules of one's own at the bridge are known for models "
                "whose pictures, or crops, have one size (LLaVA, LLaVA-NeXT, LLaVA-OneVision, SmolVLM, InternVL)"
            )
        image, patch = (
            x if isinstance(x, int) else x[0]
            for x in (config.vision_config.image_size, config.vision_config.patch_size)
        )
        joined = getattr(config, "scale_factor", None) or round(1 / getattr(config, "downsample_ratio", 1.0))
        side = image // patch // (joined if self.joins else 1)
        linear = next(m for m in self.projector.modules() if isinstance(m, nn.Linear))
        return Shape(self.channels, self.heads, linear.in_features, self._depth, (side, side))

    def placeholders(self, given: dict[str, Any], token: int) -> Tensor:
        """(B, S) bool on the CPU: the rows that stand for images, or videos. One read of the prompt."""
        ids = given.get("input_ids")
        if ids is not None:
            return ids.cpu() == token
        embeds = given["inputs_embeds"]
        own = self.whole.get_input_embeddings()(torch.full((), token, dtype=torch.long, device=embeds.device))  # type: ignore[operator]
        return (embeds == own).all(-1).cpu()

    def runs(self, given: dict[str, Any]) -> list[list[int]]:
        """Lengths of the runs of image placeholders of each prompt."""
        lengths = []
        for row in self.placeholders(given, self.image_token).to(torch.int8):
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
            if call.kind == "image":
                token, found = self.image_token, self.seer.images(self, call, given)
            elif self.seer.videos is not None and self.video_token is not None:
                token, found = self.video_token, self.seer.videos(self, call, first)
            else:
                raise LayoutError(f"{self.seer.name} is known to take images only, no videos")
            first += call.rows
            marked = self.placeholders(given, token)
            for item, at in zip(*_placed(found, marked, call.kind), strict=True):
                if len(at) and int(at[0]) // shape[1] != int(at[-1]) // shape[1]:
                    raise LayoutError(f"the placeholders of one {call.kind} are spread over two prompts of the batch")
                items.append(item)
                places.append(at)
        return Layout.of(shape, items, places, real, device) if items else None

    def describe(self) -> Iterator[tuple[str, str]]:
        yield "vision-language model", self.seer.name
        tower = "its blocks cannot be entered" if self.tower is None else self.tower.name
        yield "vision tower", f"{type(self.tower_module).__name__} ({tower})"
        for what, value in super().describe():
            yield what, value if what != "sites" else f"{value}, the bridge between tower and language model"


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


def find(model: nn.Module) -> VisionLanguageHost | None:
    """Bind a vision-language model; None for any other model.

    Raises   HostError where its language model is no decoder that can be entered."""
    for path, module in model.named_modules():
        for row in ROWS:
            if type(module).__name__ != row.root:
                continue
            language = attrgetter(row.language)(module)
            found = stacks(language)
            if not found:
                raise HostError(f"{row.name} with a {type(language).__name__} inside: no decoder fewer can enter")
            return VisionLanguageHost(row, module, path, found[-1])
    return None


__all__ = ["ROWS", "Encoding", "Host", "LayoutError", "VisionLanguage", "VisionLanguageHost", "find"]
