"""Train what decides over a prompt's tokens: SDTP's judges and Dynamic Context Pruning's interactions.

    report = train(Prompting("sdtp"), "out")                          # out/sdtp.safetensors, its card, a log
    session = fewer.apply(model, "sdtp", modules="out")

The language model stays as it is; only the method's modules learn, which the papers do for SDTP and, to save time, we
do for Dynamic Context Pruning too. Each loss is used where it applies: next-token cross entropy always; for sampled
decisions the kept shares and the ranking by gradient saliency (SDTP, arXiv:2504.04514); for learned counts the mean
kept share times its price (arXiv:2305.15805, eq. 8).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer import hosts
from fewer.compat import cached, pretrained
from fewer.datasets.texts import book
from fewer.models.zoo import load_model
from fewer.recipes.loop import At, Folder, Loop
from fewer.runtime.apply import apply
from fewer.spec import parse, text
from fewer.training import losses

__all__ = ["Prompting", "Report", "continuation_loss", "saliency", "train"]


@dataclass(frozen=True)
class Prompting:
    """Everything a run depends on.

    method: text form of a method with modules to train. model: as in `load_model`; text: as in `texts.book`.
    steps: updates, of one passage of `length` tokens each. lr: AdamW's peak rate, warm-up over `warmup` of the steps,
    then half a cosine. ratio, ranking: weights of the losses of sampled decisions; pairs: drawn per stage and passage.
    price: of the mean kept share, where counts are learned; alpha: from where to where the sparse sigmoid's
    exponent rises; the paper starts at 1, where the product over hundreds of queries lets nothing through at first.
    test: passages the results are measured on, from the last tenth of the text, which is never trained on; after
    `length` tokens of context the loss of the next `scored` ones, written one by one.
    bfloat16: multiply in bfloat16 while training. seed: initial weights and all draws. threads: None leaves them.
    """

    method: str = "sdtp"
    model: str = "smollm2-135m"
    text: str = "state-of-the-union"
    steps: int = 100
    length: int = 384
    lr: float = 2e-3
    warmup: float = 0.1
    ratio: float = 2.0
    ranking: float = 1.0
    pairs: int = 2048
    price: float = 0.3
    alpha: tuple[float, float] = (2.0, 8.0)
    test: int = 12
    scored: int = 64
    bfloat16: bool = True
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "length", "pairs", "test", "scored"):
            if getattr(self, name) < 1:
                raise ValueError(f"Prompting({name}={getattr(self, name)}): must be at least 1")
        if not 1 < self.alpha[0] <= self.alpha[1]:
            raise ValueError(f"Prompting(alpha={self.alpha}): the sparse sigmoid's exponent starts above 1 and rises")


@dataclass(frozen=True)
class Report:
    """What a run came to. results: mean next-token loss (nats) over the test passages, by name: the unreduced model,
    the method trained and untrained, and its rivals at as many rows; passages: the same, one number each. rows: mean
    rows of a layer's cache behind the context. spearman: rank correlation of scores and saliency on the test passages,
    mean over stages, for methods that rank by it. seconds: training alone."""

    method: str
    parameters: int
    steps: int
    seconds: float
    results: dict[str, float]
    rows: dict[str, float]
    passages: dict[str, list[float]] = field(repr=False)
    spearman: dict[str, float] = field(default_factory=dict)


def train(
    recipe: Prompting, out: str | Path, *, model: tuple[nn.Module, Any] | None = None, ids: Tensor | None = None,
    log: Callable[[str], None] = print,
) -> Report:  # fmt: skip
    """Train the modules and save them where `fewer.apply(..., modules=out)` finds them.

    model: instead of loading the one named, with its tokenizer; ids: (T,), instead of reading the text.
    """
    folder = Folder(out, recipe, log, every=10)
    out = folder.path
    teacher, tokenizer = load_model(recipe.model) if model is None else model
    if ids is None:
        ids = torch.tensor(tokenizer(book(recipe.text))["input_ids"])
    teacher.requires_grad_(False).eval()
    student = copy.deepcopy(teacher, {id(t): t for t in (*teacher.parameters(), *teacher.buffers())})
    cut = len(ids) * 9 // 10
    with apply(student, recipe.method, modules="untrained") as session:
        session.modules.float().requires_grad_(True)
        first = copy.deepcopy(session.modules)
        optimiser = torch.optim.AdamW(session.modules.parameters(), lr=recipe.lr, weight_decay=0.0)

        starts = iter(lambda: int(torch.randint(0, cut - recipe.length - 1, ())), None)

        def loss(start: int, at: At) -> dict[str, Tensor]:
            return _losses_of(recipe, session, teacher, student, ids[start : start + recipe.length][None], at)

        student.train()
        loop = Loop(recipe.steps, recipe.warmup, bfloat16=recipe.bfloat16, every=1)
        lines = loop.run(session.modules, [optimiser], starts, loss, folder)
        student.eval()
        modules = session.modules.half().float()
        passages, rows = _measured(recipe, teacher, student, session, ids[cut:])
        spearman = _correlations(recipe, teacher, session, ids[cut:])
    with apply(student, recipe.method, modules=first) as session:
        found = _losses(student, session, _passages(recipe, ids[cut:]), recipe)
        passages["untrained"], rows["untrained"] = found
    report = Report(
        text(parse(recipe.method)), sum(p.numel() for p in modules.parameters()), recipe.steps, lines[-1]["seconds"],
        {k: sum(v) / len(v) for k, v in passages.items()}, rows, passages, spearman,
    )  # fmt: skip
    with apply(student, recipe.method, modules=modules.half()) as session:
        session.modules.half()
        session.save_modules(out, {
            "recipe": json.dumps(asdict(recipe)), "results": json.dumps(report.results), "rows": json.dumps(rows),
            "spearman": json.dumps(spearman), "seconds": f"{report.seconds:.0f}",
        })  # fmt: skip
    folder.finish(report, parse(recipe.method).card.name, lines=lines)
    return report


def _losses_of(
    recipe: Prompting, session: Any, teacher: nn.Module, student: nn.Module, passage: Tensor, at: At
) -> dict[str, Tensor]:
    """The losses of one passage, (1, L) token ids, weighted, and their sum."""
    method = session.methods[0]
    for module in session.modules.modules():
        if hasattr(module, "alpha"):
            low, high = recipe.alpha
            module.alpha = low + (high - low) * (1 - math.cos(math.pi * at.progress)) / 2
    with at.autocast():
        logits = student(passage, use_cache=False).logits
    line = {"next": F.cross_entropy(logits[0, :-1].float(), passage[0, 1:])}
    if session.inside:
        memory = session.last.memory[0]
        line["ratio"] = recipe.ratio * losses.ratio(memory["keep"], memory["target"])
        if recipe.ranking and "score" in memory:
            wanted = saliency(teacher, passage, method.acts_at(len(session.host.blocks)), recipe.bfloat16)
            pairs = torch.randint(0, passage.shape[1], (2, recipe.pairs))
            ranked = [losses.ranking(memory["score"][i], s, pairs) for i, s in enumerate(wanted)]
            line["ranking"] = recipe.ranking * torch.stack(ranked).mean()
    else:
        share = torch.stack(list(session.remembered[0]["share"].values())).mean()
        line["share"] = recipe.price * share
    return {"loss": torch.stack(list(line.values())).sum(), **line}


def saliency(model: nn.Module, passage: Tensor, layers: tuple[int, ...], bfloat16: bool = False) -> list[Tensor]:
    """|gradient . features| of what enters each of these blocks, for the loss of the passage itself: (1, L) each.

    Source   SDTP, arXiv:2504.04514, sec. 3: a token matters as much as the loss moves when it is scaled.
    """
    seen: dict[int, Tensor] = {}
    blocks = hosts.find(model).blocks

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    with ExitStack() as undo, torch.enable_grad():
        for layer in layers:
            undo.callback(blocks[layer].register_forward_pre_hook(keep(layer), with_kwargs=True).remove)
        embedded = pretrained(model).get_input_embeddings()(passage).detach().requires_grad_(True)
        with torch.autocast(passage.device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(inputs_embeds=embedded, use_cache=False).logits
        loss = F.cross_entropy(logits[0, :-1].float(), passage[0, 1:], reduction="sum")
        features = [seen[layer] for layer in layers]
        grads = torch.autograd.grad(loss, features)
    return [(g.float() * h.detach().float()).sum(-1).abs() for g, h in zip(grads, features, strict=True)]


# -- what it came to ---------------------------------------------------------------------------------------------------
def _passages(recipe: Prompting, ids: Tensor) -> Iterator[Tensor]:
    """Passages of context and continuation, evenly spread over the held-out text."""
    width = recipe.length + recipe.scored
    for i in range(recipe.test):
        start = (len(ids) - width) * i // max(recipe.test - 1, 1)
        yield ids[start : start + width][None]


@torch.inference_mode()
def continuation_loss(model: nn.Module, passage: Tensor, context: int) -> float:
    """Mean next-token loss, in nats, of what follows the context, fed one token at a time. passage: (1, L)."""
    from transformers import DynamicCache

    cache = DynamicCache(config=pretrained(model).config)
    out = model(passage[:, :context], **cached(model, cache), logits_to_keep=1).logits[:, -1]
    nats = []
    for i in range(context, passage.shape[1]):
        nats.append(F.cross_entropy(out.float(), passage[:, i]).item())
        if i + 1 < passage.shape[1]:
            out = model(passage[:, i : i + 1], **cached(model, cache)).logits[:, -1]
    return sum(nats) / len(nats)


def _losses(model: nn.Module, session: Any, passages: Iterator[Tensor], recipe: Prompting) -> tuple[list[float], float]:
    """Of each passage, and the mean rows of a layer when its end was reached."""
    found, rows = [], []
    for passage in passages:
        found.append(continuation_loss(model, passage, recipe.length))
        if session is not None:
            rows.append(sum(session.counts) / len(session.counts))
    return found, sum(rows) / len(rows) if rows else float(recipe.length + recipe.scored - 1)


def _measured(
    recipe: Prompting, teacher: nn.Module, student: nn.Module, session: Any, ids: Tensor
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Losses and rows of the unreduced model, the trained method, and others at as many rows."""
    passages: dict[str, list[float]] = {}
    rows: dict[str, float] = {}

    def run(name: str, model: nn.Module, on: Any) -> None:
        passages[name], rows[name] = _losses(model, on, _passages(recipe, ids), recipe)

    run("unreduced", teacher, None)
    run("trained", student, session)
    method = session.methods[0]
    if session.inside:
        layers = "+".join(map(str, method.acts_at(len(session.host.blocks))))
        share = method.budget.ratio
        rivals = {n: f"{n}:keep={share},layers={layers}" for n in ("random", "lazyllm")}
    else:
        count = max(48, round(rows["trained"]))  # the rivals keep a window of that order anyway
        rivals = {n: f"{n}:tokens={count},decodes=true" for n in ("streamingllm", "random_cache")}
        rivals["tova"] = f"tova:tokens={count}"
    for name, form in rivals.items():
        with apply(teacher, form) as other:
            run(name, teacher, other)
    return passages, rows


