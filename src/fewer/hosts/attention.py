"""A block's attention, entered: what a session adds to it and sees of it, and the way there in transformers.

Modules of transformers ask a table for their attention function. While sessions are on, our name stands in the configs
and our function in the table; it runs the function the config named before. Who takes part in the call under way is
known per thread.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fewer.compat import maps_wanted
from fewer.core import Seen
from fewer.core.attention import attend, masked_attention

NAME = "fewer"  # our key in the attention tables while a session is on
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # of the fused kernel, by place
SUPPORTED = ("sdpa", "eager")  # implementations that take an additive mask
BESIDE = "position_bias"  # what attention is given to add to its logits, besides the mask


class HostError(TypeError):
    """A model, or a part of one, that a session cannot act in: what was found, what is missing, what else to do."""


class Call:
    """One attention call under way: what to add to it, and what it saw.

    bias: (B, 1, 1, N) additive, float32, or None; policy: (B, N) learned mask, or None; watch: whether to remember
    q, k, v; split: where rows are packed, runs the kernel sample by sample; whole: of a decoder, all cached rows are
    looked at; fit: the model's own bias, made inside the block for all tokens, at the ones that are left; came: how
    many all tokens are, where the block counts its rows to make one.
    """

    def __init__(
        self, bias: Tensor | None = None, policy: Tensor | None = None, eps: float = 1e-6, watch: bool = False,
        split: Callable[..., Tensor] | None = None, whole: bool = False,
        fit: Callable[[Tensor], Tensor] | None = None, came: int | None = None,
    ) -> None:  # fmt: skip
        self.bias, self.policy, self.eps, self.watch, self.split, self.whole = bias, policy, eps, watch, split, whole
        self.fit, self.came = fit, came
        self.kernel: Callable[..., Tensor] = attend  # what packed rows are computed with
        self.entered = False  # whether an attention heard it
        self.seen: Seen | None = None
        self.real: Tensor | None = None  # (B, N) bool, for mixers without attention; None = as the mask says
        self.branch: Tensor | None = None  # (B, N, C), what such a mixer gave
        self.where: Tensor | None = None  # of whole: the input positions of the rows, (B or 1, 1, S)

    @property
    def asks(self) -> bool:
        """Whether it wants anything of the attention."""
        return any(one is not None for one in (self.bias, self.policy, self.split, self.fit)) or self.watch

    @property
    def only_looks(self) -> bool:
        """Whether attention is to stay what it is."""
        return self.bias is None and self.policy is None and self.split is None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, dropout: float) -> Tensor:
        """Attention with what this call adds. q: (B, H, N, d), k, v: (B, G, N, d), mask: the model's own. Returns
        (B, H, N, d)."""
        bias = summed(mask, self.bias, v.dtype)
        bias = None if bias is None else _additive(bias, v.dtype)
        self.look(q, k, v, scale, bias)
        if self.policy is not None:
            return masked_attention(q, k, v, scale, bias, self.policy, self.eps)
        return (self.kernel if self.split is None else self.split)(q, k, v, scale, bias, dropout)

    def attend(
        self, module: nn.Module, plain: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The same where transformers asks its table. plain: the model's own function, which runs where it can.
        Returns (B, N, H, d) and the probabilities, where the model's own function gives them."""
        beside = kwargs.get(BESIDE)
        if self.fit is not None:
            mask = None if mask is None else self.fit(mask)
            beside = None if beside is None else self.fit(beside)
            kwargs = kwargs if beside is None else {**kwargs, BESIDE: beside}
        if mask is None and not self.only_looks:
            mask = unsaid(module, q, k, kwargs)
        scale = kwargs.get("scaling")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        learned = self.policy is not None and self.policy.requires_grad
        if learned or self.split is not None:
            if special := [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]:
                form = "a mask that learns" if learned else "packed rows"
                raise HostError(
                    f"{form} cannot go through an attention with {' and '.join(special)} ({type(module).__name__}); "
                    + ("call model.eval()" if learned else "use execution='padded'")
                )
            out = self(q, k, v, scale, summed(mask, beside, v.dtype), kwargs.get("dropout", 0.0))
            self.no_maps(module)
            return out.transpose(1, 2).contiguous(), None
        bias = summed(mask, self.bias, v.dtype)
        if self.watch:
            self.look(q, k, v, scale, summed(unsaid(module, q, k, kwargs) if bias is None else bias, beside, v.dtype))
        self.entered = True
        if self.policy is not None:  # it only hides, so that the model's own function can do it
            bias = summed(bias, _dropped(self.policy), v.dtype)
        return plain(module, q, k, v, bias, **kwargs)

    def look(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> None:
        """Remember what attention was given, where that is asked."""
        self.entered = True
        if self.watch:
            shown = bias if self.policy is None else summed(_dropped(self.policy), bias, v.dtype)
            self.seen = Seen(q, k, v, scale, shown)

    @staticmethod
    def no_maps(module: nn.Module) -> None:
        """Raises HostError where attention that gives no maps runs in a model that is to show them."""
        if Table.before(getattr(module, "config", None)) == "eager" and maps_wanted():
            raise HostError(
                "attention of packed or softly masked rows has no maps to show for output_attentions=True; use "
                "execution='padded' and model.eval(), or call the model without"
            )


def unsaid(module: nn.Module, q: Tensor, k: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The causal mask of an attention that says it by a flag, as a mask: (1, 1, Q, N) bool; None where it has none.
    A kernel that is given any mask takes the flag for nothing."""
    flag = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", False) if flag is None else flag) or q.shape[-2] == 1:
        return None
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()[None, None]


def summed(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask and a bias as one; a mask alone stays as it is."""
    if bias is None:
        return mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    added = _additive(bias, dtype)
    return (added if mask is None else _additive(mask, dtype) + added).to(dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask, bool with True = visible, as what is added to logits."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def _dropped(policy: Tensor) -> Tensor:
    """A learned mask as a bias for those who look: dropped keys get no attention. (B, N) -> (B, 1, 1, N), bool."""
    return (policy > 0)[:, None, None, :]


class fused(TorchFunctionMode):
    """While this is open, the fused kernel hears a call: of a module that asks torch for it, and no table."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        if given.get("is_causal"):
            return func(*args, **kwargs)
        q, k, v, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
        scale = given.get("scale") or q.shape[-1] ** -0.5
        if self.call.fit is not None and mask is not None:
            mask = self.call.fit(mask.view(*(1,) * (q.dim() - mask.dim()), *mask.shape))
        if self.call.only_looks:
            self.call.look(q, k, v, scale, mask)
            return func(**(given | {"attn_mask": mask}))
        return self.call(q, k, v, scale, mask, given.get("dropout_p", 0.0))


class counting(TorchFunctionMode):
    """While this is open, a block that counts the rows it is given, to make a bias between all pairs of them, counts
    those that came in: rows have left since, and what is left keeps its places. What it makes is for all pairs, too."""

    def __init__(self, rows: int, came: int) -> None:
        super().__init__()
        self.rows, self.came = rows, came

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.arange and args in ((self.rows,), (0, self.rows)):
            args = (self.came,)
        return func(*args, **kwargs or {})


class AttentionRun(Protocol):
    """What a session does with the attention calls of a pass over a decoder."""

    def attend(self, module: nn.Module, plain: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
               kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip


class _UnderWay(threading.local):
    call: Call | None = None  # of the block that runs
    run: AttentionRun | None = None  # of the decoder that runs
    spy: Callable[..., None] | None = None  # of a discovery


under = _UnderWay()


@contextmanager
def entering(call: Call | None, run: AttentionRun | None) -> Iterator[None]:
    """While this is open, attention that asks the table hears the call, as a part of the run."""
    before = under.call, under.run
    under.call, under.run = call, run
    try:
        yield
    finally:
        under.call, under.run = before


@contextmanager
def running(run: AttentionRun | None) -> Iterator[None]:
    """While this is open, attention that asks the table is the run's."""
    before, under.run = under.run, run
    try:
        yield
    finally:
        under.run = before


@contextmanager
def spying(spy: Callable[..., None]) -> Iterator[None]:
    """While this is open, whoever asks the table is told of: spy(module, q, k, v, mask, kwargs)."""
    before, under.spy = under.spy, spy
    try:
        yield
    finally:
        under.spy = before


def attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Our entry in the attention table. Where nobody takes part, the model's own function runs."""
    plain = Table.implementation(module)
    if under.spy is not None:
        under.spy(module, query, key, value, attention_mask, kwargs)
    if under.run is not None:
        return under.run.attend(module, plain, query, key, value, attention_mask, kwargs)
    if under.call is not None:
        return under.call.attend(module, plain, query, key, value, attention_mask, kwargs)
    return plain(module, query, key, value, attention_mask, **kwargs)


def mask_forward(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """Our entry in the mask table: the mask the model's own implementation would get."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS[Table.before(config)](*args, config=config, **kwargs)


class Table:
    """Our name in configs and in transformers' attention tables, while sessions are on."""

    _lock = threading.Lock()
    _users = 0
    # By id: the implementation before the first session, sessions, and the config itself: no other may get its id while
    # a session that nobody took off still counts here.
    _configs: ClassVar[dict[int, tuple[str, int, Any]]] = {}

    @classmethod
    def enter(cls, configs: Sequence[Any], undo: ExitStack) -> None:
        """Enter the global tables and put our name into some configs; what `undo` holds takes it out again."""
        cls._register(undo)
        for config in {id(c): c for c in configs}.values():
            cls._enter(config)
            undo.callback(cls._leave, config)

    @classmethod
    def renew(cls, configs: Sequence[Any]) -> None:
        """Where somebody chose another implementation meanwhile (set_attn_implementation): that one runs from now on,
        and our name stands before it again."""
        for config in configs:
            chosen = config._attn_implementation_internal
            if chosen != NAME and id(config) in cls._configs:
                with cls._lock:
                    _, users, _ = cls._configs[id(config)]
                    cls._configs[id(config)] = (chosen, users, config)
                    config._attn_implementation_internal = NAME

    @classmethod
    def before(cls, config: Any) -> str:
        """The implementation a config named before the session; "sdpa" where ours cannot add to it."""
        before, *_ = cls._configs.get(id(config), ("sdpa",))
        return before if before in SUPPORTED else "sdpa"

    @classmethod
    def implementation(cls, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The attention function a module would use without a session."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(cls.before(getattr(module, "config", None)), eager)

    @classmethod
    def _enter(cls, config: Any) -> None:
        """Put our name into a config; models may share one, so sessions are counted."""
        with cls._lock:
            before, users, _ = cls._configs.get(id(config), (config._attn_implementation_internal, 0, config))
            cls._configs[id(config)] = (before, users + 1, config)
            config._attn_implementation_internal = NAME

    @classmethod
    def _leave(cls, config: Any) -> None:
        with cls._lock:
            before, users, _ = cls._configs.pop(id(config))
            chosen = config._attn_implementation_internal
            before = before if chosen == NAME else chosen  # somebody chose another one meanwhile
            if users > 1:
                cls._configs[id(config)] = (before, users - 1, config)
            else:
                config._attn_implementation_internal = before

    @classmethod
    def _register(cls, undo: ExitStack) -> None:
        """Enter the global tables with the first session, leave them with the last."""
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface

        def leave() -> None:
            with cls._lock:
                Table._users -= 1
                if not Table._users:
                    AttentionInterface._global_mapping.pop(NAME, None)
                    AttentionMaskInterface._global_mapping.pop(NAME, None)

        with cls._lock:
            AttentionInterface.register(NAME, attention_forward)
            AttentionMaskInterface.register(NAME, mask_forward)
            Table._users += 1
        undo.callback(leave)


__all__ = [
    "BESIDE", "NAME", "SUPPORTED", "AttentionRun", "Call", "HostError", "Table", "counting", "entering", "fused",
    "running", "spying", "summed", "under", "unsaid",
]  # fmt: skip
