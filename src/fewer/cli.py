"""The command line: `fewer bench`, `generate`, `list`, `show`, `viz`, `doctor`, `train`.

Importing this module costs no torch: everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

if TYPE_CHECKING:
    from fewer.core import Reducer
    from fewer.evaluation.record import Row

ACCENT = "bright_red"
WIDE = 150  # columns of output that goes to a file or a pipe
TRACEBACK = "FEWER_TRACEBACK"

out = Console(highlight=False, width=None if Console().is_terminal else WIDE)
err = Console(stderr=True, highlight=False)


class Commands(TyperGroup):
    """Turns errors that tell the user what to do into one red line and exit code 2; others keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if os.environ.get(TRACEBACK) or not _known(error):
                raise
            err.print(f"[bold {ACCENT}]error[/] {escape(' '.join(str(error).split()))}", soft_wrap=True)
            raise typer.Exit(2) from error


def _known(error: Exception) -> bool:
    """Whether an error was raised to be read by a user."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return True
    from fewer.core import SignalError
    from fewer.hosts import HostError
    from fewer.session import SessionError

    return isinstance(error, (HostError, SessionError, SignalError))


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fewer tokens, better models: token reduction for transformers, measured. "
    f"[dim]{TRACEBACK}=1 shows where an error comes from.[/]",
)

probes = typer.Typer(no_args_is_help=True, help="Look into a model: what do its heads follow, and who needs them?")
app.add_typer(probes, name="probe")

NAMES = "A packaged name, a hub name, a folder, or timm/NAME."
Model = Annotated[str, typer.Option(help=NAMES)]
Seed = Annotated[int, typer.Option(help="Of the draw of images and of random methods' draws.")]
Threads = Annotated[
    int, typer.Option(min=0, help="Torch threads; one is timed undisturbed by others; 0 = as torch has it.")
]


@app.command()
def bench(
    model: Model = "vit-fashion",
    data: Annotated[
        str | None,
        typer.Option(help="embedded, fashion, tuxpaint, a folder of folders, a hub name; or a book: moby-dick."),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Text forms like tome:r=8; repeat or join by ';'. Default: all."),
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Vision: set every method to keep this many tokens on average.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Vision: images per forward pass. Default: 32.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Timed comparisons of interleaved runs. Default: 4; language: 2.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Images, balanced over the classes, 0 = all; contexts of a book; or questions of a kind about scenes. "
            "Default: 1000; language: 2; vision and language: 100.",
        ),
    ] = None,
    seed: Seed = 0,
    threads: Threads = 1,
    layer: Annotated[int | None, typer.Option(help="Vision: score this block's features (0-based) by k-NN.")] = None,
    execution: Annotated[
        str | None, typer.Option(help="Vision, of samples with different counts: packed (default) or padded.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Language: tokens of a context. Default: 1024.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Language: perplexity, needle, needles, qa, copy, writing; repeat. Default: all but needle."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Language: tokens written behind a context. Default: 32.")] = None,
    out_: Annotated[
        Path,
        typer.Option("--out", help="Folder for the results; an interrupted run goes on there."),
    ] = Path("runs/bench"),
) -> None:
    """Measure what each method costs and gains, against the same model with all its tokens.

    A causal language model is asked about texts: contexts are read with each method on, then questions are asked.
    A vision-language model is asked about scenes whose objects' places are known.
    Every other model is asked which class an image or a text belongs to.
    """
    from fewer import hosts
    from fewer.studio import report

    _quiet()
    shared = {"model": model, "data": data, "methods": tuple(methods or ()), "device": device, "dtype": dtype,
              "repeats": repeats, "limit": limit, "seed": seed, "threads": threads}  # fmt: skip
    vision = {"tokens": tokens, "batch": batch, "layer": layer, "execution": execution}
    language = {"context": context, "tasks": tuple(task) if task else None, "steps": steps}
    if execution not in (None, "packed", "padded"):
        raise ValueError(f"execution={execution!r}: packed or padded")
    loaded = _load(model)
    writes = hasattr(loaded[0], "generate")
    sees = writes and isinstance(hosts.find(loaded[0]), hosts.VisionLanguageHost)
    if sees:
        _only(language | vision, f"{model} is a vision-language model")
    _only(language if not writes else vision, f"{model} is {'a' if writes else 'no'} causal language model")
    with _Progress() as watch:
        if sees:
            from fewer.evaluation import visual
            from fewer.studio.asked import asked

            settings_ = visual.Settings(**_given(shared))
            rows = visual.run(settings_, out_, watch=watch, subject=visual.load(settings_, loaded), picture=asked)
        elif writes:
            from fewer.evaluation.language import bench as texts

            chosen = texts.Settings(**_given(shared | language))
            rows = texts.run(chosen, out_, watch=watch, subject=texts.load(chosen, loaded))
        else:
            from fewer.evaluation import bench as images
            from fewer.evaluation import encoders
            from fewer.studio.gallery import gallery
            from fewer.zoo import Processor

            settings = images.Settings(**_given(shared | vision))
            reads = not isinstance(loaded[1], Processor)
            subject = (encoders if reads else images).load(settings, loaded)
            rows = images.run(settings, out_, watch=watch, picture=None if reads else gallery, subject=subject)
    _print_table(rows)
    from fewer.evaluation.bench import FILE

    written = [out_ / FILE]
    try:
        written.append(report.write(rows, out_))
    except report.ReportError as error:
        err.print(f"[{ACCENT}]no report[/]: {escape(str(error))}")
    for path in written:
        out.print(f"[dim]wrote[/] {escape(str(path))}", soft_wrap=True)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options somebody typed; the others keep the defaults of the job's settings."""
    return {name: value for name, value in options.items() if value is not None}


