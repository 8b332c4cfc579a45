"""Train the small picture generator: a class-conditional DiT on Fashion-MNIST, in pixels, of 256 tokens.

    report = train("out")                                   # the shipped weights
    report = train("out", recipe=Recipe(steps=200))         # the same shape of run, shorter

A plain `DiTTransformer2DModel` of diffusers learns the straight path from noise to picture (rectified flow,
arXiv:2209.03003, with times drawn as in arXiv:2403.03206). Most steps show it a random half of the tokens, which is
cheaper and, as in MaskDiT (arXiv:2306.09305), costs little; the last ones all of them. What is kept is a running mean
of the weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.datasets.images import ImageSet, fashion_mnist
from fewer.recipes.loop import At, Folder, Loop, muon_and_adamw, shuffled

__all__ = ["Recipe", "Report", "build", "pictures", "train", "velocity"]

SIDE = 32
"""Pixels of a picture's edge: with patches of two, 16 x 16 tokens."""


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on besides the data; the defaults made the shipped weights.

    steps, batch: how many updates, and pictures in each.
    phases: (share of the steps, share of the tokens shown) in order; the first shares add up to 1.
    lr, lr_rest: peak learning rates of Muon (matrices in the blocks) and AdamW (everything else).
    warmup, decay: shares of the steps in which they rise and fall.
    average: the running mean keeps this much of itself at each step.
    unlabelled: share of the pictures shown without their class, for guidance.
    width, depth, heads, patch: the model.
    """

    steps: int = 920
    batch: int = 64
    phases: tuple[tuple[float, float], ...] = ((0.935, 0.5), (0.065, 1.0))
    lr: float = 3e-3
    lr_rest: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.0609
    decay: float = 0.13
    average: float = 0.998
    unlabelled: float = 0.1
    width: int = 96
    depth: int = 8
    heads: int = 3
    patch: int = 2
    bfloat16: bool = True
    seed: int = 0
    threads: int | None = 1

    def __post_init__(self) -> None:
        if not math.isclose(sum(share for share, _ in self.phases), 1.0):
            raise ValueError(f"Recipe(phases={self.phases}): the shares of the steps must add up to 1")
        if not all(0 < keep <= 1 for _, keep in self.phases):
            raise ValueError(f"Recipe(phases={self.phases}): the shares of the tokens must lie in (0, 1]")
        if self.steps < 1:
            raise ValueError(f"Recipe(steps={self.steps}): must be at least 1; 50 is enough for a smoke test")
        if self.width % self.heads or SIDE % self.patch:
            raise ValueError(
                f"Recipe(width={self.width}, heads={self.heads}, patch={self.patch}): heads divide the width, and "
                f"patches the {SIDE} pixels of an edge"
            )


@dataclass(frozen=True)
class Report:
    """What a run came to. loss: mean over the last hundred steps, per pixel. seconds: of training."""

    loss: float
    steps: int
    pictures: int
    seconds: float
    parameters: int


def pictures(data: ImageSet) -> Tensor:
    """(N, 1, 32, 32) float32 in -1..1: the grey pictures of a set, enlarged from 28 pixels bilinearly.

    Raises   ValueError where the pictures are no 28 x 28 grey arrays.
    """
    raw = torch.as_tensor(np.asarray(data.pictures))
    if raw.dim() != 3 or raw.shape[1:] != (28, 28):
        raise ValueError(f"{data.name}: pictures are {tuple(raw.shape[1:])}; this recipe takes 28 x 28 grey ones")
    return F.interpolate(raw[:, None].float() / 127.5 - 1, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


def build(recipe: Recipe, classes: int) -> Any:
    """A fresh `DiTTransformer2DModel` whose blocks begin as the identity and whose output begins at zero."""
    from diffusers import DiTTransformer2DModel

    model: Any = DiTTransformer2DModel(
        num_attention_heads=recipe.heads, attention_head_dim=recipe.width // recipe.heads, in_channels=1,
        num_layers=recipe.depth, sample_size=SIDE, patch_size=recipe.patch, num_embeds_ada_norm=classes,
    )  # fmt: skip
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in model.transformer_blocks:
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        for last in (model.proj_out_1, model.proj_out_2):
            nn.init.zeros_(last.weight)
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # each would drop other labels: `train` drops them for all
    return model


def velocity(model: Any, x: Tensor, time: Tensor, labels: Tensor, shown: Tensor | None = None) -> Tensor:
    """What the model says of some tokens, (B, M, patch * patch), as `patches` cuts them.

    x: (B, 1, 32, 32). time: (B,) in 0..1000. labels: (B,), the number of classes for none. shown: (B, M) tokens that
    enter, each at its own position; None = all.
    """
    rows = model.pos_embed(x)
    if shown is not None:
        rows = rows.gather(1, shown[..., None].expand(-1, -1, rows.shape[-1]))
    for block in model.transformer_blocks:
        rows = block(rows, timestep=time, class_labels=labels)
    condition = model.transformer_blocks[0].norm1.emb(time, labels, hidden_dtype=rows.dtype)
    shift, scale = model.proj_out_1(F.silu(condition)).chunk(2, dim=1)
    return model.proj_out_2(model.norm_out(rows) * (1 + scale[:, None]) + shift[:, None])


def patches(x: Tensor, patch: int) -> Tensor:
    """(B, 1, H, W) -> (B, tokens, patch * patch), row by row, as the model's output has them."""
    return F.unfold(x, patch, stride=patch).transpose(1, 2)


