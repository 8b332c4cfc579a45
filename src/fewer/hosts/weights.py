"""How many weights a module multiplies each token with, whatever holds them: plain, packed into few bits, or shared
among experts of which a token meets a few."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

SIZES = (("in_features", "out_features"), ("nx", "nf"))  # a matrix's, by the names that libraries use
PLAIN = ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear")  # matrices whose input can be rounded as it is


def multiplied(module: nn.Module) -> int:
    """Weights multiplied once per token, MACs per token.

    A matrix counts by its sizes, not by what stores it: packed weights of 4 bits have fewer numbers than they stand
    for. Experts count as far as a token meets them. What LoRA adds beside a matrix counts too.
    """
    if (matrix := _matrix(module)) is not None and not any(_matrix(m) is not None for m in module.children()):
        return matrix
    total = sum(multiplied(child) for child in module.children())
    return total + _experts(module)


def _matrix(module: nn.Module) -> int | None:
    if isinstance(module, (nn.Embedding, nn.Conv2d, nn.Conv3d)):
        return None
    for rows, columns in SIZES:
        a, b = getattr(module, rows, None), getattr(module, columns, None)
        if isinstance(a, int) and isinstance(b, int):
            return a * b
    weight = getattr(module, "weight", None)
    if type(module).__name__ in PLAIN and isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.numel()
    return None


def _experts(module: nn.Module) -> int:
    """Weights of all experts in one tensor, (experts, in, out): a token meets as many as the router picks."""
    stacked: list[Any] = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    if not stacked or hasattr(module, "kernel_size"):  # a convolution's taps are no experts
        return 0
    config: Any = getattr(module, "config", None)
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k", "moe_k")
    met = next((n for part in (module, config) for name in names if isinstance(n := getattr(part, name, None), int)), 1)
    return sum(p.numel() // p.shape[0] * min(met, p.shape[0]) for p in stacked)
