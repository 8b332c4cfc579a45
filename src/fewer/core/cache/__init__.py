"""The KV cache as something to reduce: its rows, what may be looked at, and the selectors that count per KV head.

A cache layer holds S rows per sample and KV head. A plan over them has lead (B, G), or (B, 1) where all heads of a
layer keep the same rows; heads may keep different numbers. Budgets count what a sample's cache holds in the end,
protected rows included: `keep=0.5` of a prompt of 1,000 tokens leaves 500 rows, whatever the observation window is.
"""

from .method import CacheReducer, Ranker, Rereader
from .rows import Rows, allowed
from .selectors import check_alpha, check_window, lowest, marked, pooled_votes, ragged, shared, top
from .signals import Attending, CacheSignals, attended

__all__ = [
    "Attending", "CacheReducer", "CacheSignals", "Ranker", "Rereader", "Rows", "allowed", "attended",
    "check_alpha", "check_window", "lowest", "marked", "pooled_votes", "ragged", "shared", "top",
]  # fmt: skip
