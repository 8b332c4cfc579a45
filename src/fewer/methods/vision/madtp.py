"""MADTP: a dictionary shared by image and text says how many tokens each image needs. arXiv:2403.02991, sec. 3."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, Group, Plan, Reducer, Signals, Tokens, attention, reducer, select
from fewer.core.learned import Learned, remember

STEPS = ((30.0, 1.0), (10.0, 0.5), (5.0, 0.25), (1.0, 0.1), (0.0, 0.01))  # gap in GFLOPs, step of the temperature
FULL = 132.54  # GFLOPs of the model these gaps are for: BLIP on NLVR2, two images and a text
COLDEST = 0.01


class Dictionary(nn.Module):
    """Entries that tokens of both modalities are compared with.

    entries      (K, C), drawn from a standard normal distribution as in the authors' code
    temperature  how sharply an entry picks tokens for the threshold; a controller sets it, no gradient does
    """

    temperature: Tensor

    def __init__(self, width: int, entries: int, temperature: float) -> None:
        super().__init__()
        self.entries = nn.Parameter(torch.randn(entries, width))
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C) -> (B, N, K), float32: how well each token matches each entry."""
        return (x @ self.entries.T).float()

    def aligned(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """Each entry's own view of some tokens: their average, weighted by how well they match it.

        x: (B, N, C); real: (B, N) bool, False = padding. Returns (B, K, C), float32. For images and texts alike:
        `alignment` compares the two.
        """
        match = self(x) / x.shape[-1] ** 0.5
        if real is not None:
            match = match.masked_fill(~real[..., None], float("-inf"))
        return match.softmax(1).transpose(1, 2) @ x.float()

    def flops(self, n: int) -> int:
        """Comparing n tokens with all entries."""
        return 2 * n * self.entries.numel()


@reducer("madtp", paper="arXiv:2403.02991", acts="prune+merge", on="vision", training="required")
@dataclass(frozen=True)
class MADTP(Reducer):
    """MADTP, multimodal alignment-guided dynamic token pruning [Cao et al., CVPR 2024].

    A token's importance S is the mean of three: the attention it receives from the other patches (per pair the largest
    over heads, summed, scaled to sum to one); its best match among the entries of a dictionary shared with the text
    tower (scaled to sum to one); and the class token's attention, each head weighted by the share of the token's head
    output norms that is its. Every entry spreads its attention over the tokens, softmax(match / temperature), and
    reads S with it; the smallest of these readings is the threshold. What lies below melts into one more token, the
    S-weighted mean.

    budget: the threshold, by default, so that images keep different numbers; the cost is steered by the temperature,
    see `controlled`. `keep=`, `tokens=` or `mass=` keep the most important ones instead.
    entries: of the dictionary. One dictionary serves all blocks.
    temperature: at the start of training; afterwards the trained modules know theirs. The warmer, the fewer tokens
    stay: at 1 a dictionary that has learned nothing yet keeps nearly all.

    Departs from the authors' code where that lets one image decide for another: it keeps as many tokens in all images
    as the one with the most needs, this keeps each image's own. Matches below zero count as zero, so that a sum of them
    cannot turn signs. The dictionary sees tokens behind the block's attention (the code: in front of it), and the
    gradient reaches it through the merged token's weights, not the attention. An image of which at most one token
    would go keeps all. Without a class token the attention received from all stands in for the class token's.

    Training: the task's loss plus 0.1 `alignment` of what the two towers' tokens look like through the dictionary. In
    training each place leaves its image side, (B, K, C), in the pass's memory under "aligned".
    """

    budget: Budget = Learned()
    layers: tuple[int, ...] | None = None
    entries: int = 100
    temperature: float = 1.0
    one_for_all: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.entries < 1:
            raise ValueError(f"entries={self.entries}: the dictionary has at least one; 100 is the paper's")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: it divides and must be positive; 1 is the paper's")

    @property
    def extra(self) -> int:
        return 1

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        return {"dictionary": Dictionary(width, self.entries, self.temperature)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        dictionary: Dictionary = signals.module("dictionary")
        match = dictionary(signals.hidden)
        signals.at.spend(dictionary.flops(tokens.n))
        free = _free(tokens)
        score = importance(signals, tokens, match)
        if signals.training:
            remember(signals, "aligned", dictionary.aligned(signals.hidden, free))
        if not isinstance(self.budget, Learned):
            plan = select.top(score, self.budget, tokens, at=signals.at)
            return plan.fuse_rest(score, normalise=True, valid=tokens.valid)
        keep = score > threshold(match, score, free, dictionary.temperature)
        kept, count = (keep & free).sum(-1, keepdim=True), free.sum(-1, keepdim=True)
        keep = keep | (kept < 1) | (count - kept <= 1)
        plan = select.marked(keep, tokens).fuse_rest(score, normalise=True, valid=tokens.valid)
        assert plan.anchor_weight is not None  # a merged token stands for two or more, so no image gains rows
        return replace(plan, anchor=plan.anchor[:, : tokens.n], anchor_weight=plan.anchor_weight[:, : tokens.n])


def _free(tokens: Tokens) -> Tensor:
    """(B, N) bool: neither protected nor padding."""
    movable = tokens.movable
    if movable is None:
        return torch.ones(tokens.batch, tokens.n, dtype=torch.bool, device=tokens.device)
    return movable.expand(tokens.batch, -1)


def _share(score: Tensor, free: Tensor) -> Tensor:
    """Scores of the free tokens, scaled to sum to one; zero elsewhere."""
    score = score.masked_fill(~free, 0)
    return score / score.sum(-1, keepdim=True).clamp_min(1e-8)


def importance(signals: Signals, tokens: Tokens, match: Tensor) -> Tensor:
    """(B, N) float32: the mean of a token's three importances; zero for protected tokens and padding.

    match: (B, N, K), how well tokens match the dictionary's entries; it carries the gradient, attention does not.
    """
    free = _free(tokens)
    with torch.no_grad():
        received, output = _patches(signals, tokens)
        if tokens.has_cls:
            look = signals.attention_rows(tokens.cls)[:, :, 0]
        else:
            count: Tensor | int = tokens.n if tokens.valid is None else tokens.valid.sum(-1)[:, None, None]
            look = signals.attention_mass() / count
        heads = output / output.sum(1, keepdim=True).clamp_min(1e-8)
        of_class = (look * heads).sum(1).masked_fill(~free, 0)
    return (_share(received, free) + _share(match.amax(-1).clamp(min=0), free) + of_class) / 3


def _patches(signals: Signals, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Attention each token receives from the free ones, per pair the largest over heads, (B, N); and the length of each
    head's output at each token, (B, H, N). Both float32. Memory is linear in N: queries are taken in chunks."""
    seen: Any = signals.seen
    b, h, n, d = seen.q.shape
    signals.at.spend(4 * h * n * n * d)
    value = seen.v.float()
    weight = _free(tokens).float()
    received, output = torch.zeros(b, n, device=value.device), []
    step = max(1, attention.CHUNK // (b * h * n))
    for i in range(0, n, step):
        part = Group(i, min(i + step, n))
        p = attention.rows(seen, part)
        received = received + torch.einsum("bqn,bq->bn", p.amax(1), part.of(weight, -1))
        output.append((p @ value).norm(dim=-1))
    return received, torch.cat(output, -1)


def threshold(match: Tensor, score: Tensor, free: Tensor, temperature: Tensor) -> Tensor:
    """(B, 1): the smallest mean of the scores, each entry of the dictionary weighting tokens by softmax(match / t).

    match: (B, N, K), score: (B, N), free: (B, N) bool, the tokens that count.
    """
    spread = (match / temperature.float()).masked_fill(~free[..., None], float("-inf")).softmax(1)
    return torch.einsum("bnk,bn->bk", spread, score).amin(-1, keepdim=True)


def alignment(image: Iterable[Tensor], text: Iterable[Tensor]) -> Tensor:
    """How far the two towers' tokens are from saying the same through the dictionary: one minus the cosine, averaged
    over samples and entries; 0 where they agree, at most 2.

    image, text: (B, K, C) per block, from `Dictionary.aligned`; each side is summed over its blocks first.
    Raises   ValueError where the two sides' shapes differ: towers of different width need a map in between.
    """
    seen, read = (torch.stack([x.float() for x in side]).sum(0) for side in (image, text))
    if seen.shape != read.shape:
        raise ValueError(
            f"the image side is {tuple(seen.shape)}, the text side {tuple(read.shape)}: alignment compares samples, "
            "entries and channels one by one; map one tower's tokens to the other's width first"
        )
    return (1 - F.cosine_similarity(seen, read, dim=-1)).mean()


def controlled(temperature: float, gflops: float, target: float, full: float = FULL) -> float:
    """The next epoch's temperature: warmer where the model was too costly, since the threshold then nears the mean.

    gflops, target   measured and wanted cost. full: cost of the unreduced model; gaps count relative to it, so that the
                     steps the paper chose for 132.54 GFLOPs suit models of any size
    The step depends on the gap: 1 above 30 GFLOPs, 0.5 above 10, 0.25 above 5, 0.1 above 1, else 0.01. Never below
    0.01. Set it with `dictionary.temperature.fill_(...)`.

    >>> controlled(1.0, gflops=110.0, target=66.0), controlled(1.0, gflops=64.0, target=66.0)
    (2.0, 0.9)
    """
    gap = (gflops - target) * FULL / full
    step = next(step for least, step in STEPS if abs(gap) > least or not least)
    return max(COLDEST, temperature + step if gap > 0 else temperature - step)
