"""What the commands are given: models, sessions on them, pictures and texts by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

NAMES = "A packaged name, a hub name, a folder, or timm/NAME."
ASKED = "what is in the image ?"
"""What a vision-language model is asked where nobody says."""
Model = Annotated[str, typer.Option(help=NAMES)]


def quiet() -> None:
    """No progress bars of other libraries between ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()


def load(name: str) -> tuple[Any, Any]:
    from fewer.models.zoo import load_model

    quiet()
    return load_model(name)


def use_threads(threads: int | None, default: int) -> None:
    """As many torch threads as somebody said; 0 = as torch has it."""
    import torch

    if threads or (threads is None and default):
        torch.set_num_threads(threads or default)


def sees(network: Any) -> bool:
    """Whether a model is a vision-language model."""
    from fewer import hosts

    return isinstance(hosts.find(network), hosts.VisionLanguageHost)


def applied(network: Any, forms: Sequence[str], guide: Any = None) -> tuple[Any, bool]:
    """A session, with random modules where the package has none for this model; and whether that was so."""
    import fewer
    from fewer.runtime.modules import UNTRAINED, ModulesError

    try:
        return fewer.apply(network, list(forms), guide=guide), False
    except ModulesError:
        return fewer.apply(network, list(forms), modules=UNTRAINED, guide=guide), True


def guide(name: str, network: Any) -> Any:
    """The image-text model beside a vision-language model, for methods that compare patches with the question; None
    where there is none."""
    import fewer
    from fewer.models import zoo

    try:
        return fewer.Guide(*zoo.load_clip(name, network))
    except zoo.ModelError:
        return None


def picture(name: str) -> Any:
    """An image file, or a packaged image such as embedded:17."""
    from fewer.datasets import images as data

    head, colon, index = name.rpartition(":")
    if not colon or Path(name).exists():
        if not Path(name).exists():
            raise ValueError(f"no image {name}; give a file, or embedded:17 for a packaged one")
        return data.read_image(name)
    images = data.load(head)
    if not index.isdecimal() or int(index) >= len(images):
        raise ValueError(f"{name}: {head} has images 0 to {len(images) - 1}")
    return images.image(int(index))


def scene(name: str) -> tuple[Any, str]:
    """A picture for a vision-language model, and the packaged question about it; "" for pictures from elsewhere."""
    head, colon, number = name.partition(":")
    if head != "scenes" or not colon or Path(name).exists():
        return picture(name), ""
    from PIL import Image

    from fewer.studio.seen import example

    if not number.isdecimal():
        raise ValueError(f"{name}: give a number, as in scenes:17")
    question = example(int(number))
    return Image.fromarray(question.scenes[0].pixels), question.text


def text_of(file: Path | None) -> str:
    """What stands in a file, "" without one."""
    try:
        return "" if file is None else file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text in UTF-8: {error}") from error
