"""Matchers: equal to their slow twins, to the authors' numbers, and blind to padding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import DTYPES, batches, dtypes, golden, lengths, normal, padded, plain, prefixes, seeds, tied
from fewer.core import Capacity, Group, KeepRatio, Mass, Place, Plan, PlanError, Remove, Threshold, Tokens, match, naive

AT = Place()
kinds = st.sampled_from(["normal", "tied"])


def metric_of(kind: str, seed: int, b: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return tied(seed, b, n, dtype) if kind == "tied" else normal(seed, b, n, 6, dtype=dtype)


@given(kinds, seeds, batches, lengths, prefixes, st.integers(0, 20), dtypes)
def test_bipartite_is_its_slow_twin(kind, seed, b, n, prefix, r, dtype) -> None:
    prefix = min(prefix, n)
    metric = metric_of(kind, seed, b, n, dtype)
    plan = match.bipartite(metric, Remove(r), plain(metric, prefix), at=AT)
    assert plan.row.tolist() == [naive.bipartite(m, r, prefix) for m in metric.float().tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bipartite_at_full_length(dtype) -> None:
    metric = normal(1, 2, 197, 8, dtype=dtype)
    plan = match.bipartite(metric, Remove(40), plain(metric, 1), at=AT)
    assert plan.row.tolist() == [naive.bipartite(m, 40, 1) for m in metric.float().tolist()]


@given(kinds, seeds, batches, lengths, prefixes, st.integers(2, 5), st.sampled_from([None, 1, 4]))
def test_kth_bipartite_is_its_slow_twin(kind, seed, b, n, prefix, k, r) -> None:
    prefix = min(prefix, n)
    metric = metric_of(kind, seed, b, n)
    budget = None if r is None else Remove(r)
    plan = match.kth_bipartite(metric, budget, plain(metric, prefix), at=AT, k=k)
    assert plan.row.tolist() == [naive.kth_bipartite(m, k, r, prefix) for m in metric.tolist()]


@given(kinds, seeds, batches, lengths, prefixes, st.integers(0, 20))
def test_random_bipartite_is_its_slow_twin(kind, seed, b, n, prefix, r) -> None:
    prefix = min(prefix, n)
    metric = metric_of(kind, seed, b, n)
    order = normal(seed, b, n).argsort(-1)
    plan = match.random_bipartite(metric, Remove(r), plain(metric, prefix), at=AT, order=order)
    slow = [naive.random_bipartite(m, o, r, prefix) for m, o in zip(metric.tolist(), order.tolist(), strict=True)]
    assert plan.row.tolist() == slow


@given(kinds, seeds, batches, st.sampled_from([(4, 4), (5, 6), (7, 3)]), st.sampled_from([(2, 2), (2, 3)]), prefixes,
       st.integers(0, 40))  # fmt: skip
def test_grid_bipartite_is_its_slow_twin(kind, seed, b, grid, stride, prefix, r) -> None:
    metric = metric_of(kind, seed, b, grid[0] * grid[1] + prefix)
    windows = (grid[0] // stride[0], grid[1] // stride[1])
    choice = torch.randint(stride[0] * stride[1], windows, generator=torch.Generator().manual_seed(seed))
    plan = match.grid_bipartite(
        metric, Remove(r), plain(metric, prefix), at=AT, grid=grid, stride=stride, choice=choice
    )
    slow = [naive.grid_bipartite(m, r, grid, stride, choice.tolist(), prefix) for m in metric.tolist()]
    assert plan.row.tolist() == slow


def test_seven_tokens_by_hand() -> None:
    """The example of the ToMe sheet: two pairs merge, everything else stays."""
    angle = torch.deg2rad(torch.tensor([0.0, 10, 80, 85, 12, 170, 160]))
    metric = torch.stack([angle.cos(), angle.sin()], -1)[None]
    plan = match.bipartite(metric, Remove(2), plain(metric, 1), at=AT, order="halves")
    x = torch.arange(7.0)[None, :, None]
    assert plan.reduce(x)[0, :, 0].tolist() == [0, 6, 2.5, 2.5, 5]
    assert plan.sizes(None)[0].tolist() == [1, 1, 2, 2, 1]
    assert plan.restore(plan.reduce(x))[0, :, 0].tolist() == [0, 2.5, 2.5, 2.5, 2.5, 5, 6]


def _groups(origin: torch.Tensor) -> list[set[int]]:
    return [{i for i, o in enumerate(origin.tolist()) if o == r} for r in range(int(origin.max()) + 1)]


def _same_rows(plan: Plan, origin: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The same grouping, and the same features in each group, whatever the order of the rows."""
    for b in range(origin.shape[0]):
        mine, yours = _groups(plan.row[b]), _groups(origin[b])
        assert sorted(map(sorted, mine)) == sorted(map(sorted, yours))
        where = [yours.index(group) for group in mine]
        torch.testing.assert_close(ours[b], theirs[b, where], atol=1e-5, rtol=1e-5)


