"""Train what a method brings along: keep predictors, selectors, learned summaries, learned counts.

The model that is to be reduced is its own teacher. By default it stays as it is and only the method's modules learn,
which takes minutes on two CPU cores; `backbone` above 0 lets it learn too, slower.

    report = train(Reduction("dynamicvit:keep=0.5"), "out")          # modules for the packaged model
    session = fewer.apply(model, "dynamicvit:keep=0.5", modules="out")

The losses are those of DynamicViT (arXiv:2106.02034, eq. 11 to 15), each used where it applies: class labels and the
teacher's logits always, kept shares for sampled decisions, the teacher's tokens where masked training keeps every row,
the FLOPs of learned counts (DiffRate, arXiv:2305.17997, eq. 11).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.compat import pretrained
from fewer.core import Reducer
from fewer.datasets.images import ImageSet, load
from fewer.models.zoo import Processor, load_model
from fewer.recipes.loop import At, Folder, Loop, Row, decayed, hardware, shuffled
from fewer.runtime.apply import apply
from fewer.runtime.costs import Ledger
from fewer.runtime.session import Session
from fewer.spec import parse, text
from fewer.training import costs, losses

__all__ = ["Reduction", "Report", "train"]

BASELINES = ("random", "cls_topk")
"""Methods without training that are tested beside, with the same layers and counts."""


@dataclass(frozen=True)
class Reduction:
    """Everything a run depends on.

    method: a text form of a method that has modules to train. model, data, test: as in `load_model` and
        `data.load`; data is read from its train split.
    steps, batch: updates, and pictures in each. lr: peak rate of the modules (AdamW; warm-up, then half a cosine).
    backbone: rate of the model's own weights as a share of lr; 0 freezes them. The papers use 0.01.
    warmup: share of the steps. weight_decay: for the modules' matrices and the model.
    labels, ratio, logits, tokens: weights of the losses; see the module. token_loss: "kl" or "mse". The papers weigh
        1, 2, 0.5 and 0.5; a model that stays as it is has no labels to learn, so here its own answers weigh more.
    cost, cost_weight: for learned counts, the share of the model's FLOPs to reach, and the weight of the squared
        distance from it.
    flip: chance of mirroring a picture. bfloat16: multiply in bfloat16 while training.
    seed: initial modules, order, mirroring, sampled decisions. threads: torch threads; None leaves them.
    """

    method: str = "dynamicvit"
    model: str = "vit-fashion"
    data: str = "fashion"
    test: str = "embedded"
    steps: int = 400
    batch: int = 32
    lr: float = 3e-3
    backbone: float = 0.0
    warmup: float = 0.1
    weight_decay: float = 0.05
    labels: float = 1.0
    ratio: float = 2.0
    logits: float = 5.0
    tokens: float = 2.0
    token_loss: str = "kl"
    cost: float = 0.65
    cost_weight: float = 100.0
    flip: float = 0.5
    bfloat16: bool = True
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"Reduction(steps={self.steps}, batch={self.batch}): both must be at least 1")
        if self.token_loss not in ("kl", "mse"):
            raise ValueError(f"Reduction(token_loss={self.token_loss!r}): it is kl or mse")
        if not 0 < self.cost <= 1:
            raise ValueError(f"Reduction(cost={self.cost}): the share of the FLOPs lies in (0, 1]")


@dataclass(frozen=True)
class Report:
    """What a run came to.

    accuracy: share of the test pictures, by name: the unreduced model, the method trained and untrained, and the
        baselines at equal counts. kl: of the class probabilities from the unreduced model's, mean over the pictures;
        agreement: share of the pictures with the same answer. tokens: after each block. seconds: training alone.
    found: for learned counts, the method they make, as text.
    """

    method: str
    accuracy: dict[str, float]
    kl: dict[str, float]
    agreement: dict[str, float]
    test_pictures: int
    tokens: list[int]
    gflops: float
    gflops_full: float
    steps: int
    seconds: float
    parameters: int
    hardware: str
    found: str | None = None
    lines: list[dict[str, float]] = field(default_factory=list, repr=False)


def train(
    recipe: Reduction,
    out: str | Path,
    *,
    model: tuple[nn.Module, Processor] | None = None,
    data: tuple[ImageSet, ImageSet] | None = None,
    log: Callable[[str], None] = print,
) -> Report:
    """Train a method's modules and save them where `fewer.apply(..., modules=out)` finds them.

    out: folder for <method>.safetensors (its card holds the recipe and the results), log.jsonl and report.json; and
        for the model itself where it learned too.
    model: (model, processor) instead of the named one; it is left as it was unless `backbone` is above 0.
    data: (train, test) sets instead of the named ones. log: receives a line every 25 steps and the results.
    Raises   ValueError for a method without modules; what `apply`, `load_model` and `data.load` raise.
    """
    method, out = parse(recipe.method), Path(out)
    folder = Folder(out, recipe, log)
    out = folder.path
    net, processor = model or load_model(recipe.model)
    train_set, test_set = data or (load(recipe.data, split="train"), load(recipe.test))
    with ExitStack() as undo:
        teacher = copy.deepcopy(net).eval().requires_grad_(False)
        frozen = [p for p in net.parameters() if p.requires_grad] if not recipe.backbone else []
        undo.callback(lambda: [p.requires_grad_(True) for p in frozen])
        undo.callback(net.train, net.training)
        for parameter in frozen:
            parameter.requires_grad_(False)
        session = undo.enter_context(apply(net, method, modules="untrained"))
        if not list(session.modules.parameters()):
            raise ValueError(f"{text(method)} has nothing to train; methods that have: see `fewer list`")
        untrained = copy.deepcopy(session.modules)
        lines = _learn(recipe, session, teacher, train_set, processor, folder)
        answers = {"trained": _answers(net, test_set, processor)}
        counts, ledger, final = session.counts, session.ledger, session.methods[0]
        learned = _found(session)
    answers["unreduced"] = _answers(teacher, test_set, processor)
    with apply(net, final, modules=untrained):
        answers["untrained"] = _answers(net, test_set, processor)
    for name in BASELINES:
        with apply(teacher, _same_counts(name, learned or method)):
            answers[name] = _answers(teacher, test_set, processor)
    full, labels = answers["unreduced"], test_set.labels
    report = Report(
        method=text(method),
        accuracy={k: round((a.argmax(-1) == labels).float().mean().item(), 4) for k, a in answers.items()},
        kl={k: round(losses.logit_kl(a, full).item(), 5) for k, a in answers.items() if k != "unreduced"},
        agreement={
            k: round((a.argmax(-1) == full.argmax(-1)).float().mean().item(), 4)
            for k, a in answers.items()
            if k != "unreduced"
        },
        test_pictures=len(test_set),
        tokens=[int(c) for c in counts],
        gflops=round(ledger.gflops, 4),
        gflops_full=round(ledger.gflops_full, 4),
        steps=recipe.steps,
        seconds=lines[-1]["seconds"],
        parameters=sum(p.numel() for p in session.modules.parameters()),
        hardware=hardware(_device(net)),
        found=text(learned) if learned else None,
        lines=lines,
    )
    card = {
        "recipe": json.dumps(asdict(recipe)),
        "data": f"{train_set.name} (train), {test_set.name} (test)",
        **{k: v if isinstance(v, str) else json.dumps(v) for k, v in asdict(report).items() if k != "lines"},
    }
    session.save_modules(out, card)
    if recipe.backbone:
        pretrained(net).save_pretrained(out)
        processor.save(out)
    folder.finish(report)
    for name, value in report.accuracy.items():
        log(f"{name:>10}  accuracy {value:.4f}  KL {report.kl.get(name, 0.0):.5f}")
    return report


def _learn(
    reduction: Reduction, session: Session, teacher: nn.Module, data: ImageSet, processor: Callable, folder: Folder
) -> list[Row]:
    """Returns what the loop's rows say."""
    device, own = _device(session.model), list(session.parameters())
    features: dict[str, Tensor] = {}

    def loss(chosen: Tensor, at: At) -> dict[str, Tensor]:
        x = data.batch(chosen, processor)
        mirrored = torch.rand(len(chosen)) < reduction.flip
        x[mirrored] = x[mirrored].flip(-1)
        x, y = x.to(device), data.labels[chosen].to(device)
        with at.autocast():
            with torch.no_grad():
                taught = _logits(teacher(x))
            logits = _logits(session.model(x))
        parts = _losses(reduction, session, logits, taught, y, features)
        total = torch.stack([weight * value for weight, value in parts.values()]).sum()
        return {"loss": total} | {name: value for name, (_, value) in parts.items()} | _shown(session, logits, y)

    groups = decayed(own, reduction.weight_decay)
    if reduction.backbone:
        ours = set(map(id, own))
        params = [p for p in session.model.parameters() if p.requires_grad and id(p) not in ours]
        groups.append({"params": params, "lr": reduction.lr * reduction.backbone})
    optimizer = torch.optim.AdamW(groups, lr=reduction.lr, weight_decay=reduction.weight_decay)
    loop = Loop(reduction.steps, reduction.warmup, bfloat16=reduction.bfloat16)
    with ExitStack() as undo:
        for name, norm in (("student", session.host.final_norm), ("teacher", _twin(session, teacher))):
            if norm is not None:
                hook = norm.register_forward_hook(lambda _m, _a, out, name=name: features.update({name: out}))
                undo.callback(hook.remove)
        session.model.train()
        learned = session.model if reduction.backbone else session.modules
        return loop.run(learned, [optimizer], shuffled(len(data), reduction.batch), loss, folder)


