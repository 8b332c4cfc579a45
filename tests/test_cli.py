"""The command line, on a tiny model and pictures on disk: what it prints, what it writes, how it complains."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

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
    monkeypatch.setattr("fewer.cli._load", lambda name: (net.eval(), lambda *_, **__: {"input_ids": words}))
    monkeypatch.setattr("fewer.cli.out.width", 80, raising=False)
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
