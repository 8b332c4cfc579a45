"""VisPruner against its published steps, one line at a time."""

import pytest
import torch
import torch.nn.functional as F

from fewer.core import Capacity, KeepRatio
from fewer.methods.multimodal.fastervlm import FasterVLM
from fewer.methods.multimodal.vispruner import VisPruner
from towers import call, kept, part, shown, whole_view


def slow(paid, features, count, important=0.5, step=8):
    """One image, Python lists."""
    order = sorted(range(len(paid)), key=lambda i: (-float(paid[i]), i))
    first = int(count * important + 1e-6)
    chosen, line = order[:first], order[first:]
    x = F.normalize(features.double(), dim=-1)
    while len(line) > count - first:
        a, b = line[0::2], line[1::2]
        near = {i: max((float(x[i] @ x[j]) for j in b), default=-2.0) for i in a}
        a = sorted(a, key=lambda i: -near[i])
        line = a[min(step, len(line) - (count - first)) :] + b
    return sorted(chosen + line)


@pytest.mark.parametrize("n", [16, 17, 30, 49])
@pytest.mark.parametrize("count", [1, 2, 7, 12])
@pytest.mark.parametrize("step", [3, 8])
def test_against_the_steps(n, count, step):
    paid, features = torch.rand(2, n) + 0.01, torch.randn(2, n, 6)
    signals, tokens = shown({2: call(paid)}, whole_view(2, 1, n), features=features)
    plan = VisPruner(Capacity(count), step=step).plan(signals, tokens)
    assert plan.lengths is None
    assert plan.m == count
    assert kept(plan) == [slow(p, f, count, step=step) for p, f in zip(paid, features, strict=True)]


def test_duplicates_go_first():
    features = torch.eye(16)
    paid = torch.linspace(1, 2, 16).flip(0)[None]
    features[[9, 11, 13, 15]] = features[[8, 10, 12, 14]]  # neighbours in the line: one of each pair on either side
    signals, tokens = shown({2: call(paid)}, whole_view(1, 4, 4), features=features[None], cls=False)
    rows = kept(VisPruner(Capacity(12)).plan(signals, tokens))[0]
    shown_once = {tuple(features[i].tolist()) for i in rows}
    assert len(rows) == len(shown_once) == 12


def test_all_by_attention_is_fastervlm():
    paid = torch.rand(2, 30) + 0.01
    signals, tokens = shown({2: call(paid)}, whole_view(2, 5, 6))
    assert kept(VisPruner(Capacity(9), important=1).plan(signals, tokens)) == kept(
        FasterVLM(Capacity(9)).plan(signals, tokens)
    )


@pytest.mark.parametrize("budget", [Capacity(7), KeepRatio(0.3), Capacity(20)])
@pytest.mark.parametrize("important", [0.0, 0.5])
def test_padding_changes_nothing(budget, important):
    paid = torch.rand(4, 30) + 0.01
    lengths = [30, 13, 8, 1]
    signals, tokens = shown({2: call(paid)}, whole_view(4, 5, 6), lengths=lengths)
    method = VisPruner(budget, important)
    together = kept(method.plan(signals, tokens))
    for line, length in enumerate(lengths):
        assert kept(method.plan(*part(signals, line, length))) == [together[line]]


def test_zero_vectors_and_equal_tokens_still_give_the_count():
    signals, tokens = shown({2: call(torch.ones(1, 20))}, whole_view(1, 4, 5), features=torch.zeros(1, 20, 6))
    assert len(set(kept(VisPruner(Capacity(6)).plan(signals, tokens))[0])) == 6


def test_bad_input():
    with pytest.raises(ValueError, match="important=2"):
        VisPruner(important=2)
    with pytest.raises(ValueError, match="step=0"):
        VisPruner(step=0)