def _losses(
    reduction: Reduction, session: Session, logits: Tensor, taught: Tensor, labels: Tensor, features: dict[str, Tensor]
) -> dict[str, tuple[float, Tensor]]:
    """Name -> (weight, value) of every loss that applies to the last pass."""
    passed = session.last
    memory = passed.memory[0]
    parts = {
        "labels": (reduction.labels, F.cross_entropy(logits.float(), labels)),
        "logits": (reduction.logits, losses.logit_kl(logits, taught)),
    }
    if "keep" in memory:
        parts["ratio"] = (reduction.ratio, losses.ratio(memory["keep"], memory["target"]))
    if "count" in memory:
        parts["cost"] = (reduction.cost_weight, losses.flops_target(_cost(session, memory["count"]), reduction.cost))
    policy = passed.tokens.policy
    if "keep" in memory and policy is not None and features:
        student = features["student"][:, passed.tokens.prefix :]
        teacher = features["teacher"][:, passed.first.prefix :]
        token_loss = losses.token_kl if reduction.token_loss == "kl" else losses.token_mse
        parts["tokens"] = (reduction.tokens, token_loss(student, teacher, policy[:, passed.tokens.prefix :]))
    return parts


def _cost(session: Session, counts: dict[int, tuple[Tensor, ...]]) -> Tensor:
    """The model's multiply-adds with learned counts, as a share of those without."""
    host, depth, n = session.host, len(session.host.blocks), session.last.first.n
    acts = session.methods[0].layers or range(depth)
    asked = {layer: counts[stage] for stage, layer in enumerate(acts) if stage in counts}
    linear = [host.linear_weights(i) for i in range(depth)]
    rest = Ledger.of(host, [], n, 1).patch_macs
    chain = costs.chain(n, [asked.get(layer) for layer in range(depth)])
    full = costs.vit_macs([n] * depth, [n] * depth, linear, host.width, rest)
    return torch.as_tensor(costs.vit_macs(*chain, linear, host.width, rest)) / full


