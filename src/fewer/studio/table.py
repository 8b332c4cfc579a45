"""The benchmark's table: which columns there are, what each says, and the marks of its rows: one place for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fewer.evaluation import video, visual
from fewer.evaluation.bench import against_random
from fewer.evaluation.language.bench import FAULT
from fewer.evaluation.language.tasks import TASKS
from fewer.evaluation.levels import BOUNDS
from fewer.evaluation.record import Row, Score, Writing
from fewer.evaluation.stats import Interval
from fewer.runtime.modules import UNTRAINED

from .style import count

NONE = "–"
LOSES, EVEN, RAW, FAULTY = "▼", "≈", "*", "!"

FOOTNOTES = {
    LOSES: "loses to random at the same tokens: the 95 % interval of the paired difference lies below zero",
    EVEN: "not told apart from random at the same tokens, which is not the same as equal: the interval holds zero",
    FAULTY: "a number that cannot be right; the notes say which",
    RAW: "has modules to train, and they are random here: its accuracy says nothing about the method",
}


@dataclass(frozen=True)
class Column:
    """head and unit of a column, what it means, and its cell for a row."""

    head: str
    unit: str
    help: str
    cell: Callable[[Row], str]


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns for these rows; those that have nothing to say are left out."""
    score = rows[0].score if rows else "accuracy"
    marked = {row.key: marks(row, rows) for row in rows}
    head = score.replace("accuracy", "acc.") if len(score) > 8 else score
    every = [
        Column("method", "", "the method and its setting, in text form", lambda r: _named(r, marked[r.key])),
        Column("tokens", "mean", "per block, over attention and MLP, prefix included", lambda r: f"{r.tokens:.0f}"),
        Column("", "final", "tokens after the last block", lambda r: count(r.final)),
        Column(head, "%", f"{score} with its 95 % interval", lambda r: percent(r.accuracy)),
        Column("change", "points", "against the unreduced model, paired, 95 % interval",
               lambda r: points(r.difference)),
        Column("vs random", "points", "against random choice at the same tokens, paired, 95 % interval",
               lambda r: points(against_random(r, rows))),
        Column("agree", "%", "images given the class the unreduced model gives",
               lambda r: NONE if r.agreement is None else f"{100 * r.agreement:.1f}"),
        Column("KL", "nats", "of the class probabilities, from the unreduced model's",
               lambda r: NONE if r.kl is None else f"{r.kl:.3f}"),
        Column("moved", "1 - cos", "how far features moved from the unreduced model's",
               lambda r: NONE if r.movement is None else f"{r.movement:.4f}"),
        *_drawing(),
        *_language(rows),
        Column("GFLOPs", "", "multiply-adds of one image, the method's own included",
               lambda r: f"{r.cost.gflops:.3f}" if r.cost.gflops else NONE),
        Column("speed-up", "x", _speedup_help(rows), lambda r: ratio(r.speedup)),
        Column("ceiling", "x", "speed-up the model's remaining FLOPs would allow",
               lambda r: f"{r.cost.ceiling:.2f}" if r.cost.gflops else NONE),
        Column("of it", "%", "speed-up over ceiling",
               lambda r: NONE if r.achieved is None or not r.cost.gflops else f"{100 * r.achieved:.0f}"),
        Column("own", "% time", "the method's share of the forward pass: deciding and combining",
               lambda r: NONE if r.own_time is None else f"{100 * r.own_time:.1f}"),
        Column("peak", "MB", "tensors alive at once in one batch, without weights and input",
               lambda r: f"{r.cost.peak / 1e6:.1f}" if r.cost.peak else NONE),
    ]  # fmt: skip
    words = SEEN if of_seeing(rows) else WORDED if of_language(rows) else {}
    every = [words.get(column.head, lambda c: c)(column) for column in every]
    good = [row for row in rows if not row.error]
    return [column for column in every if column.head == "method" or any(column.cell(r) != NONE for r in good)]


# Units of the tasks' columns, and what those mean that are not tasks of their own.
UNITS = {"perplexity": "", "copy": "% tokens", "repetition": "% tokens", "distinct-2": "% pairs", "stops": "% texts"}
WRITING = {
    "repetition": "tokens of what is written that stand in a run of four written before",
    "distinct-2": "pairs of neighbouring tokens, of what is written, that differ from all others",
    "stops": "texts that end before the last step",
}
# What some columns of images say instead where the model is one of language.
WORDED: dict[str, Callable[[Column], Column]] = {
    "tokens": lambda c: replace(c, head="rows", help="per layer and KV head, once the context is read"),
    "": lambda c: replace(c, unit="last", help="rows of the last layer"),
    "agree": lambda c: replace(c, help="next words of the book that are the unreduced model's"),
}
# The same where it is one of vision and language.
SEEN: dict[str, Callable[[Column], Column]] = {
    "tokens": lambda c: replace(c, help="visual tokens of a picture that a block of the language model reads, mean"),
    "": lambda c: replace(c, help="visual tokens of a picture behind the last block"),
    "agree": lambda c: replace(c, help="questions answered as the unreduced model does"),
    "GFLOPs": lambda c: replace(c, help="multiply-adds of one prompt in the language model, the method's own included"),
}
NATS = "mean negative log-likelihood of the right answer's tokens"


def of_language(rows: Sequence[Row]) -> bool:
    """Whether these are rows of a language model that reads text only."""
    watched = any(score.task in video.TASKS for row in rows for score in row.scores)
    return any(row.scores or row.writing for row in rows) and not of_seeing(rows) and not watched


