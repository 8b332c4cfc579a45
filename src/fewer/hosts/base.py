"""Host: a model whose blocks a session can act in, bound from what was discovered of its class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fewer.compat import unchecked
from fewer.core import Site, Tokens

from .anatomy import outward
from .attention import AttentionRun, Call, HostError, Table, counting, entering, fused, under
from .steps import stopping
from .weights import multiplied
from .written_out import entered

if TYPE_CHECKING:
    from .anatomy import Anatomy, Layer


class BlockRun(Protocol):
    """What a session does at the sites of one forward pass. x: (B, N, C)."""

    def before(self, layer: int, x: Tensor) -> Tensor: ...
    def call(self, layer: int) -> Call: ...
    def splits(self, layer: int) -> bool: ...
    def bias(self, layer: int, full: Tensor | None) -> Tensor | None: ...
    def streams(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]: ...
    def mid(self, layer: int, x: Tensor, call: Call) -> Tensor: ...
    def after(self, layer: int, x: Tensor, call: Call) -> Tensor: ...
    def fork(self) -> BlockRun: ...


class LearnedRows(Protocol):
    """Rows that another library puts in front of each text."""

    def attach(self, undo: ExitStack) -> None: ...
    def check(self, host: Host, methods: Sequence[Any]) -> None: ...
    def in_front(self) -> int: ...
    def in_pass(self, held: int | None) -> tuple[int, int]: ...


class PlainRun:
    """A BlockRun that changes nothing."""

    def before(self, layer: int, x: Tensor) -> Tensor:
        return x

    def call(self, layer: int) -> Call:
        return Call()

    def splits(self, layer: int) -> bool:
        return False

    def bias(self, layer: int, full: Tensor | None) -> Tensor | None:
        return full

    def streams(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs

    def mid(self, layer: int, x: Tensor, call: Call) -> Tensor:
        return x

    def after(self, layer: int, x: Tensor, call: Call) -> Tensor:
        return x

    def fork(self) -> BlockRun:
        return self


class Stand:
    """Stands in for a block's forward while a session is on; afterwards it runs the block's own, if still called."""

    __slots__ = ("on", "ours", "own")  # functools.update_wrapper copies the __dict__ of what it wraps

    def __init__(self, own: Callable[..., Any], ours: Callable[..., Any]) -> None:
        self.own, self.ours, self.on = own, ours, True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.ours(*args, **kwargs) if self.on else self.own(*args, **kwargs)


_occupied: WeakSet[nn.Module] = WeakSet()  # roots somebody takes part in


def _slot(block: nn.Module) -> str:
    """Where a block's own forward stands: accelerate's hooks keep it aside and call it from there."""
    return "_old_forward" if "_old_forward" in vars(block) else "forward"


class Host:
    """A stack of blocks, bound."""

    def __init__(self, found: Anatomy, root: nn.Module, path: str) -> None:
        self.found, self.root, self.path = found, root, path
        self.blocks: list[nn.Module] = [self._part(root, layer.path) for layer in found.layers]
        self.layers: Sequence[Layer] = found.layers
        self.name, self.kind = found.name, found.kind
        self._same()
        self.prefix, self.has_cls = found.prefix, found.has_cls
        self.pools_from = found.prefix if found.pools_from is None else found.pools_from
        #: What reads the rows behind the blocks wants: "some" = whichever are left; one for each that came in, behind
        #: the "last" block or behind "each" of them, as maps of a backbone are made of.
        self.reads: Literal["some", "last", "each"] = "each" if found.dense else "some"
        #: Whether it takes padding among those rows for real ones: it pools by attention and is told of no mask.
        self.reads_fillers = False
        self.reader: nn.Module | None = None  # a decoder that looks at what the last block gives
        self.learned: LearnedRows | None = None  # rows in front that nobody wrote, where another library puts some
        self.heads, self.head_dim = self._heads()
        self.width = self.heads * self.head_dim

    def _same(self) -> None:
        """Raises HostError where a block is none that the model's class makes."""
        for block, layer in zip(self.blocks, self.layers, strict=True):
            if layer.steps is not None and not isinstance(block, layer.steps.of):
                raise HostError(
                    f"{layer.path} is a {type(block).__name__} where {self.name} makes a "
                    f"{layer.steps.of.__name__}; put a method on first, and wrap or compile the blocks afterwards"
                )

    @staticmethod
    def _part(module: nn.Module, path: str) -> Any:
        return attrgetter(path)(module) if path else module

    def _heads(self) -> tuple[int, int]:
        """Query heads of the first attention, and channels of each."""
        config: Any = getattr(self.root, "config", None)
        layer = next((i for i, one in enumerate(self.layers) if one.attention is not None), None)
        if layer is None:
            return 1, self.channels
        parts = [self._part(self.blocks[layer], self.layers[layer].attention or ""), config]
        names = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
        heads = next((h for part in parts for n in names if isinstance(h := getattr(part, n, None), int)), None)
        if heads is None:
            heads = max(self.channels // max(self.found.head_dim, 1), 1)
        widths = (getattr(parts[0], n, None) for n in ("head_dim", "attention_head_size"))
        width = next((w for w in widths if isinstance(w, int)), None)
        return heads, width or self.found.head_dim or self.channels // heads

    # -- what is known of it -------------------------------------------------------------------------------------------
    @property
    def text(self) -> bool:
        """Whether tokens are no patches: inputs are padded, and what reads the output wants one row per input token."""
        return self.kind != "vision"

    @property
    def dense(self) -> bool:
        """Whether what reads the output wants a row for each token that came in."""
        return (self.text or self.reads != "some") and self.reader is None

    @property
    def acts(self) -> set[str]:
        """What a block offers: "block" and, where attention and MLP can be told apart, "middle"; "attention" where it
        can be looked at."""
        return self.found.acts

    def opening(self, tokens: Tokens) -> Tokens:
        """The tokens that enter a pass, with what this host knows of them: modalities, what else must stay."""
        return tokens.protect(tokens.last) if self.found.causal else tokens

    def entering(self, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The rows that are reduced and the mask that tells their padding, from what the first block gets."""
        return x, mask

    def depth(self, site: Site) -> int:
        """How many places of a kind there are, one behind the other."""
        return len(self.blocks)

    @cached_property
    def channels(self) -> int:
        """Of the features that travel from block to block."""
        for part in (self.root, *self.blocks[:1]):
            config = getattr(part, "config", None)
            for name in ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "width"):
                if isinstance(value := getattr(config, name, None) or getattr(part, name, None), int):
                    return value
        norm = next((p for p in self.blocks[0].parameters() if p.dim() == 1), None)
        return 0 if norm is None else int(norm.shape[0])

    @property
    def pair_width(self) -> int:
        """Channels that each pair of a query and a key multiplies, twice; 0 where there are no pairs."""
        return self.width

    @property
    def patch(self) -> nn.Module | None:
        """The convolution that cuts patches; None for text."""
        return None if self.found.patch is None else self._part(self.root, self.found.patch)

    @property
    def patches(self) -> int:
        """Tokens at the model's own image size, without the prefix; for text the most it was made for."""
        config: Any = getattr(self.root, "config", None)
        if self.text:
            most = getattr(config, "max_position_embeddings", None)
            return int(most) if isinstance(most, int) else 0
        holder = self.root if self.found.patch is None else self._part(self.root, self.found.patch.rpartition(".")[0])
        if isinstance(count := getattr(holder, "num_patches", None), int):
            return count
        image, patch = (
            getattr(config, "image_size", getattr(config, "crop_size", None)),
            getattr(config, "patch_size", None),
        )
        image, patch = ((v, v) if isinstance(v, int) else v for v in (image, patch))
        if image is None or patch is None:
            return 0
        frames, tube = getattr(config, "frames_per_clip", 1), getattr(config, "tubelet_size", 1)
        return max(frames // tube, 1) * (image[0] // patch[0]) * (image[1] // patch[1])

    @property
    def final_norm(self) -> nn.Module | None:
        return None if self.found.final_norm is None else self._part(self.root, self.found.final_norm)

    @property
    def pooler(self) -> nn.Module | None:
        """The attention module that pools all rows, None where the model has none."""
        return None if self.found.pooler is None else self._part(self.root, self.found.pooler)

    def pooler_mask(self, valid: Tensor) -> dict[str, Tensor]:
        """What makes the pooler look at some rows only. valid: (B, N) bool, True = a real row."""
        if isinstance(self.pooler, nn.MultiheadAttention):
            return {"key_padding_mask": ~valid}
        return {"attn_mask": valid[:, None, None, :]}

    def linear_weights(self, layer: int) -> tuple[int, int]:
        """Weights multiplied once per token before the MLP and in it: MACs per token."""
        block, steps = self.blocks[layer], self.layers[layer].steps
        if steps is not None and steps.cut is not None:
            first, second = ([self._part(block, p) for p in steps.parts(behind)] for behind in (False, True))
            return sum(map(multiplied, first)), sum(map(multiplied, second))
        attention = self.layers[layer].attention
        mine = 0 if attention is None else multiplied(self._part(block, attention))
        return mine, multiplied(block) - mine

    # -- a block's run -------------------------------------------------------------------------------------------------
    @cached_property
    def arguments(self) -> list[str]:
        """Names of what a block's forward takes besides the features, in order."""
        return list(inspect.signature(type(self.blocks[0]).forward).parameters)[2:]

    def own(self, layer: int) -> Callable[..., Any]:
        """A block's forward without us."""
        own, found = self.own_of(self.blocks[layer]), self.found
        if not (found.layout or found.keys or found.second):
            return own

        def plain(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            x, beside = self._outward(x)
            return self._inward(own(x, *args, **kwargs | beside))

        return plain

    def _outward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features, (B, N, C), as the blocks have them, and what stands in them of a second sequence, by its name."""
        if self.found.second is not None:
            return x[..., : self.channels], {self.found.second[0]: x[..., self.channels :]}
        return x.permute(outward(self.found.layout)) if self.found.layout else x, {}

    def _inward(self, out: Any) -> tuple[Any, ...]:
        """What a block gives, its features as (B, N, C)."""
        parts = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else (out,)
        x, *rest = parts
        if self.found.second is not None:
            x = torch.cat([x, rest.pop(self.found.second[1] - 1)], -1)
        return (x.permute(self.found.layout) if self.found.layout else x, *rest)

    def listen(self, hear: Callable[[Tensor], None], undo: ExitStack) -> None:
        """Until `undo` closes, `hear` is told of the features that leave each block, (B, N, C)."""

        def heard(forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            hear(self._inward(out)[0])
            return out

        for block in self.blocks:
            held = vars(block)
            kept = held.get("forward")
            if isinstance(kept, Stand):
                undo.callback(setattr, kept, "ours", kept.ours)
                kept.ours = partial(heard, kept.ours)
            else:
                undo.callback(held.pop, "forward") if kept is None else undo.callback(held.update, forward=kept)
                held["forward"] = partial(heard, block.forward)

    @staticmethod
    def own_of(module: nn.Module) -> Callable[..., Any]:
        """The same of a block or a part of one."""
        held = vars(module).get(_slot(module))
        if isinstance(held, Stand):
            return held.own
        return unchecked(type(module).forward.__get__(module) if held is None else held)

    def replaced(self, layer: int) -> str | None:
        """Who runs instead of the forward that a block's class has, if somebody does: what we know of its steps is not
        true of that."""
        block = self.blocks[layer]
        held = vars(block).get(_slot(block))
        if held is None or getattr(held, "__func__", None) is type(block).forward:  # accelerate leaves such a method
            return None
        return getattr(held, "__qualname__", type(held).__name__)

    def attending(self, layer: int, call: Call, x: Tensor) -> AbstractContextManager[Any]:
        """While this is open, the call takes part in the block's attention. x: (B, N, C), what enters the block."""
        known = self.layers[layer]
        way = known.way
        if way == "table":
            run = under.run if self.kind == "decoder" else None  # a decoder may run around others
            return self._entering(call, run, x.shape[1]) if known.anew else entering(call, run)
        if way is None or not call.asks:
            return nullcontext()
        return fused(call) if way == "fused" else entered(call, batch=x.shape[0], keys=x.shape[1])

    @staticmethod
    @contextmanager
    def _entering(call: Call, run: AttentionRun | None, rows: int) -> Iterator[None]:
        """The same for a block that counts its rows."""
        with entering(call, run), nullcontext() if call.came in (None, rows) else counting(rows, call.came):
            yield

    def run(
        self, layer: int, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any], visit: BlockRun
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """One block with the visit's plans executed at its sites. x: (B, N, C); mask: the model's own for the block's
        attention; kwargs: the block's other arguments. Returns the features and what the block gives besides."""
        if kwargs.get("is_causal") and self.kind == "vision":
            raise HostError("causal attention over patches is not supported; call the model with is_causal=False")
        x = visit.before(layer, x)
        call = visit.call(layer)
        given = visit.streams(layer, kwargs)
        mask = self.upright(visit.bias(layer, self.upright(mask)))
        if self.found.mask is not None:
            given = {**given, self.found.mask: mask}
        steps, block = self.layers[layer].steps, self.blocks[layer]
        if visit.splits(layer):
            assert steps is not None, "the session looked whether there is a way in between"
            with self.attending(layer, call, x):
                x, made = steps.first(block, self.own(layer), x, given)
            self.reached(layer, call)
            x = visit.mid(layer, x, call)
            out = steps.second(block, x, visit.streams(layer, kwargs) if steps.late else given, made)
        else:
            with self.attending(layer, call, x):
                left = self.own(layer)(x, **given)
            self.reached(layer, call)
            out = tuple(left) if isinstance(left, (tuple, list)) else (left,)
            out = (visit.mid(layer, out[0], call), *out[1:])
        rest = tuple(self._whole(part, given, kwargs) for part in out[1:])
        if not rest and self.found.tuples and kwargs.get("output_attentions"):  # a block that was stopped shows no maps
            rest = (None,)
        return visit.after(layer, out[0], call), rest

    def upright(self, mask: Tensor | None) -> Tensor | None:
        """A mask of bools as everybody else has it, True = visible; and back again."""
        return ~mask if self.found.inverted and mask is not None and mask.dtype == torch.bool else mask

    @staticmethod
    def _whole(part: Any, given: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        """What a block hands on of its arguments, for all tokens again, as the next block expects it."""
        name = next((name for name, value in given.items() if value is part and part is not None), None)
        return part if name is None else kwargs.get(name, part)

    def reached(self, layer: int, call: Call) -> None:
        """Raises HostError where a block's attention did not hear what its call asked."""
        if call.asks and not call.entered:
            raise HostError(
                f"the attention of block {layer} ({type(self.blocks[layer]).__name__}) was not reached: its "
                "implementation was changed to one that asks no attention table, or its forward was replaced"
            )

    @cached_property
    def configs(self) -> list[Any]:
        """What names the implementation of attention, for the root and each module that asks the table."""
        asking = [
            self._part(block, layer.attention)
            for block, layer in zip(self.blocks, self.layers, strict=True)
            if layer.way == "table" and layer.attention is not None
        ]
        found = [getattr(m, "config", None) for m in (self.root, *asking)] if asking else []
        return list({id(c): c for c in found if hasattr(c, "_attn_implementation_internal")}.values())

    def enter(self, undo: ExitStack) -> None:
        """Take part in the attention of the blocks; what `undo` holds ends it."""
        _occupied.add(self.root)
        undo.callback(_occupied.discard, self.root)
        if self.configs:
            Table.enter(self.configs, undo)

    def attach(
        self, forward: Callable[[int], Callable[..., Any]], undo: ExitStack, which: Collection[int] | None = None
    ) -> None:
        """The same, and give blocks, or some of them, the forward of their layer, which returns as `run` does."""
        self.enter(undo)
        self.replace(forward, undo, which)

    def replace(
        self, forward: Callable[[int], Callable[..., Any]], undo: ExitStack, which: Collection[int] | None = None
    ) -> None:
        """Give blocks the forward of their layer; what `undo` holds takes it off again."""
        for layer, block in enumerate(self.blocks):
            if which is not None and layer not in which:
                continue
            self.stand_in(block, self._packed(forward(layer)), undo)
            steps = self.layers[layer].steps
            if steps is not None and steps.catch is not None:
                part, argument = steps.catch
                stop = self._part(block, part).register_forward_pre_hook(stopping(argument), with_kwargs=True)
                undo.callback(stop.remove)

    def stand_in(self, module: nn.Module, ours: Callable[..., Any], undo: ExitStack) -> None:
        """Give a block, or a part of one, a forward; what `undo` holds takes it off again."""
        slot = _slot(module)
        before = vars(module).get(slot)
        vars(module)[slot] = stand = Stand(self.own_of(module), ours)
        undo.callback(_restore, module, stand, before)

    def _packed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that gives what the block's own does."""

        layout, keys, second = self.found.layout, self.found.keys, self.found.second

        def packed(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if second is not None:
                kwargs |= dict(zip(self.arguments, args, strict=False))
                x, args = torch.cat([x, kwargs.pop(second[0])], -1), ()
            x, rest = run(x.permute(layout) if layout else x, *args, **kwargs)
            x, beside = self._outward(x)
            if second is not None:
                rest = (*rest[: second[1] - 1], *beside.values(), *rest[second[1] - 1 :])
            if keys:
                return dict(zip(keys, (x, *rest), strict=False))
            return (x, *rest) if rest or self.found.tuples else x

        return packed

    def renew(self) -> None:
        """Take part again where another implementation of attention was chosen meanwhile."""
        if self.configs:
            Table.renew(self.configs)

    @property
    def occupied(self) -> bool:
        """Whether a session takes part already."""
        return self.root in _occupied

    @property
    def packs(self) -> bool:
        """Whether samples may be packed into one row: nothing but the features has an entry per token."""
        return all(layer.bare and not layer.anew for layer in self.layers) and not self.found.streams

    def checkpoint(self, layer: int) -> Callable[..., Tensor] | None:
        """The block's gradient-checkpointing function, if that is on and this is training."""
        block = self.blocks[layer]
        if getattr(block, "gradient_checkpointing", False) and block.training and torch.is_grad_enabled():
            return cast(Callable[..., Tensor], block._gradient_checkpointing_func)
        if getattr(self.root, "grad_checkpointing", False) and self.root.training and torch.is_grad_enabled():
            raise HostError("timm's gradient checkpointing hides recomputation; call set_grad_checkpointing(False)")
        return None

    def describe(self) -> Iterator[tuple[str, str]]:
        """What was found, as (what, value) rows."""
        kinds = list(dict.fromkeys(type(b).__name__ for b in self.blocks))
        yield "root", f"{self.path or '(the model itself)'}: {self.name}"
        yield "blocks", f"{len(self.blocks)} x {', '.join(kinds)}"
        yield "attention", f"{self.heads} heads x {self.head_dim} channels"
        yield "prefix tokens", f"{self.prefix}" + (", the first is the class token" if self.has_cls else "")
        middle = ", between attention and MLP" if "middle" in self.acts else ""
        yield "sites", f"before a block, around it{middle}, after it"


def _restore(block: nn.Module, stand: Stand, before: Any) -> None:
    """Take our forward out from where it stands now; other libraries may have put theirs before it meanwhile."""
    stand.on, stand.ours = False, stand.own  # who still holds it must not keep the session alive
    held = vars(block)
    for slot in ("forward", "_old_forward"):
        if held.get(slot) is not stand:
            continue
        if before is not None:
            held[slot] = before
        elif slot == "forward":
            del held[slot]
        else:  # accelerate keeps a bound method there
            held[slot] = type(block).forward.__get__(block)


__all__ = ["BlockRun", "Call", "Host", "HostError", "PlainRun", "Stand"]
