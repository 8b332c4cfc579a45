"""Which methods act where in a model, with which modules, and what may stand beside what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from torch import nn

from ..core import Reducer, Site
from ..core.cache import CacheReducer, Ranker, Rereader
from ..core.learned import Modules
from ..core.visual import VisualReducer, acts_on_visual_rows
from ..hosts import DecoderHost, Host, HostError, VisionLanguageHost
from ..spec import text

Execution = Literal["padded", "packed", "masked"]


class SessionError(RuntimeError):
    """A session cannot be started, or has nothing to show yet."""


class Turn(NamedTuple):
    """One method's turn at one site: its number, the number of this stage, and of how many."""

    method: int
    stage: int
    stages: int


@dataclass(frozen=True, eq=False)
class Program:
    """What is to happen in a stack of blocks and its cache.

    methods    the reducers, in the order they act at a shared site
    execution  "padded": samples with different counts are padded and masked; "packed": they are laid end to end and
               no padding is computed; "masked": all rows stay and the dropped ones are masked (the training form)
    turns      by site and block
    stages     of each method: at how many blocks it acts
    """

    methods: tuple[Reducer, ...]
    execution: Execution
    turns: Mapping[tuple[Site, int], tuple[Turn, ...]]
    stages: tuple[int, ...]

    @classmethod
    def of(cls, methods: Sequence[Reducer], execution: Execution, host: Host) -> Program:
        """Raises   SessionError, HostError where a method cannot act here, or not beside another."""
        turns: dict[tuple[Site, int], tuple[Turn, ...]] = {}
        stages = []
        for index, method in enumerate(methods):
            layers = _layers(method, host)
            for stage, layer in enumerate(layers):
                turns[method.site, layer] = (*turns.get((method.site, layer), ()), Turn(index, stage, len(layers)))
            stages.append(len(layers))
        program = cls(tuple(methods), execution, turns, tuple(stages))
        for rule in RULES:
            if why := rule(program, host):
                raise SessionError(why)
        return program

    def at(self, site: Site, layer: int) -> tuple[Turn, ...]:
        """Who acts there, in order."""
        return self.turns.get((site, layer), ())

    def looks_on(self, layer: int) -> bool:
        """Whether some method looks at this block's attention."""
        return bool(self.at(Site.MID_BLOCK, layer) or self.at(Site.AFTER_BLOCK, layer))

    # -- of the KV cache -----------------------------------------------------------------------------------------------
    @cached_property
    def on_cache(self) -> tuple[CacheReducer, ...]:
        """The methods on the KV cache."""
        return tuple(m for m in self.methods if isinstance(m, CacheReducer))

    @cached_property
    def between_blocks(self) -> bool:
        """Whether some method acts elsewhere than on the KV cache."""
        return any(m.site is not Site.KV_CACHE for m in self.methods)

    @cached_property
    def revives(self) -> bool:
        return any(m.revives for m in self.methods)

    @cached_property
    def gates(self) -> bool:
        return any(m.gates for m in self.on_cache)

    @cached_property
    def rereads(self) -> bool:
        return any(isinstance(m, Rereader) for m in self.on_cache)

    @cached_property
    def steady(self) -> bool:
        """Whether no method has to do with the rows of a decoding step."""
        return not any(m.decodes or m.accumulates or m.reads or m.codec is not None for m in self.on_cache)

    @cached_property
    def unordered(self) -> bool:
        """Whether rows may lie in any order while tokens are written: the only method on the cache does not mind."""
        return len(self.on_cache) == 1 and isinstance(self.on_cache[0], Ranker) and self.on_cache[0].decodes

    @cached_property
    def weighs(self) -> bool:
        """Whether that method needs the probabilities of a decoding step's attention."""
        return self.unordered and isinstance(self.on_cache[0], Ranker) and self.on_cache[0].weighs