def of_seeing(rows: Sequence[Row]) -> bool:
    """Whether these are rows of a vision-language model."""
    return any(score.task in visual.TASKS for row in rows for score in row.scores)


def _language(rows: Sequence[Row]) -> list[Column]:
    """The columns only a language model has: a column per task, then bytes and clocks."""
    tasks = dict.fromkeys(score.task for row in rows for score in row.scores)
    made = [_task(task) for task in tasks]
    return [
        *made,
        Column("KV peak", "MB", "the most keys and values held while reading and writing",
               _wrote(lambda w: w.kv_peak and f"{w.kv_peak / 1e6:.1f}")),
        Column("KV end", "MB", "keys and values held when the last token was written",
               _wrote(lambda w: w.kv_end and f"{w.kv_end / 1e6:.1f}")),
        Column("of full", "%", "KV end over what an unreduced cache holds then",
               _wrote(lambda w: w.kv_full and f"{100 * w.kv_end / w.kv_full:.0f}")),
        Column("first token", "s", "seconds to read a context and foretell its next token",
               _wrote(lambda w: w.first and f"{w.first:.2f}")),
        Column("sooner", "x", "the unreduced model's seconds to the first token over these; median of pairs",
               _wrote(lambda w: ratio(w.first_ratio))),
        Column("decoding", "tokens/s", "tokens written per second behind the first one",
               _wrote(lambda w: w.decoding and f"{w.decoding:.1f}")),
    ]  # fmt: skip


def _drawing() -> list[Column]:
    """The columns only a generator of pictures has."""
    return [
        Column("Fréchet", "", "distance of a classifier's features from those of real pictures, as two normals",
               lambda r: NONE if r.drawn is None else f"{r.drawn.frechet:.2f}"),
        Column("kernel", "", "the same by the maximum mean discrepancy under a cubic kernel, unbiased",
               lambda r: NONE if r.drawn is None else f"{r.drawn.kernel:.4f}"),
        Column("moved", "MSE", "of pixels, from the unreduced sample that began at the same noise",
               lambda r: NONE if r.drawn is None else f"{r.drawn.moved:.4f}"),
    ]  # fmt: skip


def _task(task: str) -> Column:
    name, nats, _ = task.partition(" nats")
    if nats:
        return Column(name, "nats", NATS, lambda r: _scored(r, task, lambda s: _plain(s.value, 2)))
    says = WRITING.get(task) or TASKS.get(task) or video.TASKS.get(task) or visual.TASKS[task]
    plain = task == "perplexity"
    return Column(task, UNITS.get(task, "%"), says,
                  lambda r: _scored(r, task, lambda s: _plain(s.value, 2) if plain else percent(s.value)))  # fmt: skip


def _scored(row: Row, task: str, written: Callable[[Score], str]) -> str:
    return next((written(score) for score in row.scores if score.task == task), NONE)


def _wrote(cell: Callable[[Writing], str | float]) -> Callable[[Row], str]:
    """A cell of what only models that write have; what is zero was not measured."""
    return lambda row: str((row.writing and cell(row.writing)) or NONE)


def _speedup_help(rows: Sequence[Row]) -> str:
    what = "of decoding: " if of_language(rows) else ""
    return f"{what}median of interleaved pairs, with quartiles; the first row is its own rival"


def _plain(x: Interval, digits: int) -> str:
    return f"{x.value:.{digits}f} ±{_half(x):.{digits}f}"


def marks(row: Row, rows: Sequence[Row]) -> str:
    """The marks of a row, in the order of `FOOTNOTES`."""
    found = FAULTY if any(note.startswith(FAULT) for note in row.notes) else ""
    found += "" if row.trained != UNTRAINED else RAW
    rival = against_random(row, rows)
    if rival is None:
        return found
    return (LOSES if rival.high < 0 else EVEN if rival.low <= 0 else "") + found


def footnotes(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The marks that occur, each with what it says."""
    used = "".join(marks(row, rows) for row in rows)
    return [(mark, says) for mark, says in FOOTNOTES.items() if mark in used]


def failed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.error]


def measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not row.error]


def frontier(rows: Sequence[Row], cost: Callable[[Row], float]) -> list[Row]:
    """Rows no other row beats in both accuracy and cost (lower is better), cheapest first; untrained ones and `BOUNDS`
    left out."""
    able = [r for r in measured(rows) if r.accuracy and r.trained != UNTRAINED and r.name not in BOUNDS]
    ordered = sorted(able, key=lambda r: (cost(r), -_accuracy(r)))
    best, front = -1.0, []
    for row in ordered:
        if _accuracy(row) > best:
            front.append(row)
            best = _accuracy(row)
    return front


def _accuracy(row: Row) -> float:
    return row.accuracy.value if row.accuracy else 0.0


def _named(row: Row, marked: str) -> str:
    return f"{row.method} {marked}".rstrip()


def percent(x: Interval | None) -> str:
    """A share in per cent with half the width of its interval."""
    return NONE if x is None else f"{100 * x.value:.1f} ±{100 * _half(x):.1f}"


def points(x: Interval | None) -> str:
    """A difference of shares in percentage points with half the width of its interval."""
    return NONE if x is None else f"{100 * x.value:+.1f} ±{100 * _half(x):.1f}"


def ratio(x: Interval | None) -> str:
    """A ratio with half the distance of its quartiles."""
    return NONE if x is None else f"{x.value:.2f} ±{_half(x):.2f}"


def _half(x: Interval) -> float:
    return (x.high - x.low) / 2
