"""Train what the encoder methods learn: configurations, thresholds, policies, routers, and encoders that stand it.

    report = train(Encode("power_bert"), "out")                  # on the packaged text classifier
    session = fewer.apply(model, "power_bert", modules="out")

Each method learns as its paper says, and every test is on texts it has not seen:

- power_bert: soft extraction with a price on what each block retains, then the configuration that falls out of it;
- ltp: soft thresholds with a price on what stays, then the same thresholds, hard;
- length_adaptive: random lengths under the sandwich rule, distilled from the full model; then an evolutionary search;
- pyramid_bert: fine-tuning with the reduction on;
- trbert: a policy gradient, warmed up by imitating what a gradient calls salient;
- leap: routers that learn the salient tokens from labels.

By default the model stays as it is and only the modules learn; `backbone` above 0 lets it learn too, as in the papers.
The model as it was is the teacher. The tests set beside each method what costs nothing to learn, at equal tokens.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.compat import pretrained
from fewer.core import KeepRatio, Reducer
from fewer.core.learned import Learned, Modules
from fewer.datasets.texts import Encoded, load
from fewer.evaluation.stats import paired_difference, share
from fewer.hosts import find
from fewer.models.zoo import load_model
from fewer.recipes.loop import At, Folder, Loop, Row, buckets, decayed
from fewer.runtime.apply import apply
from fewer.runtime.session import Session
from fewer.spec import parse, text
from fewer.training import losses
from fewer.training.costs import vit_macs

__all__ = ["BASELINES", "Encode", "Found", "Report", "Score", "evolve", "saliency", "train"]

BASELINES = ("random", "ends", "cls_topk")
"""Methods without training that are tested beside, with as many tokens in every block."""

USUAL: dict[str, tuple[float, float]] = {
    "power_bert": (2e-2, 2e-4), "ltp": (1e-4, 0.1), "trbert": (3e-3, 0.5), "leap": (1e-3, 0.05),
}  # fmt: skip
"""Peak rate of the modules and price, for a few hundred steps on a frozen model; the papers train longer, slower."""

Gene = tuple[int, ...]


@dataclass(frozen=True)
class Encode:
    """Everything a run depends on.

    method: a text form of a method. model: as in `load_model`, a text classifier. data: as in `texts.load`. length:
        tokens of a text that are read.
    steps, batch: updates, and texts in each. lr: peak rate of the modules (AdamW; warm-up, then half a cosine); None =
        what suits the method, see `USUAL`.
    backbone: peak rate of the model's own weights; 0 freezes them. The papers use 2e-5 to 6e-5.
    second: share of the steps after the modules are fixed, in which only the model learns (power_bert, ltp).
    price: weight of what the method pays for tokens: lambda of power_bert and ltp, alpha of trbert's reward; for leap
        the weight of the routers' labels. None = what suits the method.
    distil: weight of the divergence from the model as it was, beside the labels' loss.
    drop, samples: length_adaptive: the most a block drops in training, random models per step.
    rounds, target: length_adaptive: rounds of its search, and the share of the model's multiply-adds it may use.
    trajectories, guided: trbert: actions sampled per text, share of the steps with imitation.
    nucleus: leap: share of the saliency that the processed tokens hold.
    held: texts held out of training, for the search and for `patience`. patience: checks, every 50 steps, in which the
        loss of these has not fallen, after which training ends with the best weights; 0 = it does not.
    seed: initial modules, order, samples. threads: torch threads; None leaves them.
    """

    method: str = "power_bert"
    model: str = "bert-eras"
    data: str = "eras"
    length: int = 256
    steps: int = 300
    batch: int = 16
    lr: float | None = None
    backbone: float = 0.0
    second: float = 0.5
    warmup: float = 0.1
    weight_decay: float = 0.01
    price: float | None = None
    distil: float = 1.0
    drop: float = 0.2
    samples: int = 2
    rounds: int = 10
    target: float = 0.5
    trajectories: int = 4
    guided: float = 0.5
    nucleus: float = 0.3
    held: int = 200
    patience: int = 0
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"Encode(steps={self.steps}, batch={self.batch}): both must be at least 1")
        if self.patience and not self.held:
            raise ValueError(f"Encode(patience={self.patience}, held=0): patience needs texts that are held out")
        if not 0 <= self.second < 1:
            raise ValueError(f"Encode(second={self.second}): the modules need steps too; it lies in [0, 1)")
        if not 0 < self.drop < 1:
            raise ValueError(f"Encode(drop={self.drop}): the share a block drops at most lies in (0, 1)")
        if self.trajectories < 2:
            raise ValueError(f"Encode(trajectories={self.trajectories}): a baseline needs at least 2 per text")


@dataclass(frozen=True)
class Score:
    """How a model answers. accuracy: with low and high, its 95 % interval. tokens: mean share of the texts' own tokens
    over the blocks' attentions and MLPs. gflops: per text. kl: of the class probabilities from the unreduced model's,
    mean over the texts. ahead: accuracy above `random`'s, with its 95 % interval."""

    accuracy: float
    low: float
    high: float
    tokens: float
    gflops: float
    kl: float
    ahead: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Found:
    """One configuration of the search. gene: tokens behind each block, of a text of full length. cost: share of the
    model's multiply-adds. score: of the held-out texts."""

    gene: Gene
    cost: float
    score: float


