"""What a class does with its tokens, read off its twin: where its blocks are, how their attention is reached, what
travels beside the features, which rows stand in front.

Nothing here knows a model by name. A stack of blocks is found in the modules themselves, its root is built small and
random from the same config, and one forward of that twin is watched.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fewer.compat import CACHE_NAMES, cache_of, cached, without_cache

from . import remembered, rotary
from .attention import Call, HostError, Table, fused, spying, unsaid
from .steps import MEMORY, Given, Own, Size, Step, Steps, StepsError, Value, bound, record
from .twin import TwinError, build, cut, example, shrink
from .written_out import entered

BATCH, LENGTH = 5, 13  # of the example: sizes that no other dimension of a twin is likely to have
SMALL = 20_000_000  # weights: a root of so many is its own measure
MIXES = re.compile(r"attention|attn|mixer", re.IGNORECASE)  # in the class name of what mixes tokens
PART = re.compile(
    r"(attention|attn|mixer)(?!\w*(layer|block))\w*$", re.IGNORECASE
)  # the class name of a part of a block, not of one
CLASS = re.compile(r"(^|\.)(cls|class)(_?tokens?|_?embed\w*|_?emb)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Stream:
    """An argument of the blocks that has an entry per token.

    path     into a tuple or dict
    axis     the tokens', from the end; batch: the samples' (of size one where all share), or None
    lacks    rows in front that it has no entry for
    square   whether the axis before is the tokens' too, as that of queries
    folded   whether samples and heads share the first axis, sample by sample
    """

    name: str
    path: tuple[Any, ...]
    axis: int
    batch: int | None = None
    lacks: int = 0
    square: bool = False
    folded: bool = False

    def at(self, value: Tensor, place: Tensor) -> Tensor:
        """The entries of some tokens. place: (B, M)."""
        if self.lacks:
            place = place[:, self.lacks :] - self.lacks
        if self.folded:
            whole = replace(self, batch=-value.dim() - 1, folded=False)
            return whole.at(value.unflatten(0, (len(place), -1)), place).flatten(0, 1)
        if self.batch is None:  # one table for all: every sample gets its own, for all heads
            if self.square:
                return value[place[:, :, None], place[:, None, :]][:, None]
            return value[place][:, None] if value.dim() == 2 else value[place]
        axis, batch = self.axis % value.dim(), self.batch % value.dim()
        value = value.movedim(batch, 0)
        axis = axis + 1 if axis < batch else axis
        value = value.expand(place.shape[0], *value.shape[1:])
        for one in (axis - 1, axis) if self.square else (axis,):
            index = place.view(len(place), *(1,) * (one - 1), -1, *(1,) * (value.dim() - one - 1))
            value = value.gather(one, index.expand(*value.shape[:one], -1, *value.shape[one + 1 :]))
        return value.movedim(0, batch)


def reach(value: Any, path: Sequence[Any]) -> Any:
    """A part of a tuple or dict, by the keys that lead there; None where they lead nowhere."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def placed(value: Any, path: Sequence[Any], part: Any) -> Any:
    """A tuple or dict with another part at the end of a path; the one given stays as it is."""
    if not path:
        return part
    key, *rest = path
    if isinstance(value, Mapping):
        return {**value, key: placed(value[key], rest, part)}
    parts = list(value)
    parts[key] = placed(parts[key], rest, part)
    return type(value)(parts) if type(value) in (tuple, list) else type(value)(*parts)


@dataclass(frozen=True)
class Layer:
    """One block.

    attention   path of the part that mixes tokens
    way         how it is reached: "table", "fused", "written", or None
    bare        whether its mask says no more than which tokens are padding, and may be left out where none is
    inside      whether the block makes a bias between all tokens itself, from none of its arguments
    turns       of a decoder: whether keys at other positions are keys turned; None = positions change nothing
    steps       its forward in steps
    """

    path: str
    attention: str | None = None
    way: str | None = None
    bare: bool = True
    inside: bool = False
    turns: bool | None = True
    steps: Steps | None = None


