"""`fewer bench --suite reasoning`: its dispatch, its rows and its table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from fewer.datasets import reasoning
from fewer.evaluation import reasoning as suite
from fewer.evaluation import suites
from fewer.evaluation.thoughts import Score


def test_what_there_is_not_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no suite 'cooking': choose .*reasoning"):
        suites.run("cooking", {}, tmp_path)
    with pytest.raises(ValueError, match="--model does not apply to the suite reasoning; it takes --limit, --threads"):
        suites.run("reasoning", {"model": "x"}, tmp_path)


def test_a_row_of_one_run_and_of_several():
    base = Score((True,) * 90 + (False,) * 10, (100,) * 100)
    short = Score((True,) * 89 + (False,) * 11, (50,) * 100)
    one = suite.line("one", [short], base, "here")
    assert (one.accuracy.value, one.tokens.value) == (0.89, 50)
    assert one.accuracy.low < 0.89 < one.accuracy.high
    assert one.difference is not None
    assert one.difference.value == pytest.approx(-0.01)
    assert one.per_right.value == pytest.approx(5000 / 89)
    two = suite.line("two", [short, base], base, "recorded")
    assert (two.accuracy.value, two.accuracy.low, two.accuracy.high) == (pytest.approx(0.895), 0.89, 0.9)
    assert two.seeds == 2


def test_a_record_reads_back_and_says_how_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = Score((True,) * 90 + (False,) * 10, (100,) * 100)
    row = suite.line("Kimi k1.5", [base], base, "recorded")
    made = {"command": "c", "problems": 100, "hardware": "h", "commit": "abc"}
    monkeypatch.setattr(suite.resources, "files", lambda _: tmp_path)
    assert suite.recorded()["lines"] == []
    file = tmp_path / suite.RECORD
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"made": made, "lines": [asdict(row)]}))
    record = suite.recorded()
    assert [suite.Line(**each) for each in record["lines"]] == [row]
    assert "commit abc" in suite.table([row], made).notes[1]


@pytest.mark.slow
def test_the_suite_prints_what_it_measured(tmp_path: Path):
    table, file = suites.run("reasoning", {"limit": 30}, tmp_path, log=lambda _: None)
    names = [row[0] for row in table.rows]
    assert names[0] == suite.UNTOUCHED
    assert "cut after 20 tokens" in names
    assert file.is_file()
    measured = {each["name"]: each for each in table.record["lines"]}
    assert measured[suite.UNTOUCHED]["accuracy"]["value"] > 0.7
    whole, half = (measured[name]["tokens"]["value"] for name in (suite.UNTOUCHED, "cut after 20 tokens"))
    assert half <= 20 < whole
    assert len(reasoning.load()) >= 30
