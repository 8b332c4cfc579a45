"""Whole pipelines of diffusers, with random weights: called as before, broken off, sharing a UNet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fewer
from denoisers import denoiser
from fewer.testing.checks import same_snapshot, snapshot

diffusers = pytest.importorskip("diffusers")


def components() -> dict[str, Any]:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                                  down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    return {
        "vae": vae.eval(), "unet": denoiser("sd15")[0], "scheduler": diffusers.DDIMScheduler(), "text_encoder": None,
        "tokenizer": None, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip


def call(pipe: Any, guidance: float = 3.0, steps: int = 4, **more: Any) -> Tensor:
    words = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(7))
    out = pipe(
        prompt_embeds=words[:1], negative_prompt_embeds=words[1:], num_inference_steps=steps, guidance_scale=guidance,
        output_type="latent", generator=torch.Generator().manual_seed(3), **more,
    )  # fmt: skip
    latent: Tensor = out.images
    return latent


@pytest.mark.parametrize("form", ["tomesd", "tomesd:proportional=true", "fora:every=2", "toca:every=2,ratio=0.3"])
def test_a_pipeline_is_called_as_before(form: str) -> None:
    pipe = diffusers.StableDiffusionPipeline(**components())
    pipe.set_progress_bar_config(disable=True)
    plain, free = call(pipe, height=32, width=32), call(pipe, 1.0, height=32, width=32)
    before = snapshot(pipe.unet), dict(vars(pipe.scheduler))
    told: list[int] = []

    def count(_pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        told.append(step)
        return values

    def stop(pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return values

    with fewer.apply(pipe, form) as session:
        reduced = call(pipe, height=32, width=32, callback_on_step_end=count)
        assert told == [0, 1, 2, 3]
        assert not torch.equal(reduced, plain)
        assert session.trace.moment.branches == 2, "both branches of guidance in one batch"
        assert session.trace.moment.evaluation == 3
        call(pipe, height=32, width=32, callback_on_step_end=stop)
        assert torch.equal(call(pipe, height=32, width=32), reduced), "what was broken off leaves nothing behind"
        assert not torch.equal(call(pipe, 1.0, height=32, width=32), free)
        assert session.trace.moment.branches == 1
        call(pipe, height=24, width=40, steps=3)
        assert torch.equal(call(pipe, height=32, width=32), reduced), "nor do another size and other steps"
        other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        call(other, steps=8, image=image, strength=0.5)
        assert torch.equal(call(pipe, height=32, width=32), reduced), "a pipeline that shares the UNet may run between"
    assert torch.equal(call(pipe, height=32, width=32), plain)
    same_snapshot(before[0], snapshot(pipe.unet), "after a session on a pipeline")
    assert "set_timesteps" not in vars(pipe.scheduler)
