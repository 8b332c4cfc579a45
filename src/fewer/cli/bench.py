"""`fewer bench`: what each method costs and gains on a model."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .inputs import NAMES, load, quiet, sees
from .output import (
    ACCENT,
    Json,
    Threads,
    as_json,
    clean,
    complain,
    err,
    note,
    out,
    say,
    shown,
    wide_grid,
    writable,
    wrote,
)

if TYPE_CHECKING:
    from fewer.evaluation.record import Row
    from fewer.evaluation.settings import Settings

PICTURES, WORDS = "For images and encoders", "For language models"


FLAGS = {"tasks": "task"}  # options that are not called as the setting is


@dataclass(frozen=True)
class Kind:
    """A kind of model: its name, its settings, and what measures it: settings, the model and its processor, out,
    watch -> rows."""

    name: str
    settings: type[Settings]
    run: Callable[[Any, Any, Path, Any], list[Row]]


def command(
    context_: typer.Context,
    model: Annotated[str | None, typer.Option(help=f"{NAMES} Default: vit-fashion.", show_default=False)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="embedded, fashion, tuxpaint, a folder of folders, a hub name; a book: moby-dick; or clips: plain, "
            "small, flooded, camera."
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Text forms like tome:r=8; repeat or join by ';'. Default: some that differ."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="A fixed set of tasks on packaged weights: reasoning, text, training.", show_default=False),
    ] = None,
    all: Annotated[bool | None, typer.Option("--all", help="Every method and level of the default list.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: float32.")] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Timed comparisons of interleaved runs. Default: 4; language: 2.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Images, balanced over the classes, 0 = all; contexts of a book; or questions of a kind about scenes. "
            "Default: 1000; language: 2; vision and language: 100.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draw of images and of random methods' draws.")] = None,
    threads: Threads = None,
    tokens: Annotated[
        float | None,
        typer.Option(help="Set every method to keep this many tokens on average.", rich_help_panel=PICTURES),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Items per forward pass. Default: 32.", rich_help_panel=PICTURES)
    ] = None,
    execution: Annotated[
        str | None,
        typer.Option(help="Of samples with different counts: packed (default) or padded.", rich_help_panel=PICTURES),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(help="Images: score this block's features, from 0, by k-NN.", rich_help_panel=PICTURES),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a context. Default: 1024.", rich_help_panel=WORDS)
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task", rich_help_panel=WORDS,
            help="perplexity, needle, needles, qa, copy, writing; repeat. Default: all but needle.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(
            help="Tokens written behind a context, default: 32; steps of a picture generator, default: 20.",
            rich_help_panel=WORDS,
        ),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Of a picture generator; 1 = none, the default.", rich_help_panel=PICTURES)
    ] = None,
    horizon: Annotated[
        int | None, typer.Option(help="Tokens of the book to foretell. Default: 128.", rich_help_panel=WORDS)
    ] = None,
    out_: Annotated[
        Path,
        typer.Option("--out", help="Folder for the results; an interrupted run goes on there."),
    ] = Path("runs/bench"),
    json: Json = False,
) -> None:  # fmt: skip
    """Measure what each method costs and gains, against the same model with all its tokens.

    A causal language model is asked about texts: contexts are read with each method on, then questions are asked.
    A vision-language model is asked about scenes whose objects' places are known, a video model about clips of things
    that move.
    Every other model is asked which class an image or a text belongs to.
    """
    given = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("context_", "out_", "json", "suite")
    }
    if suite is not None:
        _run_suite(suite, given, out_, json)
        return
    from fewer.evaluation.record import Journal
    from fewer.evaluation.runner import FILE
    from fewer.evaluation.settings import Settings
    from fewer.studio import report
    from fewer.studio.verdict import verdict

    quiet()
    given |= {name: tuple(given[name]) for name in ("methods", "tasks") if name in given}
    Settings(**{f.name: given[f.name] for f in fields(Settings) if f.name in given})  # what is wrong for any model
    with Journal.open(out_ / FILE):  # and for any results, before a model is loaded
        pass
    loaded = load(given.setdefault("model", "vit-fashion"))
    kind = _kind(*loaded)
    settings = _settings(kind, given)
    watch = _watch()
    try:
        with watch:
            rows = kind.run(settings, loaded, out_, watch)
    except KeyboardInterrupt:
        typed = context_.find_root().meta["typed"]
        complain(f"{watch.finished} of {watch.expected} settings are in {out_ / FILE}", "interrupted")
        err.print(f"the same command goes on from there: {shown(shlex.join(['fewer', *typed]))}", soft_wrap=True)
        raise typer.Exit(130) from None
    written = [out_ / FILE]
    try:
        written.append(report.write(rows, out_))
    except report.ReportError as error:
        complain(str(error), "no report")
    said = verdict(rows)
    if json:
        as_json({"verdict": said, "rows": [asdict(row) for row in rows], "files": written})
        return
    say(said[0] + "\n")
    _print_table(rows)
    for line in said[1:]:
        say(line)
    _print_passport(rows)
    for path in written:
        wrote(path)


def _run_suite(name: str, given: dict[str, Any], folder: Path, json: bool) -> None:
    from rich.text import Text

    from fewer.evaluation import suites

    quiet()
    table, file = suites.run(name, given, writable(folder, folder=True), note)
    if json:
        as_json({**asdict(table), "files": [file]})
        return
    wide_grid(table.heads, [[Text(clean(cell)) for cell in row] for row in table.rows])
    for line in table.notes:
        out.print(f"[dim]{shown(line)}[/]", soft_wrap=True)
    wrote(file)


def _kinds() -> list[Kind]:
    """What can be measured: pictures, texts, contexts, scenes."""
    from fewer.evaluation import bench as images
    from fewer.evaluation import encoders, generation, video, visual
    from fewer.evaluation.language import bench as language
    from fewer.studio.asked import asked
    from fewer.studio.gallery import gallery
    from fewer.studio.strip import strips

    return [
        Kind("vision model", images.Settings,
             lambda s, m, out, watch: images.run(s, out, watch=watch, subject=images.load(s, m), picture=gallery)),
        Kind("text encoder", encoders.Settings,
             lambda s, m, out, watch: images.run(s, out, watch=watch, subject=encoders.load(s, m))),
        Kind("causal language model", language.Settings,
             lambda s, m, out, watch: language.run(s, out, watch=watch, subject=language.load(s, m))),
        Kind("vision-language model", visual.Settings,
             lambda s, m, out, watch: visual.run(s, out, watch=watch, subject=visual.load(s, m), picture=asked)),
        Kind("video model", video.Settings,
             lambda s, m, out, watch: video.run(s, out, watch=watch, subject=video.load(s, m), picture=strips)),
        Kind("picture generator", generation.Settings,
             lambda s, m, out, watch: generation.run(s, out, watch=watch, subject=generation.load(s, m))),
    ]  # fmt: skip


def _kind(network: Any, processor: Any) -> Kind:
    """What measures a model."""
    from fewer.evaluation.video import is_video
    from fewer.models.sampler import Sampler
    from fewer.models.zoo import Processor

    pictures, texts, contexts, scenes, moving, generators = _kinds()
    if isinstance(processor, Sampler):
        return generators
    if is_video(network):
        return moving
    if hasattr(network, "generate"):
        return scenes if sees(network) else contexts
    return pictures if isinstance(processor, Processor) else texts


def _settings(kind: Kind, given: dict[str, Any]) -> Settings:
    """The settings of a kind, from what was typed. Raises ValueError for an option that speaks of another kind."""
    for option in given.keys() - {f.name for f in fields(kind.settings)}:
        owners = [other.name for other in _kinds() if option in {f.name for f in fields(other.settings)}]
        why = f"no {owners[0]}" if len(owners) == 1 else f"a {kind.name}"
        raise ValueError(f"--{FLAGS.get(option, option)} does not apply: {given['model']} is {why}")
    return kind.settings(**given)


def _watch() -> Any:
    """Two bars while a benchmark runs: all settings, and the batches of the present one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fewer.evaluation.runner import Watch

    class Bars(Watch):
        finished = expected = 0

        def __enter__(self) -> Bars:
            self.bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(complete_style=ACCENT, finished_style=ACCENT),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=err,
                transient=True,
            )
            self.bars.start()
            return self

        def __exit__(self, *_: object) -> None:
            self.bars.stop()

        def begin(self, subject: Any, rows: int) -> None:
            note(f"{subject.name} on {subject.extent}, {subject.device}, {rows} settings")
            for line in getattr(subject, "notes", ()):
                note(line)
            self.expected = rows
            self.all = self.bars.add_task("settings", total=rows)
            self.one = self.bars.add_task("", total=None)

        def row(self, method: str, batches: int) -> None:
            self.bars.reset(self.one, total=batches, description=clean(method))

        def batch(self) -> None:
            self.bars.advance(self.one)

        def done(self, row: Row, resumed: bool) -> None:
            self.finished += 1
            self.bars.advance(self.all)
            if resumed:
                note(f"{row.method}: measured before, kept")

        def note(self, line: str) -> None:
            note(line)

    return Bars()


