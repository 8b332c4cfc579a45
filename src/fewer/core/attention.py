"""Attention, seen once: what a host hands over, and statistics of it that never form an N x N matrix."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokens import Group

CHUNK = 1 << 22  # logits held at once by the chunked statistics, in numbers (16 MB of float32)
NEAR = 1 << 20  # the same on a CPU, where they should not leave its cache


def full_precision(x: Tensor) -> AbstractContextManager:
    """What is done here is done in the precision its code says, whatever autocast is on around the model."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # meta tensors know no autocast
    return torch.autocast(kind, enabled=False) if on else nullcontext()


@dataclass(eq=False)
class Seen:
    """The inputs of one attention call, as the fused kernel got them.

    q: (B, H, N, d); k, v: (B, G, N, d), G KV heads; scale: factor on q k^T; bias: additive, or bool with
    True = visible, broadcastable to (B, H, N, N), or None; causal: key j is visible to query i only for j <= i;
    across: the queries are another sequence's (cross-attention), not the rows that are reduced.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None = None
    causal: bool = False
    across: bool = False

    def gathered(self, index: Tensor) -> Seen:
        """The call restricted to some positions. index: (B, M)."""
        group = Group(index=index)
        bias = self.bias
        if bias is not None:
            bias = group.of(bias.expand(index.shape[0], -1, -1, bias.shape[-1]), -1)
            if bias.shape[-2] > 1 and not self.across:
                bias = group.of(bias, -2)
        q = self.q if self.across else group.of(self.q)
        return Seen(q, group.of(self.k), group.of(self.v), self.scale, bias, self.causal, self.across)

    def head(self, index: int) -> Seen:
        """The call restricted to one KV head and the query heads that share it."""
        r = self.q.shape[1] // self.k.shape[1]
        own, shared = slice(index * r, (index + 1) * r), slice(index, index + 1)
        bias = self.bias if self.bias is None or self.bias.shape[1] == 1 else self.bias[:, own]
        return Seen(self.q[:, own], self.k[:, shared], self.v[:, shared], self.scale, bias, self.causal)


def _logits(seen: Seen, q: Tensor, positions: Tensor | slice, out: Tensor | None = None) -> Tensor:
    """(B, H, Q, N) float32 logits of some query rows, bias and causal mask applied.

    positions: the rows' places in the sequence, a slice or (B, Q). out: see `grouped_product`."""
    k = seen.k
    logits = grouped_product(q.float() * seen.scale, k.float(), out)
    if seen.bias is not None:
        bias = seen.bias
        if bias.shape[-2] > 1:
            group = Group(positions.start, positions.stop) if isinstance(positions, slice) else Group(index=positions)
            bias = group.of(bias if group.index is None else bias.expand(q.shape[0], -1, -1, -1), -2)
        if bias.dtype == torch.bool:  # not -inf: a row that sees nothing must not become NaN
            low = torch.finfo(logits.dtype).min
            logits = logits.masked_fill(~bias, low) if out is None else logits.masked_fill_(~bias, low)
        else:
            logits = logits + bias.float() if out is None else logits.add_(bias.float())
    if seen.causal:
        n = k.shape[-2]
        where = torch.arange(n, device=q.device)
        if isinstance(positions, slice):  # only keys behind the first of these queries can lie ahead of one
            late = where[positions.start :]
            logits[..., positions.start :].masked_fill_(late > where[positions][:, None], float("-inf"))
        else:
            logits = logits.masked_fill(where > positions[:, None, :, None], float("-inf"))
    return logits


