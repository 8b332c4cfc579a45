"""Write the tables of docs/tested-with.md from the lock and pyproject.toml; with --check, fail if they are stale."""

from __future__ import annotations

import argparse
import re
import sys
import tomllib

import lock

PAGE = lock.ROOT / "docs" / "tested-with.md"
WORKFLOW = lock.ROOT / ".github" / "workflows" / "ci.yml"
MARKS = re.compile(r"(<!-- (\w+): from lock/, by `make pages` -->\n).*?(<!-- end -->)", re.DOTALL)
ESSENTIAL = ("transformers", "timm", "numpy", "safetensors", "pillow")
WHEN = re.compile(r"python_full_version (<|>=) '([\d.]+)'$")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the tables are stale")
    check = parser.parse_args().check
    page = PAGE.read_text()
    fresh = MARKS.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n{m[3]}", page)
    if check and fresh != page:
        sys.exit(f"{PAGE.relative_to(lock.ROOT)} is stale: run `make pages`")
    if {m[2] for m in MARKS.finditer(page)} != set(TABLES):
        sys.exit(f"{PAGE.relative_to(lock.ROOT)} lacks a place for a table, of: {', '.join(TABLES)}")
    if not check:
        PAGE.write_text(fresh)


def bounds() -> dict[str, str]:
    """Name to lower bound, of what pyproject.toml asks for."""
    project = tomllib.loads((lock.ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    return {m[1].lower(): m[2] for line in asked if (m := re.match(r"([\w-]+)>=([\w.]+)", line))}


def written(pins: list[tuple[str, str]]) -> str:
    """Versions, with the Python each is for where there are several."""
    out = []
    for version, marker in pins:
        when = WHEN.match(marker) if len(pins) > 1 else None
        out.append(version + (f" (Python {'below' if when[1] == '<' else 'from'} {when[2]})" if when else ""))
    return ", ".join(out)


def essential() -> str:
    """Python, torch, and the libraries that decide whether fewer fits a model."""
    oldest, newest = lock.locked("oldest"), lock.everything()
    pythons = re.search(r"^ +python: \[(.+)\]", WORKFLOW.read_text(), re.MULTILINE)
    assert pythons, "the workflow names no Pythons"
    torch = lock.TORCH.partition("==")[2]
    rows = [["Python", "3.11", pythons[1].replace('"', "")], ["torch", torch, torch]]
    rows += [[name, written(oldest[name]), written(newest[name])] for name in ESSENTIAL]
    return table(["", "oldest", "locked"], rows)


def others() -> str:
    """All else that pyproject.toml names and that is installed here."""
    oldest, newest = lock.locked("oldest"), lock.everything()
    names = sorted(name for name in bounds() if name in newest and name not in ESSENTIAL)
    rows = [[name, written(oldest[name]) if name in oldest else "–", written(newest[name])] for name in names]
    return table(["", "oldest", "locked"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES = {"essential": essential, "others": others}

if __name__ == "__main__":
    main()