@dataclass(eq=False)
class Bound:
    """A program and the model it acts in: what all sites of a session share.

    modules   the methods' trained modules, one nn.ModuleList each
    guide     a model that knows more about which tokens matter, for methods that ask; not a part of the model
    mask_eps  what a learned mask leaves of hidden tokens, see `masked_attention`
    """

    model: nn.Module
    host: Host
    program: Program
    modules: Modules
    mask_eps: float = 1e-6
    guide: Any = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SessionError(
            "a model with a session on cannot be pickled, nor a part of it copied: call session.remove() first, keep "
            "it with model.save_pretrained(folder), or copy.deepcopy the model that apply was given"
        )

    @property
    def training(self) -> bool:
        """Whether trained methods take their training form."""
        return self.model.training

    def modules_of(self, method: int, stage: int) -> nn.ModuleDict:
        """The trained modules of a method at a stage."""
        own = self.modules[method]
        if not len(own):
            return nn.ModuleDict()
        mine = own[stage % len(own)]
        return mine if mine.training == self.training else mine.train(self.training)


def _layers(method: Reducer, host: Host) -> tuple[int, ...]:
    """The blocks where a method acts in a model. Raises SessionError, HostError where it cannot."""
    depth, said = host.depth(method.site), text(method)
    layers = method.acts_at(depth) if method.site.in_blocks else (0,)
    whole = host if isinstance(host, VisionLanguageHost) and acts_on_visual_rows(method) else None
    if method.needs_cls and not (host.has_cls if whole is None else whole.tower_has_cls):
        raise SessionError(
            f"{said} ranks tokens by the class token's attention, and {host.name} has none; "
            "choose a method that does without, such as tome or evit"
        )
    if method.across and host.kind != "cross":
        raise SessionError(
            f"{said} ranks what another sequence looks at, and {host.name} looks at itself; "
            "apply it to a text encoder with cross-attention, such as BLIP's model.text_encoder"
        )
    if list(layers) != sorted(set(layers)):
        raise SessionError(f"{said}: name each block once, in ascending order, in layers=")
    if any(layer < 0 or layer >= depth for layer in layers):
        raise SessionError(
            f"{said} acts at layers {'+'.join(map(str, layers))}, but the model has {depth} blocks "
            f"(0 to {depth - 1}); pass layers="
        )
    for layer in layers if method.site is Site.MID_BLOCK else ():
        if who := host.replaced(layer):
            raise HostError(
                f"{said} acts between attention and MLP, but the forward of block {layer} was replaced "
                f"by {who}, which cannot be stopped there; put the block's own back (del block.forward), name "
                "other blocks in layers=, or choose a method that acts before or behind a block"
            )
    return layers


# -- what may stand beside what ----------------------------------------------------------------------------------------
def _packed_rows(program: Program, host: Host) -> str | None:
    if program.execution != "packed":
        return None
    if isinstance(host, DecoderHost):
        return "a decoder's cache does not take packed rows; use execution='padded'"
    return None if host.packs else f"packed execution does not carry {host.name}'s bias or mask; use execution='padded'"


def _scanned_rows(program: Program, host: Host) -> str | None:
    if host.kind == "scan" and program.execution != "padded":
        return (
            f"a state-space model reads every row it is given, so execution={program.execution!r} would change its "
            "answers; use execution='padded'"
        )
    return None


def _words_of_a_text(program: Program, host: Host) -> str | None:
    """Methods on the input text drop whole words of a text, and of nothing else."""
    for method in program.methods:
        if method.site is not Site.TEXT:
            continue
        if host.kind not in ("text", "decoder", "scan") or hasattr(host, "bridge"):
            return f"{text(method)} acts on the input text, and {host.name} reads no plain text of tokens"
        if method.extra:
            return f"{text(method)} melts tokens into one more, and a text holds words only; choose a form that prunes"
    return None


def _rows_of_no_word(program: Program, host: Host) -> str | None:
    if not isinstance(host, DecoderHost) and host.kind != "scan":
        return None
    fused = [text(m) for m in program.methods if m.extra and m.site is not Site.KV_CACHE]
    return None if not fused else (
        f"{', '.join(fused)} melts dropped tokens into one more row, which has no place among the words of a "
        "causal text; choose a method or a form that only prunes (fuse=false)"
    )  # fmt: skip


def _sizes_in_a_cache(program: Program, host: Host) -> str | None:
    weighing = [text(m) for m in program.methods if m.proportional and isinstance(host, DecoderHost)]
    return None if not weighing else (
        f"{weighing[0]} weighs merged tokens by their size in later attention, which a decoder's cache "
        "does not remember; choose a method that prunes, or proportional=false"
    )  # fmt: skip


