"""Pictures drawn while a benchmark runs: each method on the same few images."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from PIL import Image

from fewer.datasets.images import ImageSet
from fewer.evaluation.subject import Subject
from fewer.runtime.session import Session
from fewer.spec import text

from .pictures import followed, sheet

FOLDER = "pictures"
EXAMPLES = 3
MOMENTS = 4


def gallery(session: Session, subject: Subject, out: Path) -> str | None:
    """Draw what a session's methods do to the first images of different classes. Returns the file, relative to out.

    None where the model's patches form no grid.
    """
    chosen = examples(subject.data, EXAMPLES)
    images = [fitted(subject, index) for index in chosen]
    pixels = subject.data.batch(chosen, subject.processor).to(subject.device, subject.dtype)
    subject.forward(session.model, pixels)
    if session.last.grid is None:
        return None
    captions, tiles = followed(session, images, most=MOMENTS)
    name = " ".join(text(method) for method in session.methods)
    file = Path(FOLDER) / f"{re.sub(r'[^a-z0-9.=+]+', '-', name.lower())}.png"
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    sheet(tiles, captions).save(out / file, optimize=True)
    return file.as_posix()


def examples(data: ImageSet, count: int) -> list[int]:
    """The first image of each of `count` classes, as far apart in the list of classes as they can be."""
    present = data.labels.unique().tolist()
    count = min(count, len(present))
    wanted = [present[i * len(present) // count] for i in range(count)]
    return [int(torch.nonzero(data.labels == label)[0]) for label in wanted]


def fitted(subject: Subject, index: int) -> Image.Image:
    """An image as the processor crops and scales it; where it cannot say, the image itself."""
    fit = getattr(subject.processor, "fit", None)
    image = subject.data.image(index)
    return image if fit is None else fit(image)