@dataclass(frozen=True)
class Anatomy:
    """A stack of blocks.

    name       of the class it is in, as messages say it
    kind       "vision" | "text" | "sound" | "decoder" | "scan" | "cross"
    layers     its blocks, in order
    mask       the argument of a block that masks its attention
    streams    arguments that have an entry per token
    tuples     how many things a block gives in a tuple; 0 = a tensor
    prefix     protected tokens in front; has_cls: whether the first of them is a class token
    patch, final_norm, pooler   paths from the root
    dense      whether what reads the output of a vision stack wants one row per patch, as a backbone's map does
    causal     of a text: whether a token sees only those before it; its last one stays then, as much is read from it
    rotation   why keys cannot be turned to other positions, if they cannot in any layer
    shrunk     whether the twin that was watched is smaller than the model
    features   whether the blocks hand on one sequence of features, (B, N, C)
    inverted   whether a mask of bools is True where a key is out of sight
    reads      of a decoder: the attention calls of one pass in order, as the path of the module and the cache layer it
               reads; empty where the attention of block i reads layer i, once
    """

    name: str
    kind: str
    layers: tuple[Layer, ...]
    mask: str | None = None
    streams: tuple[Stream, ...] = ()
    tuples: int = 0
    prefix: int = 0
    has_cls: bool = False
    patch: str | None = None
    final_norm: str | None = None
    pooler: str | None = None
    pools_from: int | None = None
    head_dim: int = 0
    rotation: str | None = None
    dense: bool = False
    causal: bool = False
    shrunk: bool = True
    features: bool = True
    inverted: bool = False
    reads: tuple[tuple[str, int], ...] = ()

    @property
    def acts(self) -> set[str]:
        """What all blocks that mix tokens offer."""
        mixing = [layer for layer in self.layers if layer.attention is not None] or list(self.layers)
        found = {"block"} if self.features else set()
        if all(layer.way is not None for layer in mixing):
            found.add("attention")
        if all(layer.steps is not None and layer.steps.cut is not None for layer in mixing):
            found.add("middle")
        return found


FACTS = (Anatomy, Layer, Stream, Steps, Step, Value, Given, Own, Size)


# -- in the modules ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Stack:
    """A run of blocks in a model. path: of the root; blocks: paths from it."""

    root: nn.Module
    path: str
    blocks: tuple[str, ...]


def _mixes(block: nn.Module) -> bool:
    return _mixer(block) is not None


def _mixer(block: nn.Module) -> str | None:
    """The outermost part of a block that mixes tokens, told by what its class is called, or what it is called there:
    norms and the like, which have no parts, may be called after what they stand beside."""
    parts = [(p, m) for p, m in block.named_modules() if p]
    by_class = (p for p, m in parts if MIXES.search(type(m).__name__))
    by_name = (p for p, m in parts if MIXES.search(p.rpartition(".")[2]) and list(m.children()))
    return next(by_class, None) or next(by_name, None)


def stacks(model: nn.Module) -> list[Stack]:
    """All runs of blocks of a model, by the models that own them, outermost first."""
    from transformers import PreTrainedModel

    found: list[Stack] = []
    inside: list[str] = []
    owners = [(path, m) for path, m in model.named_modules() if isinstance(m, PreTrainedModel) and _starts(m)]
    for path, module in model.named_modules():
        if any(path.startswith(f"{p}.") for p in inside) or not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        if not any(map(_mixes, module)) or any(PART.search(type(m).__name__) for m in module):
            continue
        if isinstance(module, nn.Sequential) and len({type(m) for m in module}) > 1:
            continue
        inside.append(path)
        owner = [(p, m) for p, m in owners if not p or path.startswith(f"{p}.")]
        if not owner:
            continue
        at, root = owner[-1]
        start = len(at) + 1 if at else 0
        found.append(Stack(root, at, tuple(f"{path}.{i}"[start:] for i in range(len(module)))))
    return found


