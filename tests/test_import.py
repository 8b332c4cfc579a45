"""What importing does, and what the floors may import: allow-lists, beside the deny-lists that `make lint` checks."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import fewer
from fewer import _moved

ROOT = Path(fewer.__file__).parent


def python(code: str) -> str:
    """What a fresh interpreter prints when it runs this code with the package on its path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that a statement adds to an interpreter that has already imported torch."""
    code = (
        f"import json, sys, torch; before = set(sys.modules); {statement}; "
        "print(json.dumps(sorted({m.partition('.')[0] for m in set(sys.modules) - before})))"
    )
    return set(json.loads(python(code)))


def test_import_stays_light():
    added = loaded_by("import fewer")
    assert "fewer" in added
    assert not added & {"transformers", "timm", "diffusers", "torchvision", "matplotlib", "typer", "rich", "PIL"}


def test_listing_methods_imports_none_of_them():
    code = "import sys, fewer; fewer.names(); print([m for m in sys.modules if m.startswith('fewer.methods.')])"
    assert python(code) == "[]"


def test_importing_changes_no_global_table():
    """Before a session is on, nothing of ours stands in the attention tables, even with all methods imported."""
    code = (
        "from transformers.masking_utils import AttentionMaskInterface as M; "
        "from transformers.modeling_utils import AttentionInterface as A; "
        "before = dict(A._global_mapping), dict(M._global_mapping); import fewer; fewer.registered(); "
        "print((A._global_mapping, M._global_mapping) == before)"
    )
    assert python(code) == "True"


def test_every_public_name_is_there():
    for name in fewer.__all__:
        assert getattr(fewer, name) is not None
    for cls in fewer.registered().values():
        assert getattr(fewer, cls.__name__) is cls
    with pytest.raises(AttributeError, match="NoSuchThing"):
        _ = fewer.NoSuchThing


@pytest.mark.parametrize(("old", "new"), _moved.MOVED.items())
def test_the_old_name_of_a_module_warns_and_is_the_new_one(old: str, new: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, f"fewer.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=rf"fewer\.{old} is now fewer\.{new}; the old name goes"):
        assert import_module(f"fewer.{old}") is import_module(f"fewer.{new}")


def imported(path: Path) -> set[str]:
    """The absolute module names a file imports, at any depth of its code."""
    package = ["fewer", *path.relative_to(ROOT).parent.parts]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names.add(".".join([*base, *filter(None, [node.module])]))
    return names


def strangers(names: set[str], allowed: tuple[str, ...]) -> set[str]:
    """Imported modules that are neither the standard library's nor allowed."""
    third = {n for n in names if n.partition(".")[0] not in sys.stdlib_module_names}
    return {n for n in third if not any(n == a or n.startswith(a + ".") for a in allowed)}


@pytest.mark.parametrize("path", sorted((ROOT / "core").rglob("*.py")), ids=lambda p: p.name)
def test_core_imports_torch_and_itself(path):
    assert not strangers(imported(path), ("torch", "fewer.core"))


@pytest.mark.parametrize("path", sorted((ROOT / "methods").rglob("*.py")), ids=lambda p: p.name)
def test_methods_import_torch_and_core(path):
    assert not strangers(imported(path), ("torch", "fewer.core"))


def test_a_stranger_is_seen():
    """The two tests above can fail."""
    assert "fewer.core" in imported(ROOT / "methods" / "vision" / "tome.py")
    assert "fewer.core.place" in imported(ROOT / "core" / "reducer.py")
    assert strangers({"torch.nn", "fewer.core.plan", "fewer.hosts.base", "numpy"}, ("torch", "fewer.core")) == {
        "fewer.hosts.base",
        "numpy",
    }
