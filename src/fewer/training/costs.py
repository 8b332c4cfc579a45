"""Costs that carry gradient: the FLOPs of a vision transformer as a function of its token counts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fewer.core.learned import straight_through


def chain(first: int, counts: Sequence[tuple[Tensor, ...] | None]) -> tuple[list[Tensor | int], list[Tensor | int]]:
    """Tokens in the attention and in the MLP of each block.

    first   tokens that enter the model
    counts  per block the learned counts asked for between its attention and its MLP (all tokens, protected ones
            included), or None where nothing happens

    Returns  two lists with an entry per block. Tokens never grow again: a block's MLP has the least of what came in
             and what is asked. The gradient of that minimum goes to every count of the block (DiffRate's code), none
             to earlier blocks.
    """
    attention: list[Tensor | int] = []
    mlp: list[Tensor | int] = []
    left: Tensor | int = first
    for asked in counts:
        attention.append(left)
        if asked is not None:
            least = min([left, *asked])
            least = least.detach() if isinstance(least, Tensor) else asked[0].new_tensor(float(least))
            left = straight_through(least, sum(asked[1:], asked[0]))
        mlp.append(left)
    return attention, mlp


def vit_macs(
    attention: Sequence[Tensor | int],
    mlp: Sequence[Tensor | int],
    linear: Sequence[tuple[int, int]],
    width: int,
    rest: int,
) -> Tensor | int:
    """Multiply-adds of a vision transformer on these token counts, differentiable in them.

    attention, mlp   tokens in each block's attention and MLP
    linear           weights multiplied once per token in each block's attention and MLP
    width            channels; q k^T and its product with v cost 2 N^2 width
    rest             multiply-adds outside the blocks: patch embedding, head

    >>> vit_macs([197] * 12, [197] * 12, [(4 * 384**2, 8 * 384**2)] * 12, 384, 196 * 768 * 384) / 1e9  # DeiT-S: 4.6
    4.598...
    """
    total: Tensor | int = rest
    for a, m, (of_attention, of_mlp) in zip(attention, mlp, linear, strict=True):
        total = total + a * of_attention + 2 * width * a * a + m * of_mlp
    return total