def _shown(session: Session, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What is worth watching besides the losses: accuracy on the batch and the share kept at each stage."""
    shown = {"right": (logits.argmax(-1) == labels).float().mean()}
    for stage, keep in session.last.memory[0].get("keep", {}).items():
        shown[f"keep{stage}"] = keep.detach().mean()
    return shown


def _found(session: Session) -> Reducer | None:
    """Learned counts as a method that needs no modules; None for methods that learn something else."""
    from fewer.methods.vision.diffrate import Count, found

    pairs, left = [], session.host.patches
    for modules in session.modules[0]:
        prune, merge = (dict(modules.items()).get(name) for name in ("prune", "merge"))
        if not (isinstance(prune, Count) and isinstance(merge, Count)):
            return None
        after = min(left, prune.number)
        left = min(after, merge.number)
        pairs.append((after, left))
    return replace(found(pairs), layers=session.methods[0].layers)


def _same_counts(name: str, method: Reducer) -> Reducer:
    return parse(name, budget=method.budget, layers=method.layers)


def _twin(session: Session, teacher: nn.Module) -> nn.Module | None:
    """The teacher's module that corresponds to the student's final norm."""
    norm = session.host.final_norm
    path = next((name for name, module in session.model.named_modules() if module is norm), None)
    return None if norm is None or path is None else teacher.get_submodule(path)


def _logits(output: Any) -> Tensor:
    """What a classifier of transformers or timm answers, (B, classes)."""
    return output if isinstance(output, Tensor) else output.logits


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.inference_mode()
def _answers(model: nn.Module, data: ImageSet, processor: Callable, *, batch: int = 100) -> Tensor:
    """(N, classes) logits of all pictures, in evaluation mode."""
    device, training = _device(model), model.training
    model.eval()
    parts = torch.arange(len(data)).split(batch)
    answers = torch.cat([_logits(model(data.batch(part, processor).to(device))).float().cpu() for part in parts])
    model.train(training)
    return answers
