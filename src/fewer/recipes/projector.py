"""Train a projector or resampler inside a vision-language model: one recipe for all of them.

    recipe = Projecting("tokenpacker:tokens=16", steps=500)
    report = train(recipe, model, Scenes(processor), "out", test=Scenes(processor, "test", batches=10))
    session = fewer.apply(model, "tokenpacker:tokens=16", modules="out")

The vision tower is frozen; the language model is too, unless `language` is above 0. The loss is next-token cross
entropy on the answers: the tokens whose label is not -100; no method reads them on the way in. M3 has no modules: its
training is the model's own, one pass for each of its scales, with equal weight (arXiv:2405.17430, sec. 3).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.compat import pretrained
from fewer.core import Budget, Capacity, KeepRatio, VisualReducer
from fewer.datasets.scenes import KINDS, Batch, Question, Split, ask, batch, scene
from fewer.hosts import VisionLanguageHost, find
from fewer.models.zoo import load_model
from fewer.recipes.loop import At, Folder, Loop, decayed
from fewer.runtime.apply import apply
from fewer.spec import parse, text

__all__ = ["Projecting", "Report", "Scenes", "train", "train_on_scenes", "with_answers"]

Example = Mapping[str, Tensor]
"""input_ids, attention_mask, pixel_values, labels: what the model is called with."""


@dataclass(frozen=True)
class Projecting:
    """Everything a run depends on besides model and data.

    method: text form of a method that acts between vision tower and language model.
    steps: updates, of one batch each. lr: AdamW's peak rate for the method's modules, warm-up over `warmup` of the
    steps, then half a cosine. projector, language: shares of it at which the model's own projector and its language
    model learn; 0 leaves them as they are.
    scales: counts to learn all at once, the loss is their mean; () = the method's own scales where it has some (M3),
    else its budget.
    bfloat16: multiply in bfloat16 while training. seed: initial weights. threads: None leaves them.
    """

    method: str = "tokenpacker:tokens=16"
    steps: int = 500
    lr: float = 1e-3
    projector: float = 0.0
    language: float = 0.0
    scales: tuple[int, ...] = ()
    warmup: float = 0.03
    weight_decay: float = 0.0
    bfloat16: bool = False
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Projecting(steps={self.steps}): must be at least 1")
        for name in ("projector", "language"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Projecting({name}={getattr(self, name)}): a share of lr, from 0 to 1")


@dataclass(frozen=True)
class Report:
    """What a run came to, on the test batches.

    loss, accuracy   by name: mean next-token loss (nats) of the answers' tokens, and the share of them that is the
                     model's likeliest choice. "unreduced" is the model before training; "pooled@M" the same with
                     visual tokens averaged to M rows (M3 without training); "untrained@M" and "trained@M" the method.
                     M is a count, or a share
    rows             visual rows of a prompt that reached the language model's last layer, mean over prompts
    parameters       that learned. lines: the losses on the way. seconds: training alone
    """

    method: str
    parameters: int
    steps: int
    seconds: float
    loss: dict[str, float]
    accuracy: dict[str, float]
    rows: dict[str, float]
    lines: list[dict[str, float]] = field(repr=False, default_factory=list)


def train(
    recipe: Projecting, model: nn.Module, batches: Iterable[Example], out: str | Path, *,
    test: Iterable[Example] = (), log: Callable[[str], None] = print,
) -> Report:  # fmt: skip
    """Train a method's modules, and parts of the model if the recipe says so, and save what learned in `out`.

    batches: read again from the start when they end. test: measured before and after; none = no results.
    The model is changed in place where `projector` or `language` is above 0; it is then saved whole.
    Raises ValueError where nothing would learn, or where there is no batch.
    """
    folder = Folder(out, recipe, log, every=25)
    out = folder.path
    method, host = _bridge(recipe, model)
    out, test = folder.path, list(test)
    forms = _forms(recipe, method)
    before = model.training, {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False).eval()
    with apply(model, method, modules="untrained") as session:
        modules = session.modules.requires_grad_(True)
    groups = _groups(recipe, model, host, modules)
    parameters = [p for group in groups for p in group["params"]]
    found = _Found(model, test)
    found.add("unreduced", None)
    for form in forms:
        found.add(f"pooled@{_label(form)}", parse("m3", budget=form.budget))
        if _own(modules):
            found.add(f"untrained@{_label(form)}", form, modules)
    optimiser = torch.optim.AdamW(groups, lr=recipe.lr)

    def losses(given: Example, at: At) -> Iterator[dict[str, Tensor]]:
        given = _moved(given, model)
        for form in forms:  # one graph at a time: it takes the memory of a single pass
            with at.autocast():
                logits, _ = _answering(model, form, modules, given)
            loss = _read(logits, given["labels"])[0].mean()
            yield {"loss": loss / len(forms), f"loss@{_label(form)}": loss}

    model.train()
    assert host.tower_module is not None and host.projector is not None
    host.tower_module.eval()
    loop = Loop(recipe.steps, recipe.warmup, bfloat16=recipe.bfloat16, every=1)
    learned = nn.ModuleList([modules, model] if recipe.projector or recipe.language else [modules])
    lines = loop.run(learned, [optimiser], _endless(batches), losses, folder)
    model.eval()
    for form in forms:
        found.add(f"trained@{_label(form)}", form, modules)
    report = Report(
        text(method), sum(p.numel() for p in parameters), recipe.steps, lines[-1]["seconds"], found.loss,
        found.accuracy, found.rows, lines,
    )  # fmt: skip
    if _own(modules):
        with apply(model, method, modules=modules) as session:
            session.save_modules(out, {"recipe": json.dumps(asdict(recipe)), "accuracy": json.dumps(found.accuracy)})
    if recipe.projector or recipe.language:
        pretrained(model).save_pretrained(out)
    folder.finish(report, method.card.name)
    model.train(before[0])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[1][name])
    return report


def train_on_scenes(
    recipe: Projecting, out: str | Path, *, model: str = "llava-scenes", questions: int = 500,
    log: Callable[[str], None] = print,
) -> Report:  # fmt: skip
    """`train` on questions about scenes. model: as in `load_model`, one that knows their words; questions: tested."""
    network, processor = load_model(model)
    test = Scenes(processor, "test", size=50, batches=-(-questions // 50), seed=1)
    return train(recipe, network.float(), Scenes(processor, seed=recipe.seed), out, test=test, log=log)


def _bridge(recipe: Projecting, model: nn.Module) -> tuple[VisualReducer, VisionLanguageHost]:
    method, host = parse(recipe.method), find(model)
    if not isinstance(method, VisualReducer) or not isinstance(host, VisionLanguageHost):
        raise ValueError(
            f"{recipe.method} on a {type(model).__name__}: this recipe trains methods on visual tokens, in a "
            "vision-language model; other methods have recipes of their own (fewer train --help)"
        )
    if any(p.dtype != torch.float32 for p in model.parameters() if p.is_floating_point()):
        raise ValueError(
            "small updates would be lost in half precision: load the model in float32; bfloat16=True speeds up"
        )
    return method, host


def _forms(recipe: Projecting, method: VisualReducer) -> list[VisualReducer]:
    """The method with each of the budgets it learns at."""
    scales: tuple[Budget, ...] = tuple(map(Capacity, recipe.scales)) or getattr(method, "scales", ())
    return [replace(method, budget=budget) for budget in scales] or [method]


def _own(modules: nn.Module) -> bool:
    """Whether the method has modules of its own."""
    return any(True for _ in modules.parameters())


def _groups(recipe: Projecting, model: nn.Module, host: VisionLanguageHost, modules: nn.Module) -> list[dict[str, Any]]:
    """What learns, at which rate. Vectors are not decayed."""
    head = pretrained(model).get_output_embeddings()
    assert host.projector is not None
    learning = (
        (1.0, modules.parameters()),
        (recipe.projector, host.projector.parameters()),
        (recipe.language, dict.fromkeys([*host.root.parameters(), *head.parameters()])),
    )
    groups = []
    for share, parameters in learning:
        if share:
            groups += decayed((p.requires_grad_(True) for p in parameters), recipe.weight_decay, lr=recipe.lr * share)
    if not groups:
        raise ValueError(
            f"{recipe.method} has no modules of its own, so nothing would learn; let the model learn: projector=1.0, "
            "language=0.1"
        )
    return groups


# -- passes ------------------------------------------------------------------------------------------------------------
def _answering(
    model: nn.Module, form: VisualReducer | None, modules: nn.Module | None, given: Example
) -> tuple[Tensor, float]:
    """Logits (B, S, V) with a method on, and visual rows per prompt in the last layer; form None = nothing is on."""
    inputs = {name: value for name, value in given.items() if name != "labels"}
    if form is None:
        return model(**inputs, use_cache=False).logits, 0.0
    with apply(model, form, modules=modules if modules is not None and _own(modules) else None) as session:
        session.answers = given["labels"] != -100
        logits = model(**inputs, use_cache=False).logits
        return logits, 0.0 if model.training else session.visual_counts[-1]


def _read(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token of an answer its loss in nats, and whether the model's likeliest choice is right: (A,) each."""
    wanted = labels[:, 1:]
    real = wanted != -100
    said = logits[:, :-1][real].float()
    return F.cross_entropy(said, wanted[real], reduction="none"), said.argmax(-1) == wanted[real]


