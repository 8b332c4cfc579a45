"""Merging around the operations of a denoiser, on every kind of host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import fewer
from cases import golden
from denoisers import KINDS, denoiser, part, sample_of
from fewer.core import BudgetError
from fewer.core.denoising import Moment
from fewer.hosts import HostError
from fewer.hosts.diffusion import DiffusionHost
from fewer.testing.checks import same_snapshot, snapshot
from fewer.testing.models import tiny_vit

pytest.importorskip("diffusers")
ROTATING = ("flux", "wan", "cogvideox")


def form(kind: str, more: str = "") -> str:
    """Half of the tokens, on the finest grid that has attention."""
    return f"tomesd:max_downsample={2 if kind == 'sdxl' else 1}{more}"


# -- the authors' numbers ----------------------------------------------------------------------------------------------
def setting(said: dict[str, Any]) -> str:
    names = {"merge_attn": "attention", "merge_crossattn": "cross", "merge_mlp": "mlp"}
    parts = [f"{names.get(k, k)}={str(v).lower()}" for k, v in said.items() if k != "tag"]
    return "tomesd:draws=false," + ",".join(parts)


def test_a_unet_of_the_authors() -> None:
    from diffusers import UNet2DConditionModel

    z, config = golden("tomesd_unet")
    model: Any = UNet2DConditionModel(**config["unet"]).eval()
    model.load_state_dict({k[2:]: v for k, v in z.items() if k.startswith("w.")})
    with torch.no_grad():
        given = z["latent"], z["timestep"], z["context"]
        assert_close(model(*given).sample, z["unpatched.out"], atol=1e-3, rtol=1e-3)
        for said in config["settings"]:
            with fewer.apply(model, setting(said)):
                assert_close(model(*given).sample, z[said["tag"] + ".out"], atol=1e-3, rtol=1e-3)


def test_a_block_of_the_authors() -> None:
    from diffusers import DiTTransformer2DModel
    from diffusers.models.attention import BasicTransformerBlock

    z, config = golden("tomesd_block")
    block = BasicTransformerBlock(
        32, 4, 8, cross_attention_dim=24, activation_fn="geglu", attention_bias=False, norm_eps=1e-5
    ).eval()
    block.load_state_dict({k[2:]: v for k, v in z.items() if k.startswith("w.")})

    class Around(DiTTransformer2DModel):
        """A denoiser that is this one block, on a grid of 8 x 8."""

        def __init__(self) -> None:
            super().__init__(num_attention_heads=1, attention_head_dim=8, num_layers=1, patch_size=1)
            self.transformer_blocks = nn.ModuleList([block])

        def forward(self, hidden_states: Tensor, timestep: Any = None, context: Any = None) -> Tensor:
            rows = hidden_states.flatten(2).transpose(1, 2)
            return self.transformer_blocks[0](rows, encoder_hidden_states=context)

    model = Around().eval()
    plane = z["x"].transpose(1, 2).unflatten(2, (8, 8))
    with torch.no_grad():
        assert_close(model(plane, 0, z["context"]), z["unpatched.out"], atol=1e-5, rtol=1e-5)
        for said in config["settings"]:
            with fewer.apply(model, setting(said)):
                assert_close(model(plane, 0, z["context"]), z[said["tag"] + ".out"], atol=1e-4, rtol=1e-4)


# -- what holds on every host ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_ratio_nought_is_the_model_and_removal_is_exact(kind: str) -> None:
    model, given = denoiser(kind)
    before = snapshot(model)
    with torch.no_grad():
        plain = model(**given)[0]
        with fewer.apply(model, form(kind, ",ratio=0")):
            assert torch.equal(model(**given)[0], plain)
        with fewer.apply(model, form(kind)) as session:
            reduced = model(**given)[0]
            assert not torch.equal(reduced, plain)
            assert torch.equal(model(**given)[0], reduced), "the same call gives the same picture"
            assert session.ledger.gflops < session.ledger.gflops_full
            assert "rows per block" in session.report()
        assert torch.equal(model(**given)[0], plain)
    same_snapshot(before, snapshot(model), "after a session in a denoiser")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ROTATING])
@pytest.mark.parametrize("more", [",proportional=true", "", ",cross=true,mlp=true"])
def test_rows_that_are_all_alike_are_merged_without_loss(kind: str, more: str) -> None:
    """Where words are keys beside them (SD3), only keys that weigh as many rows as they stand for lose nothing."""
    model, given = denoiser(kind)
    for block in DiffusionHost(model).blocks:
        block.register_forward_pre_hook(alike, with_kwargs=True)
    with torch.no_grad():
        plain = model(**given)[0]
        with fewer.apply(model, form(kind, more)):
            got = model(**given)[0]
    lossless = kind != "sd3" or more == ",proportional=true"
    assert torch.allclose(got, plain, atol=2e-5, rtol=1e-4) == lossless


def alike(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if args:
        return (args[0].mean(1, keepdim=True).expand_as(args[0]).contiguous(), *args[1:]), kwargs
    x = kwargs["hidden_states"]
    return args, kwargs | {"hidden_states": x.mean(1, keepdim=True).expand_as(x).contiguous()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", ["", ",proportional=true", ",cross=true,mlp=true"])
def test_both_branches_in_a_batch_are_two_passes(kind: str, more: str) -> None:
    model, given = denoiser(kind, batch=2)
    with torch.no_grad(), fewer.apply(model, form(kind, more)) as session:
        together = model(**given)[0]
        for i in range(2):
            session.begin()
            assert_close(model(**part(given, slice(i, i + 1)))[0], together[i : i + 1], atol=1e-5, rtol=1e-4)


def test_branches_asked_one_after_the_other_share_their_draw() -> None:
    model, given = denoiser("dit", batch=1)
    with torch.no_grad(), fewer.apply(model, "tomesd") as session:
        rows = []
        for _ in range(2):
            for label in (1, 3):
                model(**given | {"class_labels": torch.tensor([label])})
                rows.append(session.kept(0))
            given = given | {"hidden_states": given["hidden_states"].clone(), "timestep": given["timestep"] - 100}
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2]), "another step, another draw"


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_what_the_paper_says(kind: str) -> None:
    """Every self-attention against a slow twin: the mean of each group goes in, its answer goes to all of it."""
    model, given = denoiser(kind)
    host, seen = DiffusionHost(model), []
    attentions = [op for op in host.operations if op.kind == "attention"]

    def watch(op: Any) -> Any:
        return lambda module, args, kwargs, out: seen.append((op, args, kwargs, out))

    hooks = [host.part(op).register_forward_hook(watch(op), with_kwargs=True) for op in attentions]
    with torch.no_grad(), fewer.apply(model, form(kind)) as session:
        model(**given)
        plans = session.trace.plans
    for hook in hooks:
        hook.remove()
    checked = 0
    with torch.no_grad():
        for op, args, kwargs, out in seen:
            plan = plans.get(op.block)
            rows = args[0] if args else kwargs["hidden_states"]
            if plan is None or host.rotates(args, kwargs) or rows.shape[1] != plan.n:
                continue
            dense = plan.dense()
            merged = dense @ rows
            again = (
                host.part(op)(merged, *args[1:], **kwargs)
                if args
                else host.part(op)(**kwargs | {"hidden_states": merged})
            )
            again = again[0] if isinstance(again, tuple) else again
            back = (dense > 0).float().transpose(1, 2) @ again
            assert_close(back, out[0] if isinstance(out, tuple) else out, atol=1e-5, rtol=1e-4)
            checked += 1
    assert checked or kind in ROTATING


class Kernel(TorchFunctionMode):
    """What the fused kernel is given, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append(dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {}))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ROTATING)
