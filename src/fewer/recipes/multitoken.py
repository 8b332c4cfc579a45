"""Train heads that guess several tokens ahead on a model that stays as it is.

report = train(MultiTokens(), "out")                         # out/multitoken.safetensors, its card, a log, a report
written = fewer.generation.swift(model, ids, heads="out")
"""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewer.compat import pretrained
from fewer.core.settings import Settings
from fewer.datasets.texts import book
from fewer.generation import Chained, Heads, Layers, loss, swift
from fewer.models.zoo import load_model
from fewer.recipes.loop import At, Folder, Loop, decayed

__all__ = ["MultiTokens", "Report", "measured", "train"]


@dataclass(frozen=True)
class MultiTokens(Settings):
    """Everything a run depends on.

    model        as in `load_model`. texts: names of `texts.book`, joined by +; the last tenth of each is for testing
    heads        how many. kind: "chained", small, or "layers", a block each
    words        tokens the heads choose among, the most frequent of the text; 0 = all
    steps        updates, of `batch` passages of `length` tokens each. reuse: updates for one pass of the model, each on
                 passages drawn from those of the last `pool` passes
    lr           AdamW's peak rate, warm-up over `warmup` of the steps, then half a cosine. weight_decay: of matrices
    test         passages of the held-out text that heads are measured on. begin: so many begin texts of `write` tokens
    half         save in float16; what is measured is what is saved
    bfloat16     multiply in bfloat16 while training. seed: of all draws. threads: None leaves them
    """

    model: str = "smollm2-135m"
    texts: str = "state-of-the-union+moby-dick"
    heads: int = 3
    kind: Literal["chained", "layers"] = "chained"
    words: int = 8192
    steps: int = 240
    batch: int = 8
    length: int = 256
    reuse: int = 3
    pool: int = 8
    lr: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    test: int = 16
    begin: int = 4
    write: int = 48
    half: bool = True
    bfloat16: bool = True
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        least = {"words": 0, "write": 2}
        for name in ("heads", "words", "steps", "batch", "reuse", "pool", "test", "begin", "write"):
            if getattr(self, name) < least.get(name, 1):
                raise ValueError(f"MultiTokens({name}={getattr(self, name)}): must be at least {least.get(name, 1)}")
        if self.length < self.heads + 2:
            raise ValueError(f"MultiTokens(length={self.length}): {self.heads} heads need {self.heads + 2} tokens")
        if self.kind not in ("chained", "layers"):
            raise ValueError(f"MultiTokens(kind={self.kind!r}): chained or layers")


@dataclass(frozen=True)
class Report:
    """What a run came to, on held-out text. Lists have an entry for each head, from the first.

    first, fourth  share of the places where the text's token is the head's first guess, one of its first four; for
                   "trained" heads, for "untrained" ones, and for "frequent", the text's most frequent tokens
    accepted       writing greedily from held-out passages, one guess of each head in a chain: share of a head's guesses
                   that came true where they were put to the test (behind the guesses of the heads before it)
    per_pass       tokens each of these passes wrote; texts: the same, one number for each text
    tokens         read in training
    covered        share of the held-out text that is among the heads' words. seconds: training alone
    """

    parameters: int
    tokens: int
    seconds: float
    covered: float
    first: dict[str, list[float]]
    fourth: dict[str, list[float]]
    accepted: dict[str, list[float]]
    per_pass: dict[str, float]
    texts: dict[str, list[float]] = field(repr=False)


