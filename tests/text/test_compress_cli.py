"""`fewer compress` on a tiny model: what it prints and where, what it writes, how what went comes back."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

import fewer
import tinytext
from fewer.cli import app
from fewer.cli import compress as command
from fewer.compression import Compressed, Compressor
from fewer.compression.corpus import Settings
from fewer.models import zoo
from fewer.studio import shortened

STORY = tinytext.STORY


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tinytext.saved(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def compressor(model: str) -> Compressor:
    return Settings(model=model).compressor()


@pytest.fixture
def story(tmp_path: Path) -> Path:
    file = tmp_path / "story.txt"
    file.write_text(STORY)
    return file


def compress(*words: object, given: bytes | None = None) -> Result:
    """The command, and what it says; progress bars of other libraries left out."""
    shown = CliRunner().invoke(app, ["compress", *map(str, words)], input=given)
    said = [line for line in shown.stderr.splitlines() if "Loading weights" not in line]
    shown.stderr_bytes = "\n".join(said).encode()
    return shown


def complaint(result: Result) -> str:
    """The one line of a known error: exit code 2, no traceback, nothing on the output."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error ")
    return line


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# -- one text ----------------------------------------------------------------------------------------------------------


def test_the_shortened_text_alone_is_printed(story: Path, model: str, compressor: Compressor) -> None:
    shown = compress(story, "--rate", 0.4, "--model", model)
    expected = compressor(STORY, rate=0.4)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.rstrip("\n") == expected.text.rstrip("\n")
    assert shown.stdout.endswith("\n")
    assert shown.stderr.startswith(f"{expected.before} -> {expected.after} (")
    assert f"llmlingua:keep=0.4, {model}" in shown.stderr


def test_what_comes_in_is_shortened_too(story: Path, model: str) -> None:
    from_file = compress(story, "--tokens", 60, "--model", model)
    piped = compress("-", "--tokens", 60, "--model", model, given=STORY.encode())
    assert piped.stdout == from_file.stdout
    assert " -> 60 (" in piped.stderr
    nothing = compress("-", "--model", model, given=b"")
    assert (nothing.exit_code, nothing.stdout) == (0, "")


def test_options_reach_the_compressor(story: Path, model: str) -> None:
    plain = compress(story, "--rate", 0.3, "--model", model).stdout
    forced = compress(story, "--rate", 0.3, "--model", model, "--force", "carpenter", "--force", "barrels").stdout
    assert "carpenter" in forced
    assert "barrels" in forced
    assert not ("carpenter" in plain and "barrels" in plain)
    kept = compress(story, "--rate", 0.3, "--model", model, "--protect", "digits,negations").stdout
    assert re.findall(r"\d+", kept) == re.findall(r"\d+", STORY)
    assert len(re.findall(r"\b(?:not|nobody|never)\b", kept)) >= 3
    asked = compress(
        story, "--rate", 0.5, "--model", model, "--question", "Who broke it?", "--instruction", "Read."
    ).stdout
    assert asked.startswith("Read.\n\n")
    assert asked.rstrip("\n").endswith("\nWho broke it?")
    segments = compress(story, "--rate", 0.3, "--model", model, "--method", "llmlingua:segment=20")
    assert segments.stdout != plain
    assert "llmlingua:keep=0.3,segment=20" in segments.stderr


def test_another_tokenizer_counts(story: Path, model: str, tmp_path: Path) -> None:
    """Tokens are those of --counter, a folder or a file, and as many of them are left as were asked for."""
    counter = tinytext.tokenizer(300)
    counter.save_pretrained(tmp_path / "counter")
    for place in ("counter", "counter/tokenizer.json"):
        shown = compress(story, "--tokens", 80, "--model", model, "--counter", tmp_path / place, "--json")
        row = json.loads(shown.stdout)
        assert row["before"] == len(counter(STORY)["input_ids"])
        assert row["after"] == len(counter(row["text"])["input_ids"])
        assert abs(row["after"] - 80) <= 1


