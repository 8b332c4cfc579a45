"""Train the pruner of examples of CoT-Influx, by the answers of a language model that reads what it leaves.

    report = train(Influencing(), "runs/influx")
    compressor = fewer.Compressor("influx:tokens=160", "runs/influx", counter=tokenizer)

Only two small heads learn, on frozen features; the language model gives rewards, no gradients. What is held out is
asked with the trained policy, with the same policy before it learned, and with what costs nothing to learn, at as many
tokens: whole examples at random and by likeness to the question, all examples cut alike, tokens at random.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.compression.compressed import composed, counted
from fewer.compression.compressor import Compressor
from fewer.compression.source import Source
from fewer.core.settings import Settings
from fewer.datasets import texts
from fewer.evaluation.stats import paired_difference, share
from fewer.models.influx import ExemplarPruner
from fewer.models.zoo import load_model
from fewer.recipes.loop import At, Folder, Loop, decayed, shuffled
from fewer.training.influx import draw, reward
from fewer.training.losses import reinforce

__all__ = ["Asked", "Example", "Influencing", "Judge", "Report", "Score", "Task", "topics", "train"]

TOPICS = {
    "earn": "earnings", "acq": "merger", "crude": "oil", "trade": "trade", "money-fx": "currency",
    "interest": "interest",
}  # fmt: skip
"""Classes of the Reuters wires with enough texts for testing, and a word for each."""


@dataclass(frozen=True)
class Influencing(Settings):
    """Everything a run depends on.

    model     whose answers are rewarded. encoder: frozen, see `ExemplarPruner`
    shots     examples of a prompt, the nearest to the question by the encoder's mean over tokens
    tokens    T, of the examples of a prompt, counted by the model's tokenizer. words: a text is cut behind so many
    steps     updates, of `batch` questions each, with `group` selections of each
    shaping   w of the reward. lr: AdamW's peak rate
    bias      what the logits of both policies start at; None = so that about T tokens stay. The paper's is 1
    pool, questions, test   examples to choose from, questions to learn on, and those held out; of all classes alike
    bfloat16  whether the model reads in it
    """

    model: str = "smollm2-135m"
    encoder: str = "minilm"
    shots: int = 10
    tokens: int = 120
    words: int = 30
    steps: int = 150
    batch: int = 3
    group: int = 8
    shaping: float = 1.0
    lr: float = 1e-3
    warmup: float = 0.1
    bias: float | None = None
    inner: int = 512
    pool: int = 300
    questions: int = 300
    test: int = 240
    bfloat16: bool = True
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("shots", 1), ("tokens", 1), ("words", 1), ("steps", 1), ("batch", 1), ("test", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"Influencing({name}={getattr(self, name)}): must be at least {least}")
        if self.group < 2:
            raise ValueError(f"Influencing(group={self.group}): a baseline needs at least 2 selections of a question")
        if self.pool < self.shots:
            raise ValueError(f"Influencing(pool={self.pool}): {self.shots} examples are to be chosen from it")


@dataclass(frozen=True)
class Example:
    """text: what is asked about. answer: what is right, a word or more."""

    text: str
    answer: str


@dataclass(frozen=True)
class Task:
    """Examples to put before questions, questions to learn on, questions held out.

    choices   all answers there are, where there are few: the likeliest is the model's; () = it writes greedily
    shown, asked   how an example and a question are written; the last line of an example holds its answer
    """

    pool: tuple[Example, ...]
    questions: tuple[Example, ...]
    held: tuple[Example, ...]
    choices: tuple[str, ...] = ()
    shown: str = "Text: {text}\nTopic: {answer}"
    asked: str = "Text: {text}\nTopic:"

    def example(self, one: Example) -> str:
        return self.shown.format(text=one.text, answer=one.answer)

    def question(self, one: Example) -> str:
        return self.asked.format(text=one.text)


@dataclass(frozen=True)
class Score:
    """How questions held out are answered. accuracy: with low and high, its 95 % interval. nats: of the right answer,
    mean. tokens: of the examples, mean. ahead: accuracy above whole examples at random, paired, with its interval."""

    accuracy: float
    low: float
    high: float
    nats: float
    tokens: float
    ahead: tuple[float, float, float]


@dataclass(frozen=True)
class Report:
    """scores: by way of choosing. rewards: mean of the first and of the last tenth of the steps. kept: examples that
    are left in a prompt, mean. seconds: training alone."""

    model: str
    encoder: str
    parameters: int
    seconds: float
    rewards: tuple[float, float]
    kept: float
    scores: dict[str, Score] = field(default_factory=dict)


def train(
    recipe: Influencing, out: str | Path, *, model: tuple[nn.Module, Any] | None = None,
    encoder: tuple[nn.Module, Any] | None = None, task: Task | None = None, log: Callable[[str], None] = print,
) -> Report:  # fmt: skip
    """Train the policy, save it to `out`, and ask the questions held out.

    model, encoder, task: instead of those that the recipe names, networks with their tokenizers.
    Raises   ModelError, TextError where they cannot be had; ValueError for choices that begin with the same token.
    """
    folder = Folder(out, recipe, log)
    network, tokenizer = load_model(recipe.model) if model is None else model
    reads, own = load_model(recipe.encoder) if encoder is None else encoder
    task = topics(recipe) if task is None else task
    judge = Judge(network.to(torch.bfloat16) if recipe.bfloat16 else network, tokenizer, task.choices)
    pruner = ExemplarPruner(reads, own, recipe.encoder, inner=recipe.inner)
    bench = _Bench(recipe, task, judge, pruner)
    bias = recipe.bias if recipe.bias is not None else bench.level()
    pruner = ExemplarPruner(reads, own, recipe.encoder, inner=recipe.inner, bias=(bias, bias))
    bench.pruner = pruner
    before = bench.asked(bench.pruned(task.held))
    optimiser = torch.optim.AdamW(
        decayed((*pruner.example.parameters(), *pruner.token.parameters()), 0.01), lr=recipe.lr
    )

    def loss(which: Tensor, at: At) -> Iterator[dict[str, Any]]:
        for i in which.tolist():
            yield bench.step(i)

    heads = nn.ModuleList([pruner.example, pruner.token]).train()
    rows = Loop(recipe.steps, recipe.warmup, every=5).run(
        heads, [optimiser], shuffled(len(task.questions), recipe.batch), loss, folder
    )
    pruner.eval().save_pretrained(folder.path)
    after, kept = bench.pruned(task.held), bench.kept
    scores = bench.scores({"influx": bench.asked(after), "untrained": before, **bench.rivals()})
    tenth = max(len(rows) // 10, 1)
    report = Report(
        recipe.model, recipe.encoder, sum(p.numel() for p in heads.parameters()), rows[-1]["seconds"],
        (statistics.fmean(r["reward"] for r in rows[:tenth]), statistics.fmean(r["reward"] for r in rows[-tenth:])),
        kept, scores,
    )  # fmt: skip
    folder.finish(report)
    for name, score in scores.items():
        log(f"{name}: {score.accuracy:.3f} ({score.low:.3f} to {score.high:.3f}), {score.nats:.3f} nats, "
            f"{score.tokens:.0f} tokens")  # fmt: skip
    return report


def topics(recipe: Influencing) -> Task:
    """Which topic has a news wire? Reuters R8, its classes with enough texts, in equal parts."""
    rng = random.Random(recipe.seed)
    found: dict[str, list[Example]] = {}
    for split, count in (("train", recipe.pool + recipe.questions), ("test", recipe.test)):
        data = texts.load("reuters-r8", split=split)  # type: ignore[arg-type]
        each = -(-count // len(TOPICS))
        rows: list[Example] = []
        for name, word in TOPICS.items():
            mine = [t for t, y in zip(data.texts, data.labels.tolist(), strict=True) if data.classes[y] == name]
            if len(mine) < each:
                raise ValueError(f"{len(mine)} wires of {name} in {split}, and {each} are asked for: ask for fewer")
            rows += [Example(" ".join(t.split()[: recipe.words]), word) for t in rng.sample(mine, each)]
        rng.shuffle(rows)
        found[split] = rows[:count]
    pool, rest = found["train"][: recipe.pool], found["train"][recipe.pool :]
    return Task(tuple(pool), tuple(rest), tuple(found["test"]), tuple(TOPICS.values()))


@dataclass(frozen=True, eq=False)
class Asked:
    """What came of prompts: nats of the right answers, which were given, and tokens of the examples. All (B,)."""

    nats: Tensor
    right: Tensor
    tokens: Tensor


class Judge:
    """A language model that answers behind a prompt.

    choices   see `Task`; they are told apart by their first token. side: prompts that are read side by side
    """

    def __init__(self, model: nn.Module, tokenizer: Any, choices: Sequence[str] = (), *, side: int = 16) -> None:
        self.model, self.tokenizer, self.side = model.eval(), tokenizer, side
        self.first = [self._answer(choice)[0] for choice in choices]
        if len(set(self.first)) < len(choices):
            raise ValueError(f"choices={tuple(choices)}: some begin with the same token; choose other words for them")
        self.choices = tuple(choices)

    def _answer(self, answer: str) -> list[int]:
        return self.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B,) nats of each answer, mean over its tokens, and (B,) bool, whether the model gives it."""
        rows = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        wanted = [self._answer(answer) for answer in answers]
        nats, right = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]) + len(wanted[i]))
        for start in range(0, len(order), self.side):
            some = order[start : start + self.side]
            for i, (n, yes) in zip(some, self._read([(rows[i], wanted[i]) for i in some]), strict=True):
                nats[i], right[i] = n, yes
        return nats, right

    def _read(self, batch: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        device = next(self.model.parameters()).device
        width = max(len(p) + len(a) for p, a in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for k, (p, a) in enumerate(batch):
            ids[k, width - len(p) - len(a) :] = torch.tensor([*p, *a])
            mask[k, width - len(p) - len(a) :] = 1
        last = max(len(a) for _, a in batch) + 1
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.model(
            ids.to(device), attention_mask=mask.to(device), position_ids=place.to(device), logits_to_keep=last,
            use_cache=False,
        ).logits.float().cpu()  # fmt: skip
        found = []
        for (_, a), mine in zip(batch, logits, strict=True):
            mine, target = mine[-len(a) - 1 : -1], torch.tensor(a)
            loss = float(F.cross_entropy(mine, target))
            if self.choices:
                given = self.first[int(mine[0, self.first].argmax())] == a[0]
            else:
                given = bool((mine.argmax(-1) == target).all())
            found.append((loss, given))
        return found


class _Bench:
    """Prompts of a task, made in several ways, and what the judge says of them."""

    def __init__(self, recipe: Influencing, task: Task, judge: Judge, pruner: ExemplarPruner) -> None:
        self.recipe, self.task, self.judge, self.pruner = recipe, task, judge, pruner
        self.counter = judge.tokenizer
        self.shown = [task.example(one) for one in task.pool]
        self.sizes = [counted(text, self.counter) for text in self.shown]
        # What the heads see of an example, once: it is read alone. The means find the nearest ones.
        self.features = pruner.features([self._ids(text) for text in self.shown])
        means = F.normalize(torch.stack([f.mean(0) for f in pruner.features(self._texts(task.pool))]), dim=-1)
        self.near: dict[str, list[int]] = {}  # of each question, the nearest last: it stands next to it
        for asked in (task.questions, task.held):
            questions = F.normalize(torch.stack([f.mean(0) for f in pruner.features(self._texts(asked))]), dim=-1)
            ranked = (questions @ means.T).argsort(dim=-1, descending=True, stable=True)[:, : recipe.shots]
            self.near |= {one.text: row for one, row in zip(asked, ranked.flip(-1).tolist(), strict=True)}
        self.kept = 0.0

    def _ids(self, text: str) -> list[int]:
        return self.pruner.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _texts(self, some: Sequence[Example]) -> list[list[int]]:
        return [self._ids(one.text) for one in some]

    def level(self) -> float:
        """The bias of both policies at which T tokens stay, if all examples are alike."""
        mean = statistics.fmean(self.sizes) * min(self.recipe.shots, len(self.shown))
        stays = min(0.95, (self.recipe.tokens / mean) ** 0.5)
        return float(0.5 * np.log(stays / (1 - stays)))

    # -- learning ------------------------------------------------------------------------------------------------------
    def step(self, index: int) -> dict[str, Any]:
        """The policy gradient's loss of one question."""
        recipe, asked = self.recipe, self.task.questions[index]
        these = self.near[asked.text]
        source = Source.of([self.shown[i] for i in these], self.pruner.tokenizer)
        example, tokens = self.pruner([self.features[i] for i in these])
        drawn = draw(example, tokens, self._framed(source, [len(t) for t in tokens]), recipe.group)
        short = [composed(source, row.nonzero()[:, 0].tolist()) for row in drawn.tokens]
        answers = self.asked([(text, asked) for text in short])
        rewards = reward(answers.nats, answers.right, answers.tokens, recipe.tokens, recipe.shaping)
        loss = reinforce(drawn.nll, rewards, recipe.group) / recipe.batch
        return {
            "loss": loss, "reward": rewards.mean(), "right": answers.right.float().mean(), "nats": answers.nats.mean(),
            "tokens": answers.tokens.float().mean(), "examples": drawn.examples.float().sum(-1).mean(),
        }  # fmt: skip

    @staticmethod
    def _framed(source: Source, sizes: Sequence[int]) -> list[Tensor]:
        """Per example, (n,) bool: the first three tokens and the last line, as the method's default has it."""
        if len(source) != sum(sizes):
            raise ValueError(f"the encoder cuts examples into {sum(sizes)} tokens alone and {len(source)} in a row")
        found, at = [], 0
        for size in sizes:
            line = torch.tensor(source.sentences[at : at + size])
            found.append((torch.arange(size) < 3) | (line == line[-1]))
            at += size
        return found

    # -- prompts -------------------------------------------------------------------------------------------------------
    def asked(self, prompts: Sequence[tuple[str, Example]]) -> Asked:
        """What the judge says behind these examples, each before its question."""
        written = [f"{text}\n\n{self.task.question(one)}" if text else self.task.question(one) for text, one in prompts]
        nats, right = self.judge(written, [one.answer for _, one in prompts])
        return Asked(nats, right, torch.tensor([counted(text, self.counter) for text, _ in prompts]))

    def pruned(self, questions: Sequence[Example], method: str = "influx") -> list[tuple[str, Example]]:
        """The nearest examples, cut to T tokens by a method on texts."""
        cut = Compressor(method, self.pruner, self.pruner.tokenizer, counter=self.counter, gate=False)
        found, left = [], []
        for one in questions:
            examples = tuple(self.shown[i] for i in self.near[one.text])
            short = cut(examples, tokens=self.recipe.tokens)
            found.append((short.text, one))
            left.append(len({short.source.parts[i] for i in short.plan.anchor[0].tolist()}))
        self.kept = statistics.fmean(left)
        return found

    def rivals(self) -> dict[str, Asked]:
        """What costs nothing to learn: whole examples, or all of them, or their tokens."""
        rng, held, pool = random.Random(self.recipe.seed), self.task.held, range(len(self.shown))
        ways: dict[str, list[tuple[str, Example]]] = {
            "no examples": [("", one) for one in held],
            "whole, random": [(self._whole(rng.sample(pool, len(pool))), one) for one in held],
            "whole, nearest": [(self._whole(self.near[one.text][::-1]), one) for one in held],
            "all, cut alike": [(self._alike(self.near[one.text]), one) for one in held],
            "all, random tokens": self.pruned(held, f"random:site=text,seed={self.recipe.seed}"),
            "all, whole": [("\n\n".join(self.shown[i] for i in self.near[one.text]), one) for one in held],
        }
        return {name: self.asked(prompts) for name, prompts in ways.items()}

    def _whole(self, order: Sequence[int]) -> str:
        """Examples in this order as long as they fit into T tokens, the first one last: next to the question."""
        chosen: list[int] = []
        for i in order:
            text = "\n\n".join(self.shown[j] for j in [*chosen, i])
            if counted(text, self.counter) > self.recipe.tokens:
                break
            chosen.append(i)
        return "\n\n".join(self.shown[i] for i in reversed(chosen))

    def _alike(self, order: Sequence[int]) -> str:
        """All examples, their texts cut behind as many words as fit; fewer examples where one word of each does not."""

        def cut(words: int) -> str:
            some = [self.task.pool[i] for i in order]
            return "\n\n".join(self.task.example(replace(e, text=" ".join(e.text.split()[:words]))) for e in some)

        while len(order) > 1 and counted(cut(1), self.counter) > self.recipe.tokens:
            order = order[1:]
        longest = max(len(self.task.pool[i].text.split()) for i in order)
        fit = (n for n in range(longest, 0, -1) if counted(cut(n), self.counter) <= self.recipe.tokens)
        return cut(next(fit, 1))

    def scores(self, found: dict[str, Asked]) -> dict[str, Score]:
        base = found["whole, random"].right.numpy()
        rows = {}
        for name, one in found.items():
            hits = one.right.numpy()
            acc, gap = share(hits), paired_difference(hits, base)
            rows[name] = Score(
                acc.value, acc.low, acc.high, float(one.nats.mean()), float(one.tokens.float().mean()),
                (gap.value, gap.low, gap.high),
            )  # fmt: skip
        return rows