def _only(others: dict[str, Any], why: str) -> None:
    """Raises ValueError for an option that speaks of the other kind of model."""
    for name in _given(others):
        raise ValueError(f"--{'task' if name == 'tasks' else name} does not apply: {why}")


@app.command()
def generate(
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
    threads: Annotated[int, typer.Option(min=0, help="Torch threads; 0 = as torch has it.")] = 0,
) -> None:
    """Write with a method on, and show live what the cache holds, and what is left of the images."""
    from fewer.evaluation.settings import split_forms
    from fewer.studio.writing import Pen, prompt_ids

    _quiet()
    if words and prompt:
        raise ValueError("two prompts: give it as --prompt or by itself")
    said = "\n\n".join(part for part in (_text(file), prompt or words) if part)
    if not said:
        raise ValueError("nothing to go on from: give a prompt, --file, or both")
    pictures = [_shown(name)[0] for name in image or ()]
    if threads:
        import torch

        torch.set_num_threads(threads)
    network, tokenizer = _load(model)
    if not hasattr(network, "generate"):
        raise ValueError(f"{model} writes no text; give a causal language model, such as smollm2-135m")
    sees = _sees(network)
    if pictures and not sees:
        raise ValueError(f"{model} sees no images; leave --image out, or give a vision-language model: llava-scenes")
    given: Any
    if sees:
        from fewer.studio.seen import prompted

        given, tokenizer = prompted(network, tokenizer, said, pictures, chat), tokenizer.tokenizer  # type: ignore[attr-defined]
    else:
        given = prompt_ids(network, tokenizer, said, chat)
    forms = split_forms([method])
    guide = _guide(model, network) if sees else None
    on: Any = _applied(network, forms, guide)[0] if forms else nullcontext()
    with on as session:
        if guide is not None and session is not None:
            session.ask([said])
        Pen(network, tokenizer, out, session).write(given, max_new_tokens, seed)


def _sees(network: Any) -> bool:
    """Whether a model is a vision-language model."""
    from fewer import hosts

    return isinstance(hosts.find(network), hosts.VisionLanguageHost)


