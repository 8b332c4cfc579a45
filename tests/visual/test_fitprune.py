"""FitPrune: two averages of attention, and a schedule that meets its target."""

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.core import KeepRatio, attention
from fewer.core.visual.attention import strongest
from fewer.methods.multimodal.fitprune import FitPrune
from fewer.recipes.fit import fit_schedule, leaving
from insides import alone, inside, kept
from llava import batched, prompt, tiny_llava


@pytest.mark.parametrize("chunk", [1 << 22, 64])
def test_averages_by_hand(monkeypatch, chunk):
    monkeypatch.setattr(attention, "CHUNK", chunk)
    lengths = (9, 6)
    signals, _ = inside(lengths)
    own, cross = strongest(signals.visual)
    for line, length in enumerate(lengths):
        one, _ = alone(lengths, line)
        seen = one.visual.seen
        s = seen.q.shape[2]
        logits = (seen.q @ seen.k.transpose(-1, -2) * seen.scale)[0]
        p = logits.masked_fill(torch.ones(s, s).triu(1).bool(), float("-inf")).softmax(-1).amax(0)
        image = torch.arange(3, 3 + length)
        text = torch.tensor([i for i in range(s) if i not in image.tolist()])
        assert_close(own[line, :length], p[image][:, image].mean(0))
        assert_close(cross[line, :length], p[text][:, image].mean(0))


def test_the_smallest_products_leave():
    lengths = (9, 6)
    signals, tokens = inside(lengths)
    plan = FitPrune(KeepRatio(0.5)).plan(signals, tokens)
    own, cross = strongest(signals.visual)
    for line, length in enumerate(lengths):
        want = (own * cross)[line, :length].topk(length // 2).indices.sort().values.tolist()
        assert kept(plan, line) == want


def test_leaving_by_hand():
    own, cross = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([4.0, 1.0, 2.0, 3.0])
    assert leaving([(own, cross)], 0.0) == [0]
    assert leaving([(own, cross)], 0.3) == [1]  # prefixes {0, 1} and {1, 2}
    assert leaving([(own, cross)], 0.6) == [2]  # {0, 1, 2} and {1, 2, 3}
    assert leaving([(own, cross)], 1.0) == [4]
    # Behind the first layer 0 and 3 are left, and the second counts them alone.
    assert leaving([(own, cross), (own, cross)], 0.6) == [2, 0]
    assert leaving([(own, cross), (cross, cross)], 0.6) == [2, 1]


def test_more_may_be_lost_the_more_leave():
    g = torch.Generator().manual_seed(0)
    layers = [(torch.rand(20, generator=g), torch.rand(20, generator=g)) for _ in range(3)]
    totals = [sum(leaving(layers, a / 10)) for a in range(11)]
    assert totals == sorted(totals)
    assert totals[0] == 0
    assert totals[-1] == 20


@pytest.mark.parametrize("flops", [0.5, 0.8])
def test_the_schedule_meets_its_target(flops):
    model, inputs = tiny_llava(), [prompt(images=2, seed=i) for i in range(2)]
    found = fit_schedule(model, inputs, flops, tolerance=0.03)
    assert found.flops == pytest.approx(flops, abs=0.03)
    assert list(found.method.budget.ratio) == sorted(found.method.budget.ratio, reverse=True)
    with fewer.apply(model, found.method) as session, torch.no_grad():
        model(**inputs[0])
        ledger = session.ledger.reading
        assert ledger.gflops_model / ledger.gflops_full == pytest.approx(flops, abs=0.06)


def test_a_prompt_alone_answers_as_in_a_padded_batch():
    model = tiny_llava()
    prompts = [prompt((5, 6, 7)), prompt((8, 9), images=2, seed=1)]
    given = batched(prompts, left=True)
    with fewer.apply(model, "fitprune:keep=0.8"), torch.no_grad():
        together = model(**given).logits[:, -1]
        for line, one in enumerate(prompts):
            assert_close(together[line], model(**one).logits[0, -1], atol=2e-5, rtol=1e-4)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="empty"):
        fit_schedule(tiny_llava(), [], 0.5)
    with pytest.raises(ValueError, match=r"flops=1\.5"):
        fit_schedule(tiny_llava(), [prompt()], 1.5)
