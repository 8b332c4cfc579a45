"""Attention that a model writes out by hand, entered where it takes the softmax of a product of queries and keys.

The model's own code runs; nothing is patched. While it runs, a torch function mode (of this thread alone) follows what
becomes of each product: logits are scaled, masked, cast and reshaped until they meet a softmax, probabilities are
dropped out and masked until they meet the values. The fused kernel and torch's multi-head attention are entered too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from fewer.core import Seen

from .attention import Call, HostError, _dropped, summed

PRODUCTS = {"matmul": ("input", "other"), "bmm": ("input", "mat2"), "baddbmm": ("input", "batch1", "batch2")}
FUSED = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # the fused kernel's positional arguments
# What the steps between a product and a softmax, or between a softmax and the values, do with numbers.
STEPS = {
    "add": "add", "sub": "sub", "subtract": "sub",
    "mul": "mul", "multiply": "mul", "div": "div", "divide": "div", "true_divide": "div",
    **dict.fromkeys(
        ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "expand",
         "expand_as", "to", "float", "half", "bfloat16", "double", "type", "type_as", "view_as", "reshape_as"), "keep"),
    **dict.fromkeys(
        ("masked_fill", "where", "clamp", "clamp_min", "clamp_max", "clip", "max", "maximum", "min", "minimum", "tanh",
         "neg", "rsub", "nan_to_num", "dropout", "setitem"), "bend"),
}  # fmt: skip


@contextmanager
def entered(call: Call, batch: int | None = None, keys: int | None = None) -> Iterator[None]:
    """While this is open, a call takes part in the attention of one module.

        with entered(call, batch=len(x), keys=x.shape[1]):
            y = module(x, ...)

    batch, keys: how many samples and keys the attention looked for has; one with other sizes (over windows, channels
    or landmarks) is not it. By default they are those of `call.bias` or `call.policy`, and where there is neither,
    any. `batch` is what tells samples from heads where a model keeps both in one dimension.

    q and k are seen as they meet in the product: a model that scales its queries before has a scale of 1.
    Afterwards `call.entered` says whether there was such an attention and none of other sizes; only then is there a
    `call.seen`, if `call.watch`. Of several over the same tokens, which all are acted on, it is the one with the widest
    queries. A call that asks for nothing, or only watches, leaves the module's bits as they are, so it can be
    used to find out. Packed rows are computed twice, once in vain: as the model would, and sample by sample.
    Raises   HostError if there was no such attention for a bias, a policy or packed rows to act on.
    """
    mode = _Entered(call, batch, keys)
    with mode:
        yield
    mode.close()


@dataclass(frozen=True, eq=False)
class _Logits:
    """What is known of a tensor of logits: scale * q k^T + bias, in one of the models' layouts.

    q: (B, H, Q, d), k: (B, G, N, d), None where nobody can tell samples from heads; bias: broadcastable to
    (B, H, Q, N), or None; exact: False once something else was done to the logits, the bias is then their difference;
    version: torch's count of writes to their memory when this was noted.
    """

    q: Tensor | None
    k: Tensor | None
    scale: float = 1.0
    bias: Tensor | None = None
    exact: bool = True
    version: int = 0


class _Entered(TorchFunctionMode):
    """Follows tensors weakly: what a model is done with is freed as it would be without us."""

    def __init__(self, call: Call, batch: int | None, keys: int | None) -> None:
        super().__init__()
        known = call.bias if call.policy is None else call.policy
        self.call = call
        self.batch = batch if batch is not None or known is None else known.shape[0]
        self.keys = keys if keys is not None or known is None else known.shape[-1]
        self.acts = known is not None or call.split is not None
        self.looks = call.watch or call.split is not None  # only then is it worth to know q, k, scale and bias
        self.learns = torch.is_grad_enabled()
        self.logits, self.probs = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self.dropout = 0.0
        self.found = self.met = False  # its softmax, its values
        self.waits = 0  # softmaxes whose values are still to come
        self.wide = 0  # channels of the queries that were looked at
        self.others = 0  # attentions besides
        call.entered = False

    def close(self) -> None:
        if self.met and not (self.others or self.waits):
            self.call.entered = True
            return
        self.call.seen = None
        if not self.acts:
            return
        why = "there is no softmax of a product of queries and keys whose probabilities meet values"
        if others := self.others + self.waits * (self.met or self.waits > 1):
            why = f"there are {others} softmaxes of products besides, or none of the size looked for"
        size = "" if self.keys is None else f" over {self.keys} keys"
        raise HostError(f"this module has no attention{size} that could be entered: {why}")

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        full = getattr(func, "__name__", "")
        name = full.strip("_")
        if name in PRODUCTS or name == "einsum":
            return self._product(name, func, args, kwargs)
        if name == "softmax":
            return self._softmax(func, args, kwargs)
        if name == "scaled_dot_product_attention":
            return self._fused(func, args, kwargs)
        if name == "multi_head_attention_forward":
            query = args[0] if args else kwargs["query"]
            if self.batch is None and query.dim() == 3:
                self.batch = query.shape[1]
            with self:
                return _opened(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        if name in STEPS:
            self._follow(STEPS[name], name, args, kwargs, out)
        return out

    # -- from a product to a softmax -----------------------------------------------------------------------------------
    def _product(self, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
        names = PRODUCTS.get(name, ())
        operands = (*args, *(kwargs.get(n) for n in names[len(args) :]))
        parts = _of_einsum(*args) if name == "einsum" else (operands[-2], operands[-1], None)
        if parts is None or parts[0] is None or parts[1] is None:
            return func(*args, **kwargs)
        left, right, order = parts
        first = args[1] if name == "einsum" else left
        if isinstance(first, Tensor) and first in self.probs:
            return self._meet(self.probs[first], right, order, func, args, kwargs)
        out = func(*args, **kwargs)
        straight = order is None or list(order) == sorted(order)
        if left.dim() == right.dim() == out.dim() >= 3 and straight and left.is_floating_point():
            found = _Logits(self._heads(left), self._heads(right.transpose(-1, -2)))
            if name == "baddbmm":
                more = {n: kwargs.get(n, 1) for n in ("beta", "alpha")}
                bias = self._aligned(operands[0], out.shape) if self.looks else None
                found = replace(found, scale=more["alpha"], bias=bias if bias is None else bias * more["beta"])
            self.logits[out] = replace(found, version=_version(out))
        return out

    def _follow(self, step: str, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        place, source = next(
            ((i, a) for i, a in enumerate(args[:3]) if isinstance(a, Tensor) and (a in self.logits or a in self.probs)),
            (0, None),
        )
        if source is None:
            return
        out = source if name == "setitem" else out
        if not isinstance(out, Tensor) or out.shape[-2:] != source.shape[-2:] or out.numel() != source.numel():
            return
        if source in self.probs:
            self.probs[out] = self.probs[source]
            if name == "dropout" and kwargs.get("training", True):
                self.dropout = float(kwargs.get("p", args[1] if len(args) > 1 else 0.5))
            return
        found = self.logits[source]
        if self.looks and found.q is not None and step != "keep":
            other = args[1 - place] if len(args) == 2 and not kwargs else None
            swapped = place == 1 and step in ("sub", "div")
            found = self._stepped(found, "bend" if swapped or other is None else step, other, source.shape)
        self.logits[out] = replace(found, version=_version(out))

    def _stepped(self, found: _Logits, step: str, other: Any, shape: torch.Size) -> _Logits:
        """What is known of logits after one step. other: a number or a tensor that broadcasts to their shape."""
        number = isinstance(other, (int, float))
        if step in ("add", "sub") and number:
            return found  # the same to all keys: no softmax sees it
        if step in ("mul", "div") and number:
            bias = found.bias
            if step == "div":
                return replace(found, scale=found.scale / other, bias=None if bias is None else bias / other)
            return replace(found, scale=found.scale * other, bias=None if bias is None else bias * other)
        term = self._aligned(other, shape) if isinstance(other, Tensor) and step != "bend" else None
        if term is None or not found.exact:
            return replace(found, exact=False)
        if step in ("add", "sub"):
            term = (-term if step == "sub" else term).expand(*term.shape[:-1], shape[-1])
            return replace(found, bias=term if found.bias is None else found.bias + term)
        if term.shape[-1] > 1:
            return replace(found, exact=False)
        term = 1 / term if step == "div" else term  # a temperature, the same to all keys of a query: it is q's as well
        assert found.q is not None
        return replace(found, q=found.q * term, bias=None if found.bias is None else found.bias * term)

    # -- the softmax ---------------------------------------------------------------------------------------------------
    def _softmax(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        logits = args[0] if args else kwargs["input"]
        found = self.logits.get(logits)
        if found is None:
            return func(*args, **kwargs)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dim not in (-1, logits.dim() - 1) or not self._fits(logits.shape):
            self.others += 1
            return func(*args, **kwargs)
        self.found, sight = True, None
        self.waits += 1
        if self.looks:
            sight = self._seen(logits, found)
            self._check(sight.bias)  # here: Python takes what is raised inside an `@` for a wrong type
        kwargs = {n: value for n, value in kwargs.items() if n != "input"}
        probs = self._weigh(func, logits, args[1:], kwargs)
        self.probs[probs] = [sight]  # until they meet the values
        return probs

    def _weigh(self, func: Any, logits: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """The softmax of logits with what the call adds."""
        call = self.call
        dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), logits.dtype)
        added = logits
        if call.bias is not None:
            heads = logits.shape[0] // self.batch if logits.dim() == 3 and self.batch else 1
            bias = call.bias.to(dtype)
            if logits.dim() == 3:
                bias = bias.expand(self.batch or 1, heads, -1, -1).flatten(0, 1)
            elif logits.dim() > 4:
                bias = bias[(slice(None), *(None,) * (logits.dim() - 4))]
            added = logits.to(dtype) + bias
        if call.policy is None:
            return func(added, *args, **kwargs)
        if call.policy.requires_grad and self.learns and not torch.is_grad_enabled():
            raise HostError(
                "this attention takes its softmax inside an autograd function of its own, where a learned mask gets no "
                "gradient; call model.eval() or train without one"
            )
        if logits.shape[-1] != logits.shape[-2]:
            raise HostError(
                f"a learned mask needs queries that are the keys; here are {logits.shape[-2]} queries and "
                f"{logits.shape[-1]} keys"
            )
        full = self._heads(added)
        assert full is not None  # a policy tells how many samples there are
        return _masked_softmax(full, call.policy, call.eps).view_as(logits).to(dtype)

    def _seen(self, logits: Tensor, found: _Logits) -> _Logits:
        full = self._heads(logits)
        if full is None or found.q is None or found.k is None:
            raise HostError(
                f"logits of shape {tuple(logits.shape)} hold samples and heads in one dimension; say how many samples "
                "there are: entered(call, batch=...)"
            )
        if found.exact and found.version == _version(logits):  # else somebody wrote to a view of them
            return found
        with torch.autocast(logits.device.type, enabled=False):
            plain = (found.q.float() * found.scale) @ found.k.float().transpose(-1, -2)
        return replace(found, bias=full.float() - plain)

    # -- from the softmax to the values --------------------------------------------------------------------------------
    def _meet(
        self, waiting: list[_Logits | None], v: Tensor, order: tuple[int, ...] | None, func: Any, args: tuple,
        kwargs: dict,
    ) -> Tensor:  # fmt: skip
        """The product of probabilities and values. waiting: what is known of the logits, until this was called; v:
        (..., N, d); order: of the result's dimensions (..., Q, d)."""
        if not waiting or v in self.probs:
            return func(*args, **kwargs)
        call, full, self.met, sight = self.call, self._heads(v), True, waiting.pop()
        self.waits -= 1
        if sight is None or full is None:
            return func(*args, **kwargs)
        self._look(sight, full)
        if call.split is None or call.policy is not None:
            return func(*args, **kwargs)
        q, k, scale = sight.q, sight.k, sight.scale
        out = call.split(q, k, full, scale, summed(sight.bias, call.bias, full.dtype), self.dropout)
        assert q is not None
        if order is not None:
            return out.permute(order)
        return out if v.dim() == 4 else out.reshape(*v.shape[:-2], *out.shape[-2:])

    def _look(self, sight: _Logits, v: Tensor, causal: bool = False) -> None:
        call = self.call
        assert sight.q is not None and sight.k is not None
        if not call.watch or sight.q.shape[-1] <= self.wide:
            return
        self.wide = sight.q.shape[-1]
        shown = sight.bias
        if call.bias is not None or call.policy is not None:
            shown = summed(shown, call.bias, v.dtype)
            shown = shown if call.policy is None else summed(_dropped(call.policy), shown, v.dtype)
        call.seen = Seen(sight.q, sight.k, v, sight.scale, shown, causal)

    def _check(self, mask: Tensor | None) -> None:
        """Packed rows have no mask over pairs. mask: (B, H, Q or 1, N)."""
        packed = self.call.split is not None and self.call.policy is None
        if packed and mask is not None and mask.shape[-2] > 1:
            raise HostError(
                "this attention adds something to each pair of rows (relative positions, a causal mask), which packed "
                "rows do not have; use execution='padded'"
            )

    # -- the fused kernel ----------------------------------------------------------------------------------------------
    def _fused(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        named = dict(zip(FUSED, args, strict=False)) | kwargs
        q, k, v = (named[n] for n in FUSED[:3])
        if self.found or not self._fits((*k.shape[:-2], q.shape[-2], k.shape[-2])):
            self.others += 1
            return func(*args, **kwargs)
        self.found = self.met = True
        if not (self.acts or self.looks):
            return func(*args, **kwargs)
        scale = named.get("scale")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        mask, causal = named.get("attn_mask"), bool(named.get("is_causal"))
        fq, fk, fv = (self._heads(t) for t in (q, k, v))
        if fq is None or fk is None or fv is None:
            raise HostError(
                f"queries of shape {tuple(q.shape)} hold samples and heads in one dimension; say how many samples "
                "there are: entered(call, batch=...)"
            )
        shape = (*q.shape[:-1], k.shape[-2])
        mask = None if mask is None else self._aligned(mask, torch.Size(shape))
        sight = _Logits(fq, fk, scale, mask)
        if not self.acts:
            out = func(*args, **kwargs)
        else:
            if causal:
                mask = torch.ones(shape[-2:], dtype=torch.bool, device=q.device).tril()[None, None]
            self._check(mask)
            out = self.call(fq, fk, fv, scale, mask, named.get("dropout_p", 0.0)).reshape(*q.shape[:-1], v.shape[-1])
        self._look(sight, fv, causal)
        return out

    # -- layouts -------------------------------------------------------------------------------------------------------
    def _heads(self, x: Tensor) -> Tensor | None:
        """(B, H, N, d), (B H, N, d) or (B, H, 1, N, d) -> (B, H, N, d), None where that cannot be told."""
        if x.dim() == 3:
            return x.unflatten(0, (self.batch, -1)) if self.batch and x.shape[0] % self.batch == 0 else None
        if x.dim() > 4:
            return x.flatten(1, -3) if all(s == 1 for s in x.shape[2:-2]) else None
        return x

    def _aligned(self, x: Tensor, shape: torch.Size) -> Tensor | None:
        """Something that broadcasts to logits of a shape, as something that broadcasts to (B, H, Q, N)."""
        if x.dim() > len(shape):
            return None
        x = x[(None,) * (len(shape) - x.dim())]
        return x[None] if x.dim() == 3 and x.shape[0] == 1 else self._heads(x)

    def _fits(self, shape: tuple[int, ...]) -> bool:
        """Whether logits of a shape (..., Q, N) belong to the attention that is looked for."""
        if len(shape) < 3 or any(s > 1 for s in shape[2:-2]) or self.keys not in (None, shape[-1]):
            return False
        if len(shape) == 3:
            return self.batch is None or shape[0] % self.batch == 0
        return self.batch in (None, 1, shape[0])


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _of_einsum(equation: Any, *operands: Any) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
    """An einsum of two tensors as a batched product: (..., i, c), (..., c, j), and how the result's dimensions
    (..., i, j) are ordered in the einsum's. None where it is no such product."""
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation or "->" not in equation:
        return None
    given, out = equation.replace(" ", "").split("->")
    x, y = given.split(",")
    lead = [c for c in out if c in x and c in y]
    i, j = [c for c in x if c not in y], [c for c in y if c not in x]
    inner = [c for c in x if c in y and c not in out]
    if not len(i) == len(j) == len(inner) == 1 or len({*x}) != len(x) or len({*y}) != len(y):
        return None
    rows, columns = [*lead, *i, *inner], [*lead, *inner, *j]
    if {*rows} != {*x} or {*columns} != {*y} or sorted(out) != sorted([*lead, *i, *j]):
        return None
    order = tuple([*lead, *i, *j].index(c) for c in out)
    left = operands[0].permute([x.index(c) for c in rows])
    return left, operands[1].permute([y.index(c) for c in columns]), order


def _masked_softmax(logits: Tensor, policy: Tensor, eps: float) -> Tensor:
    """The probabilities of `fewer.core.attention.masked_attention`. logits: (B, H, N, N), policy: (B, N), float32 out.

    What the model hides is told by its logits: below half of the least number of their type."""
    n = logits.shape[-1]
    gate = policy.float()[:, None, None, :]
    gate = gate + (1 - gate) * torch.eye(n, device=logits.device)
    wide = logits.float()
    top = wide.amax(-1, keepdim=True).detach().clamp_min(torch.finfo(torch.float32).min)
    e = (wide - top).exp() * gate
    floor = (logits > torch.finfo(logits.dtype).min / 2) * (eps / n) if eps else 0.0
    return (e + floor) / (e.sum(-1, keepdim=True) + eps).clamp_min(torch.finfo(torch.float32).tiny)


@cache
def _opened(func: Any) -> Callable[..., Any]:
    """A function of torch.nn.functional that a mode is handed in one piece, such that its parts are handed over too:
    the same code, which finds nobody to hand itself to."""
    again = FunctionType(
        func.__code__, {**func.__globals__, "has_torch_function": lambda _: False}, func.__name__,
        func.__defaults__, func.__closure__,
    )  # fmt: skip
    again.__kwdefaults__ = func.__kwdefaults__
    return again
