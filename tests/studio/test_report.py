"""The table's marks, the frontier, the plot and the page, from rows made up for the purpose."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fewer.evaluation import stats
from fewer.evaluation.record import Passport, Row
from fewer.evaluation.settings import UNREDUCED
from fewer.studio import report
from fewer.studio.plots import COST, pareto
from fewer.studio.table import EVEN, LOSES, RAW, columns, footnotes, frontier, marks, summary

N = 400
PASSPORT = Passport(
    "a pass", "itself", "tiny", "noise", N, 3, "quartiles", 8, "cpu", "float32", 1, "packed", 0, "a machine",
    {"torch": "2"}, "abc1234", "2026-01-02T03:04:05+00:00",
)  # fmt: skip
BASE = np.arange(N) < 360


def row(method: str, right: np.ndarray, tokens: float, speed: float, **more: object) -> Row:
    made = Row(method, method, PASSPORT, acts="prune", code=f'fewer.apply(model, "{method}")', n=N)
    made.hits, made.accuracy = stats.pack_hits(right), stats.share(right)
    made.difference = None if method == UNREDUCED else stats.paired_difference(right, BASE)
    made.tokens, made.final, made.counts = tokens, tokens - 5, [tokens, tokens - 5]
    made.gflops, made.ceiling, made.agreement, made.kl = tokens / 100, 200 / tokens, 0.9, 0.01
    made.speedup = stats.Interval(speed, speed - 0.01, speed + 0.01)
    return replace(made, **more)  # type: ignore[arg-type]


@pytest.fixture
def rows() -> list[Row]:
    return [
        row(UNREDUCED, BASE, 197, 1.0),
        row("random:keep=0.7", np.arange(N) < 340, 130, 1.5),
        row("good:r=1", np.arange(N) < 358, 131, 1.45),
        row("same:r=1", np.arange(N) < 341, 132, 1.4),
        row("bad:r=1", np.arange(N) < 300, 130, 1.3),
        row("raw:r=1", np.arange(N) < 100, 90, 2.0, trained="untrained"),
        row("lone:r=9", np.arange(N) < 200, 60, 2.5),
        replace(row("broken", BASE, 100, 1.0), accuracy=None, error="ValueError: <it> failed"),
    ]


def test_marks_say_who_loses_to_random(rows: list[Row]) -> None:
    assert {r.method: marks(r, rows) for r in rows if not r.error} == {
        UNREDUCED: "", "random:keep=0.7": "", "good:r=1": "", "same:r=1": EVEN, "bad:r=1": LOSES, "raw:r=1": RAW,
        "lone:r=9": "",
    }  # fmt: skip
    assert [mark for mark, _ in footnotes(rows)] == [LOSES, EVEN, RAW]


def test_the_frontier_is_what_nobody_beats(rows: list[Row]) -> None:
    front = [r.method for r in frontier(rows, COST.value)]
    assert front == ["lone:r=9", "random:keep=0.7", "good:r=1", UNREDUCED]


def test_columns_that_say_nothing_are_left_out(rows: list[Row]) -> None:
    heads = [c.head for c in columns(rows)]
    assert "KL" in heads
    assert "moved" not in heads
    features = [replace(r, kl=None, agreement=None, movement=0.1) for r in rows]
    heads = [c.head for c in columns(features)]
    assert "KL" not in heads
    assert "moved" in heads


def test_cells(rows: list[Row]) -> None:
    cells = {(c.head or c.unit): c.cell(rows[4]) for c in columns(rows)}
    assert cells["method"] == f"bad:r=1 {LOSES}"
    assert cells["accuracy"].startswith("75.0 ±4.")
    assert cells["change"].startswith("-15.0 ±")
    assert cells["speed-up"] == "1.30 ±0.01"
    assert cells["of it"] == "84"
    assert "own" not in cells  # nobody's clock said anything


def test_the_summary_names_the_fastest_that_holds(rows: list[Row]) -> None:
    said = summary(rows)
    assert "90.0 % accuracy on 400 images" in said
    assert "good:r=1 is the fastest: 1.45x" in said
    assert "None here is faster within one point" in summary([rows[0], rows[4]])
    assert "bad:r=1 differs by -15.0" in summary([rows[0], rows[4]])


def test_the_plot_is_svg_with_every_name(rows: list[Row]) -> None:
    svg = pareto(rows)
    ElementTree.fromstring(svg)
    texts = re.sub(r"<[^>]+>", " ", svg)
    for r in rows:
        assert (r.method in texts) == (not r.error)
    assert "below the chart: raw:r=1 25 %" in texts
    with pytest.raises(ValueError, match="nothing to plot"):
        pareto(rows[-1:])


def test_the_page_holds_everything_itself(rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "good.png")
    rows[2].picture = "pictures/good.png"
    path = report.write(rows, tmp_path)
    page = path.read_text(encoding="utf-8")
    outside = re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", page)
    assert outside == []
    assert page.count("data:image/png;base64,") == 1
    assert "<svg" in page
    for r in rows[1:-1]:
        assert f"fewer.apply(model, &#34;{r.method}&#34;)" in page
    assert "ValueError: &lt;it&gt; failed" in page
    assert "abc1234" in page


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        report.write([], tmp_path)


def test_a_report_without_matplotlib_says_so(rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "plots need matplotlib" in report.write(rows, tmp_path).read_text(encoding="utf-8")
