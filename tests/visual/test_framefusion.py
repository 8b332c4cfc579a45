"""FrameFusion: runs of frames merge, the cost is met, and what cannot merge is pruned."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from fewer.core import Place, attention
from fewer.methods.multimodal.framefusion import FrameFusion, chains, merged
from insides import inside, kept, with_visual


def video(frames=6, cells=4, lines=1, seed=0, still=True, noise=0.0, d=8):
    """Signals of videos whose frames are equal, or of noise."""
    n = frames * cells
    signals, tokens = inside((n,) * lines, seed=seed)
    view = signals.visual.view
    place = torch.arange(n).expand(lines, n)
    view = replace(view, time=place // cells, column=place % cells)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(lines, frames if not still else 1, cells, d, generator=g).expand(-1, frames, -1, -1).flatten(1, 2)
    x = x + noise * torch.randn(lines, n, d, generator=g)
    return replace(with_visual(signals, view=view), hidden=x), tokens


def counts_over(method, depth, signals, tokens, x_of=None):
    """Tokens that enter each layer, rows dropped as the plans say (one line)."""
    rows, counts = torch.arange(tokens.n), []
    visual, first, n = signals.visual, signals.hidden, tokens.n
    for layer in range(depth):
        counts.append(len(rows))
        if layer not in method.acts_at(depth):
            continue
        view = visual.view
        cut = {k: getattr(view, k)[:, rows] for k in ("index", "item", "tile", "time", "row", "column")}
        here = replace(
            with_visual(signals, view=replace(view, **cut)), hidden=first[:, rows],
            at=Place(layer, depth, layer, depth - 1, n),
        )  # fmt: skip
        plan = method.plan(here, replace(tokens, n=len(rows)))
        rows = rows[kept(plan)]
    return counts


def test_chains_follow_a_patch_through_time():
    signals, _ = video(frames=3, cells=2)
    order, linked = chains(signals.visual.view, torch.ones(1, 6, dtype=torch.bool))
    assert order.tolist() == [[0, 2, 4, 1, 3, 5]]
    assert linked.tolist() == [[False, True, True, False, True, True]]
    order, linked = chains(signals.visual.view, torch.tensor([[True, True, False, True, True, False]]))
    assert order.tolist() == [[0, 4, 1, 3, 2, 5]]
    assert linked.tolist() == [[False, True, False, True, False, False]]


def test_runs_become_means_in_the_first_ones_place():
    order = torch.tensor([[0, 2, 4, 1, 3, 5]])
    joined = torch.tensor([[False, True, True, False, False, True]])
    plan = merged(order, joined, torch.ones(1, 6, dtype=torch.bool), 6)
    x = torch.arange(6.0)[None, :, None]
    assert plan.lengths.tolist() == [3]
    assert plan.anchor[0, :3].tolist() == [0, 1, 3]
    assert_close(plan.reduce(x)[0, :3, 0], torch.tensor([2.0, 1.0, 4.0]))
    assert plan.sizes(None)[0].tolist()[:3] == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("cost", [0.3, 0.5, 0.7])
def test_a_still_video_meets_its_cost_by_merging_alone(cost):
    depth = 10
    signals, tokens = video(frames=16, cells=4)
    method = FrameFusion(replace(FrameFusion().budget, ratio=cost))
    counts = counts_over(method, depth, signals, tokens)
    assert sum(counts) / depth / 64 <= cost
    assert sum(counts) / depth / 64 > cost - 2 / 64  # floor of the budget, and of each layer's share
    assert len(set(counts)) == 2  # one cut, and it was enough


def test_the_first_frame_stays():
    signals, tokens = video(frames=16, cells=4)
    signals = replace(signals, at=Place(0, 10, 0, 9, 64))
    plan = FrameFusion().plan(signals, tokens)
    assert {0, 1, 2, 3} <= set(kept(plan))
    assert_close(plan.reduce(signals.hidden)[:, :4], signals.hidden[:, :4])  # all frames are the same
    assert plan.trimmed().m < 32


def test_what_cannot_merge_is_pruned_once_by_attention():
    signals, tokens = video(frames=12, cells=4, still=False, noise=1.0, seed=3, d=64)
    depth = 12
    method = FrameFusion(similarity=0.9)
    counts = counts_over(method, depth, signals, tokens)
    assert counts[0] == counts[1] == 48
    assert len(set(counts[2:])) == 1
    assert 0.3 - 1.5 / 48 < sum(counts) / depth / 48 <= 0.3
    full = attention.mass(signals.visual.seen).mean(1)
    received = signals.visual.view.of(full)[0]
    signals.memory.clear()
    first = replace(signals, at=Place(0, depth, 0, depth - 1, 48))
    assert method.plan(first, tokens).m == 48
    second = replace(first, at=Place(1, depth, 1, depth - 1, 48))
    plan = method.plan(second, tokens)
    want = received.topk(counts[2]).indices.sort().values.tolist()
    assert plan.anchor[0, : counts[2]].tolist() == want


def test_lines_go_their_own_way():
    still, tokens = video(frames=8, cells=4)
    moving, _ = video(frames=8, cells=4, still=False, noise=1.0, seed=0)
    both, two = video(frames=8, cells=4, lines=2)
    both = replace(both, hidden=torch.cat([still.hidden, moving.hidden]), at=Place(0, 8, 0, 7, 32))
    plan = FrameFusion().plan(both, two)
    for line, one in enumerate((still, moving)):
        single = FrameFusion().plan(replace(one, at=Place(0, 8, 0, 7, 32)), tokens)
        assert kept(plan, line) == kept(single)


def test_rows_that_left_are_gone_once_the_plan_is_trimmed():
    signals, tokens = video(frames=16, cells=4)
    signals = replace(signals, at=Place(0, 10, 0, 9, 64))
    hidden = FrameFusion().plan(signals, tokens)
    gone = hidden.trimmed()
    assert hidden.m == 64
    assert gone.lengths is None
    assert kept(hidden) == kept(gone)
    assert_close(hidden.reduce(signals.hidden)[:, : gone.m], gone.reduce(signals.hidden))


def test_parameters_are_checked():
    with pytest.raises(ValueError, match="similarity=2"):
        FrameFusion(similarity=2.0)
    with pytest.raises(ValueError, match="stop=-1"):
        FrameFusion(stop=-1.0)
    assert FrameFusion().acts_at(4) == (0, 1, 2)
