"""KVzip: a cache row matters if the model needs it to write the prompt out again. arXiv:2505.23416."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewer.core import Budget, Hard, KeepRatio, Place, reducer
from fewer.core.attention import CHUNK, grouped_product
from fewer.core.cache import CacheSignals, Rereader, Rows, shared, top
from fewer.core.plan import take


@reducer("kvzip", paper="arXiv:2505.23416", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class KVzip(Rereader):
    """Feed the prompt once more behind itself, in chunks, and rank each row by the largest attention it receives.

    The choice knows no question, so one compressed cache serves many: let the model read the context, then generate
    from the cache as often as wanted. Only a pass that fills an empty cache is compressed; what comes later (questions,
    answers, further chunks of a prompt fed piece by piece) stays whole. Reading twice costs about one to two prefills
    more. The rows of the second reading are taken back.

    A query of the repetition shares its attention between the sinks, the chunk it repeats and the repetition so far.

    budget       rows per KV head, on average
    share        what one budget is shared by: the heads of all layers ("model"), of each layer, or "head": none is
    chunk        tokens repeated at a time
    overlap      tokens before the chunk that are repeated with it, as a cue
    sinks        first tokens that always stay; the length of a system prompt, to keep it whole
    instruction  token ids fed before each repetition; the paper has a sentence there that asks for it ("Repeat the
                 previous context:"), to be given as the ids of the model's tokenizer. None are needed to run
    """

    budget: Budget = KeepRatio(0.3)
    share: Literal["model", "layer", "head"] = "model"
    chunk: int = 2048
    overlap: int = 8
    sinks: int = 4
    instruction: tuple[int, ...] = ()
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.overlap < 0 or self.sinks < 1:
            raise ValueError(
                f"chunk={self.chunk}, overlap={self.overlap}, sinks={self.sinks}: at least 1 token a chunk, 1 sink (a "
                "head must hold something) and no negative overlap"
            )
        if self.share not in ("model", "layer", "head"):
            raise ValueError(f"share={self.share!r} is neither 'model', 'layer' nor 'head'")

    @property
    def least(self) -> int:
        return self.sinks

    def votes(self, signals: CacheSignals, rows: Rows, first: int, last: int) -> Tensor:
        q, n, chunk = signals.q, rows.n, last - first
        b, h, repeats, d = q.shape
        begin = n - torch.tensor(rows.totals, device=q.device)[:, None]
        sink = begin + torch.arange(min(self.sinks, n), device=q.device)
        told = (sink >= first) & (sink < last) | (sink >= n)  # twice, or of a shorter prompt than that
        place = torch.arange(n + repeats, device=q.device).expand(b, -1)
        index = torch.cat([sink.clamp(max=n - 1), place[:, first:last], place[:, n:]], -1)
        hidden = torch.cat([told, torch.zeros_like(place[:, : chunk + repeats], dtype=torch.bool)], -1)
        if rows.real is not None:
            hidden[:, sink.shape[1] : sink.shape[1] + chunk] = ~rows.real[:, 0, first:last]
        if signals.asking is not None:
            hidden[:, sink.shape[1] + chunk :] = ~signals.asking
        k = take(signals.k, index[:, None].expand(-1, signals.kv_heads, -1)).float()
        best = torch.zeros(b, h, chunk, device=q.device)
        order = torch.arange(repeats, device=q.device)
        step = max(1, CHUNK // (b * h * index.shape[1]))
        for start in range(0, repeats, step):
            part = slice(start, start + step)
            logits = grouped_product(q[:, :, part].float() * signals.query_scale, k)
            logits = logits.masked_fill_(hidden[:, None, None], float("-inf"))
            logits[..., -repeats:].masked_fill_(order > order[part, None], float("-inf"))
            p = logits.softmax(-1)[..., sink.shape[1] : sink.shape[1] + chunk]
            if signals.asking is not None:
                p = p.masked_fill(~signals.asking[:, None, part, None], 0)
            best = torch.maximum(best, p.amax(2))
        signals.at.spend(2 * h * repeats * index.shape[1] * d)
        return best.unflatten(1, (signals.kv_heads, -1)).amax(2)

    def choose(self, votes: list[Tensor], rows: Rows, at: list[Place]) -> list[Hard]:
        sinks = rows.sinks(self.sinks)
        if self.share == "head":
            return [
                top(v, self.budget, rows, at=place, protected=sinks, least=self.least)
                for v, place in zip(votes, at, strict=True)
            ]
        pools = [torch.cat(votes, 1)] if self.share == "model" else votes
        plans = [
            shared(pool, self.budget, rows, at=place, alpha=0.0, protected=sinks, least=self.least)
            for pool, place in zip(pools, at, strict=False)
        ]
        if self.share == "layer":
            return plans
        anchor, lengths, heads = plans[0].anchor, plans[0].counted, votes[0].shape[1]
        parts = zip(anchor.split(heads, 1), lengths.split(heads, 1), strict=True)
        return [Hard(rows.n, own, length=held) for own, held in parts]
