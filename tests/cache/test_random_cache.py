"""The baseline of the caches: what it protects, and that its draw knows nothing but seed, layer and place."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import fewer
from decoders import decoder, prompt
from fewer.compat import cached
from fewer.core.budgets import BudgetError

FORM = "random_cache:keep=0.5,sinks=2,recent=3"


def kept(form: str, ids: torch.Tensor, mask: torch.Tensor | None = None, layer: int = 1) -> torch.Tensor:
    model = decoder("llama")
    place = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), fewer.apply(model, form) as session:
        model(ids, attention_mask=mask, position_ids=place, **cached(model, DynamicCache(config=model.config)))
        return session.kept(layer)


def test_half_the_rows_stay_the_same_for_all_heads_with_sinks_and_newest():
    rows = kept(FORM, prompt(40)[0])
    assert rows.shape == (1, 2, 20)
    assert torch.equal(rows[:, 0], rows[:, 1])
    assert rows[0, 0, :2].tolist() == [0, 1]
    assert rows[0, 0, -3:].tolist() == [37, 38, 39]


def test_layers_and_seeds_draw_differently_and_the_text_does_not_matter():
    first = kept(FORM, prompt(40)[0])
    assert torch.equal(first, kept(FORM, prompt(40, seed=5)[0]))
    assert not torch.equal(first, kept(FORM, prompt(40)[0], layer=2))
    assert not torch.equal(first, kept(FORM + ",seed=1", prompt(40)[0]))


def test_padding_does_not_change_the_draw():
    ids, mask = prompt(40, 24)
    both = kept(FORM, ids, mask)
    alone = kept(FORM, ids[1:, -24:])
    inside = both[1, 0][both[1, 0] >= 16] - 16
    assert inside.tolist() == alone[0, 0].tolist()


def test_the_draw_is_even():
    """Every row between the protected ones is as likely to stay as any other."""
    stays = torch.zeros(40)
    for seed in range(60):
        stays[kept(f"{FORM},seed={seed}", prompt(40)[0])[0, 0]] += 1
    middle = stays[2:37] / 60
    assert abs(middle.mean().item() - 15 / 35) < 1e-6
    assert middle.min() > 0.2
    assert middle.max() < 0.7


def test_a_budget_below_what_is_protected_is_refused():
    with pytest.raises(BudgetError, match="less than the 5 rows that always stay"):
        fewer.apply(decoder("llama"), "random_cache:tokens=4,sinks=2,recent=3")
    with pytest.raises(BudgetError, match="recent=-1 is negative"):
        fewer.parse("random_cache:recent=-1")
