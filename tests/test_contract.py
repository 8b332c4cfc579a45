"""One contract for every method on every host it can run on; what the checks are is in fewer.testing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

import fewer
import tvstub  # noqa: F401  (puts timm's hosts on the list)
from fewer.core import Reducer
from fewer.methods.vision.diffrate import Learned
from fewer.testing import CHECKS, FAULTS, Check, Fault, Honest, TinyHost, fitted, tiny_hosts

# Methods with more than one form: each is held to the contract too.
FORMS = {
    "tps-dynamicvit": "tps:scorer=dynamicvit", "evit-prune": "evit:fuse=false", "ppt-pools": "ppt:tau=1e9",
    "atc-complete": "atc:linkage=complete", "evit-mass": "evit:mass=0.7", "cls_topk-mass": "cls_topk:mass=0.7",
}  # fmt: skip


def methods() -> Iterator[tuple[str, Reducer]]:
    for name, cls in fewer.registered().items():
        if cls.card.on == "vision":
            yield name, fitted(cls)
    for name, form in FORMS.items():
        yield name, fitted(fewer.parse(form))


def hosts_for(method: Reducer) -> list[TinyHost]:
    return [host for host in tiny_hosts() if host.found.has_cls or not method.needs_cls]


def cases() -> Iterator[Any]:
    for name, method in methods():
        for host, check in product(hosts_for(method), CHECKS):
            why = method.card.exempt.get(check.__name__)  # declared in the method's file, never here
            marks = [pytest.mark.xfail(reason=why, strict=True)] if why else []
            yield pytest.param(check, method, host, marks=marks, id=f"{check.__name__}-{name}-{host.kind}")


@pytest.mark.parametrize(("check", "method", "host"), list(cases()))
def test_contract(check: Check, method: Reducer, host: TinyHost) -> None:
    check(method, host)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_the_honest_method_passes(check: Check) -> None:
    check(Honest(), TinyHost("vit"))


@pytest.mark.parametrize(
    ("check", "fault"),
    [pytest.param(c, f, id=f"{c.__name__}-{i}") for c in CHECKS for i, f in enumerate(FAULTS[c])],
)
def test_check_catches_its_fault(check: Check, fault: Fault) -> None:
    with pytest.raises(AssertionError):
        check(fault.method, fault.host)


def test_every_exemption_names_a_check() -> None:
    known = {check.__name__ for check in CHECKS}
    for name, cls in fewer.registered().items():
        assert set(cls.card.exempt) <= known, name
        assert all(cls.card.exempt.values()), f"{name}: an exemption needs a reason"


# Forms that cannot take every check by what they are: the checks they can take, and why not the others.
PARTLY = {
    "tokenlearner-1.0": (
        fitted(fewer.parse("tokenlearner:version=1.0")),
        {"padding_changes_nothing": "it convolves over the full patch grid, so ragged input is refused"},
    ),
    "diffrate-learned": (
        replace(fewer.lookup("diffrate")(budget=Learned(), layers=(1, 2))),  # type: ignore[call-arg]
        {
            "keep_all_is_identity": "how many stay is learned", "budget_is_met": "how many stay is learned",
            "gradients_reach": "fresh counts drop nothing, so no mask carries their gradient",
            "padding_changes_nothing": "one count holds for all samples, so ragged input is refused",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("form", PARTLY)
def test_contract_of_special_forms(form: str, check: Check) -> None:
    method, exempt = PARTLY[form]
    if check.__name__ in exempt:
        with pytest.raises((AssertionError, TypeError, ValueError)):
            check(method, TinyHost("vit"))
    else:
        check(method, TinyHost("vit"))
