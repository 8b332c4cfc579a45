"""SiTo, by a slow twin and on a model."""

from __future__ import annotations

import pytest
import torch

import fewer
from cases import normal
from denoisers import denoiser
from fewer.core import BudgetError, Place, Signals, Tokens
from fewer.core.denoising import Moment


def by_hand(x: torch.Tensor, grid: tuple[int, int], dropped: int) -> tuple[list[int], dict[int, int]]:
    """Who stays, and whose answer each dropped token gets. x: (N, C)."""
    u = [row / row.norm() for row in x]
    n, width = len(u), grid[1]
    score = [sum(float(a @ b) for b in u) / n for a in u]
    cells: dict[tuple[int, int], list[int]] = {}
    for i in range(n):
        cells.setdefault((i // width // 2, i % width // 2), []).append(i)
    bases = [max(members, key=lambda i: score[i]) for (y, x_), members in cells.items() if len(members) == 4]
    others = [i for i in range(n) if i not in bases]
    ranked = sorted(others, key=lambda i: -max(float(u[i] @ u[j]) for j in bases))
    gone = ranked[:dropped]
    kept = [i for i in range(n) if i not in gone]
    return kept, {i: max(kept, key=lambda j: float(u[i] @ u[j])) for i in gone}


@pytest.mark.parametrize("grid", [(4, 4), (5, 6)])
def test_a_slow_twin(grid: tuple[int, int]) -> None:
    n = grid[0] * grid[1]
    x = normal(3, 2, n, 6)
    signals = Signals(x, Tokens.plain(2, n), Place(), grid=grid, at_step=Moment())
    plan = fewer.parse("sito:ratio=0.4,noise=0").plan(signals, signals.tokens)
    out = normal(4, 2, plan.m, 3)
    reduced, back = plan.reduce(x), plan.restore(out)
    for i in range(2):
        kept, copies = by_hand(x[i], grid, int(0.4 * n))
        assert plan.position[i].tolist() == kept
        assert torch.equal(reduced[i], x[i, kept]), "what stays is as it was"
        for gone, source in copies.items():
            assert torch.equal(back[i, gone], out[i, kept.index(source)])


def test_in_a_model_and_out_of_range() -> None:
    pytest.importorskip("diffusers")
    model, given = denoiser("sd15")
    with torch.no_grad():
        plain = model(**given)[0]
        with fewer.apply(model, "sito:ratio=0"):
            assert torch.equal(model(**given)[0], plain)
        with fewer.apply(model, "sito:ratio=0.9") as session:
            model(**given)
            assert session.counts[0] == 64, "the bases stay"
            assert "192 can go" in session.report()
    for form in ("sito:ratio=1.0", "sito:cell=1"):
        with pytest.raises(BudgetError):
            fewer.parse(form)
