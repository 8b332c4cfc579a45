"""Clusterings: equal to their slow twins, to the authors' partitions, and blind to padding."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import DTYPES, batches, dtypes, golden, lengths, normal, padded, partition, plain, prefixes, seeds, tied
from fewer.core import Capacity, Group, KeepRatio, Place, PlanError, Remove, Threshold, Tokens, cluster, naive

AT = Place()
linkages = st.sampled_from(cluster.LINKAGES)
FAST = {
    **{linkage: partial(cluster.agglomerative, linkage=linkage) for linkage in cluster.LINKAGES},
    "dpc_knn": cluster.dpc_knn, "kmeans": cluster.kmeans, "kmedoids": cluster.kmedoids, "kcentre": cluster.kcentre,
}  # fmt: skip
SLOW = {
    **{linkage: partial(naive.agglomerative, linkage=linkage) for linkage in cluster.LINKAGES},
    "dpc_knn": naive.dpc_knn, "kmeans": naive.kmeans, "kmedoids": naive.kmedoids, "kcentre": naive.kcentre,
}  # fmt: skip
# Means of equal distances or points are rounded; which of two nearly equal ones is smaller is then chance.
FEW = max(10, settings.default.max_examples // 2)  # of each of them
EXACT_ON_TIES = sorted(set(FAST) - {"average", "kmeans"})


def clusters(free: int, share: float) -> int:
    return max(1, round(free * share))


@pytest.mark.parametrize("name", sorted(FAST))
@settings(max_examples=FEW)
@given(seeds, batches, lengths, prefixes, st.floats(0.05, 1), dtypes)
def test_is_its_slow_twin(name, seed, b, n, prefix, share, dtype) -> None:
    prefix = min(prefix, n - 1)
    metric, k = normal(seed, b, n, 6, dtype=dtype), clusters(n - prefix, share)
    plan = FAST[name](metric, Capacity(k), plain(metric, prefix), at=AT)
    assert plan.m == prefix + k
    assert plan.row.tolist() == [SLOW[name](m, k, prefix=prefix) for m in metric.float().tolist()]


@pytest.mark.parametrize("name", EXACT_ON_TIES)
@settings(max_examples=FEW)
@given(seeds, batches, lengths, prefixes, st.floats(0.05, 1), dtypes)
def test_is_its_slow_twin_among_ties(name, seed, b, n, prefix, share, dtype) -> None:
    prefix = min(prefix, n - 1)
    metric, k = tied(seed, b, n, dtype), clusters(n - prefix, share)
    plan = FAST[name](metric, Capacity(k), plain(metric, prefix), at=AT)
    assert plan.row.tolist() == [SLOW[name](m, k, prefix=prefix) for m in metric.float().tolist()]


@pytest.mark.parametrize("linkage", cluster.LINKAGES)
def test_linkages_far_up_the_tree(linkage) -> None:
    """Few clusters of many tokens, where the size of a cluster decides what it is close to."""
    metric = normal(7, 8, 40, 3)
    plan = cluster.agglomerative(metric, Capacity(4), plain(metric, 0), at=AT, linkage=linkage)
    assert plan.row.tolist() == [naive.agglomerative(m, 4, linkage) for m in metric.tolist()]


@pytest.mark.parametrize("name", sorted(FAST))
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_full_length(name, dtype) -> None:
    metric = normal(2, 1, 197, 8, dtype=dtype)
    plan = FAST[name](metric, Capacity(137), plain(metric, 1), at=AT)
    assert plan.row.tolist() == [SLOW[name](metric[0].float().tolist(), 137, prefix=1)]


@given(seeds, st.integers(5, 33), st.floats(0.1, 0.9), st.sampled_from(["kmeans", "kmedoids"]))
def test_weights_of_the_means(seed, n, share, name) -> None:
    metric, weight = normal(seed, 2, n, 4), normal(seed + 1, 2, n).abs()
    k = clusters(n, share)
    plan = FAST[name](metric, Capacity(k), plain(metric, 0), at=AT, weight=weight)
    pairs = zip(metric.tolist(), weight.tolist(), strict=True)
    assert plan.row.tolist() == [SLOW[name](m, k, weight=w) for m, w in pairs]
    x = normal(seed + 2, 2, n, 3)
    for b in range(2):
        weights = naive.averages(plan.row[b].tolist(), weight[b].tolist())
        slow = torch.tensor(naive.reduce(plan.row[b].tolist(), weights, x[b].tolist(), k))
        torch.testing.assert_close(plan.reduce(x)[b], slow, atol=1e-5, rtol=1e-5)


@given(st.sampled_from(sorted(FAST)), seeds, st.lists(st.integers(3, 17), min_size=2, max_size=3), prefixes,
       st.sampled_from([Remove(3), Remove(40), KeepRatio(0.5), KeepRatio(0.7, of="start"), Capacity(4)]))  # fmt: skip
def test_padding_changes_nothing(name, seed, ns, prefix, budget) -> None:
    samples = [normal(seed + i, n, 5) for i, n in enumerate(ns)]
    metric, valid = padded(samples, float("nan"))
    at = Place(start=9)
    plan = FAST[name](metric, budget, Tokens.plain(len(ns), max(ns), prefix, valid=valid), at=at)
    x, _ = padded([s.cos() for s in samples], 7.0)
    y = plan.reduce(x)
    for i, n in enumerate(ns):
        alone = FAST[name](samples[i][None], budget, Tokens.plain(1, n, prefix), at=at)
        assert plan.row[i, :n].tolist() == alone.row[0].tolist()
        assert plan.lengths is not None
        assert plan.lengths[i].item() == alone.m
        torch.testing.assert_close(y[i, : alone.m], alone.reduce(samples[i][None].cos())[0])
        assert (plan.row[i, n:] == -1).all()
        assert (y[i, alone.m :] == 0).all()


@given(st.sampled_from(sorted(FAST)), seeds, st.integers(6, 16), prefixes)
def test_guarded_tokens_stay_alone(name, seed, n, prefix) -> None:
    metric = normal(seed, 2, n, 5)
    index = normal(seed, 2, n - prefix).argsort(-1)[:, :2] + prefix
    tokens = Tokens.plain(2, n, prefix).protect(Group(index=index))
    plan = FAST[name](metric, Capacity(2), tokens, at=AT)
    assert plan.m == prefix + 4
    size = plan.sizes(None).gather(-1, plan.row)
    assert (size[tokens.protected.expand(2, -1)] == 1).all()
    assert torch.equal(plan.sizes(None).sum(-1), torch.full((2,), float(n)))


@given(st.sampled_from(sorted(FAST)), seeds, st.integers(4, 20), st.floats(0.1, 0.9))
def test_rows_are_size_weighted_means_in_order_of_their_first_member(name, seed, n, share) -> None:
    metric, size = normal(seed, 2, n, 4), normal(seed, 2, n).abs() + 1
    tokens = plain(metric, 1, size)
    plan = FAST[name](metric, Capacity(clusters(n - 1, share)), tokens, at=AT)
    assert (plan.anchor.diff(dim=-1) > 0).all()
    x = normal(seed, 2, n, 3)
    mass = (plan.reduce(x) * plan.sizes(size)[..., None]).sum(1)
    torch.testing.assert_close(mass, (x * size[..., None]).sum(1), atol=1e-4, rtol=1e-4)


def test_five_angles_by_hand() -> None:
    """The example of the ATC sheet, where complete linkage differs from the others."""
    angle = torch.deg2rad(torch.tensor([0.0, 10, 25, 45, 66]))
    metric = torch.stack([angle.cos(), angle.sin()], -1)[None]
    rows = {
        linkage: cluster.agglomerative(metric, Capacity(2), plain(metric, 0), at=AT, linkage=linkage).row[0].tolist()
        for linkage in cluster.LINKAGES
    }
    assert rows == {"single": [0, 0, 0, 0, 1], "average": [0, 0, 0, 0, 1], "complete": [0, 0, 1, 1, 1]}


def test_clustering_of_the_authors() -> None:
    z, config = golden("atc_clustering")
    for case in config["cases"]:
        c, k = case["case"] + ".", case["num_clusters"]
        if case["case"] == "circle":
            metric = z["circle.metric"].reshape(1, -1, z["circle.metric"].shape[-1])
            for linkage in cluster.LINKAGES:
                plan = cluster.agglomerative(metric, Capacity(k), plain(metric, 0), at=AT, linkage=linkage)
                theirs = z[f"circle_{linkage}.labels"].flatten().tolist()
                assert partition(plan.row[0].tolist()) == partition(theirs)
            continue
        metric, x, size, prefix = z[c + "metric"], z[c + "x"], z[c + "size"][..., 0].float(), int(case["class_token"])
        for given_size, name in ((size, "wavg"), (None, "wavg_nosize")):
            tokens = plain(metric, prefix, given_size)
            plan = cluster.agglomerative(metric, Capacity(k), tokens, at=AT, linkage=case["linkage"])
            assert plan.m == case["n_out"]
            for b in range(metric.shape[0]):
                mine, theirs = plan.row[b].tolist(), z[c + "labels"][b].tolist()
                assert partition(mine[prefix:]) == partition(theirs[prefix:])
                where = [theirs[mine.index(r)] for r in range(plan.m)]  # their row of each of ours, by a member
                torch.testing.assert_close(plan.reduce(x)[b], z[c + f"{name}_x"][b, where], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(plan.sizes(given_size)[b], z[c + f"{name}_size"][b, where, 0].float())


@pytest.mark.parametrize("name", sorted(FAST))
def test_keeping_all_is_the_identity(name) -> None:
    metric = normal(0, 2, 9, 4)
    plan = FAST[name](metric, KeepRatio(1.0), plain(metric, 1), at=AT)
    x = normal(1, 2, 9, 3)
    assert torch.equal(plan.reduce(x), x)


@pytest.mark.parametrize("name", sorted(FAST))
def test_not_finite_tokens_do_not_spread(name) -> None:
    metric = normal(0, 1, 12, 4)
    metric[0, 3], metric[0, 7] = float("nan"), float("inf")
    plan = FAST[name](metric, Capacity(5), plain(metric, 0), at=AT)
    assert sorted(set(plan.row[0].tolist())) == [0, 1, 2, 3, 4]


def test_bad_input_is_named() -> None:
    metric = normal(0, 1, 9, 4)
    with pytest.raises(PlanError, match="linkage='ward' is unknown; choose one of average, single, complete"):
        cluster.agglomerative(metric, Capacity(3), plain(metric, 0), at=AT, linkage="ward")
    with pytest.raises(PlanError, match="neighbours=0"):
        cluster.dpc_knn(metric, Capacity(3), plain(metric, 0), at=AT, neighbours=0)
    with pytest.raises(PlanError, match=r"9 tokens \(shape \(1, 9, 4\)\), there are 8"):
        cluster.kcentre(metric, Capacity(3), Tokens.plain(1, 8), at=AT)
    with pytest.raises(ValueError, match="names no count"):
        cluster.kmeans(metric, Threshold(0.1), plain(metric, 0), at=AT)