class _Found:
    """Results on the test batches, by name."""

    def __init__(self, model: nn.Module, test: list[Example]) -> None:
        self.model, self.test = model, test
        self.loss: dict[str, float] = {}
        self.accuracy: dict[str, float] = {}
        self.rows: dict[str, float] = {}

    @torch.no_grad()
    def add(self, name: str, form: Any, modules: nn.Module | None = None) -> None:
        nats: list[Tensor] = []
        right: list[Tensor] = []
        rows: list[float] = []
        for given in self.test:
            given = _moved(given, self.model)
            logits, left = _answering(self.model, form, modules, given)
            loss, hit = _read(logits, given["labels"])
            nats.append(loss)
            right.append(hit)
            rows.append(left)
        if nats:
            self.loss[name] = torch.cat(nats).mean().item()
            self.accuracy[name] = torch.cat(right).float().mean().item()
            if form is not None:
                self.rows[name] = sum(rows) / len(rows)


def _label(form: VisualReducer) -> str:
    """Which count, or share, this is."""
    budget = form.budget
    if isinstance(budget, KeepRatio):
        return f"{100 * budget.ratio:g}%"
    return str(budget.tokens) if isinstance(budget, Capacity) else repr(budget)


def _endless(batches: Iterable[Example]) -> Iterator[Example]:
    while True:
        some = False
        for given in batches:
            some = True
            yield given
        if not some:
            raise ValueError("the batches came to an end: give a list, or an iterable that can be read again")


