"""Train the embedded classifier, mostly on a fifth of its tokens.

A plain `transformers` ViT learns Fashion-MNIST on two CPU cores. Most steps show it a random 20 % of the patches
(PatchDropout, arXiv:2208.07220: sample patches in training, use all at test time; the idea of hiding most of a
picture is MAE's, arXiv:2111.06377), later steps half of them, and the last few all of them. Matrices inside the
blocks are stepped by Muon, the rest by AdamW; `transformers.Trainer` drives one optimizer only, hence the loop here.

    report = train("out")                     # the shipped weights
    report = train("out", epochs=0.1)         # the same shape of run, shorter
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, ViTConfig, ViTForImageClassification
from transformers.masking_utils import sdpa_mask

from fewer.datasets.images import ImageSet, fashion_mnist
from fewer.models.zoo import Processor
from fewer.recipes.loop import At, Folder, Loop, muon_and_adamw, shuffled

__all__ = ["PatchDrop", "Recipe", "Report", "accuracy", "build", "grid_sincos", "train"]

FASHION = Processor(size=(28, 28), mean=(0.2860,), std=(0.3530,))
"""Grey pictures at their own size; mean and standard deviation of the training pixels, scaled to 0..1."""

FLOAT32_ATTENTION = "fewer_float32_attention"
"""For `model.set_attn_implementation` while training under bfloat16 autocast."""


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on besides the data; the defaults made the shipped weights.

    epochs: passes over the training set, in all phases together.
    phases: (share of the steps, share of the patches kept) in order; the first shares add up to 1.
    batch: pictures per step. threads: torch threads (None leaves them), which change speed and the last digits.
    lr, lr_rest: peak learning rates of Muon (matrices in the blocks) and AdamW (everything else).
    warmup, hold: shares of the steps spent rising linearly and at the peak; from there linearly to zero.
    smoothing: label smoothing. flip: chance of mirroring a picture.
    width, depth, heads, patch: the model.
    bfloat16: multiply matrices in bfloat16 (weights stay float32); twice as fast where the processor has the
        instructions for it (avx512_bf16, amx_bf16), several times slower where it has not.
    seed: initial weights, order, mirroring and kept patches.
    """

    epochs: float = 7.0
    phases: tuple[tuple[float, float], ...] = ((0.82, 0.2), (0.16, 0.5), (0.02, 1.0))
    batch: int = 128
    lr: float = 3e-3
    lr_rest: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.02
    hold: float = 0.25
    smoothing: float = 0.1
    flip: float = 0.5
    width: int = 96
    depth: int = 12
    heads: int = 3
    patch: int = 2
    bfloat16: bool = True
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if not math.isclose(sum(share for share, _ in self.phases), 1.0):
            raise ValueError(f"Recipe(phases={self.phases}): the shares of the steps must add up to 1")
        if not all(0 < keep <= 1 for _, keep in self.phases):
            raise ValueError(f"Recipe(phases={self.phases}): the kept shares must lie in (0, 1]")
        if self.epochs <= 0:
            raise ValueError(f"Recipe(epochs={self.epochs}): must be above 0; 0.05 is enough for a smoke test")


@dataclass(frozen=True)
class Report:
    """What a run came to. accuracy: share of all test pictures, all tokens. seconds: training and tests."""

    accuracy: float
    test_pictures: int
    steps: int
    seconds: float
    parameters: int


class PatchDrop:
    """Forward hook for a ViT's embeddings: in training, each picture keeps CLS and its own random patches.

    keep: share of the patches, rounded to the nearest count and at least one. Position embeddings were added
    before, so a kept patch still knows where it was. In evaluation mode the hook does nothing.
    """

    def __init__(self, keep: float = 1.0) -> None:
        self.keep = keep

    def __call__(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        """embedded: (B, 1 + N, D) -> (B, 1 + round(keep * N), D)."""
        batch, n = embedded.shape[0], embedded.shape[1] - 1
        count = max(1, round(self.keep * n))
        if not module.training or count == n:
            return embedded
        chosen = torch.rand(batch, n, device=embedded.device).topk(count).indices.sort().values + 1
        kept = embedded.gather(1, chosen[..., None].expand(-1, -1, embedded.shape[2]))
        return torch.cat([embedded[:, :1], kept], dim=1)


def grid_sincos(side: int, width: int, *, wavelength: float = 100.0) -> Tensor:
    """Fixed sine-cosine codes of a `side` x `side` grid, row by row: (side * side, width), values in [-1, 1].

    Half of the width codes the row, half the column, at width / 4 frequencies from 1 down to 1 / `wavelength`.
    Source: arXiv:1706.03762, in two dimensions as in arXiv:2205.01580 (whose longest wavelength is 10,000).
    """
    if width % 4:
        raise ValueError(f"grid_sincos(width={width}): sine and cosine of row and column need a multiple of 4")
    frequencies = wavelength ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width)


