"""Train TokenButler's predictor: the model stays as it is, a small network learns its attention logits.

    report = train(Prediction(model="smollm2-135m"), "out")           # out/tokenbutler.safetensors, its card, a log
    session = fewer.apply(model, "tokenbutler:keep=0.25", modules="out")

The loss is the mean squared error between predicted and true logits, before the softmax, of every head of every layer
over causal pairs (TokenButler, arXiv:2503.07518). One pass of the model gives the truth for a whole passage and costs
more than a step of the predictor, so a passage is taught more than once, each time from other query rows.
"""

from __future__ import annotations

import copy
import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewer import hosts
from fewer.core.attention import grouped_product
from fewer.core.learned import ModuleListOf
from fewer.datasets.texts import book
from fewer.hosts.decoder import DecoderHost
from fewer.methods.language.tokenbutler import Butler
from fewer.models.zoo import load_model
from fewer.recipes.loop import At, Folder, Loop, Row
from fewer.runtime import modules as trained
from fewer.spec import parse, text

__all__ = ["Passage", "Prediction", "Report", "learn", "loss_of", "measure", "read", "train"]

KEEPS = (0.5, 0.25, 0.125)
PAGE = 16
SINKS = 4


@dataclass(frozen=True)
class Prediction:
    """Everything a run depends on.

    method: text form of the method. model: as in `load_model`; text: as in `texts.book`.
    steps: updates of the predictor. length: tokens of a passage. rows: query rows taught in a step.
    reuse: steps for one pass of the model, each on a passage drawn from the last `pool` ones.
    lr, warmup, clip: AdamW's peak rate, warm-up as a share of the steps then half a cosine, bound on the gradient norm.
    centred: leave out each row's mean error, which changes nobody's choice; the paper does not.
    half: save the weights in float16; the results are of the rounded weights.
    test: passages the results are measured on, from the last tenth of the text, which is never trained on.
    seed: initial weights and all draws. threads: torch threads; None leaves them.
    """

    method: str = "tokenbutler"
    model: str = "smollm2-135m"
    text: str = "state-of-the-union"
    steps: int = 600
    length: int = 512
    rows: int = 64
    reuse: int = 4
    pool: int = 16
    centred: bool = False
    lr: float = 1e-3
    warmup: float = 0.05
    clip: float = 20.0
    half: bool = True
    test: int = 8
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "reuse", "pool", "test"):
            if getattr(self, name) < 1:
                raise ValueError(f"Prediction({name}={getattr(self, name)}): must be at least 1")
        if self.length < 32:
            raise ValueError(f"Prediction(length={self.length}): pages of 16 and their rivals need at least 32 tokens")


@dataclass(frozen=True)
class Report:
    """What a run came to. results: "recall@keep" and "mass@keep", see `measure`, the means over the test passages by
    guess; passages: the same, one number per passage. seconds: training alone."""

    method: str
    parameters: int
    tokens: int
    steps: int
    seconds: float
    results: dict[str, dict[str, float]]
    passages: dict[str, dict[str, list[float]]] = field(repr=False)