def train(
    recipe: MultiTokens, out: str | Path, *, model: tuple[nn.Module, Any] | None = None, ids: Tensor | None = None,
    log: Callable[[str], None] = print,
) -> Report:  # fmt: skip
    """Train heads and save them where `heads=out` finds them. The model is left as it was.

    model: instead of loading the one named, with its tokenizer or None. ids: (T,) long, instead of reading the texts.
    """
    folder = Folder(out, recipe, log)
    net, tokenizer = load_model(recipe.model) if model is None else model
    device = next(net.parameters()).device
    pieces = [ids] if ids is not None else [
        torch.tensor(tokenizer(book(name), verbose=False)["input_ids"]) for name in recipe.texts.split("+")
    ]  # fmt: skip
    seen, held = (torch.cat(side) for side in zip(*[_divided(piece) for piece in pieces], strict=True))
    if min(len(seen), len(held)) < recipe.length:
        raise ValueError(f"texts of {len(seen)} and {len(held)} tokens: too short for {recipe.length} at a time")
    frequent = seen.bincount().argsort(descending=True, stable=True)
    words = frequent[: recipe.words].sort().values.to(device) if recipe.words else None
    kind = Chained if recipe.kind == "chained" else Layers
    heads, untrained = (kind.of(net, recipe.heads, words) for _ in range(2))
    learning = {name: p.requires_grad for name, p in net.named_parameters()}
    net.requires_grad_(False)
    try:
        lines = _learn(recipe, net, heads, seen, folder)
    finally:
        for name, p in net.named_parameters():
            p.requires_grad_(learning[name])
    if recipe.half:
        heads.to(torch.float16).float()
    passages = _windows(held, recipe.test, recipe.length)
    rivals = {"trained": heads, "untrained": untrained}
    ranks = {name: measured(net, one, passages) for name, one in rivals.items()}
    spread = _windows(held, recipe.begin, recipe.length)
    said = {name: [_written(net, one, passage, recipe.write) for passage in spread] for name, one in rivals.items()}
    common = [float(torch.isin(held, frequent[:n].cpu()).float().mean()) for n in (1, 4)]
    report = Report(
        sum(p.numel() for p in heads.parameters()), -(-recipe.steps // recipe.reuse) * recipe.batch * recipe.length,
        lines[-1]["seconds"],
        1.0 if words is None else float(torch.isin(held.to(device), words).float().mean()),
        {**{name: one[0] for name, one in ranks.items()}, "frequent": [common[0]] * recipe.heads},
        {**{name: one[1] for name, one in ranks.items()}, "frequent": [common[1]] * recipe.heads},
        {name: _accepted(each, recipe.heads) for name, each in said.items()},
        {name: sum(len(w.nodes) * w.per_pass for w in each) / sum(len(w.nodes) for w in each)
         for name, each in said.items()},
        {name: [round(w.per_pass, 3) for w in each] for name, each in said.items()},
    )  # fmt: skip
    card = {k: json.dumps(v) for k, v in asdict(report).items()} | {"recipe": json.dumps(asdict(recipe))}
    heads.save(folder.path, card, dtype=torch.float16 if recipe.half else None)
    folder.finish(report)
    log(json.dumps({k: v for k, v in asdict(report).items() if k != "texts"}))
    return report


def _learn(recipe: MultiTokens, net: nn.Module, heads: Heads, ids: Tensor, folder: Folder) -> list[dict[str, float]]:
    """Teach the heads on random passages."""
    reader = copy.deepcopy(net).to(torch.bfloat16) if recipe.bfloat16 else net
    device = next(net.parameters()).device

    @lru_cache(maxsize=recipe.pool)
    def seen(starts: tuple[int, ...]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Passages, and what heads see of the model that reads them."""
        rows = ids[torch.tensor(starts)[:, None] + torch.arange(recipe.length)].to(device)
        with torch.no_grad():
            # A chain needs no logits of the model's own, which are a good part of the work.
            states = pretrained(reader).base_model(input_ids=rows, use_cache=False).last_hidden_state
            return rows, *((states, {}) if isinstance(heads, Chained) else read.take())

    def batches() -> Iterator[tuple[int, ...]]:
        pool: deque[tuple[int, ...]] = deque(maxlen=recipe.pool)
        for step in count():
            if step % recipe.reuse == 0:
                pool.append(tuple(torch.randint(0, len(ids) - recipe.length + 1, (recipe.batch,)).tolist()))
            yield pool[-1 if step % recipe.reuse == 0 else int(torch.randint(len(pool), ()))]

    def taught(starts: tuple[int, ...], at: At) -> dict[str, Any]:
        rows, x, given = seen(starts)
        with at.autocast():
            total, each = loss(net, heads, x, rows, given)
        return {"loss": total} | {f"head {k}": one for k, one in enumerate(each, 1)}

    optimiser = torch.optim.AdamW(decayed(heads.parameters(), recipe.weight_decay), lr=recipe.lr)
    with heads.reading(reader) as read:
        loop = Loop(recipe.steps, recipe.warmup, bfloat16=recipe.bfloat16)
        return loop.run(heads.train(), [optimiser], batches(), taught, folder)


@torch.no_grad()
def measured(net: nn.Module, heads: Heads, passages: Tensor) -> tuple[list[float], list[float]]:
    """For each head, how often the text's token is its first guess, and one of its first four.

    passages: (M, N) long. Places whose token is not among the heads' words count as missed.
    """
    heads.eval()
    unembedding = heads.unembedding(net)
    hits = torch.zeros(2, heads.count)
    places = torch.zeros(heads.count)
    with heads.reading(net) as read:
        for rows in passages.to(next(net.parameters()).device).split(1):
            net(rows)
            x, given = read.take()
            for head, state in enumerate(heads(x, given)):
                want = rows[:, 2 + head :]
                best = unembedding(state[:, : want.shape[1]]).topk(4, dim=-1).indices
                best = best if heads.words is None else heads.words[best]
                right = best == want[..., None]
                hits[0, head] += right[..., 0].sum().cpu()
                hits[1, head] += right.any(-1).sum().cpu()
                places[head] += want.numel()
    first, fourth = (hits / places).tolist()
    return first, fourth


def _written(net: nn.Module, heads: Heads, passage: Tensor, tokens: int) -> Any:
    """A text written with a chain of one guess of each head."""
    ids = passage[None].to(next(net.parameters()).device)
    return swift(
        net, ids, heads=heads, max_new_tokens=tokens, min_new_tokens=tokens, order=0, candidates=1,
        nodes=heads.count + 1, least=0.0,
    )  # fmt: skip


def _accepted(texts: list[Any], heads: int) -> list[float]:
    """Of each head, the share of the guesses put to the test that came true; 0 where none was."""
    found = []
    for head in range(1, heads + 1):
        tests, hits = (sum(text.sources.get(f"head {head}", (0, 0))[i] for text in texts) for i in (0, 1))
        found.append(hits / tests if tests else 0.0)
    return found


def _divided(ids: Tensor) -> tuple[Tensor, Tensor]:
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]


def _windows(ids: Tensor, count: int, length: int) -> Tensor:
    """(count or as many as there are, length): pieces side by side, spread evenly over the whole."""
    pieces = ids[: len(ids) // length * length].view(-1, length)
    return pieces[torch.linspace(0, len(pieces) - 1, min(count, len(pieces))).long()]
