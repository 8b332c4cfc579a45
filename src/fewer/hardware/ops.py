"""What a forward pass asks of a machine: its operations with their shapes, written down without computing them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

VIEWED = (
    "view t transpose expand select slice unsqueeze squeeze permute detach alias _unsafe_view split split_with_sizes "
    "unbind as_strided diagonal lift_fresh unfold reshape _reshape_alias chunk view_as_real view_as_complex"
)
VIEWS = frozenset(VIEWED.split())
"""Operations that move no data: what they cost is their call."""

KINDS = {
    "norm": "native_layer_norm native_group_norm native_batch_norm _fused_rms_norm",
    "gelu": "gelu", "silu": "silu",
    "exp": "exp log tanh sigmoid sin cos pow erf rsqrt sqrt _log_softmax log_sigmoid_forward softplus reciprocal",
    "softmax": "_softmax _safe_softmax",
    "reduce": "mean sum amax amin argmax argmin linalg_vector_norm norm max min cumsum any all var_mean prod std "
              "logsumexp count_nonzero",
    "copy": "clone cat copy_ _to_copy contiguous repeat constant_pad_nd stack fill_ zero_ zeros ones full new_zeros "
            "new_ones new_full zeros_like ones_like full_like arange scalar_tensor repeat_interleave flip roll",
    "rows": "index_select index_add_ index_add index_copy_ index_copy embedding index index_put_ index_put",
    "gather": "gather scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ masked_fill "
              "masked_fill_ where nan_to_num masked_scatter",
    "sort": "sort topk argsort searchsorted kthvalue",
}  # fmt: skip
_KIND = {name: kind for kind, names in KINDS.items() for name in names.split()}
NOTHING = "empty new_empty empty_like empty_strided device _local_scalar_dense sym_size is_same_size"
EMPTY = frozenset(NOTHING.split())
"""Those that cost nothing to speak of."""


class CountedByData(ValueError):
    """How many tokens stay depends on numbers, and shapes alone do not tell it."""


@dataclass(frozen=True)
class Op:
    """kind: gemm (batch, m, n, k; batch 0: the second operand is a weight), attention (heads times samples, queries,
    keys, width, 1 if causal, 1 if masked), view, light (pointwise), or one of `KINDS`: (numbers moved, last axis).

    layer: of the block it is part of, -1 outside. flops: two for each multiply-add of gemm and attention, else 0.
    bytes: read and written, where nothing stays in a cache.
    """

    kind: str
    shape: tuple[int, ...]
    layer: int
    flops: int
    bytes: int


@dataclass
class Work:
    """A forward pass. ops: in order. tokens: per block those in its attention and in its MLP, averaged over samples;
    empty where nobody counted them. kind: of an "encoder", of a "prompt" that is read, a "step" of writing."""

    ops: list[Op]
    tokens: list[tuple[float, float]] = field(default_factory=list)
    kind: str = "encoder"

    @property
    def flops(self) -> int:
        """Of matrix products, convolutions and attention: 2 for each multiply-add."""
        return sum(op.flops for op in self.ops)

    def kinds(self) -> dict[str, int]:
        """How many operations of each kind."""
        return {kind: sum(op.kind == kind for op in self.ops) for kind in dict.fromkeys(op.kind for op in self.ops)}


class Recorder(TorchDispatchMode):
    """Writes down what runs while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.layer = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        op = _op(func.overloadpacket.__name__, args, kwargs or {}, out, self.layer)
        if op is not None:
            self.ops.append(op)
        return out

    @contextmanager
    def marking(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """While this is open, operations inside a block carry its number."""
        with ExitStack() as undo:
            for i, block in enumerate(blocks):
                undo.callback(block.register_forward_pre_hook(lambda *_, i=i: setattr(self, "layer", i)).remove)
                undo.callback(block.register_forward_hook(lambda *_: setattr(self, "layer", -1)).remove)
            yield


def record(
    call: Callable[[], Any],
    blocks: Sequence[nn.Module] = (),
    *,
    compute: bool = False,
    prepare: Callable[[], Any] | None = None,
) -> list[Op]:
    """The operations of a call, from shapes alone.

    call       runs the model without gradients; tensors it makes are imagined, those it holds are used for their shape
    blocks     of the model, by whose place operations are numbered
    compute    whether numbers are computed after all: what a method needs whose counts depend on them
    prepare    runs before, in the same imagined world, and is not written down: what a decoding step stands behind

    Raises   CountedByData where shapes do not tell how many tokens stay.
    """
    recorder = Recorder()
    world = nullcontext() if compute else FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.no_grad(), world:
            if prepare is not None:
                prepare()
            with recorder.marking(blocks), recorder:
                call()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise CountedByData(
            f"how many tokens stay depends on the input here ({error.func}), so shapes do not tell what a pass costs"
        ) from error
    return recorder.ops


def _op(name: str, args: Any, kwargs: Any, out: Any, layer: int) -> Op | None:
    """One operation, None where it is none that takes time."""
    if name in EMPTY:
        return None
    if name in VIEWS:
        return Op("view", (), layer, 0, 0)
    inputs = [a for a in _tensors((*args, *kwargs.values()))]
    outputs = list(_tensors((out,)))
    moved = sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
    if "scaled_dot_product" in name:
        return _attention(args, kwargs, layer, moved)
    if name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"):
        return _product(name, inputs, outputs[0], layer, moved)
    if name == "convolution":
        kernel, made = inputs[1], outputs[0]
        n, k = kernel.shape[0], math.prod(kernel.shape[1:])
        m = made.numel() // n
        return Op("gemm", (0, m, n, k), layer, 2 * m * n * k, moved)
    widest = max((*inputs, *outputs), key=Tensor.numel, default=None)
    if widest is None:
        return None
    last = widest.shape[-1] if widest.dim() else 1
    if _KIND.get(name) in ("rows", "gather"):  # a table is read where rows are asked for, not whole
        moved = 2 * sum(x.numel() * x.element_size() for x in outputs)
        widest = outputs[0]
    return Op(_KIND.get(name, "light"), (widest.numel(), last), layer, 0, moved)


def _product(name: str, inputs: list[Tensor], out: Tensor, layer: int, moved: int) -> Op:
    a = inputs[-2]
    k, n = a.shape[-1], out.shape[-1]
    batch = out.shape[0] if out.dim() == 3 else 0
    m = out.shape[-2] if out.dim() > 1 else 1
    return Op("gemm", (batch, m, n, k), layer, 2 * max(batch, 1) * m * n * k, moved)


def _attention(args: Any, kwargs: Any, layer: int, moved: int) -> Op:
    q, k = args[0], args[1]
    b, h, n, d = q.shape
    causal = bool(kwargs.get("is_causal", next((a for a in args[3:] if isinstance(a, bool)), False)))
    masked = kwargs.get("attn_mask") is not None or any(isinstance(a, Tensor) for a in args[3:])
    shape = (b * h, n, k.shape[-2], d, int(causal), int(masked))
    return Op("attention", shape, layer, 4 * b * h * n * k.shape[-2] * d, moved)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