def _shown(name: str) -> tuple[Any, str]:
    """A picture for a vision-language model, and the packaged question about it; "" for pictures from elsewhere."""
    head, colon, number = name.partition(":")
    if head != "scenes" or not colon or Path(name).exists():
        return _image(name), ""
    from PIL import Image

    from fewer.studio.seen import example

    if not number.isdigit():
        raise ValueError(f"{name}: give a number, as in scenes:17")
    question = example(int(number))
    return Image.fromarray(question.scenes[0].pixels), question.text


def _text(file: Path | None) -> str:
    try:
        return "" if file is None else file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text in UTF-8: {error}") from error


@app.command("list")
def list_methods() -> None:
    """All methods: what they do, what they need, where they come from."""
    from rich.table import Table

    import fewer

    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in ("method", "acts by", "training", "where", "paper", ""):
        table.add_column(head, no_wrap=head != "")
    for name, cls in fewer.registered().items():
        card = cls.card
        table.add_row(
            f"[{ACCENT}]{name}[/]", card.acts, card.training, _where(cls), escape(card.paper), escape(card.title)
        )
    out.print(table)
    out.print("\n[dim]fewer show METHOD says more; fewer bench measures them.[/]")


@app.command()
def show(method: Annotated[str, typer.Argument(help="A method's name or text form.")]) -> None:
    """One method: its paper, its parameters with their defaults, where it acts."""
    from rich.table import Table

    import fewer

    reducer = fewer.parse(method)
    cls, card = type(reducer), reducer.card
    out.print(f"[bold {ACCENT}]{card.name}[/]  {escape(card.title)}\n")
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim")
    facts.add_column()
    for name, value in (
        ("paper", card.paper), ("acts by", card.acts), ("on", card.on), ("training", card.training),
        ("where", reducer.site.value), *_sights(reducer),
    ):  # fmt: skip
        facts.add_row(name, escape(value))
    out.print(facts)
    out.print()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in ("parameter", "default", "what it is"):
        table.add_column(head)
    for name, default, text in _parameters(cls):
        table.add_row(name, escape(default), escape(text))
    out.print(table)
    for check, why in card.exempt.items():
        out.print(f"[dim]known limit[/] {escape(check)}: {escape(why)}")
    out.print(f"\n[bold]session = fewer.apply(model, {escape(repr(fewer.text(reducer)))})[/]")


