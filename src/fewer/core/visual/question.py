"""How much visual tokens resemble the question."""

from __future__ import annotations

import torch
from torch import Tensor

from ..match import unit
from ..signals import Signals


def resemblance(signals: Signals, *, raw: bool = False) -> Tensor:
    """(R, N) float32, without gradient: each visual row against the question, averaged over the question's pieces.

    With a guide, in its joint space: the cosine, or with `raw` the dot product as it is. Without one, in the language
    model's space at this site: the cosine to the mean of the text tokens behind the visual ones (of all text where
    none is behind).
    """
    visual = signals.visual
    if visual.guide is not None:
        rows, asked = (x.detach().float().nan_to_num(0.0) for x in visual.guide)
        rows, asked = (rows, asked) if raw else (unit(rows), unit(asked))
        asked = asked.mean(1)
    else:
        words, real = visual.wording()
        mean = words.detach().float().masked_fill(~real[..., None], 0).sum(1) / real.sum(-1, keepdim=True).clamp(min=1)
        rows, asked = unit(signals.hidden), unit(mean)
    signals.at.spend(2 * rows.shape[-2] * rows.shape[-1])
    return (rows @ asked[..., None])[..., 0]


def inverted(signals: Signals, negate: bool | None) -> float:
    """The sign of `resemblance` that says what stays. None: -1 with a guide, for the patches that CLIP's joint space
    puts nearest to a text are mostly background; 1 without one."""
    return -1.0 if (signals.visual.guide is not None if negate is None else negate) else 1.0


def spread_out(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Scores of each line moved and scaled to run from about 0 to 1; all one where they are all alike. (R, N)."""
    low = scores if valid is None else scores.masked_fill(~valid, torch.inf)
    high = scores if valid is None else scores.masked_fill(~valid, -torch.inf)
    low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    return (scores - low + SMALL) / (high - low).clamp_min(SMALL)


SMALL = 1e-6
