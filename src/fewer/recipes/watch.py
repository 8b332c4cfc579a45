"""Train what a method on videos brings along, on clips of moving pictures.

    report = train(Watching("stts:keep=0.5"), "out")         # modules for the packaged model
    session = fewer.apply(model, "stts:keep=0.5", modules="out")

The model stays as it is and is its own teacher: the method's modules learn to give its answers, and the right ones,
from fewer tokens. The noise of perturbed choices falls linearly to zero, as STTS has it (arXiv:2111.11591, sec. 3.3).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.datasets import clips
from fewer.datasets.clips import Clips, Setting, Split
from fewer.models.zoo import load_model
from fewer.recipes.actions import correct, pixels, split
from fewer.recipes.classify import FLOAT32_ATTENTION
from fewer.recipes.loop import At, Folder, Loop, decayed, hardware
from fewer.runtime.apply import apply
from fewer.spec import parse, text

__all__ = ["Report", "Watching", "train"]


@dataclass(frozen=True)
class Watching:
    """Everything a run depends on.

    method: a text form of a method that has modules to train. model: as in `load_model`; its head must know the
        questions of `fewer.datasets.clips`. split: whose pictures the clips are made of.
    steps, batch: updates, and clips in each. lr: peak rate (AdamW; warm-up, then half a cosine).
    labels, logits: weights of the right answers and of the teacher's.
    test: clips in the test. bfloat16: multiply in it while training. threads: of torch; None leaves them.
    """

    method: str = "stts"
    model: str = "video-actions"
    split: Split = "train"
    steps: int = 200
    batch: int = 16
    lr: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    labels: float = 1.0
    logits: float = 2.0
    test: int = 500
    bfloat16: bool = True
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"Watching(steps={self.steps}, batch={self.batch}): both must be at least 1")


@dataclass(frozen=True)
class Report:
    """What a run came to. accuracy: share of the questions about the test clips, by name: the unreduced model, the
    method trained and untrained. tokens: after each block."""

    method: str
    accuracy: dict[str, float]
    test_clips: int
    tokens: list[int]
    steps: int
    seconds: float
    parameters: int
    hardware: str
    lines: list[dict[str, float]] = field(default_factory=list, repr=False)


def train(
    recipe: Watching, out: str | Path, *, model: nn.Module | None = None, log: Callable[[str], None] = print
) -> Report:
    """Train a method's modules and save them where `fewer.apply(..., modules=out)` finds them.

    model: instead of the named one; it is left as it was. Raises ValueError for a method without modules or a model
    that does not answer the questions; what `apply`, `load_model` and the data raise.
    """
    from fewer.evaluation.video import answers_questions

    method, out = parse(recipe.method), Path(out)
    folder = Folder(out, recipe, log)
    net: Any = load_model(recipe.model)[0] if model is None else model
    if not answers_questions(net):
        raise ValueError(f"{recipe.model} does not answer questions about clips; video-actions does")
    teacher = copy.deepcopy(net).eval().requires_grad_(False)
    with ExitStack() as undo:
        frozen = [p for p in net.parameters() if p.requires_grad]
        undo.callback(lambda: [p.requires_grad_(True) for p in frozen])
        undo.callback(net.train, net.training)
        for parameter in frozen:
            parameter.requires_grad_(False)
        before = net.config._attn_implementation
        net.set_attn_implementation(FLOAT32_ATTENTION)
        undo.callback(net.set_attn_implementation, before)
        session = undo.enter_context(apply(net, method, modules="untrained"))
        if not list(session.modules.parameters()):
            raise ValueError(f"{text(method)} has nothing to train; methods that have: see `fewer list`")
        untrained = copy.deepcopy(session.modules)
        noisy: list[Any] = [m for m in session.modules.modules() if isinstance(getattr(m, "sigma", None), float)]
        sigmas: list[tuple[Any, float]] = [(m, m.sigma) for m in noisy]

        def loss(batch: Clips, at: At) -> dict[str, Tensor]:
            for module, sigma in sigmas:
                module.sigma = sigma * (1 - at.progress)
            x = pixels(batch)
            with at.autocast():
                with torch.no_grad():
                    taught = split(teacher(pixel_values=x).logits.float())
                given = split(net(pixel_values=x).logits.float())
            return _losses(recipe, given, taught, batch.answers)

        optimizer = torch.optim.AdamW(decayed(session.parameters(), recipe.weight_decay), lr=recipe.lr)
        net.train()
        loop = Loop(recipe.steps, recipe.warmup, bfloat16=recipe.bfloat16)
        lines = loop.run(session.modules, [optimizer], _batches(recipe), loss, folder)
        asked = clips.exam(recipe.test)
        found = {"unreduced": correct(teacher, asked), "trained": correct(net, asked)}
        counts = session.counts
    with apply(net, method, modules=untrained):
        found["untrained"] = correct(net, asked)
    report = Report(
        text(method), {k: round(float(v.float().mean()), 4) for k, v in found.items()}, recipe.test,
        [int(c) for c in counts], recipe.steps, lines[-1]["seconds"],
        sum(p.numel() for p in session.modules.parameters()), hardware(next(net.parameters()).device), lines,
    )  # fmt: skip
    card = {
        "recipe": json.dumps(asdict(recipe)),
        "data": f"clips of Fashion-MNIST's {recipe.split} pictures; tested on those in the package",
        **{k: v if isinstance(v, str) else json.dumps(v) for k, v in asdict(report).items() if k != "lines"},
    }
    session.save_modules(out, card)
    folder.finish(report)
    for name, value in report.accuracy.items():
        log(f"{name:>10}  accuracy {value:.4f}")
    return report


def _losses(
    watching: Watching, given: dict[str, Tensor], taught: dict[str, Tensor], answers: Tensor
) -> dict[str, Tensor]:
    """Means over the questions: of the right answers' cross-entropy, of the divergence from the teacher's."""
    wrong = [F.cross_entropy(part, answers[:, k]) for k, part in enumerate(given.values())]
    apart = [
        F.kl_div(part.log_softmax(-1), taught[name].log_softmax(-1), reduction="batchmean", log_target=True)
        for name, part in given.items()
    ]
    labels, logits = torch.stack(wrong).mean(), torch.stack(apart).mean()
    return {"loss": watching.labels * labels + watching.logits * logits, "labels": labels, "logits": logits}


def _batches(watching: Watching) -> Iterator[Clips]:
    while True:
        generator = torch.Generator().manual_seed(int(torch.randint(1 << 60, ())))
        yield clips.compose(watching.batch, watching.split, Setting(camera=0.1), generator=generator)