@dataclass(frozen=True)
class Report:
    """What a run came to. scores: by name, "unreduced" first; "untrained" is the method with fresh modules. found: what
    was learned as a method that needs no modules. frontier: of the search. seconds: training alone."""

    method: str
    scores: dict[str, Score]
    test_texts: int
    seconds: float
    parameters: int
    found: str | None = None
    frontier: list[Found] = field(default_factory=list)
    lines: list[Row] = field(default_factory=list, repr=False)


# -- the run --------------------------------------------------------------------------------------------------------
class _Run:
    """What all trainings share: the model and its teacher, batches, the loop."""

    def __init__(self, recipe: Encode, net: nn.Module, data: Encoded, folder: Folder) -> None:
        self.recipe, self.net, self.data, self.folder = recipe, net, data, folder
        self.method = parse(recipe.method)
        lr, price = USUAL.get(self.method.card.name, (0.0, 0.0))
        self.lr = lr if recipe.lr is None else recipe.lr
        self.price = price if recipe.price is None else recipe.price
        self.teacher = copy.deepcopy(net).eval().requires_grad_(False)
        order = torch.randperm(len(data)).tolist()
        held = min(recipe.held, len(data) // 4)
        self.held, self.seen = order[:held], order[held:]
        self.lines: list[Row] = []
        self.frontier: list[Found] = []
        self.depth = len(find(net).blocks)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches of training texts without end, of about equal lengths."""
        while True:
            for group in buckets([len(self.data.rows[i]) for i in self.seen], self.recipe.batch, 8):
                yield self.data.batch([self.seen[i] for i in group])

    def taught(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, classes): what the model as it was answers."""
        with torch.no_grad():
            return self.teacher(**_inputs(batch)).logits

    def task(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The loss of the labels and the divergence from the teacher."""
        loss = F.cross_entropy(logits, batch["labels"])
        return loss + self.recipe.distil * losses.logit_kl(logits, self.taught(batch)) if self.recipe.distil else loss

    def plain(self, batch: dict[str, Tensor], at: At) -> dict[str, Any]:
        """The task's loss under whatever is on."""
        return {"loss": self.task(self.net(**_inputs(batch)).logits, batch)}

    def fit(
        self, steps: int, loss: Callable[[dict[str, Tensor], At], dict[str, Any]], modules: nn.Module | None = None,
        after: Callable[[At], None] = lambda at: None,
    ) -> None:  # fmt: skip
        """Train on a loss of batches. modules: learn besides the model. after: called after each update."""
        recipe = self.recipe
        own = [] if modules is None else list(modules.parameters())
        groups = decayed(own, recipe.weight_decay)
        if recipe.backbone:
            ours = set(map(id, own))
            rest = [p for p in self.net.parameters() if id(p) not in ours]
            groups.append({"params": rest, "lr": recipe.backbone})
        if not groups or not steps:
            return
        optimizer = torch.optim.AdamW(groups, lr=self.lr or recipe.backbone, weight_decay=recipe.weight_decay)
        self._ready()
        learned = self.net if recipe.backbone or modules is None else modules
        self.lines += Loop(steps, recipe.warmup, patience=recipe.patience).run(
            learned, [optimizer], self.batches(), loss, self.folder, after=after, held=lambda: self._held(loss),
        )  # fmt: skip
        self.net.eval()

    @torch.no_grad()
    def _held(self, loss: Callable[[dict[str, Tensor], At], dict[str, Any]]) -> float:
        """Mean loss of the texts held out, with the same draws every time."""
        parts = [self.data.batch(part.tolist()) for part in torch.tensor(self.held).split(self.recipe.batch)]
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed)
            at = At(self.recipe.steps - 1, self.recipe.steps, "cpu", False)
            return sum(float(loss(part, at)["loss"]) * len(part["labels"]) for part in parts) / len(self.held)

    def _ready(self) -> None:
        """Training mode; a frozen model drops nothing out."""
        self.net.train()
        if not self.recipe.backbone:
            for module in self.net.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k != "labels"}


