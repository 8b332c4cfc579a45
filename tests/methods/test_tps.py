"""TPS by hand: squeezing, who may host whom, and training form against inference form."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.core import Place, Plan, Signals, Tokens
from fewer.methods.vision.tps import TPS
from fewer.testing.models import answer
from vit import images, run, tiny_vit


def squeezed(x: list[list[float]], kept: list[int], prefix: int = 0, tau: float = 1.0) -> torch.Tensor:
    features = torch.tensor([x], dtype=torch.float32)
    tokens = Tokens.plain(1, len(x), prefix)
    signals = Signals(features, tokens, Place())
    plan = TPS(tau=tau).squeeze(Plan.keep(torch.tensor([kept]), len(x)), features, tokens, signals)
    return plan.reduce(features)[0]


def test_a_parallel_token_joins_with_equal_weight() -> None:
    assert_close(squeezed([[1, 0], [0, 1], [2, 0]], [0, 1]), torch.tensor([[1.5, 0], [0, 1]]))


def test_an_opposite_token_joins_the_orthogonal_one() -> None:
    other = (math.e * torch.tensor([0.0, 1]) + torch.tensor([-1.0, 0])) / (math.e + 1)
    assert_close(squeezed([[1, 0], [0, 1], [-1, 0]], [0, 1]), torch.stack([torch.tensor([1.0, 0]), other]))


def test_many_join_one_and_the_temperature_divides_their_similarity_only() -> None:
    x = [[1.0, 0], [0, 1], [3, 0], [1, 1]]
    tau = 0.5
    a, b = math.exp(1 / tau), math.exp(math.sqrt(0.5) / tau)  # the fourth is as near to both: the earlier takes it
    mixed = math.e * torch.tensor([1.0, 0]) + a * torch.tensor([3.0, 0]) + b * torch.tensor([1.0, 1])
    want = mixed / (math.e + a + b)
    assert_close(squeezed(x, [0, 1], tau=tau), torch.stack([want, torch.tensor([0.0, 1])]))


def test_the_class_token_neither_gives_nor_takes() -> None:
    x = [[5.0, 0], [1, 0.1], [0, 1], [4, 0]]  # the last is most like the class token, but joins the second
    y = squeezed(x, [0, 1, 2], prefix=1)
    assert y[0].tolist() == [5, 0]
    assert y[2].tolist() == [0, 1]
    assert y[1, 0] > 1


def test_ragged_samples_squeeze_as_they_do_alone() -> None:
    x = torch.randn(2, 8, 4)
    tokens = Tokens.plain(2, 8, 1)
    order = torch.tensor([[0, 2, 5, 7, 1], [0, 1, 3, 4, 6]])
    lengths = torch.tensor([3, 5])
    method, at = TPS(), Place()
    ragged = method.squeeze(Plan.keep(order, 8, lengths), x, tokens, Signals(x, tokens, at)).reduce(x)
    for b, n in enumerate(lengths.tolist()):
        one, alone = x[b : b + 1], Tokens.plain(1, 8, 1)
        plan = method.squeeze(Plan.keep(order[b : b + 1, :n], 8), one, alone, Signals(one, alone, at))
        assert_close(ragged[b, :n], plan.reduce(one)[0])
        assert (ragged[b, n:] == 0).all()


@pytest.mark.parametrize("kind", ["vit", "timm_mean"])
def test_training_form_equals_inference_form(kind: str) -> None:
    model, pixels = tiny_vit(kind, image=48), images(3, 48)
    session = fewer.apply(model, "tps:scorer=dynamicvit,keep=0.5,layers=1+2", modules="untrained")
    with torch.no_grad():
        gathered = answer(model, pixels)
        assert session.counts[-1] == session.host.prefix + 9
        kept = [session.kept(layer) for layer in (1, 2)]
        session.mask_eps = 0.0
        model.train()
        prefix = session.host.prefix
        for stage, modules in enumerate(session.modules[0]):
            forced = torch.zeros(3, 36).scatter(1, kept[stage][:, prefix:] - prefix, 1.0)
            noise = torch.stack([forced, 1 - forced], -1) * 1e4  # settles every decision as in inference
            modules["predictor"].noise = lambda logp, noise=noise: noise
        masked = answer(model, pixels)
    assert_close(masked, gathered, atol=1e-5, rtol=1e-5)


def test_a_token_pruned_earlier_gives_nothing_more() -> None:
    method, x = TPS(scorer="dynamicvit"), torch.randn(1, 5, 4)
    tokens = Tokens.plain(1, 5, 1, policy=torch.tensor([[1.0, 1, 0, 1, 1]]))
    now = torch.tensor([[1.0, 1, 0, 0, 1]])
    matrix = method._in_place(x, now, tokens.policy - now, tokens).matrix[0]
    assert matrix[2].tolist() == [0, 0, 1, 0, 0]
    assert (matrix[:, 2] > 0).sum() == 1  # the token pruned earlier reaches itself only,
    assert (matrix[:, 3] > 0).sum() == 2  # the one pruned now its host too
    assert_close(matrix.sum(-1), torch.ones(5))


def test_etps_needs_no_modules_and_dtps_trains_its_own() -> None:
    model = tiny_vit("vit")
    with fewer.apply(model, "tps:layers=1+2") as session:
        run(model, images(2))
        assert session.counts == [17, 12, 8, 8]
    session = fewer.apply(model, "tps:scorer=dynamicvit,layers=1+2", modules="untrained")
    model.train()
    answer(model, images(2)).square().sum().backward()
    for name, parameter in session.modules.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("wrong", "said"), [({"scorer": "ppt"}, "scorer='ppt'"), ({"tau": 0.0}, "tau=0.0")])
def test_parameters_out_of_range_are_named(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TPS(**wrong)
