"""The command line, on a tiny model and pictures on disk: what it prints, what it writes, how it complains."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import fewer
from fewer.cli import app
from fewer.models.zoo import Processor
from fewer.testing.models import tiny_vit


def fewer_cli(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of seven classes in a folder, deep enough for every method's default layers."""
    folder = tmp_path_factory.mktemp("model")
    tiny_vit(depth=10).save_pretrained(folder)  # type: ignore[operator]
    Processor((32, 32), (0.5,) * 3, (0.5,) * 3).save(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of each of seven classes."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for label in "abcdefg":
        (folder / label).mkdir()
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (40, 32, 3), np.uint8)).save(folder / label / f"{i}.png")
    return folder


def complaint(result: Result) -> str:
    """The one line of a known error: exit code 2, no traceback."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error ")
    return line


def test_help_needs_no_torch() -> None:
    code = "import sys, fewer.cli; print({'torch', 'transformers', 'numpy', 'PIL', 'matplotlib'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
    shown = fewer_cli("--help")
    assert shown.exit_code == 0
    for command in ("bench", "list", "show", "viz", "doctor", "train"):
        assert command in shown.stdout


def test_list_has_every_method() -> None:
    shown = fewer_cli("list")
    assert shown.exit_code == 0
    for name, cls in fewer.registered().items():
        assert f"{name} " in shown.stdout
        assert cls.card.paper in shown.stdout


@pytest.mark.parametrize("name", sorted(fewer.names()))
def test_show_knows_every_parameter(name: str) -> None:
    shown = fewer_cli("show", name)
    assert shown.exit_code == 0, shown.output
    cls = fewer.lookup(name)
    for field in fields(cls):  # type: ignore[arg-type]
        assert f"\n{field.name} " in shown.stdout
    assert cls.card.paper in shown.stdout
    assert f"fewer.apply(model, '{name}')" in shown.stdout


def test_show_says_what_a_parameter_is_and_its_default() -> None:
    lines = fewer_cli("show", "tome:r=16").stdout.splitlines()
    assert any(line.startswith("budget") and "r=8, inflect=0" in line and "tokens per block" in line for line in lines)
    assert any(line.startswith("blocks") and "every" in line for line in lines)
    assert lines[-1] == "session = fewer.apply(model, 'tome:r=16')"


def test_bench_measures_writes_and_resumes(model: Path, data: Path, tmp_path: Path) -> None:
    words = ("bench", "--model", model, "--data", data, "--methods", "tome:r=2;random", "--repeats", 2, "--batch", 7,
             "--out", tmp_path / "run")  # fmt: skip
    shown = fewer_cli(*words)
    assert shown.exit_code == 0, shown.output
    for said in ("unreduced", "tome:r=2", "random", "speed-up", "ceiling", "peak", "14 images"):
        assert said in shown.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["unreduced", "tome:r=2", "random"]
    assert [row["error"] for row in rows] == ["", "", ""]
    assert all((tmp_path / "run" / row["picture"]).is_file() for row in rows[1:])
    assert (tmp_path / "run" / "report.html").read_text().count("data:image/png") == 2
    again = fewer_cli(*words)
    assert again.stderr.count("measured before") == 3
    assert len((tmp_path / "run" / "results.jsonl").read_text().splitlines()) == 3


def test_viz_draws_a_png(model: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "x.png"
    shown = fewer_cli("viz", data / "a" / "0.png", "--method", "tome:r=2", "--model", model, "--out", file)
    assert shown.exit_code == 0, shown.output
    assert "tokens 17 ->" in shown.stdout
    with Image.open(file) as drawn:
        assert drawn.format == "PNG"
        assert drawn.width > 5 * 280
    packaged = fewer_cli("viz", "embedded:3", "--method", "tome:r=2;evit:keep=0.5", "--model", model, "--out", file)
    assert packaged.exit_code == 0, packaged.output


def test_doctor_says_what_it_found(model: Path) -> None:
    shown = fewer_cli("doctor", model)
    assert shown.exit_code == 0, shown.output
    for said in ("10 x ViTLayer", "4 heads x 8 channels", "4 x 4 patches", "output equal to the bit"):
        assert said in shown.stdout
    assert sum(line.split()[-1] == "verified" for line in shown.stdout.splitlines()) == 4


def test_doctor_says_why_a_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    net = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    words = torch.arange(12)[None]
    monkeypatch.setattr("fewer.cli.doctor.load", lambda name: (net.eval(), lambda *_, **__: {"input_ids": words}))
    monkeypatch.setattr("fewer.cli.output.out.width", 80, raising=False)
    said = " ".join(fewer_cli("doctor", "net").stdout.split())
    assert "between attention and MLP refused: attention and MLP run side by side in its blocks" in said
    assert "the KV cache verified" in said
    assert "output equal to the bit" in said


def test_complaints(model: Path, data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    empty = tmp_path / "empty"
    empty.mkdir()
    bench = ("bench", "--model", model, "--data", data, "--out", tmp_path / "run")
    assert "did you mean tome" in complaint(fewer_cli("show", "tomee"))
    assert "has no parameter 'q'" in complaint(fewer_cli("show", "tome:q=1"))
    assert "outside (0, 1]" in complaint(fewer_cli(*bench, "--methods", "evit:keep=1.5"))
    assert "execution='loose'" in complaint(fewer_cli(*bench, "--execution", "loose"))
    assert "no CUDA device" in complaint(fewer_cli(*bench, "--device", "cuda:7")) or torch.cuda.is_available()
    assert "no data set 'nowhere'" in complaint(fewer_cli("bench", "--model", model, "--data", "nowhere"))
    assert "no model 'nowhere'" in complaint(fewer_cli("doctor", "nowhere"))
    assert "not a readable image" in complaint(fewer_cli("viz", bad, "--method", "tome", "--model", model))
    assert "no image" in complaint(fewer_cli("viz", tmp_path / "none.png", "--method", "tome", "--model", model))
    assert "images 0 to 1999" in complaint(fewer_cli("viz", "embedded:2000", "--method", "tome", "--model", model))
    assert "no field 'stepz'" in complaint(fewer_cli("train", "dynamicvit", "--set", "stepz=3"))
    assert "write it as name=value" in complaint(fewer_cli("train", "vit-fashion", "--set", "epochs"))
    assert "no subfolder has a picture" in complaint(fewer_cli("bench", "--model", model, "--data", empty))
    assert "dtype='int64': give float32" in complaint(fewer_cli(*bench, "--dtype", "int64"))
    assert "device='blah': give cpu" in complaint(fewer_cli(*bench, "--device", "blah"))
    assert "embedded:-1: embedded has images 0" in complaint(fewer_cli("viz", "embedded:-1", "--method", "tome"))
    assert "embedded:²: embedded has images 0" in complaint(fewer_cli("viz", "embedded:²", "--method", "tome"))
    assert "--steps does not apply: " in complaint(fewer_cli(*bench, "--steps", 3))
    named = fewer_cli("viz", "embedded:3", "--method", "tome", "--model", model, "--out", tmp_path / "a.xyz")
    assert "end it with .png" in complaint(named)


def no_model(name: str) -> tuple:
    raise AssertionError(f"{name} was loaded")


def test_an_output_that_cannot_be_is_noticed_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for command in ("bench", "viz", "distance"):
        monkeypatch.setattr(f"fewer.cli.{command}.load", no_model)
    inside = tmp_path / "file" / "x"
    assert "give another --out" in complaint(fewer_cli("bench", "--out", inside))
    assert "give another --out" in complaint(fewer_cli("viz", "embedded:3", "--method", "tome", "--out", inside))
    assert "is a folder" in complaint(fewer_cli("viz", "embedded:3", "--method", "tome", "--out", tmp_path / "folder"))
    assert "give another --out" in complaint(fewer_cli("probe", "distance", "--out", inside))
    assert isinstance(fewer_cli("bench", "--out", tmp_path / "new").exception, AssertionError)
    assert not list((tmp_path / "new").glob("*.jsonl"))


def test_a_picture_of_too_many_pixels_is_a_complaint(tmp_path: Path, model: Path) -> None:
    """50,000 x 50,000 pixels: its header is enough."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    made = [struct.pack(">I", len(b)) + t + b + struct.pack(">I", zlib.crc32(t + b)) for t, b in chunks]
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(made))
    said = complaint(fewer_cli("viz", tmp_path / "huge.png", "--method", "tome", "--model", model))
    assert "2500000000 pixels" in said
    assert "scale it down" in said


