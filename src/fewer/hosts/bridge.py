"""How pictures come into the prompt of a vision-language model, seen on a small random twin of it.

Two prompts with a picture each are read twice, with other pixels the second time: the rows that changed are visual. The
module whose output they are is the projector. A patch of pixels is changed: where the row that answers most is the one
at the same place, rows stand in their picture as cells of a grid.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fewer.compat import cache_argument

from . import remembered
from .attention import HostError
from .discovery import anatomy, classes_of, code_of, key_of
from .stacks import stacks
from .twin import TwinError, one_thread
from .twin_visual import NoExample, encodes, example, heights, rows_of, token_of, twins

CELLS = 6  # of a picture, tried for where they answer
SIZES = ("image_grid_thw", "image_grid_hw", "image_grid_hws", "spatial_shapes", "target_sizes", "image_sizes",
         "image_position_ids")  # fmt: skip


@dataclass(frozen=True)
class Bridge:
    """What was seen of a class.

    language   path of the decoder that reads the prompt
    projector  path of the module that makes each row by itself; None where none does
    takes      rows that enter it for one that leaves it
    joins      whether rows of the tower's output are joined before, or in it
    order      "kept": rows of the prompt are those that left the projector, in their order; "windows", "packed": those
               rules make them so; "": it is not known which is which
    place      "square", "sizes": where rows stand in a picture; "": not known
    sizes, unit    of "sizes": the argument that tells a picture's height and width, and how many of its units a row has
    frames     whether sizes begin with a number of frames
    tower      path of the vision tower's root; None where its blocks cannot be entered
    whole      whether what enters the projector is the output of one block of the tower
    why        why visual rows cannot be told from others; empty where they can
    """

    language: str
    projector: str | None = None
    takes: int = 1
    joins: bool = False
    order: str = ""
    place: str = ""
    sizes: str = ""
    unit: int = 1
    frames: bool = False
    tower: str | None = None
    whole: bool = False
    why: str = ""


_known: dict[tuple[str, tuple[int, ...]], Bridge | HostError] = {}


def bridge(whole: nn.Module) -> Bridge:
    """What is seen of a vision-language model's class; remembered per class and config.

    Raises   HostError where no decoder in it can be entered."""
    key = key_of(whole), code_of(whole)
    if key not in _known:
        found = remembered.read("bridge", key[0], classes_of(whole), (Bridge,))
        if found is None:
            try:
                with one_thread():
                    found = observe(whole)
                remembered.write("bridge", key[0], classes_of(whole), found)
            except HostError as error:
                found = error
        _known[key] = found
    known = _known[key]
    if isinstance(known, HostError):
        raise known.with_traceback(None)
    return known


def readers(whole: nn.Module) -> list[Any]:
    """Stacks inside a model whose root may read its prompt: they take a cache and features instead of words."""
    return [
        stack
        for stack in stacks(whole)
        if stack.root is not whole
        and cache_argument(type(stack.root).forward) is not None
        and "inputs_embeds" in inspect.signature(type(stack.root).forward).parameters
    ]


def observe(whole: nn.Module) -> Bridge:
    """The same, anew. What fails on the twin leaves what is known without it: the decoder."""
    name = type(whole).__name__
    named = {stack.path: stack for stack in readers(whole)}
    if not named:
        raise HostError(f"{name} has no decoder inside that reads its prompt as features")
    why = ""
    try:
        for twin in twins(whole):
            try:
                return _Trial(twin, example(twin), list(named)).bridge()
            except NoExample as error:
                why = why or str(error)
    except (TwinError, HostError) as error:
        why = why or str(error)
    except Exception as error:  # whatever a stranger's code raises
        why = f"a small twin of it ended in {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return Bridge(_likely(whole, named), tower=_tower(whole, named), why=why)


def _likely(whole: nn.Module, named: Mapping[str, Any]) -> str:
    """Of several decoders the one that the model says is its own, else the one that can be entered, else the first."""
    decoder = getattr(whole, "get_decoder", lambda: None)()
    for path, stack in named.items():
        if stack.root is decoder or (decoder is not None and any(m is stack.root for m in decoder.modules())):
            return path
    for path, stack in named.items():
        try:
            if anatomy(stack).kind == "decoder":
                return path
        except HostError:
            continue
    return next(iter(named))


def _tower(whole: nn.Module, named: Mapping[str, Any]) -> str | None:
    """Path of the first root inside whose blocks hand on patches; None where there is none."""
    for stack in stacks(whole):
        if stack.root is whole or stack.path in named:
            continue
        try:
            if anatomy(stack).kind == "vision":
                return stack.path
        except HostError:
            continue
    return None


@dataclass(eq=False)
class _Event:
    """A module's call. entered: its first argument, if that is a tensor."""

    path: str
    module: nn.Module
    entered: Any
    out: Tensor


