"""LLaVA-PruMerge against its authors' numbers, and cases computed by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fewer.core import Capacity, KeepRatio, Outliers, Seen, SignalError
from fewer.methods.multimodal.prumerge import PruMerge
from towers import call, kept, part, shown, whole_view

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "prumerge.npz")
CASES = json.loads(str(GOLDEN["config"]))["cases"]


def told(paid, keys=None):
    """A last block whose class token pays so much attention, its heads taken as one. paid: (R, N), at most 1 in sum."""
    r, n = paid.shape
    own = (1 - paid.sum(-1, keepdim=True)).clamp(min=1e-6)
    logits = torch.cat([own, paid], 1).log()[..., None]
    more = torch.zeros(r, 1 + n, 3) if keys is None else torch.nn.functional.pad(keys, (0, 0, 1, 0))
    k = torch.cat([1e-3 * logits, more], -1)  # so short that it changes no cosine by much
    q = torch.zeros_like(k)
    q[:, 0, 0] = 1e3 * k.shape[-1] ** 0.5
    return Seen(q[:, None], k[:, None], k[:, None], 1.0)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['case']}-{c['variant']}")
def test_golden(case):
    names = ("q_cls", "k", "hidden", "tokens", "indices", "cls_attn")
    q, k, hidden, want, indices, paid = (torch.from_numpy(GOLDEN[f"c{case['case']}.{name}"]) for name in names)
    r, n = case["B"], case["N"]
    wide = torch.cat([q, torch.zeros_like(k[:, 1:])], 1)
    heads = [x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (wide, k)]
    seen = Seen(heads[0], heads[1], heads[1], 1.0)
    signals, tokens = shown({-1: seen}, whole_view(r, 1, n), features=hidden[:, 1:])
    assert_close(signals.visual.class_attention(-1, wide=True)[:, 0], paid)
    budget = Outliers() if case["adaptive"] else Capacity(case["n_out"])
    plan = PruMerge(budget, plus=case["variant"] == "plus", fidelity="code").plan(signals, tokens)
    rows = plan.reduce(signals.visual.features)
    for line, where in enumerate(kept(plan)):
        assert len(where) == case["n_out"]
        (extra,) = set(where) - set(indices[line].tolist())
        assert extra == min(set(range(n)) - set(indices[line].tolist()))
        slots = torch.tensor([where.index(i) for i in [*indices[line].tolist(), extra]])
        assert_close(rows[line, slots], want[line], atol=1e-5, rtol=1e-5)


def test_three_outliers_by_hand():
    paid = torch.full((1, 20), 0.01)
    paid[0, [3, 7, 11]] = 0.2
    signals, tokens = shown({-1: told(paid)}, whole_view(1, 4, 5))
    plan = PruMerge(neighbours=0).plan(signals, tokens)
    assert kept(plan) == [[0, 3, 7, 11]]
    rest = torch.full((20,), 1 / 17)
    rest[[3, 7, 11]] = 0
    assert_close(plan.matrix[0, 0], rest)
    assert_close(plan.matrix[0, 1:4], torch.eye(20)[[3, 7, 11]])
    assert_close(plan.matrix.sum(-1)[0, :4], torch.ones(4))


def test_averages_and_sums():
    paid = torch.tensor([[0.5, 0.1, 0.04, 0.02, 0.03]])
    keys = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0.9, 0.1, 0], [0, 0, 1], [0.1, 0.9, 0]]])
    signals, tokens = shown({-1: told(paid, keys)}, whole_view(1, 1, 5))
    plan = PruMerge(Capacity(3), neighbours=1).plan(signals, tokens)
    assert kept(plan) == [[0, 1, 2]]  # 0 and 1 stay, the others are one row in the place of 2
    want = [[0.5, 0, 0.04, 0, 0], [0, 0.1, 0, 0, 0.03], [0, 0, 0.04, 0.02, 0.03]]
    sums = torch.tensor(want)
    assert_close(plan.matrix[0], sums / sums.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)
    plan = PruMerge(Capacity(3), neighbours=1, fidelity="code").plan(signals, tokens)
    sums[0, 0] = sums[1, 1] = 1
    assert_close(plan.matrix[0], sums, atol=1e-5, rtol=1e-4)


def test_flat_attention_keeps_one_and_the_rest():
    signals, tokens = shown({-1: told(torch.full((1, 12), 0.05))}, whole_view(1, 3, 4))
    assert kept(PruMerge().plan(signals, tokens)) == [[0, 1]]


def test_no_attention_on_patches_changes_nothing():
    """a = 0: each row is its token, and what is made of the dropped ones is nothing (a sum) or the first of them."""
    paid = torch.zeros(1, 12)
    signals, tokens = shown({-1: told(paid)}, whole_view(1, 3, 4))
    seen = signals.visual.encoder().seen[-1]
    seen.k[:, :, 1:, 0] = -1e3  # exp of this is zero
    plan = PruMerge(Capacity(4), fidelity="code").plan(signals, tokens)
    assert kept(plan) == [[0, 1, 2, 3]]
    assert torch.equal(plan.matrix[0], torch.eye(12)[:4] * torch.tensor([1.0, 1, 1, 0])[:, None])
    assert torch.equal(PruMerge(Capacity(4)).plan(signals, tokens).matrix[0], torch.eye(12)[:4])


def test_plus_samples_by_its_own_share_of_outliers():
    paid = torch.full((2, 40), 0.005)
    paid[0, [2, 30]] = 0.1  # 2 of 40: s = 20 // 3 = 6
    paid[1, [1, 2, 3, 4]] = 0.1  # 4 of 40: s = 10 // 3 = 3
    signals, tokens = shown({-1: told(paid)}, whole_view(2, 5, 8))
    first, second = kept(PruMerge(plus=True).plan(signals, tokens))
    assert first == sorted({2, 30, *range(0, 40, 6), 1})
    assert second == sorted({1, 2, 3, 4, *range(0, 40, 3), 5})


@pytest.mark.parametrize("count", [1, 2, 5, 13, 39])
def test_a_count_is_met(count):
    signals, tokens = shown({-1: told(torch.rand(1, 40) / 40)}, whole_view(1, 5, 8))
    for plus in (False, True):
        plan = PruMerge(Capacity(count), plus=plus).plan(signals, tokens)
        assert plan.m == count
        assert plan.lengths is None
        assert len(set(kept(plan)[0])) == count


def test_what_fits_is_left_alone():
    signals, tokens = shown({-1: told(torch.rand(1, 12) / 20)}, whole_view(1, 3, 4))
    method = PruMerge(Capacity(12))
    assert torch.equal(method.rows(signals, method.plan(signals, tokens)), signals.hidden)


@pytest.mark.parametrize("method", [
    PruMerge(), PruMerge(plus=True), PruMerge(Capacity(7), plus=True), PruMerge(KeepRatio(0.4), fidelity="code"),
], ids=str)  # fmt: skip
def test_padding_changes_nothing(method):
    lengths = [40, 23, 5, 1]
    paid = torch.rand(4, 40).pow(6) / 40
    signals, tokens = shown({-1: told(paid, torch.randn(4, 40, 5))}, whole_view(4, 5, 8), lengths=lengths)
    plan = method.plan(signals, tokens)
    rows, together = method.rows(signals, plan), kept(plan)
    for line, length in enumerate(lengths):
        one, only = part(signals, line, length)
        alone = method.plan(one, only)
        assert kept(alone) == [together[line]]
        count = len(together[line])
        if count < length:
            assert_close(method.rows(one, alone)[0, :count], rows[line, :count], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("outliers", "paper", "code"), [(26, 27, 27), (27, 28, 27), (28, 29, 29), (32, 33, 32)])
def test_the_code_cuts_the_product_of_a_share_off_in_double_precision(outliers, paper, code):
    paid = torch.full((1, 196), 1.0) + 1e-3 * torch.arange(196)
    paid[0, 5 * torch.arange(outliers) % 196] = 50 + torch.arange(outliers).float()
    signals, tokens = shown({-1: told(paid, torch.randn(1, 196, 5))}, whole_view(1, 14, 14))
    for fidelity, rows in (("paper", paper), ("code", code)):
        plan = PruMerge(fidelity=fidelity).plan(signals, tokens)
        assert plan.lengths.tolist() == [rows]
    assert int(196 * (27 / 196)) == 26  # and one row for all that left


def test_a_tower_without_a_class_token_is_told_so():
    signals, tokens = shown({-1: call(torch.ones(1, 4))}, whole_view(1, 2, 2), cls=False)
    with pytest.raises(SignalError, match="no class token"):
        PruMerge().plan(signals, tokens)


def test_bad_input():
    with pytest.raises(ValueError, match="fidelity='book'"):
        PruMerge(fidelity="book")
    with pytest.raises(ValueError, match="neighbours=-1"):
        PruMerge(neighbours=-1)
