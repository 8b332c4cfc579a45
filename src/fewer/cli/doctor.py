"""`fewer doctor`: what fewer finds in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from .inputs import ASKED, NAMES, load
from .output import Json, as_json, facts


def command(
    model: Annotated[str, typer.Argument(help=NAMES)] = "vit-fashion",
    json: Json = False,
) -> None:
    """What fewer finds in a model: blocks, sites, prefix tokens, grid; and whether removing nothing changes nothing."""
    network, processor = load(model)
    found = list(_found(network, processor))
    if json:
        as_json(dict(found))
    else:
        facts(found)


def _found(network: Any, processor: Any) -> Iterator[tuple[str, str]]:
    """What there is to say of a model, line by line."""
    import torch

    import fewer
    from fewer import hosts
    from fewer.runtime import verify, verify_visual

    host = hosts.find(network)
    yield from (line for line in host.describe() if line[0] != "sites")  # the verdict says more
    yield from verify.told(host)
    if isinstance(host, hosts.VisionLanguageHost):
        why = verify_visual.why(host)
        yield "the bridge", f"refused: {why}" if why else "verified"
        if not why:
            yield from _seen(network, processor)
        return
    args, inputs, plain = _sample(host, processor)
    if host.text and not inputs["input_ids"].numel():
        yield "nothing removed", "not tried: its tokenizer makes no tokens of a text; put the tokenizer's files beside"
        return
    try:
        verify.check(host, [fewer.parse(plain)], fewer.text)
    except hosts.HostError:  # the lines above have said why
        yield "nothing removed", "not tried"
        return
    with torch.inference_mode():
        before = _first(host.root(*args, **inputs))
        with fewer.apply(network, plain) as session:
            during = _first(host.root(*args, **inputs))
            grid, tokens = session.last.grid, session.last.first.n
        after = _first(host.root(*args, **inputs))
    if not host.text:
        yield "input", " x ".join(map(str, args[0].shape[1:]))
        yield "grid", "unknown" if grid is None else f"{grid[0]} x {grid[1]} patches"
    yield "tokens", str(tokens)
    yield "nothing removed", _difference(before, during)
    yield "session taken off", _difference(before, after)


def _seen(network: Any, processor: Any) -> list[tuple[str, str]]:
    """Whether a vision-language model's images are found in its prompts, and whether all is as it was without them."""
    import torch
    from PIL import Image

    import fewer
    from fewer.studio.seen import prompted

    image = Image.radial_gradient("L").convert("RGB")
    given = prompted(network, processor, ASKED, [image], None)
    plain, half = "random:site=bridge,keep=1", "random:site=bridge,keep=0.5"
    with torch.inference_mode():
        before = network(**given, use_cache=False).logits
        with fewer.apply(network, plain) as session:
            during = network(**given, use_cache=False).logits
            layout = session.layout
        with fewer.apply(network, half) as session:
            network(**given, use_cache=False)
            left = int(session.seen().sum())
        after = network(**given, use_cache=False).logits
    rows, grid = sum(layout.counts), layout.grid
    shown = "" if grid is None else f", {grid[0]} x {grid[1]}"
    pictures = "" if len(layout.counts) == 1 else f" in {len(layout.counts)} pictures"
    return [
        ("image", f"{rows} visual rows{pictures}{shown}, of {given['input_ids'].shape[1]} tokens of a prompt"),
        ("half removed", f"{left} rows reach the last block"),
        ("nothing removed", _difference(before, during)),
        ("session taken off", _difference(before, after)),
    ]


PLAIN = {"decoder": "lazyllm:keep=1", "scan": "utrc:keep=1"}


def _sample(host: Any, processor: Callable[..., Any]) -> tuple[tuple, dict[str, Any], str]:
    """Something to read for a model, as it wants it, and a method that removes nothing of it."""
    if host.text:
        words = "Of the tokens of a text many carry nothing: " * 4
        return (), dict(processor([words], return_tensors="pt")), PLAIN.get(host.kind, "power_bert:keep=1")
    from PIL import Image

    return (processor([Image.radial_gradient("L").convert("RGB")]),), {}, "tome:r=0"


def _first(answer: Any) -> Any:
    """The main tensor of a model's answer."""
    return answer if hasattr(answer, "shape") else answer[0]


def _difference(a: Any, b: Any) -> str:
    far = (a - b).abs().max().item()
    return "output equal to the bit" if far == 0 else f"output moved by at most {far:.2g}"
