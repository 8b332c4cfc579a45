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
from fewer.hosts import HostError
from fewer.methods.vision.diffrate import Learned
from fewer.runtime.program import SessionError
from fewer.testing import CHECKS, FAULTS, Check, Fault, Honest, TinyHost, fitted, text_hosts, tiny_hosts

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


# On text: all that makes sense on one host of each kind, a few on the others. What is not here, and why: leap runs
# blocks on few rows and puts them back, so it leaves no trace; ltp keeps what its thresholds say at any budget; the
# policy of trbert learns from rewards, not from a gradient of the answer; dynamic_pooling and the learned counts of
# power_bert are models of their own. Their own tests hold them to what they promise.
ON_TEXT = {
    "bert": ["ends", "length_adaptive", "pyramid_bert", "power_bert:tokens=9+6,layers=0+1", "sdtp", "spatten"],
    "llama": ["lazyllm", "sdtp", "spatten", "agile_quant", "random", "cls_topk", "dynamicvit",
              "tome:proportional=false", "evit:fuse=false", "atc:proportional=false"],
    "mamba2": ["utrc"],
    "roberta": ["tome", "random"], "distilbert": ["tome", "evit"], "modernbert": ["tome", "evit", "random", "sdtp"],
    "qwen3": ["lazyllm"], "gemma3_text": ["lazyllm", "sdtp", "tome:proportional=false"],
    "gpt2": ["lazyllm", "random", "spatten"],
    "mamba": ["utrc"], "vilt": ["pumer", "random", "tome", "evit"],
}  # fmt: skip


def text_cases() -> Iterator[Any]:
    for host in text_hosts():
        chosen = {form: fitted(fewer.parse(form)) for form in ON_TEXT[host.kind]}
        if host.kind == "bert":
            chosen |= dict(methods())
        for (form, method), check in product(chosen.items(), CHECKS):
            why = method.card.exempt.get(check.__name__)
            marks = [pytest.mark.xfail(reason=why, strict=True)] if why else []
            yield pytest.param(check, method, host, marks=marks, id=f"{check.__name__}-{form}-{host.kind}")


@pytest.mark.parametrize(("check", "method", "host"), list(text_cases()))
def test_contract_on_text(check: Check, method: Reducer, host: TinyHost) -> None:
    check(method, host)


@pytest.mark.parametrize("kind", ["llama", "mamba2"])
@pytest.mark.parametrize("form", ["evit", "tokenlearner", "spvit"])
def test_rows_without_a_place_are_refused_in_a_causal_text(form: str, kind: str) -> None:
    with pytest.raises((HostError, SessionError), match="a causal text"):
        TinyHost(kind).run(fitted(fewer.parse(form)), TinyHost(kind).batch)


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
