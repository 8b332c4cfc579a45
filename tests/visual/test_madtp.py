"""MADTP: three importances, a threshold from a dictionary, one merged token; and what trains and steers it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fewer
from fewer.core import Place, Plan, Seen, Signals, Tokens
from fewer.core.learned import Learned
from fewer.methods.vision.madtp import MADTP, Dictionary, alignment, controlled, importance, threshold
from fewer.runtime.session import Session
from fewer.testing import TinyHost
from fewer.testing.models import answer, images, run, tiny_vit

CLOSE: dict[str, Any] = dict(atol=1e-5, rtol=1e-4)


def example(n: int = 9, batch: int = 2, cls: bool = True, valid: Tensor | None = None) -> Signals:
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(batch, 2, n, 4, generator=g) for _ in range(3))
    bias = None if valid is None else torch.zeros(batch, n).masked_fill(~valid, float("-inf"))[:, None, None]
    tokens = Tokens.plain(batch, n, int(cls), has_cls=cls, valid=valid)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        modules = nn.ModuleDict(MADTP(entries=6).modules(8, 2, 1, n - int(cls)))
    x = torch.randn(batch, n, 8, generator=g)
    return Signals(x, tokens, Place(start=n - int(cls)), Seen(q, k, v, 0.5, bias), modules=modules)


def by_hand(s: Signals, b: int, cls: bool) -> Tensor:
    """(N,): S of one sample, in loops."""
    look = s.seen
    assert look is not None
    n, first = s.tokens.n, int(cls)
    p = torch.stack([(look.q[b, h] @ look.k[b, h].T * look.scale).softmax(-1) for h in range(2)])
    out = torch.stack([(p[h] @ look.v[b, h]).norm(dim=-1) for h in range(2)])
    match = (s.hidden[b] @ s.module("dictionary").entries.T).detach()
    a, t, c = torch.zeros(n), torch.zeros(n), torch.zeros(n)
    for i in range(first, n):
        a[i] = sum(max(float(p[h, j, i]) for h in range(2)) for j in range(first, n))
        t[i] = max(0.0, float(match[i].max()))
        for h in range(2):
            paid = p[h, 0, i] if cls else p[h, :, i].mean()
            c[i] += paid * out[h, i] / out[:, i].sum()
    return (a / a.sum() + t / t.sum() + c) / 3


@pytest.mark.parametrize("cls", [True, False])
def test_importance_is_the_mean_of_the_three(cls: bool) -> None:
    s = example(cls=cls)
    score = importance(s, s.tokens, s.module("dictionary")(s.hidden))
    for b in range(2):
        assert_close(score[b], by_hand(s, b, cls), **CLOSE)


def test_threshold_between_its_limits() -> None:
    """Hot, every entry reads the mean; cold, each reads the token it matches best, and the least counts."""
    s = example()
    match, free = s.module("dictionary")(s.hidden), torch.arange(9).expand(2, -1) > 0
    score = importance(s, s.tokens, match)
    hot = threshold(match, score, free, torch.tensor(1e6))
    assert_close(hot[:, 0], score[:, 1:].mean(1), **CLOSE)
    cold = threshold(match, score, free, torch.tensor(1e-4))
    best = match[:, 1:].argmax(1) + 1
    assert_close(cold[:, 0], score.gather(1, best).amin(1), **CLOSE)


def plan_of(s: Signals, method: MADTP) -> Plan:
    return method.plan(s, s.tokens)


def test_what_lies_below_melts_into_one_convex_token() -> None:
    s = example(n=14)
    dictionary = s.module("dictionary")
    match, free = dictionary(s.hidden), torch.arange(14).expand(2, -1) > 0
    score = importance(s, s.tokens, match)
    limit = threshold(match, score, free, dictionary.temperature)
    plan = plan_of(s, MADTP(entries=6))
    dense = plan.dense()
    assert plan.lengths is not None
    for b in range(2):
        above = [i for i in range(1, 14) if score[b, i] > limit[b, 0]]
        below = [i for i in range(1, 14) if i not in above]
        assert len(below) > 1, "the case is trivial"
        assert above, "the case is trivial"
        length = len(above) + 2
        assert int(plan.lengths[b]) == length
        assert plan.position[b, : length - 1].tolist() == [0, *above]
        merged = dense[b, length - 1]
        wanted = torch.zeros(14)
        wanted[below] = (score[b, below] / score[b, below].sum()).detach()
        assert_close(merged.detach(), wanted, **CLOSE)
        assert bool((merged >= 0).all())
    assert_close(plan.sizes(torch.ones(2, 14)).sum(-1), torch.full((2,), 14.0))


def test_one_token_below_is_no_reason_to_act() -> None:
    """All patches alike but one: the threshold lets one go, and so none goes."""
    s = example(n=5)
    dictionary = s.module("dictionary")
    with torch.no_grad():
        dictionary.entries.zero_()
        s.hidden.fill_(1.0)
    flat = Seen(torch.zeros(2, 2, 5, 4), torch.zeros(2, 2, 5, 4), torch.ones(2, 2, 5, 4), 0.5)
    flat.q[..., 0] = 1.0
    flat.k[:, :, 4, 0] = -8.0  # nobody looks at the last patch
    plan = plan_of(replace(s, seen=flat), MADTP(entries=6))
    assert plan.lengths is not None
    assert plan.lengths.tolist() == [5, 5]
    flat.k[:, :, 3, 0] = -8.0  # nor at the one before it: two go, one comes
    plan = plan_of(replace(s, seen=flat), MADTP(entries=6))
    assert plan.lengths is not None
    assert plan.lengths.tolist() == [4, 4]


def test_padding_has_no_say() -> None:
    valid = torch.arange(14) < torch.tensor([[14], [10]])
    padded, alone = example(n=14, valid=valid), example(n=14)
    assert padded.seen is not None
    q, k, v = (x[1:, :, :10] for x in (padded.seen.q, padded.seen.k, padded.seen.v))
    tokens = Tokens.plain(1, 10, 1)
    own = replace(alone, hidden=padded.hidden[1:, :10], tokens=tokens, seen=Seen(q, k, v, 0.5))
    both, one = plan_of(padded, MADTP(entries=6)), plan_of(own, MADTP(entries=6))
    assert both.lengths is not None
    assert one.lengths is not None
    assert both.lengths[1] == one.lengths[0]
    rows = int(one.lengths[0])
    assert_close(both.reduce(padded.hidden)[1, :rows], one.reduce(own.hidden)[0, :rows], **CLOSE)


def session(kind: str, method: str = "madtp:temperature=20", **options: object) -> Session:
    host = TinyHost(kind)
    return host.session(host.model(), fewer.parse(method), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["vit", "clip", "blip"])
def test_images_keep_their_own_number(kind: str) -> None:
    """Per image, not the batch's maximum: alone and together, padded and packed, an image gets the same answer."""
    x = images(3)
    with session(kind) as padded:
        together = run(padded.model, x)
        counts = padded.counts
        assert isinstance(counts, torch.Tensor)
        assert len(set(counts[-1].tolist())) > 1, counts
        assert bool((counts[0] < 17).all())
        alone = torch.cat([run(padded.model, one) for one in x.split(1)])
    assert_close(alone, together, **CLOSE)
    with session(kind, execution="packed") as packed:
        assert_close(run(packed.model, x), together, **CLOSE)


