"""What every test gets: one thread, no model hub, a fixed seed, and reasons where something is left out."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "fewer",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("FEWER_EXAMPLES", 50)),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # machines are shared
)
hypothesis.settings.register_profile(
    "long", hypothesis.settings.get_profile("fewer"), derandomize=False, max_examples=2000, print_blob=True
)
hypothesis.settings.register_profile(
    "unshrunk", hypothesis.settings.get_profile("fewer"), phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
)
hypothesis.settings.load_profile("fewer")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Random numbers are the same in every test, whatever ran before it."""
    torch.manual_seed(0)


@cache
def _index_answers(folder: Path) -> bool:
    """Whether a package index answers: pip fetches a wheel of ten kilobytes, or it does not."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--retries", "0",
               "--timeout", "15", "--dest", str(folder), "iniconfig"]  # fmt: skip
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and there is none")
    if item.get_closest_marker("download"):
        folder = item.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        if not _index_answers(folder):
            pytest.skip("needs a download, and no package index answers")
