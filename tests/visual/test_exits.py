"""Training the gates of DyVTE and the predictor of Dynamic-LLaVA on a small model."""

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.recipes.exits import Gates, Predicting, may_leave, train_gates, train_predictor
from llava import prompt, tiny_llava


def logits(*best, sure=4.0, classes=5):
    return torch.nn.functional.one_hot(torch.tensor(best), classes).float() * sure


def test_labels():
    answer = torch.tensor([1, 2, 3])
    full = logits(1, 2, 3)
    assert may_leave(full, full, answer)
    assert not may_leave(full, logits(1, 2, 4), answer)  # one of three is another
    loss = float(torch.nn.functional.cross_entropy(full, answer))
    less = logits(1, 2, 3, sure=3.9)  # all agree
    worse = float(torch.nn.functional.cross_entropy(less, answer))
    assert worse / loss == pytest.approx(1.10, abs=0.01)
    assert not may_leave(full, less, answer)
    assert may_leave(full, less, answer, slack=1.11)
    assert may_leave(full, logits(1, 2, 4), answer, agreement=0.6, slack=100)


def samples(n=4):
    return [(prompt(words=(5 + i, 6, 7), seed=i), torch.tensor([9 + i, 10])) for i in range(n)]


def test_gates_learn_their_labels_and_are_found_again(tmp_path):
    model = tiny_llava()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recipe = Gates("dyvte:hidden=16", steps=10, batch=4, lr=0.03)
    report = train_gates(model, samples(), tmp_path, recipe, log=lambda _: None)
    losses = [line["loss"] for line in report.lines]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert report.parameters == 3 * (2 * 32 * 16 + 16 * 2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with fewer.apply(model, report.method, modules=tmp_path) as session:
        with torch.no_grad():
            model(**samples()[0][0])
        assert session.counts[0] == 2 + 16 + 3
        assert min(session.counts) >= 2 + 3


def test_the_predictor_reaches_its_share(tmp_path):
    model = tiny_llava()
    recipe = Predicting("dynamic_llava:width=16,heads=2,inner=16,keep=0.25", steps=14, batch=2, lr=0.02)
    report = train_predictor(model, samples(), tmp_path, recipe, log=lambda _: None)
    share = [line["share"] for line in report.lines]
    off = [abs(s - 0.25) for s in share]
    assert sum(off[-5:]) < sum(off[:5])
    assert sum(off[-5:]) / 5 < 0.15
    with fewer.apply(model, report.method, modules=tmp_path) as session, torch.no_grad():
        model(**samples()[0][0])
        assert session.counts == [21, 9, 9, 9]


def test_masked_training_form_equals_dropping(tmp_path):
    """With the same choice, masking the dropped keys or dropping the rows gives the rest the same values."""
    model, given = tiny_llava(), prompt()
    method = "dynamic_llava:width=16,heads=2,inner=16,keep=0.5"
    with fewer.apply(model, method, modules="untrained") as session, torch.no_grad():
        dropped = model(**given, use_cache=False).logits[:, -1]
        modules = session.modules
        with_mask = None
    with fewer.apply(model, method, modules=modules, execution="masked"), torch.no_grad():
        with_mask = model(**given, use_cache=False).logits[:, -1]
    assert_close(dropped, with_mask, atol=1e-4, rtol=1e-4)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        train_gates(tiny_llava(), [], tmp_path)
    with pytest.raises(ValueError, match="steps=0"):
        Gates(steps=0)
    with pytest.raises(ValueError, match="tau="):
        Predicting(tau=(0.1, 1.0))
