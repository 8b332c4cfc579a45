"""A model with its methods on, from the folder it was saved to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..spec import parse
from . import modules as trained
from .apply import apply
from .saving import FILE, FORMAT, NAME, WEIGHTS, Carried, SavedError, carried

if TYPE_CHECKING:
    from ..adapters.clip_guide import Guide
    from .session import Session


def load(
    folder: str | Path, model: nn.Module | type | None = None, *, guide: Guide | nn.Module | None = None, **options: Any
) -> tuple[nn.Module, Session]:
    """A model with its methods on, as `model.save_pretrained` or `session.save` wrote them.

    model     a class with `from_pretrained` (an Auto class, say), by default the one that was saved; or a model, made
              as the saved one was, whose weights are then replaced: timm has no other way
    guide     for methods that ask one; it is not saved
    options   go to `from_pretrained`: dtype, device_map, attn_implementation

    Returns   the model, in evaluation mode if it was built here, and the session on it
    Raises    SavedError for a folder without `fewer.json`, or one that does not fit, naming the file; ModulesError for
              its modules. A model that was given is left as it was.
    """
    folder = Path(folder)
    file, about = folder / FILE, _read(folder / FILE)
    try:
        methods = [parse(form) for form in about["methods"]]
    except ValueError as error:
        raise SavedError(f"{file}: {error}") from error
    if about["guide"] and guide is None:
        raise SavedError(f"{file}: the model was saved with a guide, which is not in the folder; give guide=")
    given = isinstance(model, nn.Module)
    net: Any = (
        _checked(model, file, about["model"], options) if given else _built(folder, about["model"], model, options)
    )
    session = apply(
        net, methods, execution=about["execution"], modules=folder if about["trained"] else None, guide=guide,
        positions=about["positions"],
    )  # fmt: skip
    try:
        if given:
            _fill(carried(net), folder / WEIGHTS)
    except BaseException:
        session.remove()
        raise
    return net, session


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise SavedError(
            f"{file.parent} holds no {FILE}: write one with model.save_pretrained(folder) while a session is on, or "
            "load the model as usual and call fewer.apply"
        )
    try:
        about = json.loads(file.read_text())
        later = about["format"] > FORMAT
        missing = {"model", "methods", "execution", "positions", "guide", "trained"} - about.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SavedError(f"{file} is not what fewer writes: {type(error).__name__}: {error}") from error
    if later:
        raise SavedError(
            f"{file} was written by fewer {about.get('fewer')}, and this one cannot read it: upgrade fewer"
        )
    if missing:
        raise SavedError(f"{file} does not say {', '.join(sorted(missing))}: save the model again")
    return dict(about)


def _built(folder: Path, name: str, cls: Any, options: dict[str, Any]) -> nn.Module:
    """The model of a folder, by its class's own loading."""
    if cls is None and (folder / "config.json").is_file():
        import transformers

        cls = getattr(transformers, name, None)
    if cls is None:
        raise SavedError(
            f"{folder}: a {name} was saved, which is no class of transformers with its config there; give model=, the "
            f"class, or a {name} whose weights are to be replaced"
        )
    from safetensors import SafetensorError

    known = getattr(cls, "_keys_to_ignore_on_load_unexpected", None)
    aware = cls
    if isinstance(cls, type) and hasattr(cls, "_keys_to_ignore_on_load_unexpected"):
        ignored = [*(known or []), rf"(^|\.){NAME}\.\d+\."]  # the modules: `apply` reads them
        aware = type(
            cls.__name__, (cls,), {"_keys_to_ignore_on_load_unexpected": ignored, "__module__": cls.__module__}
        )
    try:
        net: nn.Module = aware.from_pretrained(folder, **options)
    except (SafetensorError, OSError) as error:
        raise SavedError(f"{folder}: its weights cannot be read: {error}") from error
    if aware is not cls:
        net.__class__ = cls
    return net


def _checked(model: Any, file: Path, name: str, options: dict[str, Any]) -> nn.Module:
    """A model that was given, if its weights can be replaced by those of a folder."""
    if type(model).__name__ != name:
        raise SavedError(f"{file}: a {name} was saved, and a {type(model).__name__} is given; make one of its kind")
    if hasattr(model, "save_pretrained"):
        raise SavedError(f"{file}: a {name} is built from the folder itself; leave model= out, or give its class")
    if options:
        raise SavedError(f"{', '.join(options)}: options for from_pretrained, which a model that is given does without")
    return model


def _fill(carried: Carried, file: Path) -> None:
    """Replace a model's weights by those of a file. Raises SavedError where they are others."""
    state, own = trained.read(file), carried.weights()
    found, wanted = ({k: tuple(v.shape) for k, v in s.items()} for s in (state, own))
    if wrong := sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k)):
        raise SavedError(
            f"{file}: {wrong[0]} is {found.get(wrong[0])}, not {wanted.get(wrong[0])}, as the model has it"
        )
    carried.session.model.load_state_dict(state, strict=False)