class _Trial:
    """A twin, prompts with pictures, and what happened when they were read."""

    def __init__(self, twin: nn.Module, given: dict[str, Any], languages: Sequence[str]) -> None:
        self.twin, self.given, self.languages = twin, given, languages
        self.name = type(twin).__name__
        self.pixels = next(n for n in given if n.startswith(("pixel", "flattened")))

    def bridge(self) -> Bridge:
        language, embeds, events = self.read(self.given)
        _, others, _ = self.read({**self.given, self.pixels: self._changed(self.given[self.pixels])})
        if others.shape != embeds.shape:
            raise HostError(f"{self.name} reads prompts of another length for other pictures of the same size")
        visual = (embeds != others).any(-1)
        marked = self._marked()
        if not bool(visual.any()):
            raise HostError(
                f"no row that enters the language model of {self.name} changes with the pictures: its blocks look at "
                "them by cross-attention, or read them by themselves"
            )
        if embeds.shape[:2] != marked.shape or bool((visual & ~marked).any()):
            raise HostError(f"{self.name} puts rows of pictures elsewhere than in the place of their placeholders")
        rows = embeds[marked]
        tower = _tower(self.twin, {path: None for path in self.languages})
        event, order = self._projector(rows, events)
        place, sizes, unit, frames = self._place()
        if event is None:
            return Bridge(language, joins=True, place=place, sizes=sizes, unit=unit, frames=frames, tower=tower)
        takes = event.entered.shape[:-1].numel() // event.out.shape[:-1].numel()
        patches = None if tower is None else self._patches(tower, events)
        joins = takes > 1 or patches is None or patches[0] != event.entered.shape[:-1].numel()
        whole = not joins and patches is not None and patches[1] == event.entered.shape[-1]
        return Bridge(
            language, event.path, takes, joins, order, place, sizes, unit, frames, tower, whole,
        )  # fmt: skip

    def read(self, given: Mapping[str, Any]) -> tuple[str, Tensor, list[_Event]]:
        """What entered the decoder (its path and the features), and what the modules before it gave."""
        caught: list[tuple[str, Tensor]] = []
        events: list[_Event] = []

        def entering(path: str) -> Any:
            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                named = [p for p in inspect.signature(type(module).forward).parameters][1:]
                x = {**dict(zip(named, args, strict=False)), **kwargs}.get("inputs_embeds")
                if isinstance(x, Tensor) and x.dim() == 3 and not caught:
                    caught.append((path, x))

            return hook

        def behind(path: str) -> Any:
            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
                out = out[0] if isinstance(out, tuple) and out else out
                if isinstance(out, Tensor) and out.is_floating_point() and not caught:
                    entered = args[0] if args else next(iter(kwargs.values()), None)
                    events.append(_Event(path, module, entered, out))

            return hook

        with ExitStack() as undo, torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for path, module in self.twin.named_modules():
                if path in self.languages:
                    undo.callback(module.register_forward_pre_hook(entering(path), with_kwargs=True).remove)
                elif path and not any(path.startswith(f"{p}.") for p in self.languages):
                    undo.callback(module.register_forward_hook(behind(path), with_kwargs=True).remove)
            self.twin(**given)
        if not caught:
            raise HostError(f"no decoder inside {self.name} was given the prompt as features")
        return *caught[0], events

    def _changed(self, pixels: Tensor) -> Tensor:
        source = torch.Generator().manual_seed(9)
        noise = torch.randn(pixels.shape, generator=source)
        if self.pixels.startswith("flattened"):  # rows begin with their place
            noise[..., :2] = pixels[..., :2]
        return noise

    def _marked(self) -> Tensor:
        """(B, S) bool: the placeholders of the prompts."""
        if "image_embeds_position_mask" in self.given:
            return self.given["image_embeds_position_mask"].bool()
        return self.given["input_ids"] == token_of(self.twin.config)

    # -- the projector -------------------------------------------------------------------------------------------------
    def _projector(self, rows: Tensor, events: Sequence[_Event]) -> tuple[_Event | None, str]:
        """The outermost module that makes the rows of the prompt one by one, and how they are ordered. rows: (V, d)."""
        packs = hasattr(self.twin, "pack_image_features")
        for order in ("kept", "packed" if packs else "windows"):
            for event in sorted(events, key=lambda e: e.path.count(".")):
                if self._matches(rows, event.out, order) and self._rowwise(event):
                    return event, order
        return None, ""

    def _matches(self, rows: Tensor, out: Tensor, order: str) -> bool:
        made = out.reshape(-1, out.shape[-1])
        if made.shape[-1] != rows.shape[-1]:
            return False
        if order == "kept":
            return made.shape == rows.shape and torch.equal(made, rows)
        if order == "windows":
            index = windows(self.twin, self.given)
            return made.shape == rows.shape and index is not None and torch.equal(made[index], rows)
        same = (rows[:, None] == made[None]).all(-1).any(-1)
        return bool(same.float().mean() > 0.5)

    @staticmethod
    def _rowwise(event: _Event) -> bool:
        """Whether a module makes each row of one row, or of some that stand together, whatever stands beside."""
        entered, out = event.entered, event.out
        if not isinstance(entered, Tensor) or entered.dim() < 2 or not entered.is_floating_point():
            return False
        have, made = entered.shape[:-1].numel(), out.shape[:-1].numel()
        if have % made or (have != made and entered.dim() != 2):
            return False
        takes = have // made
        flat = entered.reshape(made, takes, -1).flip(0).reshape(-1, entered.shape[-1])
        try:
            with torch.no_grad():
                again = event.module.forward(flat if takes > 1 or entered.dim() == 2 else flat[None])
        except Exception:  # it wants to know more than the rows
            return False
        if not isinstance(again, Tensor):
            return False
        return torch.allclose(again.reshape(made, -1), out.reshape(made, -1).flip(0), atol=1e-4, rtol=1e-4)

    def _patches(self, tower: str, events: Sequence[_Event]) -> tuple[int, int] | None:
        """Rows and channels of what the tower's blocks hand on, without its prefix."""
        stack = next(s for s in stacks(self.twin) if s.path == tower)
        blocks = {f"{tower}.{path}" for path in stack.blocks}
        out = next((e.out for e in reversed(events) if e.path in blocks and e.out.dim() == 3), None)
        return None if out is None else (out.shape[0] * (out.shape[1] - anatomy(stack).prefix), out.shape[2])

    # -- where rows stand ----------------------------------------------------------------------------------------------
    def _rows(self, pixels: Tensor) -> list[Tensor]:
        own = inspect.signature(encodes(self.twin)).parameters
        form = {k: v for k, v in {**self.given, self.pixels: pixels}.items() if k in own}
        form |= {"return_dict": True} if "kwargs" in own or "return_dict" in own else {}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return rows_of(encodes(self.twin)(**form))

    def _place(self) -> tuple[str, str, int, bool]:
        """Where rows stand in their picture, tried: (place, sizes, unit, frames)."""
        pixels = self.given[self.pixels]
        plain = torch.cat(self._rows(pixels))
        for name in (n for n in SIZES if isinstance(self.given.get(n), Tensor)):
            sizes = heights(self.given[name])
            areas = [math.prod(s) for s in sizes.tolist()]
            unit = math.isqrt(sum(areas) // len(plain)) if len(plain) else 0
            frames = sizes.shape[1] == 3
            if unit and all(s % unit == 0 for size in sizes[:, -2:].tolist() for s in size):
                grid = [(s[-2] // unit, s[-1] // unit) for s in sizes.tolist()]
                if sum(h * w for h, w in grid) == len(plain) and self._answers(plain, pixels, grid, unit):
                    return "sizes", name, unit, frames
        own = self._rows(pixels)
        sides = {math.isqrt(len(x)) for x in own}
        if len(sides) == 1 and all(len(x) == math.isqrt(len(x)) ** 2 for x in own) and pixels.dim() >= 4:
            side = sides.pop()
            if self._answers(plain, pixels, [(side, side)] * len(own), pixels.shape[-1] // side):
                return "square", "", 1, False
        return "", "", 1, False

    def _answers(self, plain: Tensor, pixels: Tensor, grids: Sequence[tuple[int, int]], unit: int) -> bool:
        """Whether pixels changed at a cell change the row most that should stand there. plain: (V, d)."""
        for spots in self._spots(pixels, grids, unit):
            right = tried = 0
            cells = [(i, r, c) for i, (h, w) in enumerate(grids) for r in range(h) for c in range(w)]
            step = max(1, len(cells) // CELLS)
            for number in range(0, len(cells), step):
                changed = pixels.clone()
                where = spots(*cells[number])
                if where is None:
                    continue
                changed[where] = self._changed(pixels)[where]
                moved = torch.cat(self._rows(changed))
                if moved.shape != plain.shape:
                    continue
                right += int((moved - plain).norm(dim=-1).argmax()) == number
                tried += 1
            if tried and right >= 0.8 * tried:
                return True
        return False

    def _spots(self, pixels: Tensor, grids: Sequence[tuple[int, int]], unit: int) -> Iterator[Any]:
        """Ways in which the pixels of a cell may be named: (picture, row, column) -> index."""
        starts = [sum(h * w for h, w in grids[:i]) for i in range(len(grids))]

        def block(i: int, r: int, c: int) -> Any:  # merged patches stand together
            first = (starts[i] + r * grids[i][1] + c) * unit**2
            return (Ellipsis, slice(first, first + unit**2), slice(None)) if pixels.dim() < 4 else slice(
                first, first + unit**2)  # fmt: skip

        def raster(i: int, r: int, c: int) -> Any:  # patches stand row by row, a line per picture
            width = grids[i][1] * unit
            rows = [y * width + x for y in range(r * unit, (r + 1) * unit) for x in range(c * unit, (c + 1) * unit)]
            return (i, rows) if pixels.dim() == 3 and len(pixels) == len(grids) else None

        def image(i: int, r: int, c: int) -> Any:
            flat = pixels.shape[:-3].numel()
            if flat != len(grids):
                return None
            lead = torch.zeros(flat, dtype=torch.long)
            lead[i] = 1
            at = tuple(int(x[0]) for x in lead.view(pixels.shape[:-3]).nonzero(as_tuple=True))
            return (*at, slice(None), slice(r * unit, (r + 1) * unit), slice(c * unit, (c + 1) * unit))

        if pixels.dim() >= 4 and self.given.get("image_grid_thw") is None:
            yield image
        else:
            yield block
            yield raster


def windows(whole: nn.Module, given: Mapping[str, Any], key: str = "image_grid_thw") -> Tensor | None:
    """Where each merged patch stands in a tower that sorts patches by window; None where it does not."""
    sorts = ("fullatt_block_indexes", "window_size", "spatial_merge_size", "patch_size")
    tower: Any = next((m for m in whole.modules() if all(hasattr(m, n) for n in sorts)), None)
    if tower is None or given.get(key) is None:
        return None
    from transformers.vision_utils import get_vision_window_index

    index, _ = get_vision_window_index(
        torch.as_tensor(given[key]).cpu(), spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size,
        patch_size=tower.patch_size,
    )  # fmt: skip
    return torch.as_tensor(index).argsort()


def part(module: nn.Module, path: str) -> nn.Module:
    return attrgetter(path)(module) if path else module


__all__ = ["Bridge", "bridge", "observe", "part", "readers", "windows"]