def test_a_fixed_budget_keeps_the_most_important() -> None:
    s = example(n=14)
    score = importance(s, s.tokens, s.module("dictionary")(s.hidden))
    plan = fewer.parse("madtp:tokens=5,entries=6").plan(s, s.tokens)
    for b in range(2):
        assert set(plan.position[b, 1:6].tolist()) == set(score[b].topk(5).indices.tolist())
    assert plan.m == 1 + 5 + 1


# -- the dictionary ----------------------------------------------------------------------------------------------------
def test_one_dictionary_serves_all_blocks_and_both_towers(tmp_path: Path) -> None:
    with session("clip") as s:
        wanted = run(s.model, images())
        assert [name for name, _ in s.modules.named_parameters()] == ["0.0.dictionary.entries"]
        s.modules[0][0]["dictionary"].temperature.fill_(7.5)
        files = s.save_modules(tmp_path)
        text = fewer.apply(tiny_vit("bert", depth=2), "madtp", modules=s.modules)
        assert text.modules[0][0]["dictionary"] is s.modules[0][0]["dictionary"]
        text.remove()
    model = TinyHost("clip").model()
    with fewer.apply(model, "madtp", modules=files[0]) as again:
        assert float(again.modules[0][0]["dictionary"].temperature) == 7.5  # learned ones know theirs
        again.modules[0][0]["dictionary"].temperature.fill_(20.0)
        assert_close(run(model, images()), wanted)


