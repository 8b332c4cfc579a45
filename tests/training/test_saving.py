"""Trained modules live with the model, and a model is saved, loaded and copied with its method."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import fewer
from decoders import decoder
from fewer.runtime.modules import ModulesError
from fewer.runtime.saving import SavedError
from llava import prompt, tiny_llava
from vit import images, run, tiny_vit

VIT, TEXT = "dynamicvit:keep=0.5,layers=1+2", "sdtp:keep=0.7,layers=1"


class Pictures(torch.utils.data.Dataset):
    """Eight pictures with labels, for a ViT of five classes."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": images(8)[i], "labels": i % 5}


class Words(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = torch.randint(3, 50, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """What must be as it was once a session is off."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return (
        list(model.state_dict()),
        hooks,
        [m.training for m in model.modules()],
        [set(vars(m)) for m in model.modules()],
    )


def trainer(model: nn.Module, data: Any, folder: Path, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=2, report_to=[],
        use_cpu=True, disable_tqdm=True, **more,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data)


@pytest.mark.parametrize(
    ("make", "method", "data"), [(tiny_vit, VIT, Pictures()), (lambda: copy.deepcopy(decoder("llama")), TEXT, Words())],
    ids=["vit", "llama"],
)  # fmt: skip
def test_trainer_moves_saves_and_resumes_the_modules(
    make: Callable[[], nn.Module], method: str, data: Any, tmp_path: Path
) -> None:
    # transformers saves a ViT's own weights under older names, which its Trainer does not find again when it resumes
    model = make().requires_grad_(make is not tiny_vit)
    before = state_of(model)
    with fewer.apply(model, method, modules="untrained") as session:
        start = {k: v.clone() for k, v in session.modules.state_dict().items()}
        trainer(model, data, tmp_path).train()
        end = {k: v.clone() for k, v in session.modules.state_dict().items()}
        assert [k for k in start if torch.equal(start[k], end[k])] == []
        rates = {k for k, v in model.named_parameters() if k.startswith("fewer.")}
        assert rates == {f"fewer.{k}" for k in start}
        model.eval()
        _, loaded = fewer.load(tmp_path / "checkpoint-4")
        assert all(torch.equal(v, end[k]) for k, v in loaded.modules.state_dict().items())
    assert state_of(model)[:2] == before[:2]
    assert not {"save_pretrained", "__deepcopy__"} & vars(model).keys()
    again = make().requires_grad_(make is not tiny_vit)
    with fewer.apply(again, method, modules="untrained") as resumed:
        trainer(again, data, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        torch.testing.assert_close(resumed.modules.state_dict(), end, rtol=0, atol=1e-6)


def test_accelerate_and_plain_optimisers_find_the_modules(tmp_path: Path) -> None:
    from accelerate import Accelerator

    model, x = tiny_vit(), images(4)
    model.requires_grad_(False)
    with fewer.apply(model, VIT, modules="untrained") as session:
        assert {id(p) for p in session.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
        accelerator = Accelerator(cpu=True)
        net, optimiser = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        net.train()
        start = {k: v.clone() for k, v in session.modules.state_dict().items()}
        accelerator.backward(net(pixel_values=x).logits.square().sum())
        optimiser.step()
        moved = {k: v.clone() for k, v in session.modules.state_dict().items()}
        assert [k for k in start if torch.equal(start[k], moved[k])] == []
        accelerator.save_state(str(tmp_path))
        session.modules.load_state_dict(start)
        accelerator.load_state(str(tmp_path))
        assert all(torch.equal(v, moved[k]) for k, v in session.modules.state_dict().items())
    assert not any(k.startswith("fewer") for k in model.state_dict())


def test_removal_leaves_the_model_as_it_was() -> None:
    model = tiny_vit().train()
    model.vit.layers[0].eval() if hasattr(model.vit, "layers") else model.vit.encoder.layer[0].eval()
    before = state_of(model)
    with fewer.apply(model, VIT, modules="untrained") as session:
        assert [*model.state_dict()][: len(before[0])] == before[0]
        run(model, images(1))
        copy.deepcopy(model)
    assert state_of(model) == before
    assert fewer.apply(model, VIT, modules=session.modules).remove() is None, "the modules outlive the session"
    assert state_of(model) == before


def test_saving_of_the_models_own_comes_back() -> None:
    model, asked = tiny_vit(), list[str]()
    model.save_pretrained = asked.append
    mine = vars(model)["save_pretrained"]
    with fewer.apply(model, "tome:r=1"):
        assert vars(model)["save_pretrained"] is not mine
    assert vars(model)["save_pretrained"] is mine


def test_a_model_with_a_name_in_the_way_is_left_alone() -> None:
    model = tiny_vit()
    model.fewer = nn.Linear(2, 2)
    before = state_of(model)
    with pytest.raises(fewer.SessionError, match="has an attribute 'fewer' of its own"):
        fewer.apply(model, VIT, modules="untrained")
    assert state_of(model) == before


# -- saved and loaded -------------------------------------------------------------------------------------------------


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits  # type: ignore[no-any-return]


def seeing(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**prompt()).logits  # type: ignore[no-any-return]


def seen(model: Any) -> Tensor:
    return run(model, images(2))


CASES = {
    "vit": (tiny_vit, ["tome:r=2"], seen, {}),
    "vit, modules": (tiny_vit, [VIT, "tome:r=1"], seen, {}),
    "vit, twice": (tiny_vit, ["dynamicvit:keep=0.8,layers=1", "dynamicvit:keep=0.8,layers=2"], seen, {}),
    "vit, twice the same": (tiny_vit, ["dynamicvit:keep=0.8,layers=1"] * 2, seen, {}),
    "vit, packed": (tiny_vit, ["evit:mass=0.6,layers=1,fuse=false"], seen, {"execution": "packed"}),
    "llama": (lambda: copy.deepcopy(decoder("llama")), [TEXT, "snapkv:keep=0.5,window=4"], logits, {}),
    "llava, tower and prompt": (tiny_llava, ["dynamicvit:keep=0.5,layers=0", "sdtp:keep=0.7,layers=1"], seeing, {}),
    "llava, compact": (tiny_llava, ["divprune:tokens=4"], seeing, {"positions": "compact"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_says_the_same_to_the_bit(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, methods, said, more = CASES[case]
    model = make().eval()
    with fewer.apply(model, methods, modules="untrained", **more) as session:
        want, learned = said(model), [p.clone() for p in session.parameters()]
        model.save_pretrained(tmp_path)
    again, on = fewer.load(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(said(again), want)
    assert all(torch.equal(a, b) for a, b in zip(on.parameters(), learned, strict=True))
    on.remove()
    assert torch.equal(said(again), said(model))
    assert not torch.equal(said(model), want)
    assert "UNEXPECTED" not in caplog.text


def test_a_model_without_save_pretrained(tmp_path: Path) -> None:
    from vit import KINDS, Shape

    model, other = (KINDS["timm"](Shape(), {}).eval() for _ in range(2))
    nn.init.normal_(next(model.parameters()))
    with fewer.apply(model, VIT, modules="untrained") as session:
        want = run(model, images(2))
        session.save(tmp_path)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(SavedError, match=r"no class of transformers .* give model=, the class, or a VisionTransformer"):
        fewer.load(tmp_path)
    with pytest.raises(SavedError, match="a VisionTransformer was saved, and a ViTForImageClassification is given"):
        fewer.load(tmp_path, tiny_vit())
    wide = KINDS["timm"](Shape(classes=5), {})
    with pytest.raises(SavedError, match=r"model\.safetensors: head\.bias is \(7,\), not \(5,\)"):
        fewer.load(tmp_path, wide)
    assert fewer.apply(wide, "tome:r=1").remove() is None, "and no session was left on it"
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
    with fewer.load(tmp_path, other)[1]:
        assert torch.equal(run(other, images(2)), want)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny_vit()
    with fewer.apply(model, VIT, modules="untrained"):
        model.save_pretrained(tmp_path)
    return tmp_path


def rewritten(folder: Path, **changes: Any) -> None:
    file = folder / "fewer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def corrupt(folder: Path) -> None:
    (folder / "dynamicvit.safetensors").write_bytes(b"\x08" * 40)


def poisoned(folder: Path) -> None:
    state = load_file(file := folder / "dynamicvit.safetensors")
    state["0.predictor.embed.1.bias"][3] = float("nan")
    save_file(state, file, {"method": VIT, "layers": "1+2"})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: (f / "fewer.json").unlink(), SavedError, r"holds no fewer\.json: write one with model"),
        (lambda f: (f / "fewer.json").write_text("{"), SavedError, "not what fewer writes: JSONDecodeError"),
        (lambda f: (f / "fewer.json").write_text("[]"), SavedError, r"fewer\.json is not what fewer writes"),
        (lambda f: rewritten(f, format=99, fewer="9.0"), SavedError, r"fewer\.json was written by fewer 9\.0.*upgrade"),
        (lambda f: rewritten(f, methods=["dynamicvitt"]), SavedError, r"fewer\.json: no method named 'dynamicvitt'"),
        (lambda f: rewritten(f, methods=["dynamicvit:kep=1"]), SavedError, r"fewer\.json: dynamicvit has no param"),
        (lambda f: rewritten(f, guide=True), SavedError, r"was saved with a guide.*give guide="),
        (lambda f: rewritten(f, methods=["dynamicvit:layers=0+3"]), ModulesError, "at layers"),
        (lambda f: (f / "dynamicvit.safetensors").unlink(), ModulesError, "no file, folder or packaged model"),
        (corrupt, ModulesError, r"dynamicvit\.safetensors cannot be read as safetensors"),
        (poisoned, ModulesError, r"dynamicvit\.safetensors: 0\.predictor\.embed\.1\.bias .*not finite"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08" * 40), SavedError, "weights cannot be read"),
    ],
)  # fmt: skip
def test_bad_folders(saved: Path, change: Callable[[Path], Any], error: type[Exception], message: str) -> None:
    change(saved)
    with pytest.raises(error, match=message):
        fewer.load(saved)


def test_modules_of_another_depth_say_so(tmp_path: Path) -> None:
    with fewer.apply(tiny_vit(depth=3), "tokenlearner:tokens=4,layers=none", modules="untrained") as session:
        session.save_modules(tmp_path)
    with pytest.raises(ModulesError, match=r"for width 32 and 3 blocks: 3\.\w+"):
        fewer.apply(tiny_vit(depth=4), "tokenlearner:tokens=4,layers=none", modules=tmp_path)


def test_a_method_that_has_no_text_is_said(tmp_path: Path) -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Mine(fewer.ToMe):
        pass

    model = tiny_vit()
    with fewer.apply(model, Mine()) as session:
        with pytest.raises(SavedError, match=r"Mine\(.* has no text form"):
            session.save(tmp_path / "none")
        assert not (tmp_path / "none").exists()
        with pytest.warns(UserWarning, match="the model was saved without its method: .*Mine"):
            model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


# -- copied -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_deep_copy_has_a_session_of_its_own(case: str) -> None:
    make, methods, said, more = CASES[case]
    model = make().eval()
    plain = said(model)
    with fewer.apply(model, methods, modules="untrained", **more) as session:
        want = said(model)
        twin = copy.deepcopy(nn.ModuleDict({"whole": model}))["whole"]
        assert torch.equal(said(twin), want)
        mine = fewer.session_of(twin)
        assert mine is not session
        assert fewer.session_of(model) is session
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
        assert list(twin.state_dict()) == list(model.state_dict())
        mine.remove()
        assert torch.equal(said(twin), plain)
        assert torch.equal(said(model), want)
    assert torch.equal(said(model), plain)
    with pytest.raises(fewer.SessionError, match="no session is on this"):
        fewer.session_of(model)


def test_an_average_of_weights_follows_the_modules_too() -> None:
    from torch.optim.swa_utils import AveragedModel

    model = tiny_vit()
    with fewer.apply(model, VIT, modules="untrained") as session:
        average = AveragedModel(model)
        average.update_parameters(model)
        with torch.no_grad():
            next(session.parameters()).add_(2)
        average.update_parameters(model)
        copied: Any = average.module
        torch.testing.assert_close(next(fewer.session_of(copied).parameters()), next(session.parameters()) - 1)


def test_pickles_and_copies_of_parts_are_refused() -> None:
    model = tiny_vit()
    with fewer.apply(model, "tome:r=1"):
        for attempt in (lambda: pickle.dumps(model), lambda: copy.deepcopy(model.vit)):
            with pytest.raises(fewer.SessionError, match=r"cannot be pickled, nor a part of it copied"):
                attempt()
    pickle.dumps(model)
    copy.deepcopy(model.vit)
