"""DynamicViT against the numbers of its authors' code, and by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fewer
from fewer.core.attention import masked_attention
from fewer.core.learned import Predictor, gumbel, keep_decision
from fewer.testing.models import answer
from fewer.training import losses
from vit import Golden, images, run, tiny_vit

RENAMED = (("in_conv.", "embed."), ("out_conv.", "decide."))


def predictor_weights(arrays: dict[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
    out = {}
    for name, value in arrays.items():
        if name.startswith(start):
            name = name.removeprefix(start)
            for theirs, ours in RENAMED:
                name = name.replace(theirs, ours)
            out[name] = value
    return out


def models(name: str) -> tuple[Golden, nn.Module, nn.Module]:
    """The golden, its student and its teacher."""
    golden = Golden.load(name)
    plain = {k: v for k, v in golden.arrays.items() if "score_predictor" not in k}
    teacher = {"w." + k.removeprefix("teacher."): v for k, v in plain.items() if k.startswith("teacher.")}
    student = replace(golden, arrays=plain).model("timm")
    return golden, student, replace(golden, arrays=teacher).model("timm")


def session_of(golden: Golden, model: nn.Module, **options: object) -> fewer.Session:
    config = golden.config
    ratios = "+".join(map(str, config["token_ratio"]))
    layers = "+".join(map(str, config["pruning_loc"]))
    session = fewer.apply(model, f"dynamicvit:keep={ratios},layers={layers}", modules="untrained", **options)
    for stage, modules in enumerate(session.modules[0]):
        modules["predictor"].load_state_dict(predictor_weights(golden.arrays, f"w.score_predictor.{stage}."))
    return session


@pytest.fixture(params=["dynamicvit_a", "dynamicvit_b"])
def golden(request: pytest.FixtureRequest) -> tuple[Golden, nn.Module, nn.Module]:
    return models(request.param)


@torch.no_grad()
def test_inference_is_the_authors(golden) -> None:
    golden, model, _ = golden
    session = session_of(golden, model)
    logits = model(golden.image)
    assert_close(logits, golden["eval_logits"], atol=1e-4, rtol=1e-4)
    place = torch.arange(196).expand(2, -1)  # theirs: positions in the order of the stage before, best first
    for stage, layer in enumerate(golden.config["pruning_loc"]):
        place = place.gather(1, golden[f"eval_keep{stage}"].long())
        assert torch.equal(session.kept(layer)[:, 1:] - 1, place.sort(1).values)


def test_training_is_the_authors(golden) -> None:
    golden, model, teacher = golden
    session = session_of(golden, model)
    for stage, modules in enumerate(session.modules[0]):
        modules["predictor"].noise = lambda logp, stage=stage: golden[f"gumbel{stage}"]
    features: dict[str, torch.Tensor] = {}
    for name, net in (("student", model), ("teacher", teacher)):
        net.norm.register_forward_hook(lambda _m, _a, out, name=name: features.update({name: out[:, 1:]}))
    model.train()
    logits = model(golden.image)
    with torch.no_grad():
        taught = teacher(golden.image)
    memory, tokens = session.last.memory[0], session.last.tokens
    assert_close(logits, golden["train_logits"], atol=1e-4, rtol=1e-4)
    for stage, target in enumerate(golden.config["token_ratio"]):
        assert torch.equal(memory["keep"][stage], golden[f"train_decision{stage}"])
        assert memory["target"][stage] == int(196 * target) / 196
    kept = golden["train_final_policy"] > 0
    assert torch.equal(tokens.policy[:, 1:] > 0, kept)
    mean = features["student"].mean(-1)
    assert_close(mean[kept], golden["train_features_mean"][kept], atol=1e-4, rtol=1e-4)

    target = dict(enumerate(golden.config["token_ratio"]))
    policy = tokens.policy[:, 1:]
    parts = {
        "loss_cls": nn.functional.cross_entropy(logits, golden["labels"].long()),
        "loss_ratio_sum": losses.ratio(memory["keep"], target) * len(target),
        "loss_logit_kl": losses.logit_kl(logits, taught),
        "loss_token_kl": losses.token_kl(features["student"], features["teacher"], policy),
    }
    for name, value in parts.items():
        assert_close(value, golden[name][0], atol=1e-4, rtol=1e-4, msg=name)
    base = parts["loss_cls"] + 2 * parts["loss_ratio_sum"] / len(target) + 0.5 * parts["loss_logit_kl"]
    assert_close(base + 0.5 * parts["loss_token_kl"], golden["loss"][0], atol=1e-4, rtol=1e-4)
    mse = losses.token_mse(features["student"], features["teacher"], policy)
    assert_close(base + 0.5 * mse, golden["loss_mse_token"][0], atol=1e-4, rtol=1e-4)

    (base + 0.5 * parts["loss_token_kl"]).backward()
    for name in (k for k in golden.arrays if k.startswith("grad.")):
        path = name.removeprefix("grad.")
        if path.startswith("score_predictor."):
            _, stage, rest = path.split(".", 2)
            ours = dict(session.modules[0][int(stage)]["predictor"].named_parameters())
            grad = ours[rest.replace("in_conv", "embed").replace("out_conv", "decide")].grad
        else:
            grad = dict(model.named_parameters())[path].grad
        assert_close(grad, golden[name], rtol=0, atol=1e-3 * golden[name].abs().max().item(), msg=name)


def test_the_predictor_is_the_authors() -> None:
    golden = Golden.load("dynamicvit_parts")
    predictor = Predictor(16)
    predictor.load_state_dict(predictor_weights(golden.arrays, "p0.w."))
    logp = predictor(golden["p0.x"], golden["p0.policy"][..., 0])
    assert_close(logp, golden["p0.logprob"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["s0", "s1", "s2"])
def test_masked_softmax_is_the_authors(case: str) -> None:
    golden = Golden.load("dynamicvit_parts")
    logits, policy = golden[f"{case}.attn_logits"], golden[f"{case}.policy"][..., 0]
    eps = {c["case"]: c.get("eps") for c in golden.config["cases"]}[case]
    n = logits.shape[-1]
    q = torch.eye(n).expand_as(logits)  # q k^T = the logits themselves
    out = masked_attention(q, logits.transpose(-1, -2), torch.eye(n).expand_as(logits), 1.0, None, policy, eps)
    assert_close(out, golden[f"{case}.out"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "deit", "timm_mean", "beit"])
def test_masked_rows_equal_gathered_rows(kind: str) -> None:
    """Without noise and eps, the training form and the inference form give the same answer."""
    model, pixels = tiny_vit(kind, image=48), images(3, 48)
    session = fewer.apply(model, "dynamicvit:keep=0.5,layers=1+2", modules="untrained")
    with torch.no_grad():
        gathered = run(model, pixels)
        kept = [session.kept(layer) for layer in (1, 2)]
        session.mask_eps = 0.0
        model.train()
        for stage, modules in enumerate(session.modules[0]):
            prefix = session.host.prefix
            forced = torch.zeros(3, 36).scatter(1, kept[stage][:, prefix:] - prefix, 1.0)
            noise = torch.stack([forced, 1 - forced], -1) * 1e4  # settles every decision as in inference
            modules["predictor"].noise = lambda logp, noise=noise: noise
        masked = run(model, pixels)
    assert_close(masked, gathered, atol=1e-5, rtol=1e-5)


def test_a_dropped_token_reaches_nobody() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 4) for _ in range(3))
    policy = torch.tensor([[1.0, 1, 0, 1, 0, 1]])
    out = masked_attention(q, k, v, 0.5, None, policy, 0.0)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 2] += 1  # not more: the shared maximum includes dropped keys
    v2[:, :, 2] += 5
    other = masked_attention(q, k2, v2, 0.5, None, policy, 0.0)
    rest = [0, 1, 3, 4, 5]
    assert_close(out[:, :, rest], other[:, :, rest])
    assert not torch.allclose(out[:, :, 2], other[:, :, 2])


def test_the_ratio_loss_alone_moves_the_share_to_its_target() -> None:
    torch.manual_seed(0)
    model = tiny_vit("vit", depth=2).train()
    session = fewer.apply(model, "dynamicvit:keep=0.75,layers=1", modules="untrained")
    optimizer = torch.optim.Adam(session.modules.parameters(), lr=1e-2)
    pixels = images(16)
    shares = []
    for _ in range(60):
        answer(model, pixels)
        memory = session.last.memory[0]
        losses.ratio(memory["keep"], memory["target"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        shares.append(memory["keep"][0].mean().item())
    assert abs(sum(shares[-10:]) / 10 - 0.75) < 0.08
    assert abs(shares[0] - 0.75) > 0.2  # it had somewhere to go


def test_every_part_of_the_predictor_gets_gradient() -> None:
    model = tiny_vit("vit").train()
    session = fewer.apply(model, "dynamicvit:keep=0.5,layers=1+2", modules="untrained")
    answer(model, images(2)).square().sum().backward()
    for name, parameter in session.modules.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_token_dropped_once_stays_dropped() -> None:
    model = tiny_vit("vit").train()
    session = fewer.apply(model, "dynamicvit:keep=0.5,layers=1+2+3", modules="untrained")
    answer(model, images(4))
    keep = session.last.memory[0]["keep"]
    assert all((keep[i + 1] <= keep[i]).all() for i in range(2))
    assert session.last.memory[0]["target"] == {0: 0.5, 1: 0.25, 2: 0.125}


def test_decisions_are_exact_and_their_gradient_soft() -> None:
    logp = torch.tensor([[[0.3, -0.2], [-1.0, 0.5]]], requires_grad=True)
    noise = torch.tensor([[[0.0, 0.1], [0.2, 0.0]]])
    decision = keep_decision(logp, noise)
    assert decision.tolist() == [[1.0, 0.0]]
    decision.sum().backward()
    soft = (logp.detach() + noise).softmax(-1)[..., 0]
    assert_close(logp.grad[..., 0], soft * (1 - soft))


def test_gumbel_noise_has_its_mean_and_obeys_its_generator() -> None:
    draws = gumbel(torch.empty(20000), torch.Generator().manual_seed(1))
    again = gumbel(torch.empty(20000), torch.Generator().manual_seed(1))
    assert torch.equal(draws, again)
    assert abs(draws.mean().item() - 0.5772) < 0.03
    assert abs(draws.std().item() - 1.2825) < 0.03


def test_the_mean_in_the_predictor_is_over_present_tokens_only() -> None:
    torch.manual_seed(0)
    predictor, x = Predictor(8), torch.randn(1, 5, 8)
    present = torch.tensor([[1.0, 1, 0, 1, 0]])
    left = predictor(x[:, [0, 1, 3]])
    assert_close(predictor(x, present)[:, [0, 1, 3]], left)
    wild = copy.deepcopy(x)
    wild[:, 2] = 100
    assert_close(predictor(wild, present)[:, [0, 1, 3]], left)
