"""`fewer compress`: texts with fewer tokens."""

from __future__ import annotations

import json as json_
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .inputs import NAMES, quiet, use_threads
from .output import ACCENT, Json, complain, err, note, shown, writable

if TYPE_CHECKING:
    from fewer.compression import Compressed
    from fewer.compression.corpus import Result, Settings
    from fewer.datasets.documents import Documents

RESULTS = "results.jsonl"
MANY, LOOK = "For many texts", "To see what went, and to have it back"
SHOWN = 5  # texts that failed, named at the end


def command(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...",
            help="Files, folders, .jsonl, a set (datasets:NAME); - is what comes in.",
            show_default=False,
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Share of the tokens that is left. Default: 0.5, or the method's.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Number of tokens that is left.")] = None,
    method: Annotated[str, typer.Option(help="Text form such as llmlingua:segment=100.")] = "llmlingua",
    model: Annotated[str, typer.Option(help=f"Who reads the texts. {NAMES}")] = "smollm2-135m",
    question: Annotated[str, typer.Option(help="What is asked about the text; stays, behind it.")] = "",
    instruction: Annotated[str, typer.Option(help="What stays in front of the text.")] = "",
    force: Annotated[
        list[str] | None, typer.Option(metavar="WORD", help="A word, or mark, that stays wherever it stands; repeat.")
    ] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(help="What stays: digits, identifiers, code, json, negations; join by commas, or repeat."),
    ] = None,
    counter: Annotated[
        str | None, typer.Option(help="A model, or a tokenizer, whose tokens are counted. Default: those of --model.")
    ] = None,
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="Leave a text as it was where shortening breaks it.")
    ] = True,
    together: Annotated[
        bool, typer.Option("--together", help="The texts are documents of one prompt, which share its tokens.")
    ] = False,
    out_: Annotated[
        Path | None, typer.Option("--out", help="File, or folder, for what is left. Default: it is printed.")
    ] = None,
    json: Json = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cpu.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=0, help="Torch threads; 0 = as torch has it. Default: 0; many texts: 1 a process.")
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Show what went, beside the output.", rich_help_panel=LOOK)
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="File for a page that shows what went.", rich_help_panel=LOOK)
    ] = None,
    restore: Annotated[
        str | None, typer.Option(metavar="ID", help="Print a span that went, by its id.", rich_help_panel=LOOK)
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option("--from", help="The whole text, or results, for --restore.", rich_help_panel=LOOK),
    ] = None,
    field: Annotated[str, typer.Option(help="Where the text is in a line, or a row.", rich_help_panel=MANY)] = "text",
    split: Annotated[str, typer.Option(help="Of a set.", rich_help_panel=MANY)] = "train",
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with its own model.", rich_help_panel=MANY)] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Texts read side by side.", rich_help_panel=MANY)] = 8,
) -> None:
    """Shorten texts for a language model: what tells it least goes first.

    The shortened text alone is printed; counts and notes go to the error stream.

    Many texts become JSON lines. An interrupted run with --out goes on when it is started again.

    Exit code: 0; 1 where some of many texts failed; 2 where nothing was done.
    """
    from fewer.compression.corpus import Settings
    from fewer.datasets.documents import Documents, single

    kinds = tuple(kind.strip() for word in protect or () for kind in word.split(",") if kind.strip())
    if restore is not None:
        _restore(restore, from_, inputs or [], instruction, question)
        return
    if from_ is not None:
        raise ValueError("--from is where --restore takes a span from: give the id too, or the text without --from")
    if not inputs:
        raise ValueError("nothing to shorten: name a file or a folder; - is what comes in")
    settings = Settings(method, model, rate, tokens, instruction, question, tuple(force or ()), kinds, counter, gate,
                        device)  # fmt: skip
    if html is not None:
        _pages(html)
    alone = together or single(inputs)
    if not alone and (diff or html is not None):
        raise ValueError("--diff and --html show one text; these are many")
    documents = None if single(inputs) else Documents(inputs, field=field, split=split)
    quiet()
    if alone:
        use_threads(threads, 0)
        _one(settings, inputs, documents, out_, json, diff, html)
        return
    assert documents is not None
    _many(settings, inputs, documents, out_, json, workers=workers, batch=batch, threads=_threads(threads))


def _threads(asked: int | None) -> int:
    """Of each process."""
    import torch

    return 1 if asked is None else asked or torch.get_num_threads()


