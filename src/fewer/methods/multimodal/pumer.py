"""PuMer: drop image tokens no word looks at, then merge image with image and word with word. arXiv:2305.17530."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewer.core import (
    Budget,
    Group,
    Hard,
    KeepRatio,
    Place,
    Plan,
    Reducer,
    SignalError,
    Signals,
    Tokens,
    attention,
    match,
    reducer,
    select,
)  # fmt: skip
from fewer.core.plan import take


@dataclass(frozen=True)
class _Pruned(Budget):
    """What is left when only the pruned share goes, and never fewer than stay in all."""

    whole: Budget
    share: float

    def keep(self, free: int, at: Place) -> int:
        return max(self.whole.keep(free, at), KeepRatio(1 - self.share, rounding="round").keep(free, at))

    def granted(self, real: Tensor, free: int, at: Place, *, least: int = 0) -> Tensor:
        return torch.maximum(super().granted(real, free, at, least=least), self.whole.granted(real, free, at))


@dataclass(frozen=True, eq=False)
class _Left(Budget):
    """What stays in all, for tokens that were pruned already. goes: the most that still go; own: (B,) what stays."""

    goes: int
    own: Tensor | None

    def keep(self, free: int, at: Place) -> int:
        return max(free - self.goes, 0)

    def granted(self, real: Tensor, free: int, at: Place, *, least: int = 0) -> Tensor:
        assert self.own is not None
        return torch.minimum(self.own, real)

    def most(self, free: int, at: Place, *, least: int = 0) -> int:
        return super().most(free, at, least=least) if self.own is None else free  # the device alone knows


@dataclass(frozen=True, eq=False)
class _Part:
    """One modality's rows as a sequence of their own. index: (B, W), where they stand; padding behind."""

    index: Tensor
    tokens: Tokens

    def of(self, stream: Tensor) -> Tensor:
        return take(stream, self.index)


@reducer("pumer", paper="arXiv:2305.17530", acts="prune+merge", on="multimodal", training="optional",
         exempt={"budget_is_met": "the budget counts image tokens; words have a share of their own",
                 "padding_changes_nothing": "the check's tokens have no modality; its own tests pad words and patches",
                 })  # fmt: skip
@dataclass(frozen=True)
class PuMer(Reducer):
    """PuMer, pruning and merging tokens by modality [Cao et al., ACL 2023].

    For models with words and patches in one sequence (ViLT). Image tokens are ranked by the attention words pay to
    them, averaged over words and heads; the least of them go. Of the others the most similar pairs merge, as in `tome`
    but with sizes that start at one each time; then words merge among themselves. No row ever holds both modalities.

    budget: share of the image tokens that stays at each place, pruned and merged ones gone.
    prune: share of the image tokens that is dropped; what else the budget takes is merged, at most half of the rest.
    text: share of the words that is merged, at most half.
    layers: the paper's for ViLT, of 12.

    The defaults are the paper's for ViLT on VQAv2: of the image tokens a tenth pruned and three tenths merged, of the
    words a fifth. Class tokens, that of the image too, and the last word ([SEP]) stay and are not counted. Every share
    is rounded to the nearest whole number. A budget that keeps all image tokens leaves the words alone too.

    Training: fine-tune the reduced model with the task's loss plus 1.0 times `fewer.training.losses.logit_kl` from the
    unreduced one. Outputs per word are given for merged words as well, alike for all that merged.
    """

    budget: Budget = KeepRatio(0.6, rounding="round")
    layers: tuple[int, ...] | None = (2, 5, 8)
    prune: float = 0.1
    text: float = 0.2

    def __post_init__(self) -> None:
        for name in ("prune", "text"):
            if not 0 <= (share := getattr(self, name)) < 1:
                raise ValueError(f"{name}={share} is outside [0, 1); it is the share that goes")
        if self.budget.adaptive:
            raise ValueError(f"{self.budget!r} names no count of image tokens; pumer takes r, keep or tokens")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        words, image = _parts(signals, tokens)
        seen, n = signals.seen, tokens.n
        assert seen is not None
        h, d = seen.q.shape[1], seen.q.shape[-1]
        signals.at.spend(2 * h * words.tokens.n * n * d)
        real = None if words.tokens.valid is None else words.tokens.valid.float()
        score = attention.mass(seen, Group(index=words.index), real).mean(1)
        metric = signals.key
        shorter = _merged(words.of(metric), self._text_budget, words.tokens.protect(words.tokens.last), signals.at)
        plans = (shorter, self._image_plan(image.of(score), image.of(metric), image.tokens, signals))
        plan = _joined(plans, (words, image), tokens)
        signals.memory["left"] = (plan.m, plans[1].m)
        return plan

    @property
    def _text_budget(self) -> Budget:
        return KeepRatio(1 - self.text, rounding="round")

    def _image_plan(self, score: Tensor, metric: Tensor, tokens: Tokens, signals: Signals) -> Hard:
        """Prune, then merge. score: (B, I), metric: (B, I, d), of the image tokens alone."""
        free = tokens.free_count
        real = None if tokens.valid is None else (tokens.valid.sum(-1) - tokens.prefix).clamp(min=0)
        start, starts = signals.memory.setdefault("start", (free, real))
        at = replace(signals.at, start=start, starts=starts)
        pruned = _Pruned(self.budget, self.prune)
        first = select.top(score, pruned, tokens, at=at)
        if real is None:
            left = _Left(pruned.keep(free, at) - self.budget.keep(free, at), None)
        else:
            counts = zip(pruned.counts(free, at), self.budget.counts(free, at), strict=True)
            left = _Left(max(a - b for a, b in counts), self.budget.granted(real, free, at))
        second = _merged(take(metric, first.position), left, tokens.after(first), at)
        both = first.then(second)
        assert isinstance(both, Hard)
        return both


