"""TokenButler: a small network reads the embeddings and says which rows each head of each layer will want.
arXiv:2503.07518."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, Hard, KeepRatio, reducer
from fewer.core.attention import grouped_product
from fewer.core.cache import CacheReducer, CacheSignals, Rows, top
from fewer.core.rope import Rotary

BASE = 10_000.0  # of the predictor's own rotary embeddings


@dataclass(eq=False)
class Remembered:
    """What the predictor keeps of the tokens it has read: rotated once, when they come, and never again.

    own        keys and values of its self-attention, (B, h, S, c) each
    important  the keys it predicts, (B, layers, G, S, channels)
    """

    own: tuple[Tensor, Tensor]
    important: Tensor


class Butler(nn.Module):
    """The predictor: embeddings in, a short query per head and a short key per KV head out, for all layers at once.

    C -> C / shrink, one causal self-attention with rotary positions, an MLP (2 C / shrink wide) back to C, added to the
    normalised input x; then W2 silu(W1 x), once for the queries and once for the keys.

    width, heads, groups, layers    of the model: C, H, G, L
    shrink      how much narrower the self-attention is than the model
    hidden      width between W1 and W2
    channels    of a predicted query or key
    """

    def __init__(self, width: int, heads: int, groups: int, layers: int, shrink: int = 8, hidden: int = 256,
                 channels: int = 16) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.groups, self.layers, self.channels = heads, groups, layers, channels
        narrow = max(8, width // shrink // 8 * 8)  # four heads of an even width
        self.enter, self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(narrow), nn.LayerNorm(narrow)
        self.down = nn.Linear(width, narrow, bias=False)
        self.qkv, self.out = nn.Linear(narrow, 3 * narrow, bias=False), nn.Linear(narrow, narrow, bias=False)
        self.up = nn.Sequential(nn.Linear(narrow, 2 * narrow), nn.SiLU(), nn.Linear(2 * narrow, width))
        self.query, self.key = (
            nn.Sequential(nn.Linear(width, hidden, bias=False), nn.SiLU(), nn.Linear(hidden, layers * n * channels))
            for n in (heads, groups)
        )

    def forward(
        self, x: Tensor, past: Remembered | None = None, real: Tensor | None = None
    ) -> tuple[Tensor, Remembered]:
        """Read some more tokens.

        Shapes   x: (B, Q, C), what enters block 0; past: what was remembered of the S - Q tokens before;
                 real: (B, S) bool, False = padding, or None.
        Returns  queries (B, L, H, Q, channels) for these tokens, and what is remembered of all S.
        """
        b, n, _ = x.shape
        start = 0 if past is None else past.important.shape[-2]
        at = torch.arange(start, start + n, device=x.device)
        x = self.enter(x)
        z = self.down(x)
        q, k, v = self.qkv(self.before(z)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        turn = _rotary(q.shape[-1], x.device)
        q, k = turn.turn(q, at), turn.turn(k, at)
        if past is not None:
            k, v = torch.cat([past.own[0], k], 2), torch.cat([past.own[1], v], 2)
        seen = torch.arange(start + n, device=x.device) <= at[:, None]
        # a padded query sees itself alone: it must not become NaN
        mask = seen if real is None else (seen & real[:, None]) | (torch.eye(start + n, device=x.device).bool()[start:])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask if real is None else mask[:, None])
        z = z + self.out(y.transpose(1, 2).flatten(2))
        x = x + self.up(self.between(z))
        turn = _rotary(self.channels, x.device)
        asked = turn.turn(self.query(x).view(b, n, self.layers, self.heads, -1).permute(0, 2, 3, 1, 4), at)
        keys = turn.turn(self.key(x).view(b, n, self.layers, self.groups, -1).permute(0, 2, 3, 1, 4), at)
        if past is not None:
            keys = torch.cat([past.important, keys], -2)
        return asked, Remembered((k, v), keys)

    def logits(self, asked: Tensor, important: Tensor) -> Tensor:
        """asked: (B, H, Q, channels), important: (B, G, S, channels) -> (B, H, Q, S), float32, no mask applied."""
        return grouped_product(asked.float() * self.channels**-0.5, important.float())

    def flops(self, queries: int, rows: int) -> int:
        """Of reading `queries` tokens, the last of `rows`: linear layers and self-attention."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 2 * queries * (weights + 2 * rows * self.down.out_features)


def _rotary(channels: int, device: torch.device) -> Rotary:
    return Rotary(BASE ** -(torch.arange(0, channels, 2, device=device) / channels))