def _correlations(recipe: Prompting, teacher: nn.Module, session: Any, ids: Tensor) -> dict:
    """Rank correlation between scores and saliency, mean over stages and passages; {} where nothing is ranked so."""
    if not session.inside:
        return {}
    layers, found = session.methods[0].acts_at(len(session.host.blocks)), []
    for passage in _passages(recipe, ids):
        wanted = saliency(teacher, passage, layers)
        with torch.no_grad():
            judged = _scores(session, teacher, passage, layers)
        found += [_spearman(a[0], b[0]) for a, b in zip(judged, wanted, strict=True)]
    return {"mean": sum(found) / len(found)} if found else {}


def _scores(session: Any, model: nn.Module, passage: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
    """What the judges say of all tokens of the unreduced model: (1, L) per stage."""
    blocks, said = hosts.find(model).blocks, {}
    with ExitStack() as undo:
        for stage, layer in enumerate(layers):

            def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], stage: int = stage) -> None:
                logp = session.modules[0][stage]["judge"](args[0] if args else kwargs["hidden_states"])
                said[stage] = logp[..., 0] - logp[..., 1]

            undo.callback(blocks[layer].register_forward_pre_hook(hook, with_kwargs=True).remove)
        model(passage, use_cache=False)
    return [said[stage] for stage in range(len(layers))]


def _spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])
