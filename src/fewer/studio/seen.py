"""Pictures in a prompt: how a vision-language model is given them, and what a method left of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fewer.datasets.scenes import KINDS, Question, exam

from .pictures import TILE, moments, original, regions
from .style import count

if TYPE_CHECKING:
    from fewer.core.visual.layout import Layout
    from fewer.runtime.session import Session

EXAMPLES = 400
"""Packaged scenes that can be asked for by number."""
ABOUT_ONE = tuple(kind for kind in KINDS if kind != "compare")


def example(number: int) -> Question:
    """A packaged question about one scene, by number; the kinds come in turn.

    Raises   ValueError for a number there is not.
    """
    if not 0 <= number < EXAMPLES:
        raise ValueError(f"scenes:{number}: there are scenes:0 to scenes:{EXAMPLES - 1}")
    turn, kind = divmod(number, len(ABOUT_ONE))
    return exam(turn + 1, kinds=[ABOUT_ONE[kind]])[turn]


def prompted(
    model: nn.Module, processor: Any, words: str, pictures: Sequence[Image.Image], chat: bool | None
) -> dict[str, Tensor]:
    """What a vision-language model is called with for one prompt, on its device: the pictures in front of the words.

    words: may say themselves where each picture stands, with the processor's own image token.
    chat: as a turn of a chat; None = where there is a template.
    Raises   ValueError for a chat without a template, where words name another number of pictures than there are, and
             for a prompt that is longer than what the model reads.
    """
    tokenizer, mark = processor.tokenizer, getattr(processor, "image_token", "<image>")
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise ValueError("this model's processor has no chat template; leave --chat out or give --raw")
    named = words.count(mark)
    if named not in (0, len(pictures)):
        raise ValueError(
            f"the prompt says {mark} {named} times; images given: {len(pictures)}. Leave {mark} out, and they stand in "
            "front"
        )
    talks = bool(template) and chat is not False
    in_front = 0 if named else len(pictures)
    if talks:
        content = [{"type": "image"}] * in_front + [{"type": "text", "text": words}]
        words = processor.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, tokenize=False, add_generation_prompt=True
        )
        if words.count(mark) != len(pictures):
            raise ValueError("this model's chat template has no place for images; give --raw")
    else:
        words = f"{mark} " * in_front + words
    given = processor(images=list(pictures) or None, text=[words], return_tensors="pt", add_special_tokens=not talks)
    read, most = given["input_ids"].shape[1], _longest(model)
    if most is not None and read > most:
        raise ValueError(
            f"{len(pictures)} images and the words make {read:,} tokens, and this model reads {most:,}: give fewer "
            "images, or a shorter text"
        )
    own = next(model.parameters())
    return {
        name: value.to(own.device, own.dtype) if value.is_floating_point() else value.to(own.device)
        for name, value in given.items()
        if isinstance(value, Tensor)
    }


def _longest(model: nn.Module) -> int | None:
    """Positions the language model knows."""
    config: Any = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def as_seen(processor: Any, given: dict[str, Tensor], picture: Image.Image) -> Image.Image:
    """The picture as the tower gets it, cut and stretched; the picture itself where the tower gets several crops or
    patches of it."""
    pixels = given.get("pixel_values")
    how: Any = getattr(processor, "image_processor", None)
    if pixels is None or pixels.shape[:2] != (1, 3) or pixels.dim() != 4 or getattr(how, "image_mean", None) is None:
        return picture
    mean, std = (torch.tensor(x)[:, None, None] for x in (how.image_mean, how.image_std))
    shown = (pixels[0].float().cpu() * std + mean).clamp(0, 1) * 255
    return Image.fromarray(shown.round().to(torch.uint8).permute(1, 2, 0).numpy())


def left(
    session: Session, picture: Image.Image, *, most: int = 4, size: int = TILE
) -> tuple[list[str], list[Image.Image]]:
    """The picture of the last prompt beside what was left of it, block by block of the language model.

    picture: as the model saw it. Returns captions and tiles, for `sheet`.
    Raises   ValueError where the prompt held several pictures, or the place of its rows in the picture is not known.
    """
    layout = session.layout
    rows, row, column = cells(layout)
    counts = session.visual_counts
    blocks = moments(counts, most, start=layout.counts[0])
    grid = (int(row.max()) + 1, int(column.max()) + 1)
    tiles = [original(picture, grid, size=size)]
    for block in blocks:
        kept = session.seen(block)[0].cpu()[rows]
        drawn = np.full(grid, -1)
        drawn[row[kept].numpy(), column[kept].numpy()] = np.arange(int(kept.sum()))
        tiles.append(regions(picture, drawn, size=size))
    said = [f"block {block + 1}: {count(counts[block])} of {layout.counts[0]}" for block in blocks]
    return ["input", *said], tiles


def cells(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Of a prompt with one picture: the rows to draw, places in the prompt, and the row and column of each in the whole
    picture, from 0; (n,) long each. Of a picture that is shown whole and in crops, these are the crops' rows."""
    if len(layout.counts) != 1:
        raise ValueError(
            f"this model made {len(layout.counts)} pictures of the one given, so that there is no single one to draw on"
        )
    rows = layout.visual[0].cpu().nonzero()[:, 0]
    tile, time, row, column = (getattr(layout, name)[0].cpu()[rows] for name in ("tile", "time", "row", "column"))
    if time.any():
        raise ValueError("a video is no single picture to draw on")
    if not tile.any():
        return rows, row, column
    if layout.crops is None or not layout.crops[0].any():
        raise ValueError("how this model arranges the crops of a picture is not known, so there is nothing to draw on")
    side, across, crop = int(row[tile == 0].max()) + 1, int(layout.crops[0, 1]), tile - 1
    row, column = crop // across * side + row, crop % across * side + column
    rows, row, column = (x[crop >= 0] for x in (rows, row, column))
    return rows, row - row.min(), column - column.min()
