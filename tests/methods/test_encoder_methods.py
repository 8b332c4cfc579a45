"""The encoder methods' plans: against the numbers of the authors' code, and by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import fewer
from cases import GOLDENS, normal, padded, plain, seeds, tied
from fewer.core import Capacity, KeepRatio, Place, PlanError, Reducer, Seen, Signals, Threshold, Tokens, naive, select
from fewer.core.learned import Learned
from fewer.methods.language import leap, ltp, power_bert, trbert

AT = Place()


def numbers(name: str) -> dict[str, Tensor]:
    with np.load(GOLDENS / f"{name}.npz") as z:
        return {k: torch.from_numpy(z[k]) for k in z.files}


def seen(logits: Tensor, tokens: Tokens) -> Seen:
    """An attention call with these logits, (B, H, N, N); padding's keys hidden."""
    b, h, n, _ = logits.shape
    keys = torch.eye(n).expand(b, h, n, n)
    bias = None if tokens.valid is None else tokens.valid[:, None, None, :]
    return Seen(logits, keys, keys, 1.0, bias)


def signals(
    hidden: Tensor, logits: Tensor | None = None, valid: Tensor | None = None, modules: nn.ModuleDict | None = None,
    training: bool = False, at: Place = AT, **streams: Any,
) -> Signals:  # fmt: skip
    tokens = Tokens.plain(*hidden.shape[:2], streams.pop("prefix", 1), valid=valid, **streams)
    call = None if logits is None else seen(logits, tokens)
    own = nn.ModuleDict() if modules is None else modules
    return Signals(hidden, tokens, at, call, modules=own, training=training)


def kept(plan: fewer.core.Hard) -> list[list[int]]:
    return [a[:n].tolist() for a, n in zip(plan.anchor, plan.counted.tolist(), strict=True)]


def made(method: Reducer, width: int = 4, free: int = 8) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(method.modules(width, 2, 1, free))


# -- PoWER-BERT -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["power_bert_extract_s0", "power_bert_extract_s2"])
def test_power_bert_is_the_authors(name: str) -> None:
    z = numbers(name)
    x, keep = z["hidden"], int(z["keep"])
    see = signals(x, z["attention_probs"].log())
    assert_close(power_bert.significance(see), z["significance"], rtol=2e-4, atol=1e-6)
    plan = fewer.parse("power_bert", tokens=keep - 1).plan(see, see.tokens)
    assert torch.equal(plan.reduce(x), z["hard_output"])  # the class token is counted by them, not by our budget
    method = power_bert.PowerBert()
    see = signals(x, z["attention_probs"].log(), modules=made(method, free=x.shape[1]), training=True)
    see.module("retention").weight.data.copy_(z["soft_weights"])
    assert_close(method.plan(see, see.tokens).reduce(x), z["soft_output"], rtol=2e-4, atol=2e-4)


def test_power_bert_by_hand() -> None:
    p = torch.tensor([[0.1, 0.2, 0.7], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])[None, None]
    see = signals(torch.zeros(1, 3, 4), p.log())
    assert_close(power_bert.significance(see), torch.tensor([[0.4, 0.5, 0.8]]))  # without the diagonal
    assert kept(fewer.parse("power_bert:tokens=1").plan(see, see.tokens)) == [[0, 2]]
    everyone = see.attention_mass().mean(1)
    assert everyone.argmax() == 1  # what a token gives itself would have changed the winner


def test_power_bert_learned_counts_round_up_and_never_grow() -> None:
    method = power_bert.PowerBert()
    stages = nn.ModuleList(made(method, free=6) for _ in range(4))
    for stage, ones in zip(stages, (6, 3.2, 4.0, 0.2), strict=True):
        stage["retention"].weight.data.copy_((ones - torch.arange(6.0)).clamp(0, 1))
    assert [stage["retention"].number for stage in stages] == [6, 4, 4, 1]
    assert fewer.text(power_bert.found(stages)) == "power_bert:tokens=5+3+3+1"
    see = signals(normal(0, 1, 8, 4), normal(1, 1, 2, 8, 8), modules=stages[1])
    assert method.plan(see, see.tokens).m == 4  # three and the class token