@reducer("tokenbutler", paper="arXiv:2503.07518", acts="prune", on="kv-cache", training="required")
@dataclass(frozen=True)
class TokenButler(CacheReducer):
    """At every decoding step, read the rows that a small predictor says each layer and head will attend to.

    The predictor sees what enters the first block, tokens so far included, and guesses the attention logits of all
    layers at once. A KV head reads the rows with the largest predicted attention, averaged over its query heads.
    Nothing is evicted, so no memory is freed: the predictor's keys come on top of the cache. Prompts, and passes of
    several tokens, are read whole.

    budget  rows read per KV head and step, the sinks included; a share counts all tokens seen so far
    sinks   first tokens that are always read
    dense   first layers that read everything; the paper starts after one

    Departs from the paper's code, which predicts a key for each query head: here the query heads of a KV head share it,
    as they share the model's own keys, so the predictor is smaller and remembers less. The input is what enters block 0
    with a LayerNorm of the predictor's own, not the output of the block's norm. Its attention is causal in prompts and
    sees all earlier tokens in a step, and each of its keys is rotated once; the authors' code rotates cached keys again
    at every step and hides all but one from a single query.
    """

    budget: Budget = KeepRatio(0.5, rounding="ceil")
    sinks: int = 4
    dense: int = 1
    layers: tuple[int, ...] | None = None
    evicts: ClassVar[bool] = False
    reads: ClassVar[bool] = True
    enters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.dense < 0:
            raise ValueError(f"sinks={self.sinks}, dense={self.dense}: neither may be negative")

    @property
    def least(self) -> int:
        return self.sinks

    def predictors(self, width: int, heads: int, groups: int, layers: int) -> dict[str, nn.Module]:
        return {"predictor": Butler(width, heads, groups, layers)}

    def read(self, signals: CacheSignals, rows: Rows) -> Hard | None:
        butler = signals.module("predictor")
        self._enter(butler, signals)
        if signals.q.shape[2] > 1 or signals.at.layer < self.dense:
            return None
        counts = rows.counts(self.budget, signals.at, self.least)
        if counts == list(rows.totals):
            return None
        share = self.shares(butler, signals, rows)
        return top(share, self.budget, rows, at=signals.at, protected=rows.sinks(self.sinks), least=self.least)

    def shares(self, butler: Butler, signals: CacheSignals, rows: Rows) -> Tensor:
        """(B, G, S) float32: predicted attention of the newest token on the stored rows, mean over query heads."""
        asked, keys = signals.memory["asked"][0][:, signals.at.layer], signals.memory["keys"][:, signals.at.layer]
        if rows.n < keys.shape[2]:  # beside a method that evicts: the rows that are left, by their place in the text
            assert rows.age is not None
            place = (keys.shape[2] - rows.age).clamp(min=0).expand(*keys.shape[:2], -1)
            keys = keys.gather(2, place[..., None].expand(-1, -1, -1, keys.shape[-1]))
        logits = butler.logits(asked[:, :, -1:], keys)[:, :, 0]
        signals.at.spend(2 * logits.shape[1] * rows.n * butler.channels)
        if rows.real is not None:
            real = (
                rows.real if rows.real.shape[1] == 1 else rows.real.repeat_interleave(butler.heads // butler.groups, 1)
            )
            logits = logits.masked_fill(~real, float("-inf"))
        return signals.per_group(logits.softmax(-1))

    def _enter(self, butler: Butler, signals: CacheSignals) -> None:
        """The predictor reads the tokens of this pass, once for all layers, and remembers them with the cache."""
        memory, entry = signals.memory, signals.entry
        assert entry is not None
        if "pass" in memory and memory["pass"]() is entry:
            return
        past = Remembered((memory["k"], memory["v"]), memory["keys"]) if "keys" in memory else None
        real = self._real(signals, entry, 0 if past is None else memory["keys"].shape[-2])
        asked, kept = butler(entry, past, real)
        signals.at.spend(butler.flops(entry.shape[1], kept.important.shape[-2]))
        # asked is no stream of one row per token: in a tuple, nobody cuts it with the cache
        memory |= {"k": kept.own[0], "v": kept.own[1], "keys": kept.important, "asked": (asked[..., -1:, :],)}
        memory["pass"] = weakref.ref(entry)

    @staticmethod
    def _real(signals: CacheSignals, entry: Tensor, before: int) -> Tensor | None:
        """(B, T) bool: which of the tokens seen so far are no padding, kept from the pass that had some; None = all."""
        memory, (b, n, _) = signals.memory, entry.shape
        if signals.asking is None and "real" not in memory:
            return None
        new = signals.asking if signals.asking is not None else torch.ones(b, n, dtype=torch.bool, device=entry.device)
        old = memory.get("real", torch.ones(b, before, 1, dtype=torch.bool, device=entry.device))
        memory["real"] = torch.cat([old, new[..., None]], 1)
        return memory["real"][..., 0]
