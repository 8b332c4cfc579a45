"""The distance probe: contributions add up to the logit, and planted heads are found."""

from __future__ import annotations

import json

import pytest
import torch
from torch.testing import assert_close

from decoders import VOCAB, decoder, prompt
from fewer import hosts
from fewer.core.plan import PlanError
from fewer.core.rope import Rotary, pair_logits, slow_pairs
from fewer.evaluation import distance
from fewer.evaluation.distance import Reach, control, probe, spearman, token_losses

SMALL = Reach(near=8, far=24, pairs=200, rows=8)


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    return torch.cat([prompt(48, seed=s)[0] for s in range(2)])


def test_contributions_are_the_formula_and_their_sum_is_the_logit():
    torch.manual_seed(0)
    q, k = torch.randn(50, 8), torch.randn(50, 8)
    rotary = Rotary(torch.tensor([1.0, 0.3, 0.05, 0.001]))
    m, n = torch.arange(50) * 7 % 90, torch.arange(50) * 3 % 40
    turned_q, turned_k = rotary.turn(q, m), rotary.turn(k, n)
    c = pair_logits(turned_q, turned_k, scale=0.5)
    assert_close(c.sum(-1), (turned_q * turned_k).sum(-1) * 0.5)
    pair_q, pair_k = (torch.complex(*x.double().unflatten(-1, (2, 4)).unbind(-2)) for x in (q, k))
    phi = (pair_q * pair_k.conj()).angle()
    expected = pair_q.abs() * pair_k.abs() * (phi + (m - n)[:, None] * rotary.frequencies.double()).cos() * 0.5
    assert_close(c, expected.float(), atol=1e-5, rtol=1e-5)


def test_an_interleaved_reading_of_the_pairs_is_another_thing():
    q, k = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4)
    assert pair_logits(q, k).tolist() == [4.0, 6.0]  # channels 0 and 2, 1 and 3
    with pytest.raises(PlanError, match="even number"):
        pair_logits(torch.ones(3), torch.ones(3))


def test_slow_pairs_do_not_come_around_once():
    assert slow_pairs(torch.tensor([1.0, 0.07, 0.06]), 100).tolist() == [False, False, True]  # 2 pi / 100 = 0.0628


