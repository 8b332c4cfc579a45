"""DiffRate against the numbers of its authors' code, and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fewer
from fewer.core import Place, Seen, Signals, Tokens
from fewer.methods.vision.diffrate import Count, DiffRate, Learned, found
from fewer.testing.models import answer
from fewer.training import costs, losses
from vit import Golden, grouping, images, run, tiny_vit

GOLDEN = "diffrate_a"


def macs(golden: Golden, session: fewer.Session, counts: list[Any]) -> Any:
    """The authors' count: the patch embedding over all tokens, the class token included, and the head."""
    width, n = session.host.width, session.host.patches + 1
    linear = [session.host.linear_weights(i) for i in range(4)]
    rest = n * width * 8 * 8 * 3 + width * 10
    return costs.vit_macs(*costs.chain(n, counts), linear, width, rest)


def explicit(setting: dict[str, Any]) -> DiffRate:
    """Counts of blocks 1 to 3 without the class token; nothing happens in block 0."""
    pairs = zip(setting["prune_kept"][1:], setting["merge_kept"][1:], strict=True)
    return fewer.parse(found([(kp - 1, km - 1) for kp, km in pairs]), layers=(1, 2, 3))


@pytest.mark.parametrize("tag", ["e0", "e1", "e2"])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_inference_is_the_authors(library: str, tag: str) -> None:
    golden = Golden.load(GOLDEN)
    setting = next(s for s in golden.config["eval_settings"] if s["tag"] == tag)
    model = golden.model(library)
    session = fewer.apply(model, explicit(setting))
    assert_close(run(model, golden.image), golden[f"{tag}.logits"], atol=1e-4, rtol=1e-4)
    source = golden[f"{tag}.source"]
    theirs = torch.where(source.sum(1) > 0, source.argmax(1), -1)
    assert torch.equal(grouping(session.origin), grouping(theirs))
    size = golden[f"{tag}.size"]
    ours = session.last.tokens.size
    ours = torch.ones_like(size) if ours is None else ours  # nothing merged
    assert_close(ours.sort(1).values, size.sort(1).values, atol=1e-5, rtol=1e-5)
    counts = [None] + [
        (torch.tensor(float(kp)), torch.tensor(float(km)))
        for kp, km in zip(setting["prune_kept"][1:], setting["merge_kept"][1:], strict=True)
    ]
    assert macs(golden, session, counts).item() == pytest.approx(golden[f"{tag}.flops"].item(), rel=1e-6)


def learning(library: str, fidelity: str = "code") -> tuple[Golden, nn.Module, fewer.Session]:
    golden = Golden.load(GOLDEN)
    model = golden.model(library)
    session = fewer.apply(model, f"diffrate:layers=1+2+3,fidelity={fidelity}", modules="untrained")
    with torch.no_grad():
        for stage, modules in enumerate(session.modules[0]):
            for name in ("prune", "merge"):
                modules[name].logits.copy_(golden[f"t.theta_{name}{stage + 1}"])
    return golden, model, session


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_training_step_is_the_authors(library: str) -> None:
    golden, model, session = learning(library)
    model.train()
    logits = answer(model, golden.image)
    assert_close(logits, golden["t.train_logits"], atol=1e-4, rtol=1e-4)
    memory, tokens = session.last.memory[0], session.last.tokens
    for i, name in enumerate(("prune", "merge")):
        asked = [int(memory["count"][stage][i]) for stage in range(3)]
        assert asked == golden[f"t.{name}_kept"][1:].tolist()
    assert torch.equal(tokens.policy.sort(1).values, golden["t.mask"].sort(1).values)
    live = golden["t.mask"] > 0
    ours, theirs = tokens.size[tokens.policy > 0], golden["t.size"][live]
    assert_close(ours.view(2, -1).sort(1).values, theirs.view(2, -1).sort(1).values, atol=1e-5, rtol=1e-5)
    flops = macs(golden, session, [None, *memory["count"].values()])
    assert flops.item() == pytest.approx(golden["t.train_flops"].item(), rel=1e-6)
    loss = losses.flops_target(flops / 1e6, 1.0) + (logits * golden["t.loss_weight"]).sum()
    assert loss.item() == pytest.approx(golden["t.loss"].item(), rel=1e-4)
    loss.backward()
    for stage, modules in enumerate(session.modules[0]):
        for name in ("prune", "merge"):
            theirs = golden[f"t.grad_{name}{stage + 1}"]
            assert_close(
                modules[name].logits.grad, theirs, rtol=0, atol=1e-3 * theirs.abs().max().item(), msg=f"{name}{stage}"
            )


