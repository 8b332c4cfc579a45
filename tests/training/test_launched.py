"""Two processes under `accelerate launch` train as one does, with as many texts in a step."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def launched(task: str, folder: Path, processes: int) -> None:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
             "--num_processes", str(processes),
             "--main_process_port", str(port),
             "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    if processes == 1:  # several on a CPU are started by --multi_gpu where no GPU is seen: --cpu alone starts one
        start = []
    alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    paths = os.pathsep.join([str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *start, str(HERE / "launched.py"), task, str(folder)],
        env=os.environ | alone | {"PYTHONPATH": paths},
        capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]


def both(task: str, folder: Path, file: str) -> tuple[Any, Any]:
    for processes in (1, 2):
        launched(task, folder / str(processes), processes)
    one, two = ((folder / str(processes) / file).read_text() for processes in (1, 2))
    return one, two


@pytest.mark.parametrize("method", ["rho1:keep=0.6", "upft:tokens=4,whole=0"])
def test_the_same_tokens_teach(method: str, tmp_path: Path) -> None:
    """Of four texts on one process, and of two on each of two; the loss is over the tokens of all parts of a step."""
    one, two = map(json.loads, both(method, tmp_path, "losses.json"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["losses"]) == 4
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-4)
    assert len({round(loss, 3) for loss in one["losses"]}) > 1  # it learned


def test_a_recipe_runs_on_two_processes(tmp_path: Path) -> None:
    one, two = both("recipe", tmp_path, "out/log.jsonl")
    assert [len(list((tmp_path / str(n)).glob("process-*"))) for n in (1, 2)] == [1, 2]
    rows = [[json.loads(line) for line in log.splitlines()] for log in (one, two)]
    assert [row["step"] for row in rows[1]] == [25, 50]
    for a, b in zip(*rows, strict=True):
        assert {k: v for k, v in b.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in a.items() if k != "seconds"}, abs=1e-5
        )
    assert rows[0][0]["loss"] != rows[0][1]["loss"]
    reports = [json.loads((tmp_path / str(n) / "out" / "report.json").read_text())["report"] for n in (1, 2)]
    assert reports[0]["scores"]["unreduced"]["accuracy"] == reports[1]["scores"]["unreduced"]["accuracy"]
    assert not (tmp_path / "2" / "out" / "state").exists()
    assert len(list((tmp_path / "2" / "out").glob("*.safetensors"))) >= 1