# -- what each method does --------------------------------------------------------------------------------------------
def _power_bert(run: _Run) -> tuple[Reducer, Modules | None]:
    """Search with soft extraction, then fine-tune with the configuration found."""
    from fewer.methods.language.power_bert import PowerBert, Retention, found

    method, recipe = run.method, run.recipe
    assert isinstance(method, PowerBert)
    if not isinstance(method.budget, Learned):
        return _tuned(run, method)
    with apply(run.net, method, modules="untrained") as session:
        blocks = [m for m in session.modules.modules() if isinstance(m, Retention)]

        def loss(batch: dict[str, Tensor], at: At) -> dict[str, Any]:
            logits = run.net(**_inputs(batch)).logits
            mass = session.last.memory[0]["mass"]
            paid = torch.stack([(stage + 1) * mass[stage] for stage in mass]).sum()
            rows = {f"l{i}": block.number for i, block in enumerate(blocks)}
            return {"loss": run.task(logits, batch) + run.price * paid, **rows}

        def clip(at: At) -> None:
            for block in blocks:
                block.clip()

        later = round(recipe.second * recipe.steps) if recipe.backbone else 0
        run.fit(recipe.steps - later, loss, session.modules, clip)
        modules = session.modules
    if later:
        with apply(run.net, found(modules[0], method.layers)):
            run.fit(later, run.plain)
    return method, modules


def _ltp(run: _Run) -> tuple[Reducer, Modules | None]:
    """Soft thresholds that pay for what stays; then hard ones, fixed."""
    from fewer.methods.language.ltp import LTP

    method, recipe = run.method, run.recipe
    assert isinstance(method, LTP)
    if not method.learned:
        return _tuned(run, method)
    with apply(run.net, replace(method, soft=True), modules="untrained") as session:

        def stays() -> list[Tensor]:
            """The mean factor of the real tokens, block by block."""
            valid = session.last.tokens.valid
            keep = session.last.memory[0]["keep"]
            if valid is None:
                return [k.mean() for k in keep.values()]
            return [(k * valid).sum() / valid.sum() for k in keep.values()]

        def loss(batch: dict[str, Tensor], at: At) -> dict[str, Any]:
            logits, means = run.net(**_inputs(batch)).logits, stays()
            total = run.task(logits, batch) + run.price * torch.stack(means).sum()
            return {"loss": total} | {f"m{i}": mean for i, mean in enumerate(means)}

        later = round(recipe.second * recipe.steps) if recipe.backbone else 0
        run.fit(recipe.steps - later, loss, session.modules)
        modules = session.modules
    method = replace(method, soft=False)
    if later:
        modules.requires_grad_(False)
        with apply(run.net, method, modules=modules):
            run.fit(later, run.plain)
        modules.requires_grad_(True)
    return method, modules


def _tuned(run: _Run, method: Reducer) -> tuple[Reducer, Modules | None]:
    """Fine-tuning with the reduction on (Pyramid-BERT, and configurations that are given)."""
    if not run.recipe.backbone:
        raise ValueError(f"{text(method)} has nothing to learn but the model itself: set backbone, e.g. backbone=5e-5")
    with apply(run.net, method):
        run.fit(run.recipe.steps, run.plain)
    return method, None