def test_rows_are_merged_behind_their_rotation(kind: str) -> None:
    """The fused kernel is given means of queries, keys and values that were turned to their positions before; words
    beside them stay as they are. So in the first block, where nothing else has changed yet."""
    model, given = denoiser(kind)
    with torch.no_grad():
        with Kernel() as full:
            model(**given)
        with fewer.apply(model, form(kind, ",proportional=true")) as session, Kernel() as reduced:
            model(**given)
        plan = session.trace.plans[0]
    reduced.calls = [call for call in reduced.calls if call["query"].shape[0] == 2]  # without the trial of word order
    words = 0 if kind == "wan" else 5
    for name in ("query", "key", "value"):
        whole, part_ = full.calls[0][name], reduced.calls[0][name]
        assert part_.shape[-2] == words + plan.m == words + plan.n // 2
        assert torch.equal(part_[..., :words, :], whole[..., :words, :])
        assert_close(part_[..., words:, :], plan.dense()[:, None] @ whole[..., words:, :], atol=1e-5, rtol=1e-4)
    bias = reduced.calls[0]["attn_mask"][:, 0, 0]
    assert_close(bias[:, words:], plan.sizes(None).log())
    assert not bias[:, :words].any()


# -- calls that change, break off, or share a model --------------------------------------------------------------------
def test_another_resolution_between_calls() -> None:
    model, given = denoiser("sd15")
    with torch.no_grad(), fewer.apply(model, "tomesd") as session:
        for height, width in ((16, 16), (8, 24), (10, 6)):
            x = torch.randn(2, 4, height, width)
            model(**given | {"sample": x})
            assert session.counts[0] == height * width - height * width // 2
            assert session.trace.plans[0].n == height * width


def test_a_grid_too_small_for_a_cell_is_left_alone_and_said() -> None:
    model, given = denoiser("dit")
    with torch.no_grad():
        plain = model(**given)[0]
        with fewer.apply(model, "tomesd:sx=9") as session:
            assert torch.equal(model(**given)[0], plain)
            assert "holds no cell of 2 x 9" in session.report()


