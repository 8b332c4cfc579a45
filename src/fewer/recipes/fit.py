"""Fit FitPrune's schedule: how many visual tokens may leave in each layer of a model, for a target of FLOPs.

schedule = fit_schedule(model, [processor(images=image, text=question, return_tensors="pt"), ...], flops=0.6)
session = fewer.apply(model, schedule.method)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewer import hosts
from fewer.core import KeepRatio, Plan, Signals, Tokens
from fewer.core.learned import Learned, remember
from fewer.core.visual.attention import strongest
from fewer.methods.multimodal.fitprune import FitPrune
from fewer.runtime.apply import apply

__all__ = ["Schedule", "fit_schedule", "leaving"]


@dataclass(frozen=True)
class Schedule:
    """What a fit came to. method: to apply, with the share of the visual tokens left behind each layer; alpha: share of
    the attention that a layer may lose; flops: of the language model, as a share of the unreduced one's, mean over the
    prompts."""

    method: FitPrune
    alpha: float
    flops: float


@torch.no_grad()
def fit_schedule(
    model: nn.Module, inputs: Sequence[Mapping[str, Any]], flops: float, *, tolerance: float = 0.01
) -> Schedule:
    """Bisect the share of attention each layer may lose until the mean cost meets a target.

    inputs   some prompts, each the keyword arguments of one forward pass over one prompt
    flops    the target, a share of the language model's cost without reduction, in (0, 1)
    tolerance    how far the cost may stay from it; the bisection stops after 40 halvings in any case

    Raises   ValueError for no inputs or a target outside (0, 1).
    Source   FitPrune, arXiv:2409.10197, sec. 3.3. A layer's total, of which alpha is a share, is that of the tokens
             still there; the paper's statistics come from the unreduced model, and so do ours.
    """
    if not inputs:
        raise ValueError("inputs is empty: a schedule is fitted to some prompts; give at least one")
    if not 0 < flops < 1:
        raise ValueError(f"flops={flops} is outside (0, 1); it is the share of the language model's cost that remains")
    host = hosts.find(model)
    weights = [host.linear_weights(i) for i in range(len(host.blocks))]
    seen, lengths = [], []
    with apply(model, _Watching()) as session:
        for given in inputs:
            model(**given, use_cache=False)
            received = session.last.memory[0]["received"]
            seen.append([tuple(part[0] for part in received[layer]) for layer in sorted(received)])
            lengths.append(session.last.first.n)

    def cost(sample: int, gone: list[int]) -> float:
        """Of one prompt, relative to all tokens in all layers."""

        def total(counts: list[int]) -> float:
            rows, macs = lengths[sample], 0.0
            for count, (attention, mlp) in zip(counts, weights, strict=True):
                macs += rows * attention + (rows * rows + rows) * host.pair_width
                rows -= count
                macs += rows * mlp
            return macs

        return total(gone) / total([0] * len(weights))

    def tried(alpha: float) -> tuple[list[list[int]], float]:
        gone = [leaving(layers, alpha) for layers in seen]
        return gone, sum(cost(i, counts) for i, counts in enumerate(gone)) / len(gone)

    low, high = 0.0, 1.0
    alpha, (gone, found) = 1.0, tried(1.0)
    for _ in range(40):
        if abs(found - flops) <= tolerance or high - low < 1e-9:
            break
        alpha = (low + high) / 2
        gone, found = tried(alpha)
        low, high = (alpha, high) if found > flops else (low, alpha)
    shares, left = [], 1.0
    for layer in range(len(weights)):
        left -= sum(counts[layer] / len(layers[0][0]) for counts, layers in zip(gone, seen, strict=True)) / len(gone)
        shares.append(min(max(round(left, 6), 1e-6), 1.0))
    return Schedule(FitPrune(KeepRatio(tuple(shares), of="start", rounding="round")), alpha, found)


def leaving(layers: Sequence[tuple[Tensor, Tensor]], alpha: float) -> list[int]:
    """How many tokens leave in each layer if each may lose a share alpha of its attention.

    layers: of each layer what its N tokens receive from visual tokens and from text, (N,) each. Those leave that lie in
    both of two prefixes, of the tokens still there in the order of the one and of the other average, each the longest
    whose sum is at most alpha of the whole.
    """
    alive = torch.ones_like(layers[0][0], dtype=torch.bool)
    counts = []
    for pair in layers:
        go = alive.clone()
        for received in pair:
            mass = received.double().masked_fill(~alive, 0)
            order = received.masked_fill(~alive, float("inf")).argsort(stable=True)
            small = mass[order].cumsum(0) <= alpha * mass.sum() * (1 + 1e-12)
            go &= torch.zeros_like(go).scatter(0, order, small)
        counts.append(int(go.sum()))
        alive = alive & ~go
    return counts


@dataclass(frozen=True)
class _Watching(FitPrune):
    """Notes what each layer's tokens receive, and lets all stay."""

    budget: Any = Learned()

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        remember(signals, "received", strongest(signals.visual))
        return Plan.identity((tokens.batch,), tokens.n, signals.device)
