"""A block's own steps: what its forward does with its parts, recorded once on a twin and played on the real block.

A block that is run as it stands leaves no way in between its attention and its MLP. So its forward is watched once:
which parts it calls, which operations it does itself, on which values. Where everything behind the attention is made of
one tensor, the block can be run as it stands until it hands that tensor on, be stopped there, and what is left of its
steps be played on other rows. The bits are the block's own.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fewer.compat import CACHE_NAMES

Path = tuple[Any, ...]


class StepsError(RuntimeError):
    """A forward that cannot be played back: says at which step, and why."""


@dataclass(frozen=True)
class Value:
    """What step `step` gave; path: into a tuple or dict it gave."""

    step: int
    path: Path = ()


@dataclass(frozen=True)
class Given:
    """An argument of the block, by name."""

    name: str
    path: Path = ()


@dataclass(frozen=True)
class Own:
    """A parameter, buffer or number of the block itself, by its path."""

    path: str


@dataclass(frozen=True)
class Size:
    """A number that is a size of the input: samples ** batch * tokens ** length."""

    batch: int
    length: int


@dataclass(frozen=True)
class Step:
    """One call at the level of the block.

    part      path of the module called, or None
    function  what is called otherwise: a function of torch
    attribute name of an attribute of a tensor that is read
    passes    whether arguments the block does not name itself go on to this part
    heavy     whether it multiplies by a matrix
    """

    part: str | None
    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    attribute: str | None = None
    passes: bool = False
    heavy: bool = False


@dataclass(frozen=True)
class Steps:
    """A block's forward. cut: the last step before the MLP, None where attention and MLP cannot be told apart; middle:
    the tensor between them; answer: the features that leave it; rest: what it gives besides; of: the block's class."""

    steps: tuple[Step, ...]
    entering: str
    answer: Value
    rest: tuple[Any, ...] = ()
    cut: int | None = None
    middle: Value | None = None
    of: type[nn.Module] = nn.Module

    @property
    def catch(self) -> tuple[str, int | str] | None:
        """The first part behind the cut that is given the tensor between, and as which argument; None where an
        operation of the block's own comes first."""
        if self.cut is None or self.cut + 1 == len(self.steps):
            return None
        if any(isinstance(value, Value) and value.step <= self.cut for value in self.rest):
            return None  # a block that is stopped cannot give what it made on the way
        step = self.steps[self.cut + 1]
        named: list[tuple[Any, Any]] = [*enumerate(step.args), *step.kwargs.items()]
        argument = next((name for name, value in named if value == self.middle), None)
        return None if step.part is None or argument is None else (step.part, argument)

    @property
    def late(self) -> bool:
        """Whether a step behind the cut reads an argument of the block."""
        behind = () if self.cut is None else self.steps[self.cut + 1 :]
        return any(isinstance(used, Given) for step in behind for used in _used((step.args, step.kwargs)))

    def first(
        self, block: nn.Module, own: Callable[..., Any], x: Tensor, given: Mapping[str, Any]
    ) -> tuple[Tensor, dict[int, Any]]:
        """From what enters the block to what lies between attention and MLP, and the values known of the way there.

        own: the block's forward, which stops where `stopping` was put on the part that comes next. x: (B, N, C).
        """
        assert self.cut is not None and self.middle is not None
        if self.catch is None:
            made = self._play(block, range(self.cut + 1), x, given, {})
            return _reach(made[self.middle.step], self.middle.path), made
        before, _stop.at = _stop.at, (box := _Box())
        try:
            own(x, **given)
        except _Stopped:
            pass
        finally:
            _stop.at = before
        assert box.x is not None, "the block did not come to its MLP"
        return box.x, {}

    def second(self, block: nn.Module, x: Tensor, given: Mapping[str, Any], made: Mapping[int, Any]) -> tuple[Any, ...]:
        """From there to what leaves it, and what the block gives besides. x: (B, M, C); made: as `first` gave it."""
        assert self.cut is not None and self.middle is not None
        rest = range(self.cut + 1, len(self.steps))
        made = {**made, **self._play(block, rest, x, given, {self.middle: x})}
        return self._left(block, x, given, made)

    def whole(self, block: nn.Module, x: Tensor, given: Mapping[str, Any]) -> tuple[Any, ...]:
        """The whole forward."""
        return self._left(block, x, given, self._play(block, range(len(self.steps)), x, given, {}))

    def _left(self, block: nn.Module, x: Tensor, given: Mapping[str, Any], made: Mapping[int, Any]) -> tuple[Any, ...]:
        def real(value: Any) -> Any:
            if isinstance(value, Value):
                return _reach(made[value.step], value.path) if value.step in made else None
            return _reach(given.get(value.name), value.path) if isinstance(value, Given) else value

        return tuple(map(real, (self.answer, *self.rest)))

    def parts(self, behind: bool) -> list[str]:
        """Paths of the parts called before the cut, or behind it."""
        cut = len(self.steps) if self.cut is None else self.cut + 1
        chosen = self.steps[cut:] if behind else self.steps[:cut]
        return list(dict.fromkeys(step.part for step in chosen if step.part is not None))

    def _play(
        self, block: nn.Module, which: range, x: Tensor, given: Mapping[str, Any], known: dict[Value, Any]
    ) -> dict[int, Any]:
        made: dict[int, Any] = {}

        def real(value: Any) -> Any:
            if isinstance(value, Value):
                return known[value] if value in known else _reach(made[value.step], value.path)
            if isinstance(value, Given):
                return x if value.name == self.entering else _reach(given.get(value.name), value.path)
            if isinstance(value, Own):
                return attrgetter(value.path)(block)
            if isinstance(value, Size):
                return x.shape[0] ** value.batch * x.shape[1] ** value.length
            if isinstance(value, tuple):
                return tuple(map(real, value))
            if isinstance(value, list):
                return list(map(real, value))
            if isinstance(value, dict):
                return {k: real(v) for k, v in value.items()}
            return value

        for index in which:
            step = self.steps[index]
            args, kwargs = [real(a) for a in step.args], {k: real(v) for k, v in step.kwargs.items()}
            if step.attribute is not None:
                made[index] = getattr(args[0], step.attribute)
                continue
            if step.part is not None:
                more = {k: v for k, v in given.items() if k not in self._names(block)} if step.passes else {}
                made[index] = attrgetter(step.part)(block)(*args, **more | kwargs)
                continue
            assert step.function is not None
            if "training" in kwargs:
                kwargs["training"] = block.training  # a twin is recorded in eval mode
            made[index] = step.function(*args, **kwargs)
        return made

    @staticmethod
    def _names(block: nn.Module) -> frozenset[str]:
        return named(type(block))


