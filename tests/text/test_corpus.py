"""Many texts shortened: the same results however many do it, and after a run that was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fewer
import tinytext
from fewer.compression import Compressor
from fewer.compression.corpus import CorpusError, Results, Settings, shortened
from fewer.datasets.documents import Document, DocumentError, Documents
from fewer.models.zoo import ModelError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tinytext.saved(tmp_path_factory.mktemp("model")))


@pytest.fixture
def settings(model: str) -> Settings:
    return Settings(model=model, rate=0.5)


WORDS = tinytext.STORY.split()


def texts(n: int) -> list[Document]:
    """Texts of many lengths, in an order that says nothing about these."""
    sizes = [10 + (37 * i) % 83 for i in range(n)]
    return [Document(f"t{i}", " ".join(WORDS[i % 20 :][:size]) + f" {i}.") for i, size in enumerate(sizes)]


def lines(documents: Any, settings: Settings, **how: Any) -> list[str]:
    return [result.line() for _, result in shortened(documents, settings, **how)]


def test_each_text_comes_out_in_order_as_it_would_alone(settings: Settings) -> None:
    documents = texts(45)
    results = [result for _, result in shortened(documents, settings, batch=4)]
    assert [result.source for result in results] == [document.name for document in documents]
    compressor = settings.compressor()
    for document, result in zip(documents, results, strict=True):
        alone = compressor(document.text or "", rate=0.5)
        assert (result.text, result.before, result.after) == (alone.text, alone.before, alone.after)
        assert result.original == document.text
        assert abs((result.after or 0) - (result.before or 0) / 2) <= 1.5
        gone = "".join((result.original or "")[span["start"] : span["stop"]] for span in result.dropped)
        assert gone == "".join(piece for stays, piece in alone.diff() if not stays)


def test_batches_are_of_like_length(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read side by side differs less in length than the texts do, and is never more than was asked for."""
    seen: list[list[int]] = []
    plain = Compressor.batch

    def batch(self: Compressor, prompts: Any, **how: Any) -> Any:
        seen.append([len(prompt.contexts[0]) for prompt in prompts])
        return plain(self, prompts, **how)

    monkeypatch.setattr(Compressor, "batch", batch)
    lines(texts(32), settings, batch=8)
    assert [len(sizes) for sizes in seen] == [8] * 4
    spread = [max(sizes) - min(sizes) for sizes in seen]
    every = [size for sizes in seen for size in sizes]
    assert max(spread) < (max(every) - min(every)) / 2


def test_texts_are_taken_as_they_are_needed(settings: Settings) -> None:
    """An iterator that never ends gives its first results."""

    def forever() -> Any:
        i = 0
        while True:
            yield Document(f"t{i}", tinytext.STORY)
            i += 1

    results = shortened(forever(), settings, batch=2)
    assert [next(results)[1].source for _ in range(20)] == [f"t{i}" for i in range(20)]
    results.close()


def test_workers_change_nothing(settings: Settings) -> None:
    documents = texts(40)
    documents[7] = Document("t7", error="cannot be read")
    alone = lines(documents, settings, batch=4)
    assert lines(documents, settings, batch=4, workers=2) == alone


def test_one_bad_text_stops_nobody(settings: Settings) -> None:
    """Text that cannot be cut, or could not be read, has a result that says why; those beside it have theirs."""
    documents = texts(8)
    documents[2] = Document("digits", "12 34 56 78 90 12 34")
    documents[5] = Document("lost", error="lost cannot be read: No such file")
    strict = replace(settings, protect=("digits",), rate=0.2)
    results = [result for _, result in shortened(documents, strict, batch=8)]
    assert [result.source for result in results if result.error] == ["digits", "lost"]
    assert "must stay" in results[2].error
    assert results[2].text is None
    assert results[5].error == "lost cannot be read: No such file"
    assert all(result.text for i, result in enumerate(results) if i not in (2, 5))


def test_an_empty_text_and_none(settings: Settings) -> None:
    ((_, result),) = shortened([Document("empty", "")], settings)
    assert (result.text, result.before, result.rate, result.error) == ("", 0, 1.0, "")
    assert lines([], settings) == []


def test_a_model_that_is_not_there_is_no_text_s_fault(settings: Settings) -> None:
    for workers in (1, 2):
        with pytest.raises(ModelError, match="no model 'nowhere'"):
            lines(texts(3), replace(settings, model="nowhere"), workers=workers)


def test_what_no_text_is_to_blame_for_stops_the_run(settings: Settings) -> None:
    """A method that lacks its question, or a model of the wrong kind, is said once, not of each text."""
    for method, why in (("longllmlingua", "give question="), ("llmlingua2", "encoder")):
        with pytest.raises(CorpusError, match=why):
            lines(texts(20), replace(settings, method=method))