def _pages(html: Path) -> None:
    """Refuses before any work is done what could not be written in the end."""
    from fewer.studio.report import templates

    templates()
    writable(html, option="--html")


# -- one text ----------------------------------------------------------------------------------------------------------


def _one(
    settings: Settings, inputs: Sequence[str], documents: Documents | None, out: Path | None, json: bool, diff: bool,
    html: Path | None,
) -> None:  # fmt: skip
    from fewer.compression.corpus import Result
    from fewer.datasets.documents import DocumentError, read

    texts = []
    for document in documents or ():
        if document.text is None:
            raise DocumentError(f"{document.name}: {document.error}")
        texts.append(document.text)
    if documents is None:
        texts = [read(inputs[0])]
    name = " + ".join(inputs)
    if out is not None and (out.is_dir() or str(out).endswith("/")):
        out = out / (Path(inputs[0]).name if documents is None and inputs[0] != "-" else "prompt.txt")
    if out is not None:
        _apart(writable(out), inputs)
    one = settings.compressor()(settings.prompt(*texts), rate=settings.rate, tokens=settings.tokens)
    if json:
        _print(json_.dumps(asdict(Result.of(name, one)), indent=1) + "\n", out)
    else:
        _print(one.text, out, end="\n" * (one.text[-1:] not in ("", "\n")))
    if diff:
        _show(one)
    facts = _facts(settings, one)
    note(f"{facts[0][1]}; {settings.wanted}, {settings.model}")
    for line in one.notes:
        complain(line, "note")
    if html is not None:
        from fewer.studio import shortened

        shortened.write(one, html, title=f"What is left of {name}", facts=facts)
        _wrote(html)
    if out is not None:
        _wrote(out)


def _facts(settings: Settings, one: Compressed) -> list[tuple[str, str]]:
    counted = f"{one.before:,} -> {one.after:,} ({100 * one.rate:.1f} %)"
    return [
        ("tokens", counted + (f", counted by {settings.counter}" if settings.counter else "")),
        ("method", settings.wanted), ("model", settings.model),
    ]  # fmt: skip


def _apart(out: Path, inputs: Sequence[str]) -> None:
    if any(out.exists() and name != "-" and Path(name).exists() and out.samefile(name) for name in inputs):
        raise ValueError(f"--out {out} is the text itself, which would be gone: give another --out")


def _print(text: str, out: Path | None, end: str = "") -> None:
    """In a file, to the letter; on the output, where a terminal is shown no control characters, with `end` behind."""
    from fewer.studio.shortened import visible

    if out is not None:
        out.write_bytes(text.encode())
    elif sys.stdout.isatty():
        print(visible(text))
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write((text + end).encode())
        sys.stdout.buffer.flush()


def _show(one: Compressed) -> None:
    """What went, on the error stream: dim and struck through where that can be seen, else in [-brackets-]."""
    from fewer.studio.shortened import marked, painted

    plain = err.no_color or not err.is_terminal
    err.print(marked(one) if plain else painted(one), markup=False, soft_wrap=True)


def _wrote(path: Path) -> None:
    """Where a file is; beside the results, which may be piped on."""
    err.print(f"[dim]wrote[/] {shown(path)}", soft_wrap=True)


# -- many --------------------------------------------------------------------------------------------------------------


def _many(
    settings: Settings, inputs: Sequence[str], documents: Documents, out: Path | None, json: bool, **how: int
) -> None:
    from fewer.compression.corpus import Results, shortened

    if out is None and not json:
        raise ValueError("these are many texts: give --out FILE.jsonl, --out FOLDER, or --json to have lines printed")
    file, folder = _places(inputs, out)
    extra = {"batch": how["batch"], "field": documents.field, "split": documents.split}
    failed: list[tuple[str, str]] = []
    counts = [0, 0, 0]  # texts; tokens before and after
    opened = nullcontext(None) if file is None else Results.open(file, settings.plain() | extra)
    with opened as results, _bar(documents.count) as advance:
        before = [] if results is None else results.done
        failed += [(done.source, done.error) for done in before if done.error]
        if before:
            note(f"{len(before):,} texts were done before, and are kept")
            advance(len(before))
        with closing(shortened(documents, settings, done=before, **how)) as found:  # type: ignore[type-var]
            try:
                for document, result in found:
                    if folder is not None and document.file and result.text is not None:
                        target = folder / _inside(document.name)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(result.text.encode())
                    _keep(result, results)
                    _count(result, counts, failed)
                    advance(1)
            except KeyboardInterrupt:
                done = len(before) + counts[0]
                complain(f"{done:,} texts are done" + (f", in {file}; the same command goes on" if file else ""),
                         "interrupted")  # fmt: skip
                raise typer.Exit(130) from None
    _tell(settings, counts, failed, file)