def test_matching_of_the_authors() -> None:
    z, config = golden("tome_matching")
    for case in config["cases"]:
        c, prefix = f"c{case['case']}.", case["class_token"] + case["distill_token"]
        metric, x, size = z[c + "metric"], z[c + "x"], z[c + "size"][..., 0].float()
        for given_size, name in ((None, "wavg_nosize"), (size, "wavg")):
            tokens = plain(metric, prefix, given_size)
            plan = match.bipartite(metric, Remove(case["r"]), tokens, at=AT)
            assert plan.m == case["n_out"]
            _same_rows(plan, z[c + "origin"], plan.reduce(x), z[c + f"{name}_x"])
            _same_rows(plan, z[c + "origin"], plan.sizes(given_size)[..., None], z[c + f"{name}_size"].float())
        plan = match.bipartite(metric, Remove(case["r"]), plain(metric, prefix), at=AT)
        if c + "unmerge_x" in z:
            torch.testing.assert_close(plan.restore(plan.reduce(x)), z[c + "unmerge_x"], atol=1e-5, rtol=1e-5)
        halves = match.bipartite(metric, Remove(case["r"]), plain(metric, prefix), at=AT,
                                 order="halves" if prefix else "ranked")  # fmt: skip
        if prefix < 2:  # their row order is ours, row by row
            torch.testing.assert_close(halves.reduce(x), z[c + "wavg_nosize_x"], atol=1e-5, rtol=1e-5)