class Float32Attention:
    """Fused attention in float32 whatever the autocast: on CPU its bfloat16 backward pass takes five times as long."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (
            part(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2).float()
            for part in (attn.to_q, attn.to_k, attn.to_v)
        )
        with torch.autocast(q.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(q, k, v)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def train(
    out: str | Path, *, recipe: Recipe | None = None, data: ImageSet | None = None, log: Callable[[str], None] = print
) -> Report:
    """Train a generator and save it where `DiTTransformer2DModel.from_pretrained(out)` reads it.

    out: folder for the weights (float16), log.jsonl and report.json; and, until it is done, for the state a run that
        was killed goes on from.
    data: 28 x 28 grey pictures; default the training split of Fashion-MNIST.
    log: receives one line every 100 steps.
    """
    recipe = recipe or Recipe()
    folder = Folder(out, recipe, log, every=4)
    data = data or fashion_mnist("train")
    pixels, labels, classes = pictures(data), data.labels, len(data.classes)
    model = build(recipe, classes)
    both = nn.ModuleDict({"now": model, "mean": copy.deepcopy(model).requires_grad_(False)})
    for block in model.transformer_blocks:
        block.attn1.set_processor(Float32Attention())
    tokens = (SIDE // recipe.patch) ** 2
    ends = [round(share * recipe.steps) for share in accumulate(share for share, _ in recipe.phases)]

    def loss(batch: Tensor, at: At) -> dict[str, Any]:
        keep = next(keep for end, (_, keep) in zip(ends, recipe.phases, strict=True) if at.step < end)
        clean = pixels[batch]
        noise = torch.randn_like(clean)
        time = torch.randn(len(batch)).sigmoid()
        mixed = torch.lerp(clean, noise, time[:, None, None, None])
        target = patches(noise - clean, recipe.patch)
        named = torch.where(torch.rand(len(batch)) < recipe.unlabelled, classes, labels[batch])
        shown = None
        if (count := round(keep * tokens)) < tokens:
            shown = torch.rand(len(batch), tokens).topk(count).indices.sort().values
            target = target.gather(1, shown[..., None].expand(-1, -1, target.shape[-1]))
        with at.autocast():
            said = velocity(model, mixed, 1000 * time, named, shown)
        return {"loss": F.mse_loss(said.float(), target), "shown": keep}

    def after(at: At) -> None:
        share = max(1 - recipe.average, 1 / (at.step + 1))
        with torch.no_grad():
            for mean, now in zip(both["mean"].parameters(), model.parameters(), strict=True):
                mean.lerp_(now, share)

    loop = Loop(
        recipe.steps, recipe.warmup, "warmup_stable_decay", decay=recipe.decay, bfloat16=recipe.bfloat16, every=25,
    )  # fmt: skip
    optimizers = muon_and_adamw(recipe, [model.transformer_blocks], [(1.0, model.parameters())])
    rows = loop.run(both, optimizers, shuffled(len(labels), recipe.batch), loss, folder, after=after)
    kept: Any = both["mean"]
    kept.half().save_pretrained(out)
    last = rows[-4:]
    report = Report(
        loss=sum(row["loss"] for row in last) / len(last),
        steps=recipe.steps,
        pictures=recipe.steps * recipe.batch,
        seconds=rows[-1]["seconds"],
        parameters=sum(p.numel() for p in kept.parameters()),
    )
    folder.finish(report)
    return report