def test_a_text_that_would_break_stays_and_says_so(tmp_path: Path, model: str, compressor: Compressor) -> None:
    """A fence would be left open: the text stays as it was, unless the gate is off."""
    file, text = tmp_path / "f.md", f"```\n{STORY}```\n{STORY}"
    file.write_text(text)
    free = Compressor("llmlingua", compressor.model, compressor.tokenizer, gate=False)
    rates = [rate / 20 for rate in range(2, 20)]
    rate = next(rate for rate in rates if free(text, rate=rate).text.count("```") == 1)
    shown = compress(file, "--rate", rate, "--model", model)
    assert (shown.exit_code, shown.stdout) == (0, text)
    assert "note left as it was: a code fence is open" in shown.stderr
    freed = compress(file, "--rate", rate, "--model", model, "--no-gate")
    assert freed.stdout.rstrip("\n") == free(text, rate=rate).text.rstrip("\n")


def test_a_file_gets_the_text_to_the_letter(story: Path, model: str, tmp_path: Path, compressor: Compressor) -> None:
    file = tmp_path / "deep" / "short.txt"
    shown = compress(story, "--rate", 0.4, "--model", model, "--out", file)
    assert (shown.exit_code, shown.stdout) == (0, "")
    assert file.read_bytes().decode() == compressor(STORY, rate=0.4).text
    assert "wrote" in shown.stderr
    (tmp_path / "into").mkdir()
    compress(story, "--rate", 0.4, "--model", model, "--out", tmp_path / "into")
    assert (tmp_path / "into" / "story.txt").read_bytes() == file.read_bytes()


def test_line_ends_and_other_scripts_survive(tmp_path: Path, model: str, compressor: Compressor) -> None:
    text = (
        "\ufeffDas Schiff \u2693\ufe0f verlie\u00df 1999 den Hafen.\r\n\u8239\u306f\u6e2f\u3092\u51fa\u305f\u3002\r\n"
        * 4
    )
    file = tmp_path / "t.txt"
    file.write_bytes(text.encode())
    row = json.loads(compress(file, "--rate", 0.6, "--model", model, "--json").stdout)
    assert row["original"] == text[1:]
    assert row["text"] == compressor(text[1:], rate=0.6).text


def test_several_documents_of_one_prompt(tmp_path: Path, model: str, compressor: Compressor) -> None:
    parts = STORY.split("\n\n")
    names = [tmp_path / f"{i}.txt" for i in range(2)]
    for name, part in zip(names, parts, strict=True):
        name.write_text(part)
    how = ("--method", "longllmlingua", "--question", "How many barrels?", "--rate", 0.5, "--model", model)
    shown = compress(*names, "--together", *how)
    assert shown.exit_code == 0, shown.output
    long = Compressor("longllmlingua", compressor.model, compressor.tokenizer)
    assert shown.stdout.rstrip("\n") == long(parts, question="How many barrels?", rate=0.5).text.rstrip("\n")
    (tmp_path / "bad").write_bytes(b"\xff")
    assert "bad" in complaint(compress(names[0], tmp_path / "bad", "--together", *how))


# -- what went ---------------------------------------------------------------------------------------------------------


def test_json_says_all_of_it(story: Path, model: str, compressor: Compressor) -> None:
    row = json.loads(compress(story, "--rate", 0.4, "--model", model, "--json").stdout)
    expected = compressor(STORY, rate=0.4)
    assert {name: row[name] for name in ("text", "before", "after", "rate", "original", "error", "source")} == {
        "text": expected.text, "before": expected.before, "after": expected.after, "rate": expected.rate,
        "original": STORY, "error": "", "source": str(story),
    }  # fmt: skip
    assert {span["id"]: (span["start"], span["stop"]) for span in row["dropped"]} == expected.dropped
    assert row["notes"] == list(expected.notes)


