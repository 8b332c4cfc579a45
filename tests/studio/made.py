"""Rows made up for the purpose: `right` items of 400, at some cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fewer.evaluation import stats
from fewer.evaluation.record import Cost, Passport, Row
from fewer.evaluation.settings import UNREDUCED

N = 400
PASSPORT = Passport(
    "a pass", "itself", "tiny", "noise", N, 3, "quartiles", 8, "cpu", "float32", 1, "packed", 0, "a machine",
    {"torch": "2"}, "abc1234", "2026-01-02T03:04:05+00:00",
)  # fmt: skip
BASE = np.arange(N) < 360


def row(method: str, right: np.ndarray, tokens: float, speed: float, **more: object) -> Row:
    made = Row(method, method, PASSPORT, acts="prune", code=f'fewer.apply(model, "{method}")', n=N)
    made.hits, made.accuracy = stats.pack_hits(right), stats.share(right)
    made.difference = None if method == UNREDUCED else stats.paired_difference(right, BASE)
    made.tokens, made.final, made.counts = tokens, tokens - 5, [tokens, tokens - 5]
    made.cost, made.agreement, made.kl = Cost(tokens / 100, 0.0, 200 / tokens), 0.9, 0.01
    made.speedup = stats.Interval(speed, speed - 0.01, speed + 0.01)
    return replace(made, **more)  # type: ignore[arg-type]
