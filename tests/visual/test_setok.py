"""SeTok: planted things are found, each becomes a row, and nothing depends on order or padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fewer
from clips import CHANNELS, clip, made, with_features
from fewer.core import Signals, cluster
from fewer.methods.multimodal.setok import SeTok


def blobs(*counts: int, seed: int = 0, spread: float = 0.05) -> tuple[Tensor, Tensor]:
    """Tokens around as many far points, in random order, and whose they are. (N, C), (N,)."""
    draw = torch.Generator().manual_seed(seed)
    middle = torch.randn(len(counts), CHANNELS, generator=draw)
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    owner = owner[torch.randperm(len(owner), generator=draw)]
    return middle[owner] + spread * torch.randn(len(owner), CHANNELS, generator=draw), owner


def planted(method: SeTok | None = None) -> tuple[Signals, Tensor]:
    """Two pictures of 6 x 6 tokens: one with three things, one with two."""
    first, second = blobs(10, 14, 12), blobs(20, 16, seed=1)
    signals = clip(1, 6, 6, method=method)
    return with_features(signals, torch.stack([first[0], second[0]])), torch.stack([first[1], second[1]])


@pytest.mark.parametrize("form", ["setok:neighbours=8", "setok:neighbours=8,trained=true", "setok:quantile=0.9"])
def test_planted_blobs_are_found(form: str):
    method = fewer.parse(form)
    signals, owner = planted(method)
    plan = method.plan(signals, signals.tokens)
    if method.quantile is None:
        assert plan.lengths.tolist() == [3, 2]
        for r in range(2):  # tokens share a row exactly where they share a thing
            same = plan.row[r][:, None] == plan.row[r][None]
            assert torch.equal(same, owner[r][:, None] == owner[r][None])
    else:
        assert plan.lengths.tolist() == [4, 4]  # above the 0.9 quantile of 36 scores
    assert (plan.row >= 0).all()
    assert_close(plan.sizes(None).sum(-1), torch.full((2,), 36.0))
    rows = method.rows(signals, plan)
    assert rows.shape == (2, plan.m, 8)
    assert (rows[1, int(plan.lengths[1]) :] == 0).all()


def test_rows_are_plain_means_without_training():
    method = SeTok(neighbours=8)
    signals, owner = planted()
    rows = made(method, signals)
    first = list(dict.fromkeys(owner[0].tolist()))  # in order of their first token
    expected = torch.stack([signals.hidden[0, owner[0] == k].mean(0) for k in first])
    assert_close(rows[0, :3], expected)


def test_the_tokenizer_against_one_cluster_at_a_time():
    method = SeTok(neighbours=8, trained=True)
    signals, owner = planted(method)
    net = signals.modules["merger"]
    plan = method.plan(signals, signals.tokens)
    place = torch.randn(2, 36, CHANNELS)
    found = net(signals.visual.features, place, plan)
    tokens = []
    for k in dict.fromkeys(owner[0].tolist()):
        x = (signals.visual.features + place)[:1, owner[0] == k]
        for block in net.within:
            x = block(x)
        tokens.append(x.mean(1))
    y = torch.stack(tokens, 1)
    for block in net.between:
        y = block(y)
    assert_close(found[0, :3], net.leave(y)[0], atol=1e-5, rtol=1e-5)


def test_another_order_gives_the_same_clusters():
    method = SeTok(neighbours=8, threshold=0.34)
    signals = clip(1, 6, 6)
    order = torch.randperm(36)
    features = signals.visual.features
    there = method.plan(with_features(signals, features[:, order]), signals.tokens)
    here = method.plan(signals, signals.tokens)
    assert torch.equal(here.lengths, there.lengths)
    assert 3 < here.lengths.min() < 36
    moved = here.row[:, order]
    for r in range(2):
        assert torch.equal(moved[r][:, None] == moved[r][None], there.row[r][:, None] == there.row[r][None])


@pytest.mark.parametrize(
    "form", ["setok:threshold=0.145", "setok:quantile=0.7", "setok:trained=true,threshold=0.14", "setok:tokens=5"]
)
def test_padding_and_company_change_nothing(form: str):
    method = fewer.parse(form)
    both = clip((1, 2), method=method)
    plan = method.plan(both, both.tokens)
    assert (plan.row[0, 16:] < 0).all()
    rows = method.rows(both, plan)
    alone = with_features(clip(1, lines=1, method=method), both.visual.features[:1, :16])
    alone.hidden = both.hidden[:1, :16]
    single = method.plan(alone, alone.tokens)
    count = int(plan.lengths[0])
    assert count == (single.m if single.lengths is None else int(single.lengths[0]))
    assert 3 < count < 16
    assert torch.equal(single.row[0], plan.row[0, :16])
    assert_close(method.rows(alone, single)[0, :count], rows[0, :count], atol=1e-5, rtol=1e-5)


def test_a_count_is_met_and_is_what_density_peaks_gives():
    signals = clip(1, 6, 6)
    plan = fewer.parse("setok:tokens=7,normalise=false,neighbours=5").plan(signals, signals.tokens)
    expected = cluster.dpc_knn(signals.visual.features, fewer.Capacity(7), signals.tokens, at=signals.at)
    assert plan.m == 7
    assert torch.equal(plan.row, expected.row)
    everything = fewer.parse("setok:tokens=36").plan(signals, signals.tokens)
    assert torch.equal(everything.reduce(signals.hidden), signals.hidden)


def test_scores_are_density_times_separation():
    x = torch.randn(1, 9, CHANNELS)
    d = torch.cdist(x, x).square() / CHANNELS
    density = [(-d[0, i].sort().values[:4].mean()).exp() for i in range(9)]
    far = [
        min([d[0, i, j].sqrt() for j in range(9) if density[j] > density[i]], default=d.max().sqrt()) for i in range(9)
    ]
    assert_close(
        cluster.peaks(cluster.Distances(x, scale=CHANNELS), 4)[0],
        torch.tensor([a * b for a, b in zip(density, far, strict=True)]),
    )


def test_nothing_stands_out_or_everything_is_alike():
    signals = clip(1, 6, 6)
    none = SeTok(threshold=9.0, fallback=5).plan(signals, signals.tokens)
    assert none.lengths.tolist() == [5, 5]
    alike = with_features(signals, torch.ones(2, 36, CHANNELS))
    rows = made(SeTok(fallback=4), alike)
    assert rows.isfinite().all()


def test_the_scale_of_features_does_not_matter_unless_asked():
    signals = clip(1, 6, 6)
    larger = with_features(signals, 7 * signals.visual.features)
    assert torch.equal(*(SeTok(threshold=0.13).plan(s, s.tokens).row for s in (signals, larger)))
    raw = SeTok(threshold=0.13, normalise=False)
    assert not torch.equal(*(raw.plan(s, s.tokens).row for s in (signals, larger)))


def test_everything_learns_and_bad_values_are_refused():
    method = SeTok(trained=True, neighbours=8, threshold=0.34)
    signals = clip(1, 6, 6, method=method)
    made(method, signals).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in signals.modules.parameters())
    with pytest.raises(ValueError, match="quantile=1"):
        SeTok(quantile=1.0)
    with pytest.raises(ValueError, match="neighbours=0"):
        SeTok(neighbours=0)