def test_every_span_comes_back(story: Path, model: str, tmp_path: Path) -> None:
    """By its id, from the whole text, from a result, and from lines of results, to the letter."""
    how = ("--rate", 0.4, "--model", model, "--question", "Who?")
    result = compress(story, *how, "--json")
    (tmp_path / "one.json").write_text(result.stdout)
    compress(story, tmp_path / "story.txt.jsonl", *how, "--out", tmp_path / "many.jsonl")
    row = json.loads(result.stdout)
    (tmp_path / "many.jsonl").write_text('{"torn": \n' + json.dumps(row) + "\n")
    assert len(row["dropped"]) > 10
    for span in (row["dropped"][0], row["dropped"][5], row["dropped"][-1]):
        expected = row["original"][span["start"] : span["stop"]]
        for source in ("one.json", "many.jsonl"):
            assert compress("--restore", span["id"], "--from", tmp_path / source).stdout == expected
        assert compress("--restore", span["id"], "--from", story, "--question", "Who?").stdout == expected
        assert "has no text" in complaint(compress("--restore", span["id"], "--from", story))
    key = row["dropped"][0]["id"].partition(":")[0]
    assert compress("--restore", key, "--from", tmp_path / "one.json").stdout == row["original"]
    for wrong, why in (
        (f"{key}:9-4", "outside"),
        (f"{key}:0-99999", "outside"),
        (f"{key}:x", "no id"),
        ("no", "no text"),
    ):
        assert why in complaint(compress("--restore", wrong, "--from", tmp_path / "one.json"))
    assert "--from" in complaint(compress("--restore", key))
    assert "--restore" in complaint(compress(story, "--from", story))


def test_the_diff_has_marks_where_nobody_sees_colours(story: Path, model: str, compressor: Compressor) -> None:
    plain = compress(story, "--rate", 0.4, "--model", model)
    shown = compress(story, "--rate", 0.4, "--model", model, "--diff")
    assert shown.stdout == plain.stdout
    said = shown.stderr
    assert "\x1b" not in said
    assert shortened.marked(compressor(STORY, rate=0.4)).strip() in said
    whole = re.sub(r"\[-(.*?)-\]", r"\1", said, flags=re.DOTALL)
    assert whole.startswith(STORY.strip())


@pytest.mark.parametrize("colours", [True, False])
def test_the_diff_strikes_out_in_a_terminal(
    compressor: Compressor, monkeypatch: pytest.MonkeyPatch, colours: bool
) -> None:
    screen = io.StringIO()
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(file=screen, force_terminal=True, no_color=not colours, highlight=False, width=80)
    monkeypatch.setattr(command, "err", console)
    one = compressor(STORY + " \x1b[31m [bold]x[/]", rate=0.5)
    command._show(one)
    said = screen.getvalue()
    assert "\x1b[31m" not in said
    if not colours:
        assert "[-" in said
        assert "\x1b" not in said
        return
    gone = re.findall(r"\x1b\[2;9m(.*?)\x1b\[0m", said, re.DOTALL)
    expected = "".join(shortened.visible(piece) for stays, piece in one.diff() if not stays)
    assert "".join(gone).replace("\n", "") == expected.replace("\n", "")
    assert "[bold]x[/]" in re.sub(r"\x1b\[[\d;]*m", "", said)


def test_a_terminal_is_shown_no_control_characters(tmp_path: Path, model: str) -> None:
    """On a real one: the text is printed, what it would obey is not; NO_COLOR turns strokes to marks."""
    file = tmp_path / "t.txt"
    file.write_text(f"\x1b[31mred\x07 {STORY}")
    code = "import sys; from fewer.cli import app; app(sys.argv[1:])"
    words = ["compress", str(file), "--rate", "0.9", "--model", model, "--diff", "--force", "\x1b[31mred"]
    environment = os.environ | {
        "PYTHONPATH": str(Path(fewer.__file__).parent.parent), "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": "80",
    }  # fmt: skip
    own, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=other, stdout=other, stderr=other, env=environment
    )
    os.close(other)
    said = b""
    while True:
        try:
            piece = os.read(own, 65536)
        except OSError:  # how the other end's closing reads on Linux
            break
        if not piece:
            break
        said += piece
    os.close(own)
    assert process.wait() == 0, said
    text = said.decode()
    assert "\ufffd[31mred" in text
    assert "\x1b[31m" not in text
    assert "\x07" not in text
    assert "[-" in text


