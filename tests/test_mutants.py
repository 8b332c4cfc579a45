"""The faults that scripts/mutants.py plants can all be planted, and it tells what is caught from what is not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts/mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["mutants"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_fault_is_stale(mutants: ModuleType) -> None:
    assert [why for fault in mutants.FAULTS if (why := mutants.stale(fault))] == []


def test_every_fault_is_there_once_changes_something_and_names_tests(mutants: ModuleType) -> None:
    assert len(mutants.FAULTS) >= 45
    assert len({(fault.file, fault.old, fault.new) for fault in mutants.FAULTS}) == len(mutants.FAULTS)
    for fault in mutants.FAULTS:
        assert fault.old != fault.new, fault.why
        assert fault.tests, fault.why
        for path in fault.tests.split():
            assert (ROOT / path.split("::")[0]).exists(), f"{path} ({fault.why})"


def test_text_that_has_gone_is_stale(mutants: ModuleType) -> None:
    fault = mutants.FAULTS[0]
    assert "0 times" in mutants.stale(fault._replace(old="no such text stands anywhere"))
    assert "0 times" in mutants.stale(fault._replace(file="core/no_such_file.py"))
    assert "not once" in mutants.stale(fault._replace(old="import"))


@pytest.mark.parametrize(
    ("new", "what"), [("    return x\n", "caught"), ("    return round(x, 9) + 0.0\n", "SURVIVED")]
)
def test_a_fault_is_caught_by_a_test_that_passes_without_it(mutants: ModuleType, new: str, what: str) -> None:
    name = "tests/core/test_budgets.py::test_noise_in_a_product_takes_no_token"
    fault = mutants.Fault("core/budgets.py", "    return round(x, 9)\n", new, "", name)
    before = (ROOT / "src/fewer/core/budgets.py").read_text()
    ((_, got, by),) = mutants.run([fault], 1, 300)
    assert (got, by) == (what, name if what == "caught" else "")
    assert (ROOT / "src/fewer/core/budgets.py").read_text() == before, "the tree itself is never touched"
