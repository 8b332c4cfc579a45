"""What a decoder's attention shows of itself, and its training form under a learned mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import Seen
from ...core.attention import masked_attention
from ...hosts import Call


def watched(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, whole: bool) -> Seen:
    """What a method sees of a block's attention: the rows of this pass, as if they were alone; whole: the last query
    and all cached rows."""
    if whole:
        return Seen(q[:, :, -1:], k, v, scale, None if mask is None else mask[:, :, -1:])
    m = q.shape[2]
    mask = None if mask is None else mask[..., k.shape[2] - m :]
    return Seen(q, k[:, :, -m:], v[:, :, -m:], scale, mask, causal=mask is None)


def trained_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, call: Call
) -> tuple[Tensor, None]:
    """Causal attention under a learned mask, as attention modules of transformers return it: (B, N, H, d).

    Raises   ValueError where earlier rows are cached: the training form has one pass over everything.
    """
    n, s = q.shape[2], k.shape[2]
    if n != s or call.policy is None:
        raise ValueError(
            f"the training form of a method reads everything in one pass, here {n} tokens with {s - n} already cached; "
            "call the model with use_cache=False, or model.eval()"
        )
    low: Any = torch.finfo(torch.float32).min
    if mask is None:
        bias = torch.full((n, n), low, device=q.device).triu(1)[None, None]
    elif mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, device=q.device).masked_fill(~mask, low)
    else:
        bias = mask.float()
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return masked_attention(q, k, v, scale, bias, call.policy, call.eps).transpose(1, 2), None