def test_alignment_of_a_tower_with_itself_is_zero() -> None:
    torch.manual_seed(0)
    a, b = [torch.randn(2, 5, 8) for _ in range(3)], [torch.randn(2, 5, 8) for _ in range(3)]
    assert_close(alignment(a, a), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert_close(alignment(a, [-x for x in a]), torch.tensor(2.0))
    one = 1 - torch.cosine_similarity(sum(a), sum(b), dim=-1)  # type: ignore[arg-type]
    assert_close(alignment(a, b), one.mean())
    with pytest.raises(ValueError, match="map one tower's tokens"):
        alignment(a, [x[..., :4] for x in b])


def test_a_views_average_is_weighted_by_match_and_knows_padding() -> None:
    d = Dictionary(8, 3, 1.0)
    x = torch.randn(2, 6, 8)
    real = torch.arange(6) < torch.tensor([[6], [4]])
    view = d.aligned(x, real)
    for b, n in ((0, 6), (1, 4)):
        for e in range(3):
            weight = (x[b, :n] @ d.entries[e] / 8**0.5).softmax(0)
            assert_close(view[b, e], weight @ x[b, :n], **CLOSE)


def test_the_dictionary_learns_from_the_task_and_from_alignment() -> None:
    """Both losses reach it, and a few steps bring the towers' views closer."""
    host = TinyHost("vit")
    model = host.model().train()
    with host.session(model, fewer.parse("madtp:entries=8")) as s:
        dictionary = s.modules[0][0]["dictionary"]
        (task,) = torch.autograd.grad(answer(model, images(4)).square().mean(), dictionary.entries)
        assert bool(task.isfinite().all())
        assert bool(task.any())
        text = torch.randn(4, 9, 32, generator=torch.Generator().manual_seed(5))
        step = torch.optim.Adam(dictionary.parameters(), lr=0.02)
        losses = []
        for _ in range(8):
            answer(model, images(4))
            image = s.last.memory[0]["aligned"]
            assert sorted(image) == [0, 1, 2]
            loss = alignment(image.values(), [dictionary.aligned(text)] * 3)
            step.zero_grad()
            loss.backward()
            step.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0] - 0.02, losses
    with host.session(model.eval(), fewer.parse("madtp:entries=8")) as s:
        run(model, images(1))
        assert "aligned" not in s.last.memory[0]


# -- the controller ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("gflops", "after"),
    [(132.54, 6.0), (80.0, 5.5), (72.0, 5.25), (68.0, 5.1), (66.5, 5.01), (66.0, 4.99), (64.0, 4.9), (60.0, 4.75),
     (50.0, 4.5), (30.0, 4.0)],
)  # fmt: skip
def test_steps_of_the_controller(gflops: float, after: float) -> None:
    assert controlled(5.0, gflops, 66.0) == pytest.approx(after)
    assert controlled(5.0, gflops / 10, 6.6, full=13.254) == pytest.approx(after)  # a tenth of the model, the same step
    assert controlled(0.005, 1.0, 66.0) == 0.01


def test_the_controller_finds_a_cost() -> None:
    """From the first temperature to the target, as after each epoch of training, and it stays there."""
    host, x = TinyHost("clip"), images(8, seed=4)
    model = host.model()
    with host.session(model, fewer.parse("madtp:temperature=0.2")) as s:
        dictionary = s.modules[0][0]["dictionary"]
        run(model, x)
        full = s.ledger.gflops_full
        target, gaps = 0.8 * full, []
        for _ in range(25):
            run(model, x)
            gaps.append(abs(s.ledger.gflops_model - target) / full)
            t = controlled(float(dictionary.temperature), s.ledger.gflops_model, target, full)
            dictionary.temperature.fill_(t)
    assert gaps[0] > 0.05, gaps
    assert max(gaps[-3:]) < 0.04, gaps


def test_the_default_is_the_dynamic_one() -> None:
    assert isinstance(MADTP().budget, Learned)
    assert MADTP().adaptive
    assert not fewer.parse("madtp:keep=0.5").adaptive
    with pytest.raises(ValueError, match="temperature=0"):
        fewer.parse("madtp:temperature=0")
    with pytest.raises(ValueError, match="entries=0"):
        fewer.parse("madtp:entries=0")
