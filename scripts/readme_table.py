"""Fill the tables of README.md and docs/benchmarks.md from the results in benchmarks/results/.

With --check, nothing is written, and it fails if a table is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from fewer.evaluation.record import Journal, Row
from fewer.evaluation.settings import UNREDUCED
from fewer.studio import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
UNMEASURED = "*Not measured yet.*\n"

# The first screen: a merger, a pruner that needs no training, one that was trained; the first row of each.
METHODS = ("tome", "evit", "dynamicvit")
SEEN = ("random", "grid", "visionzip", "divprune", "honeybee_c", "oracle")
SEEN_HEADS = ("method", "answers right", "vs random", "presence", "count", "recall", "speed-up", "ceiling")
HEADS = ("method", "tokens", "acc.", "accuracy", "change", "speed-up", "ceiling", "of it", "own", "peak")


def chosen(rows: list[Row]) -> list[Row]:
    """The unreduced model and the rows of the first screen."""
    first = [next((row for row in rows if row.name == name), None) for name in (UNREDUCED, *METHODS)]
    return [row for row in first if row is not None]


def markdown(picked: list[Row], rows: list[Row], heads: tuple[str, ...] | None) -> str:
    """A line per picked row, the meaning of the columns and a passport below. rows: all of them, for comparisons."""
    columns = [c for c in table.columns(rows) if heads is None or c.head in heads]
    titles = [f"{c.head} {f'({c.unit})' if c.unit else ''}".strip() for c in columns]
    body = [[cell(row, c.cell(row)) for c in columns] for row in picked]
    lines = [titles, ["---"] * len(columns), *body]
    meanings = "; ".join(f"{title}: {c.help}" for title, c in zip(titles[1:], columns[1:], strict=True))
    marks = "".join(f" {mark}: {says}." for mark, says in table.footnotes(picked))
    return (
        "\n".join(["| " + " | ".join(line) + " |" for line in lines])
        + f"\n\n*{meanings}.{marks}*\n\n{passport(rows)}\n"
    )


def cell(row: Row, written: str) -> str:
    """A cell in Markdown: methods are code."""
    return re.sub(r"^(\w+:\S+)", r"`\1`", written) if written.startswith(row.name) else written


def passport(rows: list[Row]) -> str:
    """What was measured, against what, on what, how often, at which commit."""
    p = rows[0].passport
    return (
        f"*{p.what}. Model {p.model}, data {p.data}, {p.n:,} {p.unit}, batch {p.batch}, {p.dtype}, {p.execution}. "
        f"Against {p.against}; {p.repeats} pairs: {p.spread}. On {p.hardware}, {p.threads} threads, "
        f"torch {p.versions['torch']}, commit {p.commit}, {p.when[:10]}.*"
    )


def bench(first_screen: bool) -> str:
    """The table of the model inside the package, from what `fewer bench` wrote."""
    rows = table.measured(list(Journal(RESULTS / "bench.jsonl").rows.values()))
    if not rows:
        return UNMEASURED
    return markdown(chosen(rows), rows, HEADS) if first_screen else markdown(rows, rows, None)


def whole(name: str) -> str:
    """Every column of what a `fewer bench` wrote."""
    rows = table.measured(list(Journal(RESULTS / f"{name}.jsonl").rows.values()))
    return markdown(rows, rows, None) if rows else UNMEASURED


def seen() -> str:
    """The first screen of the vision-language table: a quarter and a twentieth of the visual tokens, by method."""
    rows = table.measured(list(Journal(RESULTS / "llava_scenes.jsonl").rows.values()))
    if not rows:
        return UNMEASURED
    most = rows[0].tokens
    picked = [r for r in rows if r.name in (UNREDUCED, "no-image")]
    for share in (0.25, 0.05):
        near = [r for r in rows if abs(r.tokens / most - share) < 0.02 and r.name in SEEN]
        picked += sorted(near, key=lambda r: SEEN.index(r.name))
    return markdown(picked, rows, SEEN_HEADS)


def small(name: str, columns: dict[str, str]) -> str:
    """A table of one of the small benchmarks. columns: title -> cell, a format string over the fields of a row."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return UNMEASURED
    result = json.loads(file.read_text())
    passport = result.get("passport", result)
    rows = [{k: "" if v is None else v for k, v in row.items()} for row in result.get("rows", [result])]
    lines = [
        list(columns),
        ["---"] * len(columns),
        *([cell.format(**row) for cell in columns.values()] for row in rows),
    ]
    stated = {key: value for key, value in passport.items() if isinstance(value, (str, int))}
    where = "; ".join(f"{key} {value}" for key, value in stated.items())
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines]) + f"\n\n*{where}.*\n"