def _starts(model: Any) -> bool:
    """Whether a model can be called with what a user has, and not with features of another part of it."""
    parameters = inspect.signature(type(model).forward).parameters
    return getattr(model, "main_input_name", "input_ids") in parameters or "input_ids" in parameters


# -- on the twin -------------------------------------------------------------------------------------------------------
_known: dict[tuple[Any, ...], Anatomy | HostError] = {}


def key_of(root: nn.Module) -> str:
    """What decides a root's anatomy besides its classes' code, as text: its class and its config."""
    config = dict(root.config.to_dict())  # type: ignore[union-attr, operator]
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "id2label",
                 "label2id", "quantization_config", "_attn_implementation"):  # fmt: skip
        config.pop(name, None)
    cls = base(type(root))
    return f"{cls.__module__}.{cls.__qualname__} {json.dumps(config, sort_keys=True, default=str)}"


_forwards: dict[Any, int] = {}  # every forward met, by number: it lives on here, so that no other gets its id


def classes_of(root: nn.Module) -> set[Any]:
    """The classes whose code a root runs. Matrices do not count, however they are stored."""
    kinds: set[Any] = {base(type(m)) for m in root.modules() if not isinstance(getattr(m, "in_features", None), int)}
    return {c for c in kinds if not c.__module__.startswith("torch.")}


def code_of(root: nn.Module) -> tuple[int, ...]:
    """The forwards of a root's classes: a cell of a notebook that runs again makes other ones of the same name, and
    libraries change those of a class."""
    own = {c.forward for c in classes_of(root)}
    return tuple(sorted(_forwards.setdefault(forward, len(_forwards)) for forward in own))


def base(cls: type) -> type:
    """A class as its author wrote it: FSDP2 puts one of its own before it."""
    return next(c for c in cls.__mro__ if not c.__module__.startswith("torch.distributed"))


def anatomy(stack: Stack) -> Anatomy:
    """The anatomy of a stack, from its root's twin; remembered per class and config.

    Raises   HostError where no twin can be built or watched, saying what was found and what failed.
    """
    key = (key_of(stack.root), code_of(stack.root), stack.blocks)
    if key not in _known:
        classes, fact = classes_of(stack.root), f"{key[0]} {' '.join(stack.blocks)}"
        found = remembered.read("anatomy", fact, classes, FACTS)
        if found is None:
            found = _observed(stack)
            if isinstance(found, Anatomy):
                remembered.write("anatomy", fact, classes, found)
        _known[key] = found
    known = _known[key]
    if isinstance(known, HostError):
        raise known.with_traceback(None)
    return known


def _observed(stack: Stack) -> Anatomy | HostError:
    """What is seen of a root's twin, or why nothing is. A root that is small itself needs no smaller twin."""
    why: HostError | None = None
    for smaller in (True, False):
        if not smaller and sum(p.numel() for p in stack.root.parameters()) > SMALL:
            break
        try:
            return replace(observe(twin_of(stack.root, smaller), stack.blocks), shrunk=smaller)
        except Exception as error:  # whatever a stranger's code raises
            known = isinstance(error, (HostError, TwinError))
            said = str(error) if known else f"watching a twin of it ended in {type(error).__name__}: {error}"
            why = why or HostError(said)
    assert why is not None
    return why


