"""Calibration: the setting of a method that meets a target, found on its budget parameter by bisection."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fewer import hosts
from fewer.core import Budget, BudgetError, Capacity, KeepRatio, Mass, Reducer, Remove, Seen, Threshold
from fewer.hosts import Call, Host
from fewer.runtime.apply import apply
from fewer.runtime.costs import Ledger
from fewer.runtime.modules import UNTRAINED
from fewer.runtime.session import bind
from fewer.runtime.sites.blocks import BlockSite, Pass
from fewer.spec import parse, text

STEPS = 40  # halvings of the parameter's range
FAR = 0.1  # a share of the target; a result further off is no answer
LEAST = 1e-3  # the smallest share a calibration tries

Images = Tensor | Mapping[str, Tensor]  # what a model is called with: pixel values, or keyword arguments


def predict(method: str | Reducer, model: nn.Module, grid: tuple[int, int] | None = None) -> Ledger:
    """What a method with fixed counts will cost on a model, without running the model or reading data.

    Only the plans are made, on tensors that have a shape and nothing else, so every convention of the method (pairs
    that take at most half, fused and package tokens) is counted by the code that acts on it.
    grid: patches (height, width); by default those of the model's own image size.
    Raises   BudgetError for budgets that let samples keep different numbers.
    """
    reducer = parse(method)
    if reducer.adaptive:
        raise BudgetError(f"{text(reducer)} keeps a number that depends on the image; only a forward pass tells")
    host = hosts.find(model)
    site = BlockSite(bind(model, host, [reducer], "padded", UNTRAINED))  # counts do not depend on what was learned
    grid = grid or model_grid(model)
    n = host.prefix + grid[0] * grid[1]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        x = torch.empty(1, n, host.width)
        walk = Pass(site, x, grid)
        for layer in range(len(host.blocks)):
            x = walk.before(layer, x)
            call = Call()
            call.seen = _unseen(x, host)
            x = walk.mid(layer, x, call)
            x = walk.after(layer, x, call)
    return walk.trace.ledger


def calibrate(
    method: str | Reducer,
    model: nn.Module,
    *,
    target_tokens: float | None = None,
    target_gflops: float | None = None,
    grid: tuple[int, int] | None = None,
    images: Images | None = None,
) -> Reducer:
    """The method with its budget set so that the model keeps a mean number of tokens per block, or costs GFLOPs.

    target_tokens   mean over blocks of the tokens in attention and MLP, prefix included (`Ledger.mean_tokens`)
    target_gflops   of the whole model, the method's own included (`Ledger.gflops`)
    grid            patches (height, width), for budgets with fixed counts; by default the model's own
    images          (B, C, H, W) or keyword arguments to run, needed for `threshold` and `mass` only
    Returns the reducer whose result is nearest to the target; counts are whole, so it may be off by a step.
    Raises   BudgetError for a target out of reach or jumped over, naming what is reached, or for missing images.

    >>> calibrate("tome", model, target_tokens=131)  # doctest: +SKIP
    """
    if (target_tokens is None) == (target_gflops is None):
        raise BudgetError("give one target: target_tokens or target_gflops")
    target, unit = (target_tokens, "tokens") if target_gflops is None else (target_gflops, "GFLOPs")
    assert target is not None
    reducer = parse(method)
    found: dict[Budget, float] = {}

    def result(budget: Budget) -> float:
        if budget not in found:
            ledger = _ledger(replace(reducer, budget=budget), model, grid, images)
            found[budget] = ledger.mean_tokens if unit == "tokens" else ledger.gflops
        return found[budget]

    free = _free(model, grid, images)
    most, least = result(_budget(reducer.budget, 0.0, free)), result(_budget(reducer.budget, 1.0, free))
    if not least <= target <= most:
        raise BudgetError(f"{reducer.card.name} reaches {least:.4g} to {most:.4g} {unit} here, not {target:.4g}")
    best = _bisect(lambda t: _budget(reducer.budget, t, free), result, target)
    if abs(result(best) - target) > FAR * target:
        raise BudgetError(f"{reducer.card.name} jumps over {target:.4g} {unit} here; the nearest is {result(best):.4g}")
    return replace(reducer, budget=best)


def _bisect(budget: Callable[[float], Budget], result: Callable[[Budget], float], target: float) -> Budget:
    low, high = 0.0, 1.0  # result(low) >= target >= result(high)
    for _ in range(STEPS):
        middle = (low + high) / 2
        if budget(middle) in (budget(low), budget(high)):
            break
        low, high = (middle, high) if result(budget(middle)) >= target else (low, middle)
    return min((budget(low), budget(high)), key=lambda b: abs(result(b) - target))


N = TypeVar("N", int, float)


def _budget(like: Budget, t: float, free: int) -> Budget:
    """A budget of the same kind: t = 0 keeps all, t = 1 as little as it can. Listed values keep their proportions."""

    def scaled(values: float | tuple[float, ...], to: Callable[[float, float], N]) -> N | tuple[N, ...]:
        if not isinstance(values, tuple):
            return to(values, 1.0)
        top = max(values) or 1
        return tuple(to(v, v / top) for v in values)

    if isinstance(like, Remove):
        return replace(like, r=scaled(like.r, lambda _, part: round(t * free * part)))
    if isinstance(like, KeepRatio):
        gone = 1 - min(like.ratio) if isinstance(like.ratio, tuple) else 1.0
        return replace(like, ratio=scaled(like.ratio, lambda v, _: _kept(t, v, gone, isinstance(like.ratio, tuple))))
    if isinstance(like, Capacity):
        return Capacity(scaled(like.tokens, lambda _, part: max(1, round(free ** (1 - t) * part**t))))
    if isinstance(like, Mass):
        return Mass(1 - t * (1 - LEAST))
    if isinstance(like, Threshold):
        return Threshold(t)
    raise BudgetError(f"{type(like).__name__} has no parameter to calibrate; use r, keep, tokens, threshold or mass")


def _kept(t: float, ratio: float, gone: float, listed: bool) -> float:
    """The share kept at t; listed shares lose in proportion to what they lose now. Four decimals, to be readable."""
    loss = (1 - ratio) / gone if listed and gone else 1.0
    return round(1 - t * loss * (1 - LEAST), 4)


def _ledger(reducer: Reducer, model: nn.Module, grid: tuple[int, int] | None, images: Images | None) -> Ledger:
    if not reducer.adaptive:
        return predict(reducer, model, grid)
    if images is None:
        raise BudgetError(f"{text(reducer)} keeps a number that depends on the image: pass images= to calibrate on")
    with torch.inference_mode(), apply(model, reducer) as session:
        model(**images) if isinstance(images, Mapping) else model(images)
        return session.ledger


def _free(model: nn.Module, grid: tuple[int, int] | None, images: Images | None) -> int:
    patch = hosts.find(model).patch
    if grid is None and isinstance(images, Tensor) and patch is not None:
        return patch(images[:1]).flatten(2).shape[-1]
    height, width = grid or model_grid(model)
    return height * width


def model_grid(model: nn.Module) -> tuple[int, int]:
    """Patches (height, width) of a model at its own image size.

    Raises   BudgetError where they form no square, so that their number does not say.
    """
    patches = hosts.find(model).patches
    side = math.isqrt(patches)
    if side * side != patches:
        raise BudgetError(f"{type(model).__name__} has {patches} patches, not a square; pass grid=(height, width)")
    return side, side


def _unseen(x: Tensor, host: Host) -> Seen:
    """An attention call of the right shape. x: (B, N, C)."""
    q = torch.empty(x.shape[0], host.heads, x.shape[1], host.head_dim)
    return Seen(q, q, q, host.head_dim**-0.5)
