"""EViT against its authors' numbers, and cases computed by hand."""

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.core import KeepRatio
from vit import Golden, images, run, signals, tiny_vit


def settings():
    for name in ("evit_a", "evit_b"):
        golden = Golden.load(name)
        for library in golden.libraries():
            for setting in golden.settings:
                yield pytest.param(golden, library, setting, id=f"{name}-{library}-{setting['tag']}")


@pytest.mark.parametrize(("golden", "library", "setting"), list(settings()))
def test_golden(golden, library, setting):
    tag, model = setting["tag"], golden.model(library)
    layers = tuple(golden.config["drop_loc"])
    method = fewer.EViT(KeepRatio(setting["keep_rate"], rounding="ceil"), layers, fuse=setting["fuse_token"])
    with fewer.apply(model, method) as session:
        assert_close(run(model, golden.image), golden[f"{tag}.logits"], atol=1e-4, rtol=0)
        assert session.counts == golden[f"{tag}.counts"].tolist()
        ours = torch.arange(golden.shape.patches).expand(2, -1)  # our number of their patch: they order by score
        for stage, step in enumerate(session.last.steps):
            want = ours.gather(1, golden[f"{tag}.idx{stage}"].long())
            count = want.shape[1]
            kept = step.plan.anchor[:, 1 : 1 + count] - 1  # without CLS and the fused row
            assert torch.equal(kept, want.sort().values)
            fused = torch.full((2, step.plan.m - 1 - count), count)
            ours = torch.cat([want.argsort().argsort(), fused], 1)


def test_the_fused_token_is_a_sum_with_raw_weights():
    logits = torch.tensor([[0.3, 2.0, -1.0, 1.0, 0.5]]).log_softmax(-1)
    x = torch.randn(1, 5, 3)
    seen = signals(logits[..., None], hidden=x)
    p = logits.exp()[0]
    plan = fewer.EViT(KeepRatio(0.5, rounding="ceil")).plan(seen, seen.tokens)
    assert plan.anchor[0, :3].tolist() == [0, 1, 3]
    assert_close(plan.reduce(x)[0, -1], p[2] * x[0, 2] + p[4] * x[0, 4])
    plan = fewer.EViT(KeepRatio(0.5, rounding="ceil"), normalise=True).plan(seen, seen.tokens)
    assert_close(plan.reduce(x)[0, -1], (p[2] * x[0, 2] + p[4] * x[0, 4]) / (p[2] + p[4]))


def test_permuting_patches_permutes_who_stays():
    k = torch.randn(1, 12, 4)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(11)])
    a, b = signals(k), signals(k[:, order])
    first = fewer.EViT(fuse=False).plan(a, a.tokens).anchor[0]
    second = fewer.EViT(fuse=False).plan(b, b.tokens).anchor[0]
    assert sorted(order[second].tolist()) == first.tolist()


def test_without_a_class_token_attention_received_decides():
    model, x = tiny_vit("siglip"), images()
    with fewer.apply(model, "evit:keep=0.5,fuse=false,layers=1") as session:
        run(model, x)
        seen, kept = session.last, session.kept(1)
    assert seen.counts == [16, 8, 8, 8]
    mass = signals(torch.randn(1, 6, 3), prefix=0)
    plan = fewer.EViT(KeepRatio(0.5), fuse=False).plan(mass, mass.tokens)
    best = mass.attention_mass().mean(1).topk(3).indices.sort().values
    assert torch.equal(plan.anchor, best)
    assert kept.shape == (2, 8)


def test_keeping_all_is_the_model():
    model, x = tiny_vit("vit"), images()
    want = run(model, x)
    with fewer.apply(model, "evit:keep=1.0,layers=1+2"):
        assert torch.equal(run(model, x), want)