class _Stopped(Exception):
    """Ends a block's forward where its MLP begins."""


class _Box:
    x: Tensor | None = None


class _Stop(threading.local):
    at: _Box | None = None  # of the block that is to be stopped


_stop = _Stop()


def stopping(argument: int | str) -> Callable[..., None]:
    """A hook before the part that is given the tensor between attention and MLP: it ends the block there."""

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        box = _stop.at
        if box is not None:
            box.x = args[argument] if isinstance(argument, int) else kwargs[argument]
            raise _Stopped

    return hook


def named(block: type[nn.Module]) -> frozenset[str]:
    """The arguments a block's forward names itself."""
    found = _NAMES.get(block)
    if found is None:
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        own = inspect.signature(block.forward).parameters.values()
        found = _NAMES[block] = frozenset(p.name for p in own if p.kind not in kinds)
    return found


_NAMES: dict[type, frozenset[str]] = {}


def bound(block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A call's arguments by name, and the name of the first: the features that enter."""
    own = [p for p in inspect.signature(type(block).forward).parameters.values()][1:]
    names = [p.name for p in own if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return names[0], {**dict(zip(names, args, strict=False)), **kwargs}


def _reach(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format, type(Ellipsis), slice)
MEMORY = (*CACHE_NAMES, "layer_past", "past_key_value")  # what blocks and their parts call a cache
PROBE = "fewer_probe"  # an argument no block knows: who gets it hands on what it does not know


def record(block: nn.Module, given: Mapping[str, Any], attention: str | None) -> Steps:
    """The steps of one call of a block.

    given: its arguments by name, the features first; attention: path of the part whose attention is to be told from the
    MLP, relative to the block.
    Raises   StepsError where what the forward does cannot be played back.
    """
    signature = inspect.signature(type(block).forward)
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        try:
            return _recorded(block, given, attention, {PROBE: PROBE})
        except TypeError:  # a part that is handed on what it does not take
            pass
    return _recorded(block, given, attention, {})


def _recorded(block: nn.Module, given: Mapping[str, Any], attention: str | None, probe: Mapping[str, Any]) -> Steps:
    entering = next(iter(given))
    recorder = _Recorder(block, entering, given)
    with ExitStack() as undo, torch.no_grad():
        for path, module in block.named_modules():
            if path:
                undo.callback(module.register_forward_pre_hook(recorder.opening(path), with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(recorder.closing, always_call=True).remove)
        with recorder:
            out = type(block).forward(block, **given, **probe)
    answer, rest = _answer(out, recorder)
    steps = tuple(recorder.steps)
    cut, middle = _cut(steps, recorder, attention, answer)
    return Steps(steps, entering, answer, rest, cut, middle, type(block))


def _answer(out: Any, recorder: _Recorder) -> tuple[Value, tuple[Any, ...]]:
    """Where the features that leave a block come from, and what it gives besides."""
    parts = out if isinstance(out, (tuple, list)) else (out,)
    if not parts or not isinstance(found := recorder.known.get(id(parts[0])), Value):
        raise StepsError("the block's answer is none of the values that its steps give")
    return found, tuple(None if p is None else recorder.known.get(id(p)) for p in parts[1:])


class _Recorder(TorchFunctionMode):
    def __init__(self, block: nn.Module, entering: str, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.block, self.entering, self.given = block, entering, given
        self.steps: list[Step] = []
        self.known: dict[int, Any] = {}
        self.alive: list[Any] = []  # no other object may get the id of one that is known
        self.shapes: dict[Value, torch.Size] = {}
        self.depth = 0
        self.pending: tuple[str, tuple, dict, bool] | None = None
        x = given[entering]
        self.batch, self.length, self.width = x.shape[0], x.shape[1], x.shape[-1]
        self.memory = next((name for name in given if name in MEMORY), None)
        for name, value in given.items():
            self._meet(value, Given, (name,), ())
        for path, tensor in (*block.named_parameters(), *block.named_buffers()):
            self.known.setdefault(id(tensor), Own(path))
        self.numbers = {
            value: name for name, value in vars(block).items() if isinstance(value, float) and not name.startswith("_")
        }

    def _meet(self, value: Any, kind: Any, head: tuple, path: Path) -> None:
        """Remember an object, and what it holds, by where it comes from."""
        if isinstance(value, Tensor) or not isinstance(value, PLAIN):
            self.known[id(value)] = kind(*head, path)
            self.alive.append(value)
        if isinstance(value, Tensor):
            return
        if isinstance(value, Mapping):
            for key, part in value.items():
                self._meet(part, kind, head, (*path, key))
        elif isinstance(value, (tuple, list)):
            for key, part in enumerate(value):
                self._meet(part, kind, head, (*path, key))

    def _written(self, value: Any, name: str | None = None) -> Any:
        """A value as it is written into a step. name: of the argument it is."""
        if value is None and name in MEMORY and self.memory is not None:
            return Given(self.memory)  # which is not there while a block is recorded
        if name is not None and name in self.given and not isinstance(value, Tensor) and value is self.given[name]:
            return Given(name)  # also None and flags: another call gives something else
        if id(value) in self.known and not isinstance(value, PLAIN):
            return self.known[id(value)]
        if isinstance(value, torch.Size) or (isinstance(value, tuple) and type(value) is tuple):
            return tuple(self._written(v) for v in value)
        if type(value) is list:
            return [self._written(v) for v in value]
        if type(value) is dict:
            return {k: self._written(v) for k, v in value.items()}
        if type(value) is int and value > 1:
            return self._sized(value)
        if type(value) is float and value in self.numbers:
            return Own(self.numbers[value])
        if isinstance(value, PLAIN):
            return value
        what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise StepsError(f"{what} comes from outside the block")

    def _sized(self, value: int) -> Any:
        b, n = self.batch, self.length
        return {b * n: Size(1, 1), n: Size(0, 1), b: Size(1, 0)}.get(value, value)

    def _add(self, step: Step, out: Any) -> None:
        index = len(self.steps)
        self.steps.append(step)
        self._meet(out, Value, (index,), ())
        for value in self.known.values():
            if isinstance(value, Value) and value.step == index:
                found = _reach(out, value.path)
                if isinstance(found, Tensor):
                    self.shapes[value] = found.shape

    # -- parts ---------------------------------------------------------------------------------------------------------
    def opening(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.depth += 1
            if self.depth > 1:
                return
            own = list(inspect.signature(type(module).forward).parameters)[1:]
            passes = PROBE in kwargs
            kwargs = {k: v for k, v in kwargs.items() if k != PROBE}
            written = tuple(
                self._written(a, own[i] if i < len(own) else None) for i, a in enumerate(args)
            )  # fmt: skip
            self.pending = (path, written, {k: self._written(v, k) for k, v in kwargs.items()}, passes)

        return hook

    def closing(self, module: nn.Module, args: tuple, out: Any) -> None:
        self.depth -= 1
        if self.depth or self.pending is None:
            return
        path, written, kwargs, passes = self.pending
        self.pending = None
        heavy = any(p.dim() > 1 for p in module.parameters())
        self._add(Step(path, None, written, kwargs, passes=passes, heavy=heavy), out)

    # -- operations ----------------------------------------------------------------------------------------------------
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            out = func(*args, **kwargs)
            if isinstance(out, Tensor) and id(out) not in self.known:
                attribute = func.__self__.__name__
                self._add(Step(None, None, (self._written(args[0]),), {}, attribute=attribute), out)
            return out
        if name == "__setitem__":
            raise StepsError("the block writes into a tensor")
        written = tuple(map(self._late, args)), {k: self._late(v) for k, v in kwargs.items()}
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) or (isinstance(out, (tuple, list)) and any(isinstance(o, Tensor) for o in out)):
            for problem in _problems(written):
                raise problem
            heavy = name in ("linear", "matmul", "__matmul__", "__rmatmul__", "bmm", "addmm", "baddbmm", "einsum")
            self._add(Step(None, func, written[0], written[1], heavy=heavy), out)
        return out

    def _late(self, value: Any) -> Any:
        """As `_written`; what cannot be written matters only where the operation gives a tensor."""
        try:
            return self._written(value)
        except StepsError as problem:
            return problem


def _problems(value: Any) -> Iterator[StepsError]:
    if isinstance(value, StepsError):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _problems(part)
    elif isinstance(value, dict):
        yield from _problems(tuple(value.values()))


def _used(value: Any) -> Iterator[Value | Given]:
    if isinstance(value, (Value, Given)):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _used(part)
    elif isinstance(value, Mapping):
        yield from _used(tuple(value.values()))


def _cut(
    steps: tuple[Step, ...], recorder: _Recorder, attention: str | None, answer: Value
) -> tuple[int | None, Value | None]:
    """Where everything behind the attention is made of one tensor: the last such step before the MLP begins."""
    if attention is None:
        return None, None
    at = [i for i, s in enumerate(steps) if s.part is not None and f"{attention}.".startswith(f"{s.part}.")]
    if len(at) != 1:
        return None, None
    shape = torch.Size((recorder.batch, recorder.length, recorder.width))
    entering, best, middle = Given(recorder.entering), None, None
    for index in range(at[0], len(steps)):
        if best is not None and steps[index].heavy:
            break
        live = {
            used
            for step in steps[index + 1 :]
            for used in _used((step.args, step.kwargs))
            if used == entering or (isinstance(used, Value) and used.step <= index)
        }
        if answer.step <= index:
            live.add(answer)
        one = next(iter(live)) if len(live) == 1 else None
        if isinstance(one, Value) and recorder.shapes.get(one) == shape and _comes_from(one, at[0], steps):
            best, middle = index, one
    if best is None or not any(step.heavy for step in steps[best + 1 :]):
        return None, None  # they run side by side, or there is no MLP
    return best, middle


def _comes_from(value: Value, source: int, steps: tuple[Step, ...]) -> bool:
    if value.step == source:
        return True
    step = steps[value.step]
    return any(isinstance(used, Value) and _comes_from(used, source, steps) for used in _used((step.args, step.kwargs)))


__all__ = ["Given", "Own", "Size", "Step", "Steps", "StepsError", "Value", "bound", "named", "record", "stopping"]
