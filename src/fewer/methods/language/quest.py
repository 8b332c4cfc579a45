"""Quest: keep the whole cache, but read only the pages that could matter to the present query. arXiv:2406.10774."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.core import Budget, Capacity, Hard, Plan, reducer
from fewer.core.attention import grouped_product
from fewer.core.cache import CacheReducer, CacheSignals, Rows, ragged


@reducer("quest", paper="arXiv:2406.10774", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class Quest(CacheReducer):
    """At every decoding step, read the pages whose keys could give the present query the largest logits.

    A page is `page` rows that came one after the other. The largest and the smallest value of each key channel in a
    page bound every logit of the page from above: sum over c of max(q_c max_c, q_c min_c). The pages with the highest
    bounds are read, the newest always. Nothing is evicted, so no memory is freed: the bounds take 2 / page of the keys
    besides. What is saved is the reading. Prompts, and passes of several tokens, are read whole.

    budget   rows read per KV head and step, a whole number of pages; a share counts all tokens seen so far
    page     rows of a page
    least    pages read whatever the budget says
    dense    first layers that read everything, for their attention is flat
    group    how the query heads of a KV head agree on pages: "mean" or "max" of their bounds. The paper has one head
             each, where the two are the same; its later code lets every query head choose, which reads rows repeatedly

    A sliding-window layer is read whole. Beside a method that evicts only after prompts (snapkv, ...) the pages are
    those of the rows it left; beside one that evicts at every step all bounds are made anew every time.
    """

    budget: Budget = Capacity(1024)
    page: int = 16
    least: int = 3
    dense: int = 2
    group: Literal["mean", "max"] = "mean"
    layers: tuple[int, ...] | None = None
    evicts: ClassVar[bool] = False
    reads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.page < 1 or self.least < 1 or self.dense < 0:
            raise ValueError(
                f"page={self.page}, least={self.least}, dense={self.dense}: at least 1 row a page, 1 page a step and "
                "no negative number of dense layers"
            )
        if self.group not in ("mean", "max"):
            raise ValueError(f"group={self.group!r} is neither 'mean' nor 'max'")

    def read(self, signals: CacheSignals, rows: Rows) -> Hard | None:
        if signals.q.shape[2] > 1 or signals.at.layer < self.dense:
            return None
        pages = -(-rows.n // self.page)
        counts = zip(rows.counts(self.budget, signals.at), rows.totals, strict=True)
        wanted = [pages if count >= total else max(count // self.page, self.least) for count, total in counts]
        if min(wanted) >= pages:
            return None
        bounds = self.bounds(signals, rows, pages)
        score = self.score(signals, bounds)
        if rows.real is None and len(set(wanted)) == 1:
            return self._even(score, rows, wanted[0])
        page = self._page(rows)
        score = score.scatter(-1, page[..., -1:].expand(*score.shape[:2], 1), float("inf"))
        order = score.sort(dim=-1, descending=True, stable=True).indices
        limit = torch.tensor(wanted, device=score.device)[:, None, None]
        chosen = torch.zeros_like(score, dtype=torch.bool)
        chosen.scatter_(-1, order, (torch.arange(pages, device=score.device) < limit).expand_as(order))
        keep = chosen.gather(-1, page.expand(*score.shape[:2], -1))
        return ragged(keep if rows.real is None else keep & rows.real, rows.n, min(max(wanted) * self.page, rows.n))

    def _even(self, score: Tensor, rows: Rows, wanted: int) -> Hard:
        """Rows of the best pages and of the newest one, which may be short: counts are the same everywhere."""
        last = score.shape[-1] - 1
        best = score[..., :last].sort(dim=-1, descending=True, stable=True).indices[..., : wanted - 1]
        first = best.sort(dim=-1).values * self.page
        full = (first[..., None] + torch.arange(self.page, device=score.device)).flatten(-2)
        newest = torch.arange(last * self.page, rows.n, device=score.device).expand(*full.shape[:-1], -1)
        return Plan.keep(torch.cat([full, newest], -1), rows.n)

    def score(self, signals: CacheSignals, bounds: Tensor) -> Tensor:
        """(B, G, P) float32: upper bound of q k over each page, one number per KV head. bounds: (B, G, P, 2 d)."""
        q = signals.q.float()
        sides = torch.cat([q, -q], -1).clamp(min=0)  # (B, H, 1, 2 d): where q_c > 0 the maximum counts, else minimum
        heads = signals.kv_heads if self.group == "mean" else q.shape[1]
        signals.at.spend(2 * heads * bounds.shape[2] * bounds.shape[3])
        if self.group == "mean":  # the bound is linear in the two sides of q, so the mean may be taken first
            return (signals.per_group(sides) @ bounds.float().transpose(-1, -2))[:, :, 0]
        return grouped_product(sides, bounds.float())[:, :, 0].unflatten(1, (signals.kv_heads, -1)).amax(2)

    def bounds(self, signals: CacheSignals, rows: Rows, pages: int) -> Tensor:
        """(B, G, P, 2 d): the largest k and the largest -k of each channel and page, kept from step to step."""
        k, low = signals.k, torch.finfo(signals.k.dtype).min
        kept = signals.local.get("bounds", k.new_empty(*k.shape[:2], 0, 2 * k.shape[3]))
        seen = signals.local.get("seen", 0)
        kept = F.pad(kept, (0, 0, 0, pages - kept.shape[2]), value=low)
        new = k[:, :, seen:]
        sides = torch.cat([new, -new], -1)
        if rows.real is not None:
            sides = sides.masked_fill(~rows.real[..., seen:, None], low)
        page = self._page(rows)[..., seen:, None].expand(sides.shape)
        signals.local.update(bounds=kept.scatter_reduce(2, page, sides, "amax"), seen=rows.n)
        return signals.local["bounds"]

    def _page(self, rows: Rows) -> Tensor:
        """(B or 1, G or 1, S) long: the page of each row. Real rows are counted, so padding shifts nothing."""
        return (rows.newness().long() - int(rows.real is not None)).clamp(min=0) // self.page
