"""The marker `newest`: which tests `make test-newest` and `make test-oldest` run. The list stands in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("newest", "files, folders or test ids that run on the newest and the oldest releases", "linelist")


def pytest_configure(config: pytest.Config) -> None:
    """Entries exist; and where only they are asked for, nothing else is collected."""
    entries = config.getini("newest")
    missing = [each for each in entries if not Path(config.rootpath, each.partition("::")[0]).exists()]
    if missing or not entries:
        raise pytest.UsageError(f"`newest` of pyproject.toml: not there: {', '.join(missing) or 'a single test'}")
    if config.option.markexpr == "newest" and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(Path(config.rootpath, each)) for each in entries]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    entries = tuple(config.getini("newest"))
    for item in items:
        name = item.nodeid
        if any(name == each or name.startswith((f"{each}::", f"{each}/", f"{each}[")) for each in entries):
            item.add_marker("newest")