# -- the page ----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements of a page, and the text in some of them."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str | None]] = []
        self.gone, self.whole, self.left = [], "", ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        own = dict(attrs)
        self.found.append((tag, own))
        if tag not in self.VOID:
            self.open.append((tag, own.get("id")))
        if tag == "del":
            self.gone.append([own.get("title"), ""])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        ids = [name for _, name in self.open]
        if self.open and self.open[-1][0] == "del":
            self.gone[-1][1] += data
        if self.open and self.open[-1][0] in ("del", "div") and "whole" in ids:
            self.whole += data
        if self.open and self.open[-1][0] == "div" and "left" in ids:
            self.left += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]


HOSTILE = (
    '<script>alert(1)</script> & "quotes" \'single\' <b onclick="x">bold</b> &amp; {{ 7 * 7 }} \x00\x1b[31m \u202e\r\n'
)


@pytest.fixture
def one(compressor: Compressor) -> Compressed:
    return compressor(HOSTILE * 3 + STORY, rate=0.5)


def test_the_page_holds_the_whole_text_and_what_is_left(
    story: Path, model: str, tmp_path: Path, compressor: Any
) -> None:
    file = tmp_path / "pages" / "p.html"
    shown = compress(story, "--rate", 0.4, "--model", model, "--html", file)
    assert shown.exit_code == 0, shown.output
    expected = compressor(STORY, rate=0.4)
    page = Page(file.read_text(encoding="utf-8"))
    assert page.whole == "\n" + STORY or page.whole == STORY
    assert page.left == expected.text
    assert [tuple(each) for each in page.gone] == [
        (name, STORY[start:stop]) for name, (start, stop) in expected.dropped.items()
    ]
    assert f"{expected.before} -&gt; {expected.after}" in file.read_text()


def test_the_page_escapes_everything(one: Compressed) -> None:
    html = shortened.page(one, title=HOSTILE, facts=[("model", HOSTILE)])
    page = Page(html)
    assert page.all("script") == page.all("b") == []
    assert page.whole.strip("\n") == shortened.visible(one.source.text).strip("\n")
    assert not re.search(r"[\x00\x1b\u202e]", html)
    assert "{{ 7 * 7 }}" in page.whole


def test_the_page_is_whole_in_itself_and_accessible(one: Compressed) -> None:
    """Nothing from elsewhere, no script; one heading first, landmarks, labelled choices; contrast in light and dark."""
    html = shortened.page(one, title="t", facts=[])
    page = Page(html)
    assert not re.search(r"https?://|src=|@import|url\(", html)
    assert page.all("html") == [{"lang": "en"}]
    assert [tag for tag, _ in page.found if tag in ("h1", "h2", "h3")] == ["h1", "h2", "h2"]
    assert len(page.all("main")) == len(page.all("legend")) == len(page.all("fieldset")) == 1
    choices = page.all("input")
    assert [each["type"] for each in choices] == ["radio", "radio"]
    assert len({each["name"] for each in choices}) == 1
    assert len(page.all("label")) == 2
    named = {attrs["id"] for _, attrs in page.found if "id" in attrs}
    assert {each["aria-labelledby"] for each in page.all("section")} <= named
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    sheets = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    assert len(sheets) == 2
    for sheet in sheets:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", sheet))
        for front, back in (("ink", "paper"), ("quiet", "paper"), ("gone", "tint"), ("accent", "paper")):
            assert contrast(colours[front], colours[back]) >= 4.5, (front, colours)


