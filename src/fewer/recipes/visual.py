"""Train methods on visual tokens on questions about scenes: what `fewer train METHOD` runs for them.

    report = train(Projecting("tokenpacker:tokens=16", steps=300), "out")  # modules before the language model
    report = train(Gates("dyvte"), "out")                                  # inside it
    report = train(Search("fitprune", flops=0.5), "out")                   # nothing learns, settings are found

Scenes are those of `datasets.scenes`: the model has to know their words and to answer in one. On other data call the
recipes themselves: `projector.train`, `exits.train_gates`, `exits.train_predictor`, `withdraw.search_layer`,
`fit.fit_schedule`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fewer.datasets.scenes import Split
from fewer.models.zoo import load_model
from fewer.spec import parse, text

from . import exits, fit, projector, withdraw
from .exits import Gates, Predicting
from .projector import Projecting, Scenes

__all__ = ["Found", "Search", "recipe_for", "samples", "train"]

MODEL = "llava-scenes"
LEARNT_FROM = 1000
"""Questions that gates and predictors are trained on."""


@dataclass(frozen=True)
class Search:
    """Settings that are found, not learned: the layer of `vtw`, the schedule of `fitprune`.

    prompts: questions looked at, the kinds in turn. eta: for vtw, how far the next word's distribution may move, in
    nats. flops: for fitprune, the share of the language model's cost that is to remain. seed: of the questions.
    """

    method: str = "vtw"
    prompts: int = 20
    eta: float = 0.003
    flops: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ValueError(f"Search(prompts={self.prompts}): give at least one")


@dataclass(frozen=True)
class Found:
    """What a search came to. method: the text form to use; about: what was seen on the way."""

    method: str
    about: str


Recipe = Projecting | Gates | Predicting | Search


def recipe_for(method: str) -> Recipe:
    """The recipe that trains a method on visual tokens, with its defaults.

    Raises   ValueError for methods whose training scenes cannot do.
    """
    name = method.partition(":")[0]
    if name == "dyvte":
        return Gates(method)
    if name == "dynamic_llava":
        return Predicting(method)
    if name in ("vtw", "fitprune"):
        return Search(name)
    others = {
        "dynamic_llava_decode": "its answers have one word, and this learns from answers of 50 tokens or more: call "
        "fewer.recipes.exits.train_output with prompts and answers of your own",
        "voco_llama": "it has no modules of its own: the model itself is tuned, with the mask that "
        "fewer.methods.multimodal.voco_llama.visible makes",
        "video_xl_pro": "it acts on videos of several frames: call fewer.recipes.projector.train with batches of your "
        "own",
    }
    if name in others:
        raise ValueError(f"{name} cannot be trained on questions about scenes: {others[name]}")
    return Projecting(method)


def samples(processor: Any, count: int, split: Split = "train", seed: int = 0) -> list[exits.Sample]:
    """Prompts with their answers: (what one prompt is called with, (1,) long, the answer's id). The kinds in turn."""
    found: list[exits.Sample] = []
    for given in Scenes(processor, split, size=1, batches=count, seed=seed):
        ids, mask = given["input_ids"], given["attention_mask"]
        inputs = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], "pixel_values": given["pixel_values"]}
        found.append((inputs, ids[0, -1:]))
    return found


def train(
    recipe: Recipe, out: str | Path, *, model: str = MODEL, log: Callable[[str], None] = print
) -> projector.Report | exits.Report | Found:
    """Run a recipe on questions about scenes, and leave in `out` what `fewer.apply(..., modules=out)` takes, or for a
    search a JSON file of what was found.

    model: a name, see `load_model`. Training pictures are Fashion-MNIST's; searches and tests take those in the
    package.
    """
    if isinstance(recipe, Projecting):
        return projector.train_on_scenes(recipe, out, model=model, log=log)
    network, processor = load_model(model)
    if isinstance(recipe, Search):
        return _found(recipe, network, processor, Path(out))
    learnt = samples(processor, LEARNT_FROM, seed=recipe.seed)
    if isinstance(recipe, Gates):
        return exits.train_gates(network, learnt, out, recipe, log)
    return exits.train_predictor(network, learnt, out, recipe, log)


def _found(recipe: Search, network: nn.Module, processor: Any, out: Path) -> Found:
    inputs = [given for given, _ in samples(processor, recipe.prompts, "test", recipe.seed)]
    if recipe.method == "vtw":
        layer = withdraw.search_layer(network, inputs, recipe.eta)
        tried = ", ".join(f"k={k}: {value:.2g}" for k, value in layer.divergence.items())
        found = Found(text(parse("vtw", k=layer.k)), f"nats the next word moves by: {tried}")
    else:
        schedule = fit.fit_schedule(network, inputs, recipe.flops)
        found = Found(text(schedule.method), f"{schedule.flops:.1%} of the language model's FLOPs remain")
    out.mkdir(parents=True, exist_ok=True)
    written = {"recipe": asdict(recipe), "found": asdict(found)}
    (out / f"{recipe.method}.json").write_text(json.dumps(written, indent=1) + "\n")
    return found