def _one_evicts(program: Program, host: Host) -> str | None:
    if sum(m.evicts for m in program.on_cache) < 2:
        return None
    return (
        "two methods that evict cannot share a cache: rows one has taken cannot be judged by the other; give "
        "apply one of them, with methods that only read (quest) or store (ott) beside it"
    )


def _revival_beside_eviction(program: Program, host: Host) -> str | None:
    if not program.revives or not any(m.evicts or m.reads for m in program.on_cache):
        return None
    return (
        "a method that brings dropped tokens back chooses among all rows of a layer; one that evicts or reads "
        "others in each head cannot stand beside it: stack it on one that drops for good, such as sdtp"
    )


def _revival_unseen(program: Program, host: Host) -> str | None:
    if not program.revives or not isinstance(host, DecoderHost) or not host.unasking:
        return None
    return (
        f"a method that brings dropped tokens back looks at attention while {host.name} writes, which asks no "
        "attention table; choose one that drops for good, such as sdtp"
    )


def _one_reads(program: Program, host: Host) -> str | None:
    if sum(m.reads for m in program.on_cache) < 2:
        return None
    return "two methods that choose what is read cannot share a cache; give apply one of them"


def _one_stores(program: Program, host: Host) -> str | None:
    if sum(m.codec is not None for m in program.on_cache) < 2:
        return None
    return "two methods that store a cache in few bits cannot share it; give apply one of them"


def _on_a_cache(program: Program, host: Host) -> str | None:
    """Each method on the cache by itself. Raises BudgetError for a budget a cache cannot have."""
    for method in program.methods:
        if method.site is not Site.KV_CACHE:
            continue
        if not isinstance(method, CacheReducer):
            return f"{type(method).__name__} acts on the KV cache but is no CacheReducer"
        method.check()
        assert isinstance(host, DecoderHost)
        early = method.reads or method.gates or method.attends or isinstance(method, Rereader)
        if early and (host.unasking or host.again):
            why = "calls attention several times over the same keys" if host.again else "asks no attention table"
            return (
                f"{text(method)} takes part in attention before the softmax, where {host.name} lets nobody in: it "
                f"{why}; choose a method that looks and evicts (snapkv, h2o, knorm)"
            )
        if program.between_blocks and isinstance(method, Rereader):
            return (
                f"{text(method)} has the whole prompt read again, which methods inside the network would shorten; "
                "give apply one of them"
            )
        rotary = host.rotary(0) if method.rotates or method.travelling else None
        if method.travelling and rotary is None:
            return (
                f"{text(method)} moves rows by turning their keys, but {host.name} learns its positions; "
                "pass positions=original"
            )
    return None


def _blind_towers(program: Program, host: Host) -> str | None:
    """Methods that look into a vision tower whose blocks cannot be entered, or at one it has not."""
    if not isinstance(host, VisionLanguageHost):
        return None
    looking = [m for m in program.methods if isinstance(m, VisualReducer)]
    tower = host.tower
    if tower is None:
        curious = [m for m in looking if m.looks_at or m.taps(1)]
        return None if not curious else (
            f"{text(curious[0])} needs to look into the vision tower of {host.title}, whose blocks cannot be entered; "
            "choose a method that looks at the projected tokens alone, such as divprune"
        )  # fmt: skip
    depth = len(tower.blocks)
    for method in looking:
        wanted = (*(layer for layer in method.looks_at if layer is not None), *method.taps(depth))
        if deep := [layer for layer in wanted if not -depth <= layer < depth]:
            return f"{text(method)} looks at block {deep[0]} of the vision tower, which has {depth} (0 to {depth - 1})"
    return None


RULES: tuple[Callable[[Program, Host], str | None], ...] = (
    _packed_rows, _scanned_rows, _words_of_a_text, _rows_of_no_word, _sizes_in_a_cache, _one_evicts,
    _revival_beside_eviction, _revival_unseen, _one_reads, _one_stores, _on_a_cache, _blind_towers,
)  # fmt: skip
"""Each says why a program cannot run in a host, or nothing."""


def check_free(host: Host) -> None:
    """Raises SessionError where a session is on."""
    if host.occupied:
        raise SessionError(
            "this model already has a session on it: call remove() first, or give apply a list of methods"
        )
