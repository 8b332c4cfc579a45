"""`fewer generate`: write with a method on."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .inputs import NAMES, applied, load, scene, sees, text_of, use_threads
from .inputs import guide as guide_of
from .output import Json, as_json, out


def command(
    words: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to go on from, or the question about --file, --image.")
    ] = None,
    model: Annotated[str, typer.Option(help=NAMES)] = "smollm2-135m",
    method: Annotated[
        str, typer.Option(help="Text form such as snapkv:keep=0.5; join several by ';'. None = everything stays.")
    ] = "",
    prompt: Annotated[
        str | None, typer.Option(help="The same, for texts that begin with a dash.", show_default=False)
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A text to read first, in UTF-8.")] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="For a vision-language model: a file, or scenes:17; repeat for several.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 128,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="As a turn of a chat. Default: where the model has a template.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Sample with this seed; default: greedy.")] = None,
    swift: Annotated[
        bool,
        typer.Option("--swift", help="Several tokens a pass, the same text: with the package's heads, or --heads."),
    ] = False,
    heads: Annotated[str | None, typer.Option(help="A file or folder of `fewer train multitoken`.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Torch threads; 0 = as torch has it.")] = 0,
    json: Json = False,
) -> None:
    """Write with a method on, and show live what the cache holds, and what is left of the images."""
    from fewer.evaluation.language.subject import Held
    from fewer.evaluation.settings import split_forms
    from fewer.studio.writing import Pen, prompt_ids

    if words and prompt:
        raise ValueError("two prompts: give it as --prompt or by itself")
    said = "\n\n".join(part for part in (text_of(file), prompt or words) if part)
    if not said:
        raise ValueError("nothing to go on from: give a prompt, --file, or both")
    pictures = [scene(name)[0] for name in image or ()]
    if swift and method:
        raise ValueError(f"--swift verifies guesses over the whole cache, and {method} shortens it: give one of them")
    if heads and not swift:
        raise ValueError("--heads guess tokens for --swift: give both")
    use_threads(threads, 0)
    network, tokenizer = load(model)
    if not hasattr(network, "generate"):
        raise ValueError(f"{model} writes no text; give a causal language model, such as smollm2-135m")
    visual = sees(network)
    if pictures and not visual:
        raise ValueError(f"{model} sees no images; leave --image out, or give a vision-language model: llava-scenes")
    given: Any
    if visual:
        from fewer.studio.seen import prompted

        given, tokenizer = prompted(network, tokenizer, said, pictures, chat), tokenizer.tokenizer
    else:
        given = prompt_ids(network, tokenizer, said, chat)
    forms = split_forms([method])
    guide = guide_of(model, network) if visual else None
    on: Any = applied(network, forms, guide)[0] if forms else nullcontext()
    with on as session:
        if guide is not None and session is not None:
            session.ask([said])
        ahead = _ahead(network, heads) if swift else None
        pen = Pen(network, tokenizer, Console(quiet=True) if json else out, session, ahead)
        pen.write(given, max_new_tokens, seed)
    if json:
        as_json({"text": pen.text, "read": pen.prompt, "written": pen.written, "first token, s": pen.first,
                 **asdict(Held.of(pen.cache)),
                 **({} if ahead is None else {"tokens a pass": round(ahead.written.per_pass, 3)})})  # fmt: skip


def _ahead(network: Any, heads: str | None) -> Any:
    """What writes several tokens a pass."""
    from fewer.generation import Swift, load, packaged

    return Swift(packaged(network) if heads is None else load(heads, network))
