"""Dynamic-LLaVA's text half: what is written is computed in full, and remembered or not."""

import pytest
import torch
from torch.testing import assert_close

import fewer
from decoders import BUILD
from fewer.compat import cache_of, cached
from fewer.methods.multimodal.dynamic_llava_decode import DynamicLLaVADecode, OutputPredictor
from fewer.recipes.exits import Predicting, train_output
from llava import prompt, tiny_llava

FORM = "dynamic_llava_decode:width=8"


def llama():
    torch.manual_seed(0)
    return BUILD["llama"]().eval()


def always(session, keep):
    """The predictor says one thing of every token."""
    out = session.modules[0][0]["predictor"].out
    torch.nn.init.zeros_(out.weight)
    with torch.no_grad():
        out.bias.copy_(torch.tensor([1.0, -1.0] if keep else [-1.0, 1.0]))


@torch.no_grad()
def written(model, ids, start):
    """Logits from the prompt's last token on, one token at a time, and the cache."""
    out = model(ids[:, :start], use_cache=True)
    logits, cache = [out.logits[:, -1]], cache_of(out)
    for i in range(start, ids.shape[1]):
        logits.append(model(ids[:, i : i + 1], **cached(model, cache)).logits[:, -1])
    return torch.stack(logits, 1), cache


IDS = torch.randint(3, 60, (2, 14), generator=torch.Generator().manual_seed(3))


def test_remembering_all_changes_nothing():
    model = llama()
    want, _ = written(model, IDS, 6)
    with fewer.apply(model, FORM, modules="untrained") as session:
        always(session, True)
        got, _ = written(model, IDS, 6)
        assert session.ledger.stored == [14.0, 14.0, 14.0]
    assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_forgetting_all_leaves_the_prompt_in_deeper_layers():
    model = llama()
    with fewer.apply(model, FORM, modules="untrained") as session:
        always(session, False)
        written(model, IDS, 6)
        assert session.ledger.stored == [14.0, 6.0, 6.0]
        assert session.ledger.logical == [14, 14, 14]


def test_cached_writing_equals_one_pass_with_the_same_decisions():
    """The training form, its decisions so sure that no noise matters, against the cache."""
    model = llama()
    with fewer.apply(model, FORM, modules="untrained") as session:
        predictor = session.modules[0][0]["predictor"]
        with torch.no_grad():
            for layer in (*predictor.layers, predictor.out):
                layer.weight.normal_(generator=torch.Generator().manual_seed(1))
                layer.bias.zero_()
            predictor.out.weight.mul_(3000)
        got, _ = written(model, IDS, 6)
        stored = session.ledger.stored
        modules = session.modules
    assert 6 < stored[1] < 14  # some were forgotten, some not
    assert stored[1] == stored[2]
    with fewer.apply(model, FORM, learning=True, modules=modules) as session, torch.no_grad():
        session.modules[0][0]["predictor"].start = 6
        want = model(IDS, use_cache=False).logits[:, 5:]
        kept = session.remembered[0]["keep"][0]
    assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert 6 + kept.sum(1).mean() == stored[1]


def test_samples_of_a_batch_forget_by_themselves():
    model = llama()
    with fewer.apply(model, FORM, modules="untrained") as session:
        with torch.no_grad():
            session.modules[0][0]["predictor"].out.bias.zero_()
        together, _ = written(model, IDS, 6)
        for line in range(2):
            alone, _ = written(model, IDS[line : line + 1], 6)
            assert_close(alone[0], together[line], atol=1e-5, rtol=1e-5)


def test_it_stands_beside_the_half_that_chooses_images():
    model, given = tiny_llava(), prompt()
    methods = ["dynamic_llava:width=16,heads=2,inner=16,keep=0.5", FORM]
    with fewer.apply(model, methods, modules="untrained") as session:
        out = session.modules[1][0]["predictor"].out
        torch.nn.init.zeros_(out.weight)
        with torch.no_grad():
            out.bias.copy_(torch.tensor([-1.0, 1.0]))
        model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert session.ledger.stored == [22 + 4, 14, 14, 14]


def test_gradients_reach_the_predictor(tmp_path):
    model = tiny_llava()
    answer = torch.randint(3, 60, (12,), generator=torch.Generator().manual_seed(0))
    samples = [(prompt(), answer), (prompt(seed=1), answer[:5])]
    recipe = Predicting(FORM, steps=16, batch=1, lr=0.06)
    report = train_output(model, samples, tmp_path, recipe, log=lambda _: None, share=0.95, least=10)
    off = [abs(line["share"] - 0.95) for line in report.lines]
    assert sum(off[-5:]) < 0.6 * sum(off[:5])
    with fewer.apply(model, FORM, modules=tmp_path) as session:
        assert session.modules[0][0]["predictor"].out.weight.abs().sum() > 0
    with pytest.raises(ValueError, match="least"):
        train_output(model, samples, tmp_path, recipe, least=50)


def test_layers_and_sizes():
    assert DynamicLLaVADecode().acts_at(32) == tuple(range(2, 32))
    assert DynamicLLaVADecode(k=3).acts_at(5) == (3, 4)
    assert OutputPredictor(8, 16).flops() == 2 * (8 * 16 + 16 * 8 + 8 * 4 + 4 * 2)
    with pytest.raises(ValueError, match="k=0"):
        DynamicLLaVADecode(k=0)