def test_power_bert_soft_weights_learn_by_rank_alone() -> None:
    method = power_bert.PowerBert()
    x, logits = normal(0, 1, 5, 4), normal(1, 1, 2, 5, 5)
    see = signals(x, logits, modules=made(method), training=True)
    plan = method.plan(see, see.tokens)
    assert torch.equal(plan.reduce(x), x)  # ones change nothing, to the bit
    order = power_bert.significance(see)[0].sort(descending=True).indices
    plan.reduce(x)[0, order[2]].sum().backward()
    grad = see.module("retention").weight.grad
    assert grad.nonzero().flatten().tolist() == [2]
    assert_close(grad[2], x[0, order[2]].sum())
    assert float(see.memory["mass"][0].detach()) == 8


# -- LTP ------------------------------------------------------------------------------------------------------------
def test_ltp_is_the_authors() -> None:
    """Layer by layer from their masks: the scores, and who stays. They divide by the padded length, may drop the class
    token, and give padding and pruned queries no row."""
    z = numbers("ltp_pruners_s0")
    layers, n = z["ltp_masks"].shape[0], z["attention_mask"].shape[-1]
    alive = z["attention_mask"][:, 0, 0] == 0
    method = ltp.LTP(Threshold(float(z["final_token_threshold"])), learned=False, fidelity="code")
    decided = 0
    for layer in range(layers):
        at = Place(layer, int(z["num_layers"]), layer, layers)
        see = signals(torch.zeros(3, n, 1), z["attention_logits"][layer], alive, at=at)
        some = alive.any(-1)
        score = method.score(see, see.tokens)
        if layer == 0:  # theirs passes the first layer by; ours keeps all here, for nothing scores below the floor
            assert score[alive].min() > ltp.FLOOR
            continue
        assert_close(score[some][alive[some]], z["ltp_scores"][layer][some][alive[some]], rtol=2e-4, atol=1e-6)
        assert_close(method.limit(method.budget, see), max(float(z["ltp_thresholds"][layer]), ltp.FLOOR))
        after = z["ltp_masks"][layer][:, 0, 0] == 0
        ours = method.plan(see, see.tokens).row >= 0
        free = alive & some[:, None] & (torch.arange(n) > 0)
        assert torch.equal(ours[free], after[free])
        decided += int((alive & ~after).sum())
        alive = after
    assert decided > 20


def test_ltp_by_hand() -> None:
    p = torch.tensor([[0.1, 0.2, 0.7], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])[None, None]
    see = signals(torch.zeros(1, 3, 4), p.log(), at=Place(2, 4))
    score = ltp.LTP(learned=False).score(see, see.tokens)
    assert_close(score, torch.tensor([[0.5, 1.3, 1.2]]) / 3)
    assert kept(ltp.LTP(Threshold(0.84), learned=False).plan(see, see.tokens)) == [[0, 1]]  # 0.42 at layer 2 of 4
    assert kept(ltp.LTP(Threshold(2.0), learned=False).plan(see, see.tokens)) == [[0]]
    assert kept(fewer.parse("ltp:tokens=1").plan(see, see.tokens)) == [[0, 1]]


def test_ltp_soft_becomes_hard_and_learns_its_thresholds() -> None:
    x, logits = normal(0, 2, 9, 4), normal(1, 2, 2, 9, 9)
    at = Place(3, 4)
    soft = ltp.LTP(Threshold(0.15), soft=True, temperature=1e-7)
    see = signals(x, logits, modules=made(soft), training=True, at=at)
    hard = ltp.LTP(Threshold(0.15))
    stays = hard.plan(see, see.tokens).row >= 0
    assert 0 < stays[:, 1:].sum() < stays[:, 1:].numel()
    assert_close(soft.plan(see, see.tokens).reduce(x), x * stays[..., None])
    warm = ltp.LTP(Threshold(0.15), soft=True, temperature=0.05)
    see = signals(x, logits, modules=made(warm), training=True, at=at)
    plan = warm.plan(see, see.tokens)
    see.memory["keep"][0].mean().backward()
    assert see.module("offset").delta.grad < 0  # a higher threshold keeps less
    assert torch.equal(plan.reduce(x)[:, 0], x[:, 0])  # the class token is never scaled


def test_ltp_divides_by_the_length_the_sequence_had() -> None:
    method, logits = ltp.LTP(learned=False), normal(1, 1, 2, 6, 6)
    see = signals(normal(0, 1, 6, 4), logits)
    whole = method.score(see, see.tokens)
    assert_close(whole.sum(), torch.tensor(1.0))
    half = signals(normal(0, 1, 3, 4), logits[..., :3, :3])
    half.memory = see.memory
    assert_close(method.score(half, half.tokens).sum(), torch.tensor(0.5))