def twin_of(root: nn.Module, smaller: bool = True) -> nn.Module:
    """A random model of a root's class and config, as small as they allow."""
    config: Any = copy.deepcopy(root.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return cut(build(base(type(root)), shrink(config) if smaller else config), root)


@dataclass(eq=False)
class _Seen:
    """What was seen of one block in a forward of the twin."""

    x: Tensor
    entering: str
    kwargs: dict[str, Any]
    out: Any = None
    calls: list[tuple[nn.Module, Tensor, Tensor, Tensor | None]] = field(default_factory=list)


class _Watch:
    """Hooks on a twin's blocks and on everything besides, for one forward."""

    def __init__(self, root: nn.Module, blocks: Sequence[nn.Module], asked: Callable[..., None] | None = None) -> None:
        self.root, self.blocks, self.asked = root, list(blocks), asked or self._asked
        self.seen: dict[int, _Seen] = {}
        self.behind: list[tuple[str, nn.Module, tuple, Any]] = []
        self.maps: list[tuple[str, Tensor]] = []
        self.under: int | None = None

    def __call__(self, given: Mapping[str, Any]) -> Any:
        within = {id(m) for b in self.blocks for m in b.modules()}
        configs = [
            c for m in self.root.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation_internal")
        ]
        with ExitStack() as undo:
            Table.enter(configs, undo)
            for index, block in enumerate(self.blocks):
                undo.callback(block.register_forward_pre_hook(self._before(index), with_kwargs=True).remove)
                undo.callback(block.register_forward_hook(self._after(index)).remove)
            for path, module in self.root.named_modules():
                if id(module) not in within:
                    undo.callback(module.register_forward_hook(self._beside(path)).remove)
            undo.enter_context(spying(self.asked))
            undo.enter_context(torch.no_grad())
            return self.root(**given)

    def _before(self, index: int) -> Any:
        def hook(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            name, named = bound(block, args, kwargs)
            self.under = index
            self.seen.setdefault(index, _Seen(named.pop(name), name, named))

        return hook

    def _after(self, index: int) -> Any:
        def hook(_: nn.Module, args: tuple, out: Any) -> None:
            self.under = None
            if self.seen[index].out is None:
                self.seen[index].out = out

        return hook

    def _beside(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple, out: Any) -> None:
            if isinstance(module, (nn.Conv2d, nn.Conv3d)) and isinstance(out, Tensor):
                self.maps.append((path, out))
            if len(self.seen) == len(self.blocks) and self.seen[len(self.blocks) - 1].out is not None:
                self.behind.append((path, module, args, out))

        return hook

    def _asked(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kwargs: dict) -> None:
        if self.under is not None:
            shown = unsaid(module, q, k, kwargs) if mask is None else mask
            self.seen[self.under].calls.append((module, q, k, shown))


def observe(root: nn.Module, paths: Sequence[str]) -> Anatomy:
    """Watch a twin's blocks do their work. paths: of the blocks, from the root.

    Raises   HostError where they do not run one after the other on one sequence of features.
    """
    name = type(root).__name__
    blocks = [attrgetter(p)(root) for p in paths]
    given = inputs_of(root)
    watch, output = _run(root, blocks, given)
    missing = [i for i in range(len(blocks)) if i not in watch.seen]
    keeps = cache_of(output) is not None  # what happens between its blocks does not matter to a cache
    if missing and not (keeps and watch.seen):
        raise HostError(f"{name} does not run {_which(missing)} of its {len(blocks)} blocks one after the other")
    first = next(iter(watch.seen.values())).x
    odd = [
        i for i, s in watch.seen.items() if not isinstance(s.x, Tensor) or s.x.shape != first.shape or s.x.dim() != 3
    ]
    if odd and not keeps:
        shapes = list(dict.fromkeys(str(tuple(s.x.shape)) for s in watch.seen.values() if isinstance(s.x, Tensor)))
        raise HostError(
            f"the blocks of {name} do not hand on one sequence of features (samples, tokens, channels): they are given "
            f"{', '.join(shapes[:4])}; models that cut, join or window their tokens between blocks have none to reduce"
        )
    features = not odd and not missing and first.shape[0] == BATCH
    tokens = first.shape[1] if features else LENGTH
    if not features and not keeps:
        raise HostError(
            f"the blocks of {name} are given {tuple(first.shape)} for {BATCH} samples: samples and tokens are folded "
            "into one another, so that no sample keeps a sequence of its own"
        )
    kind = _kind(root, given, output)
    mask = _mask_name(watch.seen, given)
    layers = tuple(_layer(path, blocks[i], watch.seen.get(i), tokens, mask) for i, path in enumerate(paths))
    rotation, reads = None, None
    if kind == "decoder":
        layers, rotation = _turned(root, given, blocks, layers)
        reads = _reads(root, given, watch, cache_of(output))
    prefix, has_cls = _prefix(root, given, paths) if kind in ("vision", "sound") else (0, False)
    if kind == "sound" and prefix:
        kind = "vision"  # a spectrogram cut into patches, as a picture is
    if all(layer.attention is None for layer in layers) and all(hasattr(b, "mixer") for b in blocks):
        kind = "scan"
    causal = kind == "text" and _causal(root, given, blocks)
    if kind == "text" and not getattr(root.config, "is_encoder_decoder", False) and not causal:
        prefix, has_cls = 1, True
    patch = next((p for p, m in watch.maps if m.dim() == 4 and m.shape[-2] * m.shape[-1] == tokens - prefix), None)
    streams = _streams(watch.seen, tokens, prefix, mask)
    norm = _norm_behind(watch, blocks)
    pooler = next((p for p, m, _, _ in watch.behind if isinstance(m, nn.MultiheadAttention)), None)
    out = next(iter(watch.seen.values())).out
    widths = [q.shape[-1] for s in watch.seen.values() for _, q, _, _ in s.calls]
    return Anatomy(
        name, kind, layers, mask, streams, len(out) if isinstance(out, tuple) else 0, prefix, has_cls,
        patch, norm, pooler, head_dim=widths[0] if widths else 0, rotation=rotation,
        features=features, causal=causal, dense=hasattr(root, "out_features"),
        inverted=_inverted(watch.seen, mask), reads=reads or (),
    )  # fmt: skip


def _run(root: nn.Module, blocks: Sequence[nn.Module], given: Mapping[str, Any]) -> tuple[_Watch, Any]:
    """A twin's run and what it gives; a cache too, where it has one but its config says to do without (as in training).

    Raises   HostError where it does not run.
    """
    if getattr(root.config, "use_cache", None) is False and _takes_cache(root):
        watch = _Watch(root, blocks)
        with suppress(Exception):  # an encoder built of a decoder's parts minds
            output = watch({**given, "use_cache": True})
            if cache_of(output) is not None:
                return watch, output
    watch = _Watch(root, blocks)
    try:
        return watch, watch(given)
    except Exception as error:
        raise HostError(f"a twin of {type(root).__name__} does not run: {type(error).__name__}: {error}") from None


def inputs_of(root: nn.Module, seed: int = 0) -> dict[str, Any]:
    """One forward's arguments for a twin: words with padding in front or behind, pictures, or sound."""
    given: dict[str, Any] = dict(example(root, batch=BATCH, length=LENGTH, seed=seed))
    mask = given.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        given["attention_mask"] = mask = mask.clone()
        if _takes_cache(root) and not getattr(root.config, "is_encoder_decoder", False):
            mask[0, :2] = 0
        else:
            mask[0, -2:] = 0
    return given


def _takes_cache(root: nn.Module) -> bool:
    return any(n in inspect.signature(type(root).forward).parameters for n in CACHE_NAMES)


def _kind(root: nn.Module, given: Mapping[str, Any], output: Any) -> str:
    if cache_of(output) is not None:
        return "decoder"
    main = str(getattr(root, "main_input_name", ""))
    if "pixel" in main or any("pixel" in n for n in given):
        return "vision"
    return "text" if "input_ids" in given or "inputs_embeds" in given else "sound"


def _turned(
    root: nn.Module, given: Mapping[str, Any], blocks: Sequence[nn.Module], layers: tuple[Layer, ...]
) -> tuple[tuple[Layer, ...], str | None]:
    """A decoder's layers, with whether keys can be turned to other positions, tried; or why none can."""
    if rotary.found_in(root) is None:
        return layers, None
    if rotary.in_space(root):
        return layers, rotary.IN_SPACE
    if "position_ids" not in inspect.signature(type(root).forward).parameters or "input_ids" not in given:
        return layers, rotary.STRANGE
    n = given["input_ids"].shape[1]
    runs = [_Watch(root, blocks), _Watch(root, blocks)]
    keeping = {} if all(layer.way in (None, "table") for layer in layers) else {"use_cache": True}
    caches = [
        cache_of(run({**given, **keeping, "position_ids": torch.arange(start, start + n).expand(BATCH, -1)}))
        for run, start in zip(runs, (0, rotary.STEP), strict=True)
    ]
    told = []
    for index, layer in enumerate(layers):
        before, behind = (
            _keys(run.seen.get(index), layer, cache, index) for run, cache in zip(runs, caches, strict=True)
        )
        turned: bool | None = None
        if before is not None and behind is not None:
            try:
                own = rotary.embedding(root, index)
            except HostError:
                own = None
            if own is not None:
                turned = rotary.turns(own, before, behind)
        told.append(replace(layer, turns=turned))
    return tuple(told), None


def _keys(seen: _Seen | None, layer: Layer, cache: Any, index: int) -> Tensor | None:
    """(B, G, N, d): a layer's keys, as its attention hands them to the table or, where it asks none, to its cache."""
    if seen is None:
        return None
    if seen.calls or layer.way in (None, "table"):
        return seen.calls[0][2] if seen.calls else None
    return getattr(cache.layers[index], "keys", None) if index < len(getattr(cache, "layers", ())) else None


def _reads(root: nn.Module, given: Mapping[str, Any], watch: _Watch, cache: Any) -> tuple[tuple[str, int], ...]:
    """Which cache layer each attention call of a pass reads, where that is not one call in each block for the layer of
    its number: blocks that are run in a loop, several attentions in a block, several calls over the same keys."""
    held = getattr(cache, "layers", None)
    counts = [sum(_over_tokens(k) for _, _, k, _ in seen.calls) for seen in watch.seen.values()]
    if held is None or (len(held) == len(watch.blocks) and max(counts) <= 1):
        return ()
    paths, calls, latest = {id(m): path for path, m in root.named_modules()}, [], -1
    mine = type(cache)(config=root.config)
    update = mine.update

    def updating(key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal latest
        latest = layer
        return update(key, value, layer, *args, **kwargs)

    def asked(module: nn.Module, q: Tensor, k: Tensor, *_: Any) -> None:
        if _over_tokens(k):
            calls.append((paths[id(module)], latest))

    mine.update = updating
    _Watch(root, watch.blocks, asked)({**without_cache(given), **cached(root, mine), "use_cache": True})
    return tuple(calls)


def _over_tokens(keys: Tensor) -> bool:
    """Whether keys are those of the example's tokens, and not of something else that a block mixes."""
    return keys.shape[0] == BATCH and keys.shape[-2] >= LENGTH


def _causal(root: nn.Module, given: Mapping[str, Any], blocks: Sequence[nn.Module]) -> bool:
    """Whether a token sees only those before it: then the last word changes nothing of the first."""
    if "input_ids" not in given:
        return False
    first, second = _Watch(root, blocks), _Watch(root, blocks)
    first(given)
    ids = given["input_ids"].clone()
    ids[:, -1] = ids[:, -2]
    ids[-1, -1] = ids[-1, 0]
    second({**given, "input_ids": ids})
    last = len(blocks) - 1
    a, b = (features_of(w.seen[last].out) for w in (first, second))
    return bool((a[-1, 0] == b[-1, 0]).all()) and not bool((a[-1, -1] == b[-1, -1]).all())


def features_of(out: Any) -> Tensor:
    """What a block gives, without what it gives besides."""
    while isinstance(out, (tuple, list)):
        out = out[0]
    return out


def _which(indices: Sequence[int]) -> str:
    return f"block {indices[0]}" if len(indices) == 1 else f"{len(indices)} (the first is {indices[0]})"


def _layer(path: str, block: nn.Module, seen: _Seen | None, tokens: int, mask: str | None) -> Layer:
    """One block: how its attention is reached, and its steps."""
    if seen is None:  # one that needs more than words, such as pictures
        return Layer(path)
    own = {id(m): p for p, m in block.named_modules()}
    asked = [(own.get(id(m), ""), q, k, shown) for m, q, k, shown in seen.calls if k.shape[-2] >= tokens]
    attention, way, bare, inside = None, None, True, False
    if asked:
        attention, _, _, shown = asked[0]
        way, bare = "table", shown is None or _bare(shown)
        wide = [t for _, t in _tensors(list(seen.kwargs.values())) if t.dim() > 2 and t.shape[-1] == tokens]
        inside = not bare and shown is not None and not any(t.shape[-2] in (1, tokens) for t in wide)
    else:
        attention, given = _mixer(block), {seen.entering: seen.x} | without_memory(seen.kwargs)
        way = None if attention is None else way_in(block, given)
        attention = attention if way else None
        bare = mask is None or way is None or _spared(block, given, mask)
    steps = None
    if attention is not None:
        try:
            steps = record(block, {seen.entering: seen.x} | without_memory(seen.kwargs), attention)
        except StepsError:
            steps = None
    return Layer(path, attention, way, bare, inside, True, steps)


def without_memory(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A block's arguments without a cache, under any name: what is recorded must not depend on one."""
    return {k: None if k in MEMORY else v for k, v in kwargs.items()}


def way_in(block: nn.Module, given: Mapping[str, Any]) -> str | None:
    """How the attention of a block that asks no table is reached: at the fused kernel, where it is written out, or not
    at all. given: the block's arguments by name, the features first."""
    x, *_ = given.values()
    call, other = Call(watch=True), Call(watch=True)
    with torch.no_grad(), fused(call):
        block(**given)
    if call.seen is not None and call.seen.k.shape[:3:2] == x.shape[:2]:
        return "fused"
    with torch.no_grad(), entered(other, batch=x.shape[0], keys=x.shape[1]):
        block(**given)
    return "written" if other.entered else None


def _spared(block: nn.Module, given: Mapping[str, Any], mask: str) -> bool:
    """Whether a block runs without its mask."""
    with torch.no_grad():
        try:
            block(**{**given, mask: None})
        except Exception:  # whatever a stranger's code raises
            return False
    return True


def _bare(mask: Tensor) -> bool:
    """Whether a mask of queries by keys says no more than which keys are padding."""
    if mask.dim() != 4:
        return mask.dim() == 2
    rows = mask
    if rows.dtype != torch.bool:
        if not bool(((rows == 0) | (rows < -1e4)).all()):
            return False  # a bias between tokens
        rows = rows >= 0
    if rows.shape[-2] not in (1, rows.shape[-1]):
        return False  # over keys that are no tokens
    real = rows.any(-2, keepdim=True)  # (B, h, 1, N): keys somebody sees
    asking = real.transpose(-1, -2)
    return rows.shape[-2] == 1 or bool(((rows == real) | ~asking).all())


def _tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, (*path, key))
    elif isinstance(value, (tuple, list)):
        for key, part in enumerate(value):
            yield from _tensors(part, (*path, key))


def _mask_name(seen: Mapping[int, _Seen], given: Mapping[str, Any]) -> str | None:
    """The argument of the blocks that masks their attention: the one that tells the padded keys of a sample, or, where
    nothing is padded, the one that is called so."""
    named: dict[str, Any] = {}
    for one in seen.values():
        named |= {k: v for k, v in one.kwargs.items() if v is not None or k not in named}
    padding = given.get("attention_mask")
    if isinstance(padding, Tensor) and padding.dim() == 2:
        gone = padding[0] == 0
        for name, value in named.items():
            if isinstance(value, Tensor) and _tells(value, gone):
                return name
    for name in ("attention_mask", "attn_mask", "mask", "causal_mask"):
        if name in named and (named[name] is None or isinstance(named[name], Tensor)):
            return name
    return None


def _inverted(seen: Mapping[int, _Seen], mask: str | None) -> bool:
    """Whether a mask of bools hides where it is True: a query sees itself, if it is no padding."""
    value = next(iter(seen.values())).kwargs.get(mask or "")
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.dim() < 3:
        return False
    return value.shape[-1] == value.shape[-2] and not bool(value[-1, ..., -1, -1].any())


def _tells(value: Tensor, gone: Tensor) -> bool:
    """Whether the first sample of an argument differs from the second in the keys that are padding, and in no others.
    gone: (N,) bool."""
    if value.dim() < 2 or value.shape[0] != BATCH or value.shape[-1] != len(gone):
        return False
    differs = (value[0] != value[1]).reshape(-1, len(gone)).any(0)
    return bool((differs == gone).all())


def _streams(seen: Mapping[int, _Seen], tokens: int, prefix: int, mask: str | None) -> tuple[Stream, ...]:
    """The arguments that have an entry per token, over all blocks."""
    found: dict[tuple[str, tuple[Any, ...]], Stream] = {}
    for one in seen.values():
        for name, value in without_cache(one.kwargs).items():
            if name == mask:
                continue
            for path, tensor in _tensors(value):
                stream = _stream(name, path, tensor, tokens, prefix)
                if stream is not None:
                    found.setdefault((name, path), stream)
    return tuple(found.values())


def _stream(name: str, path: tuple[Any, ...], value: Tensor, tokens: int, prefix: int) -> Stream | None:
    sizes = list(value.shape)
    for length, lacks in ((tokens, 0), (tokens - prefix, prefix)):
        axes = [i for i, n in enumerate(sizes) if n == length]
        if not axes or (lacks and not prefix):
            continue
        if len(axes) > 1 and axes[-1] == value.dim() - 1 and axes[-2] == value.dim() - 2:
            before = range(axes[-2])
        else:
            axes = axes[:1]
            before = range(axes[0])
        samples = [i for i in before if sizes[i] == BATCH]
        folded = not samples and len(before) > 0 and sizes[0] % BATCH == 0
        samples = samples or ([] if folded else [i for i in before if sizes[i] == 1])
        batch = samples[0] - value.dim() if samples else None
        return Stream(name, path, axes[-1] - value.dim(), batch, lacks, len(axes) > 1, folded)
    return None


def _prefix(root: nn.Module, given: Mapping[str, Any], paths: Sequence[str]) -> tuple[int, bool]:
    """Rows in front that say nothing of the picture, and whether the first is a class token."""
    blocks = [attrgetter(p)(root) for p in paths]
    first, second = _Watch(root, blocks[:1]), _Watch(root, blocks[:1])
    first(given)
    second({k: v.flip(0) if k == "pixel_values" or v.is_floating_point() else v for k, v in given.items()})
    same = (first.seen[0].x == second.seen[0].x).all(-1).all(0)
    count = int(same.long().cumprod(0).sum())
    if int(same.sum()) != count:
        raise HostError(f"{type(root).__name__} keeps rows that are no patches behind or between its patches")
    within = {id(p) for b in blocks for p in b.parameters()}
    own = any(CLASS.search(n) for n, p in root.named_parameters() if id(p) not in within)
    return count, bool(count) and own


def _norm_behind(watch: _Watch, blocks: Sequence[nn.Module]) -> str | None:
    """The norm that what the last block gives goes through, if anything does."""
    if len(blocks) - 1 not in watch.seen:
        return None
    out = watch.seen[len(blocks) - 1].out
    out = out[0] if isinstance(out, tuple) else out
    for path, module, args, _ in watch.behind:
        if args and args[0] is out and not list(module.children()):
            parameters = list(module.parameters())
            if parameters and all(p.dim() == 1 for p in parameters):
                return path
    return None


__all__ = [
    "Anatomy",
    "Layer",
    "Stack",
    "Stream",
    "anatomy",
    "inputs_of",
    "observe",
    "stacks",
    "twin_of",
]
