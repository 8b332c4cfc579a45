"""The recipe that trains the encoder methods: its parts by hand, and each method on a model small enough for a test."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification

import fewer
from fewer.datasets.texts import Encoded
from fewer.recipes.encode import (
    Encode,
    Found,
    evolve,
    frontier,
    hull,
    matched,
    mutated,
    nucleus,
    saliency,
    train,
)  # fmt: skip
from fewer.runtime.modules import read_card
from fewer.training import losses


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=2,
    )).eval()  # fmt: skip


def texts(count: int, seed: int) -> Encoded:
    """Noise, and one word that tells the class."""
    draws = torch.Generator().manual_seed(seed)
    labels, rows = torch.arange(count) % 2, []
    for label in labels.tolist():
        row = torch.randint(6, 30, (int(torch.randint(7, 14, (), generator=draws)),), generator=draws)
        row[0], row[-1], row[3] = 1, 2, 4 + label
        rows.append(row)
    return Encoded(rows, labels)


def run(method: str, out: Path, **changes: object):
    net, lines = bert(), []
    recipe = Encode(method, length=16, **{"steps": 3, "batch": 6, "held": 8, "rounds": 1} | changes)
    report = train(recipe, out, model=(net, Tokenizer()), data=(texts(30, 0), texts(9, 1)), log=lines.append)
    assert len(lines) >= len(report.scores)
    return net, report


class Tokenizer:
    def save_pretrained(self, out: Path) -> None:
        (out / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("form", ["power_bert", "ltp:threshold=0.1", "trbert:layers=1+2", "leap"])
def test_modules_learn_and_the_model_does_not(form: str, tmp_path: Path) -> None:
    net, report = run(form, tmp_path)
    for name, value in bert().state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    assert all(p.requires_grad for p in net.parameters())
    assert not net.training
    assert set(report.scores) == {"unreduced", form.partition(":")[0], "untrained", "random", "ends", "cls_topk"}
    assert report.scores["unreduced"].tokens == 1
    assert report.lines[-1]["step"] == 3
    card = read_card(tmp_path / f"{form.partition(':')[0]}.safetensors")
    assert card["method"] == form
    assert '"steps": 3' in card["recipe"]
    assert "unreduced" in card["scores"]
    with fewer.apply(net, form, modules=tmp_path) as session, fewer.apply(bert(), form, modules="untrained") as fresh:
        assert sum(p.numel() for p in session.modules.parameters()) == report.parameters
        pairs = list(zip(session.modules.parameters(), fresh.modules.parameters(), strict=True))
        assert any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "form",
    ["power_bert", "ltp:threshold=0.1", "pyramid_bert:keep=0.6", "length_adaptive", "trbert:layers=1", "leap"],
)
def test_the_model_learns_where_asked(form: str, tmp_path: Path) -> None:
    net, _ = run(form, tmp_path, backbone=1e-3)
    moved = [name for name, p in net.state_dict().items() if not torch.equal(bert().state_dict()[name], p)]
    assert any("encoder.layer.0" in name for name in moved)
    assert any("classifier" in name for name in moved)
    assert (tmp_path / "model.safetensors").is_file()


def test_more_price_keeps_less(tmp_path: Path) -> None:
    """Of what blocks retain, and of what thresholds let pass."""
    kept = [run("power_bert", tmp_path, price=price, lr=0.1, steps=8)[1].found for price in (0.0, 1.0)]
    first, second = ([int(c) for c in form.removeprefix("power_bert:tokens=").split("+")] for form in kept)
    assert sum(second) < sum(first)
    assert all(a >= b for a, b in itertools.pairwise(second))
    soft = [run("ltp:threshold=0.1", tmp_path, price=price, lr=0.01, steps=8)[1].lines[-1]["m2"] for price in (0, 1)]
    assert soft[1] < soft[0]


def test_a_huge_price_leaves_trbert_the_class_token(tmp_path: Path) -> None:
    _, report = run("trbert:layers=1", tmp_path, price=100.0, lr=0.05, steps=40, guided=0.0)
    assert report.lines[-1]["kept"] < 0.2


def test_search_needs_no_training(tmp_path: Path) -> None:
    _, report = run("length_adaptive", tmp_path, target=0.6)
    costs, scores = [f.cost for f in report.frontier], [f.score for f in report.frontier]
    assert costs == sorted(costs)
    assert scores == sorted(scores)
    assert report.method.startswith("length_adaptive:keep=")
    assert fewer.parse(report.method).budget.of == "start"


def test_wrong_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has nothing to learn but the model itself: set backbone"):
        run("pyramid_bert", tmp_path)
    with pytest.raises(ValueError, match="tome is not trained here; these are: power_bert"):
        run("tome", tmp_path)
    for changes, says in (
        ({"steps": 0}, "at least 1"), ({"second": 1.0}, r"\[0, 1\)"), ({"drop": 0.0}, r"\(0, 1\)"),
        ({"trajectories": 1}, "at least 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            Encode(**changes)


# -- the parts --------------------------------------------------------------------------------------------------------
def test_reinforce_by_hand() -> None:
    nll = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    reward = torch.tensor([1.0, 3.0, 5.0, 5.0], requires_grad=True)
    loss = losses.reinforce(nll, reward, 2)
    assert_close(loss, torch.tensor((-1 * 1 + 1 * 2 + 0 * 3 + 0 * 4) / 4))
    loss.backward()
    assert_close(nll.grad, torch.tensor([-0.25, 0.25, 0.0, 0.0]))  # the better action becomes likelier
    assert reward.grad is None


def test_saliency_is_the_gradient_times_the_features() -> None:
    net, batch = bert().requires_grad_(False), texts(4, 3).batch()
    at_0, at_2 = saliency(net, batch, (0, 2))
    assert at_0.shape == at_2.shape == batch["input_ids"].shape
    step = 1e-3
    block = net.bert.encoder.layer[2]
    inputs = {k: v for k, v in batch.items() if k != "labels"}

    def loss(scale: float) -> torch.Tensor:
        """With token 3 of every text scaled at the entry of the last block."""

        def scaled(_m, args):
            x = args[0].clone()
            x[:, 3] *= scale
            return (x, *args[1:])

        hook = block.register_forward_pre_hook(scaled)
        with torch.no_grad():
            value = nn.functional.cross_entropy(net(**inputs).logits.double(), batch["labels"], reduction="none")
        hook.remove()
        return value

    slope = (loss(1 + step) - loss(1 - step)) / (2 * step)
    assert_close(at_2[:, 3].double(), slope.abs(), atol=1e-4, rtol=1e-2)
    assert not any(p.requires_grad for p in net.parameters())
    assert not block._forward_pre_hooks


def test_nucleus_by_hand() -> None:
    salient = torch.tensor([[0.5, 0.3, 0.2, 9.0]]).log()
    valid = torch.tensor([[True, True, True, False]])
    for mass, want in ((0.4, [0]), (0.5, [0]), (0.6, [0, 1]), (0.79, [0, 1]), (0.9, [0, 1, 2]), (1.0, [0, 1, 2])):
        assert nucleus(salient, valid, mass)[0].nonzero().flatten().tolist() == want


def test_frontier_and_its_hull() -> None:
    points = [Found((i,), cost, score) for i, (cost, score) in
              enumerate([(1, 1), (2, 1.5), (3, 4), (3, 3), (4, 3.9), (5, 5)])]  # fmt: skip
    assert [f.gene for f in frontier(points)] == [(0,), (1,), (2,), (5,)]
    assert [f.gene for f in hull(frontier(points))] == [(0,), (2,), (5,)]


def test_mutations_never_grow() -> None:
    draws, gene = random.Random(0), (30, 22, 15, 9)
    seen = {mutated(gene, 31, draws) for _ in range(200)}
    assert len(seen) > 50
    for new in seen:
        assert list(new) == sorted(new, reverse=True)
        assert new[-1] >= 2
        assert new[0] <= 31


def test_evolution_finds_the_block_that_matters_and_tries_nothing_twice() -> None:
    tried: list[tuple[int, ...]] = []

    def score(gene: tuple[int, ...]) -> float:
        tried.append(gene)
        return min(gene[1], 20) / 20  # only the second block's length matters, up to 20

    found = evolve(score, lambda gene: sum(gene) / 120, 4, 30, 0.5, rounds=8)
    assert len(tried) == len(set(tried))
    assert all(list(f.gene) == sorted(f.gene, reverse=True) for f in found)
    best = next(f for f in found if f.score == 1)
    assert best.gene[1] == 20
    assert best.cost < 0.55  # the constant shares reach that score no cheaper than 0.67


def test_matched_has_the_same_mean() -> None:
    for rows in (
        [(1, 0.8), (0.8, 0.4), (0.4, 0.1)],
        [(1, 1), (0.3, 0.3), (0.3, 0.3)],
        [(0.5, 0.5), (0.2, 0.2), (0.6, 0.6)],
    ):
        shares = matched(rows)
        assert list(shares) == sorted(shares, reverse=True)
        mine = 1 + sum(shares[:-1]) + sum(shares)
        assert mine == pytest.approx(sum(a + m for a, m in rows), abs=2e-3)
