"""Methods from other packages: named with their module, or by an entry point. CONTRIBUTING.md is walked."""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fewer
from fewer import registry
from fewer.cli import app
from vit import images, run, tiny_vit

PAGE = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text()
SECTION = PAGE[PAGE.index("### In a package of your own") : PAGE.index("### What belongs in the file")]


def fenced(text: str, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package the page tells to write, importable; not installed."""
    named = re.search(r"Saved as `(\w+)/(\w+)\.py`", SECTION)
    assert named is not None
    folder = tmp_path / named[1]
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / f"{named[2]}.py").write_text(fenced(PAGE, "python"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    registry.names.cache_clear()
    yield folder
    registry.names.cache_clear()
    registry._places.clear()
    for module in [name for name in sys.modules if name.partition(".")[0] == named[1]]:
        del sys.modules[module]


def installed(package: Path, points: str) -> None:
    """As an installer leaves it."""
    info = package.parent / f"{package.name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(points)
    registry.names.cache_clear()


def points_of_the_page() -> str:
    return fenced(SECTION, "toml").replace('project.entry-points."fewer.methods"', "fewer.methods").replace('"', "")


def command(line: str, *more: str) -> str:
    done = CliRunner().invoke(app, [*shlex.split(line)[1:], *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_commands_of_the_page_run(package: Path) -> None:
    show, bench, viz = fenced(SECTION, "sh").splitlines()
    assert "Tokens with long value vectors stay." in command(show)
    small = ("--limit", "10", "--repeats", "1", "--out", "bench")
    assert "my_pkg.mine" in command(bench, *small)
    assert (package.parent / "bench" / "report.html").is_file()
    command(viz, "--out", "seen.png")
    assert (package.parent / "seen.png").is_file()


def test_an_entry_point_gives_a_name(package: Path) -> None:
    installed(package, points_of_the_page())
    assert fewer.names()["value_norm"] == "my_pkg.mine:ValueNorm"
    method = fewer.parse("value_norm:keep=0.5,layers=1")
    assert type(method).__module__ == "my_pkg.mine"
    assert fewer.text(method) == "value_norm:keep=0.5,layers=1"
    assert fewer.text(fewer.parse("my_pkg.mine:ValueNorm:keep=0.5,layers=1")) == fewer.text(method)
    assert "value_norm" in command("fewer list")
    with fewer.apply(tiny_vit(), method) as session:
        run(session.model, images(1))
        assert session.counts == [17, 9, 9, 9]


@pytest.mark.parametrize("written", ["my_pkg.mine:ValueNorm", "my_pkg.mine.ValueNorm", " my_pkg.mine:ValueNorm "])
@pytest.mark.parametrize("rest", ["", ":keep=0.5", ":keep=0.5,layers=1+2"])
def test_a_class_named_whole_is_read_and_written(package: Path, written: str, rest: str) -> None:
    method = fewer.parse(written + rest)
    assert fewer.text(method) == "my_pkg.mine.ValueNorm" + rest
    assert fewer.parse(fewer.text(method)) == method
    assert fewer.lookup(written) is type(method)
    assert fewer.parse(written, layers=(3,)).layers == (3,)


def test_it_is_saved_and_loaded_by_that_name(package: Path) -> None:
    model, x = tiny_vit(), images(2)
    with fewer.apply(model, "my_pkg.mine:ValueNorm:layers=1"):
        want = run(model, x)
        model.save_pretrained("kept")
    again, session = fewer.load("kept")
    assert run(again, x).equal(want)
    assert fewer.text(session.methods[0]) == "my_pkg.mine.ValueNorm:layers=1"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("my_pkg.mine:Valuenorm", "my_pkg.mine has no Valuenorm; its methods: ValueNorm"),
        ("my_pkg.mine:KeepRatio", r"my_pkg\.mine\.KeepRatio is no method: a class with a @fewer\.reducer line"),
        ("my_pkg.gone:X", r"no method and no module named 'my_pkg\.gone': install its package, or put its folder on"),
        ("tomme:X", r"no method and no module named 'tomme' \(did you mean tome\?\)"),
        ("my_pkg.broken:X", r"my_pkg\.broken cannot be imported: ZeroDivisionError: division by zero"),
        ("my_pkg.lacking:X", r"my_pkg\.lacking cannot be imported: No module named 'not_there_at_all'"),
        ("my_pkg.again:Other", r"my_pkg\.again\.Other calls itself 'tome', and so does fewer\.methods\.vision\.tome"),
    ],
)
def test_what_cannot_be_used(package: Path, form: str, message: str) -> None:
    (package / "broken.py").write_text("1 / 0\n")
    (package / "lacking.py").write_text("import not_there_at_all\n")
    same = (package / "mine.py").read_text().replace("class ValueNorm", "class Other")
    (package / "again.py").write_text(same.replace('"value_norm"', '"tome"'))
    with pytest.raises(fewer.UnknownMethod, match=message):
        fewer.parse(form)


def test_a_second_class_of_a_name_is_refused(package: Path) -> None:
    (package / "twin.py").write_text((package / "mine.py").read_text())
    fewer.parse("my_pkg.mine:ValueNorm")
    both = r"my_pkg\.twin\.ValueNorm calls itself 'value_norm', and so does my_pkg\.mine\.ValueNorm: rename one"
    with pytest.raises(fewer.UnknownMethod, match=both):
        fewer.parse("my_pkg.twin:ValueNorm")
    fewer.parse("my_pkg.mine:ValueNorm")


def test_bad_entry_points_are_said_and_break_nothing(package: Path) -> None:
    more = "tome = my_pkg.mine:ValueNorm\nbroken = my_pkg.gone:X\nwrong = my_pkg.mine:ValueNorm\n"
    installed(package, points_of_the_page() + more)
    with pytest.warns(
        UserWarning, match=r"tome = my_pkg\.mine:ValueNorm is left out: fewer\.methods\.vision\.tome has"
    ):
        fewer.names()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = fewer.registered()
    assert sorted(str(w.message).partition(":")[0] for w in said) == [
        "the entry point broken = my_pkg.gone", "the entry point wrong = my_pkg.mine",
    ]  # fmt: skip
    assert found["tome"] is fewer.ToMe
    assert "value_norm" in found
    assert not {"broken", "wrong"} & found.keys()
    with pytest.raises(fewer.UnknownMethod, match=r"broken = my_pkg\.gone:X: no method and no module named"):
        fewer.lookup("broken")
    with pytest.raises(fewer.UnknownMethod, match=r"wrong = .*: the class calls itself 'value_norm'"):
        fewer.lookup("wrong")


def test_an_instance_of_a_class_without_a_name_still_works() -> None:
    class Mine(fewer.ToMe):
        pass

    with fewer.apply(tiny_vit(), Mine(), r=1) as session:
        run(session.model, images(1))
        assert session.counts == [16, 15, 14, 13]
