"""OTT: store the cache in two bits, but not the few tokens whose keys would spoil the scale. arXiv:2505.10938."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewer.core import reducer
from fewer.core.cache import CacheReducer
from fewer.core.cache.quantised import Codec


@reducer("ott", paper="arXiv:2505.10938", acts="quantise", on="kv-cache", training="free")
@dataclass(frozen=True)
class OTT(CacheReducer):
    """Outlier token tracing: rows that leave a window of exact ones are stored in few bits, outliers exactly.

    Keys have one scale and one smallest number per channel and `group` of rows, values one of each per row and head.
    The keys of a few tokens are far smaller than their channel's others and stretch its range; those with the smallest
    sum of absolute values go to a pool of exact rows, and their group is scaled without them. A full pool keeps the
    smallest rows of all; the others return to be stored with the group that displaced them.

    bits      of a number: 1, 2, 4 or 8
    group     rows coded together; a group is coded when it has left the window entirely
    window    newest rows that stay exact (and up to group - 1 more)
    outliers  candidates for the pool in each group
    pool      exact rows per KV head besides the window; 0 gives plain grouped quantisation, known as KIVI

    No token goes: attention reads every row, decoded anew in each pass, one layer at a time. Memory is saved, not time.
    The bytes of the ledger are those between passes: codes, scales, pool and window. Beside a method that evicts after
    prompts, rows are coded once it has; rows evicted later have what stays decoded and coded again. Groups start
    at a sample's first token, whatever padding is before it; samples with different padding are coded one by one.
    Sliding-window layers and heads that keep different numbers of rows (adakv) are not coded.
    """

    bits: int = 2
    group: int = 128
    window: int = 128
    outliers: int = 3
    pool: int = 32
    layers: tuple[int, ...] | None = None
    evicts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        assert self.codec is not None  # the codec says what its numbers may be

    @property
    def codec(self) -> Codec | None:
        return Codec(self.bits, self.group, self.window, self.outliers, self.pool)