def contrast(front: str, back: str) -> float:
    """Ratio of luminances, as the Web Content Accessibility Guidelines 2.2 count it."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    a, b = sorted((light(front), light(back)))
    return (b + 0.05) / (a + 0.05)


def test_a_page_without_jinja_says_what_to_install(story: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "fewer[report]" in complaint(compress(story, "--model", "nowhere", "--html", story.parent / "x.html"))


# -- many texts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    for i, name in enumerate(("b.txt", "a/x.md", "c.txt")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(STORY[50 * i :])
    return folder


def test_a_folder_becomes_a_folder(folder: Path, model: str, tmp_path: Path, compressor: Compressor) -> None:
    out = tmp_path / "short"
    shown = compress(folder, "--rate", 0.4, "--model", model, "--out", out)
    assert (shown.exit_code, shown.stdout) == (0, ""), shown.output
    found = rows((out / "results.jsonl").read_text())
    assert [row["source"] for row in found] == ["a/x.md", "b.txt", "c.txt"]
    for row in found:
        text = (folder / row["source"]).read_text()
        assert row["text"] == compressor(text, rate=0.4).text
        assert (out / row["source"]).read_bytes().decode() == row["text"]
    assert "3 texts, " in shown.stderr
    (out / "b.txt").unlink()
    again = compress(folder, "--rate", 0.4, "--model", model, "--out", out)
    assert "3 texts were done before" in again.stderr
    assert "0 texts, " in again.stderr
    refused = complaint(compress(folder, "--rate", 0.5, "--model", model, "--out", out))
    assert "rate=0.4 (now 0.5)" in refused


def test_lines_and_files_become_lines(folder: Path, model: str, tmp_path: Path) -> None:
    lines = tmp_path / "in.jsonl"
    lines.write_text("\n".join(json.dumps({"body": STORY[i:]}) for i in range(3)))
    shown = compress(lines, folder / "b.txt", "--field", "body", "--rate", 0.4, "--model", model, "--json")
    found = rows(shown.stdout)
    assert [row["source"] for row in found] == [f"{lines}:1", f"{lines}:2", f"{lines}:3", str(folder / "b.txt")]
    assert [row["original"] for row in found] == [*(STORY[i:] for i in range(3)), STORY]
    out = tmp_path / "out.jsonl"
    compress(lines, folder / "b.txt", "--field", "body", "--rate", 0.4, "--model", model, "--out", out)
    assert out.read_text() == shown.stdout


def test_one_bad_file_is_named_and_counted(folder: Path, model: str, tmp_path: Path) -> None:
    (folder / "bad.txt").write_bytes(b"\xff\xfe")
    out = tmp_path / "out.jsonl"
    for _ in range(2):  # and again where the run is only looked at
        shown = compress(folder, "--rate", 0.4, "--model", model, "--out", out)
        assert shown.exit_code == 1
        assert "failed 1 texts failed: bad.txt" in shown.stderr
        assert [row["source"] for row in rows(out.read_text()) if row["error"]] == ["bad.txt"]
    assert "bad.txt: " in compress(folder, "--rate", 0.4, "--model", model, "--json").stderr


def test_an_interrupted_run_says_how_to_go_on(
    folder: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, keep = tmp_path / "out.jsonl", command._keep

    def interrupted(result: Any, results: Any) -> None:
        keep(result, results)
        if result.source == "b.txt":
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "_keep", interrupted)
    shown = compress(folder, "--rate", 0.4, "--model", model, "--out", out)
    assert shown.exit_code == 130
    assert "interrupted" in shown.stderr
    monkeypatch.undo()
    assert len(rows(out.read_text())) == 2
    again = compress(folder, "--rate", 0.4, "--model", model, "--out", out)
    assert again.exit_code == 0
    assert "2 texts were done before" in again.stderr
    assert len(rows(out.read_text())) == 3


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--rate", 1.5), "outside (0, 1]"),
        (("--rate", 0), "outside (0, 1]"),
        (("--tokens", 0), "one token or more"),
        (("--rate", 0.5, "--tokens", 5), "give one of them"),
        (("--protect", "nouns"), "choose of digits"),
        (("--force", ""), "name words"),
        (("--method", "snapkv"), "inside a model"),
        (("--method", "llmlingua:x=1"), "x"),
        (("--method", "llmlingua:threshold=0.5"), "names no number"),
        (("--device", "tpu"), "give cpu"),
        (("--counter", "nowhere"), "no tokenizer 'nowhere'"),
        (("--tokens", 3, "--protect", "digits"), "must stay"),
        (("--method", "longllmlingua"), "give question="),
        (("--method", "llmlingua2"), "encoder"),
        (("--out", "story.txt"), "the text itself"),
        (("--out", "/dev/null/x"), "--out /dev/null/x cannot be written"),
        (("--html", "/dev/null/x"), "--html /dev/null/x cannot be written"),
        (("story.txt",), "two files are called"),
        (("other.txt",), "no file or folder other.txt"),
        ((".",), "give --out FILE.jsonl"),
        ((".", "--diff"), "show one text"),
        ((".", "--out", "inside"), "whose texts are read"),
        (("--model", "bert-eras"), "BertForSequenceClassification says nothing about each token"),
        (("--model", "vit-fashion"), "take a fast tokenizer"),
        (("datasets:x/y",), "datasets"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_in_a_line(
    story: Path, model: str, monkeypatch: pytest.MonkeyPatch, words: tuple[Any, ...], why: str
) -> None:
    monkeypatch.chdir(story.parent)
    monkeypatch.setitem(sys.modules, "datasets", None)
    own = () if "--model" in words else ("--model", model)
    texts = () if words[0] == "." else ("story.txt",)
    assert why in complaint(compress(*texts, *own, *words))
    assert story.read_text() == STORY
    assert sorted(path.name for path in story.parent.iterdir()) == ["story.txt"]


def test_texts_that_are_not_there_or_none(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"\xff")
    assert "nothing to shorten" in complaint(compress())
    assert "no file or folder" in complaint(compress(tmp_path / "a"))
    assert "UTF-8" in complaint(compress(tmp_path / "b"))


PAGE = Path(__file__).resolve().parents[2] / "docs" / "compress.md"


def test_the_commands_of_the_page_run(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, in order, on files as the page has them; the packaged model's place is taken by the tiny one."""
    page = PAGE.read_text()
    minutes = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    load = zoo.load_model
    monkeypatch.setattr(zoo, "load_model", lambda name, **how: load(model if name == "smollm2-135m" else name, **how))
    library: Any = ModuleType("datasets")
    library.load_dataset = lambda *words, **how: [{"article": STORY}]
    monkeypatch.setitem(sys.modules, "datasets", library)
    for name in ("minutes.txt", "build.log", "a.txt", "b.txt", "c.txt", "talks/one.txt", "talks/two.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(minutes if name == "minutes.txt" else STORY * 4)
    Path("mails.jsonl").write_text(json.dumps({"body": STORY}) + "\n")
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) > 10
    for line in lines:
        if line.startswith(("fewer train", "fewer bench")) or "my-encoder" in line:
            continue  # minutes of training: tests/training/test_compressor.py, tests/evaluation/test_text_suite.py
        words = shlex.split(line.replace("--workers 4", "--workers 1"))
        files = {mark: Path(words.pop(words.index(mark) + 1)) for mark in "<>" if mark in words}
        typed = [word for word in words if word not in "<>"]
        shown = compress(*typed[2:], given=files["<"].read_bytes() if "<" in files else None)
        assert shown.exit_code == 0, (line, shown.output)
        if ">" in files:
            files[">"].write_bytes(shown.stdout_bytes)
        if "--restore" in words:
            assert shown.stdout == minutes[6:7]
    assert Path("short/one.txt").is_file()
    assert len(rows(Path("short.jsonl").read_text())) == len(rows(Path("news.jsonl").read_text())) == 1
    assert Page(Path("minutes.html").read_text()).left


@pytest.mark.download
def test_the_first_command_of_the_page_on_the_packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has as many tokens as the page says, and what must stay; who else stays may differ by machine."""
    texts = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("minutes.txt").write_text(texts[0])
    shown = compress("minutes.txt", "--rate", 0.5, "--protect", "digits,identifiers,negations")
    assert shown.exit_code == 0, shown.output
    before, after = map(int, re.findall(r"(\d+) -> (\d+) \(", shown.stderr)[0])
    assert before == 166
    assert abs(after - 83) <= 1
    for printed in (shown.stdout, texts[1]):
        assert re.findall(r"[\d,]*\d", printed) == re.findall(r"[\d,]*\d", texts[0])
        assert "payments.yaml" in printed
        assert len(re.findall(r"\b(?:not|without)\b", printed)) == len(re.findall(r"\b(?:not|without)\b", texts[0]))


def test_help_fits_eighty_columns() -> None:
    shown = CliRunner().invoke(app, ["compress", "--help"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80
    for option in (
        "--rate",
        "--tokens",
        "--method",
        "--force",
        "--protect",
        "--restore",
        "--workers",
        "--html",
        "--diff",
    ):
        assert option in shown.stdout
