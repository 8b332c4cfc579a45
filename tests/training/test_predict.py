"""Training TokenButler's predictor: the truth it learns, what it comes to, and where it is found again."""

from __future__ import annotations

import json

import pytest
import torch
from torch.testing import assert_close

import fewer
from decoders import VOCAB, decoder, prompt
from fewer import hosts
from fewer.methods.language.tokenbutler import Butler
from fewer.recipes import predict
from fewer.recipes.predict import Passage, Prediction, loss_of, measure, read
from fewer.runtime import modules as trained

TINY = Prediction(steps=60, length=96, rows=24, reuse=3, pool=6, lr=5e-3, test=3)


def text_ids(tokens: int) -> torch.Tensor:
    """A text with a habit, so that there is something to predict: rare tokens come back."""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCAB, (tokens,), generator=rng).where(torch.rand(tokens, generator=rng) < 0.7, 5)


def butler_for(model: torch.nn.Module) -> tuple[hosts.DecoderHost, Butler]:
    host = hosts.find(model)
    assert isinstance(host, hosts.DecoderHost)
    torch.manual_seed(0)
    return host, Butler(host.channels, host.heads, host.kv_heads, len(host.blocks), hidden=32, channels=8)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_the_truth_is_what_the_models_own_attention_uses(family: str):
    model, ids = decoder(family), prompt(11)[0][0]
    host, _ = butler_for(model)
    passage = read(host, ids)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = model(ids[None], output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    future = torch.arange(11) > torch.arange(11)[:, None]
    ours = passage.logits(torch.arange(11)).masked_fill(future, float("-inf")).softmax(-1)
    for layer, p in enumerate(weights):
        assert_close(ours[layer], p[0], atol=1e-5, rtol=1e-4)
    assert passage.entry.shape == (1, 11, 32)


def test_the_loss_counts_causal_pairs_and_no_others():
    host, butler = butler_for(decoder("llama"))
    passage, rows = read(host, prompt(9)[0][0]), torch.tensor([0, 4, 8])
    asked, kept = butler(passage.entry)
    total, pairs = 0.0, 0
    for layer in range(3):
        for head in range(4):
            for i in rows.tolist():
                for j in range(i + 1):
                    z = asked[0, layer, head, i] @ kept.important[0, layer, head // 2, j] / butler.channels**0.5
                    truth = passage.q[layer, head, i] @ passage.k[layer, head // 2, j] * passage.scale
                    total, pairs = total + (z - truth).item() ** 2, pairs + 1
    loss = loss_of(butler, passage, rows)
    assert loss.item() == pytest.approx(total / pairs, rel=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in butler.parameters())
    shifted = Passage(passage.entry, passage.q, passage.k, passage.scale)
    assert loss_of(butler, shifted, rows, centred=True) <= loss


def test_the_oracle_finds_everything_and_random_its_share():
    """A predictor that gives the true logits has recall 1; measured with one that does, by construction."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 64, 8), torch.randn(2, 2, 64, 8)
    passage = Passage(torch.zeros(1, 64, 4), q, k, 0.35)

    class Knows(Butler):
        def forward(self, x, past=None, real=None):
            from fewer.methods.language.tokenbutler import Remembered

            return q[None] * 0.35 * 8**0.5, Remembered((k, k), k[None])

    found = measure(Knows(16, 4, 2, 2, channels=8), [passage], keeps=(0.5, 0.25), rows=8)
    assert found["recall@0.5"]["predictor"] == [pytest.approx(1)]
    assert found["mass@0.25"]["predictor"] == pytest.approx(found["mass@0.25"]["oracle"])
    assert found["recall@0.5"]["random"][0] == pytest.approx(0.55, abs=0.1)  # sinks are always in
    for keep in ("0.5", "0.25"):
        oracle = found[f"mass@{keep}"].pop("oracle")[0]
        assert all(v[0] <= oracle + 1e-6 for v in found[f"mass@{keep}"].values())


def test_page_bounds_are_bounds_and_shared_by_a_page():
    torch.manual_seed(0)
    passage = Passage(torch.zeros(1, 40, 4), torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8), 1.0)
    at = torch.tensor([20, 39])
    bound = predict._pages(passage, at, 2)
    logits = passage.logits(at)
    assert (bound[..., :16] >= logits[..., :16]).all()
    assert (bound[..., :16] == bound[..., :1]).all()
    assert bound[:, :, 0, 16:32].isinf().all()  # query 20 stands in the second page, 39 in the third, which is short
    assert bound[:, :, 1, 32:].isinf().all()
    assert bound.shape == (2, 2, 2, 40)


def test_a_trained_predictor_beats_random_and_is_found_again(tmp_path):
    model, ids = decoder("llama"), text_ids(3000)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lines: list[str] = []
    report = predict.train(TINY, tmp_path, model=(model, None), ids=ids, log=lines.append)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    recall, mass = report.results["recall@0.5"], report.results["mass@0.25"]
    assert recall["predictor"] > max(recall["random"], recall["newest"]) + 0.03
    assert mass["predictor"] > max(mass["random"], mass["newest"]) + 0.03
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [25, 50, 60]
    assert rows[-1]["loss"] < rows[0]["loss"]
    card = trained.read_card(tmp_path / "tokenbutler.safetensors")
    assert json.loads(card["recipe"])["steps"] == 60
    assert json.loads(card["results"]) == report.results
    with fewer.apply(model, "tokenbutler:keep=0.25", modules=tmp_path) as session:
        model.generate(prompt(20)[0], max_new_tokens=3)
        assert session.ledger.read[1:] == [6, 6]  # a quarter of 22, rounded up
    again = predict.train(TINY, tmp_path, model=(model, None), ids=ids, log=lines.append)
    assert again.results == report.results


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="longer text"):
        predict.train(TINY, tmp_path, model=(decoder("llama"), None), ids=text_ids(60))
    with pytest.raises(ValueError, match="at least 1"):
        Prediction(reuse=0)
    with pytest.raises(ValueError, match="32 tokens"):
        Prediction(length=8)
    from fewer.models.zoo import load_model

    with pytest.raises(hosts.HostError, match="decoder"):
        predict.train(TINY, tmp_path, model=load_model("vit-fashion"), ids=text_ids(3000))