@app.command()
def viz(
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

    from fewer.evaluation.settings import split_forms
    from fewer.studio.pictures import followed, sheet

    _quiet()
    forms = split_forms(method)
    picture, asked = _shown(image)
    network, processor = _load(model)
    if _sees(network):
        _viz_asked(network, processor, picture, question or asked or ASKED, forms, out_, (model, image), layers, size)
        return
    if question is not None:
        raise ValueError(f"--question does not apply: {model} is no vision-language model")
    fitted = processor.fit(picture) if hasattr(processor, "fit") else picture
    session, untrained = _applied(network, forms)
    with session, torch.inference_mode():
        session.host.root(processor([picture]))
        captions, tiles = followed(session, [fitted], most=layers, size=size)
    note = f"{model}; {Path(image).name}" + ("; random modules" if untrained else "")
    out_.parent.mkdir(parents=True, exist_ok=True)
    sheet(tiles, captions, title=" ".join(forms), note=note).save(out_)
    out.print(escape(session.report()))
    out.print(f"[dim]wrote[/] {escape(str(out_))}", soft_wrap=True)


ASKED = "what is in the image ?"
"""What viz asks where nobody says."""
SHORT = 16
"""Tokens of an answer in a picture."""


def _viz_asked(
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
    guide = _guide(names[0], network)
    session, untrained = _applied(network, forms, guide)
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
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet([tiles], captions, title=" ".join(forms), note=note).save(file)
    out.print(escape(report))
    for what, words in (("question", question), ("answer", after), ("all tokens", before)):
        out.print(f"[dim]{what}[/] {escape(words)}", soft_wrap=True)
    out.print(f"[dim]wrote[/] {escape(str(file))}", soft_wrap=True)


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help=NAMES)] = "vit-fashion",
) -> None:
    """What fewer finds in a model: blocks, sites, prefix tokens, grid; and whether removing nothing changes nothing."""
    import torch
    from rich.table import Table

    import fewer
    from fewer import hosts, verify, verify_visual

    _quiet()
    network, processor = _load(model)
    host = hosts.find(network)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for what, value in host.describe():
        if what != "sites":  # the verdict says more
            table.add_row(what, escape(value))
    for what, value in verify.told(host):
        table.add_row(what, escape(value))
    if isinstance(host, hosts.VisionLanguageHost):
        why = verify_visual.why(host)
        table.add_row("the bridge", escape(f"refused: {why}") if why else "verified")
        for what, value in () if why else _seen(network, processor):
            table.add_row(what, escape(value))
        out.print(table)
        return
    args, inputs, plain = _sample(host, processor)
    if host.text and not inputs["input_ids"].numel():
        said = (
            f"not tried: what {model} has for a tokenizer makes no tokens of a text; put its tokenizer's files beside"
        )
        table.add_row("nothing removed", escape(said))
        out.print(table)
        return
    try:
        verify.check(host, [fewer.parse(plain)], fewer.text)
    except hosts.HostError:  # the table has said why
        table.add_row("nothing removed", "not tried")
        out.print(table)
        return
    with torch.inference_mode():
        before = _first(host.root(*args, **inputs))
        with fewer.apply(network, plain) as session:
            during = _first(host.root(*args, **inputs))
            grid, tokens = session.last.grid, session.last.first.n
        after = _first(host.root(*args, **inputs))
    if not host.text:
        table.add_row("input", " x ".join(map(str, args[0].shape[1:])))
        table.add_row("grid", "unknown" if grid is None else f"{grid[0]} x {grid[1]} patches")
    table.add_row("tokens", str(tokens))
    table.add_row("nothing removed", _difference(before, during))
    table.add_row("session taken off", _difference(before, after))
    out.print(table)


@app.command()
def train(
    name: Annotated[
        str,
        typer.Argument(
            help="vit-fashion, bert-eras, minilm-r8, llava-scenes, or a method: dynamicvit:keep=0.7, tokenpacker."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Model whose method's modules are trained. Default: what the recipe is made for.")
    ] = None,
    out_: Annotated[Path, typer.Option("--out", help="Folder for the weights and the log.")] = Path("runs/train"),
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the recipe: --set steps=300; repeat.")
    ] = None,
) -> None:
    """Train a packaged model, or a method's own modules on a model; find the settings of methods that have such."""
    _quiet()
    recipe, run = _recipe(name, model)
    recipe = _changed(recipe, dict(_assignment(item) for item in set_ or ()))
    _say(str(recipe))
    _say(str(run(recipe, out_)))


