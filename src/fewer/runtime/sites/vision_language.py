"""Sessions on vision-language models: what the vision tower gave, where it stands in the prompt, who looks at it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ...adapters.clip_guide import Guide
from ...core import Reducer, Site, Tower, View, VisualReducer
from ...core.visual import acts_on_visual_rows
from ...core.visual.layout import Layout
from ...hosts import BlockRun, Host, VisionLanguageHost, under
from ...hosts.twin_visual import shapes_of
from ...hosts.vision_language import Encoding, LayoutError, coordinates
from ...spec import text
from .. import session
from ..modules import divided
from ..program import Execution, SessionError, check_free
from .cache_pass import CacheRun
from .cache_pass import _text_positions as text_positions
from .compact_positions import CompactPositions
from .kv_cache import CacheSession
from .tower import TowerRecorder
from .visual import VisualPrefill
from .visual_context import VisualContext

Positions = Literal["kept", "compact"]
PIXELS = ("pixel_values", "flattened_patches")  # how arguments with pictures begin


class SeeingSession(CacheSession):
    """A vision-language model whose visual tokens are reduced: inside its tower, before its language model or inside
    it; methods for text and for caches may stand beside. Use it as a context manager, or call `remove()`.

    guide      an image-text model that tells how well a patch fits a question, see `fewer.Guide`
    positions  "kept": rows keep the position ids they had; "compact": they are numbered anew wherever some have left
    """

    host: VisionLanguageHost

    def __init__(
        self, model: nn.Module, methods: Sequence[Reducer], execution: Execution, host: VisionLanguageHost,
        modules: nn.Module | str | Path | None = None, guide: Guide | None = None, positions: Positions = "kept",
    ) -> None:  # fmt: skip
        inside = [m for m in methods if in_tower(m)]
        towers, modules = divided(modules, [in_tower(m) for m in methods])
        super().__init__(model, [m for m in methods if not in_tower(m)], execution, host, modules)
        self.guide, self.compact = guide, positions == "compact"
        if positions not in get_args(Positions):
            raise SessionError(f"positions={positions!r}: choose {' or '.join(get_args(Positions))}")
        if self.compact and any(m.site is not Site.KV_CACHE and not acts_on_visual_rows(m) for m in self.methods):
            raise SessionError("positions='compact' numbers rows anew for methods on visual tokens only; leave it out")
        if self.compact and self.rotary(0) is None:
            raise SessionError(f"{host.name} learns its positions, so rows cannot be numbered anew; leave it out")
        self.answers: Tensor | None = None  # (B, S) bool, text that is to be learned: no method may read it
        self.inside = self.inside or bool(inside)
        self._blind = ""  # why methods on visual tokens left all of them, where they did
        sighted = [m for m in methods if acts_on_visual_rows(m) or in_tower(m)]
        if sighted and host.bridge.why:
            raise SessionError(
                f"{text(sighted[0])} acts on visual tokens, and which rows of {host.title} are some is not known: "
                f"{host.bridge.why}; methods on its language model and its cache (lazyllm, snapkv) do act here"
            )
        self._visual = bool(sighted)
        self.tower: session.Session | None = None  # of the methods inside the vision tower
        depth = 0 if self._tower_host is None else len(self._tower_host.blocks)
        self._taps = tuple(t for m in self.methods if isinstance(m, VisualReducer) for t in m.taps(depth))
        wanted = {layer for m in self.methods if isinstance(m, VisualReducer) for layer in m.looks_at}
        self._looks = {host.used if layer is None else layer for layer in wanted}
        if inside and host.joins:
            raise SessionError(
                f"{text(inside[0])} acts inside the vision tower, and {host.title} joins patches of its output to "
                "one row: which rows of the prompt would go is not defined; choose a method that acts behind the tower"
            )
        if inside and not host.bridge.whole:
            raise SessionError(
                f"{text(inside[0])} acts inside the vision tower, and {host.title} does not project the rows of one of "
                "its blocks; choose a method that acts behind the tower"
            )
        if depth and (deep := [layer for layer in (*self._looks, *self._taps) if not -depth <= layer < depth]):
            seeing = (m for m in self.methods if isinstance(m, VisualReducer))
            first = next(m for m in seeing if deep[0] in (*m.looks_at, *m.taps(depth)))
            raise SessionError(
                f"{text(first)} looks at block {deep[0]} of the vision tower, which has {depth} (0 to {depth - 1})"
            )
        curious = [*inside, *(m for m in self.methods if isinstance(m, VisualReducer) and (m.looks_at or m.taps(1)))]
        if curious and self._tower_host is None:
            who = curious[0]
            raise SessionError(
                f"{text(who)} needs to look into the vision tower of {host.title}, whose blocks cannot be entered; "
                "choose a method that looks at the projected tokens alone, such as divprune"
            )
        if inside and (wanted or self._taps):
            raise SessionError(
                f"{text(inside[0])} changes the rows inside the vision tower that another method wants to look at; "
                "give apply one of them"
            )
        if inside:
            assert self._tower_host is not None and host.tower_module is not None
            self.tower = session.Session(host.tower_module, inside, "padded", self._tower_host, towers)

    @cached_property
    def _tower_host(self) -> Host | None:
        return self.host.tower

    def _attach(self) -> None:
        super()._attach()
        with ExitStack() as undo:
            whole: Any = self.host.whole
            undo.callback(self._undo.close)
            undo.callback(whole.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            undo.callback(whole.register_forward_hook(self._leave, always_call=True).remove)
            if (projector := self.host.projector) is not None:
                before = self._before_projector
                undo.callback(projector.register_forward_pre_hook(before, with_kwargs=True).remove)
                undo.callback(projector.register_forward_hook(self._behind_projector).remove)
            for kind in ("image", "video"):
                self._replace(whole, f"get_{kind}_features", partial(self._encode, kind), undo)
            self._replace(whole, "pack_image_features", self._pack, undo)
            if self.tower is not None:
                self.tower._attach()
                undo.callback(self.tower.remove)
            elif self._looks or self._taps:
                self._watch(undo)
            self._undo = undo.pop_all()

    @staticmethod
    def _replace(whole: Any, name: str, ours: Callable[..., Any], undo: ExitStack) -> None:
        """Stand in for a method of the model, where it has it; generate() reads its signature."""
        own = getattr(whole, name, None)
        if own is not None:
            whole.__dict__[name] = wraps(own)(partial(ours, own))
            undo.callback(whole.__dict__.pop, name, None)

    def _watch(self, undo: ExitStack) -> None:
        """Run the tower's blocks that somebody looks at from their parts."""
        tower = self._tower_host
        assert tower is not None
        depth = len(tower.blocks)
        self._looks = {layer % depth for layer in self._looks} | {self.host.used}
        watched = self._looks | {t % depth for t in self._taps}
        tower.attach(lambda layer: partial(self._look, tower, layer), undo, watched)

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

    def _look(self, tower: Host, layer: int, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Any, ...]]:
        kwargs |= dict(zip(tower.arguments, args, strict=False))
        mask = None if tower.found.mask is None else kwargs.pop(tower.found.mask, None)
        encoding = self._encoding or Encoding("image", {})
        visit = TowerRecorder(encoding.seen, encoding.outputs, layer in self._looks)
        return tower.run(layer, x, mask, kwargs, visit)

    def _before_projector(self, _projector: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        encoding = self._encoding or getattr(self._local, "latest", None)  # some project behind the encoding
        if encoding is not None and encoding.entered is None:
            encoding.entered = args[0] if args else next(iter(kwargs.values()))

    def _behind_projector(self, _projector: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """What left the tower shorter gets its rows back, empty ones between: the model counts them."""
        encoding = self._encoding
        if encoding is None or self.tower is None:
            return None
        ran, used = self.tower.last, self.host.used
        kept = ran.kept(used)[:, self._prefix :] - ran.first.prefix
        if kept.shape[1] != output.shape[1]:
            raise SessionError(
                f"the projector got {output.shape[1]} rows, the tower's block {used} left {kept.shape[1]}: methods "
                "inside the tower are known for models that project the output of one block"
            )
        full = ran.first.n - ran.first.prefix
        slot = torch.where(kept < 0, full, kept)

        def spread(x: Tensor) -> Tensor:
            rows = x.new_zeros(x.shape[0], full + 1, x.shape[2])
            return rows.scatter(1, slot[..., None].expand_as(x), x)[:, :-1]

        present = torch.zeros(output.shape[0], full + 1, dtype=torch.bool, device=output.device)
        encoding.present = present.scatter(1, slot, True)[:, :-1].reshape(-1)
        encoding.share = (kept.shape[1], full) if ran.tokens.valid is None else None
        encoding.entered = spread(encoding.features)
        return spread(output)

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
    def _open(self, root: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        deep, marked = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
        args, kwargs = super()._open(root, args, kwargs)
        run, given = under.run, getattr(self._local, "given", None)
        if not isinstance(run, CacheRun) or given is None:
            return args, kwargs
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and _other(run.given):
            run.given = mask  # the model made masks of its own from it, between pictures' rows
        if not self.inside:
            return args, kwargs
        calls = list(self._local.encoded.values())
        if not calls:
            self._unseen(given, kwargs)
            return args, kwargs
        if None in calls:
            raise LayoutError(
                "the images were encoded before this session was put on, so that it has not seen where their rows come "
                "from: encode them again, or pass pixel_values"
            )
        embeds: Tensor = kwargs["inputs_embeds"]
        shape, real = (embeds.shape[0], embeds.shape[1]), run.real(embeds.shape[1])
        layout = self.host.layout(given, calls, shape, None if real is None else real.cpu(), embeds.device)
        if layout is None or shape[1] == 1:
            return args, kwargs
        run.sight = self._sight(layout, calls)
        if deep is not None and marked is not None:  # the pass adds them itself, to the rows that are left
            kwargs["deepstack_visual_embeds"] = None
            run.sight.deep = list(deep)
            run.sight.deep_index = torch.where(marked, marked.reshape(-1).cumsum(0).view(shape) - 1, -1)
        return args, kwargs

    def _unseen(self, given: dict[str, Any], kwargs: dict[str, Any]) -> None:
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

    def _sight(self, layout: Layout, calls: Sequence[Encoding]) -> VisualContext:
        dropped = [c for c in calls if c.present is not None and (c.share is None or c.share[0] < c.share[1])]
        if dropped and not layout.located:
            assert self.tower is not None
            raise SessionError(
                f"{text(self.tower.methods[0])} drops rows inside the vision tower, and {self.host.title} pools "
                "the frames of a video behind it: which rows of the prompt would go is not defined; choose a method "
                "that acts behind the tower, such as divprune"
            )
        if any(call.entered is None for call in calls):
            return VisualContext(layout)
        features = torch.cat([call.features.reshape(call.rows, -1) for call in self._joined(calls)])
        if len(calls) > 1:
            return VisualContext(layout, Tower(features, self._project, self.host.used))
        call, tower, prompts = calls[0], self._tower_host, layout.line.shape[0]
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

    def _visit(self, layer: int, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> BlockRun | None:
        run = under.run
        assert isinstance(run, CacheRun)
        if layer == 0 and x.shape[1] > 1 and run.sight is not None:
            real, at_rope = run.real(x.shape[1]), text_positions(kwargs.get("position_ids"))
            run.reading = VisualPrefill(self, x, run.layers, real, at_rope, run.sight, run.at)
            return run.reading
        if self.compact and run.layers and any(layer.shift is not None for layer in run.layers):
            if layer == 0:
                run.visit = CompactPositions(self, run.layers)
            return run.reading or run.visit
        return super()._visit(layer, x, mask, kwargs)

    @property
    def _prefix(self) -> int:
        """Rows in front of the patches that are cut off before the projector."""
        tower = self._tower_host
        cut = getattr(self.host.whole.config, "vision_feature_select_strategy", "full") == "default"
        return tower.prefix if tower is not None and cut else 0

    # -- what can be read afterwards ----------------------------------------------------------------------------------
    @property
    def layout(self) -> Layout:
        """Where the visual rows of the last prompts stood."""
        return self._looking.sight.layout

    @property
    def _looking(self) -> VisualPrefill:
        if not isinstance(self.last, VisualPrefill):
            raise SessionError("the last prompt held no visual rows")
        return self.last

    def seen(self, layer: int = -1) -> Tensor:
        """(B, S) bool: the visual rows of the last prompts that are left after a block; -1 is the last block's."""
        run = self._looking
        kept = run.kept(range(len(self.host.blocks))[layer])
        b, s = run.first.batch, run.first.n
        left = torch.zeros(b, s + 1, dtype=torch.bool, device=kept.device)
        left = left.scatter(1, torch.where(kept < 0, s, kept), True)[:, :-1]
        return left & run.sight.layout.visual

    @property
    def visual_counts(self) -> list[float]:
        """Visual rows after each block, averaged over the prompts (synchronises)."""
        return [self.seen(layer).sum(-1).float().mean().item() for layer in range(len(self.host.blocks))]

    def report(self) -> str:
        """The last prompt and its cache in words; first the methods inside the tower, and what is left to see."""
        inside = [] if self.tower is None else [text(m) for m in self.tower.methods]
        first, *rest = super().report().split("\n")
        seen = []
        if isinstance(self._latest, VisualPrefill):
            counts = " ".join(f"{c:g}" for c in (round(x, 1) for x in self.visual_counts))
            mean = sum(self.layout.counts) / max(self._latest.first.batch, 1)
            seen = [f"visual rows {mean:g} -> {counts}"]
        return "\n".join([" ".join([*inside, *filter(None, [first])]), *seen, *rest])


def _bound(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    named = [p for p in inspect.signature(function).parameters if p != "kwargs"]
    return {**dict(zip(named, args, strict=False)), **kwargs}


def _other(mask: Any) -> bool:
    """Whether a mask is none of (samples, tokens)."""
    return mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2)


def in_tower(method: Reducer) -> bool:
    return not acts_on_visual_rows(method) and method.card.on == "vision"


def start(
    model: nn.Module, methods: Sequence[Reducer], execution: Execution, modules: nn.Module | str | Path | None,
    host: VisionLanguageHost, guide: Guide | None, positions: Positions = "kept",
) -> SeeingSession:  # fmt: skip
    """Put methods into a vision-language model; `fewer.apply` says what the arguments are and what is raised."""
    check_free(host)
    if execution == "packed":
        raise SessionError("a decoder's cache does not take packed rows; use execution='padded'")
    opened = SeeingSession(model, methods, execution, host, modules, guide, positions)
    opened._attach()
    return opened
