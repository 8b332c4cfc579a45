"""The layer search of VTW on a small model."""

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.recipes.withdraw import search_layer
from llava import prompt, tiny_llava


def test_divergence_by_hand_and_the_first_layer_below_the_limit():
    model, inputs = tiny_llava(), [prompt(seed=i) for i in range(2)]
    found = search_layer(model, inputs, eta=0.0, first=1)
    assert sorted(found.divergence) == [1, 2, 3]
    assert found.k == 4  # nothing is free
    with torch.no_grad():
        for k, value in found.divergence.items():
            total = 0.0
            for given in inputs:
                full = model(**given).logits[0, -1].double().log_softmax(-1)
                with fewer.apply(model, "vtw", k=k):
                    without = model(**given).logits[0, -1].double().log_softmax(-1)
                total += float((without.exp() * (without - full)).sum())
            assert value == pytest.approx(total / 2, rel=1e-3, abs=1e-8)
    limit = sorted(found.divergence.values())[1]
    want = min(k for k, value in found.divergence.items() if value <= limit)
    assert search_layer(model, inputs, eta=limit, first=1).k == want


def test_padding_behind_a_prompt_is_not_its_end():
    model, given = tiny_llava(), prompt()
    padded = dict(given)
    padded["input_ids"] = torch.cat([given["input_ids"], torch.zeros(1, 3, dtype=torch.long)], 1)
    padded["attention_mask"] = torch.cat([given["attention_mask"], torch.zeros(1, 3, dtype=torch.long)], 1)
    a, b = (search_layer(model, [x], first=2).divergence for x in (given, padded))
    assert_close(torch.tensor(list(a.values())), torch.tensor(list(b.values())), atol=1e-6, rtol=1e-3)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="empty"):
        search_layer(tiny_llava(), [])
    with pytest.raises(ValueError, match="first=9"):
        search_layer(tiny_llava(), [prompt()], first=9)