def _moved(given: Example, model: nn.Module) -> dict[str, Tensor]:
    return {name: value.to(_device(model)) for name, value in given.items()}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# -- questions about scenes --------------------------------------------------------------------------------------------
def with_answers(asked: Batch) -> dict[str, Tensor]:
    """A batch of questions with their answers behind them, which alone are to be learned."""
    answer = asked.answers[:, None]
    ids = torch.cat([asked.input_ids, answer], 1)
    mask = torch.cat([asked.attention_mask, torch.ones_like(answer)], 1)
    labels = torch.cat([torch.full_like(asked.input_ids, -100), answer], 1)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": asked.pixel_values, "labels": labels}


@dataclass(frozen=True)
class Scenes:
    """Batches of questions about new scenes, the same ones whenever they are read.

    processor: of `load_model("llava-scenes")`. split: "train" needs Fashion-MNIST. size: questions in a batch, the
    kinds in turn. batches: None = without end.
    """

    processor: Any = field(repr=False)
    split: Split = "train"
    size: int = 32
    batches: int | None = None
    kinds: tuple[str, ...] = KINDS
    seed: int = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng = np.random.default_rng([self.seed, self.split == "train"])
        turns = itertools.cycle(self.kinds)
        for _ in itertools.count() if self.batches is None else range(self.batches):
            asked = [self._question(rng, next(turns)) for _ in range(self.size)]
            yield with_answers(batch(asked, self.processor))

    def _question(self, rng: np.random.Generator, kind: str) -> Question:
        while True:
            shown = [scene(rng, self.split) for _ in range(2 if kind == "compare" else 1)]
            question = ask(kind, shown, rng)
            if question is not None:
                return question
