"""Counts and choices of methods on texts: by hand, and for whatever hypothesis draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import fewer
from decoders import VOCAB, decoder
from fewer.compression.compressed import kept
from fewer.core import Capacity, KeepRatio, Mass, Place, Remove, Signals, Tokens
from fewer.core.errors import SignalError
from fewer.core.written import (
    BEFORE,
    BEHIND,
    Each,
    Written,
    fill,
    goal,
    leading,
    numbered,
    pooled,
    segments,
    shares,
)
from fewer.runtime.reading import LanguageReader


def row(*values: float) -> Tensor:
    return torch.tensor([values])


def runs(data: st.DataObject, n: int, most: int) -> Tensor:
    """(1, n): unit numbers of neighbours, each of up to `most` tokens."""
    sizes: list[int] = []
    while sum(sizes) < n:
        sizes.append(data.draw(st.integers(1, most)))
    return torch.tensor([[i for i, size in enumerate(sizes) for _ in range(size)][:n]])


# -- filling -----------------------------------------------------------------------------------------------------------
def test_fill_by_hand() -> None:
    unit = torch.tensor([[0, 0, 1, 2, 2, 2, 3, 4]])
    scores = row(5, 5, 1, 9, 9, 9, 5, 2)
    free = torch.ones(1, 8, dtype=torch.bool)

    def chosen(count: int, among: Tensor = free) -> list[int]:
        return fill(scores, unit, torch.tensor([count]), among)[0].nonzero()[:, 0].tolist()

    assert chosen(0) == []
    assert chosen(1) == [6]  # the best that fits: the one of three and the one of two do not
    assert chosen(2) == [0, 1]
    assert chosen(3) == [3, 4, 5]
    assert chosen(4) == [3, 4, 5, 6]
    assert chosen(5) == [0, 1, 3, 4, 5]  # of equal scores the earlier unit
    assert chosen(8) == list(range(8))
    assert chosen(99) == list(range(8))
    assert chosen(2, free & (unit != 0)) == [6, 7]
    some = free.clone()
    some[0, 4] = False  # half of a unit stays anyway, the rest of it counts two
    assert chosen(2, some) == [3, 5]


@given(data=st.data())
def test_fill_is_its_slow_twin(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 24))
    unit = runs(data, n, data.draw(st.sampled_from([1, 2, 7])))
    value = [data.draw(st.integers(0, 5)) for _ in range(n)]
    scores = torch.tensor([[float(value[u]) for u in unit[0].tolist()]])
    free = torch.tensor([[data.draw(st.integers(0, 4)) > 0 for _ in range(n)]])
    count = data.draw(st.integers(0, n + 2))
    got = fill(scores, unit + 3, torch.tensor([count]), free)[0]

    members = {u: [i for i in range(n) if unit[0, i] == u and free[0, i]] for u in unit[0].tolist()}
    want, left = set(), count
    for u in sorted(members, key=lambda u: (-value[u], u)):  # one unit behind the other, those that fit
        if members[u] and len(members[u]) <= left:
            want |= {*members[u]}
            left -= len(members[u])
    assert {*got.nonzero()[:, 0].tolist()} == want
    if max(map(len, members.values())) <= 1:
        assert len(want) == min(count, int(free.sum()))


def test_fill_takes_scores_that_are_no_numbers_last() -> None:
    scores = row(float("nan"), -1e30, 3.0)
    assert fill(scores, torch.arange(3)[None], torch.tensor([2]), torch.ones(1, 3, dtype=torch.bool)).tolist() == [
        [False, True, True]
    ]


# -- shares ------------------------------------------------------------------------------------------------------------
def test_shares_by_hand() -> None:
    free = torch.ones(1, 6, dtype=torch.bool)
    assert_close(shares(torch.tensor([3]), free, torch.ones(1, 6)), torch.full((1, 6), 0.5, dtype=torch.double))
    weight = row(3, 3, 1, 1, 1, 1)
    assert_close(shares(torch.tensor([2]), free, weight)[0, [0, 2]].tolist(), [0.6, 0.2])
    # the first two would have to stay 1.2 times each: they stay, and the others share what is left
    assert_close(shares(torch.tensor([4]), free, weight)[0, [0, 2]].tolist(), [1.0, 0.5])
    gone = free.clone()
    gone[0, 5] = False
    assert shares(torch.tensor([5]), gone, weight).tolist() == [[1, 1, 1, 1, 1, 0]]


@given(data=st.data())
def test_shares_add_up_and_follow_the_weights(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 20))
    weight = torch.tensor([[data.draw(st.sampled_from([0.001, 0.2, 0.5, 0.9, 1.0])) for _ in range(n)]])
    free = torch.tensor([[data.draw(st.integers(0, 3)) > 0 for _ in range(n)]])
    count = data.draw(st.integers(0, int(free.sum())))
    share = shares(torch.tensor([count]), free, weight)[0]
    assert float(share.sum()) == pytest.approx(count, abs=1e-6)
    assert bool(((share >= 0) & (share <= 1)).all())
    assert not share[~free[0]].any()
    below = free[0] & (share < 1)  # what is not full is in proportion
    ratio = share[below] / weight[0, below]
    assert not len(ratio) or float(ratio.max() - ratio.min()) < 1e-6
    full = free[0] & (share >= 1)
    if full.any() and below.any():
        assert float(weight[0, full].min()) >= float(weight[0, below].max())


# -- leading -----------------------------------------------------------------------------------------------------------
def test_leading_by_hand() -> None:
    score = row(1.0, 5.0, 3.0, float("nan"))
    size = torch.tensor([[10, 4, 6, 0]])
    for limit, want in [(1, [1]), (4, [1]), (5, [1, 2]), (10, [1, 2]), (11, [0, 1, 2]), (99, [0, 1, 2]), (0, [])]:
        got = leading(score, size, torch.tensor([limit]))
        assert got[0].nonzero()[:, 0].tolist() == want, limit


# -- segments ----------------------------------------------------------------------------------------------------------
def test_segments_by_hand() -> None:
    there = torch.tensor([[True] * 4 + [False] * 2 + [True] * 5])
    plain = torch.arange(11)[None]
    assert segments(there, plain, 3).tolist() == [[0, 0, 0, 1, -1, -1, 1, 1, 2, 2, 2]]
    words = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 3]])
    assert segments(there, words, 3).tolist() == [[0, 0, 0, 0, -1, -1, 0, 1, 1, 1, 1]]
    assert segments(there, plain, 5).tolist() == [[0, 0, 0, 0, -1, -1, 0, 1, 1, 1, 1]]
    assert segments(there, plain, 7).tolist() == [[0, 0, 0, 0, -1, -1, 0, 0, 0, 0, 0]]  # a rest of two is no segment
    long = torch.zeros(1, 11, dtype=torch.long)  # a unit that never ends is cut behind twice the size
    assert segments(there, long, 3).tolist() == [[0, 0, 0, 0, -1, -1, 0, 0, 1, 1, 1]]
    place = torch.tensor([[1] * 4 + [0] * 7])
    assert segments(there, plain, 3, place).tolist() == [[1, 2, 2, 2, -1, -1, 0, 0, 0, 1, 1]]


@given(data=st.data())
def test_segments_cut_no_unit(data: st.DataObject) -> None:
    n, size = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    unit = runs(data, n, size)
    there = torch.ones(1, n, dtype=torch.bool)
    number = segments(there, unit, size)[0].tolist()
    assert number == sorted(number)
    assert {*number} == {*range(number[-1] + 1)}
    assert all(number[i] == number[i - 1] for i in range(1, n) if unit[0, i] == unit[0, i - 1])
    counts = [number.count(k) for k in range(number[-1] + 1)]
    assert all(size <= count < 2 * size for count in counts[:-1])
    assert len(counts) == 1 or size / 2 <= counts[-1] < 2.5 * size


# -- small things ------------------------------------------------------------------------------------------------------
def test_pooled_and_numbered_by_hand() -> None:
    group = torch.tensor([[7, 7, 2, 2, 2, 9]])
    assert numbered(group).tolist() == [[0, 0, 1, 1, 1, 2]]
    values = row(1, 3, 2, float("nan"), 4, 8)
    real = torch.tensor([[True, True, True, False, True, True]])
    assert pooled(values, numbered(group), real).tolist() == [[2, 2, 3, 3, 3, 8]]


def test_a_budget_that_names_no_count_is_refused() -> None:
    with pytest.raises(SignalError, match="names no count, and a text is cut to one"):
        goal(Mass(0.5), Tokens.plain(1, 4), Place(start=4))


def test_each_text_has_its_own_number() -> None:
    valid = torch.arange(6) < torch.tensor([6, 4])[:, None]
    guarded = torch.zeros(2, 6, dtype=torch.bool)
    guarded[0, 2] = True
    tokens = Tokens.plain(2, 6, 0, guarded=guarded, valid=valid)
    count, free = goal(Each((3, 9)), tokens, Place(start=6))
    assert count.tolist() == [3, 4]
    assert free.sum(-1).tolist() == [5, 4]
    assert goal(KeepRatio(0.5), tokens, Place(start=6))[0].tolist() == [2, 2]  # floored, of each one's own
    assert goal(Remove(2), tokens, Place(start=6))[0].tolist() == [3, 2]
    assert goal(Capacity(3), tokens, Place(start=6))[0].tolist() == [3, 3]


# -- whole methods on a tiny model, against loops over plain forwards --------------------------------------------------
def written(ids: Tensor, valid: Tensor, *, part: Tensor | None = None, unit: Tensor | None = None,
            question: Any = (), start: Any = (1,)) -> Written:  # fmt: skip
    part = torch.zeros_like(ids) if part is None else part
    cell = torch.arange(ids.shape[1]).expand_as(ids)
    unit = cell if unit is None else unit
    reader = LanguageReader(decoder("llama"), ids, valid, part, question, start=start)
    return Written(reader, part, cell, unit, unit, unit)


def plan_of(method: str, text: Written, ids: Tensor, valid: Tensor, guarded: Tensor | None = None) -> list[list[int]]:
    tokens = Tokens.plain(*ids.shape, 0, guarded=guarded, valid=None if bool(valid.all()) else valid)
    signals = Signals(torch.zeros(*ids.shape, 1), tokens, Place(start=ids.shape[1]), text=text)
    plan = fewer.parse(method).plan(signals, tokens)
    return [kept(plan, i) for i in range(len(ids))]


def nll(front: list[int], ids: list[int]) -> list[float]:
    with torch.no_grad():
        p = decoder("llama")(input_ids=torch.tensor([[*front, *ids]])).logits[0].double().log_softmax(-1)
    return [-float(p[len(front) + i - 1, x]) for i, x in enumerate(ids)]


def best(values: dict[int, float], count: int) -> set[int]:
    return {*sorted(values, key=lambda i: (-values[i], i))[:count]}


def ids_of(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=draw)
    return ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_llmlingua_is_its_loop() -> None:
    """Segment by segment behind what stayed, as many of each as the share up to its end says."""
    ids, valid = ids_of(43)
    guarded = torch.zeros_like(valid)
    guarded[0, [3, 20, 21]] = True
    got = plan_of("llmlingua:keep=0.4,segment=10", written(ids, valid), ids, valid, guarded)[0]
    x, front, stays, free = ids[0].tolist(), [1], set(), 40
    for first, stop in [(0, 10), (10, 20), (20, 30), (30, 43)]:
        mine = list(range(first, stop))
        values = nll(front, [x[i] for i in mine])
        seen = sum(1 for i in range(mine[-1] + 1) if not guarded[0, i])
        due = int(16 * seen / free + 0.5 + 1e-6) - len(stays)
        stays |= best({i: v for i, v in zip(mine, values, strict=True) if not guarded[0, i]}, due)
        front += [x[i] for i in mine if i in stays or guarded[0, i]]
    assert len(stays) == 16
    assert got == sorted(stays | {3, 20, 21})


def test_llmlingua_takes_the_contexts_of_the_highest_perplexity_first() -> None:
    ids, valid = ids_of(40, seed=3)
    part = torch.tensor([[BEFORE] * 4 + [0] * 12 + [1] * 8 + [2] * 12 + [BEHIND] * 4])
    guarded = (part < 0) | (part == BEHIND)
    text = written(ids, valid, part=part)
    got = plan_of("llmlingua:keep=0.25,slack=1,segment=50", text, ids, valid, guarded)[0]
    x = ids[0].tolist()
    edges = {0: (4, 16), 1: (16, 24), 2: (24, 36)}
    mean = {p: sum(nll([1], x[a:b])) / (b - a) for p, (a, b) in edges.items()}
    order = sorted(mean, key=lambda p: -mean[p])
    size, there = 0, set()
    for p in order:  # until they hold the eight tokens that stay
        if size < 8:
            there.add(p)
            size += edges[p][1] - edges[p][0]
    inside = [i for i in range(40) if bool(guarded[0, i]) or int(part[0, i]) in there]
    assert len(there) < 3
    values = dict(zip(inside, nll([1], [x[i] for i in inside]), strict=True))
    chosen = best({i: v for i, v in values.items() if not guarded[0, i]}, 8)
    assert got == sorted(chosen | {i for i in range(40) if guarded[0, i]})


@pytest.mark.parametrize("order", ["best", "ends", "original"])
def test_longllmlingua_is_its_loop(order: str) -> None:
    ids, valid = ids_of(60, seed=5)
    part = torch.tensor([[BEFORE] * 3 + [0] * 12 + [1] * 10 + [2] * 14 + [3] * 16 + [BEHIND] * 5])
    guarded = (part < 0) | (part == BEHIND)
    question = ids[0, 55:].tolist()
    text = written(ids, valid, part=part, question=[question])
    method = f"longllmlingua:tokens=20,segment=15,slack=2,ramp=0.3,order={order}"
    got = plan_of(method, text, ids, valid, guarded)[0]

    x = ids[0].tolist()
    edges = {0: (3, 15), 1: (15, 25), 2: (25, 39), 3: (39, 55)}
    far = {p: sum(nll([1, *x[a:b]], question)) / 5 for p, (a, b) in edges.items()}
    ranked = sorted(far, key=lambda p: far[p])
    chosen, size = [], 0
    for p in ranked:
        if size < 2 * 20:
            chosen.append(p)
            size += edges[p][1] - edges[p][0]
    base = 20 / size
    weight = {p: min(1.0, max(1e-3, base + 0.3 * (1 - 2 * i / len(chosen)))) for i, p in enumerate(chosen)}
    factor = 20 / sum(weight[p] * (edges[p][1] - edges[p][0]) for p in chosen)
    assert all(w * factor < 1 for w in weight.values())
    stood = {"best": chosen, "original": sorted(chosen), "ends": [*chosen[::2], *chosen[1::2][::-1]]}[order]
    read = [*range(3), *(i for p in stood for i in range(*edges[p])), *range(55, 60)]
    fronts, stays, due, done = ([1], [1, *question]), set(), 0.0, 0
    for first in range(0, len(read), 15):
        mine = read[first : first + 15]
        plain, asked = (nll(front, [x[i] for i in mine]) for front in fronts)
        gain = {i: a - b for i, a, b in zip(mine, plain, asked, strict=True) if not guarded[0, i]}
        due += sum(weight[int(part[0, i])] * factor for i in gain)
        new = best(gain, int(due + 0.5 + 1e-6) - done)
        done, stays = done + len(new), stays | new
        for front in fronts:
            front += [x[i] for i in mine if i in new or guarded[0, i]]
    assert len(stays) == 20
    assert got == [i for i in read if i in stays or guarded[0, i]]


@pytest.mark.parametrize("context", ["sentence", "text"])
def test_selective_context_is_its_loop(context: str) -> None:
    ids, valid = ids_of(30, seed=6)
    unit = torch.tensor([[0] * 3 + [1] * 4 + [2] * 2 + [3] * 5 + [4] * 1 + [5] * 6 + [6] * 4 + [7] * 5])
    sentence = torch.tensor([[0] * 9 + [1] * 12 + [2] * 9])
    cell = torch.arange(30)[None]
    reader = LanguageReader(decoder("llama"), ids, valid, torch.zeros_like(ids), start=(1,))
    text = Written(reader, torch.zeros_like(ids), cell, cell, unit, sentence)
    got = plan_of(f"selective_context:keep=0.5,context={context}", text, ids, valid)[0]
    x = ids[0].tolist()
    pieces = [(0, 9), (9, 21), (21, 30)] if context == "sentence" else [(0, 30)]
    value = [v for a, b in pieces for v in nll([1], x[a:b])]
    members = {u: [i for i in range(30) if unit[0, i] == u] for u in range(8)}
    mean = {u: sum(value[i] for i in m) / len(m) for u, m in members.items()}
    want: list[int] = []
    for u in sorted(mean, key=lambda u: -mean[u]):
        if len(want) + len(members[u]) <= 15:
            want += members[u]
    assert got == sorted(want)


FORMS = [
    "llmlingua:keep=0.4,segment=7", "llmlingua:keep=0.7,segment=5,unit=word",
    "longllmlingua:keep=0.4,segment=9", "longllmlingua:keep=0.6,segment=7,unit=word,order=ends",
    "selective_context:keep=0.5,unit=word", "selective_context:keep=0.5,unit=token,context=text",
]  # fmt: skip


@pytest.mark.parametrize("method", FORMS)
def test_a_batch_changes_no_text(method: str) -> None:
    """Texts of other lengths, words of other lengths, other parts beside it."""
    ids, valid = ids_of(50, 23, 41, seed=2)
    draw = torch.Generator().manual_seed(3)
    unit = (torch.rand(3, 50, generator=draw) < 0.5).long().cumsum(-1)
    part = torch.tensor([[0] * 20 + [1] * 25 + [BEHIND] * 5, [0] * 10 + [1] * 5 + [2] * 5 + [BEHIND] * 30,
                         [0] * 36 + [BEHIND] * 14])  # fmt: skip
    guarded = (part == BEHIND) & valid
    guarded[0, 4:8] = True
    question = [ids[i, guarded[i] & (part[i] == BEHIND)].tolist() for i in range(3)]
    together = plan_of(method, written(ids, valid, part=part, unit=unit, question=question), ids, valid, guarded)
    for i, n in enumerate((50, 23, 41)):
        mine = slice(i, i + 1), slice(n)
        one = written(ids[mine], valid[mine], part=part[mine], unit=unit[mine], question=question[i : i + 1])
        assert plan_of(method, one, ids[mine], valid[mine], guarded[mine])[0] == together[i]
        stays = {*together[i]}
        assert {j for j in range(n) if guarded[i, j]} <= stays
        if "word" in method:
            halves = [u for u in unit[i, :n].unique().tolist()
                      if 0 < len({j for j in range(n) if unit[i, j] == u and not guarded[i, j]} & stays)
                      < len({j for j in range(n) if unit[i, j] == u and not guarded[i, j]})]  # fmt: skip
            assert not halves


@given(n=st.integers(1, 60), share=st.floats(0.02, 1), segment=st.integers(1, 30), seed=st.integers(0, 9))
def test_llmlingua_meets_the_count(n: int, share: float, segment: int, seed: int) -> None:
    ids, valid = ids_of(n, seed=seed)
    got = plan_of(f"llmlingua:keep={share:.4f},segment={segment}", written(ids, valid), ids, valid)[0]
    assert len(got) == KeepRatio(float(f"{share:.4f}")).keep(n, Place(start=n))
    assert got == sorted({*got})


@pytest.mark.parametrize("form", ["llmlingua:segment=0", "llmlingua:slack=0.5", "longllmlingua:ramp=1.5",
                                  "longllmlingua:order=worst", "longllmlingua:segment=0"])  # fmt: skip
def test_settings_out_of_range_are_refused(form: str) -> None:
    with pytest.raises(ValueError, match=form.split(":")[1].split("=")[0]):
        fewer.parse(form)
