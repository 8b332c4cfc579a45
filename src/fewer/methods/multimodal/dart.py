"""DART, duplication-aware reduction of tokens (Wen et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.core import Budget, Capacity, Plan, Signals, Site, Tokens, VisualReducer, reducer, select
from fewer.core.match import unit
from fewer.core.plan import take
from fewer.core.select import Fidelity
from fewer.core.visual import Scope


@reducer("dart", paper="arXiv:2502.11494", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class DART(VisualReducer):
    """A few pivots, and the visual tokens least similar to them, stay inside the language model (DART, EMNLP 2025).

    Pivots are the visual tokens and the text tokens behind them whose keys have the largest L1 norm, all heads side by
    side. One after the other, visual pivots first, larger norms first, each keeps its share of the visual tokens that
    are left: those whose hidden state has the lowest cosine to its own. Visual pivots stay too. No attention is needed.

    budget: how many visual tokens stay, per prompt. image, text: pivots of each kind; where there are fewer tokens, all
    of them. layers: by default behind the second block, so that the third is the first to see few tokens.
    fidelity: "paper": what is asked is what stays, shares that do not divide evenly are larger for the first pivots.
    "code": each pivot adds floor(budget / pivots), visual pivots come on top, as in public ports of the authors' code.

    States are compared behind the language model's last norm. The order of the pivots is ours: the public ports walk
    through an unordered set.
    """

    budget: Budget = Capacity(64)
    image: int = 4
    text: int = 4
    layers: tuple[int, ...] | None = (1,)
    fidelity: Fidelity = "paper"
    site: ClassVar[Site] = Site.AFTER_BLOCK
    scope: ClassVar[Scope] = "prompt"

    def __post_init__(self) -> None:
        if self.image < 1 or self.text < 0:
            raise ValueError(f"image={self.image}, text={self.text}: text from 0 up, image from 1 up")
        if self.fidelity not in ("paper", "code"):
            raise ValueError(f"fidelity={self.fidelity!r}: choose paper or code")
        if self.fidelity == "code" and self.budget.adaptive:
            raise ValueError(f"{self.budget!r} names no count; give r, keep or tokens")

    @property
    def adaptive(self) -> bool:
        return self.fidelity == "code" or self.budget.adaptive

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        visual, n = signals.visual, tokens.n
        count, most = select.allowed(self.budget, tokens, at=signals.at, device=signals.device)
        if tokens.valid is None and most == n and self.fidelity == "paper":
            return Plan.identity((tokens.batch,), n, signals.device)
        real = tokens.unpadded
        shown, sample = visual.keys.transpose(1, 2).flatten(2), visual.view.sample[:, None]
        where, worded = visual.words()
        assert visual.seen is not None
        said = visual.seen.k.transpose(1, 2)[sample, where].flatten(2)
        pivot, is_pivot = largest(shown, real, self.image)
        own = torch.minimum(is_pivot.sum(-1), count)
        is_pivot = is_pivot & (torch.arange(pivot.shape[1], device=own.device) < own[:, None])
        word, is_word = largest(said, worded, self.text)
        norm = visual.norm or (lambda x: x)
        states = norm(signals.hidden)
        asked = torch.cat([take(states, pivot), norm(visual.hidden[sample, where.gather(-1, word)])], 1)
        live = torch.cat([is_pivot, is_word], 1)
        number = live.sum(-1).clamp(min=1)
        nth = live.cumsum(-1) - 1
        if self.fidelity == "code":
            quota = (count // number)[:, None].expand_as(nth)
        else:
            left = count - own
            quota = (left // number)[:, None] + (nth < (left % number)[:, None])
        signals.at.spend(2 * asked.shape[1] * n * asked.shape[2])
        kept = torch.zeros(tokens.batch, n + 1, dtype=torch.bool, device=own.device)
        kept = kept.scatter(-1, pivot.masked_fill(~is_pivot, n), True)[:, :n]
        kept = kept | unlike(states, asked, quota.masked_fill(~live, 0), real & ~kept)
        return select.marked(kept, tokens) if self.fidelity == "code" else select.counted(kept, tokens, most)


def largest(keys: Tensor, real: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The rows of largest L1 norm, largest first: (R, number or fewer) positions, and whether each is a real one.

    keys: (R, N, C); real: (R, N) bool. Of equal rows the earlier one comes first."""
    norm = keys.detach().float().abs().sum(-1).masked_fill(~real, -1)
    norm, order = norm.sort(dim=-1, descending=True, stable=True)
    return order[:, :number], norm[:, :number] >= 0


def unlike(rows: Tensor, pivots: Tensor, quota: Tensor, pool: Tensor) -> Tensor:
    """(R, N) bool: each pivot in turn takes the rows of the pool that are least like it, by cosine, and out of it.

    rows: (R, N, d); pivots: (R, P, d); quota: (R, P) long, rows each takes; pool: (R, N) bool. The earlier of two
    equals is taken; a pool that runs out gives what it has. P sorts of N, no sync."""
    similar = unit(pivots) @ unit(rows).transpose(-1, -2)
    turn = torch.arange(rows.shape[1], device=rows.device)
    taken = torch.zeros_like(pool)
    for p in range(pivots.shape[1]):
        open_ = pool & ~taken
        order = similar[:, p].masked_fill(~open_, torch.inf).sort(dim=-1, stable=True).indices
        taken = taken | (torch.zeros_like(pool).scatter(-1, order, turn < quota[:, p, None]) & open_)
    return taken
