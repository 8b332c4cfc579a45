"""Dynamic token pooling: characters become segments of learned length for the middle of the model. arXiv:2211.09761."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer
from fewer.core.learned import gumbel, keep_decision, straight_through
from fewer.core.plan import take

LEARNED = ("gumbel", "entropy", "unigram")
SOURCES = (*LEARNED, "whitespace", "stride")


class PoolingError(ValueError):
    """Dynamic pooling was asked for something it cannot do."""


@reducer("dynamic_pooling", paper="arXiv:2211.09761", acts="merge", on="language", training="required")
@dataclass(frozen=True)
class DynamicPooling(Reducer):
    """The middle of a character model sees one row per segment, and the model decides where segments end.

    budget: expected share of the characters that close a segment. The prior of `gumbel`, one over the length of
        `stride`; the other kinds take as many boundaries as the text has, and start from this share if they learn.
    layers: the blocks that see segments, 0-based, one unbroken run; the paper's eight in the middle of twelve.
    boundaries: what closes a segment. stride: every so many characters. whitespace: a blank. entropy: a predictor of
        spikes in the model's own uncertainty. unigram: a predictor of where a Unigram tokeniser's pieces end.
        gumbel: a predictor that learns from the loss alone, with a binomial prior on the number of boundaries.
    temperature: of the relaxed Bernoulli draws of `gumbel` in training.

    It makes its own model, `fewer.models.hourglass.Hourglass`, trained from scratch by `fewer train dynamic_pooling`:
    the middle has to learn to read segments, so there is nothing to put into a model that was trained on tokens.
    """

    budget: Budget = KeepRatio(0.2)
    layers: tuple[int, ...] | None = tuple(range(2, 10))
    boundaries: str = "gumbel"
    temperature: float = 0.5
    site: ClassVar[Site] = Site.AROUND_BLOCK

    def __post_init__(self) -> None:
        if self.boundaries not in SOURCES:
            raise PoolingError(f"boundaries={self.boundaries!r}: choose {', '.join(SOURCES)}")
        ratio = self.budget.ratio if isinstance(self.budget, KeepRatio) else None
        if not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
            raise PoolingError(f"dynamic_pooling takes a share of the characters above 0, not {self.budget}: keep=0.2")
        if not self.layers or list(self.layers) != list(range(self.layers[0], self.layers[-1] + 1)):
            raise PoolingError(f"layers={self.layers}: the blocks that see segments are one unbroken run, as 2+3+4")

    @property
    def share(self) -> float:
        """Expected share of the characters that close a segment."""
        assert isinstance(self.budget, KeepRatio) and isinstance(self.budget.ratio, (int, float))
        return float(self.budget.ratio)

    @property
    def stride(self) -> int:
        """Characters of a segment of fixed length."""
        return round(1 / self.share)

    @property
    def learned(self) -> bool:
        """Whether a predictor decides."""
        return self.boundaries in LEARNED

    @property
    def adaptive(self) -> bool:
        return self.boundaries != "stride"

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        """Raises PoolingError: other models cannot be given segments."""
        raise PoolingError(
            "dynamic_pooling is a model of its own and cannot be put into another one, whose blocks never learned to "
            "read segments; train it with `fewer train dynamic_pooling --out DIR` and load it with "
            "fewer.models.hourglass.Hourglass.from_folder(DIR)"
        )

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        """The plan from characters to segments; `restored` spreads its rows back."""
        return segments(self.decide(signals, tokens))

    def decide(self, signals: Signals, tokens: Tokens) -> Tensor:
        """(B, N): 1 where a segment ends with this character. Looks at nothing behind it.

        Bool; for `gumbel` in training float32 with the gradient of the relaxed draw. `signals.memory` must hold
        "whitespace" (B, N) bool for that kind, and gains "boundaries" and, where a predictor decides, its "logits".

        In evaluation `gumbel` compares its probabilities with `even` numbers instead of random ones: the same text
        gets the same segments, as many as in training. One half as the threshold gives the same where the predictor
        is sure, and no boundary at all as long as it is not. The other predictors use one half.
        """
        if self.boundaries == "stride":
            ends = (tokens.ordinal() + 1) % self.stride == 0
        elif self.boundaries == "whitespace":
            ends = signals.memory["whitespace"]
        else:
            logits = signals.module("boundaries")(signals.hidden)
            signals.memory["logits"] = logits
            if self.boundaries != "gumbel":
                ends = logits > 0
            elif signals.training:
                logp = torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], -1)
                ends = keep_decision(logp, gumbel(logp), self.temperature)
            else:
                ends = logits.sigmoid() > even(tokens.ordinal())
        signals.memory["boundaries"] = ends
        return ends


def even(place: Tensor) -> Tensor:
    """Numbers in [0, 1), one per position, that any stretch of positions spreads evenly: multiples of the golden
    ratio, without their whole part, in integers. place: (B, N) long. Returns (B, N) float64."""
    return ((place + 1) * 2654435769 % 2**32).double() / 2**32


class BoundaryPredictor(nn.Module):
    """How likely a segment ends with a character, from that character's features: LayerNorm, Linear, GELU, Linear.

    It starts at `share` for every character, so that training begins near the length it is meant to end at. The
    paper's predictor has as many inner channels as the model's MLPs; this one has as many as the model, so that it
    adds little to the parameters of a small model.
    """

    def __init__(self, width: int, share: float) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        last = self.score[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.02)
        nn.init.constant_(last.bias, math.log(share / (1 - share)) if share < 1 else 4.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C) -> (B, N) float32 logits."""
        return self.score(x)[..., 0].float()


