"""What lays rows out as a map has all of them: backbones, heads for dense prediction, timm's intermediates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

import fewer
from fewer import hosts
from fewer.runtime import verify
from fewer.testing.checks import same_snapshot, snapshot
from tvstub import timm

SMALL = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
FORMS = ["tome:r=2", "random:keep=0.5,layers=1", "evit:keep=0.6,layers=1", "random:site=before,keep=0.6,layers=2"]


def dinov2() -> nn.Module:
    config = transformers.Dinov2Config(**SMALL, image_size=56, patch_size=14, out_features=["stage2", "stage4"])
    return transformers.Dinov2Backbone(config)


def reconstruction() -> nn.Module:
    config = transformers.ViTConfig(**SMALL, image_size=32, patch_size=8, encoder_stride=8)
    return transformers.ViTForMaskedImageModeling(config)


def depth() -> nn.Module:
    config = transformers.DPTConfig(
        **SMALL, image_size=64, patch_size=16, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16] * 4,
        fusion_hidden_size=16,
    )  # fmt: skip
    return transformers.DPTForDepthEstimation(config)


def segmentation() -> nn.Module:
    config = transformers.BeitConfig(
        **SMALL, image_size=64, patch_size=16, out_indices=[1, 2, 3, 4], num_labels=5, pool_scales=(1, 2)
    )
    return transformers.BeitForSemanticSegmentation(config)


def classes() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=32, patch_size=8))


HEADS = {
    dinov2: ("each", 56), reconstruction: ("last", 32), depth: ("each", 64), segmentation: ("each", 64),
    classes: ("some", 32),
}  # fmt: skip


def built(make: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.mul_(4)  # new weights are so small that a head's answer hardly depends on the picture
    return model, torch.randn(2, 3, HEADS[make][1], HEADS[make][1])


def tensors(answer: Any) -> list[Tensor]:
    parts = answer.values() if isinstance(answer, dict) else answer
    return [t for part in parts for t in (part if isinstance(part, tuple) else (part,)) if isinstance(t, Tensor)]


@pytest.mark.parametrize("make", HEADS, ids=lambda make: make.__name__)
def test_what_a_head_wants_is_found_by_trying(make: Any) -> None:
    model, _ = built(make)
    assert verify.reading(model, hosts.find(model)) == verify.Read(HEADS[make][0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", HEADS, ids=lambda make: make.__name__)
def test_maps_are_whole(make: Any, form: str) -> None:
    model, x = built(make)
    with torch.no_grad():
        plain = tensors(model(x))
        before = snapshot(model)  # by now the library has put up hooks of its own, for good
        with fewer.apply(model, form) as session:
            got = tensors(model(x))
            counts = session.counts
    same_snapshot(before, snapshot(model), form)
    assert [t.shape for t in got] == [t.shape for t in plain]
    assert counts[-1] < session.last.first.n
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(got, plain, strict=True))
    with torch.no_grad(), fewer.apply(model, "tome:r=0"):
        assert all(torch.equal(a, b) for a, b in zip(tensors(model(x)), plain, strict=True))


def test_rows_that_stay_are_what_they_are_beside_hidden_ones() -> None:
    """Each map, at the patches that are left there: the same as where the others are masked instead of dropped."""
    model, x = built(dinov2)
    with torch.no_grad():
        with fewer.apply(model, "random:keep=0.5,layers=1+2") as session:
            got = model(x).feature_maps
            kept = [session.kept(1)[:, 1:] - 1, session.kept(3)[:, 1:] - 1]
        with fewer.apply(model, "random:keep=0.5,layers=1+2", execution="masked"):
            want = model(x).feature_maps
    for a, b, index in zip(got, want, kept, strict=True):
        index = index[:, None].expand(-1, a.shape[1], -1)
        assert_close(a.flatten(2).gather(-1, index), b.flatten(2).gather(-1, index), atol=2e-5, rtol=1e-4)


def test_a_map_is_made_of_what_each_patch_held_last() -> None:
    """A patch that leaves keeps what it was; in the maps behind, it stands as it left."""
    model, x = built(dinov2)
    norm = model.layernorm
    seen: list[Tensor] = []
    hook = norm.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    with torch.no_grad(), fewer.apply(model, "random:keep=0.5,layers=0,site=after") as session:
        model(x)
        gone = session.last.rows(0)
    hook.remove()
    left = (gone < 0)[..., None]
    assert torch.equal(seen[0].masked_select(left), seen[1].masked_select(left))
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("form", ["tome:r=2", "random:keep=0.5,layers=1", "evit:mass=0.6,layers=1"])
@pytest.mark.parametrize("execution", ["padded", "packed"])
def test_intermediates_of_timm_are_maps(form: str, execution: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=4, img_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain, own = model.forward_intermediates(x), model.forward_intermediates
        with fewer.apply(model, form, execution=execution):
            final, maps = model.forward_intermediates(x)
            alone = model(x)
        with fewer.apply(model, form, execution=execution):
            assert torch.equal(model(x), alone), "maps leave nothing behind"
        with fewer.apply(model, "tome:r=0"):
            same = model.forward_intermediates(x)
    assert model.forward_intermediates == own
    assert [m.shape for m in maps] == [m.shape for m in plain[1]]
    assert final.shape == plain[0].shape
    assert torch.equal(same[0], plain[0])
    assert all(torch.equal(a, b) for a, b in zip(same[1], plain[1], strict=True))
    assert not torch.equal(maps[-1], plain[1][-1])
    features = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=4, img_size=64, features_only=True)
    with torch.no_grad(), fewer.apply(features.eval(), form, execution=execution):
        assert all(m.shape[1:] == (192, 4, 4) for m in features(x))


@pytest.mark.parametrize("make", [dinov2, depth], ids=["dinov2", "depth"])
def test_gradients_reach_the_patches_that_left(make: Any) -> None:
    model, x = built(make)
    x.requires_grad_()
    with fewer.apply(model, "random:keep=0.5,layers=1"):
        sum(t.square().sum() for t in tensors(model(x))).backward()
    assert (x.grad.abs().amax(1) > 0).float().mean() > 0.99
