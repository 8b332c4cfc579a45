"""ToMA: what the paper promises of its matrices, and on a model."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from torch.testing import assert_close

import fewer
from cases import normal
from denoisers import denoiser, run
from fewer.core import BudgetError, Place, Signals, Tokens
from fewer.core.denoising import Moment
from fewer.core.match import unit
from fewer.methods.diffusion.toma import covering


def signals(x: torch.Tensor, grid: tuple[int, int]) -> Signals:
    return Signals(x, Tokens.plain(*x.shape[:2]), Place(), grid=grid, at_step=Moment())


def test_greedy_covering_is_near_the_best() -> None:
    u = unit(normal(0, 1, 9, 4))
    like = (u @ u.transpose(1, 2))[0]

    def worth(chosen: tuple[int, ...]) -> float:
        return float((like[:, list(chosen)].amax(1) + 1).sum())

    best = max(map(worth, combinations(range(9), 3)))
    got = tuple(covering(like[None], 3)[0].tolist())
    assert worth(got) >= (1 - 1 / 2.718281828) * best
    gains = [worth(tuple(covering(like[None], k)[0].tolist())) for k in range(1, 9)]
    steps = [b - a for a, b in pairwise(gains)]
    assert all(a >= b - 1e-5 for a, b in pairwise(steps)), "each adds no more than the one before"


def test_rows_and_shares_add_up_and_windows_keep_apart() -> None:
    x = normal(1, 2, 48, 5)
    method = fewer.parse("toma:window=4")
    plan = method.plan(signals(x, (6, 8)), Tokens.plain(2, 48))
    dense = plan.dense()
    assert plan.m == 24
    assert_close(dense.sum(-1), torch.ones(2, 24))
    assert_close(plan.restore(torch.ones(2, 24, 3)), torch.ones(2, 48, 3))
    assert_close(plan.reduce(torch.full((2, 48, 3), 2.5)), torch.full((2, 24, 3), 2.5))
    place = torch.arange(48)
    window = (place // 8 // 3) * 2 + place % 8 // 4  # 6 rows divide into windows of 3
    for row in dense[0]:
        assert len(set(window[row > 0].tolist())) == 1


def test_more_destinations_come_nearer() -> None:
    x = normal(2, 1, 64, 8)
    gaps = []
    for ratio in (0.75, 0.5, 0.25, 0.0):
        plan = fewer.parse(f"toma:ratio={ratio},temperature=0.02").plan(signals(x, (8, 8)), Tokens.plain(1, 64))
        gaps.append(float((plan.restore(plan.reduce(x)) - x).square().mean()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-4


def test_in_a_model_with_reuse_and_out_of_range() -> None:
    pytest.importorskip("diffusers")
    model, given = denoiser("dit")
    with torch.no_grad():
        plain = run(model, given, 3)
        with fewer.apply(model, "toma:ratio=0"):
            assert all(map(torch.equal, run(model, given, 3), plain))
        with fewer.apply(model, "toma:reuse=2") as session:
            run(model, given, 2)
            first = session.trace.plans[0]
            run(model, given, 2)
            second = session.trace.plans[0]
            assert first is not second, "another call chooses anew"
            run(model, given, 1, start=2)
            assert session.trace.plans[0] is not second, "two steps later it chooses anew"
    for form in ("toma:ratio=1.0", "toma:window=0", "toma:temperature=0"):
        with pytest.raises(BudgetError):
            fewer.parse(form)
