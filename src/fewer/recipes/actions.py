"""Train the embedded video classifier on clips of moving pictures.

A plain `transformers` VideoMAE, from scratch, with one head for the answers to all questions of
`fewer.datasets.clips.QUESTIONS` side by side: the loss is the mean of one cross-entropy per question. No clip is seen
twice. Most steps show it a random share of the tokens (as `fewer.recipes.classify` does), the last ones all of them.

    report = train("out")                     # the shipped weights
    report = train("out", Recipe(clips=2000)) # the same shape of run, shorter
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from fewer.datasets import clips
from fewer.datasets.clips import Clips, Setting
from fewer.models.zoo import Processor
from fewer.recipes.classify import FLOAT32_ATTENTION
from fewer.recipes.loop import At, Folder, Loop, muon_and_adamw

__all__ = ["CLIPS", "Recipe", "Report", "build", "correct", "labels", "train"]

CLIPS = Processor(size=(clips.SIZE, clips.SIZE), mean=(0.12,), std=(0.16,))
"""Grey frames at their own size; mean and standard deviation of training clips, scaled to 0..1."""


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on besides the pictures; the defaults made the shipped weights.

    clips: seen in all. batch: clips per step. phases: (share of the steps, share of the tokens kept), in order.
    camera: share of the clips with a moving camera.
    lr, lr_rest: peak rates of Muon (matrices in the blocks) and AdamW (everything else). warmup, hold: shares of the
        steps spent rising and at the peak; from there linearly to zero.
    start: a folder with a model of the same shape to go on from; None = fresh weights.
    width, depth, heads: the model. bfloat16: multiply matrices in it. threads: of torch (None leaves them).
    """

    clips: int = 44_800
    batch: int = 32
    phases: tuple[tuple[float, float], ...] = ((0.8, 0.4), (0.2, 1.0))
    camera: float = 0.1
    start: str | None = None
    lr: float = 4e-3
    lr_rest: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.03
    hold: float = 0.4
    width: int = 96
    depth: int = 6
    heads: int = 3
    bfloat16: bool = True
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.clips < self.batch:
            raise ValueError(f"Recipe(clips={self.clips}): at least one batch of {self.batch}")
        if not math.isclose(sum(share for share, _ in self.phases), 1.0):
            raise ValueError(f"Recipe(phases={self.phases}): the shares of the steps must add up to 1")


@dataclass(frozen=True)
class Report:
    """What a run came to. accuracy: per question, and the mean, over test clips with all tokens; by level."""

    accuracy: dict[str, dict[str, float]]
    test_clips: int
    steps: int
    seconds: float
    parameters: int


def labels() -> list[str]:
    """The names of the head's outputs: question and answer."""
    return [f"{question}: {answer}" for question, answers in clips.QUESTIONS.items() for answer in answers]


def build(recipe: Recipe) -> VideoMAEForVideoClassification:
    """A fresh VideoMAE with starts that suit a narrow model."""
    names = labels()
    config = VideoMAEConfig(  # type: ignore[call-arg]
        image_size=clips.SIZE,
        patch_size=clips.PATCH,
        num_channels=1,
        num_frames=clips.FRAMES,
        tubelet_size=clips.TUBELET,
        hidden_size=recipe.width,
        num_hidden_layers=recipe.depth,
        num_attention_heads=recipe.heads,
        intermediate_size=4 * recipe.width,
        use_mean_pooling=True,
        id2label=dict(enumerate(names)),
        label2id={name: k for k, name in enumerate(names)},
        questions={question: len(answers) for question, answers in clips.QUESTIONS.items()},
    )
    model = VideoMAEForVideoClassification(config)
    head: Any = model.classifier
    projection: Any = model.videomae.embeddings.patch_embeddings.projection
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.normal_(projection.weight, std=projection.weight[0].numel() ** -0.5)
        nn.init.zeros_(head.weight)
    return model


