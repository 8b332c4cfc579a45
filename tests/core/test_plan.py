"""The laws of plans: what every form of them must obey, checked against the dense matrix and the slow twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cases import batches, normal, seeds
from fewer.core import Group, Hard, Plan, PlanError, Soft, Tokens, naive

LENGTHS = st.sampled_from((1, 2, 7, 16, 33))
C = 3


def integers(seed: int, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(low, max(high, low + 1), shape, generator=torch.Generator().manual_seed(seed))


def order(seed: int, lead: tuple[int, ...], n: int) -> Tensor:
    return normal(seed, *lead, n).argsort(-1)


def make(kind: str, seed: int, lead: tuple[int, ...], n: int) -> Hard | Soft:
    """A plan of each kind over (*lead, n)."""
    m = 1 + seed % n
    picked = order(seed, lead, n)[..., :m].sort(-1).values
    lengths = integers(seed, 1, m + 1, lead)
    size, weight = normal(seed, *lead, n).abs() + 0.5, normal(seed + 1, *lead, n)
    if kind == "identity":
        return Plan.identity(lead, n)
    if kind == "keep":
        return Plan.keep(picked, n)
    if kind == "ragged keep":
        return Plan.keep(picked, n, lengths)
    if kind in ("merge", "mlerp"):
        r = seed % (n // 2 + 1)
        mixed = order(seed, lead, n)
        into = mixed[..., r:].gather(-1, integers(seed, 0, n - r, (*lead, r)))
        plan = Plan.merge(mixed[..., :r], into, n, size)
        return plan.norm_preserving() if kind == "mlerp" else plan
    if kind in ("rows", "weighted rows"):
        row = torch.cat([torch.arange(m).expand(*lead, m), integers(seed, -1, m, (*lead, n - m))], -1)
        row = row.gather(-1, order(seed, lead, n))
        return Plan.from_rows(row, m, weight=weight if kind == "weighted rows" else None, size=size)
    if kind == "ragged rows":
        row = torch.cat([torch.arange(m).expand(*lead, m), integers(seed, -1, m, (*lead, n - m))], -1)
        row = row.masked_fill(row >= lengths[..., None], -1).gather(-1, order(seed, lead, n))
        return Plan.from_rows(row, m, size=size, lengths=lengths)
    if kind == "fused":
        return Plan.keep(picked, n).fuse_rest(weight)
    if kind == "fused in front":
        return Plan.keep(picked, n).fuse_rest(weight.abs(), normalise=True, protect=True, prefix=min(1, m))
    if kind == "ragged fused":
        return Plan.keep(picked, n, lengths).fuse_rest(weight)
    assert kind == "soft"
    return Plan.soft(normal(seed, *lead, m, n).softmax(-1))


def follow(kind: str, seed: int, first: Plan) -> Hard | Soft:
    """A plan of each kind over the rows of another one; behind a ragged plan one that drops the padding."""
    if first.lengths is None or kind == "identity":
        return make(kind, seed, first.lead, first.m)
    lengths = first.lengths.flatten().tolist()
    counts = [1 + (seed + i) % n for i, n in enumerate(lengths)]
    row = torch.full((len(lengths), first.m), -1)
    for i, (n, m) in enumerate(zip(lengths, counts, strict=True)):
        more = integers(seed + i, -1, m, (n - m,)) if "rows" in kind or kind == "merge" else torch.full((n - m,), -1)
        row[i, :n] = torch.cat([torch.arange(m), more])[order(seed + i, (), n)]
    return Plan.from_rows(row.view(*first.lead, -1), max(counts), lengths=torch.tensor(counts).view(first.lead))


LINEAR = ["identity", "keep", "ragged keep", "merge", "rows", "weighted rows", "ragged rows", "fused", "fused in front",
          "ragged fused", "soft"]  # fmt: skip
HARD = [k for k in LINEAR if k != "soft"]
linear, hard = st.sampled_from(LINEAR), st.sampled_from(HARD)
leads = st.one_of(st.tuples(st.integers(1, 3)), st.tuples(st.integers(1, 2), st.integers(1, 3)))


@given(linear, seeds, leads, LENGTHS)
def test_the_dense_matrix_is_the_definition(kind, seed, lead, n) -> None:
    plan, x = make(kind, seed, lead, n), normal(seed, *lead, n, C)
    assert plan.dense().shape == (*lead, plan.m, n)
    torch.testing.assert_close(plan.reduce(x), plan.dense() @ x, atol=1e-5, rtol=1e-5)


@given(linear, linear, seeds, leads, LENGTHS)
def test_composition_is_a_product(first, second, seed, lead, n) -> None:
    a = make(first, seed, lead, n)
    b = follow(second, seed + 1, a)
    both = a.then(b)
    torch.testing.assert_close(both.dense(), b.dense() @ a.dense(), atol=1e-5, rtol=1e-5)
    x = normal(seed, *lead, n, C)
    torch.testing.assert_close(both.reduce(x), b.reduce(a.reduce(x)), atol=1e-4, rtol=1e-4)


@given(hard, hard, hard, seeds, leads, LENGTHS)
def test_composition_is_associative(one, two, three, seed, lead, n) -> None:
    a = make(one, seed, lead, n)
    b = follow(two, seed + 1, a)
    c = follow(three, seed + 2, a.then(b))
    left, right = a.then(b).then(c), a.then(b.then(c))
    assert torch.equal(left.row, right.row)
    torch.testing.assert_close(left.dense(), right.dense(), atol=1e-5, rtol=1e-5)


@given(hard, hard, seeds, leads, LENGTHS)
def test_sizes_and_rows_compose(first, second, seed, lead, n) -> None:
    a = make(first, seed, lead, n)
    b = follow(second, seed + 1, a)
    size = normal(seed, *lead, n).abs()
    torch.testing.assert_close(a.then(b).sizes(size), b.sizes(a.sizes(size)), atol=1e-5, rtol=1e-5)
    via = a.row
    row = torch.where(via < 0, -1, b.row.gather(-1, via.clamp(min=0)))
    assert torch.equal(a.then(b).row, row)
    assert a.then(b).front == a.front + b.front


@given(st.sampled_from(["keep", "merge", "rows", "weighted rows"]), st.sampled_from(["keep", "merge", "rows"]), seeds,
       batches, LENGTHS)  # fmt: skip
def test_is_its_slow_twin(first, second, seed, b, n) -> None:
    one = make(first, seed, (b,), n)
    two = make(second, seed + 1, (b,), one.m)
    x, size = normal(seed, b, n, C), normal(seed, b, n).abs()
    for i in range(b):
        row, weight, xs = one.row[i].tolist(), one.weight[i].tolist(), x[i].tolist()
        y = naive.reduce(row, weight, xs, one.m)
        torch.testing.assert_close(one.reduce(x)[i], torch.tensor(y), atol=1e-5, rtol=1e-5)
        slow = torch.tensor(naive.restore(row, y, fill=-2.0))
        torch.testing.assert_close(one.restore(one.reduce(x), fill=-2.0)[i], slow, atol=1e-5, rtol=1e-5)
        slow = torch.tensor(naive.sizes(row, size[i].tolist(), one.m))
        torch.testing.assert_close(one.sizes(size)[i], slow, atol=1e-5, rtol=1e-5)
        rows, weights = naive.then(row, weight, two.row[i].tolist(), two.weight[i].tolist())
        assert one.then(two).row[i].tolist() == rows
        torch.testing.assert_close(one.then(two).weight[i], torch.tensor(weights), atol=1e-5, rtol=1e-5)


@given(seeds, batches, LENGTHS)
def test_norm_preserving_rows_are_their_slow_twin(seed, b, n) -> None:
    plan, x = make("mlerp", seed, (b,), n), normal(seed, b, n, C)
    size = normal(seed, b, n).abs() + 0.5
    y = plan.reduce(x)
    for i in range(b):
        for r in range(plan.m):
            members = [j for j, own in enumerate(plan.row[i].tolist()) if own == r]
            slow = torch.tensor(naive.mlerp([x[i, j].tolist() for j in members], [size[i, j].item() for j in members]))
            torch.testing.assert_close(y[i, r], slow, atol=1e-4, rtol=1e-4)


def test_norm_preserving_by_hand() -> None:
    """(3, 0) and (0, 1) become their mean at length 3; opposite tokens, whose mean is nothing, the one that stays."""
    plan = Plan.merge(torch.tensor([[1]]), torch.tensor([[0]]), 2).norm_preserving()
    y = plan.reduce(torch.tensor([[[3.0, 0], [0, 1]]]))
    torch.testing.assert_close(y, torch.tensor([[[2.846, 0.949]]]), atol=1e-3, rtol=0)
    x = torch.tensor([[[1.0, 0], [-2, 0]]]).requires_grad_()
    size = torch.tensor([[2.0, 1.0]])
    plan = Plan.merge(torch.tensor([[1]]), torch.tensor([[0]]), 2, size).norm_preserving()
    y = plan.reduce(x)
    torch.testing.assert_close(y, torch.tensor([[[2.0, 0]]]))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@given(hard, seeds, leads, LENGTHS)
def test_no_token_counts_twice_and_none_appears(kind, seed, lead, n) -> None:
    plan = make(kind, seed, lead, n)
    size = normal(seed, *lead, n).abs()
    kept = (plan.row >= 0).float()
    torch.testing.assert_close(plan.sizes(size).sum(-1), (size * kept).sum(-1), atol=1e-4, rtol=1e-4)
    assert plan.row.max() < plan.m
    valid = torch.ones(*lead, plan.m, dtype=torch.bool) if plan.valid is None else plan.valid
    member = torch.zeros(*lead, plan.m + 1).scatter_add(-1, torch.where(plan.row < 0, plan.m, plan.row), kept)
    assert ((member[..., :-1] > 0) == valid).all()
    anchored = plan.row.gather(-1, plan.anchor)
    assert ((anchored == torch.arange(plan.m)) | ~valid).all()


@given(st.sampled_from(["merge", "rows"]), seeds, leads, LENGTHS)
def test_averages_keep_the_weighted_sum(kind, seed, lead, n) -> None:
    plan, x = make(kind, seed, lead, n), normal(seed, *lead, n, C)
    size = normal(seed, *lead, n).abs() + 0.5  # the sizes that make() averages with
    kept = (plan.row >= 0)[..., None]
    after = (plan.reduce(x) * plan.sizes(size)[..., None]).sum(-2)
    torch.testing.assert_close(after, (x * size[..., None] * kept).sum(-2), atol=1e-4, rtol=1e-4)


@given(hard, seeds, leads, LENGTHS)
def test_restore_has_the_shape_and_order_of_the_input(kind, seed, lead, n) -> None:
    plan = make(kind, seed, lead, n)
    y = normal(seed, *lead, plan.m, C)
    x = plan.restore(y, fill=9.0)
    assert x.shape == (*lead, n, C)
    row = plan.row
    expected = y.gather(-2, row.clamp(min=0)[..., None].expand(*row.shape, C))
    torch.testing.assert_close(x, torch.where((row < 0)[..., None], 9.0, expected))
    if kind in ("keep", "identity"):
        z = normal(seed, *lead, n, C)
        back = plan.restore(plan.reduce(z))
        assert torch.equal(back[row >= 0], z[row >= 0])


@given(hard, seeds, leads, LENGTHS)
def test_the_mask_is_the_plan_on_the_rows_it_keeps(kind, seed, lead, n) -> None:
    plan, x = make(kind, seed, lead, n), normal(seed, *lead, n, C)
    mask = plan.as_mask()
    assert mask.m == n
    y, z = plan.reduce(x), mask.reduce(x)
    valid = torch.ones(*lead, plan.m, dtype=torch.bool) if plan.valid is None else plan.valid
    at_anchor = z.gather(-2, plan.anchor[..., None].expand(*plan.anchor.shape, C))
    torch.testing.assert_close(at_anchor[valid], y[valid])
    assert torch.equal(mask.policy.sum(-1), valid.sum(-1).float())
    assert (mask.policy.gather(-1, plan.anchor)[valid] == 1).all()
    torch.testing.assert_close(mask.dense() @ x, z, atol=1e-5, rtol=1e-5)
    sizes = mask.sizes(None).gather(-1, plan.anchor)
    torch.testing.assert_close(sizes[valid], plan.sizes(None)[valid])
    rest = mask.policy == 0  # what is masked is left as it was
    assert torch.equal(z[rest], x[rest])


@given(hard, hard, seeds, st.integers(1, 4), LENGTHS)
def test_where_picks_a_plan_per_sample(one, two, seed, b, n) -> None:
    a, c = make(one, seed, (b,), n), make(two, seed, (b,), n)
    pick = integers(seed, 0, 2, (b,)).bool()
    ragged = a.lengths is not None or c.lengths is not None
    if (a.m != c.m and not ragged) or a.front != c.front:
        with pytest.raises(PlanError, match=r"Plan\.where needs"):
            Plan.where(pick, a, c)
        return
    both, x, size = Plan.where(pick, a, c), normal(seed, b, n, C), normal(seed, b, n).abs()
    for i in range(b):
        chosen = a if pick[i] else c
        m = chosen.m
        torch.testing.assert_close(both.reduce(x)[i, :m], chosen.reduce(x)[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(both.sizes(size)[i, :m], chosen.sizes(size)[i], atol=1e-5, rtol=1e-5)
        assert (both.reduce(x)[i, m:] == 0).all()
        assert torch.equal(both.row[i], chosen.row[i])
    assert (both.lengths is not None) == ragged


@given(st.sampled_from([*HARD, "mlerp"]), seeds, leads, LENGTHS)
def test_rows_in_another_order(kind, seed, lead, n) -> None:
    plan, x = make(kind, seed, lead, n), normal(seed, *lead, n, C)
    if plan.length is not None:
        return
    new = order(seed, lead, plan.m)
    y = plan.reduce(x).gather(-2, new[..., None].expand(*new.shape, C))
    torch.testing.assert_close(plan.arranged(new).reduce(x), y)


@given(linear, seeds, leads, LENGTHS)
def test_gather_takes_the_anchor(kind, seed, lead, n) -> None:
    plan = make(kind, seed, lead, n)
    where = torch.arange(n).expand(*lead, n)
    assert torch.equal(plan.gather(where), plan.position)
    assert torch.equal(plan.gather(where[..., None].float())[..., 0].long(), plan.position)


@given(seeds, batches, st.sampled_from((2, 7, 16)), st.booleans())
def test_fused_rest_is_the_weighted_sum(seed, b, n, normalise) -> None:
    keep = 1 + seed % (n - 1)
    picked = order(seed, (b,), n)[:, :keep].sort(-1).values
    x, a = normal(seed, b, n, C), normal(seed, b, n).abs()
    gone = torch.ones(b, n).scatter(1, picked, 0)
    w = a * gone / ((a * gone).sum(-1, keepdim=True) if normalise else 1)
    rest = (w[..., None] * x).sum(1)
    for prefix in (None, 1):
        plan = Plan.keep(picked, n).fuse_rest(a, normalise=normalise, protect=prefix is not None, prefix=prefix or 0)
        at = keep if prefix is None else prefix
        torch.testing.assert_close(plan.reduce(x)[:, at], rest, atol=1e-5, rtol=1e-5)
        others = torch.cat([plan.reduce(x)[:, :at], plan.reduce(x)[:, at + 1 :]], 1)
        assert torch.equal(others, x.gather(1, picked[..., None].expand(b, keep, C)))
        assert torch.equal(plan.sizes(None)[:, at], torch.full((b,), float(n - keep)))
        assert plan.front == (prefix is not None)


@given(seeds, st.lists(st.integers(1, 9), min_size=2, max_size=4), st.booleans())
def test_fused_rest_of_ragged_samples(seed, ns, normalise) -> None:
    """Each sample fuses what it alone would fuse; padding is no part of it, and who drops nothing gets no row."""
    b, n = len(ns), max(ns)
    valid = torch.arange(n) < torch.tensor(ns)[:, None]
    keep = [1 + (seed + i) % k for i, k in enumerate(ns)]
    x, a = normal(seed, b, n, C), normal(seed, b, n).abs()
    index = torch.arange(n).expand(b, n)  # the first ones stay
    plan = Plan.keep(index, n, torch.tensor(keep)).fuse_rest(a, normalise=normalise, valid=valid)
    y = plan.reduce(x)
    for i, (k, real) in enumerate(zip(keep, ns, strict=True)):
        alone = Plan.keep(index[i : i + 1, :k], real).fuse_rest(a[i : i + 1, :real], normalise=normalise)
        assert plan.lengths[i].item() == alone.m
        torch.testing.assert_close(y[i, : alone.m], alone.reduce(x[i : i + 1, :real])[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(plan.sizes(None)[i, : alone.m], alone.sizes(None)[0])


@given(seeds, batches, st.sampled_from((2, 7, 16)))
def test_shares_of_sizes_compose(seed, b, n) -> None:
    """A row may inherit only part of an extra's size, and so may the next one."""
    a = make("merge", seed, (b,), n)
    c = make("merge", seed + 1, (b,), a.m)
    a, c = (replace(p, extra_mass=None if p.extra is None else normal(seed, *p.extra.shape).sigmoid()) for p in (a, c))
    size = normal(seed, b, n).abs()
    torch.testing.assert_close(a.then(c).sizes(size), c.sizes(a.sizes(size)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a.spelled_out().sizes(size), a.sizes(size))


@given(seeds, leads, LENGTHS)
def test_soft_plans(seed, lead, n) -> None:
    plan = make("soft", seed, lead, n)
    size = normal(seed, *lead, n).abs()
    torch.testing.assert_close(plan.sizes(size).sum(-1), size.sum(-1), atol=1e-4, rtol=1e-4)
    ones = torch.ones(*lead, n, 1)
    torch.testing.assert_close(plan.reduce(ones), torch.ones(*lead, plan.m, 1))  # rows are averages
    torch.testing.assert_close(plan.restore(torch.ones(*lead, plan.m, 1)), ones)  # and so are restored tokens
    assert torch.equal(plan.row, plan.matrix.argmax(-2))
    hard = make("rows", seed, lead, n)
    soft, x = Plan.soft(hard.dense()), normal(seed, *lead, n, C)
    torch.testing.assert_close(soft.reduce(x), hard.reduce(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(soft.row, hard.row)


@given(st.sampled_from([*LINEAR, "mlerp"]), seeds, leads, LENGTHS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_dtype_and_gradients(kind, seed, lead, n, dtype) -> None:
    plan = make(kind, seed, lead, n)
    x = normal(seed, *lead, n, C, dtype=dtype).requires_grad_()
    y = plan.reduce(x)
    assert y.dtype == dtype
    full = make(kind, seed, lead, n).reduce(x.detach().float())
    torch.testing.assert_close(y.float(), full, atol=0.1 if dtype == torch.bfloat16 else 1e-6, rtol=0.05)
    assert plan.restore(y).dtype == dtype
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    if isinstance(plan, Hard) and kind != "weighted rows":
        dropped = plan.row < 0
        assert (x.grad[dropped] == 0).all()


def test_gradients_reach_the_weights() -> None:
    weight = normal(0, 1, 6).requires_grad_()
    plan = Plan.keep(torch.tensor([[0, 2]]), 6).fuse_rest(weight)
    plan.reduce(normal(1, 1, 6, C)).sum().backward()
    assert weight.grad is not None
    assert (weight.grad[0, [1, 3, 4, 5]] != 0).all()
    assert (weight.grad[0, [0, 2]] == 0).all()


@given(hard, seeds, batches, LENGTHS)
def test_padding_stays_out(kind, seed, b, n) -> None:
    """Whatever the padding rows of a ragged plan hold, NaN included, no real row sees it, and no gradient either."""
    first = Plan.keep(torch.arange(n).expand(b, n), n, integers(seed, 1, n + 1, (b,)))
    plan = first.then(follow(kind, seed, first))
    x = normal(seed, b, n, C).masked_fill(~first.valid[..., None], float("nan")).requires_grad_()
    y = plan.reduce(x)
    assert y.isfinite().all()
    assert (y[~plan.valid] == 0).all()
    y.sum().backward()
    assert x.grad is not None
    assert (x.grad[~first.valid] == 0).all()


@given(st.sampled_from(HARD), seeds, batches, LENGTHS)
def test_tokens_move_in_step(kind, seed, b, n) -> None:
    plan = make(kind, seed, (b,), n)
    size, modality = normal(seed, b, n).abs(), integers(seed, 0, 2, (b, n))
    tokens = Tokens.plain(b, n, 0, size=size, modality=modality)
    after = tokens.after(plan)
    assert (after.n, after.prefix) == (plan.m, plan.front)
    torch.testing.assert_close(after.size, plan.sizes(size))
    assert torch.equal(after.modality, modality.gather(-1, plan.anchor))
    assert torch.equal(after.place(), plan.anchor)
    assert after.valid is None or torch.equal(after.valid, plan.valid)


def test_groups_of_tokens() -> None:
    valid = torch.tensor([[True] * 5, [True, True, True, False, False]])
    tokens = Tokens.plain(2, 5, 1, valid=valid)
    x = torch.arange(10).view(2, 5, 1)
    assert tokens.cls.of(x)[..., 0].tolist() == [[0], [5]]
    assert tokens.free.of(x)[..., 0].tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert tokens.last.of(x)[..., 0].tolist() == [[4], [7]]
    assert tokens.recent(2).of(x)[..., 0].tolist() == [[3, 4], [6, 7]]
    assert tokens.movable.tolist() == [[False, True, True, True, True], [False, True, True, False, False]]
    guarded = tokens.protect(Group(index=torch.tensor([[2], [1]])))
    assert guarded.free_index().tolist() == [[1, 3, 4], [2, 3, 4]]
    with pytest.raises(ValueError, match="no class token"):
        _ = Tokens.plain(2, 5, 0).cls


def test_bad_input_is_named() -> None:
    plan = Plan.keep(torch.tensor([[0, 2]]), 4)
    with pytest.raises(PlanError, match=r"takes 4 tokens to 2; got 5 \(shape \(1, 5, 3\)\)"):
        plan.reduce(torch.zeros(1, 5, 3))
    with pytest.raises(PlanError, match="takes 4 tokens to 2; got 3"):
        plan.restore(torch.zeros(1, 3, 3))
    with pytest.raises(PlanError, match="gives 2 rows, the next one takes 4"):
        plan.then(plan)
    with pytest.raises(PlanError, match="already merges"):
        Plan.merge(torch.tensor([[1]]), torch.tensor([[0]]), 4).fuse_rest(torch.ones(1, 4))
    with pytest.raises(PlanError, match="no dense matrix"):
        Plan.merge(torch.tensor([[1]]), torch.tensor([[0]]), 4).norm_preserving().dense()
    ragged = Plan.keep(torch.tensor([[0, 2]]), 4, torch.tensor([1]))
    with pytest.raises(PlanError, match="this plan is ragged"):
        ragged.fuse_rest(torch.ones(1, 4), protect=True, prefix=1)


def test_plans_count_what_they_did() -> None:
    plan = Plan.from_rows(torch.tensor([[0, 0, 1, -1], [0, 1, 1, 1]]), 2)
    assert plan.stats() == {"n": 4, "m": 2, "dropped": 0.5, "merged": 1.5}


def test_tokens_know_where_they_stood_behind_several_plans() -> None:
    tokens = Tokens.plain(1, 6).after(Plan.keep(torch.tensor([[1, 3, 4]]), 6))
    assert tokens.place().tolist() == [[1, 3, 4]]
    tokens = tokens.after(Plan.keep(torch.tensor([[0, 2]]), 3))
    assert tokens.place().tolist() == [[1, 4]]
    assert tokens.after(Plan.identity((1,), 2)).place().tolist() == [[1, 4]]


def test_rows_behind_those_to_look_at_are_not_given_back() -> None:
    """Three rows, of which the first two are given back: who is in the third gets the fill."""
    plan = replace(Plan.from_rows(torch.tensor([[0, 2, 1, -1]]), 3), back=torch.tensor([2]))
    rows = torch.tensor([[[1.0], [2.0], [3.0]]])
    assert plan.restore(rows, fill=9.0)[0, :, 0].tolist() == [1.0, 9.0, 2.0, 9.0]