def build(recipe: Recipe, classes: tuple[str, ...], processor: Processor) -> ViTForImageClassification:
    """A fresh ViT with starts that suit a narrow model: the library's own 0.02 drowns a patch of four pixels."""
    config = ViTConfig(
        image_size=processor.size[0],
        patch_size=recipe.patch,
        num_channels=len(processor.mean),
        hidden_size=recipe.width,
        num_hidden_layers=recipe.depth,
        num_attention_heads=recipe.heads,
        intermediate_size=4 * recipe.width,
        id2label=dict(enumerate(classes)),
        label2id={name: label for label, name in enumerate(classes)},
    )
    model = ViTForImageClassification(config)
    head: Any = model.classifier
    embeddings = model.vit.embeddings
    projection = embeddings.patch_embeddings.projection
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.normal_(projection.weight, std=projection.weight[0].numel() ** -0.5)
        nn.init.zeros_(head.weight)
        embeddings.position_embeddings[0, 1:] = grid_sincos(processor.size[0] // recipe.patch, recipe.width)
    return model


def train(
    out: str | Path,
    *,
    epochs: float | None = None,
    seed: int | None = None,
    threads: int | None = None,
    recipe: Recipe | None = None,
    data: tuple[ImageSet, ImageSet] | None = None,
    processor: Processor = FASHION,
    log: Callable[[str], None] = print,
) -> Report:
    """Train a classifier and save it where `fewer.models.zoo.load_model(out)` reads it.

    out: folder for the weights, the processor, log.jsonl and report.json; and, until it is done, for the state a run
        that was killed goes on from.
    epochs, seed, threads: change these fields of `recipe` (default `Recipe()`).
    data: (train, test) sets whose pictures are uint8 arrays of the processor's size; default Fashion-MNIST.
    log: receives one line every 50 steps and after every test.
    Between phases a tenth of the test set is tried, for the log only: nothing is chosen by it.
    Raises ValueError if the pictures do not have the processor's size.
    """
    changes: dict[str, Any] = {"epochs": epochs, "seed": seed, "threads": threads}
    recipe = replace(recipe or Recipe(), **{name: value for name, value in changes.items() if value is not None})
    folder = Folder(out, recipe, log)
    out = folder.path
    train_set, test_set = data or (fashion_mnist("train"), fashion_mnist("test"))
    pixels, labels = _pixels(train_set, processor), train_set.labels

    model = build(recipe, train_set.classes, processor)
    model.set_attn_implementation(FLOAT32_ATTENTION)
    drop = PatchDrop()
    hook = model.vit.embeddings.register_forward_hook(drop)
    steps = max(len(recipe.phases), round(recipe.epochs * (len(labels) // recipe.batch)))
    ends = [round(share * steps) for share in accumulate(share for share, _ in recipe.phases)]
    sample = test_set.take(range(0, len(test_set), 10))
    accurate = 0.0

    def loss(batch: Tensor, at: At) -> dict[str, Any]:
        drop.keep = next(keep for end, (_, keep) in zip(ends, recipe.phases, strict=True) if at.step < end)
        x = processor.normalise(pixels[batch])
        mirrored = torch.rand(len(batch)) < recipe.flip
        x[mirrored] = x[mirrored].flip(-1)
        model.train()
        with at.autocast():
            logits = model(pixel_values=x).logits
        wrong = F.cross_entropy(logits.float(), labels[batch], label_smoothing=recipe.smoothing)
        return {"loss": wrong, "keep": drop.keep}

    def test(at: At) -> None:
        nonlocal accurate
        if (done := at.step + 1) in ends:
            tested = test_set if done == steps else sample
            accurate = accuracy(model, tested, processor)
            log(f"step {done}  test accuracy {accurate:.4f} of {len(tested):,} pictures")

    loop = Loop(
        steps, recipe.warmup, "warmup_stable_decay", decay=1 - recipe.warmup - recipe.hold, bfloat16=recipe.bfloat16,
        every=50,
    )  # fmt: skip
    optimizers = muon_and_adamw(recipe, [model.vit], [(1.0, model.parameters())])
    lines = loop.run(model, optimizers, shuffled(len(labels), recipe.batch), loss, folder, after=test)
    hook.remove()
    model.save_pretrained(out)
    processor.save(out)
    report = Report(
        accuracy=accurate,
        test_pictures=len(test_set),
        steps=steps,
        seconds=lines[-1]["seconds"],
        parameters=sum(p.numel() for p in model.parameters()),
    )
    folder.finish(report)
    return report


@torch.inference_mode()
def accuracy(model: nn.Module, data: ImageSet, processor: Processor, *, batch: int = 100) -> float:
    """Share of the pictures whose highest logit is their label, with the model in evaluation mode."""
    model.eval()
    right = 0
    for part in torch.arange(len(data)).split(batch):
        guess = model(pixel_values=data.batch(part, processor)).logits.argmax(dim=-1)
        right += int((guess == data.labels[part]).sum())
    return right / len(data)


def _float32_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **unused: Any
) -> tuple[Tensor, None]:
    """Fused attention in float32 whatever the autocast: on CPU its bfloat16 backward pass takes five times as long."""
    causal = mask is None and getattr(module, "is_causal", False)  # then transformers leaves the mask to the kernel
    with torch.autocast(q.device.type, enabled=False):
        mixed = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=mask, scale=scaling, is_causal=causal
        )
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(FLOAT32_ATTENTION, _float32_attention)
AttentionMaskInterface.register(FLOAT32_ATTENTION, sdpa_mask)


def _pixels(data: ImageSet, processor: Processor) -> Tensor:
    """(N, C, H, W) uint8."""
    pictures = torch.as_tensor(data.pictures)
    if pictures.ndim == 3:
        pictures = pictures[..., None]
    expected = (*processor.size, len(processor.mean))
    if tuple(pictures.shape[1:]) != expected:
        raise ValueError(f"{data.name}: pictures are {tuple(pictures.shape[1:])}; this processor takes {expected}")
    return pictures.permute(0, 3, 1, 2).contiguous()
