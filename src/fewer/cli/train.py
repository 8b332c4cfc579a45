"""`fewer train`: a packaged model, or a method's own modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from .inputs import quiet
from .output import say, writable

NAMED = {  # what is no method: the module of fewer.recipes, and its recipe
    "vit-fashion": ("classify", "Recipe"), "dit-fashion": ("diffuse", "Recipe"), "bert-eras": ("texts", "Recipe"),
    "minilm-r8": ("texts", "MINILM"), "llava-scenes": ("vlm", "Recipe"), "video-actions": ("actions", "Recipe"),
    "reasoner": ("reasoner", "Reasoning"), "tokenskip": ("skipping", "Skipping"), "shorten": ("shorten", "Shortening"),
    "autocompressor": ("condense", "Condensing"), "multitoken": ("multitoken", "MultiTokens"),
    "influx": ("influx", "Influencing"), "compressor": ("compressor", "Distilling"),
}  # fmt: skip
TEXTS = dict.fromkeys(("power_bert", "ltp", "length_adaptive", "pyramid_bert", "trbert", "leap"), "encode") | {
    "sdtp": "prompt", "dynamic_context_pruning": "prompt", "tokenbutler": "predict", "dynamic_pooling": "pooling",
}  # fmt: skip
"""Methods in text models, by the module that trains them."""
METHODS = {
    "encode": "Encode", "prompt": "Prompting", "predict": "Prediction", "pooling": "Recipe", "watch": "Watching",
    "reduce": "Reduction",
}  # fmt: skip
"""The recipe of each module that trains a method."""
SEEING = ("dynamic_llava_decode", "voco_llama")  # their tokens are visual ones, though they act on the cache


def command(
    name: Annotated[
        str,
        typer.Argument(help=f"{', '.join(NAMED)}, or a method with modules of its own: dynamicvit:keep=0.7."),
    ],
    model: Annotated[
        str | None, typer.Option(help="Model whose method's modules are trained. Default: what the recipe is made for.")
    ] = None,
    out_: Annotated[Path, typer.Option("--out", help="Folder for the weights and the log.")] = Path("runs/train"),
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the recipe: --set steps=300; repeat.")
    ] = None,
) -> None:
    """Train a packaged model, or a method's own modules on a model; find the settings of methods that have such."""
    quiet()
    recipe, run = _recipe(name, model)
    recipe = _changed(recipe, dict(_assignment(item) for item in set_ or ()))
    say(recipe)
    say(run(recipe=recipe, out=writable(out_, folder=True), log=say))


def _visual(name: str) -> bool:
    """Whether a method acts on visual tokens of a vision-language model."""
    from fewer import parse
    from fewer.core import VisualReducer

    return isinstance(parse(name), VisualReducer)


def _moving(name: str) -> bool:
    """Whether a method is one for videos."""
    from fewer import parse

    return parse(name).card.on == "video"


def _recipe(name: str, model: str | None) -> tuple[Any, Callable[..., Any]]:
    """What a name to train stands for, and what runs it. model: None = the one the recipe is made for.

    Raises   ValueError for a model where the recipe makes its own.
    """
    if name in NAMED:
        module, made = NAMED[name]
        recipes = import_module(f"fewer.recipes.{module}")
        found = getattr(recipes, made)
        recipe = found() if isinstance(found, type) else found
    else:
        module = _of_method(name)
        recipes = import_module(f"fewer.recipes.{module}")
        if module == "visual":
            return recipes.recipe_for(name), recipes.train if model is None else partial(recipes.train, model=model)
        made = METHODS[module]
        recipe = getattr(recipes, made)() if name == "dynamic_pooling" else getattr(recipes, made)(method=name)
    if model is not None:
        if "model" not in {field.name for field in fields(recipe)}:
            raise ValueError(f"--model {model} does not apply to {name}: its recipe makes the model; leave --model out")
        recipe = replace(recipe, model=model)
    return recipe, recipes.train


def _of_method(name: str) -> str:
    """The module whose recipe trains a method's own modules."""
    method = name.partition(":")[0]
    if method in TEXTS:
        return TEXTS[method]
    if method in SEEING or _visual(name):
        return "visual"
    return "watch" if _moving(name) else "reduce"


def _assignment(item: str) -> tuple[str, Any]:
    from fewer.spec import value_of

    key, equals, value = item.partition("=")
    if not equals:
        raise ValueError(f"--set {item}: write it as name=value")
    return key.strip(), value_of(value.strip())


def _changed(recipe: Any, changes: dict[str, Any]) -> Any:
    """A recipe with some fields replaced; the error for an unknown one lists them all."""
    known = [f.name for f in fields(recipe)]
    for name in changes:
        if name not in known:
            raise ValueError(f"{type(recipe).__name__} has no field {name!r}; it has {', '.join(known)}")
    return replace(recipe, **changes)
