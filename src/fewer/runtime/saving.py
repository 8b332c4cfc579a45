"""What a model carries while a session is on: trained modules among its own, its method when it is saved or copied.

model.save_pretrained("out")            # the model's files, fewer.json and the modules
model, session = fewer.load("out")      # equal outputs, to the bit
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from ..core import Reducer
from ..spec import parse, text
from . import modules as trained
from .program import Bound, Execution, SessionError

if TYPE_CHECKING:
    from ..adapters.clip_guide import Guide
    from .session import Session

FILE = "fewer.json"
FORMAT = 1
"""Of that file; a later one is refused."""
WEIGHTS = "model.safetensors"
NAME = "fewer"
"""Of the submodule that holds the trained modules: keys of the state dict begin with it."""


class SavedError(ValueError):
    """A folder does not hold a model and its method, or they do not fit together."""


@dataclass(frozen=True)
class Setup:
    """How a session was opened; see `fewer.apply`."""

    methods: tuple[Reducer, ...]
    execution: Execution = "padded"
    positions: Literal["kept", "compact"] = "kept"
    guide: Guide | nn.Module | None = None


class Carried:
    """The entries a session has in its model. `__deepcopy__` and `save_pretrained` stand in the model's `__dict__`."""

    def __init__(self, session: Session, setup: Setup, again: Callable[..., Session]) -> None:
        """again: `fewer.apply`, for a copy."""
        self.session, self.setup, self.again = session, setup, again

    @property
    def learning(self) -> list[Bound]:
        """The parts that have trained modules."""
        return [part for part in self.session.bounds if any(True for _ in part.modules.parameters())]

    def _prefix(self, part: Bound) -> str:
        """What the keys of a part's modules begin with in the model's state dict."""
        path = next(name for name, module in self.session.model.named_modules() if module is part.model)
        return f"{path}.{NAME}." if path else f"{NAME}."

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict without the trained modules."""
        ours = tuple(map(self._prefix, self.learning))
        return {k: v for k, v in self.session.model.state_dict().items() if not k.startswith(ours)}

    def put_on(self) -> None:
        """Raises SessionError where the model has an attribute of that name."""
        undo, model = self.session._undo, self.session.model
        for part in self.learning:
            if hasattr(part.model, NAME):
                raise SessionError(
                    f"{type(part.model).__name__} has an attribute {NAME!r} of its own, where the trained modules of a "
                    "method are to stand; name it otherwise"
                )
            part.model.add_module(NAME, part.modules.train(part.model.training))
            undo.callback(delattr, part.model, NAME)
        ours: dict[str, Callable[..., Any]] = {"__deepcopy__": self.copied}
        if (own := getattr(model, "save_pretrained", None)) is not None:
            ours["save_pretrained"] = wraps(own)(self._along(own))
        for name, function in ours.items():
            before = {name: vars(model)[name]} if name in vars(model) else {}
            vars(model)[name] = function
            undo.callback(vars(model).update, before)
            undo.callback(vars(model).pop, name)  # callbacks run last first

    def _along(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def save_pretrained(save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            saved = own(save_directory, *args, **kwargs)
            if kwargs.get("is_main_process", args[0] if args else True):
                try:
                    self.write(Path(save_directory), kwargs.get("state_dict"))
                except ValueError as error:  # hours of training are not lost for that
                    warnings.warn(f"the model was saved without its method: {error}", stacklevel=2)
            return saved

        return save_pretrained

    def save(self, folder: str | Path) -> None:
        """Raises SavedError for a method that has no text form."""
        folder = Path(folder)
        model: Any = self.session.model
        _forms(self.setup.methods)
        folder.mkdir(parents=True, exist_ok=True)
        if (own := getattr(model, "save_pretrained", None)) is not None:
            own(folder)
            return
        from safetensors.torch import save_file

        save_file({k: v.detach().cpu().clone().contiguous() for k, v in self.weights().items()}, folder / WEIGHTS)
        self.write(folder)

    def write(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write fewer.json and the modules. state: the model's whole state dict, where its parameters are scattered."""
        forms = _forms(self.setup.methods)
        for part in self.learning:
            prefix = self._prefix(part)
            own = {k.removeprefix(prefix): v for k, v in (state or {}).items() if k.startswith(prefix)}
            trained.save(folder, part.program.methods, part.modules, part.host, {}, own)
        from .. import __version__

        about = {
            "format": FORMAT, "fewer": __version__, "model": type(self.session.model).__name__, "methods": forms,
            "execution": self.setup.execution, "positions": self.setup.positions,
            "guide": self.setup.guide is not None, "trained": bool(self.learning),
        }  # fmt: skip
        (folder / FILE).write_text(json.dumps(about, indent=1) + "\n")

    def copied(self, memo: dict[int, Any]) -> nn.Module:
        """A deep copy of the model, with a session of its own: `fewer.session_of(copy)`. Not while a pass is under way:
        the session comes off the model for the time of it."""
        session, setup = self.session, self.setup
        session.remove()
        try:
            twin, modules = copy.deepcopy((session.model, session.modules), memo)
        finally:
            session._attach()
            self.put_on()
        self.again(
            twin, session.methods, execution=setup.execution, modules=modules if self.learning else None,
            guide=setup.guide, positions=setup.positions,
        )  # fmt: skip
        return twin


def carry(session: Session, setup: Setup, again: Callable[..., Session]) -> None:
    """Let the model carry its session's modules and methods until it comes off."""
    session.carried = Carried(session, setup, again)
    session.carried.put_on()


def carried(model: nn.Module) -> Carried:
    """Raises SessionError where no session is on."""
    found = getattr(vars(model).get("__deepcopy__"), "__self__", None)
    if not isinstance(found, Carried):
        raise SessionError(f"no session is on this {type(model).__name__}: put one on with fewer.apply")
    return found


def session_of(model: nn.Module) -> Session:
    """The session on a model: of a deep copy, say, which has one of its own. Raises SessionError where none is on."""
    return carried(model).session


def _forms(methods: Sequence[Reducer]) -> list[str]:
    """The methods as text. Raises SavedError for one that cannot be read back."""
    forms = []
    for method in methods:
        try:
            same = parse(form := text(method)) == method
        except ValueError:
            same = False
        if not same:
            raise SavedError(f"{method!r} has no text form that fewer.parse reads back, so it cannot be saved")
        forms.append(form)
    return forms
