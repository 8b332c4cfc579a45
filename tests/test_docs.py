"""The pages say what the code does: their examples run, print what they say, and name what is there."""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

import fewer
import fewer.methods.vision
from decoders import decoder
from fewer import registry
from fewer.cli import app
from fewer.evaluation import record, stats
from fewer.evaluation.stats import Interval
from fewer.models import zoo
from fewer.testing import models
from fewer.testing.checks import CHECKS
from fewer.testing.hosts import TinyHost, fitted

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}
FENCE = re.compile(r"^```.*$", re.MULTILINE)


def block(page: str, language: str, index: int = 0) -> str:
    """One fenced block of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)[index]


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if ">>> " in text])
def test_examples(page):
    """Every `>>>` of a page, in order, in one namespace."""
    examples = doctest.DocTestParser().get_doctest(FENCE.sub("", PAGES[page]), {}, page, page, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    told: list[str] = []
    runner.run(examples, out=told.append)
    assert runner.tries > 0
    assert not runner.failures, "".join(told)


def test_examples_can_fail():
    """The runner above sees a wrong answer in a fenced block."""
    examples = doctest.DocTestParser().get_doctest(FENCE.sub("", "```pycon\n>>> 1 + 1\n3\n```\n"), {}, "x", "x", 0)
    assert doctest.DocTestRunner().run(examples, out=lambda _: None).failed == 1


def test_readme_prints_what_it_says():
    """The six lines of the first screen. Only the share of time may differ from machine to machine."""
    code, expected = block("README.md", "python"), block("README.md", "text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})

    def steady(text: str) -> str:
        return re.sub(r"[\d.]+ % of time", "# % of time", text).strip()

    assert steady(printed.getvalue()) == steady(expected)


class Words:
    """A tokenizer of 61 words, for models that know no more."""

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[3 + len(word) for word in text.split()]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids: torch.Tensor) -> str:
        return " ".join(map(str, ids.tolist()))


def test_readme_on_a_language_model(monkeypatch):
    """Its lines run as they stand, on a tiny model; the report has the shape of the one that is shown."""
    monkeypatch.setattr(zoo, "load_model", lambda name: (decoder("llama"), Words()))
    code, shown = block("README.md", "python", 1), block("README.md", "text", 1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})

    report = printed.getvalue().splitlines()[1:]
    assert report[:2] == ["snapkv:keep=0.5,window=64", "rows 739 -> 379 379 379"]  # of 720 words 360, and 19 written
    assert [shape(line) for line in report] == [shape(line) for line in shown.splitlines()[1:]]


def shape(line: str) -> str:
    """A line with its numbers, and runs of them, as #."""
    return re.sub(r"#( #)*", "#", re.sub(r"\d[\d.]*", "#", line))


LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    missing = [target for target in LINK.findall(FENCE.sub("", PAGES[page])) if not (folder / target).exists()]
    assert not missing


