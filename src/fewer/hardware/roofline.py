"""A roofline with measured constants: how long a forward pass takes that nobody has run.

Every operation of a pass takes a call and whatever its size asks for; how fast that goes was measured on the machine
for operations of many sizes (`calibrate`) and is interpolated. Nothing is fitted to whole models, so every model is one
it has not seen.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .calibrate import Profile
from .ops import Op, Work
from .points import LINES


def op_seconds(profile: Profile, op: Op) -> float:
    """Seconds of an operation itself."""
    if op.kind == "view":
        return profile.view
    if op.kind == "gemm":
        batch, m, n, k = op.shape
        if 0 in op.shape[1:]:
            return profile.view
        rate = profile.pairs.at(m, n, k) if batch > 1 else profile.gemm.at(m, n, k)
        return op.flops / rate
    if op.kind == "attention":
        _, n, m, d, causal, masked = op.shape
        seconds = op.flops / profile.attention.at(n, m, d)
        if causal and n > 1:
            seconds *= profile.causal.at(n)
        return seconds * profile.masked.at(n) if masked else seconds
    if op.kind == "sort":
        numbers, last = op.shape
        return (
            max(numbers / max(last, 1) / LINES, 1) * LINES * profile.sort.at(last) * _longer(last, profile.sort.axes[0])
        )
    table = profile.kinds[op.kind]
    return table.at(op.bytes) * _longer(op.bytes, table.axes[0])


def _longer(size: float, axis: Sequence[float]) -> float:
    """Beyond the largest size that was measured time grows with size."""
    return max(size / axis[-1], 1.0)


@dataclass(frozen=True)
class Estimate:
    """seconds of a pass; by kind of operation; by block, -1 for what is outside them."""

    seconds: float
    kinds: dict[str, float]
    layers: dict[int, float]

    @property
    def bound(self) -> str:
        """What takes the most."""
        return max(self.kinds, key=lambda kind: self.kinds[kind])


def estimate(profile: Profile, work: Work, plain: Work | None = None) -> Estimate:
    """How long a pass takes. plain: the same without methods, where there are any: what the pass does more often than
    that one is the session's own, with the calls that go with it."""
    kinds: dict[str, float] = defaultdict(float)
    layers: dict[int, float] = defaultdict(float)
    spent = profile.around[work.kind]
    for op in work.ops:
        seconds = op_seconds(profile, op)
        kinds[op.kind] += seconds
        layers[op.layer] += seconds + spent.call
    kinds["calls"] = len(work.ops) * spent.call
    if plain is not None:
        before = Counter(op.layer for op in plain.ops)
        for layer, number in Counter(op.layer for op in work.ops).items():
            more = max(number - before[layer], 0) * (spent.own - spent.call) + (layer >= 0) * spent.block
            layers[layer] += more
            kinds["calls"] += more
    return Estimate(sum(kinds.values()), dict(kinds), dict(layers))


@dataclass(frozen=True)
class SpeedUp:
    """A predicted speed-up and what it may be: from `low` to `high` as far as the calibration is uncertain."""

    value: float
    low: float
    high: float
    before: Estimate
    after: Estimate


def speed_up(profile: Profile, plain: Work, reduced: Work, error: float = 0.0) -> SpeedUp:
    """Of a method in a model. error: relative, of such predictions on machines where they were checked; what each part
    of the calibration was uncertain by is added, as if independent."""
    before, after = estimate(profile, plain), estimate(profile, reduced, plain)
    value = before.seconds / after.seconds
    square = error**2
    for part, kinds in PARTS.items():
        share = sum(before.kinds.get(k, 0.0) for k in kinds) / before.seconds
        left = sum(after.kinds.get(k, 0.0) for k in kinds) / after.seconds
        square += (profile.spread.get(part, 0.0) * (share - left)) ** 2  # a constant moves both passes alike
    half = math.sqrt(square)
    return SpeedUp(value, value / (1 + half), value * (1 + half), before, after)


PARTS = {
    "gemm": ("gemm",), "attention": ("attention",), "calls": ("calls", "view"),
    "kinds": ("light", "norm", "gelu", "silu", "exp", "softmax", "reduce", "copy", "rows", "gather", "sort"),
}  # fmt: skip


def by_flops(plain: Work, reduced: Work) -> float:
    """The first naive rule: time goes with FLOPs."""
    return plain.flops / reduced.flops


def by_tokens(plain: Work, reduced: Work) -> float:
    """The second: time goes with tokens, averaged over attention and MLP of all blocks."""
    return sum(map(sum, plain.tokens)) / sum(map(sum, reduced.tokens))
