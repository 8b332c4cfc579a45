"""StreamingLLM: the first tokens are attention sinks; keep them and the newest ones. arXiv:2309.17453."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fewer.core import Budget, Capacity, reducer
from fewer.core.budgets import BudgetError
from fewer.core.cache import CacheSignals, Ranker, Rows


@reducer("streamingllm", paper="arXiv:2309.17453", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class StreamingLLM(Ranker):
    """Sinks plus a window of the newest tokens, the same rows for all heads, while reading and while writing.

    budget     rows in all, the sinks included
    sinks      first tokens that never go
    positions  "cache": a token's position is its place in the cache, as in the paper, so the model never meets a
               distance longer than the cache. Rotary embeddings only depend on differences: the sinks are turned on
               with the window, everything else stays as it is, and position ids keep counting. "original": tokens keep
               the distance they had in the text; a different method beyond the trained length.
    decodes    whether rows go at every decoding step too, as in the paper, or only once a prompt is read
    """

    budget: Budget = Capacity(1024)
    sinks: int = 4
    positions: Literal["cache", "original"] = "cache"
    layers: tuple[int, ...] | None = None
    decodes: bool = True
    together: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise BudgetError(f"sinks={self.sinks} is negative; 0 keeps the window only")
        if self.positions not in ("cache", "original"):
            raise ValueError(f"positions={self.positions!r} is neither 'cache' nor 'original'")

    @property
    def least(self) -> int:
        return self.sinks

    @property
    def travelling(self) -> int:
        return self.sinks if self.positions == "cache" else 0

    def ranks(self, signals: CacheSignals, rows: Rows) -> tuple[Tensor, Tensor]:
        return rows.newness().expand(rows.batch, -1, -1), rows.sinks(self.sinks)

    def leaver(self, signals: CacheSignals, rows: Rows) -> Tensor:
        assert rows.age is not None
        return rows.age.topk(self.sinks + 1).indices[..., self.sinks :]  # the oldest but for the sinks
