"""Trained modules: built, found, loaded, saved, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewer
from fewer.runtime import modules as trained
from fewer.runtime.modules import ModulesError
from vit import images, run, tiny_vit

METHOD = "dynamicvit:keep=0.5,layers=1+2"


def weight_of(session: fewer.Session) -> torch.Tensor:
    return session.modules[0][0]["predictor"].embed[1].weight


def test_a_method_without_its_modules_says_how_to_get_them() -> None:
    model = tiny_vit()
    before = {k for m in model.modules() for k in m.__dict__}
    with pytest.raises(ModulesError, match=r"fewer train dynamicvit .* modules='untrained'"):
        fewer.apply(model, METHOD)
    assert {k for m in model.modules() for k in m.__dict__} == before
    with fewer.apply(model, METHOD, modules="untrained"):
        run(model, images(1))


def test_saved_modules_come_back_the_same(tmp_path: Path) -> None:
    model, x = tiny_vit(), images(2)
    with fewer.apply(model, METHOD, modules="untrained") as session:
        want = run(model, x)
        files = session.save_modules(tmp_path, {"seed": "7"})
    assert files == [tmp_path / "dynamicvit.safetensors"]
    card = trained.read_card(files[0])
    assert card == {"method": METHOD, "layers": "1+2", "width": "32", "heads": "4", "blocks": "4", "seed": "7"}
    for source in (tmp_path, str(tmp_path), files[0], session.modules, session.modules[0]):
        with fewer.apply(model, METHOD, modules=source):
            assert torch.equal(run(model, x), want)


def test_a_folder_may_hold_several_settings(tmp_path: Path) -> None:
    model = tiny_vit()
    with fewer.apply(model, METHOD, modules="untrained") as first:
        first.save_modules(tmp_path)
    with fewer.apply(model, "dynamicvit:layers=0+3", modules="untrained") as second:
        second.save_modules(tmp_path / "dynamicvit-0+3.safetensors")
    with fewer.apply(model, "dynamicvit:layers=0+3,keep=0.3", modules=tmp_path) as again:
        assert torch.equal(weight_of(again), weight_of(second))
    gentler = "dynamicvit:keep=0.9,layers=1+2"
    with fewer.apply(model, gentler, modules="untrained") as third:
        third.save_modules(tmp_path / "dynamicvit-9.safetensors")
    for method, source in ((METHOD, first), (gentler, third), ("dynamicvit:keep=0.6,layers=1+2", first)):
        with fewer.apply(model, method, modules=tmp_path) as again:
            assert torch.equal(weight_of(again), weight_of(source)), method
    with pytest.raises(ModulesError, match=r"at layers 1\+2, not 2\+3.*at layers 0\+3, not 2\+3"):
        fewer.apply(model, "dynamicvit:layers=2+3", modules=tmp_path)


def test_modules_of_another_width_or_method_are_refused(tmp_path: Path) -> None:
    with fewer.apply(tiny_vit(), METHOD, modules="untrained") as session:
        session.save_modules(tmp_path)
    with pytest.raises(ModulesError, match=r"was trained as dynamicvit.*for width 32 and 4 blocks: 0\.predictor"):
        fewer.apply(tiny_vit(width=16), METHOD, modules=tmp_path)
    with pytest.raises(ModulesError, match=r"no file, folder or packaged model with spvit\.safetensors"):
        fewer.apply(tiny_vit(), "spvit:keep=0.5+0.25,layers=1+2", modules=tmp_path)
    with pytest.raises(ModulesError, match=r"needs \[\[\['selector'\]"):
        fewer.apply(tiny_vit(), "spvit:keep=0.5,layers=1", modules=session.modules)
    with pytest.raises(ModulesError, match="leave modules= out"):
        fewer.apply(tiny_vit(), "tome:r=2", modules=tmp_path)


def test_stacked_methods_each_get_their_own(tmp_path: Path) -> None:
    model = tiny_vit()
    stack = ["dynamicvit:keep=0.7,layers=1", "tome:r=1", "tokenlearner:tokens=4,layers=3"]
    with fewer.apply(model, stack, modules="untrained") as session:
        want = run(model, images(2))
        assert [len(own) for own in session.modules] == [1, 0, 1]
        session.save_modules(tmp_path)
        with pytest.raises(ModulesError, match="give a folder"):
            session.save_modules(tmp_path / "both.safetensors")
    with fewer.apply(model, stack, modules=tmp_path):
        assert torch.equal(run(model, images(2)), want)


def test_modules_take_the_models_dtype() -> None:
    model = tiny_vit().to(torch.bfloat16)
    with fewer.apply(model, METHOD, modules="untrained") as session:
        assert {p.dtype for p in session.modules.parameters()} == {torch.bfloat16}
        assert run(model, images(1).to(torch.bfloat16)).isfinite().all()


def test_nothing_to_save_is_said(tmp_path: Path) -> None:
    with fewer.apply(tiny_vit(), "tome:r=1") as session, pytest.raises(ModulesError, match="no trained modules"):
        session.save_modules(tmp_path)


def test_only_the_packaged_model_itself_finds_packaged_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "assets"
    monkeypatch.setattr(trained, "ASSETS", package)
    model = tiny_vit()
    with fewer.apply(model, METHOD, modules="untrained") as session:
        session.save_modules(package / "vit-tiny")
    (tmp_path / "vit-tiny").mkdir()
    elsewhere = str(tmp_path / "vit-tiny")
    for name, found in (
        (str(package / "vit-tiny"), True),
        ("vit-tiny", True),
        (elsewhere, False),
        ("me/vit-tiny", False),
        ("", False),
    ):
        model.config._name_or_path = name
        if found:
            with fewer.apply(model, METHOD) as again:
                weight = again.modules[0][1]["predictor"].embed[1].weight
                assert torch.equal(weight, session.modules[0][1]["predictor"].embed[1].weight)
        else:
            with pytest.raises(ModulesError, match="the package has none for this model"):
                fewer.apply(model, METHOD)
    model.config._name_or_path = ""
    fewer.apply(model, METHOD, modules="vit-tiny").remove()