def _places(inputs: Sequence[str], out: Path | None) -> tuple[Path | None, Path | None]:
    """The file for results, and the folder for texts. Raises ValueError where they would lie among what is read."""
    if out is None:
        return None, None
    file, folder = (out, None) if out.suffix and not out.is_dir() else (out / RESULTS, out)
    for name in inputs:
        if Path(name).is_dir() and file.resolve().is_relative_to(Path(name).resolve()):
            raise ValueError(f"--out {out} lies in {name}, whose texts are read: give another --out")
    _apart(file, inputs)
    return file, folder


def _inside(name: str) -> Path:
    """A path as one below a folder."""
    return Path(*(part for part in Path(name).parts if part not in ("..", Path(name).anchor)))


def _keep(result: Result, results: Any) -> None:
    if results is not None:
        results.add(result)
    else:
        print(result.line(), flush=True)


def _count(result: Result, counts: list[int], failed: list[tuple[str, str]]) -> None:
    counts[0] += 1
    if result.error:
        failed.append((result.source, result.error))
        complain(f"{result.source}: {result.error}", "failed")
        return
    counts[1] += result.before or 0
    counts[2] += result.after or 0
    for line in result.notes:
        note(f"{result.source}: {line}")


def _tell(settings: Settings, counts: list[int], failed: list[tuple[str, str]], file: Path | None) -> None:
    texts, before, after = counts
    share = f" ({100 * after / before:.1f} %)" if before else ""
    note(f"{texts:,} texts, {before:,} -> {after:,} tokens{share}; {settings.wanted}, {settings.model}")
    if file is not None and file.exists():
        _wrote(file)
    if failed:
        names = ", ".join(name for name, _ in failed[:SHOWN]) + (", ..." if len(failed) > SHOWN else "")
        complain(f"{len(failed):,} texts failed: {names}", "failed")
        raise typer.Exit(1)


def _bar(total: int | None) -> Any:
    """How far it is."""
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    @contextmanager
    def bar() -> Iterator[Any]:
        columns = (
            TextColumn("texts"), BarColumn(complete_style=ACCENT, finished_style=ACCENT), MofNCompleteColumn(),
            TimeElapsedColumn(),
        )  # fmt: skip
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
            task = progress.add_task("", total=total)
            yield lambda n: progress.advance(task, n)

    return bar()


# -- back again --------------------------------------------------------------------------------------------------------


def _restore(name: str, source: str | None, inputs: Sequence[str], instruction: str, question: str) -> None:
    """Print a span that went, out of the whole text, or of results."""
    from fewer.compression import Shelf
    from fewer.compression.compressed import digest
    from fewer.compression.source import assembled

    if source is None or inputs:
        raise ValueError(f"--restore {name} needs --from: the whole text, or the results of --json or --out")
    key = name.partition(":")[0]
    for text in _wholes(source):
        for whole in dict.fromkeys((text, assembled((text,), instruction, question)[0])):
            if digest(whole) == key:
                shelf = Shelf()
                shelf.put_text(whole)
                try:
                    found = shelf.restore(name)
                except KeyError as error:
                    raise ValueError(error.args[0]) from error
                _print(found, None)
                return
    raise ValueError(
        f"{source} has no text that {name} is of: ids begin with a digest of the whole text; where --instruction or "
        "--question were given, they are part of it, and needed here too"
    )


def _wholes(source: str) -> Iterator[str]:
    """Whole texts that a file is, or holds."""
    from fewer.datasets.documents import read

    content = read(source)
    yield content
    try:
        rows: list[Any] = [json_.loads(content)]
    except ValueError:
        rows = []
        for line in content.split("\n"):
            try:
                rows.append(json_.loads(line))
            except ValueError:
                continue  # torn, or no result: what is asked for is then said to be missing
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("original"), str):
            yield row["original"]
