"""Turbo: tome with a second thought. Nothing changes at alpha = 0; what the class token looks at does not go."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fewer
from fewer.core import Place, Remove, Seen, Signals, Tokens, attention
from fewer.methods.vision.tome import ToMe
from fewer.methods.vision.turbo import FACTOR, TOKENS, Turbo
from fewer.testing import TinyHost
from fewer.testing.models import run


def seen(n: int, seed: int = 0, batch: int = 2, bias: Tensor | None = None) -> Seen:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, 2, n, 8, generator=g) for _ in range(3))
    return Seen(q, k, v, 8**-0.5, bias)


def signals(n: int, *, stage: int = 0, cls: bool = True, batch: int = 2, looked: Seen | None = None) -> Signals:
    tokens = Tokens.plain(batch, n, int(cls), has_cls=cls)
    x = torch.randn(batch, n, 16, generator=torch.Generator().manual_seed(9))
    return Signals(x, tokens, Place(stage=stage, stages=3, start=n - int(cls)), looked or seen(n, batch=batch))


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("fidelity", ["paper", "code"])
def test_without_weight_it_is_tome(cls: bool, fidelity: str) -> None:
    s = signals(24, cls=cls)
    mine = Turbo(budget=Remove(6), alpha=0.0, fidelity=fidelity).plan(s, s.tokens)  # type: ignore[arg-type]
    theirs = ToMe(budget=Remove(6), fidelity=fidelity).plan(s, s.tokens)  # type: ignore[arg-type]
    assert torch.equal(mine.row, theirs.row)
    assert torch.equal(mine.position, theirs.position)


@pytest.mark.parametrize("kind", ["vit", "clip", "blip", "siglip"])
def test_without_weight_it_answers_as_tome_to_the_bit(kind: str) -> None:
    host = TinyHost(kind)
    merged = host.run(Turbo(budget=Remove(3), alpha=0.0), host.batch)
    assert torch.equal(merged, host.run(ToMe(budget=Remove(3)), host.batch))
    weighted = host.run(Turbo(budget=Remove(3)), host.batch)
    assert not torch.equal(weighted, merged)
    assert not torch.equal(weighted, run(host.model(), host.batch))


def by_hand(s: Signals, r: int, factor: float) -> list[list[int]]:
    """The tokens that go, sample by sample: cosines and attention in loops, the formula as it is written."""
    look = s.seen
    assert look is not None
    n = look.q.shape[2]
    gone = []
    for b in range(look.q.shape[0]):
        key = look.k[b].mean(0)
        row = torch.stack([(look.q[b, h, 0] @ look.k[b, h].T * look.scale).softmax(-1) for h in range(2)]).mean(0)
        value = {}
        for i in range(2, n, 2):  # place 0 is the class token
            best = max(float(torch.cosine_similarity(key[i], key[j], dim=0)) for j in range(1, n, 2))
            value[i] = best - factor * float(row[i])
        gone.append(sorted(sorted(value, key=lambda i: -value[i])[:r]))
    return gone


@pytest.mark.parametrize(("fidelity", "stage", "beta"), [("paper", 0, 1.0), ("code", 0, 1.0), ("paper", 2, 0.5)])
def test_who_goes_is_the_formula(fidelity: str, stage: int, beta: float) -> None:
    n, r, alpha = 26, 7, 3.0
    s = signals(n, stage=stage)
    method = Turbo(budget=Remove(r), alpha=alpha, beta=beta, fidelity=fidelity)  # type: ignore[arg-type]
    plan = method.plan(s, s.tokens)
    factor = alpha * beta**stage * (FACTOR if fidelity == "code" else FACTOR * n / TOKENS)
    for b, gone in enumerate(by_hand(s, r, factor)):
        stays = set(plan.position[b].tolist())
        assert sorted(set(range(n)) - stays) == gone
    assert by_hand(s, r, factor) != by_hand(s, r, 0.0), "the case does not tell Turbo from ToMe"


def test_at_the_authors_size_paper_and_code_agree() -> None:
    s = signals(TOKENS, batch=1)
    rows = [Turbo(budget=Remove(30), fidelity=f).plan(s, s.tokens).row for f in ("paper", "code")]  # type: ignore[arg-type]
    assert torch.equal(*rows)


def test_what_the_class_token_looks_at_never_goes() -> None:
    """A token that would be the first to go stays once the class token stares at it."""
    s = signals(20)
    assert s.seen is not None
    first = [gone[0] for gone in by_hand(s, 1, 0.0)]
    bias = torch.zeros(2, 1, 20, 20)
    for b, i in enumerate(first):
        bias[b, 0, 0, i] = 4.0
    tokens = s.tokens
    plain = Turbo(budget=Remove(9), alpha=0.0).plan(s, tokens)
    stared = Signals(s.hidden, tokens, s.at, replace(s.seen, bias=bias))
    plan = Turbo(budget=Remove(8), alpha=20.0).plan(stared, tokens)
    for b, i in enumerate(first):
        assert i not in plain.position[b].tolist()
        assert i in plan.position[b].tolist()
    ones = torch.ones(2, 20)
    assert_close(plan.sizes(ones).sum(-1), ones.sum(-1))  # merged, nobody lost
    assert_close(plan.dense().sum(-1), torch.ones(2, plan.m))


def test_no_class_token_weighs_on_the_same_scale() -> None:
    """N A is one on average with a class token and without."""
    with_cls, without = signals(21), signals(21, cls=False)
    means = [Turbo()._meaning(s, s.tokens).mean() * Turbo().c for s in (with_cls, without)]
    assert_close(torch.stack(means), torch.ones(2))
    look = without.seen
    assert look is not None
    paid = attention.mass(look).mean(1) / 21
    assert_close(Turbo()._meaning(without, without.tokens), paid * 21 / Turbo().c)


def test_few_tokens_are_left_alone_on_request() -> None:
    host = TinyHost("clip")
    with host.passed(Turbo(budget=Remove(3), least=12)) as session:
        assert session.counts == [14, 11, 11]  # 17, 14 and 11 rows came in


def test_parameters_out_of_range() -> None:
    with pytest.raises(ValueError, match="c=0"):
        fewer.parse("turbo:c=0")
    with pytest.raises(ValueError, match="beta=-1"):
        fewer.parse("turbo:beta=-1")