@probes.command()
def distance(
    model: Annotated[str, typer.Option(help=NAMES)] = "smollm2-135m",
    text: Annotated[str, typer.Option(help="A book: state-of-the-union, moby-dick.")] = "state-of-the-union",
    texts: Annotated[int, typer.Option(min=1, help="Passages to find the heads on, and others to measure on.")] = 6,
    length: Annotated[int, typer.Option(min=32, help="Tokens of a passage.")] = 1024,
    near: Annotated[int, typer.Option(help="A key closer than this many tokens is near.")] = 64,
    far: Annotated[int, typer.Option(help="A key at least this many tokens away is far.")] = 512,
    heads: Annotated[int, typer.Option(min=1, help="Positional heads to silence.")] = 10,
    draws: Annotated[int, typer.Option(min=0, help="Sets of random heads of the same layers to compare with.")] = 3,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="Measure on half passages written twice: the second time, far is needed.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the pairs of tokens looked at.")] = 0,
    threads: Threads = 1,
    out_: Annotated[Path, typer.Option("--out", help="JSON file for all numbers.")] = Path("runs/distance.json"),
) -> None:
    """Which heads reach far through slow rotary pairs, and what long texts lose without them."""
    import json

    import torch

    from fewer.evaluation import distance as job
    from fewer.texts import book

    _quiet()
    reach = job.Reach(near, far, seed=seed)
    if threads:
        torch.set_num_threads(threads)
    network, tokenizer = _load(model)
    ids = job.passages(torch.tensor(tokenizer(book(text), verbose=False)["input_ids"]), 2 * texts, length)
    others = ids[1::2, : length // 2].repeat(1, 2) if repeat else ids[1::2]
    report = job.run(network, ids[::2], others=others, heads=heads, draws=draws, reach=reach, log=_say)
    out_.parent.mkdir(parents=True, exist_ok=True)
    out_.write_text(json.dumps({"model": model, "text": text, "repeat": repeat, **report.plain()}) + "\n")
    for line in report.lines():
        _say(line)
    out.print(f"[dim]wrote[/] {escape(str(out_))}", soft_wrap=True)


# -- helpers ----------------------------------------------------------------------------------------------------
ENCODING = ("power_bert", "ltp", "length_adaptive", "pyramid_bert", "trbert", "leap")
PROMPTING = ("sdtp", "dynamic_context_pruning")
SEEING = ("dynamic_llava_decode", "voco_llama")  # their tokens are visual ones, though they act on the cache


def _visual(name: str) -> bool:
    """Whether a method acts on visual tokens of a vision-language model."""
    from fewer import parse
    from fewer.core import VisualReducer

    return isinstance(parse(name), VisualReducer)


def _recipe(name: str, model: str | None) -> tuple[Any, Callable[[Any, Path], Any]]:
    """What a name to train stands for, and what runs it. model: None = the one the recipe is made for."""
    method = name.partition(":")[0]
    chosen: dict[str, Any] = {} if model is None else {"model": model}
    if name == "vit-fashion":
        from fewer.recipes import classify

        return classify.Recipe(), lambda recipe, out: classify.train(out, recipe=recipe, log=_say)
    if name in ("bert-eras", "minilm-r8"):
        from fewer.recipes import texts

        base = texts.Recipe() if name == "bert-eras" else texts.MINILM
        return base, lambda recipe, out: texts.train(out, recipe=recipe, log=_say)
    if name == "llava-scenes":
        from fewer.recipes import vlm

        return vlm.Recipe(), lambda recipe, out: vlm.train(out, recipe=recipe, log=_say)
    if method == "dynamic_pooling":
        from fewer.recipes import pooling

        pooled = pooling.Recipe() if name == method else pooling.Recipe(method=name)
        return pooled, lambda recipe, out: pooling.train(out, recipe, log=_say)
    if method in ENCODING:
        from fewer.recipes import encode

        return encode.Encode(method=name, **chosen), partial(encode.train, log=_say)
    if method == "tokenbutler":
        from fewer.recipes import predict

        return predict.Prediction(method=name, **chosen), partial(predict.train, log=_say)
    if method in SEEING or _visual(name):
        from fewer.recipes import visual

        return visual.recipe_for(name), partial(visual.train, log=_say, **chosen)
    if method in PROMPTING:
        from fewer.recipes import prompt

        return prompt.Prompting(method=name, **chosen), partial(prompt.train, log=_say)
    from fewer.recipes import reduce

    return reduce.Reduction(method=name, **chosen), partial(reduce.train, log=_say)


def _assignment(item: str) -> tuple[str, Any]:
    from fewer.spec import value_of

    key, equals, value = item.partition("=")
    if not equals:
        raise ValueError(f"--set {item}: write it as name=value")
    return key.strip(), value_of(value.strip())


def _changed(recipe: Any, changes: dict[str, Any]) -> Any:
    """A recipe with some fields replaced; the error for an unknown one lists them all."""
    from dataclasses import fields, replace

    known = [f.name for f in fields(recipe)]
    for name in changes:
        if name not in known:
            raise ValueError(f"{type(recipe).__name__} has no field {name!r}; it has {', '.join(known)}")
    return replace(recipe, **changes)


def _say(line: str) -> None:
    out.print(escape(line), soft_wrap=True)


def _quiet() -> None:
    """No progress bars of other libraries between ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()


def _load(name: str) -> tuple[Any, Callable[..., Any]]:
    from fewer.zoo import load_model

    return load_model(name)


def _applied(network: Any, forms: Sequence[str], guide: Any = None) -> tuple[Any, bool]:
    """A session, with random modules where the package has none for this model; and whether that was so."""
    import fewer
    from fewer.trained import UNTRAINED, ModulesError

    try:
        return fewer.apply(network, list(forms), guide=guide), False
    except ModulesError:
        return fewer.apply(network, list(forms), modules=UNTRAINED, guide=guide), True


def _guide(name: str, network: Any) -> Any:
    """The image-text model beside a vision-language model, for methods that compare patches with the question; None
    where there is none."""
    import fewer
    from fewer import zoo

    try:
        return fewer.Guide(*zoo.load_clip(name, network))
    except zoo.ModelError:
        return None


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
            layout = session.layout  # type: ignore[attr-defined]
        with fewer.apply(network, half) as session:
            network(**given, use_cache=False)
            left = int(session.seen().sum())  # type: ignore[attr-defined]
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


def _image(name: str) -> Any:
    from fewer import data

    head, colon, index = name.rpartition(":")
    if colon and not Path(name).exists():
        images = data.load(head)
        if not index.isdigit() or int(index) >= len(images):
            raise ValueError(f"{name}: {head} has images 0 to {len(images) - 1}")
        return images.image(int(index))
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(name) as opened:
            return opened.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"no image {name}; give a file, or embedded:17 for a packaged one") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{name} is not a readable image: {error}") from error


def _where(cls: type[Reducer]) -> str:
    from fewer.core import Reducer, Site

    if cls.site is Site.BRIDGE:
        return cls.site.value
    layers = next((f for f in cls.__dataclass_fields__.values() if f.name == "layers"), None)  # type: ignore[attr-defined]
    blocks = None if layers is None else layers.default
    site = cls.site.value if hasattr(cls.site, "value") else "depends on the setting"
    every = "every block" if cls.acts_at is Reducer.acts_at else "blocks by depth"
    return f"{site}, {every}" if blocks is None else f"{site}, blocks {_plus(blocks)}"


def _sights(reducer: Reducer) -> list[tuple[str, str]]:
    """The blocks a method acts at; for methods on visual tokens, what its budget counts and what it looks at."""
    from fewer.core import Site, VisualReducer

    facts = [] if reducer.site is Site.BRIDGE else [("blocks", _blocks(reducer))]
    if isinstance(reducer, VisualReducer):
        facts.append(("budget of", "each image or video" if reducer.scope == "image" else "each prompt"))
        if reducer.looks_at:
            tower = ("the one whose output is used" if b is None else str(b) for b in reducer.looks_at)
            facts.append(("looks at", f"attention of the vision tower's blocks: {', '.join(tower)}"))
    return facts


def _blocks(reducer: Reducer) -> str:
    """Where a method acts: the blocks it names, or how it finds them."""
    from fewer.core import Reducer

    if reducer.layers is not None:
        return _plus(reducer.layers)
    return "every" if type(reducer).acts_at is Reducer.acts_at else "by depth"


def _plus(numbers: Sequence[int]) -> str:
    """Block numbers as the text form writes them; a run of them by its ends."""
    run = len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if run else "+".join(map(str, numbers))


def _parameters(cls: type[Reducer]) -> list[tuple[str, str, str]]:
    """(name, default as one types it, what the class says about it) of each parameter."""
    from dataclasses import fields

    from fewer.studio.explained import explained

    _, said = explained(cls)
    return [(f.name, _typed(f.default), said.get(f.name, "")) for f in fields(cls)]  # type: ignore[arg-type]


TYPED = {"ratio": "keep", "value": "threshold", "share": "mass"}  # fields of budgets, as the text form calls them


def _typed(value: Any) -> str:
    """A default as one types it."""
    from dataclasses import fields

    from fewer.core import Budget
    from fewer.spec import written

    if not isinstance(value, Budget):
        return written(value)
    return ", ".join(f"{TYPED.get(f.name, f.name)}={written(getattr(value, f.name))}" for f in fields(value))


# -- progress and table of the benchmark ------------------------------------------------------------------------
class _Progress:
    """Two bars while a benchmark runs: all settings, and the batches of the present one."""

    def __enter__(self) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from fewer.evaluation.bench import Watch

        bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(complete_style=ACCENT, finished_style=ACCENT),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=err,
            transient=True,
        )
        self.bars = bars

        class Bars(Watch):
            def begin(self, subject: Any, rows: int) -> None:
                err.print(f"[dim]{subject.name} on {subject.extent}, {subject.device}, {rows} settings[/]")
                self.all = bars.add_task("settings", total=rows)
                self.one = bars.add_task("", total=None)

            def row(self, method: str, batches: int) -> None:
                bars.reset(self.one, total=batches, description=method)

            def batch(self) -> None:
                bars.advance(self.one)

            def done(self, row: Row, resumed: bool) -> None:
                bars.advance(self.all)
                if resumed:
                    bars.console.print(f"[dim]{escape(row.method)}: measured before, kept[/]")

        bars.start()
        return Bars()

    def __exit__(self, *_: object) -> None:
        self.bars.stop()


def _print_table(rows: Sequence[Row]) -> None:
    from rich.table import Table
    from rich.text import Text

    from fewer.evaluation.settings import UNREDUCED
    from fewer.studio.plots import cost
    from fewer.studio.table import columns, failed, footnotes, frontier, measured, summary

    good = measured(rows)
    best = {row.key for row in frontier(good, cost(good).value)}
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    shown = columns(rows)
    for column in shown:
        left = column.head == "method"
        table.add_column(
            f"{column.head}\n[dim not bold]{column.unit}[/]", justify="left" if left else "right", no_wrap=True
        )
    for row in good:
        cells = [Text(column.cell(row)) for column in shown]
        for cell in cells:
            cell.highlight_regex(r"±[\d.]+", "dim")
        cells[0].stylize("bold" if row.method == UNREDUCED else ACCENT if row.key in best else "")
        table.add_row(*cells)
    width = table.__rich_measure__(out, out.options.update(max_width=10_000)).maximum
    out.print(table, width=max(width, out.width), crop=False, soft_wrap=True)
    out.print()
    for mark, says in footnotes(good):
        out.print(f"[{ACCENT}]{mark}[/] [dim]{says}[/]", soft_wrap=True)
    for row in failed(rows):
        out.print(f"[{ACCENT}]{escape(row.method)}[/] left out: {escape(row.error)}", soft_wrap=True)
    out.print(escape(summary(rows)), soft_wrap=True)
    p = rows[0].passport
    where = f"{p.model} on {p.n:,} {p.unit} of {p.data}; {p.hardware}, {p.threads} threads"
    how = f"{p.dtype}, batch {p.batch}, {p.repeats} interleaved comparisons; commit {p.commit}"
    out.print(f"[dim]{escape(where)}, {escape(how)}[/]", soft_wrap=True)


def main() -> None:
    """The `fewer` command."""
    app()


if __name__ == "__main__":
    main()