@pytest.mark.parametrize(
    "wrong",
    [{"rate": 1.5}, {"rate": 0.5, "tokens": 3}, {"protect": ("nouns",)}, {"method": "snapkv"}, {"force": ("",)}],
)
def test_settings_are_checked_before_a_model_is_loaded(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rate|tokens|nouns|texts|force"):
        Settings(model="nowhere", **wrong)


# -- results on disk ---------------------------------------------------------------------------------------------------


def run(path: Path, settings: Settings, documents: Any, **how: Any) -> int:
    """How many texts were done that were not there."""
    fresh = 0
    with Results.open(path, settings.plain()) as results:
        for _, result in shortened(documents, settings, done=results.done, **how):
            results.add(result)
            fresh += 1
    return fresh


@pytest.mark.parametrize("cut", [0, 1, 40, -1, -30])
def test_a_run_that_stopped_goes_on_to_the_same_bytes(tmp_path: Path, settings: Settings, cut: int) -> None:
    """Stopped between two lines, or within one, which is done again; also where that is in the middle of a batch."""
    documents, path = texts(30), tmp_path / "r.jsonl"
    assert run(path, settings, documents, batch=4) == 30
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    path.write_bytes(whole[: ends[16] + cut])
    left = 30 - 17 + (cut < 0)
    assert run(path, settings, documents, batch=4) == left
    assert path.read_bytes() == whole
    assert run(path, settings, documents, batch=4, workers=2) == 0
    assert path.read_bytes() == whole


def test_zeros_that_a_crash_left_are_cut_off(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "r.jsonl"
    run(path, settings, texts(3))
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 64)
    assert run(path, settings, texts(4)) == 1
    assert path.read_bytes().startswith(whole)
    assert b"\0" not in path.read_bytes()


def test_other_settings_are_refused_and_named(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "r.jsonl"
    run(path, settings, texts(3))
    before = path.read_bytes()
    with pytest.raises(CorpusError, match=r"rate=0\.5 \(now 0\.4\), question= \(now why\?\)"):
        run(path, replace(settings, rate=0.4, question="why?"), texts(3))
    path.with_suffix(".settings.json").unlink()
    with pytest.raises(CorpusError, match="does not say how they were made"):
        run(path, settings, texts(3))
    assert path.read_bytes() == before


def test_other_texts_are_refused(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "r.jsonl"
    run(path, settings, texts(3))
    with pytest.raises(CorpusError, match="line 2 is of t1, and text 2 is u now"):
        run(path, settings, [texts(3)[0], Document("u", "x"), texts(3)[2]])
    with pytest.raises(CorpusError, match="t1 has changed"):
        run(path, settings, [texts(3)[0], Document("t1", "x"), texts(3)[2]])
    with pytest.raises(CorpusError, match="results of 3 texts, and now 2"):
        run(path, settings, texts(2))


def test_a_file_of_something_else_is_left_alone(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "novel.txt"
    for content in ("It was a dark night", "It was\na dark night\n", '{"id": 1}\n', "\n"):
        path.write_text(content)
        with pytest.raises(CorpusError, match="no result"):
            run(path, settings, texts(1))
        assert path.read_text() == content


def test_two_runs_do_not_write_one_file(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "r.jsonl"
    with (
        Results.open(path, settings.plain()),
        pytest.raises(CorpusError, match="another run"),
        Results.open(path, settings.plain()),
    ):
        pass
    assert not path.exists()  # nothing came of it


RUN = """
import sys
from pathlib import Path
from fewer.compression.corpus import Results, Settings, shortened
from fewer.datasets.documents import Documents

if __name__ == "__main__":
    folder, model, out, workers = sys.argv[1:]
    settings = Settings(model=model, rate=0.5)
    with Results.open(Path(out), settings.plain()) as results:
        for _, result in shortened(Documents([folder]), settings, batch=2, workers=int(workers), done=results.done):
            results.add(result)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on(tmp_path: Path, model: str, workers: int) -> None:
    """SIGKILL in the middle: what is there stays, the rest comes, and the whole is what one run makes; no worker
    outlives it."""
    folder, script, out = tmp_path / "texts", tmp_path / "run.py", tmp_path / "r.jsonl"
    folder.mkdir()
    for document in texts(60):
        (folder / document.name).write_text((document.text or "") * 8)
    script.write_text(RUN)
    environment = os.environ | {"PYTHONPATH": str(Path(fewer.__file__).parent.parent)}

    command = [sys.executable, str(script), str(folder), model, str(out), str(workers)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n") >= 6):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = out.read_bytes()
    assert 6 <= there.count(b"\n") < 60
    subprocess.run(command, env=environment, check=True)
    run(tmp_path / "other.jsonl", Settings(model=model, rate=0.5), Documents([str(folder)]), batch=2)
    assert out.read_bytes().startswith(there[: there.rindex(b"\n") + 1])
    assert out.read_bytes() == (tmp_path / "other.jsonl").read_bytes()
    assert _ended(process.pid, deadline=time.monotonic() + 30)


def _ended(group: int, deadline: float) -> bool:
    """Whether no process of a group is left."""
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


# -- texts by name -----------------------------------------------------------------------------------------------------


def test_files_folders_and_lines_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {"d/b.txt": "two", "d/a/c.md": "one", "d/.hidden": "no", "e.txt": "\ufeffthree\r\n"}.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content.encode())
    Path("d/bad").write_bytes(b"\xff\xfe\x00")
    rows = ['{"text": "x", "other": "y"}', "", "[1]", "{", '{"other": 3}', '{"text": null}']
    Path("l.jsonl").write_text("\n".join(rows))
    alone = Documents(["d"])
    assert [(d.name, d.text) for d in alone] == [("a/c.md", "one"), ("b.txt", "two"), ("bad", None)]
    assert (alone.count, alone.files) == (3, ["a/c.md", "b.txt", "bad"])
    together = Documents(["e.txt", "d", "l.jsonl"])
    found = list(together)
    assert together.count == len(found) == 9
    assert found[0] == Document("e.txt", "three\r\n", file=True)
    assert [d.name for d in found[1:4]] == ["d/a/c.md", "d/b.txt", "d/bad"]
    assert [(d.name, d.text) for d in found[4:]] == [
        ("l.jsonl:1", "x"), ("l.jsonl:3", None), ("l.jsonl:4", None), ("l.jsonl:5", None), ("l.jsonl:6", None)
    ]  # fmt: skip
    said = [d.error for d in found if d.text is None]
    assert ["UTF-8" in said[0], "list" in said[1], "JSON" in said[2], "other" in said[3], "NoneType" in said[4]] == [
        True
    ] * 5
    assert next(iter(Documents(["l.jsonl"], field="other"))).text == "y"


def test_names_of_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "empty").mkdir()
    for names, why in (
        ([str(tmp_path / "b")], "no file or folder"),
        ([str(tmp_path / "empty")], "holds no files"),
        ([str(tmp_path / "a")] * 2, "two files are called"),
    ):
        with pytest.raises(DocumentError, match=why):
            Documents(names)


class Table(list):
    """As much of a set of the `datasets` library as is used."""

    column_names = ("text", "label")


def test_sets_of_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for the library: how it is called, and what is made of its rows."""
    asked: list[Any] = []
    table = Table([{"text": "one", "label": 0}, {"text": "two", "label": 1}])
    library: Any = ModuleType("datasets")
    library.load_dataset = lambda *words, **how: asked.append((words, how)) or table
    library.load_from_disk = lambda folder: {"train": table}
    monkeypatch.setitem(sys.modules, "datasets", library)
    named = Documents(["datasets:owner/news:en"], split="test[:2]")
    assert asked == [(("owner/news", "en"), {"split": "test[:2]"})]
    assert [(d.name, d.text) for d in named] == [
        ("datasets:owner/news:en:0", "one"),
        ("datasets:owner/news:en:1", "two"),
    ]
    assert named.count == 2
    with pytest.raises(DocumentError, match=r"no column 'body'; it has text, label"):
        Documents(["datasets:owner/news"], field="body")
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert [d.text for d in Documents([str(tmp_path)])] == ["one", "two"]
    with pytest.raises(DocumentError, match="no split 'test'; it has train"):
        Documents([str(tmp_path)], split="test")
    library.load_dataset = lambda *words, **how: iter(table)
    assert Documents(["datasets:endless"]).count is None
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DocumentError, match=r"pip install 'fewer\[data\]'"):
        Documents(["datasets:owner/news"])


def test_a_saved_set_is_read(tmp_path: Path) -> None:
    """With the library itself, where it is installed."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "rows.jsonl").write_text('{"text": "one", "n": 1}\n{"text": "two", "n": 2}\n')
    table = datasets.load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    table.save_to_disk(tmp_path / "set")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "sets")
    for name in ("set", "sets"):
        found = Documents([str(tmp_path / name)])
        assert [d.text for d in found] == ["one", "two"]
        assert found.count == 2


def test_settings_go_to_json_and_tell_forms_apart(settings: Settings) -> None:
    plain = settings.plain()
    assert plain == json.loads(json.dumps(plain))
    assert plain["method"].startswith("llmlingua:keep=0.5,")
    assert replace(settings, method="llmlingua:segment=100").plain() != plain
    assert replace(settings, method="llmlingua:segment=200").plain() == plain