def _merged(metric: Tensor, budget: Budget, tokens: Tokens, at: Place) -> Hard:
    """The most similar pairs of one modality folded."""
    if tokens.free_count < 2:
        return Plan.identity((tokens.batch,), tokens.n, metric.device)
    return match.bipartite(metric, budget, tokens, at=at, order="position")


def _parts(signals: Signals, tokens: Tokens) -> tuple[_Part, _Part]:
    """Words and image tokens. How many there are is known without asking the device at the first place, and behind
    one's own plan; elsewhere each part is as wide as the sequence, and padded."""
    if tokens.modality is None:
        raise SignalError(
            "pumer needs words and patches in one sequence, as ViLT has them, and this model has one kind of token; "
            "choose tome for a vision tower"
        )
    n, left = tokens.n, signals.memory.get("left")
    images = left[1] if left is not None and left[0] == n else tokens.images
    made = []
    for kind, width in ((0, None if images is None else n - images), (1, images)):
        mine = tokens.modality == kind
        if tokens.valid is not None:
            mine = mine & tokens.valid
        index = (~mine).to(torch.int8).argsort(dim=-1, stable=True)[:, :width]
        padded = images is None or tokens.valid is not None
        prefix = tokens.prefix if kind == 0 else 1
        part = Tokens.plain(tokens.batch, index.shape[1], prefix, device=tokens.device)
        made.append(_Part(index, replace(part, valid=mine.gather(-1, index) if padded else None)))
    return made[0], made[1]


def _joined(plans: tuple[Hard, Hard], parts: tuple[_Part, _Part], tokens: Tokens) -> Hard:
    """One plan of the whole sequence: rows of the words, then those of the image."""
    n, b = tokens.n, tokens.batch
    m = sum(plan.m for plan in plans)
    device = plans[0].anchor.device
    row = torch.full((b, n + 1), -1, device=device)
    weight = torch.zeros(b, n + 1, device=device)
    anchor = torch.zeros(b, m + 1, dtype=torch.long, device=device)
    before: Tensor | int = 0
    ragged = any(part.tokens.valid is not None for part in parts)
    for plan, part in zip(plans, parts, strict=True):
        valid, rows = part.tokens.valid, torch.arange(plan.m, device=device).expand(b, -1)
        place = part.index if valid is None else torch.where(valid, part.index, n)
        count: Tensor | int = plan.m
        slot = rows + before
        if valid is not None:
            own = plan.counted if plan.length is not None else valid.sum(-1)
            count = own[:, None]
            slot = torch.where(rows < count, slot, m)
        row = row.scatter(-1, place, torch.where(plan.row < 0, -1, plan.row + before))
        weight = weight.scatter(-1, place, plan.weight)
        anchor = anchor.scatter(-1, slot, part.index.gather(-1, plan.anchor))
        before = before + count
    lengths = before[:, 0] if ragged and isinstance(before, Tensor) else None
    return Plan.from_rows(row[:, :n], m, weight[:, :n], lengths=lengths, anchor=anchor[:, :m])