def test_training_form_equals_inference_form() -> None:
    golden, model, session = learning("transformers", fidelity="paper")
    with torch.no_grad():
        gathered = answer(model, golden.image)
        assert session.counts == [50, *golden["t.merge_kept"][1:].tolist()]
        session.mask_eps = 0.0
        model.train()
        masked = answer(model, golden.image)
    assert_close(masked, gathered, atol=1e-5, rtol=1e-5)


def test_learned_counts_become_a_method_without_modules() -> None:
    golden, model, session = learning("transformers")
    learned = run(model, golden.image)
    pairs = [(m["prune"].number, m["merge"].number) for m in session.modules[0]]
    session.remove()
    method = fewer.parse(found(pairs), layers=(1, 2, 3))
    with fewer.apply(model, fewer.parse(fewer.text(method))) as plain:
        assert torch.equal(run(model, golden.image), learned)
        assert len(list(plain.modules.parameters())) == 0


@pytest.mark.parametrize("case", [0, 1])
def test_the_merge_is_the_authors(case: int) -> None:
    golden = Golden.load("diffrate_merge")
    setting = golden.config["cases"][case]
    x, n, kept = golden[f"c{case}.x"], setting["N"], setting["kept"]
    tokens = Tokens.plain(x.shape[0], n, 1)
    falling = torch.linspace(0, -5, n).expand(x.shape[0], 1, n)[..., None]  # rank by position, as x is sorted
    q = torch.ones(x.shape[0], 1, n, 1)
    at = Place(start=n - 1)
    signals = Signals(x, tokens, at, Seen(q, falling, falling, 1.0))
    plan = DiffRate(budget=fewer.Capacity(kept - 1)).plan(signals, tokens)
    assert_close(plan.reduce(x), golden[f"c{case}.merged"], atol=1e-5, rtol=1e-5)
    assert_close(plan.extra_mass, golden[f"c{case}.best_sim"], atol=1e-5, rtol=1e-5)
    assert (plan.to > 0).all()  # nobody joins the class token


def test_a_count_is_its_expectation_rounded_up() -> None:
    count = Count(9, 4)
    assert count.candidates == (9, 5, 1)
    with torch.no_grad():
        count.logits.copy_(torch.tensor([0.2, 0.5, 0.3]).log())
    assert count().item() == 5  # 1.8 + 2.5 + 0.3 = 4.6
    assert count.number == 5
    assert_close(count.survival(10), torch.tensor([1.0] + [0.7] * 4 + [0.2] * 4 + [0.0]))
    count().backward()
    p, c = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([9.0, 5, 1])
    assert_close(count.logits.grad, p * (c - (p * c).sum()))


def test_the_number_follows_the_logits() -> None:
    count = Count(8, 1)
    before = count.number
    with torch.no_grad():
        count.logits[0] += 100
    assert (before, count.number) == (5, 8)
    count.load_state_dict({"logits": torch.tensor([0.0] * 7 + [100.0])})
    assert count.number == 1


def test_flops_alone_reach_their_target_and_every_count() -> None:
    model = tiny_vit("vit").train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    session = fewer.apply(model, "diffrate:layers=1+2+3,granularity=1", modules="untrained")
    linear = [session.host.linear_weights(i) for i in range(4)]
    optimizer = torch.optim.Adam(session.modules.parameters(), lr=0.05)
    full = costs.vit_macs([17] * 4, [17] * 4, linear, 32, 0)
    for _ in range(60):
        answer(model, images(2))
        counts = [None, *session.last.memory[0]["count"].values()]
        now = costs.vit_macs(*costs.chain(17, counts), linear, 32, 0) / full
        losses.flops_target(now, 0.8).backward()
        optimizer.step()
        assert all(p.grad.abs().sum() > 0 for p in session.modules.parameters())
        optimizer.zero_grad()
    assert abs(now.item() - 0.8) < 0.05


def test_counts_never_grow_and_their_gradient_stays_in_its_block() -> None:
    a, b = (torch.tensor([v, w], requires_grad=True) for v, w in ((12.0, 10.0), (20.0, 15.0)))
    attention, mlp = costs.chain(17, [None, tuple(a), tuple(b)])
    assert [int(x) for x in attention] == [17, 17, 10]
    assert [int(x) for x in mlp] == [17, 10, 10]
    mlp[2].backward()
    assert a.grad is None
    assert b.grad.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"granularity": 0}, "granularity=0"), ({"pruned": (0,)}, "pruned"), ({"fidelity": "x"}, "fidelity")],
)
def test_parameters_out_of_range_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DiffRate(**wrong)


def test_only_learned_counts_need_modules() -> None:
    assert set(DiffRate().modules(8, 2, 1, 16)) == {"prune", "merge"}
    assert DiffRate(budget=fewer.Remove(2)).modules(8, 2, 1, 16) == {}
    assert DiffRate().budget == Learned()