class TokenDrop:
    """Forward hook for the embeddings: in training, each clip keeps its own random tokens, a share `keep` of them."""

    keep = 1.0

    def __call__(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        """embedded: (B, N, D) -> (B, round(keep * N), D)."""
        n = embedded.shape[1]
        count = round(self.keep * n)
        if not module.training or count == n:
            return embedded
        chosen = torch.rand(embedded.shape[:2]).topk(count).indices.sort().values
        return embedded.gather(1, chosen[..., None].expand(-1, -1, embedded.shape[2]))


def train(out: str | Path, recipe: Recipe | None = None, *, log: Callable[[str], None] = print) -> Report:
    """Train the classifier and save it where `fewer.models.zoo.load_model(out)` reads it.

    Raises   DataError without the training pictures of Fashion-MNIST.
    """
    recipe = recipe or Recipe()
    folder = Folder(out, recipe, log, every=2)
    model = build(recipe)
    if recipe.start is not None:
        model = VideoMAEForVideoClassification.from_pretrained(recipe.start)
    model.set_attn_implementation(FLOAT32_ATTENTION)
    drop = TokenDrop()
    hook = model.videomae.embeddings.register_forward_hook(drop)
    steps = recipe.clips // recipe.batch
    ends = [round(share * steps) for share in accumulate(share for share, _ in recipe.phases)]

    def loss(batch: Clips, at: At) -> dict[str, Any]:
        drop.keep = next(keep for end, (_, keep) in zip(ends, recipe.phases, strict=True) if at.step < end)
        model.train()
        with at.autocast():
            logits = model(pixel_values=pixels(batch)).logits.float()
        wrong, right = [], {}
        for k, (name, part) in enumerate(split(logits).items()):
            wrong.append(F.cross_entropy(part, batch.answers[:, k]))
            right[name] = (part.argmax(-1) == batch.answers[:, k]).float().mean()
        return {"loss": torch.stack(wrong).mean(), **right}

    loop = Loop(
        steps, recipe.warmup, "warmup_stable_decay", decay=1 - recipe.warmup - recipe.hold, bfloat16=recipe.bfloat16,
        every=25, save=200,
    )  # fmt: skip
    optimizers = muon_and_adamw(recipe, [model.videomae], [(1.0, model.parameters())])
    lines = loop.run(model, optimizers, _batches(recipe), loss, folder)
    hook.remove()
    model.save_pretrained(out)
    CLIPS.save(out)
    tested = {level: clips.exam(500, level) for level in clips.LEVELS}
    found = {}
    for level, asked in tested.items():
        share = correct(model, asked).float().mean(0)
        found[level] = {
            **dict(zip(clips.QUESTIONS, share.tolist(), strict=True)), "mean": float(share.mean())
        }  # fmt: skip
    report = Report(found, 500, steps, lines[-1]["seconds"], sum(p.numel() for p in model.parameters()))
    folder.finish(report)
    return report


def pixels(batch: Clips) -> Tensor:
    """(B, T, 1, H, W) float32, as the model takes them."""
    return CLIPS.normalise(batch.pixels[:, :, None])


def split(logits: Tensor) -> dict[str, Tensor]:
    """The answers to each question among the head's outputs. logits: (B, outputs)."""
    sizes = [len(answers) for answers in clips.QUESTIONS.values()]
    return dict(zip(clips.QUESTIONS, logits.split(sizes, -1), strict=True))


@torch.inference_mode()
def correct(model: nn.Module, asked: Clips, *, batch: int = 50) -> Tensor:
    """(N, Q) bool: which questions about which clips the model answers rightly, in evaluation mode."""
    model.eval()
    right = []
    for part in torch.arange(len(asked)).split(batch):
        given = CLIPS.normalise(asked.pixels[part][:, :, None])
        answers = split(model(pixel_values=given).logits)
        right.append(torch.stack([a.argmax(-1) for a in answers.values()], 1) == asked.answers[part])
    return torch.cat(right)


def _batches(recipe: Recipe) -> Iterator[Clips]:
    """Clips without end, drawn from torch's global generator."""
    setting = Setting(camera=recipe.camera)
    while True:
        seed = int(torch.randint(1 << 60, ()))
        yield clips.compose(recipe.batch, "train", setting, generator=torch.Generator().manual_seed(seed))
