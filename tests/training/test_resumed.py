"""Every recipe: killed on the way and started again, it ends with the weights of a run that was left alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from decoders import VOCAB, decoder
from fewer.datasets.scenes import scene
from fewer.recipes import classify, encode, exits, loop, pooling, predict, projector, prompt, reduce, texts, vlm
from fewer.testing.vision_language import tiny_vlm
from llava import tiny_llava
from test_scenes import TINY as SCENES
from test_zoo import TINY as SHADES
from test_zoo import shades
from training.test_encode import Tokenizer, bert
from training.test_encode import texts as rows
from training.test_pooling import SMALL, TEXT
from training.test_projector import examples
from training.test_reduce import pictures, processor
from training.test_texts import TINY as TEXTS
from training.test_texts import words
from visual.test_exits import samples
from vit import tiny_vit


def quiet(_line: str) -> None:
    return None


def ids(count: int) -> Tensor:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(0))


def _reduce(out: Path, **more: Any) -> None:
    recipe = reduce.Reduction("dynamicvit:keep=0.5,layers=1+2", steps=6, batch=8, bfloat16=False, **more)
    model = tiny_vit(classes=4, options={"hidden_dropout_prob": 0.1})
    reduce.train(recipe, out, model=(model, processor), data=(pictures(32, 0), pictures(8, 1)), log=quiet)


def _encode(method: str, out: Path, **more: Any) -> None:
    recipe = encode.Encode(method, length=16, steps=8, batch=6, held=8, rounds=1, backbone=1e-3, **more)
    encode.train(recipe, out, model=(bert(), Tokenizer()), data=(rows(30, 0), rows(9, 1)), log=quiet)


def _predict(out: Path) -> None:
    recipe = predict.Prediction(steps=8, length=40, rows=8, reuse=3, pool=2, test=1)
    predict.train(recipe, out, model=(copy.deepcopy(decoder("llama")), None), ids=ids(300), log=quiet)


def _prompt(out: Path) -> None:
    recipe = prompt.Prompting("sdtp:sinks=1,layers=1,keep=0.7", steps=6, length=24, test=1, scored=2, bfloat16=False)
    prompt.train(recipe, out, model=(copy.deepcopy(decoder("llama")), None), ids=ids(400), log=quiet)


def _projector(out: Path) -> None:
    recipe = projector.Projecting("tokenpacker:tokens=4", steps=6, scales=(4, 1), projector=0.5)
    projector.train(recipe, tiny_vlm("llava"), examples(3, 4), out, log=quiet)


def _gates(out: Path) -> None:
    exits.train_gates(tiny_llava(), samples(), out, exits.Gates("dyvte:hidden=8", steps=6, batch=2), quiet)


def _classify(out: Path) -> None:
    classify.train(out, recipe=SHADES, epochs=2, data=(shades(80, 0), shades(20, 1)), log=quiet)


def _texts(out: Path) -> None:
    texts.train(out, recipe=TEXTS, steps=8, data=(words(64, 0), words(8, 1, 10)), log=quiet)


def _pooling(out: Path) -> None:
    pooling.train(
        out, pooling.Recipe(**SMALL | {"method": "dynamic_pooling:layers=1", "steps": 8}), text=TEXT, log=quiet
    )  # type: ignore[arg-type]


def _vlm(out: Path) -> None:
    vlm.train(out, recipe=SCENES, log=quiet)


RECIPES: dict[str, Callable[[Path], None]] = {
    "reduce": _reduce,
    "encode, two phases": functools.partial(_encode, "power_bert"),
    "encode, samples": functools.partial(_encode, "trbert:layers=1"),
    "encode, configurations": functools.partial(_encode, "length_adaptive"),
    "encode, patience": functools.partial(_encode, "leap", patience=1),
    "predict": _predict,
    "prompt": _prompt,
    "projector": _projector,
    "exits": _gates,
    "classify": _classify,
    "texts": _texts,
    "pooling": _pooling,
    "vlm, two phases": _vlm,
}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_ends_as_one_that_was_left_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (classify, encode, exits, pooling, predict, projector, prompt, reduce, texts, vlm):
        monkeypatch.setattr(module, "Loop", functools.partial(loop.Loop, save=2))
    monkeypatch.setattr(vlm, "scene", lambda rng, split: scene(rng, "test"))
    learnt: list[Any] = []

    def vocabulary(*args: Any, **kwargs: Any) -> Any:  # learning one twice gives two
        learnt.append(copy.deepcopy(learnt[0]) if learnt else own(*args, **kwargs))
        return learnt[-1]

    own = texts.vocabulary
    monkeypatch.setattr(texts, "vocabulary", vocabulary)
    update, steps, after = loop._Run.update, list[int](), 0

    def counted(run: Any, seen: Any) -> None:
        if len(steps) == after - 1:
            raise Killed
        update(run, seen)
        steps.append(run.step)

    monkeypatch.setattr(loop._Run, "update", counted)
    RECIPES[name](tmp_path / "whole")
    total = len(steps)
    after = total // 2 + 2
    steps.clear()
    with pytest.raises(Killed):
        RECIPES[name](tmp_path / "killed")
    assert list((tmp_path / "killed" / "state").rglob("now"))
    after, done = 0, len(steps)
    steps.clear()
    RECIPES[name](tmp_path / "killed")
    assert total - done <= len(steps) <= total - done + 2, "no more than two steps are done again"
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.safetensors"))
    assert files
    for file in files:
        want, got = load_file(tmp_path / "whole" / file), load_file(tmp_path / "killed" / file)
        assert [k for k in want if not torch.equal(want[k], got[k])] == [], file
    assert not (tmp_path / "killed" / "state").exists()
    assert len(learnt) == (2 if name == "texts" else 0), "a run that goes on keeps its vocabulary"
