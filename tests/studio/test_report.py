"""The table's marks, the frontier, the plots, the verdicts and the page, from rows made up for the purpose."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fewer.evaluation.levels import levels
from fewer.evaluation.record import Row, Writing
from fewer.evaluation.settings import UNREDUCED
from fewer.studio import report
from fewer.studio.plots import COST, against_random, plots
from fewer.studio.table import EVEN, LOSES, RAW, columns, footnotes, frontier, marks
from fewer.studio.verdict import verdict
from studio.made import BASE, N, row


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


def test_the_first_line_is_for_everybody(rows: list[Row]) -> None:
    first, *levels_, near = verdict(rows)
    assert first == (
        "Leaving out 34 % of the tokens makes the model 1.45 times as fast (good:r=1): 358 of 400 right instead of 360 "
        "of 400. Tokens picked at random: 1.50 times as fast, 340 of 400 right."
    )
    (level,) = levels_
    assert level.startswith(
        "130 of 197 tokens: good:r=1 is the best of 3, 89.5 %, 1.45x; random:keep=0.7 85.0 %, 1.50x."
    )
    assert "Difference +4.5 [" in level
    assert "points: decided. Better than random: 1, worse: 1, not told apart: 1. 400 images tell" in level
    assert near.startswith(
        "Nobody is shown to lose less than one point (95 %, for all 5 faster settings at once); nearest"
    )
    assert "nearest is good:r=1: 89.5 % of 90.0 %, a loss of at most" in near
    assert verdict([rows[0]]) == ["Nothing to compare yet."]
    assert "None here is faster" in verdict([rows[0], replace(rows[2], speedup=None)])[-1]


def test_undecided_is_said(rows: list[Row]) -> None:
    said = verdict([rows[0], rows[1], rows[3]])
    assert "Difference +0.2 [" in said[1]
    assert "not decided." in said[1]


def test_plots_are_svg_with_every_name_and_no_line_to_follow(rows: list[Row]) -> None:
    drawn = plots(rows)
    assert [title for title, _ in drawn] == [
        "130 of 197 tokens: against random:keep=0.7, 85.0 %", "accuracy over GFLOPs per item",
        "accuracy over measured speed-up",
    ]  # fmt: skip
    for _, svg in drawn:
        root = ElementTree.fromstring(svg)
        assert root.get("width") == "100%"
        assert float(root.get("viewBox", "").split()[2]) < 390  # drawn for a telephone: its letters stay as they are
    level, cost, _ = drawn
    texts = [element.text for element in ElementTree.fromstring(level[1]).iter() if element.tag.endswith("text")]
    assert {"good:r=1", "same:r=1", "bad:r=1", "1.45x"} <= set(texts)
    titles = [element.text for element in ElementTree.fromstring(cost[1]).iter() if element.tag.endswith("title")]
    assert any(told.startswith("lone:r=9: 50.0 %, 2.50x; 50.0 %") for told in titles)
    assert not any(told.startswith("raw") for told in titles)  # its modules are random
    with pytest.raises(ValueError, match="nothing to plot"):
        plots(rows[-1:])


def test_what_is_far_off_is_written_and_leaves_the_others_their_room(rows: list[Row]) -> None:
    (level,) = levels([*rows[:4], row("lost:r=1", np.arange(N) < 40, 130, 1.2)])
    root = ElementTree.fromstring(against_random(level, rows)[1])
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "◂ -75" in texts
    assert not any(text.lstrip("−-").isdecimal() and int(text.lstrip("−-")) > 30 for text in texts if text)  # noqa: RUF001


def test_hostile_names_are_text(rows: list[Row], tmp_path: Path) -> None:
    for name in (
        r"$\frac{1}$:r=1",
        "<script>alert(1)</script>:r=1",
        'a:b"><img src=x onerror=alert(1)>',
        "</style>: x",
    ):
        evil = replace(rows[2], key=name, method=name, acts=name, notes=[name], code=name)
        (level,) = levels([*rows[:2], evil])
        ElementTree.fromstring(against_random(level, rows)[1])
        page = report.write([*rows[:2], evil], tmp_path).read_text(encoding="utf-8")
        assert "<script" not in page
        assert "<img src=x" not in page
        assert page.count("</style>") == 1 + page.count("<defs>\n  <style")


def test_rows_say_at_which_blocks_tokens_left(rows: list[Row]) -> None:
    def path(*counts: float) -> str:
        return report._path(replace(rows[2], counts=list(counts)))

    assert path(197, 197, 197, 138, 138, 68) == "197 (blocks 1 to 3) → 138 (blocks 4 to 5) → 68 (block 6)"
    assert path(*range(190, 70, -10)) == "190 → 80, fewer in each of blocks 1 to 12"
    assert path(5.5, 5.5) == "5.5 (blocks 1 to 2)"
    assert path() == "–"


@pytest.mark.parametrize("where", ["absolute", "..", "link", "folder link", "beside", "text", "gif"])
def test_only_pictures_of_the_run_itself_are_put_inside(where: str, rows: list[Row], tmp_path: Path) -> None:
    """Results may come from somebody else."""
    out, secret = tmp_path / "out", tmp_path / "secret" / "own.png"
    secret.parent.mkdir()
    Image.new("RGB", (4, 4)).save(secret)
    out.mkdir()
    own = out / "pictures"
    if where == "folder link":
        own.symlink_to(secret.parent)
    else:
        own.mkdir()
    named = {
        "absolute": str(secret), "..": "pictures/../../secret/own.png", "link": "pictures/link.png",
        "folder link": "pictures/own.png", "beside": "own.png", "text": "pictures/text.png", "gif": "pictures/gif.png",
    }[where]  # fmt: skip
    if where == "link":
        (own / "link.png").symlink_to(secret)
    elif where == "beside":
        Image.new("RGB", (4, 4)).save(out / "own.png")
    elif where == "text":
        (own / "text.png").write_text("root:x:0:0")
    elif where == "gif":
        Image.new("RGB", (4, 4)).save(own / "gif.png", "GIF")
    page = report.html([replace(r, picture=named) for r in rows], out)
    assert "base64" not in page
    Image.new("RGB", (4, 4)).save(tmp_path / "fine.png")
    if where == "text":
        (own / "text.png").write_bytes((tmp_path / "fine.png").read_bytes())
        assert "base64" in report.html([replace(r, picture=named) for r in rows], out)


def test_what_must_be_known_of_the_data_is_in_the_report(rows: list[Row], tmp_path: Path) -> None:
    passport = replace(rows[0].passport, notes=["2 of 9 pictures could not be read and were left out: a/._a.jpg, b"])
    page = report.html([replace(r, passport=passport) for r in rows], tmp_path)
    assert page.count("2 of 9 pictures could not be read and were left out: a/._a.jpg, b") == 2


def test_a_row_of_a_language_model_without_a_reading_has_no_sweep(rows: list[Row], tmp_path: Path) -> None:
    made = [replace(r, writing=Writing(sample="and so on", kv_end=1.0, kv_full=4.0)) for r in rows]
    page = report.html(made, tmp_path)
    assert "and so on" in page
    assert "25 % of the cache" in page


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
