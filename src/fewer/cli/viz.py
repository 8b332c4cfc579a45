"""`fewer viz`: draw what became of the tokens of an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .inputs import ASKED, Model, applied, load, scene, sees
from .inputs import guide as guide_of
from .output import out, shown, writable, wrote

SHORT = 16
"""Tokens of an answer in a picture."""


def command(
    image: Annotated[
        str, typer.Argument(help="An image file, or a packaged one: embedded:17; for llava-scenes scenes:17.")
    ],
    method: Annotated[list[str], typer.Option("--method", help="Text form such as tome:r=8; repeat to stack.")],
    model: Model = "vit-fashion",
    question: Annotated[
        str | None, typer.Option(help="What a vision-language model is asked. Default: what a packaged scene asks.")
    ] = None,
    out_: Annotated[Path, typer.Option("--out", help="PNG to write.")] = Path("viz.png"),
    layers: Annotated[int, typer.Option(min=1, help="At most this many blocks are shown.")] = 5,
    size: Annotated[int, typer.Option(min=32, help="Pixels of one picture's longer edge.")] = 280,
) -> None:
    """Draw which tokens of an image stayed, merged and went, block by block."""
    import torch
    from PIL import Image

    from fewer.evaluation.settings import split_forms
    from fewer.studio.pictures import followed, sheet

    if Image.registered_extensions().get(writable(out_).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {out_} is not named as a picture: end it with .png")
    forms = split_forms(method)
    picture, asked = scene(image)
    network, processor = load(model)
    if sees(network):
        _asked(network, processor, picture, question or asked or ASKED, forms, out_, (model, image), layers, size)
        return
    if question is not None:
        raise ValueError(f"--question does not apply: {model} is no vision-language model")
    fitted = processor.fit(picture) if hasattr(processor, "fit") else picture
    session, untrained = applied(network, forms)
    with session, torch.inference_mode():
        session.host.root(processor([picture]))
        captions, tiles = followed(session, [fitted], most=layers, size=size)
    note = f"{model}; {Path(image).name}" + ("; random modules" if untrained else "")
    sheet(tiles, captions, title=" ".join(forms), note=note).save(out_)
    out.print(shown(session.report()))
    wrote(out_)


def _asked(
    network: Any, processor: Any, picture: Any, question: str, forms: list[str], file: Path, names: tuple[str, str],
    most: int, size: int,
) -> None:  # fmt: skip
    """`viz` on a vision-language model: the rows left of an image, and what it answers with and without the method."""
    from fewer.studio.pictures import sheet
    from fewer.studio.seen import as_seen, left, prompted

    given = prompted(network, processor, question, [picture], None)

    def answer() -> str:
        ids = network.generate(**given, max_new_tokens=SHORT, do_sample=False)
        return str(processor.tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    before = answer()
    guide = guide_of(names[0], network)
    session, untrained = applied(network, forms, guide)
    with session:
        if guide is not None:
            session.ask([question])
        after = answer()
        captions, tiles = left(session, as_seen(processor, given, picture), most=most, size=size)
        report = session.report()
    said = f"{question} {after}" + (f" (all tokens: {before})" if after != before else "")
    note = f"{names[0]}; {Path(names[1]).name}; {said}" + ("; random modules" if untrained else "")
    if any(method.card.acts in ("distill", "pool") for method in session.methods):
        note += "; rows are made of several patches, and stand where one of them stood"
    sheet([tiles], captions, title=" ".join(forms), note=note).save(file)
    out.print(shown(report))
    for what, words in (("question", question), ("answer", after), ("all tokens", before)):
        out.print(f"[dim]{what}[/] {shown(words)}", soft_wrap=True)
    wrote(file)
