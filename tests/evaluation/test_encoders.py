"""The bench on text encoders: the same rows as for pictures, counted in tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertModel

from fewer.core import Site
from fewer.datasets.texts import Encoded
from fewer.evaluation import bench
from fewer.evaluation.bench import Settings, against_random
from fewer.evaluation.encoders import TextSubject, every_block
from fewer.evaluation.subject import SubjectError

CONFIG = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 32, "attn_implementation": "sdpa",
}  # fmt: skip


def encoded(count: int = 12) -> Encoded:
    """Rows of 10 to 21 tokens, longest first."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 50, (10 + i,), generator=generator) for i in range(count)]
    return Encoded(rows, torch.arange(count) % 3, 0, "noise", ("a", "b", "c")).by_length()


def subject(head: bool = True, **changes: object) -> TextSubject:
    torch.manual_seed(0)
    model = (
        BertForSequenceClassification(BertConfig(num_labels=3, **CONFIG)) if head else BertModel(BertConfig(**CONFIG))
    )
    return TextSubject(model.eval(), None, encoded(), "tiny", 4, **changes)


def test_rows_of_a_bench(tmp_path: Path) -> None:
    settings = Settings(methods=("random:keep=0.5,layers=none", "length_adaptive:keep=0.5"), batch=4, repeats=2)
    whole, drawn, ranked = bench.run(settings, tmp_path, subject=subject())
    assert not drawn.error + ranked.error
    assert (whole.passport.unit, whole.n, whole.tokens_full) == ("texts", 12, 17)
    assert whole.tokens == pytest.approx((21 + 17 + 13) / 3)  # longest of each batch of four
    assert whole.agreement == 1.0
    assert whole.kl == 0.0
    assert whole.code == "model(input_ids, attention_mask)"
    for row in (drawn, ranked):
        assert row.cost.ceiling > 1.4
        assert row.counts[0] == pytest.approx(row.counts[1] * 2, rel=0.25)
        assert row.cost.gflops < 0.7 * whole.cost.gflops
        assert row.difference is not None
    assert against_random(ranked, [whole, drawn, ranked], within=0.2) is not None


def test_padding_does_not_change_a_score() -> None:
    made = subject()
    together = torch.cat([made.answer(made.model, inputs) for _, inputs in made])
    alone = torch.cat(
        [made.answer(made.model, {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]})
         for row in made.data.rows]
    )  # fmt: skip
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_model_without_a_head_is_scored_by_neighbours_of_its_real_tokens() -> None:
    made = subject(head=False)
    assert not made.classifies
    assert made.score == "3-NN accuracy"
    inputs = made.pixels(0)
    answers: Tensor = made.answer(made.model, inputs)
    rows = made.model(**inputs).last_hidden_state
    torch.testing.assert_close(answers[3], rows[3, :18].mean(0))  # lengths 21, 20, 19, 18


def test_default_methods_keep_what_they_say() -> None:
    forms = subject().default_methods()
    assert sum(form.startswith("random:") for form in forms) == 2
    assert any(form.startswith("pyramid_bert:") for form in forms)


@pytest.mark.parametrize("site", [Site.BEFORE_BLOCK, Site.MID_BLOCK, Site.AFTER_BLOCK])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_every_block(site: Site, share: float) -> None:
    p, n, seen = every_block(share, 6, site), 1.0, []
    for _ in range(6):
        n = n * p if site is Site.BEFORE_BLOCK else n
        seen.append(n)  # attention
        n = n * p if site is Site.MID_BLOCK else n
        seen.append(n)  # MLP
        n = n * p if site is Site.AFTER_BLOCK else n
    assert sum(seen) / 12 == pytest.approx(share, abs=2e-4)


def test_inner_layers_are_not_read() -> None:
    with pytest.raises(SubjectError, match="layer=1"):
        subject(layer=1)
