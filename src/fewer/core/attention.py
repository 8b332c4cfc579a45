"""Attention, seen once: what a host hands over, and statistics of it that never form an N x N matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokens import Group

CHUNK = 1 << 22  # logits held at once by the chunked statistics, in numbers (16 MB of float32)


@dataclass(eq=False)
class Seen:
    """The inputs of one attention call, as the fused kernel got them.

    q: (B, H, N, d); k, v: (B, G, N, d), G KV heads; scale: factor on q k^T; bias: additive, or bool with
    True = visible, broadcastable to (B, H, N, N), or None; causal: key j is visible to query i only for j <= i.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None = None
    causal: bool = False

    def gathered(self, index: Tensor) -> Seen:
        """The call restricted to some positions. index: (B, M)."""
        group = Group(index=index)
        bias = self.bias
        if bias is not None:
            bias = group.of(bias.expand(index.shape[0], -1, -1, bias.shape[-1]), -1)
            if bias.shape[-2] > 1:
                bias = group.of(bias, -2)
        return Seen(group.of(self.q), group.of(self.k), group.of(self.v), self.scale, bias, self.causal)


def _logits(seen: Seen, q: Tensor, positions: Tensor | slice) -> Tensor:
    """(B, H, Q, N) float32 logits of some query rows, bias and causal mask applied.

    positions: the rows' places in the sequence, a slice or (B, Q)."""
    k = seen.k
    logits = grouped_product(q.float() * seen.scale, k.float())
    if seen.bias is not None:
        bias = seen.bias
        if bias.shape[-2] > 1:
            group = Group(positions.start, positions.stop) if isinstance(positions, slice) else Group(index=positions)
            bias = group.of(bias if group.index is None else bias.expand(q.shape[0], -1, -1, -1), -2)
        if bias.dtype == torch.bool:  # not -inf: a row that sees nothing must not become NaN
            logits = logits.masked_fill(~bias, torch.finfo(logits.dtype).min)
        else:
            logits = logits + bias.float()
    if seen.causal:
        n = k.shape[-2]
        where = torch.arange(n, device=q.device)
        if isinstance(positions, slice):  # only keys behind the first of these queries can lie ahead of one
            late = where[positions.start :]
            logits[..., positions.start :].masked_fill_(late > where[positions][:, None], float("-inf"))
        else:
            logits = logits.masked_fill(where > positions[:, None, :, None], float("-inf"))
    return logits


def grouped_product(q: Tensor, k: Tensor) -> Tensor:
    """q k^T where H query heads share G keys, no key copied. q: (B, H, Q, d), k: (B, G, N, d) -> (B, H, Q, N)."""
    h, g = q.shape[1], k.shape[1]
    if h == g:
        return q @ k.transpose(-1, -2)
    folded = q.unflatten(1, (g, h // g)).flatten(2, 3)
    return (folded @ k.transpose(-1, -2)).unflatten(2, (h // g, q.shape[2])).flatten(1, 2)


def rows(seen: Seen, queries: Group) -> Tensor:
    """Attention probabilities of some queries. Returns (B, H, Q, N), float32, rows summing to one.

    Cost     2 Q N d FLOPs per head and sample; never N x N unless every query is asked for.
    """
    q = queries.of(seen.q)
    positions = slice(queries.start, queries.stop) if queries.index is None else queries.index
    return _logits(seen, q, positions).softmax(-1)


def mass(seen: Seen, queries: Group | None = None, weight: Tensor | None = None) -> Tensor:
    """Attention each key receives, summed over queries. Returns (B, H, N), float32.

    weight: (B, Q) factor of each query row (padding 0), or None. Memory is linear in N: query rows are taken in
    chunks of at most `CHUNK` logits.
    """
    if queries is not None and queries.index is not None:
        return _weighted(rows(seen, queries), weight).sum(2)
    start, stop = (0, seen.q.shape[-2]) if queries is None else (queries.start, queries.stop)
    b, h, _, _ = seen.q.shape
    n = seen.k.shape[-2]
    step = max(1, CHUNK // (b * h * n))
    total = torch.zeros(b, h, n, device=seen.q.device)
    for i in range(start, stop, step):
        part = slice(i, min(i + step, stop))
        p = _logits(seen, seen.q[:, :, part], part).softmax(-1)
        total += _weighted(p, None if weight is None else weight[:, i - start : part.stop - start]).sum(2)
    return total


def _weighted(p: Tensor, weight: Tensor | None) -> Tensor:
    """Probabilities times a factor per query; a query that counts nothing adds nothing, even where it sees no key."""
    if weight is None:
        return p
    w = weight[:, None, :, None]
    return (p * w).masked_fill_(w == 0, 0)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, policy: Tensor, eps: float
) -> Tensor:
    """Attention under a differentiable keep policy; the training form of pruning.

    policy: (B, N) in [0, 1]. Each exponential of key j is multiplied by policy_j, a token always sees itself, and
    eps / N is added to each entry before dividing by the sum plus eps. The row maximum runs over all keys.
    Returns (B, H, N, d). Forms N x N probabilities, as training through the mask must.
    Source   DynamicViT, arXiv:2106.02034, eq. 10 and 11, with the eps of its code.
    """  # fmt: skip
    logits = (q.float() * scale) @ k.float().transpose(-1, -2)
    if bias is not None:
        logits = logits + bias.float()
    n = logits.shape[-1]
    eye = torch.eye(n, device=q.device, dtype=torch.float32)
    gate = policy.float()[:, None, None, :]
    gate = gate + (1 - gate) * eye
    e = (logits - logits.amax(-1, keepdim=True).detach()).exp() * gate  # a constant but for eps
    p = (e + eps / n) / (e.sum(-1, keepdim=True) + eps)
    return (p.to(v.dtype)) @ v


def size_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-size term of proportional attention: a row standing for s tokens counts s times. (B, N) -> (B, 1, 1, N)."""
    return size.clamp_min(1e-30).log().to(dtype)[:, None, None, :]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """The fused kernel. q: (B, H, N, d), k, v the same or with fewer heads. Returns (B, H, N, d)."""
    gqa = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale, enable_gqa=gqa)