def test_two_merges_of_the_authors() -> None:
    z, config = golden("tome_two_merges")
    for case in config["cases"]:
        c = f"c{case['case']}."
        x = z[c + "x"]
        tokens = plain(x, 1)
        first = match.bipartite(z[c + "metric1"], Remove(case["r1"]), tokens, at=AT, order="halves")
        after = tokens.after(first)
        second = match.bipartite(z[c + "metric2"], Remove(case["r2"]), after, at=AT, order="halves")
        torch.testing.assert_close(second.reduce(first.reduce(x)), z[c + "x2"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(after.after(second).size, z[c + "size2"][..., 0].float())
        assert torch.equal(first.then(second).row, z[c + "origin2"])


def test_variants_of_the_authors() -> None:
    z, config = golden("tome_variants")
    for case in config["cases"]:
        c = case["case"] + "."
        metric, x = z[c + "metric"], z[c + "x"]
        tokens = plain(metric, 0)
        if case["kind"] == "kth":
            plan = match.kth_bipartite(metric, None, tokens, at=AT, k=case["k"], fidelity="code")
            torch.testing.assert_close(plan.reduce(x), z[c + "merge_mean"], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(plan.sizes(None)[..., None], z[c + "count"].float())
            n = z[c + "unmerge"].shape[1]
            torch.testing.assert_close(plan.restore(plan.reduce(x))[:, :n], z[c + "unmerge"], atol=1e-5, rtol=1e-5)
            assert (plan.row[:, n:] == -1).all()
            kept = match.kth_bipartite(metric, None, tokens, at=AT, k=case["k"])
            assert kept.sizes(None).sum().item() == metric.shape[0] * case["N"]
        else:
            perm, r = z[c + "perm"], case["r"]
            plan = match.random_bipartite(metric, Remove(r), tokens, at=AT, order=perm)
            order = perm[:, r:].argsort(-1)  # their rows keep the drawn order, ours ascend
            theirs = z[c + "merge_mean"].gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
            torch.testing.assert_close(plan.reduce(x), theirs, atol=1e-5, rtol=1e-5)


def test_grid_matching_of_the_authors() -> None:
    z, config = golden("tomesd_random2d")
    for case in config["cases"]:
        c = f"c{case['case']}."
        metric, x = z[c + "metric"], z[c + "x"]
        plan = match.grid_bipartite(
            metric, Remove(case["r"]), plain(metric, 0), at=AT, grid=(case["h"], case["w"]),
            stride=(case["sy"], case["sx"]), choice=z[c + "window_choice"],
        )  # fmt: skip
        assert plan.m == case["n_out"]
        _same_rows(plan, z[c + "origin"], plan.reduce(x), z[c + "merge_mean"])
        assert torch.equal(plan.anchor, z[c + "anchor"].sort(-1).values)
        torch.testing.assert_close(plan.restore(plan.reduce(x)), z[c + "unmerge"], atol=1e-5, rtol=1e-5)


BUDGETS = [Remove(3), Remove(50), KeepRatio(0.6), KeepRatio(0.5, of="start"), Capacity(5), Threshold(0.3)]


@given(seeds, st.lists(st.integers(3, 17), min_size=2, max_size=3), st.sampled_from(BUDGETS), st.integers(0, 2),
       st.sampled_from(["bipartite", "kth", "random"]))  # fmt: skip
def test_padding_changes_nothing(seed, ns, budget, prefix, kind) -> None:
    samples = [normal(seed + i, n, 6) for i, n in enumerate(ns)]
    metric, valid = padded(samples, float("nan"))
    orders = [normal(seed - i, n).argsort() for i, n in enumerate(ns)]
    at = Place(start=9)

    def run(m: torch.Tensor, tokens: Tokens, order: torch.Tensor):
        if kind == "bipartite":
            return match.bipartite(m, budget, tokens, at=at)
        if kind == "kth":
            return match.kth_bipartite(m, budget, tokens, at=at, k=3)
        return match.random_bipartite(m, budget, tokens, at=at, order=order)

    full = torch.stack([torch.cat([o, torch.arange(len(o), max(ns))]) for o in orders])
    if kind == "random" and budget.adaptive:
        with pytest.raises(PlanError, match="names no count"):
            run(metric, Tokens.plain(len(ns), max(ns), prefix, valid=valid), full)
        return
    plan = run(metric, Tokens.plain(len(ns), max(ns), prefix, valid=valid), full)
    for i, n in enumerate(ns):
        alone = run(samples[i][None], Tokens.plain(1, n, prefix), orders[i][None])
        assert plan.row[i, :n].tolist() == alone.row[0].tolist()
        assert (plan.row[i, n:] == -1).all() or plan.length is None


@given(seeds, st.integers(5, 20), st.integers(0, 2), st.integers(1, 3), st.integers(0, 8))
def test_guarded_tokens_stay(seed, n, prefix, w, r) -> None:
    metric = tied(seed, 2, n)
    index = normal(seed, 2, n - prefix).argsort(-1)[:, :w] + prefix
    tokens = Tokens.plain(2, n, prefix).protect(Group(index=index))
    for plan in (
        match.bipartite(metric, Remove(r), tokens, at=AT),
        match.kth_bipartite(metric, Remove(r), tokens, at=AT, k=2),
        match.random_bipartite(metric, Remove(r), tokens, at=AT, generator=torch.Generator().manual_seed(seed)),
    ):
        size = torch.where(plan.row < 0, -1, plan.sizes(None).gather(-1, plan.row.clamp(min=0)))
        assert (size[tokens.protected.expand(2, -1)] == 1).all()
        assert torch.equal(plan.sizes(None).sum(-1), torch.full((2,), float(n)))
    if r <= (n - prefix - w) // 2:
        assert match.bipartite(metric, Remove(r), tokens, at=AT).m == n - r


@given(seeds, st.integers(2, 33))
def test_threshold_merges_the_pairs_above_it(seed, n) -> None:
    metric = normal(seed, 2, n, 4)
    plan = match.bipartite(metric, Threshold(0.5), plain(metric, 1), at=AT)
    for b in range(2):
        m = metric[b].tolist()
        best = [max((naive.cosine(m[i], m[j]) for j in range(1, n, 2)), default=-2) for i in range(2, n, 2)]
        assert plan.lengths[b].item() == n - sum(v >= 0.5 for v in best) if n > 2 else plan.m == n


@pytest.mark.parametrize("kind", ["normal", "tied"])
def test_not_finite_tokens_do_not_spread(kind) -> None:
    metric = metric_of(kind, 3, 1, 16)
    metric[0, 5], metric[0, 8] = math.nan, math.inf
    plan = match.bipartite(metric, Remove(6), plain(metric, 1), at=AT)
    assert plan.m == 10
    clean = metric.nan_to_num(0, 0, 0)
    assert torch.equal(plan.row, match.bipartite(clean, Remove(6), plain(metric, 1), at=AT).row)


def test_chunks_change_nothing(monkeypatch) -> None:
    metric = normal(5, 2, 33, 6)
    whole = match.bipartite(metric, Remove(9), plain(metric, 1), at=AT).row
    monkeypatch.setattr(match, "CHUNK", 40)
    assert torch.equal(match.bipartite(metric, Remove(9), plain(metric, 1), at=AT).row, whole)


@settings(max_examples=10)
@given(seeds)
def test_generators_are_respected(seed) -> None:
    metric = normal(seed, 2, 16, 6)

    def rows(s: int) -> list:
        g = torch.Generator().manual_seed(s)
        a = match.random_bipartite(metric, Remove(5), plain(metric, 0), at=AT, generator=g)
        b = match.grid_bipartite(metric, Remove(5), plain(metric, 0), at=AT, grid=(4, 4), generator=g)
        return [a.row.tolist(), b.row.tolist()]

    assert rows(seed) == rows(seed)


def test_requests_cut_short_are_noted() -> None:
    said: list[str] = []
    metric = normal(0, 1, 9, 4)
    match.bipartite(metric, Remove(7), plain(metric, 1), at=Place(layer=3, note=said.append))
    assert said == ["layer 3: asked to remove 7 of 8 tokens, this matching takes at most 4"]


def test_bad_input_is_named() -> None:
    metric = normal(0, 1, 9, 4)
    with pytest.raises(PlanError, match=r"9 tokens \(shape \(1, 9, 4\)\), there are 8"):
        match.bipartite(metric, Remove(2), Tokens.plain(1, 8), at=AT)
    with pytest.raises(PlanError, match="k=1"):
        match.kth_bipartite(metric, None, plain(metric, 0), at=AT, k=1)
    with pytest.raises(PlanError, match="fidelity='paper'"):
        match.kth_bipartite(metric, None, plain(metric, 1), at=AT, k=2, fidelity="code")
    with pytest.raises(PlanError, match="4 x 4 grid, 16 tokens; 9 are free"):
        match.grid_bipartite(metric, Remove(2), plain(metric, 0), at=AT, grid=(4, 4))
    with pytest.raises(PlanError, match="windows of 4 x 2"):
        match.grid_bipartite(metric, Remove(2), plain(metric, 0), at=AT, grid=(3, 3), stride=(4, 2))
    with pytest.raises(PlanError, match="the grid has 1 x 1 windows"):
        match.grid_bipartite(metric, Remove(2), plain(metric, 0), at=AT, grid=(3, 3), choice=torch.zeros(2, 2).long())
    with pytest.raises(PlanError, match="names no count"):
        match.bipartite(metric, Mass(0.5), plain(metric, 0), at=AT)