def _length_adaptive(run: _Run) -> tuple[Reducer, Modules | None]:
    """LengthDrop under the sandwich rule (where the model may learn), then the search."""
    recipe = run.recipe
    layers, full = run.depth, recipe.length - 1
    smallest = _shrunk(full, [1 - recipe.drop] * layers)

    def loss(batch: dict[str, Tensor], at: At) -> dict[str, Any]:
        logits = run.net(**_inputs(batch)).logits
        total = F.cross_entropy(logits, batch["labels"])
        draws = random.Random(recipe.seed + 1_000_003 * at.step)  # a run that goes on draws what it would have drawn
        genes = [smallest, *(_random_gene(full, layers, recipe.drop, draws) for _ in range(recipe.samples))]
        for gene in genes:
            with apply(run.net, configured(run.method, gene, full)):
                total = total + losses.logit_kl(run.net(**_inputs(batch)).logits, logits.detach())
        return {"loss": total / (recipe.samples + 2)}

    run.fit(recipe.steps, loss)
    run.net.eval()
    held = [run.data.batch(run.held[i : i + 50]) for i in range(0, len(run.held), 50)]

    @torch.inference_mode()
    def score(gene: Gene) -> float:
        with apply(run.net, configured(run.method, gene, full)):
            right = [(run.net(**_inputs(b)).logits.log_softmax(-1).gather(1, b["labels"][:, None])).sum() for b in held]
        return float(torch.stack(right).sum()) / max(1, len(run.held))

    host = find(run.net)
    linear = [host.linear_weights(layer) for layer in range(layers)]

    def cost(gene: Gene) -> float:
        rows = [full + 1, *(length + 1 for length in gene)]
        macs = vit_macs(rows[:-1], rows[1:], linear, host.width, 0)
        return float(macs) / float(vit_macs([full + 1] * layers, [full + 1] * layers, linear, host.width, 0))

    run.frontier = evolve(
        score, cost, layers, full, recipe.drop, rounds=recipe.rounds, seed=recipe.seed, log=run.folder.log
    )
    affordable = [f for f in run.frontier if f.cost <= recipe.target] or run.frontier[:1]
    return configured(run.method, affordable[-1].gene, full), None


def configured(method: Reducer, gene: Gene, full: int) -> Reducer:
    """A method whose blocks keep these many tokens of a text of `full` free ones, and as large a share of others."""
    return replace(method, budget=KeepRatio(tuple(round(g / full, 4) for g in gene), of="start", rounding="ceil"))


def _trbert(run: _Run) -> tuple[Reducer, Modules | None]:
    """The policy gradient: reward is minus the task's loss and the price of what was selected."""
    from fewer.methods.language.trbert import Policy

    recipe, k = run.recipe, run.recipe.trajectories
    with apply(run.net, run.method, modules="untrained") as session:
        policies = [m for m in session.modules.modules() if isinstance(m, Policy)]
        layers = run.method.layers or tuple(range(run.depth))

        def loss(batch: dict[str, Tensor], at: At) -> dict[str, Any]:
            many = {name: value.repeat_interleave(k, 0) for name, value in batch.items()}
            if at.progress < recipe.guided:
                for policy, salient in zip(policies, saliency(run.teacher, batch, layers), strict=True):
                    policy.guide = salient.repeat_interleave(k, 0)
                    policy.guide[torch.arange(len(policy.guide)) % k > 0] = float("nan")
            else:
                for policy in policies:
                    policy.guide = None
            logits = run.net(**_inputs(many)).logits
            memory = session.last.memory[0]
            kept = torch.stack(list(memory["share"].values())).mean(0)
            worse = F.cross_entropy(logits, many["labels"], reduction="none")
            nll = torch.stack(list(memory["nll"].values())).sum(0)
            total = losses.reinforce(nll, -worse.detach() - run.price * kept, k)
            total = total + run.task(logits, many) if recipe.backbone else total
            return {"loss": total, "kept": kept.mean(), "task": worse.mean()}

        run.fit(recipe.steps, loss, session.modules)
        for policy in policies:
            policy.guide = None
        return run.method, session.modules


def _leap(run: _Run) -> tuple[Reducer, Modules | None]:
    """Routers learn which tokens the teacher's gradient calls salient."""
    recipe = run.recipe
    with apply(run.net, run.method, modules="untrained") as session:

        def loss(batch: dict[str, Tensor], at: At) -> dict[str, Any]:
            logits = run.net(**_inputs(batch)).logits
            valid = batch["attention_mask"].bool()
            wanted = nucleus(saliency(run.teacher, batch, (0,))[0], valid, recipe.nucleus)
            memory = session.last.memory[0]["logp"]
            label = (~wanted).long()  # class 0 is "processed"
            each = [F.nll_loss(logp[valid], label[valid]) for logp in memory.values()]
            processed = [(logp[valid][:, 0] > logp[valid][:, 1]).float().mean() for logp in memory.values()]
            router = torch.stack(each).mean()
            total = run.task(logits, batch) + run.price * router if recipe.backbone else router
            return {"loss": total, "processed": torch.stack(processed).mean()}

        run.fit(recipe.steps, loss, session.modules)
        return run.method, session.modules


