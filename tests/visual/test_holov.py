"""HoloV against its published steps, one image at a time."""

import pytest
import torch
import torch.nn.functional as F

from fewer.core import Capacity, KeepRatio
from fewer.methods.multimodal.holov import HoloV
from towers import call, kept, part, shown, whole_view


def slow(paid, x, count, crops=16, weight=0.09):
    """One image, Python lists, with what a full run cannot take handed to the next best."""
    n = len(paid)
    sizes = [n // crops + (i < n % crops) for i in range(crops)]
    u, runs, start = F.normalize(x.double(), dim=-1), [], 0
    for size in sizes:
        runs.append(list(range(start, start + size)))
        start += size
    variance = [0.0] * n
    for run in runs:
        for i in run:
            row = [0.0 if i == j else float(u[i] @ u[j]) for j in run]
            m = sum(row) / max(len(run) - 1, 1)
            variance[i] = sum((s - m) ** 2 for s in row) / max(len(run) - 1, 1)
    a = (1000 * paid.double() / paid.double().sum()).tolist()
    ratio = (sum(a) / n) / (sum(variance) / n)
    score = [s + weight * v * ratio for s, v in zip(a, variance, strict=True)]
    mean = [sum(score[i] for i in run) / len(run) if run else 0.0 for run in runs]
    budget = [int(count * m / sum(mean) + 1e-6) for m in mean]
    assert all(b <= s for b, s in zip(budget, sizes, strict=True)), "the case overflows a run"
    for g in sorted(range(crops), key=lambda g: -mean[g]):
        if sum(budget) < count and budget[g] < sizes[g]:
            budget[g] += 1
    return sorted(i for run, b in zip(runs, budget, strict=True) for i in sorted(run, key=lambda i: -a[i])[:b])


@pytest.mark.parametrize(("n", "count"), [(64, 16), (64, 25), (70, 20), (100, 40)])
@pytest.mark.parametrize("diversity", [0.0, 0.09, 2.0])
def test_against_the_steps(n, count, diversity):
    paid, x = torch.rand(2, n) + 0.5, torch.randn(2, n, 8)
    signals, tokens = shown({2: call(paid)}, whole_view(2, 1, n), hidden=x)
    plan = HoloV(Capacity(count), diversity=diversity).plan(signals, tokens)
    assert plan.lengths is None
    assert plan.m == count
    assert kept(plan) == [slow(p, f, count, weight=diversity) for p, f in zip(paid, x, strict=True)]


def test_variety_draws_budget():
    """Two runs, equal attention: the one whose tokens differ gets more."""
    x = torch.ones(1, 16, 8)
    x[0, 8:] = torch.eye(8) * torch.tensor([1.0, -1]).repeat(4)[:, None] + 0.3
    signals, tokens = shown({2: call(torch.ones(1, 16))}, whole_view(1, 2, 8), hidden=x)
    even = kept(HoloV(Capacity(8), crops=2, diversity=0).plan(signals, tokens))[0]
    varied = kept(HoloV(Capacity(8), crops=2, diversity=5).plan(signals, tokens))[0]
    assert sum(i < 8 for i in even) == 4 != sum(i < 8 for i in varied)


def test_what_a_full_run_cannot_take_goes_to_the_others():
    paid = torch.full((1, 32), 0.01)
    paid[0, :2] = 1.0
    signals, tokens = shown({2: call(paid)}, whole_view(1, 4, 8))
    rows = kept(HoloV(Capacity(17)).plan(signals, tokens))[0]
    assert len(set(rows)) == 17
    assert {0, 1} <= set(rows)


@pytest.mark.parametrize("budget", [KeepRatio(0.3), Capacity(10), Capacity(25)])
def test_padding_changes_nothing(budget):
    lengths = [40, 23, 11, 1]
    signals, tokens = shown({2: call(torch.rand(4, 40) + 0.01)}, whole_view(4, 5, 8), lengths=lengths)
    together = kept(HoloV(budget).plan(signals, tokens))
    for line, length in enumerate(lengths):
        assert kept(HoloV(budget).plan(*part(signals, line, length))) == [together[line]]


def test_equal_and_zero_tokens_still_give_the_count():
    signals, tokens = shown({2: call(torch.ones(1, 20))}, whole_view(1, 4, 5), hidden=torch.zeros(1, 20, 8))
    assert len(set(kept(HoloV(Capacity(7)).plan(signals, tokens))[0])) == 7


def test_bad_input():
    with pytest.raises(ValueError, match="crops=0"):
        HoloV(crops=0)
    with pytest.raises(ValueError, match="diversity=-1"):
        HoloV(diversity=-1)