def test_an_interrupted_bench_says_how_to_go_on(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewer.evaluation import bench

    measured = bench._Bench.measured

    def interrupted(self: Any, row: Any, form: str, method: Any) -> Any:
        if form == "random":
            raise KeyboardInterrupt
        return measured(self, row, form, method)

    words = [str(w) for w in ("bench", "--model", model, "--data", data, "--methods", "tome:r=2; random",
                              "--repeats", 1, "--out", tmp_path / "a run")]  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(bench._Bench, "measured", interrupted)
        stopped = fewer_cli(*words)
    assert stopped.exit_code == 130
    assert "interrupted 2 of 3 settings are in" in stopped.stderr
    (line,) = (line for line in stopped.stderr.splitlines() if line.startswith("the same command"))
    assert shlex.split(line.partition(": ")[2]) == ["fewer", *words]
    gone_on = fewer_cli(*words)
    assert gone_on.exit_code == 0, gone_on.output
    assert gone_on.stderr.count("measured before") == 2


def test_unreadable_pictures_are_counted_in_output_and_report(model: Path, data: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(data, photos)
    (photos / "a" / "._a.jpg").write_bytes(b"Mac OS X")
    shown = fewer_cli("bench", "--model", model, "--data", photos, "--methods", "tome:r=2", "--repeats", 1, "--out",
                      tmp_path / "run")  # fmt: skip
    assert shown.exit_code == 0, shown.output
    told = "1 of 15 pictures could not be read and were left out: a/._a.jpg"
    assert told in shown.stdout
    assert told in shown.stderr
    assert told in (tmp_path / "run" / "report.html").read_text()
    assert "labels by order: class k" in shown.stdout  # the model's are called LABEL_0 and so on


def test_json_instead_of_tables(model: Path, data: Path, tmp_path: Path) -> None:
    listed = json.loads(fewer_cli("list", "--json").stdout)
    assert [card["name"] for card in listed] == list(fewer.names())
    told = json.loads(fewer_cli("show", "tome:r=16", "--json").stdout)
    assert (told["name"], told["paper"]) == ("tome", "arXiv:2210.09461")
    assert told["parameters"][0] | {"meaning": ""} == {"name": "budget", "default": "r=8, inflect=0", "meaning": ""}
    assert json.loads(fewer_cli("doctor", model, "--json").stdout)["grid"] == "4 x 4 patches"
    shown = fewer_cli("bench", "--model", model, "--data", data, "--methods", "tome:r=2", "--repeats", 1, "--json",
                      "--out", tmp_path)  # fmt: skip
    made = json.loads(shown.stdout)
    assert [row["method"] for row in made["rows"]] == ["unreduced", "tome:r=2"]
    assert made["files"] == [str(tmp_path / "results.jsonl"), str(tmp_path / "report.html")]
    assert made["verdict"]
    assert "Traceback" not in complaint(fewer_cli("show", "tomee", "--json"))


@pytest.mark.parametrize("words", [["-m", "fewer"], ["-m", "fewer.cli"]])
def test_the_version_and_the_module(words: list[str]) -> None:
    run = subprocess.run([sys.executable, *words, "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"fewer {fewer.__version__}"


def test_completion_can_be_had() -> None:
    assert "--install-completion" in fewer_cli("--help").stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_rows_can_be_told_apart_in_a_narrow_window(tmp_path: Path) -> None:
    """In a terminal of 80 columns: every name is whole, no line is longer, numbers that do not fit go on below."""
    import pty

    code = (
        "import sys; from rich.text import Text; from fewer.cli import output, app\n"
        "heads = [('method', '')] + [(f'number {i}', 'x') for i in range(20)]\n"
        "names = ['random:keep=0.5', 'random:keep=0.7', 'a:' + 'b' * 60]\n"
        "output.wide_grid(heads, [[Text(n), *(Text(f'{i}.25') for i in range(20))] for n in names])\n"
        "app(['list'])"
    )
    own, other = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
    run = subprocess.Popen([sys.executable, "-c", code], stdout=other, stderr=subprocess.DEVNULL, env=env)
    os.close(other)
    raw = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while found := os.read(own, 65536):
            raw += found
    run.wait()
    os.close(own)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", raw.decode()).splitlines()
    assert max(map(len, lines)) <= 80
    firsts = [line.split()[0] for line in lines if line[:1].strip()]
    assert set(fewer.names()) <= set(firsts)
    assert firsts.count("random:keep=0.5") == firsts.count("a:" + "b" * 60) >= 3
    assert {f"{i}.25" for i in range(20)} <= set(" ".join(lines).split())


def test_what_terminals_would_obey_is_made_visible() -> None:
    from fewer.cli.output import clean, shown

    assert clean("a\x1b]0;title\x07b") == "a\ufffd]0;title\ufffdb"
    assert shown("[red]:smile:[/]") == r"\[red]:smile:\[/]"


def test_an_unsupported_model_is_named(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])).save_pretrained(tmp_path)
    Processor((32, 32), (0.5,) * 3, (0.5,) * 3).save(tmp_path)
    said = complaint(fewer_cli("doctor", tmp_path))
    assert "ResNetModel is not a model fewer knows" in said
    assert "fewer doctor" in said


def test_the_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWER_TRACEBACK", "1")
    assert isinstance(fewer_cli("show", "tomee").exception, fewer.UnknownMethod)


def test_errors_nobody_foresaw_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict:
        raise AttributeError("a bug")

    monkeypatch.setattr("fewer.registry.registered", broken)
    monkeypatch.setattr(fewer, "registered", broken, raising=False)
    assert isinstance(fewer_cli("list").exception, AttributeError)


def test_training_starts_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewer.recipes import classify

    asked: list[object] = []
    monkeypatch.setattr(classify, "train", lambda out, *, recipe, log: asked.append((out, recipe)))
    shown = fewer_cli("train", "vit-fashion", "--out", tmp_path, "--set", "epochs=0.5", "--set", "seed=3")
    assert shown.exit_code == 0, shown.output
    assert asked == [(tmp_path, classify.Recipe(epochs=0.5, seed=3))]