# -- core-sets: Pyramid-BERT ----------------------------------------------------------------------------------------
@given(st.booleans(), seeds, st.integers(1, 3), st.sampled_from((2, 7, 16, 33)), st.integers(0, 2), st.floats(0.05, 1))
def test_core_set_is_its_slow_twin(ties: bool, seed: int, b: int, n: int, prefix: int, share: float) -> None:
    prefix = min(prefix, n - 1)
    metric = tied(seed, b, n) if ties else normal(seed, b, n, 6)
    k = max(1, round((n - prefix) * share))
    plan = select.core_set(metric, Capacity(k), plain(metric, prefix), at=AT)
    assert kept(plan) == [naive.core_set(m, k, prefix) for m in metric.tolist()]


@given(seeds, st.lists(st.integers(3, 17), min_size=2, max_size=3), st.integers(0, 1), st.integers(1, 3))
def test_core_set_padding_changes_nothing(seed: int, ns: list[int], prefix: int, block: int) -> None:
    samples = [normal(seed + i, n, 5) for i, n in enumerate(ns)]
    metric, valid = padded(samples, 1e3)
    budget = KeepRatio(0.5, rounding="ceil")
    tokens = Tokens.plain(len(ns), max(ns), prefix, valid=valid)
    together = select.core_set(metric, budget, tokens, at=AT, block=block)
    alone = [kept(select.core_set(x[None], budget, plain(x[None], prefix), at=AT, block=block))[0] for x in samples]
    assert kept(together) == alone


def test_core_set_is_within_twice_the_best_radius() -> None:
    def radius(x: Tensor, centres: tuple[int, ...]) -> float:
        return torch.cdist(x, x[list(centres)]).amin(1).max().item()

    for seed in range(10):
        x = normal(seed, 9, 2)
        mine = kept(select.core_set(x[None], Capacity(3), plain(x[None], 1), at=AT))[0]
        best = min(radius(x, (0, *rest)) for rest in itertools.combinations(range(1, 9), 3))
        assert radius(x, tuple(mine)) <= 2 * best + 1e-6


def test_core_set_takes_distinct_tokens_before_copies() -> None:
    x = torch.tensor([[0.0, 0], [5, 5], [5, 5], [5, 5], [1, 0], [0, 1]])[None]
    for block in (1, 2):
        picked = kept(select.core_set(x, Capacity(3), plain(x, 1), at=AT, block=block))[0]
        assert picked == ([0, 1, 4, 5] if block == 1 else [0, 1, 2, 4])  # a round of two takes its pair unseen
    assert kept(select.core_set(x, Capacity(5), plain(x, 1), at=AT)) == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(PlanError, match="block=0"):
        select.core_set(x, Capacity(3), plain(x, 1), at=AT, block=0)
    with pytest.raises(PlanError, match="names no count"):
        select.core_set(x, Threshold(0.1), plain(x, 1), at=AT)


def test_pyramid_bert_lengths_fall_exponentially() -> None:
    n, counts = 65, []
    for layer in range(6):
        see = signals(normal(layer, 1, n, 4), at=Place(layer, 6, layer, 6))
        n = fewer.parse("pyramid_bert:keep=0.7").plan(see, see.tokens).m
        counts.append(n - 1)
    assert counts == [45, 32, 23, 17, 12, 9]


# -- Length-Adaptive ------------------------------------------------------------------------------------------------
def test_length_adaptive_sums_all_rows_its_own_included() -> None:
    p = torch.tensor([[0.1, 0.2, 0.7], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])[None, None]
    see = signals(torch.zeros(1, 3, 4), p.log())
    assert kept(fewer.parse("length_adaptive:tokens=1").plan(see, see.tokens)) == [[0, 1]]


# -- TR-BERT --------------------------------------------------------------------------------------------------------
def policy(bias: float = 0.0) -> nn.ModuleDict:
    modules = made(trbert.TRBert(), width=3)
    for p in modules.parameters():
        p.data.zero_()
    modules["policy"].decide[0].weight.data[0, 0] = 1
    modules["policy"].decide[2].weight.data[0, 0] = 1
    modules["policy"].decide[2].bias.data.fill_(bias)
    return modules


