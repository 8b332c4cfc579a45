"""One contract for every method on videos, and for those on images, on every kind of video host."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

import fewer
from fewer.core import Reducer
from fewer.testing import CHECKS, Check, TinyHost, fitted, video_hosts

FORMS = {
    "stts-windows": "stts:by=windows", "vtm-centre": "vtm:targets=centre", "vtm-motion": "vtm:targets=motion",
    "vtm-learned": "vtm:targets=learned", "testa-halves": "testa:order=halves,vote=least",
    "storm-space": "storm:over=space",
    "storm-skip": "storm:over=skip", "evad-weighted": "evad:weight=4", "rlt-share": "rlt:keep=0.5",
}  # fmt: skip
IMAGES = ("random", "grid", "tome", "evit", "pool", "dynamicvit", "tokenlearner")


HEAD = "V-JEPA 2's classifier attends to every final row and takes no mask, so that masked rows are seen by it"
COPIES = "rows that gave way are copies of one another in the next block, and rounding decides between copies"
SOFT = (
    "tokenlearner",
    "testa",
    "testa-halves",
    "rlt",
    "vidtome",
)  # nothing to mask: rows are mixed, or noise has no still patch


def marks(name: str, method: Reducer, host: TinyHost, check: Check) -> list[Any]:
    why = method.card.exempt.get(check.__name__)
    if name == "vidtome" and check.__name__ == "masked_equals_gathered" and host.kind != "vjepa2":
        why = COPIES
    if host.kind == "vjepa2" and check.__name__ == "masked_equals_gathered" and name not in SOFT:
        why = HEAD
    return [pytest.mark.xfail(reason=why, strict=True)] if why else []


def methods() -> Iterator[tuple[str, Reducer]]:
    for name, cls in fewer.registered().items():
        if cls.card.on == "video":
            yield name, fitted(cls)
    for name, form in FORMS.items():
        yield name, fitted(fewer.parse(form))


def cases() -> Iterator[Any]:
    forms = [*methods(), *((name, fitted(fewer.parse(name))) for name in IMAGES)]
    for (name, method), host, check in product(forms, video_hosts(), CHECKS):
        if method.needs_cls and not host.found.has_cls:
            continue
        if host.kind == "vjepa2" and name == "rlt":
            continue  # clips keep numbers of rows of their own: refused, see tests/hosts/test_fillers.py
        if name == "tokenlearner" and check.__name__ == "budget_is_met":
            continue  # its budget counts the summaries of each frame; tests/methods/test_video.py says how many
        yield pytest.param(
            check, method, host, marks=marks(name, method, host, check), id=f"{check.__name__}-{name}-{host.kind}"
        )


@pytest.mark.parametrize(("check", "method", "host"), list(cases()))
def test_contract_on_videos(check: Check, method: Reducer, host: TinyHost) -> None:
    check(method, host)
