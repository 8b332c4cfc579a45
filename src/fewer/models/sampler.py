"""Pictures from a class-conditional denoiser that works on pixels: the loop around dit-fashion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Sampler:
    """Straight paths from noise to pictures. It has what a pipeline of diffusers has, so `fewer.apply` takes it.

        model, sampler = load_model("dit-fashion")
        with fewer.apply(sampler, "tomesd"):
            pictures = sampler(torch.arange(10))     # (10, 1, 32, 32) in -1..1

    scheduler: of diffusers, for flow matching; FlowMatchHeunDiscreteScheduler asks the model twice a step.
    guidance: 1 = none; else both branches are asked in one batch, without a class first.
    """

    def __init__(self, model: nn.Module, scheduler: Any = None, guidance: float = 1.0) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.model: Any = model
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        self.guidance = guidance

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.model, "scheduler": self.scheduler}

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guidance != 1

    @property
    def classes(self) -> int:
        return int(self.model.config.num_embeds_ada_norm)

    def noise(self, count: int, seed: int) -> Tensor:
        """(count, C, H, W): where paths begin. Picture i is the same for any count."""
        side, channels = self.model.config.sample_size, self.model.config.in_channels
        draws = [torch.randn(channels, side, side, generator=torch.Generator().manual_seed(seed * 1_000_003 + i))
                 for i in range(count)]  # fmt: skip
        return torch.stack(draws)

    @torch.inference_mode()
    def __call__(self, labels: Tensor, steps: int = 20, *, seed: int = 0, noise: Tensor | None = None) -> Tensor:
        """Pictures of some classes, (B, C, H, W) float32. labels: (B,). noise: (B, C, H, W), instead of drawing it.

        Raises   ValueError for a class the model does not know, or no steps.
        """
        if steps < 1:
            raise ValueError(f"steps={steps}: a path has at least one")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ValueError(
                f"labels lie in {int(labels.min())}..{int(labels.max())}; there are {self.classes} classes"
            )
        own = next(self.model.parameters())
        x = (self.noise(len(labels), seed) if noise is None else noise).to(own.device, torch.float32)
        labels = labels.to(own.device)
        named = (
            torch.cat([torch.full_like(labels, self.classes), labels]) if self.do_classifier_free_guidance else labels
        )
        self.scheduler.set_timesteps(steps)
        for time in self.scheduler.timesteps:
            both = torch.cat([x, x]) if self.do_classifier_free_guidance else x
            said = self.model(both.to(own.dtype), timestep=time.expand(len(both)), class_labels=named).sample.float()
            if self.do_classifier_free_guidance:
                without, with_ = said.chunk(2)
                said = without + self.guidance * (with_ - without)
            x = self.scheduler.step(said, time, x).prev_sample
        return x
