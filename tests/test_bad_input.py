"""Bad input: every line has a clear error or a defined result, and the model is left as it was.

Also in test_session.py: a batch of zero, features that are not numbers, exceptions inside forward, two threads, a
request too large. In test_spec.py: text forms. In test_data.py: images that cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fewer
from fewer.core import BudgetError, Capacity, KeepRatio, Mass, PlanError, Remove, Threshold
from fewer.hosts import HostError
from fewer.runtime.modules import ModulesError
from fewer.testing.checks import same_snapshot, snapshot
from vit import images, run, tiny_vit


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Remove(-1), r"r=-1: r counts tokens that go, whole numbers from 0 up"),
        (lambda: Remove(1.5), r"r=1.5: "),
        (lambda: Remove((8, -1)), r"r=\(8, -1\): "),
        (lambda: Remove(float("inf")), r"r=inf: "),
        (lambda: Remove(()), r"r=\(\): "),
        (lambda: Remove(8, inflect=1.5), r"inflect=1.5 is outside \[-1, 1\]"),
        (lambda: KeepRatio(0.0), r"keep=0.0 is outside \(0, 1\]; keep is the share of tokens that stays"),
        (lambda: KeepRatio(1.01), r"keep=1.01 is outside \(0, 1\]"),
        (lambda: KeepRatio((0.7, -0.1)), r"keep=-0.1 is outside \(0, 1\]"),
        (lambda: KeepRatio(float("nan")), r"keep=nan is outside \(0, 1\]"),
        (lambda: KeepRatio(()), r"keep names no share"),
        (lambda: KeepRatio(0.7, of="first"), r"of=first: keep is a share of the tokens at the start or of the current"),
        (lambda: KeepRatio(0.7, rounding="up"), r"rounding=up: choose floor, ceil, round"),
        (lambda: Capacity(0), r"tokens=0: tokens counts what stays, whole numbers from 1 up"),
        (lambda: Capacity((3, 2.5)), r"tokens=\(3, 2.5\): "),
        (lambda: Mass(0), r"mass=0 is outside \(0, 1\]"),
        (lambda: Mass(1.5), r"mass=1.5 is outside \(0, 1\]"),
        (lambda: Threshold(float("nan")), r"threshold=nan: "),
        (lambda: fewer.parse("evit:keep=0"), r"keep=0 is outside \(0, 1\]"),
        (lambda: fewer.parse("tome", r=-3), r"r=-3: "),
    ],
)
def test_a_budget_outside_its_range(make: Callable[[], object], message: str) -> None:
    with pytest.raises(BudgetError, match=message) as error:
        make()
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    "form",
    [
        "tps:scorer=magic", "tps:tau=0", "atc:linkage=ward", "kmedoids:iterations=0", "radial:norm=l7", "ppt:tau=-1",
        "dpc_knn:neighbours=0", "token_transforming:beta=-1", "diffrate:granularity=0", "tokenlearner:version=2.0",
    ],
)  # fmt: skip
def test_a_methods_own_parameter_outside_its_range(form: str) -> None:
    name, _, value = form.partition("=")
    with pytest.raises(ValueError, match=rf"{name.partition(':')[2]}='?{value}"):
        fewer.parse(form)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ((("tomme",), {}), fewer.UnknownMethod, "did you mean tome"),
        ((("tome",), {"radius": 3}), fewer.SpecError, "tome has no parameter 'radius'"),
        ((("evit",), {}), fewer.SessionError, r"acts at layers 3\+6\+9, .* 4 blocks \(0 to 3\); pass layers="),
        ((("evit:layers=-1",), {}), fewer.SessionError, r"acts at layers -1, but the model has 4 blocks"),
        ((("evit:layers=2+1",), {}), fewer.SessionError, r"layers=2\+1: name each block once, in ascending order"),
        ((("evit:layers=1+1",), {}), fewer.SessionError, r"name each block once"),
        (((["tome", "evit:layers=1"],), {"r": 3}), fewer.SessionError, "give parameters inside each method"),
        ((([],), {}), fewer.SessionError, "the list of methods is empty"),
        (((3,), {}), fewer.SpecError, "3 is no method"),
        ((("tome",), {"execution": "fast"}), fewer.SessionError, "execution='fast': choose padded, packed, masked"),
        ((("tome",), {"modules": "nowhere"}), ModulesError, "no trained modules to load"),
        ((("dynamicvit:layers=1",), {}), ModulesError, "needs trained modules"),
        ((("dynamicvit:layers=1",), {"modules": "/no/such"}), ModulesError, "no file, folder or packaged model"),
        ((("dynamicvit:layers=1",), {"modules": nn.Linear(2, 2)}), ModulesError, "give session.modules of a session"),
    ],
)  # fmt: skip
def test_apply_refuses_and_leaves_the_model_alone(call: Any, error: type[Exception], message: str) -> None:
    model = tiny_vit()
    plain, before = run(model, images()), snapshot(model)
    with pytest.raises(error, match=message):
        fewer.apply(model, *call[0], **call[1])
    same_snapshot(before, snapshot(model), "a refused method")
    assert torch.equal(run(model, images()), plain)


@pytest.mark.parametrize("model", [None, "google/vit-base-patch16-224", torch.ones(2)])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(HostError, match=r"is not a model but a .*; load it first"):
        fewer.apply(model, "tome")


def test_a_method_that_ranks_by_the_class_token_needs_one() -> None:
    model = tiny_vit("siglip")
    before = snapshot(model)
    with pytest.raises(fewer.SessionError, match=r"diffrate.* by the class token's attention, and SiglipVisionModel"):
        fewer.apply(model, "diffrate:tokens=5,layers=1")
    same_snapshot(before, snapshot(model), "a refused method")


@pytest.mark.parametrize("second", ["tome:r=3", "evit:layers=1"])
def test_a_second_session_on_one_model_is_refused_and_the_first_goes_on(second: str) -> None:
    model, x = tiny_vit(), images()
    plain = run(model, x)
    with fewer.apply(model, "tome:r=3") as session:
        reduced = run(model, x)
        with pytest.raises(
            fewer.SessionError, match=r"already has a session on .*call remove\(\) first, or give apply a list"
        ):
            fewer.apply(model, second)
        assert torch.equal(run(model, x), reduced)
        assert session.counts == [14, 11, 8, 5]
    assert torch.equal(run(model, x), plain)
    with fewer.apply(model, second):
        assert not torch.equal(run(model, x), plain)


def test_a_session_shows_nothing_before_the_first_pass() -> None:
    with fewer.apply(tiny_vit(), "tome:r=3") as session:
        for show in (lambda: session.counts, lambda: session.kept(0), lambda: session.origin, lambda: session.report()):
            with pytest.raises(fewer.SessionError, match="no forward pass yet: call the model first"):
                show()


def test_what_does_not_fit_the_last_pass() -> None:
    with fewer.apply(tiny_vit(), "tome:r=3") as session:
        run(session.model, images())
        with pytest.raises(PlanError, match="takes 8 tokens to 5; got 9"):
            session.restore(torch.zeros(2, 9, 3))
        with pytest.raises(IndexError):
            session.kept(4)
        assert torch.equal(session.kept(-1), session.kept(3))


def test_a_block_run_on_its_own_says_what_is_missing() -> None:
    model = tiny_vit()
    with (
        fewer.apply(model, "tome:r=3") as session,
        pytest.raises(
            fewer.SessionError, match="block 1 was called before block 0; run the model from its first block"
        ),
    ):
        session.host.blocks[1](torch.zeros(1, 17, 32))


def test_a_method_file_without_its_reducer_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewer import registry

    monkeypatch.setattr(registry, "names", lambda: {"hollow": "fewer.methods.vision"})
    with pytest.raises(fewer.UnknownMethod, match="declares no reducer named 'hollow': check its @reducer line"):
        registry.lookup("hollow")