def segments(boundaries: Tensor) -> Plan:
    """The plan that averages the characters of each finished segment; the unfinished rest is dropped.

    boundaries: (B, N), 1 where a segment ends with this character. Values must be 0 or 1; bool or float.
    Returns  a ragged plan of as many rows as the sample with most boundaries has, at least one (padding). Hard, and
             linear in memory, where no gradient is wanted; soft, (B, M, N), where boundaries carry one.
    Gradient A character's weight in its row is 1 - (k - g) at k = g, g the number of boundaries before it: raising a
             boundary raises the weight of the characters behind it in its segment, and so moves the row towards
             their mean, the row a cut there would leave. Over a whole later segment the changes cancel: where
             segments end matters, not how they are numbered. Two other readings do not work: 1 - |k - g| has no
             slope at k = g, and the mean of that hat's two slopes also sees the renumbering of every later segment;
             with it all characters became boundaries within 100 steps of training.
             `restored` sends no gradient to boundaries: a larger g would read rows that are not closed yet.
    Cost     One synchronisation, for the number of rows: it is what the model decides.
    Source   Nawrot et al., arXiv:2211.09761, sec. 3, and the authors' code for the slope. Which side of a boundary a
             character stands on is derived: it must be known once the character has been read, so the character
             that ends a segment belongs to it.

    >>> segments(torch.tensor([[0, 1, 0, 0, 1, 0]])).row.tolist()
    [[0, 0, 1, 1, 1, -1]]
    """
    ends = boundaries.detach().long()
    group = ends.cumsum(-1) - ends
    lengths = ends.sum(-1)
    rows = max(1, int(lengths.max()))
    row = torch.where(group < lengths[..., None], group, -1)
    if not boundaries.requires_grad:
        return Plan.from_rows(row, rows, lengths=lengths)
    member = (row[..., None, :] == torch.arange(rows, device=row.device)[:, None]).float()
    weight = straight_through(member, member * (boundaries.cumsum(-1) - boundaries)[..., None, :])
    return Plan.soft(weight / weight.sum(-1, keepdim=True).clamp_min(1), lengths=lengths)


def closed(plan: Plan) -> Tensor:
    """(B, N) long: how many rows of a plan over contiguous segments end at or before each character."""
    row = plan.row
    return ((row >= 0) & (row != F.pad(row[..., 1:], (0, 1), value=-1))).cumsum(-1)


def restored(plan: Plan, rows: Tensor) -> Tensor:
    """Rows spread back over the characters, each getting the last segment it has seen the end of.

    rows: (B, 1 + M, C), the null group first, which those get that have seen no end. Returns (B, N, C).
    `Plan.restore` would give each character its own segment, the characters behind it included.
    """
    return take(rows, closed(plan))


def prior_loss(boundaries: Tensor, share: float) -> Tensor:
    """-log Binomial(number of boundaries | N, share) / N, averaged over the samples. boundaries: (B, N)."""
    n = boundaries.shape[-1]
    k = boundaries.float().sum(-1)
    ways = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return -(ways + k * math.log(share) + (n - k) * math.log1p(-share)).mean() / n


def entropy_spikes(logits: Tensor, window: int = 2) -> Tensor:
    """(B, N) bool: the entropy of the next character exceeds each of the `window` entropies before it.

    logits: (B, N, V). The first `window` characters have too few before them and are no spikes.
    """
    logp = logits.detach().float().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    before = F.pad(entropy, (window, 0), value=math.inf).unfold(-1, window, 1)[..., :-1, :]
    return entropy > before.amax(-1)
