"""The session `fewer.apply` returns: the one place where a reducer meets a host, and the only mutable state."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import hosts, trained
from .core import Reducer, Site, Soft
from .core.codes import rounded
from .core.visual import looks
from .ledger import Ledger
from .passes import Pass, Scan
from .spec import text

Execution = Literal["padded", "packed", "masked"]
REENTRANT = 'call gradient_checkpointing_enable({"use_reentrant": False})'  # the way out


class SessionError(RuntimeError):
    """A session cannot be started, or has nothing to show yet."""


class Session:
    """A model with methods on. Use it as a context manager, or call `remove()`; both may be done twice.

    methods    the reducers, in the order they act at a shared site
    execution  "padded": samples with different counts are padded and masked; "packed": they are laid end to end and
               no padding is computed; "masked": all rows stay and the dropped ones are masked (the training form)
    """

    def __init__(
        self, model: nn.Module, methods: Sequence[Reducer], execution: Execution, host: hosts.Host,
        modules: nn.Module | str | Path | None = None,
    ) -> None:  # fmt: skip
        self.model, self.methods, self.execution, self.host = model, tuple(methods), execution, host
        self.mask_eps = 1e-6
        self._local = threading.local()
        self._latest: Pass | None = None
        self._undo = ExitStack()
        self._acting: dict[tuple[Site, int], list[tuple[int, int, int]]] = {}
        stages = []
        for index, method in enumerate(self.methods):
            depth = host.depth(method.site)
            layers = (0,) if method.site is Site.BRIDGE else method.acts_at(depth)
            if method.needs_cls and not (host.tower_has_cls if looks(method) else host.has_cls):  # type: ignore[attr-defined]
                raise SessionError(
                    f"{text(method)} ranks tokens by the class token's attention, and {host.name} has none; "
                    "choose a method that does without, such as tome or evit"
                )
            if method.across and host.kind != "cross":
                raise SessionError(
                    f"{text(method)} ranks what another sequence looks at, and {host.name} looks at itself; "
                    "apply it to a text encoder with cross-attention, such as BLIP's model.text_encoder"
                )
            if list(layers) != sorted(set(layers)):
                raise SessionError(f"{text(method)}: name each block once, in ascending order, in layers=")
            if any(layer < 0 or layer >= depth for layer in layers):
                raise SessionError(
                    f"{text(method)} acts at layers {'+'.join(map(str, layers))}, but the model has {depth} blocks "
                    f"(0 to {depth - 1}); pass layers="
                )
            for layer in layers if method.site is Site.MID_BLOCK else ():
                if who := host.replaced(layer):
                    raise hosts.HostError(
                        f"{text(method)} acts between attention and MLP, but the forward of block {layer} was replaced "
                        f"by {who}, which cannot be stopped there; put the block's own back (del block.forward), name "
                        "other blocks in layers=, or choose a method that acts before or behind a block"
                    )
            for stage, layer in enumerate(layers):
                self._acting.setdefault((method.site, layer), []).append((index, stage, len(layers)))
            stages.append(len(layers))
        self.modules = trained.prepare(model, host, self.methods, stages, modules)

    # -- on and off ----------------------------------------------------------------------------------------------------
    def _attach(self) -> None:
        with ExitStack() as undo:  # if a later step fails, the earlier ones come off again
            self.host.attach(lambda layer: partial(self._block, layer), undo)
            patch, norm, pooler = self.host.patch, self.host.final_norm, self.host.pooler
            if patch is not None:
                undo.callback(patch.register_forward_hook(self._see_grid).remove)
            if norm is not None and not self.host.dense:
                undo.callback(norm.register_forward_hook(self._fill_padding).remove)
            if self.host.reader is not None:
                undo.callback(self.host.reader.register_forward_pre_hook(self._follow, with_kwargs=True).remove)
            if pooler is not None:
                undo.callback(pooler.register_forward_pre_hook(self._mask_pooler, with_kwargs=True).remove)
            self._round(undo)
            self._undo = undo.pop_all()

    def _round(self, undo: ExitStack) -> None:
        """Round what enters the blocks' matrices, for methods that come with few bits."""
        bits = min((m.activation_bits for m in self.methods if m.activation_bits is not None), default=None)
        if bits is None:
            return
        for block in self.host.blocks:
            for module in block.modules():
                if type(module).__name__ in hosts.MATRICES:
                    undo.callback(module.register_forward_pre_hook(partial(_rounded_input, bits)).remove)

    def remove(self) -> None:
        """Take everything off: the model is as it was, to the bit. What was traced stays readable."""
        self._undo.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SessionError("a model with a session on cannot be copied or pickled: call session.remove() first")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # -- called by the host --------------------------------------------------------------------------------------------
    def _block(self, layer: int, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Any, ...]]:
        """Stands in for a block's forward."""
        host = self.host
        kwargs |= dict(zip(host.arguments, args, strict=False))
        if layer == 0:
            host.renew()
        mask = None if host.found.mask is None else kwargs.pop(host.found.mask, None)
        checkpoint = host.checkpoint(layer)
        visit = self._visit(layer, x, mask, kwargs)
        if visit is None:
            out = host.own(layer)(x, **({} if host.found.mask is None else {host.found.mask: mask}), **kwargs)
            return (out[0], tuple(out[1:])) if isinstance(out, tuple) else (out, ())
        last = layer + 1 == len(host.blocks) and host.final_norm is None and not host.dense
        if checkpoint is None:
            x, rest = host.run(layer, x, mask, kwargs, visit)
            return self._filled(x) if last else x, rest
        # The backward pass runs the block once more: from a copy of the state at its entry, leaving the trace alone.
        entry, visits, under_way = visit.fork(), [visit], hosts.under.run

        def run(x: Tensor) -> Any:
            apart = bool(visits) and not torch.is_grad_enabled()  # reentrant: a graph of its own for every block
            if apart and any(p.requires_grad for p in self.modules.parameters()):
                raise SessionError(f"reentrant checkpointing loses the gradient of learned masks; {REENTRANT}")
            with hosts.running(under_way):
                out = host.run(layer, x, mask, kwargs, visits.pop() if visits else entry.fork())
            if apart and (what := self._beside(visit)):
                raise SessionError(f"reentrant checkpointing loses the gradient of {what}; {REENTRANT}")
            return out

        x, rest = checkpoint(run, x)
        return self._filled(x) if last else x, rest

    def _beside(self, visit: Any) -> str | None:
        """What reaches later blocks or the output beside the features, and carries a gradient."""
        steps = [step for step in getattr(visit, "steps", ()) if step.method >= 0]
        if steps and self.host.text:
            return "tokens that are dropped and have a row in the output"
        return "the sizes of merged tokens" if any(isinstance(step.plan, Soft) for step in steps) else None

    def _visit(self, layer: int, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> hosts.Visit | None:
        """The forward pass that reaches a block; None where no method acts in it."""
        if layer == 0:
            x, mask = self.host.entering(x, mask, kwargs)
        if layer == 0 and self.host.text:
            kind = Scan if self.host.kind == "scan" else Pass
            self._local.current = kind(self, x, valid=None if mask is None else _seen_by_any(mask))
        elif layer == 0:
            self._local.current = Pass(self, x, getattr(self._local, "grid", None))
        current = getattr(self._local, "current", None)
        if current is None:
            raise SessionError(f"block {layer} was called before block 0; run the model from its first block")
        return current

    def _follow(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """A decoder that looks at the encoder's rows looks at those that are left: its mask of them follows. Beams
        repeat each sample."""
        names = list(inspect.signature(type(decoder).forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        rows, last = given.get("encoder_hidden_states"), getattr(self._local, "finished", None)
        if rows is None or last is None or not last.steps or rows.shape[1] != last.tokens.n:
            return None
        place = last.kept(len(self.host.blocks) - 1).repeat_interleave(max(len(rows) // last.first.batch, 1), 0)
        mask = given.get("encoder_attention_mask")
        if mask is not None and mask.dim() == 2 and mask.shape[-1] == last.first.n:
            return (), {**given, "encoder_attention_mask": mask.gather(1, place.clamp(min=0)) * (place >= 0)}
        if last.tokens.valid is None:
            return None
        if "encoder_attention_mask" not in names:
            raise SessionError(
                f"samples keep different numbers of rows, and {type(decoder).__name__} takes no mask of its encoder's "
                "rows; use a budget that keeps the same number in all samples"
            )
        return (), {**given, "encoder_attention_mask": (place >= 0).long()}

    def _see_grid(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        if output.dim() == 4:
            self._local.grid = (output.shape[-2], output.shape[-1])

    def _fill_padding(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return self._filled(output)

    def _filled(self, x: Tensor) -> Tensor:
        """Rows that are padding or masked take the mean of the sample's real patch rows: mean pooling stays exact."""
        real = self._real(x)
        if real is None:
            return x
        weight = real.to(x.dtype)[..., None]
        pooled, share = x[:, self.host.pools_from :], weight[:, self.host.pools_from :]
        mean = (pooled * share).sum(1, keepdim=True) / share.sum(1, keepdim=True).clamp_min(1)
        return torch.where(weight > 0, x, mean)

    def _mask_pooler(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """An attention-pooling head looks at real rows only."""
        x = args[-1]
        real = self._real(x)
        if real is None:
            return None
        mask = self.host.pooler_mask(real[:, -x.shape[1] :] > 0)
        if not mask.keys() <= inspect.signature(module.forward).parameters.keys():
            raise hosts.HostError(
                f"{type(module).__name__} pools all rows and takes no mask; use a budget that keeps the same number in "
                "all samples"
            )
        return args, kwargs | mask

    def _real(self, x: Tensor) -> Tensor | None:
        """(B, N) how much each final row is there, bool or the learned policy; None where all rows are."""
        current = getattr(self._local, "current", None)
        if current is None or x.dim() != 3:
            return None
        tokens = current.tokens
        return tokens.policy if tokens.policy is not None else tokens.valid

    # -- called by the pass --------------------------------------------------------------------------------------------
    def acting(self, site: Site, layer: int) -> list[tuple[int, int, int]]:
        """(method, stage, stages) of every method that acts there."""
        return self._acting.get((site, layer), [])

    def watches(self, layer: int) -> bool:
        """Whether some method looks at this block's attention."""
        return bool(self.acting(Site.MID_BLOCK, layer) or self.acting(Site.AFTER_BLOCK, layer))

    def modules_of(self, method: int, stage: int) -> nn.ModuleDict:
        """The trained modules of a method at a stage."""
        own: Any = self.modules[method]
        if not len(own):
            return nn.ModuleDict()
        mine = own[stage % len(own)]
        return mine if mine.training == self.training else mine.train(self.training)

    def save_modules(self, path: str | Path, card: Mapping[str, str] | None = None) -> list[Path]:
        """Write the methods' trained modules: into a folder, or as one .safetensors file. Returns the files.

        card: what to say about them besides their method and shape, kept in the files' metadata.
        """
        return trained.save(path, self.methods, self.modules, self.host, card or {})

    @property
    def training(self) -> bool:
        """Whether trained methods take their training form."""
        return self.model.training

    def finished(self, run: Pass) -> None:
        """A forward pass came to its end: what the session shows from now on."""
        self._local.finished = self._latest = run

    # -- the trace -----------------------------------------------------------------------------------------------------
    @property
    def last(self) -> Pass:
        """This thread's last finished forward pass, else the last of any thread."""
        current = getattr(self._local, "finished", None) or self._latest
        if current is None:
            raise SessionError("no forward pass yet: call the model first")
        return current

    @property
    def counts(self) -> list[int] | Tensor:
        """Tokens after each block; (layers, B) where samples differ."""
        return self.last.counts

    @property
    def ledger(self) -> Ledger:
        """What the last forward pass cost."""
        return self.last.ledger

    @property
    def origin(self) -> Tensor:
        """(B, N0): the final row of each input token, -1 = dropped."""
        return self.last.rows()

    def kept(self, layer: int) -> Tensor:
        """(B, M): the input tokens the rows after `layer` stand for, row by row."""
        return self.last.kept(range(len(self.host.blocks))[layer])

    def restore(self, features: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """Final rows spread back over the patch grid. features: (B, M, C), prefix included.

        Returns (B, height, width, C), or (B, N0 - prefix, C) where the model's patches form no known grid.
        """
        dense = self.last.restore(features, fill)[:, self.host.prefix :]
        grid = self.last.grid
        return dense if grid is None else dense.unflatten(1, grid)

    def report(self) -> str:
        """The last pass in words: tokens per block, cost, the method's own share, notes."""
        ledger, counts = self.ledger, self.counts
        shown = counts if isinstance(counts, list) else [round(c, 1) for c in counts.float().mean(1).tolist()]
        own = f", own share {100 * ledger.gflops_own / ledger.gflops:.1f} % of FLOPs"
        if ledger.seconds and ledger.own_seconds is not None:
            own += f", {100 * ledger.own_seconds / ledger.seconds:.1f} % of time"
        lines = [
            " ".join(text(m) for m in self.methods),
            f"tokens {self.last.first.n} -> {' '.join(map(str, shown))}",
            f"{ledger.gflops_full:.2f} -> {ledger.gflops:.2f} GFLOPs (ceiling {ledger.ceiling:.2f}x{own})",
            *ledger.notes,
        ]
        return "\n".join(lines)


def _rounded_input(bits: int, _module: nn.Module, args: tuple) -> tuple:
    return (rounded(args[0], bits), *args[1:])


def _seen_by_any(mask: Tensor) -> Tensor:
    """(B, N) bool: the tokens some query may look at, all but padding. mask: (B, 1, N, N), True or 0 = visible; or
    (B, N)."""
    if mask.dim() == 2:
        return mask != 0
    return (mask if mask.dtype == torch.bool else mask >= 0)[:, 0].any(-2)


def check_free(host: hosts.Host) -> None:
    """Raises SessionError where a session is on."""
    if host.occupied:
        raise SessionError(
            "this model already has a session on it: call remove() first, or give apply a list of methods"
        )


def start(
    model: nn.Module, methods: Sequence[Reducer], execution: Execution, modules: nn.Module | str | Path | None,
    host: hosts.Host,
) -> Session:  # fmt: skip
    """Put methods into a model's blocks; `fewer.apply` says what the arguments are and what is raised."""
    check_free(host)
    if execution == "packed" and not host.packs:
        raise SessionError(f"packed execution does not carry {host.name}'s bias or mask; use execution='padded'")
    if execution != "padded" and host.kind == "scan":
        raise SessionError(
            f"a state-space model reads every row it is given, so execution={execution!r} would change its answers; "
            "use execution='padded'"
        )
    if host.kind == "scan" and (fused := [text(m) for m in methods if m.extra]):
        raise SessionError(
            f"{', '.join(fused)} melts dropped tokens into one more row, which has no place among the words of a "
            "causal text; choose a method or a form that only prunes (fuse=false)"
        )
    session = Session(model, methods, execution, host, modules)
    session._attach()
    return session
