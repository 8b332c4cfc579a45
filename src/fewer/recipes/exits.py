"""Train what says when visual tokens may leave a language model: DyVTE's gates and Dynamic-LLaVA's predictors.

    samples = [(dict(processor(images=image, text=question, return_tensors="pt")), answer_ids), ...]
    train_gates(model, samples, "out")                                  # out/dyvte.safetensors, its card
    session = fewer.apply(model, "dyvte", modules="out")

The language model stays as it is: DyVTE's authors freeze it too, those of Dynamic-LLaVA tune it along. A sample is the
arguments of a forward pass over one prompt, and the ids of its answer.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer import hosts
from fewer.recipes.loop import At, Folder, Loop
from fewer.runtime.apply import apply
from fewer.spec import parse, text

__all__ = ["Gates", "Predicting", "Report", "may_leave", "train_gates", "train_output", "train_predictor"]

Sample = tuple[Mapping[str, Any], Tensor]


@dataclass(frozen=True)
class Gates:
    """How DyVTE's gates are trained. The defaults are the paper's, but for the steps: it takes one epoch of 1 % of
    665,000 samples, 128 at a time.

    method: its text form. steps: updates; batch: samples of each. lr: AdamW's peak rate, a linear warm-up over `warmup`
    of the steps, then half a cosine. agreement, slack: see `may_leave`. seed: of the weights and all draws.
    """

    method: str = "dyvte"
    steps: int = 50
    batch: int = 128
    lr: float = 6e-5
    warmup: float = 0.03
    agreement: float = 0.99
    slack: float = 1.03
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "steps", "batch")


@dataclass(frozen=True)
class Predicting:
    """How Dynamic-LLaVA's predictor is trained. The defaults are the paper's, but for the steps (one epoch of 665,000
    samples, 64 at a time).

    method: its text form; its budget is the share that is aimed at. steps, batch, lr, warmup, seed: as in `Gates`.
    ratio: weight of the squared distance between the kept share and the aim. tau: the temperature of the sampled
    decisions, at first and at last, falling geometrically.
    """

    method: str = "dynamic_llava"
    steps: int = 100
    batch: int = 64
    lr: float = 2e-4
    warmup: float = 0.03
    ratio: float = 100.0
    tau: tuple[float, float] = (1.0, 0.1)
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "steps", "batch")
        if not 0 < self.tau[1] <= self.tau[0]:
            raise ValueError(f"tau={self.tau}: temperatures are positive and fall")


@dataclass(frozen=True)
class Report:
    """What a run came to. lines: what each step's losses and shares were, means over its samples."""

    method: str
    parameters: int
    lines: list[dict[str, float]] = field(repr=False)


def may_leave(full: Tensor, without: Tensor, answer: Tensor, agreement: float = 0.99, slack: float = 1.03) -> bool:
    """Whether an answer survives the exit: the label of DyVTE's gates.

    full, without: (A, V) logits of the answer's tokens, visual tokens present and gone; answer: (A,) ids. True where
    more than `agreement` of the most likely tokens are the same and the loss is less than `slack` times what it was.
    """
    same = (full.argmax(-1) == without.argmax(-1)).float().mean()
    before, after = (F.cross_entropy(x.float(), answer) for x in (full, without))
    return bool((same > agreement) & (after < slack * before))


def train_gates(
    model: nn.Module, samples: Sequence[Sample], out: str | Path, recipe: Gates | None = None,
    log: Callable[[str], None] = print,
) -> Report:  # fmt: skip
    """Train DyVTE's gates and save them where `fewer.apply(..., modules=out)` finds them.

    Each sample meets one gate, drawn evenly. Its label comes from two passes over prompt and answer, one of them
    without the visual tokens behind that gate; its feature from the prompt alone, which is what the gate will see.

    Source   DyVTE, arXiv:2411.19628, sec. 4.
    """
    recipe = recipe or Gates()
    model.requires_grad_(False).eval()
    layers = parse(recipe.method).acts_at(len(hosts.find(model).blocks))

    known: dict[tuple[int, int], bool] = {}  # the model does not change, so no label is found twice

    def labelled(number: int, stage: int) -> bool:
        if (number, stage) not in known:
            given, answer = samples[number]
            whole = _with_answer(given, answer)
            with torch.no_grad():
                full = _answer_logits(model, whole, answer)
                with apply(model, "vtw", k=layers[stage] + 1):
                    without = _answer_logits(model, whole, answer)
            answer = answer.to(full.device)
            known[number, stage] = may_leave(full, without, answer, recipe.agreement, recipe.slack)
        return known[number, stage]

    def loss(session: Any, twin: nn.Module, number: int, at: At) -> dict[str, Tensor]:
        stage = int(torch.randint(len(layers), (1,)))
        label = labelled(number, stage)
        twin(**samples[number][0], use_cache=False)
        logits = session.last.memory[0]["leave"][stage]
        found = F.cross_entropy(logits, torch.full((1,), int(label), device=logits.device))
        right = (logits.argmax(-1) == int(label)).float().mean()
        return {"loss": found, "label": torch.tensor(float(label)), "right": right}

    return _trained(model, samples, out, recipe, loss, log)