def test_an_odd_grid_keeps_what_stands_behind_the_last_cell() -> None:
    model, given = denoiser("sd15")
    with torch.no_grad(), fewer.apply(model, "tomesd:ratio=0.75") as session:
        model(**given | {"sample": torch.randn(2, 4, 18, 14)})
        assert session.counts[0] == 18 * 14 // 4
        assert model(**given | {"sample": torch.randn(2, 4, 16, 16)})[0].isfinite().all()


def test_an_error_inside_a_pass_leaves_the_next_one_as_it_is() -> None:
    model, given = denoiser("dit")
    with torch.no_grad():
        plain = model(**given)[0]
        with fewer.apply(model, "tomesd"):
            want = model(**given)[0]
            with pytest.raises(RuntimeError):
                model(**given | {"class_labels": torch.zeros(3, dtype=torch.long)})
            assert torch.equal(model(**given)[0], want)
        assert torch.equal(model(**given)[0], plain)


class Pipe:
    """What a pipeline of diffusers has, as far as it is asked."""

    def __init__(self, **components: Any) -> None:
        self.components = components


def test_a_pipeline_is_asked_for_its_denoiser() -> None:
    model, _ = denoiser("sd15")
    first, second = Pipe(unet=model, scheduler=None), Pipe(unet=model, vae=nn.Linear(1, 1))
    with torch.no_grad(), fewer.apply(first, "tomesd") as session:
        assert session.model is model
        with pytest.raises(fewer.SessionError, match="already has a session"):
            fewer.apply(second, "tomesd")
    with pytest.raises(HostError, match=r"no denoiser was found; it holds vae \(Linear\)"):
        fewer.apply(Pipe(vae=nn.Linear(1, 1)), "tomesd")


@pytest.mark.parametrize("ratio", ["1.0", "-0.1", "1.5"])
def test_a_ratio_outside_its_range(ratio: str) -> None:
    with pytest.raises(BudgetError, match="outside"):
        fewer.parse(f"tomesd:ratio={ratio}")


def test_methods_and_hosts_that_do_not_fit() -> None:
    model, _ = denoiser("dit")
    with pytest.raises(HostError, match="tome shortens the sequence from block to block"):
        fewer.apply(model, "tome")
    for site in ("around_operation", "denoising"):
        with pytest.raises(HostError, match=f"random:site={site} shortens the sequence"):
            fewer.apply(model, f"random:site={site}")
    with pytest.raises(HostError, match="tomesd acts in a denoiser, and ViT"):
        fewer.apply(tiny_vit(), "tomesd")


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "flux", "wan", "cogvideox"])
def test_lora_on_top(kind: str) -> None:
    peft = pytest.importorskip("peft")
    model, given = denoiser(kind)
    tuned = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model.add_adapter(tuned)
    with torch.no_grad():
        plain = model(**given)[0]
        with fewer.apply(model, form(kind)):
            assert not torch.equal(model(**given)[0], plain)
        assert torch.equal(model(**given)[0], plain)


def test_gradients_flow_through() -> None:
    model, given = denoiser("dit")
    with fewer.apply(model, "tomesd:mlp=true"):
        model(**given)[0].square().mean().backward()
    learning = [p for block in model.transformer_blocks for p in (*block.attn1.parameters(), *block.ff.parameters())]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning)


def test_bfloat16_and_autocast() -> None:
    model, given = denoiser("sd15")
    name = sample_of(given)
    with torch.no_grad(), fewer.apply(model, "tomesd:proportional=true"):
        want = model(**given)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(**given)[0] - want).abs().mean() < 0.1
    model = model.to(torch.bfloat16)
    half = {k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
    with torch.no_grad(), fewer.apply(model, "tomesd:proportional=true"):
        assert model(**half)[0].dtype == half[name].dtype


def test_a_draw_depends_on_step_block_and_seed_alone() -> None:
    place = torch.arange(64)
    one = Moment(step=3).draw(place, 0, 2)
    assert torch.equal(one, Moment(step=3, evaluation=9).draw(place, 0, 2))
    others = Moment(step=4).draw(place, 0, 2), Moment(step=3).draw(place, 1, 2), Moment(step=3).draw(place, 0, 1)
    assert all(not torch.equal(one, other) for other in others)
    assert 0 <= float(one.min()) <= float(one.max()) < 1
    assert abs(float(Moment(step=1).draw(torch.arange(4096), 0, 0).mean()) - 0.5) < 0.03


def test_steps_follow_the_order_of_the_sampler() -> None:
    model, given = denoiser("dit")

    class Heun:
        order = 2
        timesteps: Any = torch.arange(0)

        def set_timesteps(self, count: int) -> None:
            self.timesteps = torch.arange(2 * count - 1)

    scheduler = Heun()
    with torch.no_grad(), fewer.apply(Pipe(transformer=model, scheduler=scheduler), "tomesd") as session:
        scheduler.set_timesteps(3)
        kept = []
        for _ in range(5):
            model(**given)
            kept.append(session.kept(0))
            given = given | {"hidden_states": given["hidden_states"].clone()}
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[2], kept[3])
    assert not torch.equal(kept[1], kept[2])
    assert "set_timesteps" not in vars(scheduler)