def test_rank_correlation_against_a_library_and_by_hand():
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    x, y = torch.randint(0, 9, (3, 40)).float(), torch.randn(3, 40)  # x has ties
    expected = torch.tensor([stats.spearmanr(a, b).statistic for a, b in zip(x.numpy(), y.numpy(), strict=True)])
    assert_close(spearman(x, y), expected.float())
    assert spearman(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 10, 100])).item() == pytest.approx(1)
    assert spearman(torch.ones(4), torch.randn(4)).item() == 0  # a pair that is never used follows nothing


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_planted_head_of_one_slow_pair_ranks_first(family: str, texts: torch.Tensor):
    """One query head is left with its slowest pair; it must lead, with that pair, on models with query norms too."""
    model, layer, head = decoder(family), 1, 2  # gemma3: the layer that is no window
    part = model.model.layers[layer].self_attn
    width = part.head_dim
    saved = part.q_proj.weight.detach().clone()
    keep = torch.zeros(width, 1)
    keep[[width // 2 - 1, width - 1]] = 1  # half-split: the slowest pair is the last channel of either half
    try:
        rows = slice(head * width, (head + 1) * width)
        part.q_proj.weight.data[rows] *= keep
        found = probe(model, texts, SMALL)
    finally:
        part.q_proj.weight.data.copy_(saved)
    assert found.slow[layer, head].item() == pytest.approx(1, abs=1e-4)
    assert found.slow[layer].argmax() == head
    assert found.far[layer, head, -1].item() == pytest.approx(1, abs=1e-4)
    assert found.far[layer, head, :-1].abs().max() == 0
    assert found.score[layer].argmax() == head
    assert found.score.shape == (3, 4)


def test_far_attention_is_what_the_model_gives(texts: torch.Tensor):
    model = decoder("llama")
    found = probe(model, texts[:1], SMALL)
    model.set_attn_implementation("eager")
    try:
        weights = model(texts[:1], output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    late = torch.linspace(SMALL.far + distance.SINKS, 47, SMALL.rows).long()
    for layer, p in enumerate(weights):
        expected = torch.stack([p[0, :, m, distance.SINKS : m - SMALL.far + 1].sum(-1) for m in late]).mean(0)
        assert_close(found.reach[layer], expected, atol=1e-5, rtol=1e-4)


def test_pairs_are_near_or_far_and_never_sinks():
    queries, keys = SMALL.drawn(60, torch.Generator().manual_seed(0))
    gap = queries - keys
    assert 1 <= gap[0].min() <= gap[0].max() < SMALL.near
    assert gap[1].min() >= SMALL.far
    assert keys.min() == distance.SINKS
    assert queries.max() == 59
    with pytest.raises(ValueError, match="lower far"):
        SMALL.drawn(28, torch.Generator())
    with pytest.raises(ValueError, match="near <= far"):
        Reach(near=9, far=8)


def test_silencing_is_zeroing_the_columns_of_the_output_projection(texts: torch.Tensor):
    model = decoder("llama")
    ours = token_losses(model, texts, [(1, 3), (2, 0)])
    saved = {layer: model.model.layers[layer].self_attn.o_proj.weight.detach().clone() for layer in (1, 2)}
    plain = token_losses(model, texts)
    try:
        model.model.layers[1].self_attn.o_proj.weight.data[:, 24:32] = 0
        model.model.layers[2].self_attn.o_proj.weight.data[:, 0:8] = 0
        expected = token_losses(model, texts)
    finally:
        for layer, weight in saved.items():
            model.model.layers[layer].self_attn.o_proj.weight.data.copy_(weight)
    assert_close(ours, expected)
    assert not torch.allclose(ours, plain)
    assert_close(plain[0].mean(), model(texts[:1], labels=texts[:1]).loss.detach())


def test_the_control_comes_from_the_same_layers_and_spares_the_found():
    found = [(0, 1), (0, 2), (2, 3)]
    drawn = control(found, 4, seed=1)
    assert sorted(layer for layer, _ in drawn) == [0, 0, 2]
    assert not set(drawn) & set(found)
    assert drawn == control(found, 4, seed=1)
    assert len({tuple(control(found, 4, seed)) for seed in range(20)}) > 1
    crowded = control([(0, 0), (0, 1), (0, 2), (1, 0)], 4, seed=0)  # layer 0 has one head left
    assert len(set(crowded)) == 4
    assert {(layer, head) for layer, head in crowded} == {(0, 3), (1, 1), (1, 2), (1, 3)}


def test_the_report_says_what_was_done_and_leaves_the_model_alone(texts: torch.Tensor):
    model = decoder("llama")
    before = model(texts).logits
    report = distance.run(model, texts, heads=2, draws=2, reach=SMALL)
    assert torch.equal(model(texts).logits, before)
    assert [a.name for a in report.ablations] == ["positional", "random 0", "random 1"]
    assert report.ablations[0].heads == tuple(report.distance.heads(2))
    told = report.plain()
    assert told["loss"]["late"] == pytest.approx(token_losses(model, texts)[:, SMALL.far - 1 :].mean().item(), abs=1e-4)
    assert len(told["far"]) == 3
    assert [line.split(",")[0].strip() for line in report.lines()[-3:]] == ["positional", "random 0", "random 1"]
    with pytest.raises(ValueError, match="half of the model's 12"):
        distance.run(model, texts, heads=7, reach=SMALL)


def test_models_without_rotary_positions_are_refused(texts: torch.Tensor):
    with pytest.raises(hosts.HostError, match="rotary positions"):
        probe(decoder("gpt2"), texts, SMALL)


def test_passages_do_not_overlap_and_reach_the_end():
    found = distance.passages(torch.arange(100), 3, 20)
    assert found[:, 0].tolist() == [0, 40, 80]
    assert found[-1, -1] == 99
    with pytest.raises(ValueError, match="the text has 100"):
        distance.passages(torch.arange(100), 6, 20)


def test_the_command_line_finds_silences_and_writes(tmp_path, monkeypatch: pytest.MonkeyPatch):
    from typer.testing import CliRunner

    from fewer import cli
    from fewer.datasets import texts as shelf

    words = torch.randint(3, VOCAB, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    monkeypatch.setattr(cli.distance, "load", lambda name: (decoder("llama"), lambda text, **_: {"input_ids": words}))
    monkeypatch.setattr(shelf, "book", lambda name: name)
    path = tmp_path / "deep" / "distance.json"
    size = ["--texts", "2", "--length", "48", "--near", "8", "--far", "24", "--heads", "2", "--draws", "1"]
    result = CliRunner().invoke(cli.app, ["probe", "distance", "--repeat", *size, "--out", str(path), "--threads", "0"])
    assert result.exit_code == 0, result.output
    assert "positional, 2 heads silenced" in result.output
    told = json.loads(path.read_text())
    assert (told["texts"], told["tokens"], told["model"], told["repeat"]) == (2, 48, "smollm2-135m", True)
    assert [a["name"] for a in told["ablations"]] == ["positional", "random 0"]
