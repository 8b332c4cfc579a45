"""The lock: what `make` installs, to the version and the hash, in lock/*.txt.

    make lock                  follow pyproject.toml; versions that are locked already stay
    make lock L=--upgrade      the newest release of everything
    python scripts/lock.py --differences    how this environment differs from the lock
    python scripts/lock.py --check          fail where it differs, or where pyproject.toml asks for what is not locked

One file for each step in which the environment grows; each holds what the ones before it do not. They hold for every
Python from 3.11 on and every platform, by markers; oldest.txt is the other end, the lower bounds of pyproject.toml.
torch is left out, with all that comes only with it: its builds for CPUs and for each kind of GPU differ, so no hash can
hold for all. What else torch needs is in. Only making the lock needs uv; installing from it needs pip and nothing else.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "lock"
STEPS = {"base": ["report"], "dev": ["assets", "test", "lint", "timm"], "docs": ["docs"]}
"""File to the extras that it adds, in the order of installing."""
OLDEST = ["report", "assets", "test", "timm"]
"""Extras in lock/oldest.txt: the lower bounds of pyproject.toml, for `make test-oldest`, on Linux and Python 3.11."""
TORCH = re.findall(r"^TORCH +\?= (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[0]
ALONE = re.compile(r"(torch|torchvision|torchaudio|triton|pytorch-triton.*|nvidia-.*|cuda-.*)$")
"""Names that are never locked: their files differ from machine to machine."""
NEVER = 'torchvision ; python_version < "3"\ntorchaudio ; python_version < "3"\n'
"""timm asks for torchvision and works without it here; it has no CPU build among the ordinary releases."""
HEADER = "# Made by `make lock` from pyproject.toml; scripts/lock.py says how. torch is installed apart.\n"
PINNED = re.compile(r"([a-z0-9-]+)==(\S+)(?: ; (.+?))?(?: \\)?$")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--differences", action="store_true", help="print what differs in this environment")
    parser.add_argument("--check", action="store_true", help="fail if something differs, or is not locked")
    given, rest = parser.parse_known_args()
    if given.differences or given.check:
        if rest:
            parser.error(f"unknown: {' '.join(rest)}")
        found = differences() + (missing() if given.check else [])
        print("\n".join(found) or "nothing differs from the lock")
        sys.exit(1 if given.check and found else 0)
    make(rest)


def make(options: list[str]) -> None:
    """Write the files. options: uv's, such as --upgrade."""
    LOCK.mkdir(exist_ok=True)
    before = "".join((LOCK / f"{step}.txt").read_text() for step in STEPS if (LOCK / f"{step}.txt").exists())
    extras = [extra for step in STEPS.values() for extra in step]
    universal = ["--universal", "--python-version", "3.11"]
    whole = blocks(resolve([*universal, *options], extras, f"{TORCH}\n", before))  # all steps fit together
    together = "\n".join(text.splitlines()[0].removesuffix(" \\") for text in whole)
    seen: set[str] = set()
    extras = []
    for step, added in STEPS.items():
        extras += added
        ours = blocks(resolve(universal, extras, together, ""))
        write(step, [text for text in ours if text not in seen])
        seen |= set(ours)
    lowest = ["--resolution", "lowest-direct", "--python-version", "3.11", "--python-platform", "linux"]
    write("oldest", blocks(resolve(lowest, OLDEST, f"{TORCH}\n", "")))


def resolve(options: list[str], extras: list[str], constraints: str, before: str) -> str:
    """What uv answers for the dependencies, the extras and what it takes to build fewer in place."""
    backend = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"] + ["editables>=0.5"]
    with tempfile.TemporaryDirectory() as folder:
        files = {"never": NEVER, "constraints": constraints, "out": before, "backend": "\n".join(backend)}
        paths = {name: Path(folder, f"{name}.txt") for name in files}
        for name, text in files.items():
            paths[name].write_text(text)
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config", "--no-header",
                   "--no-annotate", "--generate-hashes", f"--override={paths['never']}",
                   f"--constraint={paths['constraints']}", *(f"--extra={extra}" for extra in extras), *options,
                   f"--output-file={paths['out']}", str(ROOT / "pyproject.toml"), str(paths["backend"])]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return paths["out"].read_text()


def blocks(text: str) -> list[str]:
    """Requirements with their hashes, one text each, without what is never locked."""
    found = re.findall(r"^[a-z0-9].*(?:\n    --hash.*)*\n", text, re.MULTILINE)
    return [each for each in found if not ALONE.match(each.partition("==")[0])]


def write(step: str, found: list[str]) -> None:
    path = LOCK / f"{step}.txt"
    path.write_text(HEADER + "".join(found))
    print(f"{path.relative_to(ROOT)}: {len(found)} requirements")


def locked(step: str) -> dict[str, list[tuple[str, str]]]:
    """Name to versions in one file, each with its marker, empty where there is none."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in (LOCK / f"{step}.txt").read_text().splitlines():
        if match := PINNED.match(line):
            found.setdefault(match[1], []).append((match[2], match[3] or ""))
    return found


def everything() -> dict[str, list[tuple[str, str]]]:
    """What `locked` says, for all steps together."""
    return {name: pins for step in STEPS for name, pins in locked(step).items()}


def missing() -> list[str]:
    """What pyproject.toml asks for and the lock does not have: `make lock` was forgotten."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + [line for step in STEPS.values() for extra in step for line in extras[extra]]
    out = []
    for wanted in map(Requirement, asked):
        pins = [version for version, _ in everything().get(wanted.name.lower(), [])]
        if wanted.name not in ("torch", project["name"]) and not (pins and all(map(wanted.specifier.contains, pins))):
            out.append(f"{wanted} is asked for, locked is {' '.join(pins) or 'nothing'}: run `make lock`")
    return out


def differences() -> list[str]:
    """`name locked -> installed`, for what is installed here in another version than is locked for this Python."""
    from packaging.markers import Marker

    out = []
    for name, pins in sorted(everything().items()):
        here = [version for version, marker in pins if not marker or Marker(marker).evaluate()]
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if here and installed not in here:
            out.append(f"{name} {' '.join(here)} -> {installed}")
    return out


if __name__ == "__main__":
    main()
