"""VScan: two scans and the averages, by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from fewer.core import Capacity, KeepRatio
from fewer.methods.multimodal.vscan import VScan
from towers import call, cut_view, kept, part, shown, whole_view


def window_of(i, width, side):
    return i // width // side, i % width // side


def test_half_by_window_half_by_attention():
    early, late = torch.rand(1, 36) + 0.01, torch.rand(1, 36) + 0.01
    signals, tokens = shown({5: call(early), 2: call(late)}, whole_view(1, 6, 6))
    plan = VScan(Capacity(16), window=3).plan(signals, tokens)  # 4 windows of 9, two tokens each, eight over all
    rows = kept(plan)[0]
    local = set()
    for down in range(2):
        for right in range(2):
            cells = [i for i in range(36) if window_of(i, 6, 3) == (down, right)]
            local |= set(sorted(cells, key=lambda i: -early[0, i])[:2])
    rest = sorted(set(range(36)) - local, key=lambda i: -late[0, i])[:8]
    assert rows == sorted(local | set(rest))
    assert plan.lengths is None


def test_what_windows_cannot_share_goes_to_the_global_scan():
    early, late = torch.rand(1, 36) + 0.01, torch.rand(1, 36) + 0.01
    signals, tokens = shown({5: call(early), 2: call(late)}, whole_view(1, 6, 6))
    assert kept(VScan(Capacity(7), window=3).plan(signals, tokens)) == [late[0].topk(7).indices.sort().values.tolist()]


def test_the_dropped_join_their_nearest_and_average():
    early, late, x = torch.rand(1, 36) + 0.01, torch.rand(1, 36) + 0.01, torch.randn(1, 36, 8)
    signals, tokens = shown({5: call(early), 2: call(late)}, whole_view(1, 6, 6), hidden=x)
    method = VScan(Capacity(12), window=3)
    plan = method.plan(signals, tokens)
    rows, u = kept(plan)[0], F.normalize(x[0], dim=-1)
    groups = {i: [i] for i in rows}
    for j in set(range(36)) - set(rows):
        groups[max(rows, key=lambda i: float(u[i] @ u[j]))].append(j)
    want = torch.stack([x[0, groups[i]].mean(0) for i in rows])
    assert_close(method.rows(signals, plan)[0], want)
    assert plan.sizes(None).sum() == 36
    assert_close(plan.dense().sum(-1), torch.ones(1, 12))


def test_windows_end_at_a_tile():
    view = cut_view(3, (1, 1))
    early, late = torch.rand(1, 18) + 0.01, torch.rand(1, 18) + 0.01
    signals, tokens = shown({5: call(early), 2: call(late)}, view)
    rows = kept(VScan(Capacity(4), window=3, overall=0).plan(signals, tokens))[0]
    assert sum(i < 9 for i in rows) == 2
    assert len(rows) == 4


@pytest.mark.parametrize("budget", [KeepRatio(0.3), Capacity(14)])
def test_padding_changes_nothing(budget):
    lengths = [48, 30, 7, 1]
    calls = {5: call(torch.rand(4, 48) + 0.01), 2: call(torch.rand(4, 48) + 0.01)}
    signals, tokens = shown(calls, cut_view(4, (1, 2), r=4), lengths=lengths)
    method = VScan(budget, window=2)
    plan = method.plan(signals, tokens)
    rows, together = method.rows(signals, plan), kept(plan)
    for line, length in enumerate(lengths):
        one, only = part(signals, line, length)
        alone = method.plan(one, only)
        assert kept(alone) == [together[line]]
        assert_close(method.rows(one, alone)[0, : len(together[line])], rows[line, : len(together[line])])


def test_another_block_for_small_towers():
    early, late = torch.rand(1, 36) + 0.01, torch.rand(1, 36) + 0.01
    signals, tokens = shown({1: call(early), 2: call(late)}, whole_view(1, 6, 6))
    method = VScan(Capacity(16), window=3, shallow=1)
    assert method.looks_at == (1, None)
    assert method.plan(signals, tokens).m == 16


def test_bad_input():
    for bad in ({"window": 0}, {"overall": 1.5}, {"shallow": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            VScan(**bad)