def test_trbert_selects_by_probability() -> None:
    x = torch.zeros(1, 5, 3)
    x[0, :, 0] = torch.tensor([-9.0, 4, -4, 3, 2])
    see = signals(x, modules=policy(-2.5))
    assert kept(fewer.parse("trbert").plan(see, see.tokens)) == [[0, 1, 3]]  # gelu(2) - 2.5 < 0
    assert kept(fewer.parse("trbert:tokens=3").plan(see, see.tokens)) == [[0, 1, 3, 4]]
    see = signals(x, modules=policy(-99))
    assert kept(fewer.parse("trbert").plan(see, see.tokens)) == [[0]]  # the class token alone is an answer


def test_trbert_gradient_is_the_enumerated_one() -> None:
    """REINFORCE over all actions of three free tokens, weighted by their chance, is the gradient of the mean reward."""
    x, method = normal(3, 1, 4, 3), trbert.TRBert()
    worth = torch.tensor([0.3, -1.0, 2.0])
    modules = made(method, width=3)
    p = modules["policy"](x)[0, 1:].sigmoid()
    grids = [torch.tensor(a) for a in itertools.product((0.0, 1.0), repeat=3)]
    exact = sum((a * p + (1 - a) * (1 - p)).prod() * (a * worth).sum() for a in grids)
    want = torch.autograd.grad(exact, list(modules.parameters()))
    total = [torch.zeros_like(w) for w in want]
    for a in grids:
        modules["policy"].act = lambda _p, _t, a=a: torch.cat([torch.zeros(1), a])[None] > 0
        see = signals(x, modules=modules, training=True)
        plan = method.plan(see, see.tokens)
        assert kept(plan) == [[0, *(i + 1 for i in range(3) if a[i])]]
        assert_close(see.memory["share"][0], (1 + a.sum()[None]) / 4)
        weight = (a * p + (1 - a) * (1 - p)).prod().detach() * (a * worth).sum()
        # nll is averaged over the three tokens that had a choice
        for t, g in zip(total, torch.autograd.grad(-3 * see.memory["nll"][0].sum(), list(modules.parameters())),
                        strict=True):  # fmt: skip
            t += weight * g
    for ours, exactly in zip(total, want, strict=True):
        assert_close(ours, exactly)


def test_trbert_is_guided_where_saliency_is_given() -> None:
    x = torch.zeros(2, 5, 3)
    modules = policy()  # gelu(0) = 0: every token has probability one half, so two of four are expected
    modules["policy"].guide = torch.tensor([[9, 1, 7, 3, 5.0], [float("nan")] * 5])
    see = signals(x, modules=modules, training=True)
    assert kept(trbert.TRBert().plan(see, see.tokens))[0] == [0, 2, 4]
    draws = {tuple(kept(trbert.TRBert().plan(see, see.tokens))[1]) for _ in range(20)}
    assert len(draws) > 2


# -- Leap-of-Thought ------------------------------------------------------------------------------------------------
def test_leap_processes_nearly_everything_at_first() -> None:
    modules = made(leap.Leap(), width=16)
    logp = modules["router"](normal(0, 8, 60, 16))
    assert (logp[..., 0] > logp[..., 1]).float().mean() > 0.99
    see = signals(normal(0, 8, 60, 16), modules=modules, training=True)
    assert leap.Leap(summary=False).plan(see, see.tokens).counted.float().mean() > 59


def test_leap_hands_back_what_leapt() -> None:
    method, x = leap.Leap(Capacity(2)), normal(0, 2, 6, 4)
    valid = torch.tensor([[True] * 6, [True] * 5 + [False]])
    see = signals(x, modules=made(method), valid=valid)
    plan = method.plan(see, see.tokens)
    rows = kept(plan)
    assert [len(r) for r in rows] == [4, 4]  # the class token, two, and the summary of the others
    y = plan.reduce(x)
    for b, real in enumerate((6, 5)):
        gone = [i for i in range(real) if i not in rows[b][:3]]
        assert_close(y[b, 3], x[b, gone].mean(0))
    back = plan.restore(y + 1, x)
    for b in range(2):
        for i in range(6):
            assert torch.equal(back[b, i], x[b, i] + 1 if i in rows[b][:3] else x[b, i])