def grouped_product(q: Tensor, k: Tensor, out: Tensor | None = None) -> Tensor:
    """q k^T where H query heads share G keys, no key copied. q: (B, H, Q, d), k: (B, G, N, d) -> (B, H, Q, N).

    out: (B, G, H / G Q, N), memory to write to, without a gradient, or None."""
    h, g = q.shape[1], k.shape[1]
    folded = q if h == g else q.unflatten(1, (g, h // g)).flatten(2, 3)
    product = torch.matmul(folded, k.transpose(-1, -2), out=out)
    return product if h == g else product.unflatten(2, (h // g, q.shape[2])).flatten(1, 2)


def rows(seen: Seen, queries: Group) -> Tensor:
    """Attention probabilities of some queries. Returns (B, H, Q, N), float32, rows summing to one.

    Cost     2 Q N d FLOPs per head and sample; never N x N unless every query is asked for.
    """
    q = queries.of(seen.q)
    positions = slice(queries.start, queries.stop) if queries.index is None else queries.index
    return _logits(seen, q, positions).softmax(-1)


def mass(seen: Seen, queries: Group | None = None, weight: Tensor | None = None, own: bool = True) -> Tensor:
    """Attention each key receives, summed over queries. Returns (B, H, N), float32.

    weight: (B, Q) factor of each query row (padding 0), or None. own: whether what a token gives itself counts; False
    is for runs of queries, not for an index per sample. Memory is linear in N: query rows are taken in chunks of at
    most `CHUNK` logits.
    """
    if queries is not None and queries.index is not None:
        if not own:
            raise ValueError("own=False needs queries that are a run of positions, such as all of them")
        return _weighted(rows(seen, queries), weight).sum(2)
    start, stop = (0, seen.q.shape[-2]) if queries is None else (queries.start, queries.stop)
    b, h, _, _ = seen.q.shape
    g, n = seen.k.shape[1:3]
    total = torch.zeros(b, h, n, device=seen.q.device)
    near = seen.q.device.type == "cpu" and not torch.is_grad_enabled()
    parts = g if near else 1  # on a CPU one KV head at a time, all in the same memory: fresh memory costs as much
    step = min(max(1, (NEAR if near else CHUNK) * parts // (b * h * n)), stop - start)
    scratch = torch.empty(2, b * h // parts * step * n) if near else None
    blind = seen.bias is not None and seen.bias.dtype != torch.bool  # a query may see nothing, not even uniformly
    for j in range(parts):
        call, mine = (seen.head(j), total[:, j * h // g : (j + 1) * h // g]) if near else (seen, total)
        for i in range(start, stop, step):
            part = slice(i, min(i + step, stop))
            p = _probabilities(call, part, scratch)
            w = None if weight is None else weight[:, i - start : part.stop - start]
            p = _weighted(p, w) if blind or not near or w is None else p.mul_(w[:, None, :, None])
            mine += p.sum(2)
            if not own:
                mine[..., part] -= p.diagonal(i, -2, -1)
    return total


def _probabilities(seen: Seen, part: slice, scratch: Tensor | None) -> Tensor:
    """(B, H, Q, N) probabilities of a run of queries; where there is scratch memory for logits and them, in it."""
    q = seen.q[:, :, part]
    if scratch is None:
        return _logits(seen, q, part).softmax(-1)
    (b, h, w, _), n = q.shape, seen.k.shape[-2]
    first, second = scratch[:, : b * h * w * n]
    return torch.softmax(_logits(seen, q, part, first.view(b, 1, h * w, n)), -1, out=second.view(b, h, w, n))


def paid(seen: Seen, key: Group) -> Tensor:
    """Attention every query pays to some keys, summed over them. key: a group of one index set per sample or run.
    Returns (B, H, Q), float32. Memory is linear in N, as in `mass`; the work is that of all logits."""
    b, h, n, _ = seen.q.shape
    step = max(1, CHUNK // (b * h * seen.k.shape[-2]))
    parts = []
    for i in range(0, n, step):
        part = slice(i, min(i + step, n))
        parts.append(key.of(_logits(seen, seen.q[:, :, part], part).softmax(-1), -1).sum(-1))
    return torch.cat(parts, -1)


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
    eps / N is added to each entry that the bias does not hide before dividing by the sum plus eps. The row maximum runs
    over all keys; a row that sees none gets zeros.
    Returns (B, H, N, d). Forms N x N probabilities, as training through the mask must.
    Source   DynamicViT, arXiv:2106.02034, eq. 10 and 11, with the eps of its code.
    """  # fmt: skip
    with full_precision(q):
        return _masked(q, k, v, scale, bias, policy, eps)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, policy: Tensor, eps: float
) -> Tensor:  # fmt: skip
    logits = (q.float() * scale) @ k.float().transpose(-1, -2)
    if bias is not None:
        logits = logits + bias.float()
    n = logits.shape[-1]
    eye = torch.eye(n, device=q.device, dtype=torch.float32)
    gate = policy.float()[:, None, None, :]
    gate = gate + (1 - gate) * eye
    top = logits.amax(-1, keepdim=True).detach().clamp_min(torch.finfo(torch.float32).min)  # a constant but for eps
    e = (logits - top).exp() * gate
    floor: float | Tensor = eps / n
    if eps and bias is not None:  # not even a trace of padding or of what lies ahead
        floor = (bias > torch.finfo(bias.dtype).min / 2) * floor
    p = (e + floor) / (e.sum(-1, keepdim=True) + eps).clamp_min(torch.finfo(torch.float32).tiny)
    return (p.to(v.dtype)) @ v


def size_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-size term of proportional attention: a row standing for s tokens counts s times. (B, N) -> (B, 1, 1, N)."""
    return size.clamp_min(1e-30).log().to(dtype)[:, None, None, :]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """The fused kernel. q: (B, H, N, d), k, v the same or with fewer heads. Returns (B, H, N, d)."""
    gqa = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale, enable_gqa=gqa)
