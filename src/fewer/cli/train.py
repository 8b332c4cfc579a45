"""`fewer train`: a packaged model, or a method's own modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .inputs import quiet
from .output import say, writable

ENCODING = ("power_bert", "ltp", "length_adaptive", "pyramid_bert", "trbert", "leap")
PROMPTING = ("sdtp", "dynamic_context_pruning")
SEEING = ("dynamic_llava_decode", "voco_llama")  # their tokens are visual ones, though they act on the cache


def command(
    name: Annotated[
        str,
        typer.Argument(
            help="vit-fashion, bert-eras, minilm-r8, llava-scenes, autocompressor, compressor, or a method: "
            "dynamicvit:keep=0.7."
        ),
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
    say(run(recipe, writable(out_, folder=True)))


def _visual(name: str) -> bool:
    """Whether a method acts on visual tokens of a vision-language model."""
    from fewer import parse
    from fewer.core import VisualReducer

    return isinstance(parse(name), VisualReducer)


def _recipe(name: str, model: str | None) -> tuple[Any, Callable[[Any, Path], Any]]:
    """What a name to train stands for, and what runs it. model: None = the one the recipe is made for."""
    method = name.partition(":")[0]
    chosen: dict[str, Any] = {} if model is None else {"model": model}
    if name == "vit-fashion":
        from fewer.recipes import classify

        return classify.Recipe(), lambda recipe, out: classify.train(out, recipe=recipe, log=say)
    if name in ("bert-eras", "minilm-r8"):
        from fewer.recipes import texts

        base = texts.Recipe() if name == "bert-eras" else texts.MINILM
        return base, lambda recipe, out: texts.train(out, recipe=recipe, log=say)
    if name == "llava-scenes":
        from fewer.recipes import vlm

        return vlm.Recipe(), lambda recipe, out: vlm.train(out, recipe=recipe, log=say)
    if name == "autocompressor":
        from fewer.recipes import condense

        return condense.Condensing(**chosen), partial(condense.train, log=say)
    if name == "compressor":
        if model is not None:
            raise typer.BadParameter(
                "a compressor is learned from one model by another: --set teacher=..., student=..."
            )
        from fewer.recipes import compressor

        return compressor.Distilling(), partial(compressor.train, log=say)
    if method == "dynamic_pooling":
        from fewer.recipes import pooling

        pooled = pooling.Recipe() if name == method else pooling.Recipe(method=name)
        return pooled, lambda recipe, out: pooling.train(out, recipe, log=say)
    if method in ENCODING:
        from fewer.recipes import encode

        return encode.Encode(method=name, **chosen), partial(encode.train, log=say)
    if method == "tokenbutler":
        from fewer.recipes import predict

        return predict.Prediction(method=name, **chosen), partial(predict.train, log=say)
    if method in SEEING or _visual(name):
        from fewer.recipes import visual

        return visual.recipe_for(name), partial(visual.train, log=say, **chosen)
    if method in PROMPTING:
        from fewer.recipes import prompt

        return prompt.Prompting(method=name, **chosen), partial(prompt.train, log=say)
    from fewer.recipes import reduce

    return reduce.Reduction(method=name, **chosen), partial(reduce.train, log=say)


def _assignment(item: str) -> tuple[str, Any]:
    from fewer.spec import value_of

    key, equals, value = item.partition("=")
    if not equals:
        raise ValueError(f"--set {item}: write it as name=value")
    return key.strip(), value_of(value.strip())


def _changed(recipe: Any, changes: dict[str, Any]) -> Any:
    """A recipe with some fields replaced; the error for an unknown one lists them all."""
    from dataclasses import fields, replace

    known = [f.name for f in fields(recipe)]
    for name in changes:
        if name not in known:
            raise ValueError(f"{type(recipe).__name__} has no field {name!r}; it has {', '.join(known)}")
    return replace(recipe, **changes)
