"""Learning rates over a run."""

from __future__ import annotations

import math


def warm_cosine(step: int, steps: int, *, warmup: float = 0.1, floor: float = 0.0) -> float:
    """Share of the peak learning rate at 0-based `step` of `steps`: a linear rise, then half a cosine down to `floor`.

    warmup: share of the steps spent rising; the peak is reached at its end.
    """
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    done = (step + 1 - rise) / max(1, steps - rise)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
