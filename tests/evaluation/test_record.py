"""The journal of results: what it survives, what it says of lines it cannot use, and who may write to it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fewer.evaluation.record import Cost, Journal, JournalError, Passport, Row, Score, Writing
from fewer.evaluation.stats import Interval

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PASSPORT = Passport(
    "a pass", "itself", "tiny", "noise", 3, 3, "quartiles", 8, "cpu", "float32", 1, "packed", 0, "a machine",
    {"torch": "2"}, "abc1234", "2026-01-02T03:04:05+00:00", notes=["one picture could not be read"],
)  # fmt: skip
FULL = Row(
    "full", "snapkv:keep=0.5", PASSPORT, accuracy=Interval(0.5, 0.4, 0.6), counts=[1.0, 2],
    scores=[Score("qa", Interval(1.0, 1.0, 1.0), None, 3)], cost=Cost(1.0, 0.5, 2.0, 7),
    writing=Writing([(0.5, 1.0, 2)], 1.0, 2.0, 3.0, 4.0, 0.1, Interval(1.0, 1.0, 1.0), 9.0, "so"),
)  # fmt: skip


def line(row: Row) -> bytes:
    return json.dumps(asdict(row)).encode()


def rows(count: int) -> list[Row]:
    return [replace(FULL, key=f"row {i}") for i in range(count)]


def written(path: Path, row: Row) -> list[Row]:
    """All rows of a file after another was added."""
    with Journal.open(path) as journal:
        journal.add(row)
    return list(Journal(path).rows.values())


def test_a_row_of_every_part_survives_its_file(tmp_path: Path) -> None:
    plain = replace(FULL, key="plain", writing=None)
    assert written(tmp_path / "a" / "results.jsonl", FULL) == [FULL]
    assert written(tmp_path / "a" / "results.jsonl", plain) == [FULL, plain]


@pytest.mark.parametrize(
    "raw",
    [
        b"%s\n\n%s\n", b"%s\n%s\n\0\0\0\0", b"%s\n%s\n\0\0\n", b"\n%s\n  \n%s", b"%s\r\n%s\r\n", b"%s\n%s\0\0",
        b'%s\n%s\n{"key": "torn', b'%s\n%s\n{"ke',
    ],
)  # fmt: skip
def test_no_whole_row_is_lost_and_no_file_is_refused(raw: bytes, tmp_path: Path) -> None:
    first, second, third = rows(3)
    path = tmp_path / "results.jsonl"
    path.write_bytes(raw % (line(first), line(second)))
    before = path.read_bytes()
    assert list(Journal(path).rows.values()) == [first, second]
    assert path.read_bytes() == before  # reading changes nothing
    assert written(path, third) == [first, second, third]
    assert path.read_bytes().count(b"torn") == 0
    assert (
        path.read_bytes().endswith(line(second) + b"\n" + line(third) + b"\n") or b"\r" in before or b"\0\n" in before
    )


def test_what_is_torn_in_the_middle_is_said_and_stays(tmp_path: Path) -> None:
    first, second = rows(2)
    path = tmp_path / "results.jsonl"
    path.write_bytes(line(first)[:80] + line(second) + b"\n" + line(second) + b"\n")
    journal = Journal(path)
    assert list(journal.rows) == ["row 1"]
    assert [fault.startswith("line 1 is not a result of this version") for fault in journal.faults] == [True]
    written(path, first)
    assert path.read_bytes().startswith(line(first)[:80])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"colour": 1}, "has colour, which this version does not know"),
        ({"n": "three"}, "n is 'three', not of type int"),
        ({"passport": {"what": "x"}}, "passport lacks against"), ({"counts": [[1]]}, r"counts is \[1\]"),
        ({"accuracy": [1, 2, 3]}, "accuracy is"), ({"scores": {}}, "scores is {}"),
    ],
)  # fmt: skip
def test_rows_of_another_version_are_said(change: dict, why: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(made) + "\n" for made in (asdict(FULL) | change, asdict(FULL))))
    journal = Journal(path)
    assert list(journal.rows.values()) == [FULL]
    (fault,) = journal.faults
    assert re.search(f"line 1 .*{why}", fault)


@pytest.mark.parametrize("raw", [b'{"some": "thing"}\n', b"a,b\n1,2\n", b"GIF89a\0\1", b"[" * 100_000])
def test_a_file_of_somebody_else_is_left_alone(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(raw)
    with (
        pytest.raises(JournalError, match=r"line 1 is not a result of this version.*another --out"),
        Journal.open(path),
    ):
        pass
    assert path.read_bytes() == raw


@pytest.mark.parametrize("name", ["bench", "smollm2", "llava_scenes", "bert_eras", "minilm_r8"])
def test_files_of_before_the_parts_are_read(name: str) -> None:
    path = RESULTS / f"{name}.jsonl"
    journal = Journal(path)
    assert not journal.faults
    assert len(journal.rows) == len(path.read_text().splitlines())
    for found, raw in zip(journal.rows.values(), map(json.loads, path.read_text().splitlines()), strict=True):
        flat = raw if "cost" not in raw else raw | raw["cost"] | (raw["writing"] or {"kv_read": 0})
        assert (found.cost.gflops, found.cost.peak) == (flat["gflops"], flat["peak"])
        assert (found.writing.kv_read if found.writing else 0) == flat.get("kv_read", 0)


def test_a_second_writer_is_refused_while_the_first_is_at_it(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    second = (
        "import sys; from pathlib import Path; from fewer.evaluation.record import Journal\n"
        "with Journal.open(Path(sys.argv[1])): print('in')"
    )
    with Journal.open(path) as journal:
        run = subprocess.run([sys.executable, "-c", second, str(path)], capture_output=True, text=True)
        assert "is being written by another run" in run.stderr
        journal.add(FULL)
    assert subprocess.run([sys.executable, "-c", second, str(path)], capture_output=True, text=True).stdout == "in\n"


def test_a_folder_that_cannot_be_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(JournalError, match=r"results cannot be written to .*file.*another --out"),
        Journal.open(tmp_path / "file" / "results.jsonl"),
    ):
        pass
    with Journal.open(tmp_path / "new" / "results.jsonl"):
        pass
    assert not (tmp_path / "new" / "results.jsonl").exists()  # nothing was measured
