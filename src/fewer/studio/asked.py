"""Pictures of a vision-language benchmark: what a method left of a few scenes, and what the model then answered."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from fewer.datasets.scenes import GRID, Question
from fewer.evaluation.settings import UNREDUCED
from fewer.evaluation.visual import VisualSubject, answers

from .gallery import FOLDER
from .pictures import _font, original, regions
from .style import ACCENT, INK, PAPER, QUIET

TILE = 232
CHOSEN = ("presence", "place", "colour", "count")


def asked(subject: VisualSubject, form: str, session: Callable[[], Any], out: Path) -> str:
    """Draw one question of each of four kinds under its scene, dropped patches faded, with the answer given and, where
    that is wrong, the right one. Returns the file, relative to out."""
    questions = examples(subject)
    with session() as opened, torch.inference_mode():
        said, left = answers(subject, opened, questions)
    tiles = []
    for question, rows in zip(questions, left, strict=True):
        image = Image.fromarray(question.scenes[0].pixels)
        drawn = original(image, (GRID, GRID), size=TILE) if form == UNREDUCED else regions(image, rows, size=TILE)
        tiles.append(drawn)
    file = Path(FOLDER) / f"{re.sub(r'[^a-z0-9.=+]+', '-', form.lower())}.png"
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    _page(tiles, questions, said).save(out / file, optimize=True)
    return file.as_posix()


def examples(subject: VisualSubject) -> list[Question]:
    """The first question of each of `CHOSEN` that is about something in the picture."""
    found = []
    for kind in CHOSEN:
        mine = [q for q in subject.questions if q.kind == kind]
        found.append(next((q for q in mine if q.about), mine[0]))
    return found


def _page(tiles: list[Image.Image], questions: list[Question], said: list[str]) -> Image.Image:
    width, height = tiles[0].size
    gap, below = 14, 52
    page = Image.new("RGB", (len(tiles) * (width + gap) - gap, height + below), PAPER)
    draw = ImageDraw.Draw(page)
    for i, (tile, question, word) in enumerate(zip(tiles, questions, said, strict=True)):
        left = i * (width + gap)
        page.paste(tile, (left, 0))
        draw.text((left, height + 6), question.text, QUIET, _font(13))
        right = word == question.answer
        draw.text((left, height + 26), word, INK if right else ACCENT, _font(15))
        if not right:
            after = left + draw.textlength(word + "  ", _font(15))
            draw.text((after, height + 28), f"not {question.answer}", QUIET, _font(13))
    return page
