"""Draw docs/pictures/tokens.png: what three methods leave of one packaged picture, block by block."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

import fewer
from fewer.datasets import images as data
from fewer.models import zoo
from fewer.studio import pictures

OUT = Path(__file__).resolve().parent.parent / "docs" / "pictures" / "tokens.png"
METHODS = ("tome:r=13", "cls_topk:keep=0.7", "atc:keep=0.7")
PICTURE = 60  # of the packaged set
BLOCKS = (3, 6, 9, 11)  # 0-based: each of them after a block in which all three methods act
SIZE = 168


def strip(method: str) -> Image.Image:
    """One picture through one method: the input, then its tokens after each of the blocks."""
    model, processor = zoo.load_model()
    images = data.load("embedded")
    picture = processor.fit(images.image(PICTURE))
    with torch.inference_mode(), fewer.apply(model, method) as session:
        model(pixel_values=processor(picture))
    grid, prefix = session.last.grid, session.host.prefix
    assert grid is not None
    tiles = [pictures.original(picture, grid, size=SIZE)]
    tiles += [
        pictures.regions(picture, pictures.patch_rows(session.last.rows(b)[0].numpy(), prefix, grid), size=SIZE)
        for b in BLOCKS
    ]
    captions = ["input", *(f"block {b + 1}: {session.counts[b]} tokens" for b in BLOCKS)]
    return pictures.sheet([tiles], captions, title=method)


def main() -> None:
    strips = [strip(method) for method in METHODS]
    page = Image.new("RGB", (strips[0].width, sum(s.height for s in strips)))
    top = 0
    for image in strips:
        page.paste(image, (0, top))
        top += image.height
    OUT.parent.mkdir(parents=True, exist_ok=True)
    page.save(OUT, optimize=True)
    print(f"written: {OUT.relative_to(OUT.parent.parent.parent)}")


if __name__ == "__main__":
    main()
