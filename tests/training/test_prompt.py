"""The recipe for methods over prompts: it runs, its losses are what they say, its modules load again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

import fewer
from decoders import VOCAB, decoder
from fewer.recipes.prompt import Prompting, saliency, train
from fewer.training import losses

SHORT = dict(steps=2, length=24, test=2, scored=4, bfloat16=False)


@pytest.mark.parametrize("method", ["sdtp:sinks=1,layers=1+2,keep=0.7", "dynamic_context_pruning:rank=4"])
def test_a_run_trains_measures_and_saves_what_apply_loads(method, tmp_path):
    model = copy.deepcopy(decoder("llama"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.randint(1, VOCAB, (800,), generator=torch.Generator().manual_seed(0))
    report = train(Prompting(method, **SHORT), tmp_path, model=(model, None), ids=ids, log=lambda line: None)
    assert {"unreduced", "trained", "untrained"} <= report.results.keys()
    assert all(len(v) == 2 for v in report.passages.values())
    assert report.rows["trained"] <= report.rows["unreduced"]
    assert all(v.equal(before[k]) for k, v in model.state_dict().items()), "the model stays as it is"
    model.eval()
    with torch.no_grad(), fewer.apply(model, method, modules=tmp_path) as session:
        model(ids[None, :24])
        assert session.modules


def test_ranking_is_small_for_the_right_order_and_large_for_the_wrong_one():
    wanted, pairs = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[0, 1, 2, 0], [1, 2, 0, 0]])
    right, wrong = (losses.ranking(10 * sign * wanted, wanted, pairs).item() for sign in (1, -1))
    assert right < 1e-3
    assert wrong > 10
    level = losses.ranking(torch.zeros(1, 3), wanted, pairs)
    assert_close(level, torch.tensor(2.0).log())


def test_saliency_is_the_slope_of_the_loss_along_the_features():
    model = copy.deepcopy(decoder("llama")).double().requires_grad_(False)
    ids = torch.randint(1, VOCAB, (1, 10), generator=torch.Generator().manual_seed(0))
    (found,) = saliency(model, ids, (1,))
    block, slopes = model.model.layers[1], []
    for token in range(10):
        values = []
        for scale in (1 + 5e-3, 1 - 5e-3):

            def stretch(_module, args, kwargs, token=token, scale=scale):
                x = (args[0] if args else kwargs["hidden_states"]).clone()
                x[:, token] *= scale
                return ((x, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": x})

            hook = block.register_forward_pre_hook(stretch, with_kwargs=True)
            logits = model(ids, use_cache=False).logits
            hook.remove()
            values.append(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        slopes.append((values[0] - values[1]).abs() / 1e-2)
    assert_close(found[0], torch.stack(slopes).float(), atol=5e-3, rtol=1e-2)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="steps=0"):
        Prompting(steps=0)
    with pytest.raises(ValueError, match="alpha"):
        Prompting(alpha=(1.0, 8.0))
