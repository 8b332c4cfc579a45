"""SparseVLM (Zhang et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.core import (
    Budget,
    Hard,
    KeepRatio,
    Place,
    Plan,
    SignalError,
    Signals,
    Site,
    Tokens,
    Visual,
    VisualReducer,
    cluster,
    reducer,
    select,
)
from fewer.core.plan import on_device, take
from fewer.core.select import Fidelity
from fewer.core.visual import Scope
from fewer.core.visual.attention import Score, attended, check_score, per_sample

OF = 576  # visual tokens the published counts are for
PUBLISHED = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
PUBLISHED_SECOND = {192: (300, 200, 118), 128: (238, 108, 60), 64: (66, 34, 20)}


def published(tokens: int, second: bool = False) -> KeepRatio:
    """The published counts of 576 visual tokens as shares of any number, for `budget`.

    tokens: 192, 128, 96 or 64, what the authors call them by their mean over the layers. The true mean is higher (206
    for 192, 82 for 64): three blocks see everything, and recycled tokens are not counted. second: those of the second
    version, which has none for 96.
    """
    table = PUBLISHED_SECOND if second else PUBLISHED
    if tokens not in table:
        raise ValueError(f"tokens={tokens} has no published counts; choose {', '.join(map(str, table))}")
    return KeepRatio(tuple(count / OF for count in table[tokens]), of="start", rounding="round")


HEADLINE = published(192)


def raters(visual: Visual) -> Tensor:
    """(R, T) bool over all text of each line's prompt: the words behind the image that the image speaks to.

    Of the rows as they entered the language model: each visual row's products with the words, softmax over the words,
    mean over the visual rows; a word whose mean exceeds the words' average rates. Where none does, all do."""
    if visual.embedded is None:
        raise SignalError(
            "the rows as they entered the language model are not known here, and raters are chosen by them"
        )
    index, real = visual.words()
    sample = visual.view.sample[:, None]
    words, rows = visual.embedded[sample, index].float(), visual.view.of(visual.embedded).float()
    visual.spend(2 * rows.shape[1] * words.shape[1] * words.shape[2])
    logits = (rows @ words.transpose(-1, -2)).masked_fill(~real[:, None], float("-inf"))
    weight = logits.softmax(-1)
    if visual.view.valid is None:
        weight = weight.mean(1)
    else:
        seen = visual.view.valid[..., None]
        weight = (weight * seen).sum(1) / seen.sum(1).clamp_min(1)
    mean = weight.sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp_min(1)
    chosen = real & (weight > mean)
    chosen = torch.where(chosen.any(-1, keepdim=True), chosen, real)
    named = torch.zeros_like(visual.text[visual.view.sample]).scatter(-1, index, chosen)
    everywhere, text = visual.words(behind=False)
    return named.gather(-1, everywhere) & text


@reducer("sparsevlm", paper="arXiv:2410.04417", acts="prune+merge", on="multimodal", training="free")
@dataclass(frozen=True)
class SparseVLM(VisualReducer):
    """Words that the image speaks to rate its tokens; those that leave are recycled as averages (SparseVLM).

    The raters are chosen once, from what enters the language model. At each stage a visual token's score is the
    attention the raters give it, averaged over raters and heads. Of those that leave, the best int(0.3 n) + 1 are
    clustered by density peaks into a tenth as many groups; a group's average stands in the place of its densest member.

    budget: shares of the visual tokens the prompt began with, stage by stage; `published(192)`, `(128)`, `(64)` of this
    module hold the authors' counts. layers: the blocks behind which tokens go; by default those at the relative depth
    of blocks 2, 6 and 15 of 32. recycle: whether averages are added. fidelity: "paper" counts the averages within the
    budget, so that it says what stays; "code" adds them to it.
    heads: share of the heads that count, those that look at the visual tokens most; score: see `fastv`. The second
    version is `recycle=False, score="corrected", heads=14/32` with `published(192, second=True)`.

    Departs from the code, which in its first version puts the averages behind the other rows and numbers positions
    anew: rows keep the position ids, and the places, of the tokens they stand for. The paper's
    adaptive count (rank of the raters' attention) is in no released code and not here.
    """

    budget: Budget = HEADLINE
    layers: tuple[int, ...] | None = None
    recycle: bool = True
    heads: float = 1.0
    score: Score = "rotated"
    fidelity: Fidelity = "paper"
    site: ClassVar[Site] = Site.AFTER_BLOCK
    scope: ClassVar[Scope] = "prompt"
    changes: ClassVar[bool] = True  # raters are chosen at the first stage, whoever leaves there

    def __post_init__(self) -> None:
        check_score(self.score)
        if not 0 < self.heads <= 1:
            raise ValueError(f"heads={self.heads} is outside (0, 1]; it is the share of heads whose attention counts")
        if self.fidelity not in ("paper", "code"):
            raise ValueError(f"fidelity={self.fidelity!r} is neither 'paper' nor 'code'")

    def acts_at(self, depth: int) -> tuple[int, ...]:
        if self.layers is not None:
            return self.layers
        return tuple(sorted({min(depth - 1, round(depth * layer / 32)) for layer in (2, 6, 15)}))

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        visual = signals.visual
        index, text = visual.words(behind=False)
        origin = index if visual.origin is None else visual.origin[visual.view.sample].gather(-1, index)
        if "raters" not in signals.memory:
            signals.memory["raters"] = origin.masked_fill(~raters(visual), -1)
        rate = (origin[..., None] == signals.memory["raters"][:, None]).any(-1) & text  # other methods drop words
        scores = self._scores(visual, rate)
        if not self.recycle:
            return select.top(scores, self.budget, tokens, at=signals.at)
        return recycled(signals.hidden, scores, self.budget, tokens, at=signals.at, fidelity=self.fidelity)

    def _scores(self, visual: Visual, rating: Tensor) -> Tensor:
        """(R, N): attention of the raters, mean over them and over the heads that count. rating: (R, T) bool, which of
        the words that are left."""
        index, _ = visual.words(behind=False)
        rate = rating.float()
        paid = attended(visual, per_sample(visual, index), self.score)
        paid = (paid * rate[:, None, :, None]).sum(2) / rate.sum(-1).clamp_min(1)[:, None, None]  # (R, H, N)
        valid = visual.view.valid
        if self.heads < 1:
            mass = (paid if valid is None else paid * valid[:, None]).sum(-1)
            best = mass.topk(max(1, round(self.heads * paid.shape[1])), dim=-1).indices
            return take(paid, best).mean(1)
        return paid.mean(1)


