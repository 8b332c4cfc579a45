"""Expected Attention: keep what future queries, taken as Gaussian, will attend to. arXiv:2510.00636."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.core import Budget, KeepRatio, Plan, Signals, Tokens, reducer
from fewer.core.cache import CacheReducer, CacheSignals, Rows, check_alpha, shared, top


@reducer("expected_attention", paper="arXiv:2510.00636", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class ExpectedAttention(CacheReducer):
    """Rank keys by the attention queries of the next positions would give them on average, times the value's length.

    The queries of this pass, before the rotary embedding, give a mean and a covariance; both are turned by the rotation
    averaged over the next `future` positions. exp(q k) of a Gaussian q then is exp(mean + variance / 2).

    budget      rows per KV head
    sinks       first tokens that always stay and are left out of the statistics
    future      positions ahead that count
    covariance  use the second moment
    values      multiply by the value norms
    epsilon     added to the probabilities, so that no row is lost for a tiny one alone
    alpha       None: every head keeps the same number; else heads share the budget as in adakv, each sure of this share
    """

    budget: Budget = KeepRatio(0.5)
    sinks: int = 4
    future: int = 512
    covariance: bool = True
    values: bool = True
    epsilon: float = 0.0
    alpha: float | None = None
    layers: tuple[int, ...] | None = None
    rotates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.future < 1 or self.sinks < 0:
            raise ValueError(f"future={self.future}, sinks={self.sinks}: at least 1 position ahead, no negative sinks")
        if self.alpha is not None:
            check_alpha(self.alpha)

    @property
    def least(self) -> int:
        return self.sinks

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(signals, CacheSignals) and isinstance(tokens, Rows)
        sinks = tokens.sinks(self.sinks)
        logits = self._logits(signals, tokens, sinks)
        logits = logits.masked_fill(sinks[:, :, None], float("-inf"))
        if tokens.real is not None:
            logits = logits.masked_fill(~tokens.real[:, :, None], float("-inf"))
        p = logits.softmax(-1).nan_to_num(0.0).mean(2) + self.epsilon  # (B, G, S)
        if self.values:
            p = p * signals.v.float().norm(dim=-1)
        if self.alpha is None:
            return top(p, self.budget, tokens, at=signals.at, protected=sinks, least=self.least)
        return shared(p, self.budget, tokens, at=signals.at, alpha=self.alpha, protected=sinks, least=self.least)

    def _logits(self, signals: CacheSignals, rows: Rows, sinks: Tensor) -> Tensor:
        """(B, G, R, S) float32: log of the expected exponential, per query head of each KV head's group."""
        (b, h, n, d), s, g = signals.q.shape, rows.n, signals.kv_heads
        first, share = 0, None
        if rows.real is None:  # sinks of earlier passes are not among this pass's queries
            first = min(max(self.sinks - (rows.n - n), 0), n - 1)
        else:
            weight = (~sinks[:, 0, -n:]).expand(b, n)
            if signals.asking is not None:
                weight = weight & signals.asking
            share = (weight / weight.sum(-1, keepdim=True).clamp(min=1)).float()[:, None, :, None]  # (B, 1, Q, 1)
        turn, scale = self._average_rotation(signals, d), signals.query_scale
        logits = torch.empty(b, h, s, device=signals.device)
        step = 1 if signals.device.type == "cpu" else h // g  # on a CPU, what lies in between should fit its cache
        for head in range(0, h, step):
            own, shared = slice(head, head + step), head * g // h
            k = signals.k[:, shared : shared + 1].float()
            q = signals.plain_queries(own)[:, :, first:]
            mean = q.mean(2, keepdim=True) if share is None else (q * share).sum(2, keepdim=True)  # (B, step, 1, d)
            logits[:, own] = (k @ (turn @ mean.transpose(-1, -2)))[..., 0] * scale
            if self.covariance:
                q = q - mean
                spread = q.transpose(-1, -2) @ (q / q.shape[2] if share is None else q * share)  # (B, step, d, d)
                spread = turn @ spread @ turn.transpose(-1, -2)
                logits[:, own] += (k @ spread).mul_(k).sum(-1) * (scale**2 / 2)
        signals.at.spend(2 * h * s * d + (2 * h * (n + s) * d * d if self.covariance else 0))
        return logits.unflatten(1, (g, -1))

    def _average_rotation(self, signals: CacheSignals, d: int) -> Tensor:
        """The rotation matrix averaged over the next positions, the model's own scale included: (B or 1, 1, d, d)."""
        eye = torch.eye(d, device=signals.device)
        if signals.rotary is None or signals.at_rope is None:
            return eye[None, None]
        ahead = torch.arange(1, self.future + 1, device=signals.device)
        angle = (signals.at_rope[:, -1:] + ahead).float()[..., None] * signals.rotary.frequencies
        cos, sin = angle.cos().mean(1), angle.sin().mean(1)  # (B, d / 2)
        left = torch.cat([torch.diag_embed(cos), torch.diag_embed(-sin)], -1)
        right = torch.cat([torch.diag_embed(sin), torch.diag_embed(cos)], -1)
        return torch.cat([left, right], -2)[:, None] * signals.rotary.scale