COMMAND = re.compile(r"^`*fewer ([a-z].*?)(?:\s+#.*|`.*)?$|`fewer ([a-z][^`]*)`", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    """Every `fewer ...` of a page is a command the parser takes, with the options it has."""
    group = typer.main.get_command(app)
    for found in COMMAND.finditer(PAGES[page]):
        name, *words = shlex.split(found[1] or found[2])
        arguments = [word for word in words if word != "..."]
        group.commands[name].make_context(name, arguments, resilient_parsing=not arguments)


# -- "add a method in one file" ---------------------------------------------------------------------------------------


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """The file of CONTRIBUTING.md, laid where a newcomer would lay it, in a methods folder that holds nothing else."""
    path = re.search(r"`src/fewer/methods/(vision/(\w+)\.py)`", PAGES["CONTRIBUTING.md"])
    assert path is not None
    file = tmp_path / path[1]
    file.parent.mkdir()
    file.write_text(block("CONTRIBUTING.md", "python"))
    monkeypatch.setattr(registry, "METHODS", tmp_path)
    monkeypatch.setattr(fewer.methods.vision, "__path__", [str(file.parent)])
    registry.names.cache_clear()
    yield path[2]
    registry.names.cache_clear()


def test_a_method_is_one_file(newcomer):
    assert list(fewer.names()) == [newcomer]
    model, pixels = models.tiny_vit(), models.images(batch=3)
    before = models.run(model, pixels)
    with fewer.apply(model, newcomer, keep=0.5, layers=(1, 2)) as session:
        together = models.run(model, pixels)
        assert session.counts == [17, 9, 5, 5]  # 16 free tokens, then 8, then 4, and the class token
        for i in range(3):
            torch.testing.assert_close(models.run(model, pixels[i : i + 1])[0], together[i])
    assert torch.equal(models.run(model, pixels), before)
    assert not torch.allclose(together, before)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_new_method_is_held_to_the_contract(newcomer, check):
    check(fitted(fewer.lookup(newcomer)), TinyHost("vit"))


def test_a_new_method_gets_its_page(newcomer):
    cls = fewer.lookup(newcomer)
    page = script("docs").method_page(newcomer, cls)
    assert cls.__doc__ is not None
    assert cls.__doc__.strip().splitlines()[0] in page
    assert all(f"| `{f.name}` |" in page for f in fields(cls))


# -- generated pages --------------------------------------------------------------------------------------------------


def script(name):
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(fewer.names()))
def test_the_lines_of_a_method_page_say_the_same(name):
    """Name, text form and Python form on a page are the same value; every parameter has its meaning."""
    cls = fewer.lookup(name)
    page = script("docs").method_page(name, cls)
    written = re.findall(r"^session = fewer\.apply\(model, (.*?)\)(?:  #.*)?$", page, re.MULTILINE)
    values = [fewer.parse(eval(form, {"fewer": fewer})) for form in written]
    assert values == [cls()] * 3
    table = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", page, re.MULTILINE))
    assert [field for field, meaning in table.items() if not meaning] == []
    assert set(table) == {f.name for f in fields(cls)}


def test_every_method_has_a_line_in_the_overview():
    page = script("docs").overview(fewer.registered())
    assert all(f"[`{name}`](methods/{name}.md)" in page for name in fewer.names())


def test_the_page_of_hosts_has_every_class():
    """Each class that was looked at, with a verdict; each that is refused everywhere, with a reason and a way out."""
    docs = script("docs")
    rows = [row for row in json.loads(docs.COVERAGE.read_text())["classes"] if row["ok"] is not None]
    page = docs.hosts_page()
    above, below = page.split("\n## Refused\n")
    assert len(rows) > 600
    assert [row["name"] for row in rows if f"`{row['name']}`" not in (above if docs.works(row) else below)] == []
    lines = [line.split(" | ") for line in below.splitlines() if line.startswith("| ")][1:]
    assert [line for line in lines if len(line) != 4 or not all(part.strip("| ") for part in line)] == []


def test_the_tables_come_from_the_results(tmp_path, monkeypatch):
    """The first screen: unreduced row first, the chosen methods after it, and whatever else was measured left out."""
    tables = script("readme_table")
    journal = record.Journal(tmp_path / "bench.jsonl")
    passport = record.Passport(
        what="w", against="a", model="m", data="d", n=10, repeats=3, spread="s", batch=1, device="cpu", dtype="float32",
        threads=1, execution="packed", seed=0, hardware="h", versions={"torch": "2"}, commit="c", when="2026-01-01",
    )  # fmt: skip
    hits = stats.pack_hits(np.arange(10) > 0)
    for method in ("evit:keep=0.7", "unreduced", "random:keep=0.7", "tome:r=13"):
        rate, ratio = Interval(0.9, 0.8, 1.0), Interval(1.5, 1.4, 1.6)
        cost = record.Cost(ceiling=1.6)
        journal.add(record.Row(method, method, passport, n=10, hits=hits, accuracy=rate, speedup=ratio, cost=cost))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = [line for line in tables.bench(first_screen=True).splitlines() if line.startswith("|")][2:]
    assert [line.split("|")[1].strip(" ≈") for line in lines] == ["unreduced", "`tome:r=13`", "`evit:keep=0.7`"]
    assert all("90.0" in line and "1.50" in line for line in lines)
    assert tables.small("memory", tables.MEMORY) == tables.UNMEASURED
