"""Attention masks and biases: who may be seen."""

from __future__ import annotations

import torch
from torch import Tensor


def hiding(bias: Tensor | None, valid: Tensor) -> Tensor:
    """An additive bias, or none, with padding's keys hidden. valid: (B, N). Returns (B, 1 or H, 1 or N, N)."""
    if bias is None:
        bias = torch.zeros(valid.shape, device=valid.device)[:, None, None, :]
    return bias.masked_fill(~valid[:, None, None, :], False if bias.dtype == torch.bool else float("-inf"))


def only(bias: Tensor | None, valid: Tensor) -> Tensor:
    """A bias, or none, with all but some keys hidden. valid: (B, S)."""
    gone = ~valid[:, None, None, :]
    return ~gone if bias is None else hidden(bias, gone)


def added(gate: Tensor, mask: Tensor | None, queries: int, rows: int) -> Tensor:
    """Additive logits and a mask, bool or additive, or none for causal attention, as one additive float32 mask."""
    low = torch.finfo(torch.float32).min
    if mask is None:
        ahead = torch.ones(queries, rows, dtype=torch.bool, device=gate.device).triu(rows - queries + 1)
        return gate.masked_fill(ahead, low)
    return gate.masked_fill(~mask, low) if mask.dtype == torch.bool else (gate + mask).clamp_min(low)


def hidden(mask: Tensor, gone: Tensor) -> Tensor:
    """A mask, bool (True = visible) or additive, that hides more. gone: bool, broadcastable, True = out of sight."""
    return mask.masked_fill(gone, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
