"""Methods that look into the vision tower, on whole models: budgets counted, batches, and everything kept."""

from functools import cache

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.testing.vision_language import prompts, tiny_vlm

METHODS = ("fastervlm", "vispruner", "visionzip", "prumerge", "hired", "globalcom", "holov", "vscan")
MORE = {"vscan": ",window=2,shallow=0"}
MODELS = ("llava", "llava_next")
# A learned row behind each line of cells stays: of two rows of crops, four lines each.
SEPARATORS = {"llava": 0, "llava_next": 8}


@cache
def model(name):
    return tiny_vlm(name)


def run(name, spec, inputs):
    with fewer.apply(model(name), spec) as session, torch.no_grad():
        return model(name)(**inputs).logits, session.counts


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_asked_is_what_the_language_model_reads(name, method):
    inputs = prompts(model(name), [1])
    visual = int((inputs["input_ids"] == model(name).config.image_token_id).sum())
    full, layers = run(name, f"{method}:tokens=4000{MORE.get(method, '')}", inputs)
    with torch.no_grad():
        assert_close(full, model(name)(**inputs).logits)
    for count in (1, 5, 11):
        _, short = run(name, f"{method}:tokens={count}{MORE.get(method, '')}", inputs)
        gone = [a - b for a, b in zip(layers, short, strict=True)]
        assert gone == [visual - SEPARATORS[name] - count] * len(layers)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [*METHODS, "prumerge:plus=true", "fastervlm:per=tile"])
def test_a_batch_changes_nothing(name, method):
    spec = method if method == "prumerge" or "plus" in method else f"{method}{',' if ':' in method else ':'}tokens=5"
    spec += MORE.get(method, "")
    together, _ = run(name, spec, prompts(model(name), [1, 2]))
    alone, _ = run(name, spec, prompts(model(name), [1]))
    assert_close(together[0, -1], alone[0, -1], atol=1e-4, rtol=1e-4)
