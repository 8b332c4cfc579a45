"""One forward of a twin, watched: what a class does with its tokens is read off it."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fewer.compat import CACHE_NAMES, cache_of, cached, without_cache

from . import rotary
from .anatomy import Anatomy, Layer, Stream, outward
from .attention import Call, HostError, Table, fused, spying, unsaid
from .stacks import mixer
from .steps import MEMORY, StepsError, bound, record
from .twin import example
from .written_out import entered

BATCH, LENGTH = 5, 13  # of the example: sizes that no other dimension of a twin is likely to have
COUNTED = (
    "position_mask",
    "position_ids",
)  # arguments that tell blocks where tokens are, which these may count instead
CLASS = re.compile(r"(^|\.)(cls|class)(_?tokens?|_?embed\w*|_?emb)?$", re.IGNORECASE)


@dataclass(eq=False)
class _Seen:
    """What was seen of one block in a forward of the twin."""

    x: Tensor
    entering: str
    kwargs: dict[str, Any]
    out: Any = None
    calls: list[tuple[nn.Module, Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    anew: bool = False  # whether some of these were given a bias besides the mask


class _Watch:
    """What goes on in a twin's blocks and in everything besides, in one forward."""

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
                own, held = block.forward, vars(block)
                undo.callback(held.update, forward=own) if "forward" in held else undo.callback(held.pop, "forward")
                held["forward"] = partial(self._block, index, own)  # a hook hears no call of a forward by its name
            for path, module in self.root.named_modules():
                if id(module) not in within:
                    undo.callback(module.register_forward_hook(self._beside(path)).remove)
            undo.enter_context(spying(self.asked))
            undo.enter_context(torch.no_grad())
            return self.root(**given)

    def _block(self, index: int, own: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        name, named = bound(self.blocks[index], args, kwargs)
        self.under = index
        seen = self.seen.setdefault(index, _Seen(named.pop(name), name, named))
        out = own(*args, **kwargs)
        self.under = None
        if seen.out is None:
            seen.out = out
        return out

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
            seen, pairs = self.seen[self.under], (q.shape[-2], k.shape[-2])
            seen.calls.append((module, q, k, shown))
            seen.anew |= any(isinstance(v, Tensor) and v.dim() > 2 and v.shape[-2:] == pairs for v in kwargs.values())


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
    layout = _layout(watch.seen, given)
    for seen in watch.seen.values() if layout else ():
        seen.x = seen.x.permute(layout)
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
    kind = _kind(root, given, output, watch.seen)
    counts = None
    if features and not keeps:
        counts, watch = _counts(root, given, blocks, watch, tokens)
    mask = _mask_name(watch.seen, given)
    second = _second(watch.seen)
    layers = tuple(_layer(path, blocks[i], watch.seen.get(i), tokens, mask, layout) for i, path in enumerate(paths))
    if second is not None:
        layers = tuple(replace(layer, steps=None) for layer in layers)  # which know of one sequence
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
    patch = next((p for p, m in watch.maps if m.dim() > 3 and math.prod(m.shape[2:]) == tokens - prefix), None)
    streams = _streams(watch.seen, tokens, prefix, {mask} if second is None else {mask, second[0]})
    norm = _norm_behind(watch, blocks)
    pooler = next((p for p, m, _, _ in watch.behind if isinstance(m, nn.MultiheadAttention)), None)
    out = next(iter(watch.seen.values())).out
    widths = [q.shape[-1] for s in watch.seen.values() for _, q, _, _ in s.calls]
    return Anatomy(
        name, kind, layers, mask, streams, len(out) if isinstance(out, (tuple, list)) else 0, prefix, has_cls,
        patch, norm, pooler, head_dim=widths[0] if widths else 0, rotation=rotation,
        features=features, causal=causal, dense=hasattr(root, "out_features"),
        inverted=_inverted(watch.seen, mask), layout=layout, keys=tuple(out) if isinstance(out, dict) else (),
        second=second, reads=reads or (), counts=counts,
    )  # fmt: skip


def _layout(seen: Mapping[int, _Seen], given: Mapping[str, Any]) -> tuple[int, ...]:
    """Which axes of what the blocks are given are samples, tokens and channels; () where they stand in this order."""
    shapes = {tuple(one.x.shape) if isinstance(one.x, Tensor) else () for one in seen.values()}
    shape = shapes.pop() if len(shapes) == 1 else ()
    if len(shape) != 3 or "input_ids" not in given:
        return ()
    if shape[:2] == (LENGTH, BATCH):
        return (1, 0, 2)
    return (0, 2, 1) if shape[0] == BATCH and shape[1] != LENGTH and shape[2] == LENGTH else ()


def _second(seen: Mapping[int, _Seen]) -> tuple[str, int] | None:
    """A second sequence that each block makes anew and the next one is given: its argument, and which of the things
    that a block gives it is."""
    runs = list(seen.values())
    given = [
        {
            (name, place)
            for name, value in later.kwargs.items()
            for place, made in enumerate(earlier.out if isinstance(earlier.out, tuple) else ())
            if place and made is value and value is not earlier.kwargs.get(name) and _is_sequence(value, later.x)
        }
        for earlier, later in pairwise(runs)
    ]
    every = set.intersection(*given) if given else set()
    return min((pair for pair in every if _is_sequence(runs[0].kwargs.get(pair[0]), runs[0].x)), default=None)


def _counts(
    root: nn.Module, given: Mapping[str, Any], blocks: Sequence[nn.Module], watch: _Watch, tokens: int
) -> tuple[str | None, _Watch]:
    """An argument that would tell blocks the place of each token, where they are given None and count their rows
    instead, tried: told the places they would count, nothing changes, and told others, something does. With the run in
    which they were told."""

    def told(name: str, place: Tensor) -> _Watch:
        again = _Watch(root, blocks)
        with ExitStack() as undo:
            for block in blocks:
                hook = block.register_forward_pre_hook(partial(_telling, name, place), with_kwargs=True)
                undo.callback(hook.remove)
            again(given)
        return again

    def last(run: _Watch) -> Tensor:
        out = run.seen[len(blocks) - 1].out
        return out[0] if isinstance(out, tuple) else out

    for name in COUNTED:
        if not all(name in seen.kwargs and seen.kwargs[name] is None for seen in watch.seen.values()):
            continue
        place = torch.arange(tokens, device=last(watch).device).expand(BATCH, -1)
        with suppress(Exception):  # whatever a stranger's code makes of it
            same, other = told(name, place), told(name, place.flip(-1))
            if torch.allclose(last(same), last(watch), atol=1e-5, rtol=1e-4) and not torch.allclose(
                last(other), last(watch), atol=1e-3
            ):
                return name, same
    return None, watch


def _telling(name: str, place: Tensor, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    return (), {**bound(block, args, kwargs)[1], name: place}


def _is_sequence(value: Any, x: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return value.dim() == x.dim() == 3 and value.shape[:2] == x.shape[:2]


def _run(root: nn.Module, blocks: Sequence[nn.Module], given: Mapping[str, Any]) -> tuple[_Watch, Any]:
    """A twin's run and what it gives; a cache too, where it has one but its config says to do without (as in training).

    Raises   HostError where it does not run.
    """
    if not getattr(root.config, "use_cache", None) and _takes_cache(root):
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


def _kind(root: nn.Module, given: Mapping[str, Any], output: Any, seen: Mapping[int, _Seen]) -> str:
    if cache_of(output) is not None and not _beside_a_decoder(root, seen):
        return "decoder"
    main = str(getattr(root, "main_input_name", ""))
    if "pixel" in main or any("pixel" in n for n in given):
        return "vision"
    return "text" if "input_ids" in given or "inputs_embeds" in given else "sound"


def _beside_a_decoder(root: nn.Module, seen: Mapping[int, _Seen]) -> bool:
    """Whether blocks are those of an encoder whose root keeps the decoder's cache: they are not handed it."""
    told = any(name in MEMORY for one in seen.values() for name in one.kwargs)
    return bool(getattr(root.config, "is_encoder_decoder", False)) and not told


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
    from transformers import DynamicCache

    held = getattr(cache, "layers", ())
    counts = [sum(_over_tokens(k) for _, _, k, _ in seen.calls) for seen in watch.seen.values()]
    if type(cache) is not DynamicCache or (len(held) == len(watch.blocks) and max(counts) <= 1):
        return ()
    paths, calls, latest = {id(m): path for path, m in root.named_modules()}, [], -1
    mine = DynamicCache(config=root.config)  # type: ignore[arg-type]
    update = mine.update

    def updating(key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal latest
        latest = layer
        return update(key, value, layer, *args, **kwargs)

    def asked(module: nn.Module, q: Tensor, k: Tensor, *_: Any) -> None:
        if _over_tokens(k):
            calls.append((paths[id(module)], latest))

    setattr(mine, "update", updating)  # noqa: B010
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
    while isinstance(out, (tuple, list, dict)):
        out = next(iter(out.values() if isinstance(out, dict) else out))
    return out


def _which(indices: Sequence[int]) -> str:
    return f"block {indices[0]}" if len(indices) == 1 else f"{len(indices)} (the first is {indices[0]})"


def _layer(
    path: str, block: nn.Module, seen: _Seen | None, tokens: int, mask: str | None, layout: tuple[int, ...]
) -> Layer:
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
        x = seen.x.permute(outward(layout)) if layout else seen.x
        attention, given = mixer(block), {seen.entering: x} | without_memory(seen.kwargs)
        way = None if attention is None else way_in(block, given, seen.x.shape[:2])
        attention = attention if way else None
        bare = mask is None or way is None or _spared(block, given, mask)
    steps = None
    if attention is not None and not layout:
        try:
            steps = record(block, {seen.entering: seen.x} | without_memory(seen.kwargs), attention)
        except StepsError:
            steps = None
    return Layer(path, attention, way, bare, inside, True, steps, seen.anew)


def without_memory(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A block's arguments without a cache, under any name: what is recorded must not depend on one."""
    return {k: None if k in MEMORY else v for k, v in kwargs.items()}


def way_in(block: nn.Module, given: Mapping[str, Any], sizes: Sequence[int]) -> str | None:
    """How the attention of a block that asks no table is reached: at the fused kernel, where it is written out, or not
    at all. given: the block's arguments by name, the features first; sizes: samples and tokens."""
    batch, tokens = sizes
    call, other = Call(watch=True), Call(watch=True)
    with torch.no_grad(), fused(call):
        block(**given)
    if call.seen is not None and call.seen.k.shape[:3:2] == (batch, tokens):
        return "fused"
    with torch.no_grad(), entered(other, batch=batch, keys=tokens):
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
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.dim() < 2:
        return False
    if value.dim() == 2:
        return not bool(value[-1, -1])
    return value.shape[-1] == value.shape[-2] and not bool(value[-1, ..., -1, -1].any())


def _tells(value: Tensor, gone: Tensor) -> bool:
    """Whether the first sample of an argument differs from the second in the keys that are padding, and in no others.
    gone: (N,) bool."""
    if value.dim() < 2 or value.shape[0] != BATCH or value.shape[-1] != len(gone):
        return False
    differs = (value[0] != value[1]).reshape(-1, len(gone)).any(0)
    return bool((differs == gone).all())


def _streams(seen: Mapping[int, _Seen], tokens: int, prefix: int, others: set[str | None]) -> tuple[Stream, ...]:
    """The arguments that have an entry per token, over all blocks, without others that are known to be more."""
    found: dict[tuple[str, tuple[Any, ...]], Stream] = {}
    for one in seen.values():
        for name, value in without_cache(one.kwargs).items():
            if name in others:
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
        elif axes == [0, 1] and BATCH in sizes[2:]:
            before = range(2, value.dim())
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