TRAINERS: dict[str, Callable[[_Run], tuple[Reducer, Modules | None]]] = {
    "power_bert": _power_bert, "ltp": _ltp, "length_adaptive": _length_adaptive,
    "pyramid_bert": lambda run: _tuned(run, run.method), "trbert": _trbert, "leap": _leap,
}  # fmt: skip


# -- saliency ---------------------------------------------------------------------------------------------------------
def saliency(teacher: nn.Module, batch: dict[str, Tensor], layers: Sequence[int]) -> list[Tensor]:
    """How much each token matters to the finished model's loss: |<dL/dh, h>| at the entry of some blocks, (B, N) each.

    TR-BERT writes it with the change of the features up to the last block; where the head reads the class token alone
    that gradient is zero for all others, so here it is taken where the features are used.
    """
    blocks, entered = find(teacher).blocks, {}
    with ExitStack() as undo, torch.enable_grad():

        def see(layer: int, x: Tensor) -> tuple[Tensor]:
            x = x if x.requires_grad else x.detach().requires_grad_()
            entered[layer] = x
            return (x,)

        for layer in sorted({0, *layers}):
            hook = blocks[layer].register_forward_pre_hook(
                lambda _m, args, layer=layer: (*see(layer, args[0]), *args[1:])
            )
            undo.callback(hook.remove)
        loss = F.cross_entropy(teacher(**_inputs(batch)).logits, batch["labels"], reduction="sum")
        grads = torch.autograd.grad(loss, [entered[layer] for layer in layers])
    return [(g * entered[layer]).sum(-1).abs().detach() for g, layer in zip(grads, layers, strict=True)]


def nucleus(salient: Tensor, valid: Tensor, mass: float) -> Tensor:
    """(B, N) bool: the fewest tokens that hold this share of the softmax over the saliencies. All (B, N)."""
    p = salient.float().masked_fill(~valid, float("-inf")).softmax(-1)
    ranked, order = p.sort(dim=-1, descending=True, stable=True)
    wanted = (ranked.cumsum(-1) - ranked < mass) & (ranked > 0)
    return torch.zeros_like(valid).scatter(-1, order, wanted)