def _print_table(rows: Sequence[Row]) -> None:
    from rich.text import Text

    from fewer.evaluation.language.bench import FAULT
    from fewer.evaluation.settings import UNREDUCED
    from fewer.studio.plots import cost
    from fewer.studio.table import columns, failed, footnotes, frontier, measured

    good = measured(rows)
    best = {row.key for row in frontier(good, cost(good).value)}
    chosen = columns(rows)
    lines = []
    for row in good:
        cells = [Text(clean(column.cell(row))) for column in chosen]
        for cell in cells:
            cell.highlight_regex(r"±[\d.]+", "dim")
        cells[0].stylize("bold" if row.method == UNREDUCED else ACCENT if row.key in best else "")
        lines.append(cells)
    wide_grid([(column.head, column.unit) for column in chosen], lines)
    out.print()
    for mark, says in footnotes(good):
        out.print(f"[{ACCENT}]{mark}[/] [dim]{shown(says)}[/]", soft_wrap=True)
    for row in good:
        for line in row.notes:
            if line.startswith(FAULT):
                out.print(f"[{ACCENT}]{shown(row.method)}[/] {shown(line)}", soft_wrap=True)
    for row in failed(rows):
        out.print(f"[{ACCENT}]{shown(row.method)}[/] left out: {shown(row.error)}", soft_wrap=True)


def _print_passport(rows: Sequence[Row]) -> None:
    p = rows[0].passport
    where = f"{p.model} on {p.n:,} {p.unit} of {p.data}; {p.hardware}, {p.threads} threads"
    how = f"{p.dtype}, batch {p.batch}, {p.repeats} interleaved comparisons; commit {p.commit}"
    for line in (*p.notes, f"{where}, {how}"):
        out.print(f"[dim]{shown(line)}[/]", soft_wrap=True)
