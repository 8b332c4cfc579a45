"""Making and executing plans never waits for the device: no value is read back, no shape depends on one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cases import normal
from fewer.core import (
    Capacity,
    Hard,
    KeepRatio,
    Outliers,
    Place,
    Plan,
    Remove,
    Seen,
    Threshold,
    Tokens,
    attention,
    cluster,
    match,
    select,
)

AT = Place(start=16)
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "bincount")


class NoReading(TorchDispatchMode):
    """Raises where the host would have to wait: a value read back, or a shape made of values.

    Tensor.tolist and copies to the device pass unseen here; the test on a real device catches them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            t.dtype == torch.bool for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)
        )
        if name in READS or by_mask:
            raise AssertionError(f"{name} reads from the device")
        return func(*args, **(kwargs or {}))


GRID = {"grid": (4, 4)}
MAKERS: dict[str, Callable] = {
    "bipartite": match.bipartite,
    "bipartite in halves": partial(match.bipartite, order="halves"),
    "kth": partial(match.kth_bipartite, k=3),
    "random": match.random_bipartite,
    **{linkage: partial(cluster.agglomerative, linkage=linkage) for linkage in cluster.LINKAGES},
    "dpc_knn": cluster.dpc_knn,
    "kmeans": cluster.kmeans,
    "kmedoids": cluster.kmedoids,
    "kcentre": cluster.kcentre,
    "maxmin": select.maxmin,
    "maxmin of few": lambda m, b, t, at: select.maxmin(m, Capacity(3), t, at=at),
    "dpp": lambda m, b, t, at: select.dpp(m, m[..., 0].abs(), b, t, at=at),
    "top": lambda m, b, t, at: select.top(m[..., 0], b, t, at=at),
    "sampled": lambda m, b, t, at: select.sampled(m[..., 0].abs(), b, t, at=at),
    "sampled as the code": lambda m, b, t, at: select.sampled(m[..., 0].abs(), b, t, at=at, fidelity="code"),
    "stratified": lambda m, b, t, at: select.stratified(m[..., 0], b, t, at=at, **GRID),
    "threshold": lambda m, b, t, at: select.top(m[..., 0], Threshold(0.1), t, at=at),
    "outliers": lambda m, b, t, at: select.top(m[..., 0], Outliers(), t, at=at),
    "pairs above a threshold": lambda m, b, t, at: match.bipartite(m, Threshold(0.1), t, at=at),
    "fused": lambda m, b, t, at: select.top(m[..., 0], b, t, at=at).fuse_rest(m[..., 1], valid=t.valid),
}


def run(make: Callable, metric: torch.Tensor, tokens: Tokens, budget) -> None:
    plan: Hard = make(metric, budget, tokens, at=AT)
    y = plan.reduce(metric)
    after = tokens.after(plan)
    plan.restore(y)
    plan.as_mask().reduce(metric)
    plan.then(Plan.identity(plan.lead, plan.m, metric.device))
    match.bipartite(y, Remove(2), after, at=AT).norm_preserving().reduce(y)


def tokens_of(padded: bool, device: str = "cpu") -> Tokens:
    valid = torch.arange(17, device=device) < torch.tensor([17, 12], device=device)[:, None] if padded else None
    return Tokens.plain(2, 17, 1, valid=valid, size=torch.ones(2, 17, device=device), device=torch.device(device))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", [Remove(5), KeepRatio(0.6), Capacity(7)], ids=repr)
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_nothing_is_read_back(name, budget, padded) -> None:
    metric, tokens = normal(0, 2, 17, 6), tokens_of(padded)
    with NoReading():
        run(MAKERS[name], metric, tokens, budget)


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_device_agrees_and_is_never_waited_for(name, padded) -> None:
    metric = normal(0, 2, 17, 6)
    tokens, there, on_device = tokens_of(padded), metric.cuda(), tokens_of(padded, "cuda")
    run(MAKERS[name], there, on_device, Capacity(7))  # libraries may wait once, when they are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(MAKERS[name], there, on_device, Capacity(7))
        plan = None if name == "random" else MAKERS[name](there, Capacity(7), on_device, at=AT)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if plan is not None:
        assert plan.row.tolist() == MAKERS[name](metric, Capacity(7), tokens, at=AT).row.tolist()


def test_attention_statistics_read_nothing_back() -> None:
    q, k, v = (normal(i, 2, 4, 17, 8) for i in range(3))
    tokens = tokens_of(True)
    with NoReading():
        attention.mass(Seen(q, k, v, 0.3), None, tokens.valid.float())
        attention.rows(Seen(q, k, v, 0.3, causal=True), tokens.last)


@pytest.mark.parametrize("read", [
    lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any()), lambda x: x.nonzero(),
])  # fmt: skip
def test_the_watchdog_bites(read) -> None:
    with NoReading(), pytest.raises(AssertionError, match="reads from the device"):
        read(torch.ones(3))