def test_leap_without_any_to_leap_has_no_summary() -> None:
    x = normal(0, 1, 6, 4)
    see = signals(x, modules=made(leap.Leap()))
    plan = leap.Leap().plan(see, see.tokens)
    assert kept(plan) == [[0, 1, 2, 3, 4, 5]]
    assert torch.equal(plan.restore(plan.reduce(x), x), x)


def test_leap_mean_ignores_padding_and_takes_no_gradient() -> None:
    router = made(leap.Leap())["router"]
    x = normal(0, 1, 5, 4).requires_grad_()
    valid = torch.tensor([[True, True, True, False, False]])
    long = router(x, valid)[:, :3]
    assert_close(long, router(x[:, :3]))
    (grad,) = torch.autograd.grad(long[0, 0, 0], x)
    assert grad[0].abs().sum(-1).nonzero().flatten().tolist() == [0]


# -- all ------------------------------------------------------------------------------------------------------------
FORMS = [
    "power_bert:tokens=4", "power_bert:keep=0.5", "power_bert", "ltp:threshold=0.2,learned=false", "ltp:keep=0.5",
    "length_adaptive", "pyramid_bert:keep=0.5", "trbert", "trbert:keep=0.5", "leap", "leap:keep=0.5,summary=false",
]  # fmt: skip


def built(form: str) -> tuple[Reducer, nn.ModuleDict]:
    method = fewer.parse(form)
    modules = made(method)
    for name, p in modules.named_parameters():
        if "retention" in name:
            p.data[4:] = 0
        elif name.endswith("3.bias"):  # of leap's router, so that some leap
            p.data.zero_()
    return method, modules


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(form: str, training: bool) -> None:
    method, modules = built(form)
    training = training and method.card.name == "power_bert"  # others sample, or have no other form
    ns, place = (7, 12, 5), Place(5, 6)
    xs = [normal(i, n, 4) for i, n in enumerate(ns)]
    calls = [normal(9 + i, 1, 2, n, n) for i, n in enumerate(ns)]
    x, valid = padded(xs, 50.0)
    logits = torch.full((3, 2, 12, 12), 3.0)
    for i, (n, call) in enumerate(zip(ns, calls, strict=True)):
        logits[i, :, :n, :n] = call[0]
    see = signals(x, logits, valid, modules, training, place)
    plan = method.plan(see, see.tokens)
    for i, (n, call) in enumerate(zip(ns, calls, strict=True)):
        single = signals(xs[i][None], call, None, modules, training, place)
        own = method.plan(single, single.tokens)
        count = int(own.counted[0])
        real = n if plan.lengths is None else int(plan.lengths[i])
        assert real == count
        assert torch.equal(plan.anchor[i, :count], own.anchor[0, :count])
        assert_close(plan.reduce(x)[i, :count], own.reduce(xs[i][None])[0, :count])


@pytest.mark.parametrize("form", FORMS)
def test_permuting_tokens_permutes_who_stays(form: str) -> None:
    method, modules = built(form)
    x, logits = normal(0, 1, 9, 4), normal(1, 1, 2, 9, 9)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(8)])
    first = signals(x, logits, modules=modules, at=Place(5, 6))
    second = signals(x[:, order], logits[:, :, order][..., order], modules=modules, at=Place(5, 6))
    a, b = (method.plan(s, s.tokens).row[0] >= 0 for s in (first, second))
    assert torch.equal(a[order], b)


@pytest.mark.parametrize("form", FORMS)
def test_text_form_comes_back(form: str) -> None:
    method = fewer.parse(form)
    assert fewer.parse(fewer.text(method)) == method
    assert method.card.on == "language"


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ("ltp:temperature=0", "above 0"), ("ltp:fidelity=both", "paper or code"),
        ("ltp:soft=true,keep=0.5", "has none"),
        ("pyramid_bert:block=0", "at least one token"),
        ("trbert:hidden=0", "at least one hidden"), ("leap:hidden=0", "at least one hidden"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(form: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fewer.parse(form)


def test_defaults_are_the_papers() -> None:
    assert power_bert.PowerBert().budget == Learned()
    assert (ltp.LTP().budget, ltp.LTP().temperature) == (Threshold(0.01), 1e-3)
    assert (trbert.TRBert().layers, trbert.TRBert().hidden) == ((1, 6), 32)
    assert leap.Leap().hidden == 256