def train_predictor(
    model: nn.Module, samples: Sequence[Sample], out: str | Path, recipe: Predicting | None = None,
    log: Callable[[str], None] = print,
) -> Report:  # fmt: skip
    """Train Dynamic-LLaVA's image predictor and save it where `fewer.apply(..., modules=out)` finds it.

    The loss of the answer's tokens under sampled, masked decisions, and the distance of the kept share from the aim,
    squared per sample.

    Source   Dynamic-LLaVA, arXiv:2412.00876, sec. 3.3.
    """
    recipe = recipe or Predicting()
    model.requires_grad_(False).eval()
    first, last = recipe.tau

    def loss(session: Any, twin: nn.Module, number: int, at: At) -> dict[str, Tensor]:
        given, answer = samples[number]
        for stage in session.modules[0]:
            stage["predictor"].tau = first * (last / first) ** at.progress
        logits = _answer_logits(twin, _with_answer(given, answer), answer)
        memory = session.last.memory[0]
        shares = torch.stack([keep.mean() for keep in memory["keep"].values()])
        aims = shares.new_tensor(list(memory["target"].values()))
        next_token = F.cross_entropy(logits.float(), answer.to(logits.device))
        off = (shares - aims).square().sum()
        return {"loss": next_token + recipe.ratio * off, "next": next_token.detach(), "share": shares.detach().mean()}

    return _trained(model, samples, out, recipe, loss, log)


def train_output(
    model: nn.Module, samples: Sequence[Sample], out: str | Path, recipe: Predicting | None = None,
    log: Callable[[str], None] = print, *, share: float = 0.5, least: int = 50,
) -> Report:  # fmt: skip
    """Train Dynamic-LLaVA's predictor for written tokens and save it for `dynamic_llava_decode`.

    share: of an answer's tokens that is to be kept. least: tokens of the shortest answer that teaches anything; in
    shorter ones all are kept, so they are left out.

    Raises   ValueError where no answer is long enough.
    Source   Dynamic-LLaVA, arXiv:2412.00876, sec. 3.3.
    """
    recipe = recipe or Predicting("dynamic_llava_decode")
    method = parse(recipe.method, learning=True)
    samples = [sample for sample in samples if len(sample[1]) >= least]
    if not samples:
        raise ValueError(f"no answer has {least} tokens; give longer ones, or a smaller least")
    model.requires_grad_(False).eval()
    first, last = recipe.tau

    def loss(session: Any, twin: nn.Module, number: int, at: At) -> dict[str, Tensor]:
        given, answer = samples[number]
        predictor = session.modules[0][0]["predictor"]
        predictor.tau, predictor.start = first * (last / first) ** at.progress, given["input_ids"].shape[1]
        logits = _answer_logits(twin, _with_answer(given, answer), answer)
        kept = session.remembered[0]["keep"][0].mean()
        next_token = F.cross_entropy(logits.float(), answer.to(logits.device))
        off = recipe.ratio * (kept - share).square()
        return {"loss": next_token + off, "next": next_token.detach(), "share": kept.detach()}

    return _trained(model, samples, out, replace(recipe, method=text(method)), loss, log)


def _positive(recipe: Any, *names: str) -> None:
    for name in names:
        if getattr(recipe, name) < 1:
            raise ValueError(f"{type(recipe).__name__}({name}={getattr(recipe, name)}): must be at least 1")


def _trained(
    model: nn.Module, samples: Sequence[Sample], out: str | Path, recipe: Gates | Predicting,
    loss: Callable[[Any, nn.Module, int, At], dict[str, Tensor]], log: Callable[[str], None],
) -> Report:  # fmt: skip
    """What all three share: a twin of the model holds the session whose modules learn, on the model's own weights."""
    if not samples:
        raise ValueError("samples is empty: give prompts with their answers")
    folder = Folder(out, recipe, log, every=10)
    out = folder.path
    twin = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})

    picks = iter(lambda: torch.randint(len(samples), (recipe.batch,)).tolist(), None)
    with apply(twin, recipe.method, modules="untrained") as session:
        modules = session.modules.float().requires_grad_(True)

        def parts(batch: list[int], at: At) -> Iterator[dict[str, Tensor]]:
            for pick in batch:
                line = loss(session, twin, pick, at)
                yield line | {"loss": line["loss"] / recipe.batch}

        twin.train()
        optimiser = torch.optim.AdamW(modules.parameters(), lr=recipe.lr, weight_decay=0.0)
        lines = Loop(recipe.steps, recipe.warmup, clip=math.inf, every=1).run(
            modules, [optimiser], picks, parts, folder
        )
        twin.eval()
        session.save_modules(out, {"recipe": json.dumps(asdict(recipe)), "last": json.dumps(lines[-1])})
        report = Report(text(parse(recipe.method)), sum(p.numel() for p in modules.parameters()), lines)
    folder.finish(report, parse(recipe.method).card.name)
    return report


def _with_answer(given: Mapping[str, Any], answer: Tensor) -> dict[str, Any]:
    """The arguments of a pass over prompt and answer. Whatever has an entry for each of the prompt's tokens grows."""
    shape = given["input_ids"].shape
    if shape[0] != 1:
        raise ValueError(f"a sample is one prompt; input_ids has {shape[0]} rows")
    whole = dict(given)
    for name, value in given.items():
        if isinstance(value, Tensor) and value.shape == shape:
            more = (
                answer[None].to(value) if name == "input_ids" else value.new_full((1, len(answer)), int("mask" in name))
            )
            whole[name] = torch.cat([value, more], 1)
    return whole


def _answer_logits(model: nn.Module, whole: Mapping[str, Any], answer: Tensor) -> Tensor:
    """(A, V): what predicts each token of the answer, which the pass ends with."""
    return model(**whole, use_cache=False).logits[0, -len(answer) - 1 : -1]