# -- the search -------------------------------------------------------------------------------------------------------
def evolve(
    score: Callable[[Gene], float], cost: Callable[[Gene], float], layers: int, full: int, drop: float, *,
    rounds: int = 10, mutations: int = 30, crossovers: int = 30, start: int = 20, seed: int = 0,
    log: Callable[[str], None] | None = None,
) -> list[Found]:  # fmt: skip
    """The best configurations at every cost, cheapest first: tokens behind each block, never more than before it.

    Starts from constant shares between the smallest model of the training and the full one. In every round, parents
    are the corners of the frontier's upper convex hull: some are mutated, each block with chance one half redrawn
    between its neighbours; some are crossed, block by block the mean rounded up. What was tried is not tried again.
    Source   Length-Adaptive Transformer, arXiv:2010.07003, sec. 3.3.
    """
    draws, known = random.Random(seed), {}

    def tried(gene: Gene) -> None:
        if gene not in known:
            known[gene] = Found(gene, cost(gene), score(gene))

    for i in range(start):
        tried(_shrunk(full, [1 - drop * (1 - i / max(1, start - 1))] * layers))
    for turn in range(rounds):
        parents = [f.gene for f in hull(frontier(list(known.values())))]
        for _ in range(mutations):
            tried(mutated(draws.choice(parents), full, draws))
        for _ in range(crossovers):
            a, b = draws.choice(parents), draws.choice(parents)
            tried(tuple(-(-(x + y) // 2) for x, y in zip(a, b, strict=True)))
        if log is not None:
            log(f"round {turn + 1}: {len(known)} tried, {len(frontier(list(known.values())))} on the frontier")
    return frontier(list(known.values()))


def _shrunk(full: int, shares: Sequence[float]) -> Gene:
    """Lengths when each block keeps a share of what is left, rounded up; at least 2."""
    lengths, left = [], full
    for each in shares:
        left = max(min(2, left), math.ceil(round(left * each, 9)))
        lengths.append(left)
    return tuple(lengths)


def _random_gene(full: int, layers: int, drop: float, draws: random.Random) -> Gene:
    """LengthDrop: each block keeps a random number between all that is left and the least allowed."""
    lengths, left = [], full
    for _ in range(layers):
        left = draws.randint(max(min(2, left), math.ceil(round((1 - drop) * left, 9))), left)
        lengths.append(left)
    return tuple(lengths)


def mutated(gene: Gene, full: int, draws: random.Random) -> Gene:
    """Each block with chance one half redrawn between the next block's length and the previous one's, new already."""
    new: list[int] = []
    for i, length in enumerate(gene):
        before = new[-1] if new else full
        after = gene[i + 1] if i + 1 < len(gene) else min(2, full)
        redrawn = draws.randint(min(after, before), before) if draws.random() < 0.5 else min(length, before)
        new.append(redrawn)
    return tuple(new)


def frontier(found: Sequence[Found]) -> list[Found]:
    """Those that nothing cheaper reaches, cheapest first; scores rise."""
    best: list[Found] = []
    for one in sorted(found, key=lambda f: (f.cost, -f.score)):
        if not best or one.score > best[-1].score:
            best.append(one)
    return best


def hull(found: Sequence[Found]) -> list[Found]:
    """The corners of the upper convex hull of a frontier."""
    corners: list[Found] = []
    for one in found:
        while len(corners) >= 2:
            a, b = corners[-2], corners[-1]
            if (b.score - a.score) * (one.cost - a.cost) > (one.score - a.score) * (b.cost - a.cost):
                break
            corners.pop()
        corners.append(one)
    return corners


# -- from end to end --------------------------------------------------------------------------------------------------
def train(
    recipe: Encode, out: str | Path, *, model: tuple[nn.Module, Any] | None = None,
    data: tuple[Encoded, Encoded] | None = None, log: Callable[[str], None] = print,
) -> Report:  # fmt: skip
    """Train a method on a text classifier and test it.

    out: folder for <method>.safetensors (its card holds the recipe and the scores) and report.json; and for the model
        itself where it learned too.
    model: (classifier, tokenizer) instead of the named one; it is left as it was unless `backbone` is above 0.
    data: (train, test) instead of the named ones. log: receives a line every 25 steps and the scores.
    Raises   ValueError for a method this recipe does not train, or one that has nothing to learn without `backbone`;
             what `apply`, `load_model` and `texts.load` raise.
    """
    method, out = parse(recipe.method), Path(out)
    if method.card.name not in TRAINERS:
        raise ValueError(f"{text(method)} is not trained here; these are: {', '.join(TRAINERS)}")
    folder = Folder(out, recipe, log)
    out = folder.path
    net, tokenizer = model or load_model(recipe.model)
    if data is None:
        train_set, test_set = (
            Encoded.of(load(recipe.data, split=split), tokenizer, length=recipe.length) for split in ("train", "test")
        )
    else:
        train_set, test_set = data
    with ExitStack() as undo:
        undo.callback(net.train, net.training)
        wants = [(p, p.requires_grad) for p in net.parameters()]
        undo.callback(lambda: [p.requires_grad_(want) for p, want in wants])
        net.requires_grad_(bool(recipe.backbone))
        run = _Run(recipe, net, train_set, folder)
        started = time.perf_counter()
        final, modules = TRAINERS[method.card.name](run)
        seconds = round(time.perf_counter() - started, 1)
        scores = _scores(run, final, modules, test_set)
        report = Report(
            method=text(final),
            scores=scores,
            test_texts=len(test_set),
            seconds=seconds,
            parameters=0 if modules is None else sum(p.numel() for p in modules.parameters()),
            found=_found(final, modules),
            frontier=run.frontier,
            lines=run.lines,
        )
        card = {"recipe": json.dumps(asdict(recipe)), "test_texts": str(len(test_set)), "seconds": str(seconds)}
        card |= {"scores": json.dumps({name: asdict(score) for name, score in scores.items()})}
        if report.found:
            card["found"] = report.found
        if modules is not None:
            with apply(net, final, modules=modules) as session:
                session.save_modules(out, card)
        if recipe.backbone:
            pretrained(net).save_pretrained(out)
            if tokenizer is not None:
                tokenizer.save_pretrained(out)
        folder.finish(report)
    for name, value in report.scores.items():
        log(f"{name:>22}  accuracy {value.accuracy:.4f} [{value.low:.3f}, {value.high:.3f}]  tokens {value.tokens:.3f}")
    return report


def _found(method: Reducer, modules: Modules | None) -> str | None:
    from fewer.methods.language.power_bert import PowerBert, found

    if isinstance(method, PowerBert) and isinstance(method.budget, Learned) and modules is not None:
        return text(found(modules[0], method.layers))
    return None


def _scores(run: _Run, method: Reducer, modules: nn.Module | None, test: Encoded) -> dict[str, Score]:
    """The model as it was, the method trained and fresh, and the baselines with as many tokens in every block."""
    full, n = _tested(run.teacher, None, test)
    mine, blocks = _tested(run.net, apply_to(method, modules), test)
    results = {"unreduced": (full, n), method.card.name: (mine, blocks)}
    if modules is not None:
        results["untrained"] = _tested(run.teacher, apply_to(method, "untrained"), test)
    steps = matched([(a / n[0][0], m / n[0][1]) for a, m, _ in blocks])
    for name in BASELINES:
        other = parse(name, keep=steps, of="start", rounding="round", layers=tuple(range(run.depth)))
        results[name] = _tested(run.teacher, apply_to(other, None), test)
    right = {name: (answers.argmax(-1) == test.labels).numpy() for name, (answers, _) in results.items()}
    scores = {}
    for name, (answers, rows) in results.items():
        value, ahead = share(right[name]), None
        if name not in ("random", "unreduced"):
            gap = paired_difference(right[name], right["random"])
            ahead = (round(gap.value, 4), round(gap.low, 4), round(gap.high, 4))
        scores[name] = Score(
            accuracy=round(value.value, 4),
            low=round(value.low, 4),
            high=round(value.high, 4),
            tokens=round(sum(a + m for a, m, _ in rows) / sum(a + m for a, m, _ in n), 4),
            gflops=round(rows[0][2], 5),
            kl=round(losses.logit_kl(answers, full).item(), 5),
            ahead=ahead,
        )
    return scores


def matched(rows: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    """Shares for a method between attention and MLP whose mean over all attentions and MLPs is that of `rows`, and
    which falls over the blocks as much. rows: per block the share of the tokens in its attention and its MLP."""
    falling = [min(mlp for _, mlp in rows[: i + 1]) for i in range(len(rows))]
    wanted = sum(a + m for a, m in rows)

    def scaled(factor: float) -> list[float]:
        return [min(1.0, max(factor * s, 1e-3)) for s in falling]

    low, high = 0.0, 1 / min(falling)
    for _ in range(50):
        middle = (low + high) / 2
        shares = scaled(middle)
        low, high = (low, middle) if sum([1.0, *shares[:-1], *shares]) > wanted else (middle, high)
    return tuple(round(s, 4) for s in scaled(high))


def apply_to(method: Reducer, modules: nn.Module | str | None) -> Callable[[nn.Module], Session]:
    """How to put a method on: a function of the model."""
    return lambda net: apply(net, method, modules=modules)


@torch.inference_mode()
def _tested(
    net: nn.Module, start: Callable[[nn.Module], Session] | None, data: Encoded, batch: int = 50
) -> tuple[Tensor, list[tuple[float, float, float]]]:
    """(N, classes) logits; and per block the mean tokens in its attention and its MLP, with the GFLOPs per text of the
    whole model."""
    net.eval()
    answers, total, depth = torch.zeros(0), 0, len(find(net).blocks)
    rows = [[0.0, 0.0, 0.0] for _ in range(depth)]
    with ExitStack() as undo:
        # The unreduced model is watched by a method that keeps everything.
        session = undo.enter_context((start or apply_to(parse("random", keep=1.0, layers=(0,)), None))(net))
        for indices in data.batches(batch):
            given = data.batch(indices)
            logits = net(**_inputs(given)).logits
            answers = answers if len(answers) else logits.new_zeros(len(data), logits.shape[-1])
            answers[indices] = logits
            ledger, size = session.ledger, len(given["labels"])
            total += size
            for row, entry in zip(rows, ledger.entries, strict=True):
                row[0] += entry.attention * size
                row[1] += entry.mlp * size
                row[2] += ledger.gflops * size
    return answers, [(a / total, m / total, g / total) for a, m, g in rows]