def division(n: Tensor, rows: Tensor, fidelity: Fidelity = "paper") -> tuple[Tensor, Tensor, Tensor]:
    """Of n tokens of which the budget grants `rows`: how many stay, are recycled, and into how many averages.

    n, rows: long, of any shape. "code": `rows` stay, and the averages come on top. "paper": both together are `rows`;
    at most half of them are averages (ours, for tiny budgets)."""

    def made(stay: Tensor) -> tuple[Tensor, Tensor]:
        gone = n - stay
        again = torch.where(gone > 0, torch.minimum((0.3 * gone.double()).long() + 1, gone), 0)
        return again, torch.where(again > 0, again // 10 + 1, 0)

    stay, most = rows, rows // 2
    if fidelity == "paper":
        for _ in range(6):  # a token less adds 0.03 averages, so this settles at once
            stay = rows - torch.minimum(made(stay)[1], most)
    again, averages = made(stay)
    if fidelity == "paper":
        averages = rows - stay
    return stay, torch.where(averages > 0, again, 0), averages


def recycled(
    x: Tensor, scores: Tensor, budget: Budget, tokens: Tokens, *, at: Place, fidelity: Fidelity = "paper"
) -> Hard:
    """Keep the best, and the averages of clusters of the next best.

    Shapes   x: (R, N, d), what is clustered; scores: (R, N), higher stays.
    Returns  a hard plan, rows ascending by position; an average is anchored at its cluster's densest member.
    Cost     2 F^2 d FLOPs and F^2 floats for F recycled tokens; no synchronisation.
    """
    n, device = tokens.n, x.device
    if tokens.valid is None:
        one = division(torch.tensor([n]), torch.tensor([budget.keep(n, at)]), fidelity)
        block, most = int(one[1]), int(one[2])  # on the CPU, whatever the device
        width = int(one[0]) + most
        stay, again, made = (on_device(part.tolist() * tokens.batch, device) for part in one)
    else:
        real = tokens.valid.sum(-1)
        stay, again, made = division(real, budget.granted(real, n, at), fidelity)
        block = min(int(0.3 * n) + 1, n)
        most = block // 10 + 1
        width = min(n, max(budget.counts(n, at)) + (most if fidelity == "code" else 0))
        scores = scores.masked_fill(~tokens.valid, float("-inf"))
    if most == 0:
        return select.top(scores, budget, tokens, at=at)
    at.spend(2 * block**2 * x.shape[-1])
    with torch.no_grad():
        order = scores.float().sort(dim=-1, descending=True, stable=True).indices
        turn = torch.arange(block, device=device)
        there = turn < again[:, None]
        place = order.gather(-1, (stay[:, None] + turn).clamp(max=n - 1))
        d = cluster.Distances(take(x, place), there, x.shape[-1])
        label, centre = cluster.density_peaks(d, most, made, there, made)
        centre = place.gather(-1, centre)
        place = torch.where(there, place, n)
        number = torch.zeros_like(centre, dtype=torch.float32).scatter_add(-1, label, there.float())
        weight = torch.ones(tokens.batch, n + 1, device=device)
        weight = weight.scatter(-1, place, 1 / number.gather(-1, label).clamp_min(1))[:, :n]
        rank = torch.empty_like(order).scatter(-1, order, torch.arange(n, device=device).expand_as(order))
        alive = torch.nn.functional.pad(rank < stay[:, None], (0, 1))
        spare = torch.arange(most, device=device) >= made[:, None]
        alive = alive.scatter(-1, centre.masked_fill(spare, n), True)[:, :n]
        anchor = (~alive).to(torch.int8).argsort(dim=-1, stable=True)[:, :width]
        row = (alive.long().cumsum(-1) - 1).gather(-1, centre).gather(-1, label)
        to = torch.full((tokens.batch, n + 1), -1, device=device).scatter(-1, place, row)[:, :n]
        where = torch.arange(n, device=device).expand(tokens.batch, n)
        return Hard(
            n, anchor, where, to.masked_fill(alive, -1), weight.gather(-1, anchor), weight,
            length=None if tokens.valid is None else stay + made,
        )  # fmt: skip
