"""A twin of a vision-language model, and a batch of prompts with a picture each that it takes.

What a picture is made of differs: one image, crops of one, flat patches with the sizes of their grid. The arguments
that a class asks for by name say which forms there are to try; the first that it encodes is its own.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .discovery import SMALL, base
from .twin import POSITIONS, SIDE, TwinError, _find, _number, _numbers, _parts, _words, build, shrink

IMAGES = 2  # of the example, one in each prompt
LEAST = 4  # rows of a picture, for some to leave and some to stay
LARGER = 4
COUNTS = re.compile(r"(tokens_per_image|image_seq_len(gth)?|num_image_tokens|num_image_patches|image_tokens)$")
FEATURES = re.compile(r"feature_layers?$")  # which of a tower's layers are read
TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "video_token_index")
VIDEO_TOKENS = ("video_token_id", "video_token_index")


class NoExample(TwinError):
    """No prompt with a picture is known that a class takes."""


def twins(whole: nn.Module) -> Iterator[nn.Module]:
    """Small random models of a vision-language model's class and config: with few layers, with larger pictures where
    few rows are left of small ones, with all layers for configs that name some, and as it is where it is small."""
    first = _twin(whole, 2)
    yield first
    if sum(p.numel() for p in first.parameters()) <= SMALL:
        yield _twin(whole, 2, LARGER)
        yield _twin(whole, None)
    if sum(p.numel() for p in whole.parameters()) <= SMALL:
        yield _twin(whole, 0)


def _twin(whole: nn.Module, depth: int | None, larger: int = 1) -> nn.Module:
    """depth: layers to keep; None = all; 0 = nothing is made smaller. larger: so many times the sides of pictures."""
    config: Any = copy.deepcopy(whole.config)
    for part in _parts(config):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    if depth == 0:
        return build(base(type(whole)), config)
    small: Any = shrink(config, depth=depth)
    for part in _parts(small) if larger > 1 else ():
        size: Any = vars(part).get("image_size")
        if isinstance(size, list | tuple):
            setattr(part, "image_size", type(size)(larger * s for s in size))  # noqa: B010
        elif _number(size):
            setattr(part, "image_size", larger * size)  # noqa: B010
    _fewer_rows(config, small)
    _fitting(config, small)
    return build(base(type(whole)), small)


def _fitting(config: Any, small: Any) -> None:
    """What the class takes to follow from other numbers of its config: the width of merged patches, the places of a
    grid, which layers of a tower are read."""
    merge = _plain(_find(config, "spatial_merge_size", "merge_size")) or 2
    deep = min([vars(p)["num_hidden_layers"] for p in _parts(small) if "num_hidden_layers" in vars(p)], default=1) - 1
    pairs = list(zip(_parts(config), _parts(small), strict=True))
    widths = {w: s for a, b in pairs if _number(w := vars(a).get("hidden_size")) and (s := vars(b)["hidden_size"])}
    for before, part in pairs:
        for name, value in vars(before).items():
            if not name.endswith("hidden_size") or not _number(value) or value in widths:
                continue
            if value % merge**2 == 0 and value // merge**2 in widths:
                setattr(part, name, widths[value // merge**2] * merge**2)
        for name in [n for n, v in vars(part).items() if FEATURES.search(n) and _numbers(v)]:
            setattr(part, name, [max(v, -1 - deep) if v < 0 else min(v, deep) for v in getattr(part, name)])
        if _side(before) and vars(before).get("num_position_embeddings") == _side(before) ** 2:
            part.num_position_embeddings = _side(part) ** 2
        sides = [vars(part).get(f"pos_emb_{side}") for side in ("height", "width")]
        if all(map(_number, sides)) and "max_position_embeddings" in vars(part):
            part.max_position_embeddings = math.prod(sides)


def _fewer_rows(config: Any, small: Any) -> None:
    """Where a config says how many rows an image has: as many fewer as the small image has fewer patches."""
    before, behind = (_side(c) for c in (config, small))
    if not before or not behind:
        return
    edge = behind * (_plain(_find(small, "patch_size")) or 1)
    for part in _parts(small):
        if isinstance(vars(part).get("image_grid_pinpoints"), list | tuple):
            part.image_grid_pinpoints = [[edge, 2 * edge], [2 * edge, edge], [2 * edge, 2 * edge]]
        for name, value in vars(part).items():
            if isinstance(value, dict) and "patch_to_query" in name:
                setattr(part, name, {behind**2: behind})
    if before == behind:
        return
    for part in _parts(small):
        for name, value in vars(part).items():
            if COUNTS.search(name) and _number(value):
                setattr(part, name, max(1, value * behind**2 // before**2, 4 if value >= 4 else 1))


def _side(config: Any) -> int:
    """Patches along a side of an image; 0 where the config does not say."""
    size, patch = _find(config, "image_size"), _find(config, "patch_size")
    size, patch = (x[0] if isinstance(x, list | tuple) else x for x in (size, patch))
    return size // patch if _number(size) and _number(patch) and patch else 0


def token_of(config: Any, names: tuple[str, ...] = TOKENS) -> int | None:
    """The id of the placeholder of an image, or a video; None where the config names none."""
    return next((v for n in names if isinstance(v := getattr(config, n, None), int)), None)


def encodes(whole: nn.Module) -> Any:
    """The method that makes rows of images; None where there is none by a name that is known."""
    return getattr(whole, "get_image_features", None) or getattr(whole, "get_video_features", None)


def pictures(twin: nn.Module, seed: int = 0, even: bool = False) -> Iterator[dict[str, Any]]:
    """Forms in which a twin may want its images, as arguments of its encoding; likely ones first."""
    config: Any = twin.config
    taken = {n for n in inspect.signature(encodes(twin)).parameters if n not in ("kwargs", "args")}
    taken |= {n for n in inspect.signature(type(twin).forward).parameters if re.match(r"pixel|image|patch|spatial", n)}
    source = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source)

    patch = _plain(_find(config, "patch_size")) or 16
    channels = _plain(_find(config, "num_channels", "in_channels", "in_chans")) or 3
    size = _find(config, "image_size") or patch * SIDE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    depth = _plain(_find(config, "temporal_patch_size")) or 1
    flats = list(dict.fromkeys([_flat(twin) or channels * patch**2, channels * patch**2 * depth, channels * patch**2]))
    flat = flats[0]
    merge = _plain(_find(config, "spatial_merge_size", "merge_size", "pooling_kernel_size", "downsample_factor",
                         "merge_kernel_size", "pixel_unshuffle_factor")) or 2  # fmt: skip
    times = [(2 * merge, 3 * merge), (2 * merge, (3 if even else 2) * merge)]
    cells = [h * w for h, w in times]
    if grids := [n for n in taken if re.search(r"grid_(thw|hw|hws)$", n) and "video" not in n]:
        sizes = torch.tensor([[1, h, w] if grids[0].endswith("thw") else [h, w] for h, w in times])
        more = {grids[0]: sizes}
        if "image_merge_sizes" in taken:
            more["image_merge_sizes"] = torch.full((IMAGES,), merge)
        for width in flats:
            yield {"pixel_values": noise(sum(cells), width), **more}
        yield {"pixel_values": noise(sum(cells), channels, patch, patch), **more}
        yield {"pixel_values": noise(1, sum(cells), flat), **more}
        return
    if "spatial_shapes" in taken:
        shape = torch.tensor(times)
        mask = torch.zeros(IMAGES, max(cells), dtype=torch.long)
        for row, n in zip(mask, cells, strict=True):
            row[:n] = 1
        yield {
            "pixel_values": noise(IMAGES, max(cells), flat), "spatial_shapes": shape, "pixel_attention_mask": mask
        }  # fmt: skip
        return
    if "image_position_ids" in taken:
        where = torch.full((IMAGES, max(cells), 2), -1)
        for row, (h, w) in zip(where, times, strict=True):
            row[: h * w] = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy"), -1).view(-1, 2)
        yield {"pixel_values": noise(IMAGES, max(cells), flat), "image_position_ids": where}
        yield {"pixel_values": noise(IMAGES, max(cells), flat) / 4 + 0.5, "image_position_ids": where}
        return
    if "target_sizes" in taken:
        shape = torch.tensor([(2 * h, 2 * w) for h, w in times])
        most = sum(4 * n for n in cells)
        yield {"pixel_values": noise(1, channels, patch, most * patch), "target_sizes": shape}
        yield {"pixel_values": noise(IMAGES, channels, patch, 4 * max(cells) * patch), "target_sizes": shape}
        return
    if "image_token_pooling" in taken:  # which patches of the crops are pooled to each row
        every = torch.arange(IMAGES * SIDE * SIDE).view(IMAGES, SIDE // 2, 2, SIDE // 2, 2)
        pooled = every.transpose(2, 3).reshape(-1, 4)
        grid = torch.tensor([[SIDE // 2, SIDE // 2, 0, 0]] * IMAGES)
        yield {"pixel_values": noise(IMAGES, SIDE * SIDE, flat), "image_token_pooling": pooled, "image_grids": grid}
        return
    if "flattened_patches" in taken:
        rows = torch.arange(SIDE * SIDE)
        places = torch.stack([rows // SIDE + 1, rows % SIDE + 1], -1).expand(IMAGES, -1, -1)
        yield {"flattened_patches": torch.cat([places.float(), noise(IMAGES, SIDE * SIDE, flat)], -1)}
        return
    more = {}
    if "qformer_input_ids" in taken:
        more["qformer_input_ids"] = _words(config, IMAGES, 5, source)
        more["qformer_attention_mask"] = torch.ones(IMAGES, 5, dtype=torch.long)
    if "high_res_pixel_values" in taken:
        high = _plain(_find(config.high_res_vision_config, "image_size")) or 1024
        more["high_res_pixel_values"] = noise(IMAGES, channels, high, high)
    whole = noise(IMAGES, channels, height, width)
    if "pixel_attention_mask" in taken:
        more["pixel_attention_mask"] = torch.ones(IMAGES, 1, height, width, dtype=torch.bool)
        yield {"pixel_values": whole[:, None], **more}
        yield {"pixel_values": whole[:, None], **more, "pixel_attention_mask": torch.ones(IMAGES, 1, dtype=torch.bool)}
    if hasattr(twin, "pack_image_features"):
        pins = _find(config, "image_grid_pinpoints") or [[height, width]]
        tiles = 1 + (pins[0][0] // height) * (pins[0][1] // width)
        for n in dict.fromkeys((tiles, 1 + 2, 1)):
            yield {
                "pixel_values": noise(IMAGES, n, channels, height, width), "image_sizes": torch.tensor([pins[0]] * 2)
            }  # fmt: skip
    if "image_sizes" in taken:
        step = patch * merge
        tall = torch.tensor([[(3 if even else 2) * step, 3 * step], [3 * step, 3 * step]])
        canvas = noise(IMAGES, channels, 3 * step, 3 * step)
        yield {"pixel_values": canvas, "image_sizes": tall}
        yield {"pixel_values": whole, "image_sizes": torch.tensor([[height, width]] * IMAGES)}
    yield {"pixel_values": whole, **more}
    yield {"pixel_values": whole[:, None], **more}
    yield {"pixel_values": whole[:, None].expand(-1, 2, -1, -1, -1).contiguous(), **more}
    yield {"pixel_values": noise(IMAGES, SIDE * SIDE, flat), **more}
    yield {"pixel_values": noise(IMAGES, 1, SIDE * SIDE, flat), **more}


def _plain(value: Any) -> int | None:
    value = value[0] if isinstance(value, list | tuple) and value else value
    return value if _number(value) else None


def _flat(twin: nn.Module) -> int | None:
    """Numbers in one patch, as what takes flat patches expects them."""
    for path, module in twin.named_modules():
        named = "patch" in path and not re.search(r"merg|audio", path)
        if named and isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            return module.weight.shape[1:].numel()
    return None


def made_of(output: Any) -> list[Tensor]:
    """The rows of each picture in what the encoding of images gave, (n, d), or (tiles, n, d) of crops that are one."""
    found = output
    if not isinstance(output, Tensor | list | tuple):
        found = getattr(output, "pooler_output", None)
        if found is None or (isinstance(found, Tensor) and found.dim() < 2):
            found = getattr(output, "last_hidden_state", output)
    if isinstance(found, Tensor):
        return list(found) if found.dim() > 2 else [found]
    return [x for x in found if isinstance(x, Tensor) and x.dim() > 1]


def rows_of(output: Any) -> list[Tensor]:
    """The same, as (n, d) each."""
    return [x.reshape(-1, x.shape[-1]) for x in made_of(output)]


def shapes_of(output: Any) -> list[tuple[int, ...]]:
    """The same, without the channels."""
    return [tuple(x.shape[:-1]) for x in made_of(output)]


def heights(sizes: Tensor) -> Tensor:
    """(images, 2 or 3): height and width of each picture. sizes: the same, or (images, patches, 2), the column and row
    of each patch, -1 = none."""
    return sizes.amax(1).flip(-1) + 1 if sizes.dim() == 3 else sizes


def example(twin: nn.Module, seed: int = 0, even: bool = False) -> dict[str, Any]:
    """Arguments of a twin's forward: two prompts of different lengths, padded on the left, a picture in each. even: of
    the same length.

    Raises   NoExample where no form of pictures is encoded, or the prompt is not read.
    """
    name, config = type(twin).__name__, twin.config
    token = token_of(config)
    if encodes(twin) is None:
        raise NoExample(f"{name} has no get_image_features, the method that makes rows of images")
    takes = set(inspect.signature(type(twin).forward).parameters)
    if token is None and "image_embeds_position_mask" not in takes:
        raise NoExample(f"the config of {name} names no image_token_id, the placeholder of an image")
    tried: list[str] = []
    for form in pictures(twin, seed, even):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                own = inspect.signature(encodes(twin)).parameters
                output = encodes(twin)(**{k: v for k, v in form.items() if k in own}, **_as_dict(own))
            rows = [len(x) for x in rows_of(output)]
            for counts in _split(rows, form):
                if max(counts) < LEAST:
                    tried.append(f"a small picture is {max(counts)} rows, too few to take some away")
                    continue
                try:
                    given = _prompts(twin, token, counts, form, takes, seed, even)
                    with torch.no_grad():
                        twin(**given)
                    return given
                except Exception as error:
                    tried.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
        except Exception as error:  # whatever a stranger's code raises
            tried.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    said = "; ".join(dict.fromkeys(tried))[:600]
    raise NoExample(f"no prompt with pictures is known that {name} takes: {said}")


def _as_dict(own: Mapping[str, Any]) -> dict[str, Any]:
    return {"return_dict": True} if "return_dict" in own or "kwargs" in own else {}


def _split(rows: list[int], form: Mapping[str, Any]) -> Iterator[list[int]]:
    """Rows of each of the two images: as they came apart, by the sizes, or half of them each."""
    if len(rows) == IMAGES:
        yield rows
    elif len(rows) % IMAGES == 0 and len(rows):
        each = len(rows) // IMAGES
        yield [sum(rows[i * each : (i + 1) * each]) for i in range(IMAGES)]
    total = sum(rows)
    for name, value in form.items():
        value = heights(value) if name == "image_position_ids" else value
        if isinstance(value, Tensor) and value.shape[:1] == (IMAGES,) and value.dim() == 2 and value.shape[1] in (2, 3):
            area = [math.prod(x) for x in value.tolist()]
            if all(total * a % sum(area) == 0 for a in area):
                yield [total * a // sum(area) for a in area]
    if total % IMAGES == 0:
        yield [total // IMAGES] * IMAGES


def _prompts(
    twin: nn.Module, token: int | None, counts: list[int], form: Mapping[str, Any], takes: set[str], seed: int,
    even: bool,
) -> dict[str, Any]:  # fmt: skip
    config: Any = twin.config
    source = torch.Generator().manual_seed(seed)
    first, last = (next((v for n in names if _number(v := getattr(config, n, None))), None) for names in (
        ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index"),
        ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index")))  # fmt: skip
    lines, marks = [], []
    for i, n in enumerate(counts):
        words = _words(config, 1, 9 if even else 9 + 2 * i, source)[0].tolist()
        front = words[:3] + ([] if first is None else [first])
        back = ([] if last is None else [last]) + words[3:]
        lines.append([*front, *[words[0] if token is None else token] * n, *back])
        marks.append([*[0] * len(front), *[1] * n, *[0] * len(back)])
    longest = max(map(len, lines))
    if longest > POSITIONS:
        raise NoExample(f"an image of {max(counts)} rows is too long an example")
    pad = _words(config, 1, 1, source)[0].tolist()
    ids = torch.tensor([pad * (longest - len(line)) + line for line in lines])
    given: dict[str, Any] = {"input_ids": ids, **{k: v for k, v in form.items() if k in takes}}
    if "attention_mask" in takes:
        given["attention_mask"] = torch.tensor([[0] * (longest - len(line)) + [1] * len(line) for line in lines])
    seen = torch.tensor([[0] * (longest - len(mark)) + mark for mark in marks])
    for name in ("mm_token_type_ids", "token_type_ids", "image_embeds_position_mask"):
        if name in takes:
            given[name] = seen
    return given


__all__ = ["IMAGES", "TOKENS", "VIDEO_TOKENS", "NoExample", "encodes", "example", "heights", "rows_of", "shapes_of",
           "token_of", "twins"]  # fmt: skip
