"""Attention statistics equal dense softmax without an N x N matrix; packed execution equals each sample alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cases import dtypes, golden, normal, seeds
from fewer.core import Group, Place, Seen, SignalError, Signals, Tokens, attention
from fewer.core.ragged import Packing

D = 4


def seen_of(
    seed: int, b: int, h: int, g: int, n: int, bias: str = "none", causal: bool = False, dtype=torch.float32
) -> Seen:
    q, k, v = normal(seed, b, h, n, D, dtype=dtype), *(normal(seed + i, b, g, n, D, dtype=dtype) for i in (1, 2))
    full = {
        "none": None,
        "keys": normal(seed + 3, b, 1, 1, n),
        "heads": normal(seed + 3, 1, h, n, n),
        "padding": torch.zeros(b, 1, 1, n).masked_fill(torch.arange(n) >= max(1, n - 2), -math.inf),
    }[bias]
    return Seen(q, k, v, 0.5, full, causal)


def dense(seen: Seen) -> Tensor:
    """(B, H, N, N): softmax of everything at once, in double precision."""
    h, n = seen.q.shape[1:3]
    k = seen.k.double().repeat_interleave(h // seen.k.shape[1], 1)
    logits = seen.q.double() @ k.transpose(-1, -2) * seen.scale
    if seen.bias is not None:
        logits = logits + seen.bias
    if seen.causal:
        logits = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
    return logits.softmax(-1)


calls = st.builds(
    seen_of, seeds, st.integers(1, 3), st.just(4), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 7, 16, 33]),
    st.sampled_from(["none", "keys", "heads", "padding"]), st.booleans(), dtypes,
)  # fmt: skip


@given(calls, st.integers(0, 3), st.integers(1, 4))
def test_rows_are_dense_softmax(seen, start, w) -> None:
    n = seen.q.shape[2]
    start = min(start, n - 1)
    group = Group(start, min(start + w, n))
    p = attention.rows(seen, group)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.double(), group.of(dense(seen)), atol=1e-5, rtol=1e-5)
    index = torch.stack([torch.randperm(n)[: min(w, n)] for _ in range(seen.q.shape[0])])
    picked = Group(index=index)
    torch.testing.assert_close(attention.rows(seen, picked).double(), picked.of(dense(seen)), atol=1e-5, rtol=1e-5)


@given(calls, st.sampled_from([1, 50, 1 << 22]), st.booleans())
def test_mass_is_the_column_sum(seen, chunk, weighted) -> None:
    b, _, n, _ = seen.q.shape
    before, attention.CHUNK = attention.CHUNK, chunk
    try:
        weight = normal(0, b, n).abs() if weighted else None
        p = dense(seen) if weight is None else dense(seen) * weight.double()[:, None, :, None]
        torch.testing.assert_close(attention.mass(seen, None, weight).double(), p.sum(2), atol=1e-4, rtol=1e-4)
        group = Group(n // 2, n)
        part = None if weight is None else weight[:, n // 2 :]
        torch.testing.assert_close(
            attention.mass(seen, group, part).double(), p[:, :, n // 2 :].sum(2), atol=1e-4, rtol=1e-4
        )
        index = Group(index=torch.arange(n // 2, n).expand(b, -1))
        torch.testing.assert_close(
            attention.mass(seen, index, part).double(), p[:, :, n // 2 :].sum(2), atol=1e-4, rtol=1e-4
        )
    finally:
        attention.CHUNK = before


@given(calls)
def test_a_call_restricted_to_some_positions(seen) -> None:
    b, _, n, _ = seen.q.shape
    index = torch.stack([torch.randperm(n)[: (n + 1) // 2].sort().values for _ in range(b)])
    part = seen.gathered(index)
    full = Seen(seen.q, seen.k, seen.v, seen.scale, seen.bias, seen.causal)
    hidden = torch.full((b, 1, 1, n), -math.inf).scatter(3, index[:, None, None], 0.0)
    full.bias = hidden if seen.bias is None else seen.bias + hidden
    group = Group(index=index)
    expected = group.of(group.of(dense(full)), -1)
    mine = attention.rows(part, Group(0, index.shape[1])).double()
    seen_any = expected.isfinite()  # a query that sees no kept key has no distribution
    torch.testing.assert_close(mine[seen_any], expected[seen_any], atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // max(1, t.element_size()))
        return out


def test_statistics_stay_linear_in_memory(monkeypatch) -> None:
    n = 512
    seen = seen_of(0, 1, 2, 2, n)
    monkeypatch.setattr(attention, "CHUNK", 16 * n)
    with Largest() as largest:
        attention.mass(seen)
        attention.rows(seen, Group(0, 1))
    assert largest.numbers <= 2 * 16 * n < n * n
    with Largest() as largest:  # the watchdog bites: this is what must not happen
        attention.rows(seen, Group(0, n))
    assert largest.numbers >= n * n


def test_queries_that_count_nothing_add_nothing() -> None:
    seen = seen_of(0, 1, 2, 2, 5)
    seen.bias = torch.zeros(1, 1, 5, 5)
    seen.bias[:, :, 0] = -math.inf  # the first query sees no key at all
    weight = torch.tensor([[0.0, 1, 1, 1, 1]])
    mass = attention.mass(seen, None, weight)
    torch.testing.assert_close(mass.sum(-1), torch.full((1, 2), 4.0))


def test_masked_softmax_of_the_authors() -> None:
    z, config = golden("dynamicvit_parts")
    for case in config["cases"]:
        c = case["case"] + "."
        if case.get("kind") == "predictor":
            continue
        logits, policy = z[c + "attn_logits"], z[c + "policy"][..., 0]
        b, h, n, _ = logits.shape
        none, v = torch.zeros(b, h, n, 1), torch.eye(n).expand(b, h, n, n)  # the identity shows the probabilities
        p = attention.masked_attention(none, none, v, 1.0, logits, policy, case["eps"])
        torch.testing.assert_close(p, z[c + "out"], atol=1e-5, rtol=1e-5)


@given(seeds, st.sampled_from([2, 7, 16]))
def test_masked_attention_of_all_is_attention(seed, n) -> None:
    seen = seen_of(seed, 2, 3, 3, n)
    policy = torch.ones(2, n, requires_grad=True)
    y = attention.masked_attention(seen.q, seen.k, seen.v, seen.scale, None, policy, 0.0)
    torch.testing.assert_close(y, attention.attend(seen.q, seen.k, seen.v, seen.scale), atol=1e-5, rtol=1e-5)
    y.square().sum().backward()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()


@given(seeds, st.sampled_from([2, 7, 16]))
def test_a_masked_token_is_seen_by_itself_only(seed, n) -> None:
    seen, policy = seen_of(seed, 1, 2, 2, n), torch.ones(1, n)
    policy[0, -1] = 0
    y = attention.masked_attention(seen.q, seen.k, seen.v, seen.scale, None, policy, 0.0)
    without = attention.attend(*(t[:, :, : n - 1] for t in (seen.q, seen.k, seen.v)), seen.scale)
    torch.testing.assert_close(y[:, :, : n - 1], without, atol=1e-5, rtol=1e-5)


@given(seeds, st.integers(1, 5), st.integers(2, 6))
def test_log_size_counts_a_token_several_times(seed, size, n) -> None:
    """Proportional attention over one token of size s is attention over s copies of it."""
    seen = seen_of(seed, 1, 2, 2, n)
    sizes = torch.ones(1, n)
    sizes[0, 0] = size
    y = attention.attend(seen.q, seen.k, seen.v, seen.scale, attention.size_bias(sizes, torch.float32))
    copies = torch.cat([torch.zeros(size, dtype=torch.long), torch.arange(1, n)])
    full = attention.attend(seen.q, seen.k[:, :, copies], seen.v[:, :, copies], seen.scale)
    torch.testing.assert_close(y, full, atol=1e-5, rtol=1e-5)


@given(seeds, st.lists(st.integers(1, 7), min_size=1, max_size=4), st.booleans(), st.sampled_from([1, 2, 4]))
def test_packed_attention_is_each_sample_alone(seed, ns, biased, g) -> None:
    b, width = len(ns), max(ns)
    packing = Packing(ns, width, torch.device("cpu"))
    x = normal(seed, b, width, 6)
    packed = packing.pack(x)
    assert packed.shape == (1, sum(ns), 6)
    back = packing.pad(packed)
    assert torch.equal(back, x * packing.valid[..., None])
    seen = seen_of(seed, b, 4, g, width)
    bias = normal(seed, b, 1, 1, width) if biased else None

    def lay(t: Tensor) -> Tensor:
        return torch.cat([t[i : i + 1, :, :n] for i, n in enumerate(ns)], 2)

    y = packing.attention(
        lay(seen.q), lay(seen.k), lay(seen.v), 0.5,
        None if bias is None else lay(bias.transpose(-1, -2)).transpose(-1, -2), 0.0,
    )  # fmt: skip
    wide = packing.pad(y)
    assert wide.shape == (b, 4, width, D)
    for i, n in enumerate(ns):
        one = (t[i : i + 1, :, :n] for t in (seen.q, seen.k, seen.v))
        alone = attention.attend(*one, 0.5, None if bias is None else bias[i : i + 1, ..., :n])
        torch.testing.assert_close(wide[i : i + 1, :, :n], alone)
        assert (wide[i, :, n:] == 0).all()


def test_signals_are_lazy_and_computed_once() -> None:
    spent: list[int] = []
    seen, tokens = seen_of(0, 2, 4, 2, 9), Tokens.plain(2, 9, 1)
    signals = Signals(normal(0, 2, 9, 6), tokens, Place(spend=spent.append), seen)
    torch.testing.assert_close(signals.key, seen.k.mean(1))
    assert spent == []
    first = signals.cls_attention
    assert signals.cls_attention is first
    assert spent == [2 * 4 * 9 * D]
    torch.testing.assert_close(first.double(), dense(seen)[:, :, 0].mean(1), atol=1e-5, rtol=1e-5)
    assert torch.equal(signals.saliency, first)
    headless = Signals(signals.hidden, Tokens.plain(2, 9, 0), Place(), seen)
    torch.testing.assert_close(headless.saliency.double(), dense(seen).sum(2).mean(1), atol=1e-4, rtol=1e-4)
    blind = Signals(signals.hidden, tokens, Place())
    with pytest.raises(SignalError, match="k is not known here"):
        _ = blind.key
    with pytest.raises(SignalError, match="no module 'predictor'"):
        blind.module("predictor")


def test_padding_queries_do_not_vote() -> None:
    seen = seen_of(0, 2, 4, 4, 9, bias="padding")
    valid = (torch.arange(9) < 7).expand(2, 9)
    tokens = Tokens.plain(2, 9, 0, valid=valid)
    mass = Signals(normal(0, 2, 9, 6), tokens, Place(), seen).attention_mass()
    short = Seen(seen.q[:, :, :7], seen.k[:, :, :7], seen.v[:, :, :7], seen.scale)
    torch.testing.assert_close(mass[..., :7], attention.mass(short), atol=1e-5, rtol=1e-5)
    assert (mass[..., 7:] == 0).all()
