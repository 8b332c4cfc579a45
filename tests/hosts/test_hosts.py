"""Every architecture: nothing changes until something is reduced, and what is reduced is what the model computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fewer
from fewer.core import Budget, Plan, Remove, Signals, Site, Threshold, Tokens, select
from fewer.hosts import HostError, find
from fewer.runtime.verify import verify
from fewer.testing import Honest
from fewer.testing.checks import same_snapshot, snapshot
from fewer.testing.faults import norms
from fewer.testing.models import VIDEOS
from vit import KINDS, images, run, tiny_vit

BIASED = ("beit", "beit_shared")  # packed execution has no place for a bias between tokens

PICTURES = [kind for kind in KINDS if kind not in VIDEOS]


@dataclass(frozen=True)
class Before(Honest):
    """The longest tokens go on into block 1."""

    budget: Budget = Remove(6)
    layers: tuple[int, ...] | None = (1,)
    site: ClassVar[Site] = Site.BEFORE_BLOCK


@dataclass(frozen=True)
class Uneven(Honest):
    """Tokens longer than their image's average stay."""

    budget: Budget = Threshold(0.97)
    layers: tuple[int, ...] | None = (1, 2)

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        length = norms(signals.hidden)
        real = torch.ones_like(length) if tokens.valid is None else tokens.valid.float()
        average = (length * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        return select.top(length / average, self.budget, tokens, at=signals.at)


def taken(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries of x along dim, another choice for each sample. index: (B, M)."""
    x = x.expand(index.shape[0], *x.shape[1:])
    return torch.stack([one.index_select(dim - 1, own) for one, own in zip(x, index, strict=True)])


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("method", ["tome:r=0", "evit:keep=1,layers=1+2", "cls_topk:keep=1,layers=0"])
def test_reducing_nothing_is_the_identity_to_the_bit(kind: str, method: str) -> None:
    model, x = tiny_vit(kind), images(2)
    plain = run(model, x)
    with fewer.apply(model, method) as session:
        assert torch.equal(run(model, x), plain)
        assert session.counts == [session.last.first.n] * 4
    assert torch.equal(run(model, x), plain)


@pytest.mark.parametrize("kind", PICTURES)
def test_pruning_before_a_block_is_giving_the_plain_block_fewer_tokens(kind: str) -> None:
    """An independent reference for every architecture: the model itself, its blocks fed with the rows that stay."""
    model, x = tiny_vit(kind), images(3)
    plain = run(model, x)
    with fewer.apply(model, Before()) as session:
        reduced = run(model, x)
        index, blocks = session.kept(1), session.host.blocks
    assert index.shape[1] == session.last.first.n - 6
    handles = [blocks[1].register_forward_pre_hook(lambda _, args: (taken(args[0], index, 1), *args[1:]))]
    for block in blocks[1:]:
        if getattr(block, "relative_position_bias", None) is not None:
            handles.append(block.relative_position_bias.register_forward_hook(lambda _, __, out: between(out, index)))
        elif kind == "beit_shared":
            handles.append(block.register_forward_pre_hook(_with_shared_bias(index), with_kwargs=True))
    expected = run(model, x)
    for handle in handles:
        handle.remove()
    assert (reduced - plain).abs().max() > 1e-3
    assert_close(reduced, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", PICTURES)
def test_what_passes_a_block_by_comes_out_as_it_went_in(kind: str) -> None:
    model, x = tiny_vit(kind), images(2)
    seen: list[Tensor] = []
    with fewer.apply(model, "random:site=around_block,keep=0.5,layers=1") as session:
        block = session.host.blocks[1]
        hook = block.register_forward_hook(
            lambda _, args, out: seen.extend((args[0], out[0] if isinstance(out, tuple) else out))
        )
        run(model, x)
        hook.remove()
    same = (seen[0] == seen[1]).all(-1).sum(-1)
    assert same.tolist() == [session.last.first.free_count // 2] * 2
    assert session.counts == [session.last.first.n] * 4


def between(bias: Tensor, index: Tensor) -> Tensor:
    """A bias between all tokens, between the ones that stay. (1, H, N, N) -> (B, H, M, M)."""
    return taken(taken(bias, index, 2), index, 3)


def _with_shared_bias(index: Tensor) -> Any:
    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"attention_mask": between(kwargs["attention_mask"], index)}

    return hook


@pytest.mark.parametrize("kind", PICTURES)
def test_ragged_samples_answer_as_they_do_alone_in_every_execution(kind: str) -> None:
    """Pooling by mean or attention, and everything before it, looks at real rows only."""
    model, x = tiny_vit(kind), images(3)
    ways = ("padded", "masked") if kind in BIASED else ("padded", "packed", "masked")
    answers = []
    for execution in ways:
        with fewer.apply(model, Uneven(), execution=execution) as session:
            answers.append(run(model, x))
            counts = session.counts
            answers.append(torch.cat([run(model, one) for one in x.split(1)]))
        assert isinstance(counts, Tensor)
        assert len(counts[-1].unique()) > 1, "the samples must differ for this test to say anything"
    for other in answers[1:]:
        assert_close(other, answers[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", PICTURES)
def test_removal_leaves_no_trace(kind: str) -> None:
    model, x = tiny_vit(kind), images(1)
    plain, before = run(model, x), snapshot(model)
    with fewer.apply(model, "tome:r=3"):
        assert snapshot(model) != before
        run(model, x)
    same_snapshot(before, snapshot(model), kind)
    assert torch.equal(run(model, x), plain)


@pytest.mark.parametrize("kind", BIASED)
def test_packed_execution_refuses_a_bias_between_tokens(kind: str) -> None:
    with pytest.raises(fewer.SessionError, match=r"packed execution does not carry BeitModel.*execution='padded'"):
        fewer.apply(tiny_vit(kind), Uneven(), execution="packed")


@pytest.mark.parametrize(
    ("kind", "prefix", "has_cls", "family"),
    [
        ("vit", 1, True, "ViTModel"), ("deit", 2, True, "DeiTModel"), ("deit_student", 2, True, "DeiTModel"),
        ("dinov2", 1, True, "Dinov2Model"), ("dinov2_registers", 5, True, "Dinov2WithRegistersModel"),
        ("clip_text", 1, True, "CLIPVisionModel"), ("siglip", 0, False, "SiglipVisionModel"),
        ("beit", 1, True, "BeitModel"),
        ("timm", 1, True, "timm"), ("timm_mean", 0, False, "timm"), ("timm_registers", 5, True, "timm"),
        ("timm_distilled", 2, True, "timm"),
    ],
)  # fmt: skip
def test_what_is_found(kind: str, prefix: int, has_cls: bool, family: str) -> None:
    host = find(tiny_vit(kind))
    assert (host.prefix, host.has_cls, len(host.blocks), host.patches) == (prefix, has_cls, 4, 16)
    assert host.name.startswith(family)
    described = dict(host.describe())
    assert described["attention"] == "4 heads x 8 channels"
    assert described["prefix tokens"].startswith(str(prefix))


@pytest.mark.parametrize("kind", ["clip_text", "siglip_text"])
def test_the_text_tower_is_left_alone(kind: str) -> None:
    model, x = tiny_vit(kind), images(2)
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(input_ids=ids, pixel_values=x)
        with fewer.apply(model, "tome:r=3") as session:
            inside = {id(m) for m in session.host.root.modules()}
            assert not any("forward" in vars(m) for m in model.modules() if id(m) not in inside)
            reduced = model(input_ids=ids, pixel_values=x)
    assert torch.equal(reduced.text_embeds, plain.text_embeds)
    assert not torch.equal(reduced.image_embeds, plain.image_embeds)


@pytest.mark.parametrize(
    ("kind", "options", "call"),
    [
        ("dinov2", {}, {}),
        ("vit", {}, {"interpolate_pos_encoding": True}),
        ("siglip", {}, {"interpolate_pos_encoding": True}),
        ("timm", {"dynamic_img_size": True}, {}),
    ],
)
def test_other_resolutions(kind: str, options: dict, call: dict) -> None:
    """Six by three patches instead of four by four."""
    model = tiny_vit(kind, options=options)
    x = torch.randn(2, 3, 48, 24, generator=torch.Generator().manual_seed(1))

    def answer() -> Tensor:
        with torch.no_grad():
            out = model(x, **call)
        return out if isinstance(out, Tensor) else out.logits if "logits" in out else out.pooler_output

    plain = answer()
    with fewer.apply(model, "tome:r=0"):
        assert torch.equal(answer(), plain)
    with fewer.apply(model, "tome:r=3") as session:
        answer()
        rows = session.last.tokens.n
        assert session.counts[-1] == rows == 18 + session.host.prefix - 12
        assert session.restore(torch.zeros(2, rows, 5)).shape == (2, 6, 3, 5)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_beit_takes_other_resolutions_too(training: bool) -> None:
    """BEiT's bias tables are stretched to the window at hand; its absolute positions are switched off for that."""
    model = tiny_vit("beit", options={"use_absolute_position_embeddings": False}).train(training)
    x = torch.randn(2, 3, 48, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model.beit(x, interpolate_pos_encoding=True).pooler_output
        with fewer.apply(model, "tome:r=0"):
            assert torch.equal(model.beit(x, interpolate_pos_encoding=True).pooler_output, plain)
        with fewer.apply(model, "tome:r=3") as session:
            assert model.beit(x, interpolate_pos_encoding=True).pooler_output.isfinite().all()
            assert session.counts == [16, 13, 10, 7]


def test_window_models_and_strangers_are_refused_by_name() -> None:
    from transformers import SwinConfig, SwinModel

    swin = SwinModel(
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )
    for model in (swin, nn.Sequential(nn.Linear(2, 2))):
        before = snapshot(model)
        with pytest.raises(HostError, match=f"{type(model).__name__} is not a model fewer knows") as error:
            fewer.apply(model, "tome")
        assert "fewer doctor" in str(error.value)
        same_snapshot(before, snapshot(model), "a refused model")


def test_a_timm_host_claims_no_kv_cache() -> None:
    assert verify(find(tiny_vit("timm"))).of(Site.KV_CACHE) == "there is no such place in it"


def test_timm_without_fused_attention_is_entered_where_it_is_written_out() -> None:
    model, x = tiny_vit("timm"), images(2)
    with fewer.apply(model, "tome:r=3"):
        fused = run(model, x)
    for block in model.blocks:
        block.attn.fused_attn = False
    plain = run(model, x)
    with fewer.apply(model, "tome:r=0"):
        assert torch.equal(run(model, x), plain)
    with fewer.apply(model, "tome:r=3"):
        assert_close(run(model, x), fused, atol=1e-5, rtol=1e-4)


def test_a_model_set_to_eager_attention_gets_it_back() -> None:
    model, x = tiny_vit("vit"), images(1)
    model.set_attn_implementation("eager")
    plain = run(model, x)
    with fewer.apply(model, "tome:r=0"):
        assert_close(run(model, x), plain, atol=1e-5, rtol=1e-4)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(run(model, x), plain)


def test_a_pooling_head_that_takes_no_mask_refuses_ragged_samples() -> None:
    model, x = tiny_vit("timm", options={"class_token": False, "global_pool": "prr"}), images(3)
    plain = run(model, x)
    with fewer.apply(model, "tome:r=0"):
        assert torch.equal(run(model, x), plain)
    with fewer.apply(model, "tome:r=3") as session:
        run(model, x)
        assert session.counts == [13, 10, 7, 4]
    with (
        fewer.apply(model, Uneven()),
        pytest.raises(HostError, match="AttentionPoolPrr pools all rows and takes no mask"),
    ):
        run(model, x)


def test_causal_attention_is_refused() -> None:
    model, x = tiny_vit("timm"), images(1)
    with fewer.apply(model, "tome:r=3"), pytest.raises(HostError, match="is_causal=False"):
        model.forward_features(x, is_causal=True)


def test_a_session_nobody_took_off_does_not_reach_other_models() -> None:
    """A config of a model that is gone must not lend its place to a new one, whose removal would then do nothing."""
    import gc

    from fewer.hosts import Table
    from fewer.testing.models import tiny_vit

    before = len(Table._configs)
    forgotten = tiny_vit("vit")
    fewer.apply(forgotten, "tome:r=2")
    del forgotten
    gc.collect()
    held = list(Table._configs.items())[before:]
    assert held
    assert all(id(config) == key for key, (*_, config) in held)
    for _ in range(50):
        model = tiny_vit("vit")
        plain = model.config._attn_implementation
        fewer.apply(model, "tome:r=2").remove()
        assert model.config._attn_implementation == plain
