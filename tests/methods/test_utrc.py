"""UTRC: who goes and where to, by hand, against its slow twin, and padded; test_state_space.py runs it in Mamba."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from cases import batches, normal, padded, seeds, tied, tied_scores
from fewer.core import KeepRatio, Place, Remove, Signals, Tokens, match, naive
from fewer.core.errors import SignalError
from fewer.methods.language.utrc import UTRC


def guarding(n: int, batch: int, valid: torch.Tensor | None = None) -> Tokens:
    """Tokens whose last one stays, as in a decoder."""
    tokens = Tokens.plain(batch, n, valid=valid)
    return tokens.protect(tokens.last)


def test_by_hand() -> None:
    """Five tokens, the last stays. Importance 4 1 3 2: tokens 1 and 3 may go, into 0 or 2. Their cosines are .8 (3 to
    2) and .6 (1 to 0)."""
    metric = torch.tensor([[[1.0, 0, 0], [0.6, 0, 0.8], [0, 1, 0], [0, 0.8, 0.6], [0, 0, 1]]])
    scores = torch.tensor([[4.0, 1, 3, 2, 9]])
    tokens = guarding(5, 1)
    one = match.ranked_bipartite(scores, metric, Remove(1), tokens, at=Place())
    assert one.row.tolist() == [[0, 1, 2, 2, 3]]
    both = match.ranked_bipartite(scores, metric, Remove(2), tokens, at=Place())
    assert both.row.tolist() == [[0, 0, 1, 1, 2]]
    assert_close(both.reduce(metric)[0, 0], (metric[0, 0] + metric[0, 1]) / 2)
    half = match.ranked_bipartite(scores, metric, Remove(2), tokens, at=Place(), pruned=0.5)
    assert half.row.tolist() == [[0, 0, 1, -1, 2]]  # the most similar pair loses its token
    gone = match.ranked_bipartite(scores, metric, Remove(2), tokens, at=Place(), pruned=1.0)
    assert gone.row.tolist() == [[0, -1, 1, -1, 2]]


@given(seeds, st.sampled_from([2, 5, 8, 17]), batches, st.integers(0, 6), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_against_the_slow_twin(seed: int, n: int, batch: int, r: int, pruned: float) -> None:
    metric, scores = tied(seed, batch, n), tied_scores(seed + 1, batch, n)
    plan = match.ranked_bipartite(scores, metric, Remove(r), guarding(n, batch), at=Place(), pruned=pruned)
    most = min(r, (n - 1) // 2)
    for own, score, row in zip(metric.tolist(), scores.tolist(), plan.row.tolist(), strict=True):
        assert row == naive.ranked_bipartite(score, own, most, pruned, fixed=[n - 1])


@given(seeds, st.sampled_from([6, 9, 16]))
def test_padding_changes_no_plan(seed: int, n: int) -> None:
    lengths = [n, n - 2, n - 5]
    x, valid = padded([normal(seed + i, m, 4) for i, m in enumerate(lengths)], 3.0)
    scores, _ = padded([normal(seed + 9 + i, m) for i, m in enumerate(lengths)], 3.0)
    together = match.ranked_bipartite(scores, x, KeepRatio(0.7), guarding(n, 3, valid), at=Place(), pruned=0.5)
    rows = together.reduce(x)
    for i, m in enumerate(lengths):
        alone = match.ranked_bipartite(
            scores[i : i + 1, :m], x[i : i + 1, :m], KeepRatio(0.7), guarding(m, 1), at=Place(), pruned=0.5
        )
        length = alone.m if together.lengths is None else int(together.lengths[i])
        assert length == alone.m
        assert together.row[i, :m].tolist() == alone.row[0].tolist()
        assert_close(rows[i, :length], alone.reduce(x[i : i + 1, :m])[0])


@given(seeds, st.sampled_from([4, 7, 16, 33]), st.floats(0.5, 1.0))
def test_what_must_hold(seed: int, n: int, ratio: float) -> None:
    """q = 0 keeps all mass, tokens go into more important ones, rows ascend, the last token survives alone."""
    metric, scores = normal(seed, 2, n, 6), normal(seed + 1, 2, n)
    tokens = guarding(n, 2)
    plan = match.ranked_bipartite(scores, metric, KeepRatio(ratio), tokens, at=Place())
    assert bool((plan.row >= 0).all())
    size = plan.sizes(None)
    assert_close(size.sum(-1), torch.full((2,), float(n)))
    assert_close((plan.reduce(metric) * size[..., None]).sum(1), metric.sum(1), atol=1e-4, rtol=1e-4)
    assert bool((plan.anchor.diff() > 0).all())
    assert plan.row[:, -1].tolist() == [plan.m - 1] * 2
    assert int((plan.row == plan.m - 1).sum()) == 2
    for b in range(2):
        for i, row in enumerate(plan.row[b].tolist()):
            into = int(plan.anchor[b, row])
            assert into == i or scores[b, i] <= scores[b, into]


def signals(branch: torch.Tensor | None, hidden: torch.Tensor, tokens: Tokens) -> Signals:
    return Signals(hidden, tokens, Place(start=tokens.free_count), branch=branch)


def test_importance_is_the_mean_of_the_positive_part_of_the_mixer() -> None:
    branch = torch.tensor([[[3.0, -9], [-5, 1], [-1, -1], [2, 2], [0, 0]]])  # 1.5, 0.5, 0, 2, and the last
    hidden = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 1]]])
    tokens = guarding(5, 1)
    plan = UTRC(KeepRatio(0.5), pruned=0.0).plan(signals(branch, hidden, tokens), tokens)
    assert plan.row.tolist() == [[0, 0, 1, 1, 2]]  # 1 and 2 go, into 0 and 3
    with pytest.raises(SignalError, match="mixer"):
        UTRC().plan(signals(None, hidden, tokens), tokens)
    with pytest.raises(ValueError, match=r"pruned=1\.5"):
        UTRC(pruned=1.5)


def test_by_default_four_blocks_of_a_deep_model() -> None:
    assert UTRC().acts_at(64) == (20, 30, 40, 50)
    assert UTRC().acts_at(24) == (7, 11, 15, 18)
