"""Between the vision tower and the language model: what the tower gave, where it stands in the prompt."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial, wraps
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ...adapters.clip_guide import Guide
from ...core import Reducer, Site, Tower, View, VisualReducer
from ...core.visual import acts_on_visual_rows
from ...core.visual.layout import Layout
from ...hosts import BlockRun, VisionLanguageHost
from ...hosts.twin_visual import shapes_of
from ...hosts.vision_language import Encoding, LayoutError, coordinates
from ...spec import text
from ..program import Bound, SessionError
from ..trace import Trace
from .blocks import BlockSite
from .cache_run import CacheRun, text_positions
from .compact_positions import CompactPositions
from .tower import TowerSite, watch
from .visual import VisualPrefill
from .visual_context import VisualContext

Positions = Literal["kept", "compact"]
PIXELS = ("pixel_values", "flattened_patches")  # how arguments with pictures begin


class BridgeSite:
    """A vision-language model whose visual tokens are reduced: inside its tower, before its language model or inside
    it; methods for text and for caches may stand beside.

    tower      methods inside the vision tower
    guide      an image-text model that tells how well a patch fits a question, see `fewer.Guide`
    positions  "kept": rows keep the position ids they had; "compact": they are numbered anew wherever some have left
    note       called with what the ledger should say
    """

    title = "vision tower"

    def __init__(
        self, bound: Bound, tower: TowerSite | None, guide: Guide | None, positions: Positions,
    ) -> None:  # fmt: skip
        assert isinstance(bound.host, VisionLanguageHost)
        self.bound, self.host, self.tower = bound, bound.host, tower
        self.guide, self.compact = guide, positions == "compact"
        self.answers: Tensor | None = None  # (B, S) bool, text that is to be learned: no method may read it
        self.drops = tower is not None
        self.note: Callable[[str], None] = lambda line: None
        looking = [m for m in bound.program.methods if isinstance(m, VisualReducer)]
        self._visual = self.drops or any(map(acts_on_visual_rows, bound.program.methods))
        self._blind = ""  # why methods on visual tokens left all of them, where they did
        depth = 0 if self.host.tower is None else len(self.host.tower.blocks)
        self._taps = tuple(t for m in looking for t in m.taps(depth))
        wanted = {layer for m in looking for layer in m.looks_at}
        self._looks_at = {self.host.used if layer is None else layer for layer in wanted}
        self._local = threading.local()

    @property
    def trace(self) -> Trace | None:
        """Of the tower's last pass, where methods act inside it."""
        return None if self.tower is None else self.tower.blocks.trace

    # -- on ------------------------------------------------------------------------------------------------------------
    def attach(self, undo: ExitStack) -> None:
        """Take part in the model's encoding and prompts until `undo` closes."""
        whole: Any = self.host.whole
        undo.callback(whole.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
        undo.callback(whole.register_forward_hook(self._leave, always_call=True).remove)
        if (projector := self.host.projector) is not None:
            undo.callback(projector.register_forward_pre_hook(self._before_projector, with_kwargs=True).remove)
            undo.callback(projector.register_forward_hook(self._behind_projector).remove)
        for kind in ("image", "video"):
            self._replace(whole, f"get_{kind}_features", partial(self._encode, kind), undo)
        self._replace(whole, "pack_image_features", self._pack, undo)
        if self.tower is not None:
            self.tower.attach(undo)
        elif (self._looks_at or self._taps) and self.host.tower is not None:
            watch(self.host.tower, {*self._looks_at, self.host.used}, self._taps, lambda: self._encoding, undo)

    @staticmethod
    def _replace(whole: Any, name: str, ours: Callable[..., Any], undo: ExitStack) -> None:
        """Stand in for a method of the model, where it has it; generate() reads its signature."""
        own = getattr(whole, name, None)
        if own is not None:
            whole.__dict__[name] = wraps(own)(partial(ours, own))
            undo.callback(whole.__dict__.pop, name, None)

    # -- called by the model ------------------------------------------------------------------------------------------
    def _enter(self, whole: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the whole model runs: remember what it was given, and what was encoded before."""
        given = self._local.given = _bound(type(whole).forward, (whole, *args), kwargs)
        before = given.get("mm_encoder_outputs") or {}
        self._local.encoded = {}
        for kind, output in before.items():
            if output is not None:
                self._local.encoded[kind] = getattr(output, "fewer", None)

    def _leave(self, whole: nn.Module, args: Any, output: Any) -> None:
        """Behind it: what the tower gave is not needed any more."""
        self._local.given, self._local.encoded, self._local.latest = None, {}, None

    def _encode(self, kind: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own encoding of images or videos, with an eye on what happens inside. What was seen travels with
        the output: generate() encodes long before it reads the prompt."""
        if getattr(self._local, "encoding", None) is not None:  # one kind encodes through the other
            return own(*args, **kwargs)
        encoding = self._local.encoding = self._local.latest = Encoding(kind, _bound(own, args, kwargs))
        try:
            output = own(*args, **kwargs)
        finally:
            self._local.encoding = None
        encoding.shapes = shapes_of(output)
        if not isinstance(output, (tuple, list, Tensor)):
            output.fewer = encoding
        if getattr(self._local, "given", None) is not None:
            self._local.encoded[kind] = encoding
        return output

    @property
    def _encoding(self) -> Encoding | None:
        return getattr(self._local, "encoding", None)

    def _before_projector(self, _projector: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        encoding = self._encoding or getattr(self._local, "latest", None)  # some project behind the encoding
        if encoding is not None and encoding.entered is None:
            encoding.entered = args[0] if args else next(iter(kwargs.values()))

    def _behind_projector(self, _projector: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        encoding = self._encoding
        return None if encoding is None or self.tower is None else self.tower.spread(encoding, output)

    def _pack(self, own: Callable[..., Any], image_features: Sequence[Tensor], image_sizes: Any, *args: Any,
              **kwargs: Any) -> Any:  # fmt: skip
        """The model's own packing of an image's tiles, and the same of their coordinates."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        made = own(image_features, image_sizes, *args, **kwargs)
        encoding, config = self._encoding, cast(Any, self.host.whole.config)
        if encoding is None:
            return made
        where = []
        for features, size in zip(image_features, image_sizes, strict=True):
            _, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
            where.append(coordinates(features.shape[0], features.shape[1], int(across)))
        if kwargs.get("image_newline") is not None:
            kwargs["image_newline"] = torch.full((4,), -1.0)
        encoding.packed, _ = own(where, image_sizes, *args, **kwargs)
        encoding.tiles = [len(features) for features in image_features]
        return made

    # -- called by the decoder ----------------------------------------------------------------------------------------
    def enter(self, run: CacheRun, given: dict[str, Any]) -> None:
        """A pass over the decoder begins: it is told of the visual rows in its prompt. given: the decoder's arguments,
        changed where the pass does something in the decoder's stead."""
        called = getattr(self._local, "given", None)
        if called is None:
            return
        mask = called.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and _other(run.given):
            run.given = mask  # the model made masks of its own from it, between pictures' rows
        if not run.site.between_blocks:
            return
        calls = list(self._local.encoded.values())
        if not calls:
            self._unseen(called)
            return
        if None in calls:
            raise LayoutError(
                "the images were encoded before this session was put on, so that it has not seen where their rows come "
                "from: encode them again, or pass pixel_values"
            )
        embeds: Tensor = given["inputs_embeds"]
        shape, real = (embeds.shape[0], embeds.shape[1]), run.real(embeds.shape[1])
        layout = self.host.layout(called, calls, shape, None if real is None else real.cpu(), embeds.device)
        if layout is None or shape[1] == 1:
            return
        run.context = self._context(layout, calls)
        deep, marked = given.get("deepstack_visual_embeds"), given.get("visual_pos_masks")
        if deep is not None and marked is not None:  # the pass adds them itself, to the rows that are left
            given["deepstack_visual_embeds"] = None
            run.context.deep = list(deep)
            run.context.deep_index = torch.where(marked, marked.reshape(-1).cumsum(0).view(shape) - 1, -1)

    def prefill(self, blocks: BlockSite, run: CacheRun, x: Tensor, kwargs: dict[str, Any]) -> BlockRun | None:
        """What runs in the decoder's blocks: a prompt with visual rows, or text behind one that was numbered anew; None
        for any other."""
        if x.shape[1] > 1 and run.context is not None:
            real, at_rope = run.real(x.shape[1]), text_positions(kwargs.get("position_ids"))
            run.prefill = VisualPrefill(
                blocks, x, run.at, real, at_rope, run.context, compact=self.compact, answers=self.answers
            )
            return run.prefill
        if self.compact and any(layer.shift is not None for layer in run.layers):
            return CompactPositions(self.host, run.layers)
        return None

    def _unseen(self, given: dict[str, Any]) -> None:
        """A prompt none of whose rows came from pictures that were encoded here: text, or rows merged before.

        Raises   LayoutError where pictures were given."""
        pictures = [n for n, v in given.items() if n.startswith(PIXELS) and v is not None]
        if self._visual and pictures:
            raise LayoutError(
                f"{self.host.title} was given {', '.join(pictures)} and encoded them in a way that was not seen, so "
                "that no visual rows could be reduced"
            )
        embeds = given.get("inputs_embeds")
        if self._visual and given.get("input_ids") is None and embeds is not None and embeds.shape[1] > 1:
            if not self._blind:
                self._blind = (
                    "the model was called with inputs_embeds, in which pictures' rows cannot be told from words: all "
                    "of them stayed; call it with input_ids and pixel_values"
                )
                warnings.warn(self._blind, stacklevel=2)
            self.note(self._blind)

    def _context(self, layout: Layout, calls: Sequence[Encoding]) -> VisualContext:
        dropped = [c for c in calls if c.present is not None and (c.share is None or c.share[0] < c.share[1])]
        if dropped and not layout.located:
            assert self.tower is not None
            first = text(self.tower.bound.program.methods[0])
            raise SessionError(
                f"{first} drops rows inside the vision tower, and {self.host.title} pools the frames of a video behind "
                "it: which rows of the prompt would go is not defined; choose a method that acts behind the tower, "
                "such as divprune"
            )
        if any(call.entered is None for call in calls):
            return VisualContext(layout)
        features = torch.cat([call.features.reshape(call.rows, -1) for call in self._joined(calls)])
        if len(calls) > 1:
            return VisualContext(layout, Tower(features, self._project, self.host.used))
        call, tower, prompts = calls[0], self.host.tower, layout.line.shape[0]
        if tower is None or self.host.joins:
            shown = Tower(features, self._project, self.host.used)
            return VisualContext(layout, shown, call.present, call.share, guide=partial(self._guided, shown, prompts))
        depth, out = len(tower.blocks), call.outputs.get(self.host.used)
        seen = {**call.seen, **{layer - depth: one for layer, one in call.seen.items()}}
        levels = {t: call.outputs[t % depth][:, tower.prefix :].flatten(0, 1) for t in self._taps}
        pixels = call.given.get("pixel_values")
        shown = Tower(
            features, self._project, self.host.used, seen, tower.prefix,
            out[:, 0] if out is not None and tower.has_cls else None, levels,
            pixels if isinstance(pixels, Tensor) and pixels.dim() == 4 else None,
        )  # fmt: skip
        return VisualContext(layout, shown, call.present, call.share, guide=partial(self._guided, shown, prompts))

    def _joined(self, calls: Sequence[Encoding]) -> list[Encoding]:
        """Where the projector itself joins patches: what entered it, joined."""
        takes = self.host.bridge.takes
        if takes == 1:
            return list(calls)
        return [replace(call, entered=call.features.reshape(call.features.shape[0] // takes, -1)) for call in calls]

    def _project(self, rows: Tensor) -> Tensor:
        """(R, M, C) -> (R, M, d), with the model's projector, no hook in between."""
        projector: Any = self.host.projector
        if (takes := self.host.bridge.takes) > 1:
            flat = rows.reshape(-1, rows.shape[-1] // takes)
            return projector.forward(flat).view(*rows.shape[:-1], -1)
        return projector.forward(rows)

    def _guided(self, tower: Tower, prompts: int, shown: View) -> tuple[Tensor, Tensor] | None:
        if self.guide is None or shown.source is None:
            return None
        asked = self.guide.question()
        if len(asked) != prompts:
            raise SessionError(f"{len(asked)} questions were asked for {prompts} prompts; ask one for each, in order")
        return self.guide.patches(tower.features[shown.source]), asked[shown.sample]

    def ask(self, questions: Sequence[str] | Tensor) -> None:
        """What the next prompts ask, one question each, for methods that compare patches with it through a guide."""
        if self.guide is None:
            raise SessionError("no guide reads questions here: give apply guide=fewer.Guide(clip, tokenizer)")
        self.guide.ask(questions)


def check(host: VisionLanguageHost, methods: Sequence[Reducer], positions: Positions) -> None:
    """Raises SessionError where methods cannot act on the visual tokens of a model, or not beside each other."""
    if positions not in get_args(Positions):
        raise SessionError(f"positions={positions!r}: choose {' or '.join(get_args(Positions))}")
    inside = [m for m in methods if in_tower(m)]
    behind = [m for m in methods if not in_tower(m)]
    if positions == "compact" and any(m.site is not Site.KV_CACHE and not acts_on_visual_rows(m) for m in behind):
        raise SessionError("positions='compact' numbers rows anew for methods on visual tokens only; leave it out")
    if positions == "compact" and host.rotary(0) is None:
        raise SessionError(f"{host.name} learns its positions, so rows cannot be numbered anew; leave it out")
    sighted = [m for m in methods if acts_on_visual_rows(m) or in_tower(m)]
    if sighted and host.bridge.why:
        raise SessionError(
            f"{text(sighted[0])} acts on visual tokens, and which rows of {host.title} are some is not known: "
            f"{host.bridge.why}; methods on its language model and its cache (lazyllm, snapkv) do act here"
        )
    if not inside:
        return
    first = text(inside[0])
    if host.joins:
        raise SessionError(
            f"{first} acts inside the vision tower, and {host.title} joins patches of its output to "
            "one row: which rows of the prompt would go is not defined; choose a method that acts behind the tower"
        )
    if not host.bridge.whole:
        raise SessionError(
            f"{first} acts inside the vision tower, and {host.title} does not project the rows of one of "
            "its blocks; choose a method that acts behind the tower"
        )
    if host.tower is None:
        raise SessionError(
            f"{first} needs to look into the vision tower of {host.title}, whose blocks cannot be entered; "
            "choose a method that looks at the projected tokens alone, such as divprune"
        )
    depth = len(host.tower.blocks)
    if any(isinstance(m, VisualReducer) and (m.looks_at or m.taps(depth)) for m in behind):
        raise SessionError(
            f"{first} changes the rows inside the vision tower that another method wants to look at; "
            "give apply one of them"
        )


def in_tower(method: Reducer) -> bool:
    """Whether a method acts inside the vision tower."""
    return not acts_on_visual_rows(method) and method.card.on == "vision"


def _bound(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    named = [p for p in inspect.signature(function).parameters if p != "kwargs"]
    return {**dict(zip(named, args, strict=False)), **kwargs}


def _other(mask: Any) -> bool:
    """Whether a mask is none of (samples, tokens)."""
    return mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2)