def train(
    recipe: Prediction, out: str | Path, *, model: tuple[nn.Module, Any] | None = None, ids: Tensor | None = None,
    log: Callable[[str], None] = print,
) -> Report:  # fmt: skip
    """Train the predictor and save it where `fewer.apply(..., modules=out)` finds it.

    out: folder for tokenbutler.safetensors (its card holds the recipe and the results), log.jsonl and report.json.
    model: (model, tokenizer) instead of the named one, with its head or without; it is left as it was.
    ids: (T,) token ids instead of the named text's. log: receives a line every 25 steps and the results.
    Raises   ValueError for a text too short; HostError for a model that is no decoder; what `load_model` and `book` do.
    """
    method, out = parse(recipe.method), Path(out)
    folder = Folder(out, recipe, log)
    out = folder.path
    net, tokenizer = model or load_model(recipe.model)
    host = hosts.find(net)
    if not isinstance(host, DecoderHost):
        raise hosts.HostError(f"{type(net).__name__} is {host.name}; TokenButler predicts a decoder's attention")
    if ids is None:
        ids = torch.tensor(tokenizer(book(recipe.text), verbose=False)["input_ids"])
    device = next(net.parameters()).device
    cut = len(ids) - max(len(ids) // 10, recipe.length)
    if cut < recipe.length:
        raise ValueError(
            f"the text has {len(ids)} tokens; {2 * recipe.length} are needed for one passage of "
            f"{recipe.length} to train on and one to test on: give a longer text, or length="
        )
    modules = trained.build(method, host, 1).to(device)
    butler = next(m for m in modules.modules() if isinstance(m, Butler))
    lines = learn(recipe, host, butler, ids[:cut].to(device), folder)
    kept = copy.deepcopy(modules).half() if recipe.half else modules
    modules.load_state_dict(kept.state_dict())
    starts = torch.linspace(0, len(ids) - cut - recipe.length, recipe.test).long().tolist()
    passages = [read(host, ids[cut + s : cut + s + recipe.length].to(device)) for s in starts]
    found = measure(butler, passages, seed=recipe.seed)
    report = Report(
        method=text(method),
        parameters=sum(p.numel() for p in modules.parameters()),
        tokens=-(-recipe.steps // recipe.reuse) * recipe.length,
        steps=recipe.steps,
        seconds=lines[-1]["seconds"],
        results={k: {name: round(sum(v) / len(v), 4) for name, v in row.items()} for k, row in found.items()},
        passages={k: {name: [round(x, 4) for x in v] for name, v in row.items()} for k, row in found.items()},
    )
    card = {
        "recipe": json.dumps(asdict(recipe)),
        **{k: v if isinstance(v, str) else json.dumps(v) for k, v in asdict(report).items() if k != "passages"},
    }
    trained.save(out, [method], ModuleListOf([kept]), host, {k: v for k, v in card.items() if k != "method"})
    folder.finish(report)
    for name, row in report.results.items():
        log(f"{name:>12}  " + "  ".join(f"{guess} {value:.3f}" for guess, value in row.items()))
    return report


@dataclass(eq=False)
class Passage:
    """What the model did with one passage: entry (1, N, C), what enters block 0; q (L, H, N, d) and k (L, G, N, d),
    rotated; scale, the factor on q k^T."""

    entry: Tensor
    q: Tensor
    k: Tensor
    scale: float

    def logits(self, rows: Tensor) -> Tensor:
        """(L, H, R, N) float32: the true logits of some query rows, future keys included."""
        return grouped_product(self.q[:, :, rows] * self.scale, self.k)


class _Watch:
    """A visit that keeps queries and keys and changes nothing."""

    def __init__(self) -> None:
        self.q: list[Tensor] = []
        self.k: list[Tensor] = []
        self.scale = 1.0

    def attend(self, module: nn.Module, plain: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
               kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        self.q.append(q[0].float())
        self.k.append(k[0].float())
        scale = kwargs.get("scaling")
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        return plain(module, q, k, v, mask, **kwargs)


@torch.no_grad()
def read(host: DecoderHost, ids: Tensor) -> Passage:
    """Run the model on (N,) token ids and keep what the predictor is to learn. The head is not run."""
    entry: list[Tensor] = []
    watch = _Watch()
    with ExitStack() as undo:
        undo.enter_context(host.watched(watch))
        hook = host.blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: entry.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        undo.callback(hook.remove)
        host.root(input_ids=ids[None], use_cache=False)
    return Passage(entry[0].float(), torch.stack(watch.q), torch.stack(watch.k), watch.scale)


def loss_of(butler: Butler, passage: Passage, rows: Tensor, *, centred: bool = False) -> Tensor:
    """Mean squared error of the predicted logits over the causal pairs of some query rows, heads and layers alike.

    centred: leave out each row's mean error, which changes neither the softmax nor who is chosen.
    """
    asked, kept = butler(passage.entry)
    predicted = butler.logits(asked[0][:, :, rows], kept.important[0])
    visible = torch.arange(passage.k.shape[-2], device=rows.device) <= rows[:, None]
    error = (predicted - passage.logits(rows)).masked_fill(~visible, 0)
    if centred:
        error = (error - error.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True)).masked_fill(~visible, 0)
    return error.square().sum() / (visible.sum() * error.shape[0] * error.shape[1])


# -- what a prediction is worth ---------------------------------------------------------------------------------------
@torch.no_grad()
def measure(butler: Butler, passages: list[Passage], *, keeps: tuple[float, ...] = KEEPS, rows: int = 32,
            seed: int = 0) -> dict[str, dict[str, list[float]]]:  # fmt: skip
    """How much of what each KV head would attend to different guesses find, at equal numbers of rows.

    A KV head's truth is the softmax of its query heads, averaged. For evenly spaced query rows i (the first eighth of a
    passage is left out) each guess chooses ceil(keep (i + 1)) of the i + 1 keys, the first 4 always among them. Layer 0
    is left out: the method does not act there. Guesses: "predictor"; "last step", the truth of row i - 1, key i always
    in; "pages", bounds of pages of 16 keys, the newest always in (Quest, arXiv:2406.10774); "newest", the last keys
    before i; "random"; and the oracle itself for the mass.

    Returns  "recall@keep": guess -> one number per passage, the share of the oracle's keys that were chosen; and
             "mass@keep": the share of the true attention that falls on the chosen keys.
    """
    generator = torch.Generator().manual_seed(seed)
    names = [f"{what}@{keep:g}" for what in ("recall", "mass") for keep in keeps]
    results: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for passage in passages:
        n, groups = passage.k.shape[-2], passage.k.shape[1]
        at = torch.linspace(max(n // 8, 1), n - 1, rows).long().unique()
        column = torch.arange(n)
        future = column > at[:, None]
        newest, sinks = column == at[:, None], column < SINKS
        truth = _shares(passage.logits(at), future, groups)[1:]
        asked, kept = butler(passage.entry)
        guesses = {
            "oracle": truth,
            "predictor": _shares(butler.logits(asked[0][:, :, at], kept.important[0]), future, groups)[1:],
            "last step": _shares(passage.logits(at - 1), column > at[:, None] - 1, groups)[1:].masked_fill(newest, 2.0),
            "pages": _pages(passage, at, groups)[1:],
            "newest": column.float().expand(truth.shape),
            "random": torch.rand(truth.shape, generator=generator),
        }
        ranks = {
            name: _rank(guess.masked_fill(sinks, math.inf).masked_fill(future, -math.inf))
            for name, guess in guesses.items()
        }
        for keep in keeps:
            count = ((at + 1) * keep).ceil()[:, None]
            for name, rank in ranks.items():
                chosen = rank < count
                mass = (truth * chosen).sum(-1).mean().item()
                results[f"mass@{keep:g}"].setdefault(name, []).append(mass)
                if name != "oracle":
                    found = ((chosen & (ranks["oracle"] < count)).sum(-1) / count[:, 0]).mean().item()
                    results[f"recall@{keep:g}"].setdefault(name, []).append(found)
    return results


def _rank(scores: Tensor) -> Tensor:
    """0 for the highest; ties: the earlier first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)


def _shares(logits: Tensor, future: Tensor, groups: int) -> Tensor:
    """(L, H, R, N) logits -> (L, G, R, N) probabilities, averaged over the query heads of each KV head."""
    return logits.masked_fill(future, -math.inf).softmax(-1).unflatten(1, (groups, -1)).mean(2)


def _pages(passage: Passage, at: Tensor, groups: int) -> Tensor:
    """(L, G, R, N): each key's page's upper bound on q k, averaged over the query heads of a KV head."""
    n = passage.k.shape[-2]
    pages = -(-n // PAGE)
    k = torch.nn.functional.pad(passage.k, (0, 0, 0, pages * PAGE - n))  # the last page is always in: zeros do no harm
    low, high = k.unflatten(-2, (pages, PAGE)).aminmax(dim=-2)
    q = passage.q[:, :, at]
    bound = grouped_product(q.clamp(min=0), high) + grouped_product(q.clamp(max=0), low)
    bound = bound.unflatten(1, (groups, -1)).mean(2)
    newest = torch.arange(pages) == (at // PAGE)[:, None]
    return bound.masked_fill(newest, math.inf).repeat_interleave(PAGE, dim=-1)[..., :n]


def learn(prediction: Prediction, host: DecoderHost, butler: Butler, ids: Tensor,
          folder: Folder | None = None) -> list[Row]:  # fmt: skip
    """Teach the predictor on random passages of (T,) token ids. The model is read, never changed."""
    passage = lru_cache(prediction.pool)(lambda start: read(host, ids[start : start + prediction.length]))

    def batches() -> Iterator[tuple[int, Tensor]]:
        """Where a passage starts, and which of its rows ask: `reuse` times one of the last `pool` passages."""
        pool: deque[int] = deque(maxlen=prediction.pool)
        for step in count():
            if step % prediction.reuse == 0:
                pool.append(int(torch.randint(len(ids) - prediction.length + 1, ())))
            start = pool[-1] if step % prediction.reuse == 0 else pool[int(torch.randint(len(pool), ()))]
            yield start, torch.randperm(prediction.length)[: prediction.rows].sort().values

    def loss(batch: tuple[int, Tensor], at: At) -> dict[str, Tensor]:
        start, rows = batch
        return {"loss": loss_of(butler, passage(start), rows.to(ids.device), centred=prediction.centred)}

    optimizer = torch.optim.AdamW(butler.parameters(), lr=prediction.lr, weight_decay=0.01)
    loop = Loop(prediction.steps, prediction.warmup, clip=prediction.clip)
    return loop.run(butler, [optimizer], batches(), loss, folder)