SPEED = {
    "shape": "{shape}", "batch": "{batch}", "method": "`{setting}`", "tokens": "{mean_tokens:.0f}",
    "speed-up": "{speedup:.2f}x [{low:.2f}, {high:.2f}]", "ceiling": "{ceiling:.2f}x", "achieved": "{achieved:.2f}",
    "own time": "{own_time_share:.1%}", "repeats": "{repeats}",
}  # fmt: skip
KV = {
    "method": "`{method}`",
    "reading costs (%)": "{prefill_cost_percent[0]:.1f} [{prefill_cost_percent[1]:.1f}, {prefill_cost_percent[2]:.1f}]",
    "of it the method's own (%)": "{own_percent:.2f}",
    "writing": "{decode_speedup[0]:.2f}x [{decode_speedup[1]:.2f}, {decode_speedup[2]:.2f}]",
    "cache (MB)": "{cache_mb:.2f}",
}
PREFILL = {
    "method": "`{method}`", "speed-up": "{speedup[0]:.2f}x [{speedup[1]:.2f}, {speedup[2]:.2f}]",
    "ceiling": "{ceiling:.2f}x", "achieved": "{of_ceiling:.2f}", "own (% time)": "{own_percent:.2f}",
}  # fmt: skip
VISUAL = {
    "method": "`{method}`", "visual tokens left": "{rows:g}",
    "speed-up": "{speedup[0]:.2f}x [{speedup[1]:.2f}, {speedup[2]:.2f}]", "ceiling": "{ceiling:.2f}x",
    "achieved": "{of_ceiling:.2f}", "own (% time)": "{own_percent:.2f}",
    "own (% of the unreduced)": "{own_of_unreduced_percent:.2f}",
}  # fmt: skip
MEMORY = {"what": "{case}", "peak (MB)": "{peak_mb:.0f}", "limit (MB)": "{limit_mb}"}
IMPORT = {"what": "{what}", "CPU (ms)": "{cpu}", "wall (ms)": "{wall}", "limit (ms)": "{limit}", "repeats": "{repeats}"}


def filled(page: str) -> str:
    """A page with every marked block written anew."""
    text = (ROOT / page).read_text()
    blocks = {
        "bench": lambda: bench(first_screen=page == "README.md"),
        "visual": lambda: seen() if page == "README.md" else whole("llava_scenes"),
        "visual speed": lambda: small("visual_speed", VISUAL),
        "visual larger": lambda: small("visual_speed_360m", VISUAL),
        "visual tiles": lambda: small("visual_speed_2916", VISUAL),
        "language": lambda: whole("smollm2"),
        "encoder": lambda: whole("bert_eras"),
        "minilm": lambda: whole("minilm_r8"),
        "speed": lambda: small("vision_speed", SPEED),
        "kv": lambda: small("kv_speed", KV),
        "prefill": lambda: small("prefill_speed", PREFILL),
        "memory": lambda: small("memory", MEMORY),
        "import": lambda: small("import_time", IMPORT),
    }
    for name, write in blocks.items():
        start, end = f"<!-- {name}:start -->\n", f"<!-- {name}:end -->"
        if start in text:
            head, rest = text.split(start)
            text = head + start + write() + end + rest.split(end)[1]
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is stale")
    check = parser.parse_args(arguments).check
    stale = False
    for page in ("README.md", "docs/benchmarks.md"):
        new = filled(page)
        if new != (ROOT / page).read_text():
            stale = True
            print(f"{'stale' if check else 'written'}: {page}")
            if not check:
                (ROOT / page).write_text(new)
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
