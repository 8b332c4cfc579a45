"""TokenSkip on a small reasoner: it learns from its own chains, shortened, to write as much as it is asked for.

    report = train(Skipping(), "out")                       # needs fewer[reasoning]
    skipping = asking(tokenizer)
    model.generate(**tokenizer(skipping.prompt(question, 0.5), return_tensors="pt"))

What is left out is chosen by LLMLingua-2 with a small encoder of its own, trained here on which words of the chains are
steps and which are remarks; `by="random"` leaves out words by chance instead, and is what it has to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification

from fewer.compression import Compressor
from fewer.compression.chains import TokenSkip
from fewer.core.settings import Settings
from fewer.datasets import reasoning
from fewer.datasets.reasoning import Problem, asked, said
from fewer.evaluation.thoughts import LONGEST, Score, answers, scored
from fewer.models.zoo import load_model
from fewer.recipes.loop import At, Folder, Loop, buckets
from fewer.recipes.reasoner import Row, encoded, learnt

__all__ = ["RATIOS", "Report", "Skipping", "asking", "train", "words"]

RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
WORDS = "words"


@dataclass(frozen=True)
class Skipping(Settings):
    """Everything a run depends on; the defaults are for the packaged reasoner.

    model     a reasoner, as in `load_model`
    by        what chooses the words: the trained encoder, or chance
    problems  whose chains it writes and learns from, where right. test: packaged problems answered at every ratio
    ratios    shares of a chain that are learned
    steps     updates, of about `tokens` tokens. lr: AdamW's peak rate
    word_steps, word_lr   of the encoder that chooses, of width `word_width` and two layers
    bfloat16  multiply in bfloat16, and store the weights so
    """

    model: str = "reasoner"
    by: Literal["words", "random"] = "words"
    problems: int = 1000
    test: int = 300
    ratios: tuple[float, ...] = RATIOS
    steps: int = 100
    tokens: int = 3000
    lr: float = 1e-3
    warmup: float = 0.1
    word_steps: int = 150
    word_lr: float = 3e-3
    word_width: int = 64
    bfloat16: bool = True
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.by not in ("words", "random"):
            raise ValueError(f"Skipping(by={self.by!r}): choose words or random")
        for name in ("problems", "test", "steps", "tokens", "word_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Skipping({name}={getattr(self, name)}): must be at least 1")


@dataclass(frozen=True)
class Report:
    """What a run came to. learned: how many chains. achieved: for each ratio, the share that was left of them.

    accuracy, tokens: for each ratio that is asked for, of the test problems, and of their chains on average.
    scores: the same, problem by problem; not in report.json
    """

    learned: int
    achieved: dict[str, float]
    accuracy: dict[str, float]
    tokens: dict[str, float]
    seconds: float
    scores: dict[str, Score] = field(default_factory=dict, repr=False)


def asking(tokenizer: Any, compressor: Any = None, ratios: tuple[float, ...] = RATIOS, seed: int = 0) -> TokenSkip:
    """TokenSkip as the reasoner is asked. compressor: only where data are made."""
    return TokenSkip(compressor, tokenizer.eos_token, ratios, seed, written=asked)


def train(
    recipe: Skipping, out: str | Path, *, model: tuple[nn.Module, Any] | None = None,
    data: Sequence[Problem] | None = None, log: Callable[[str], None] = print,
) -> Report:  # fmt: skip
    """Shorten a reasoner's chains, fine-tune it on them, and save it where `load_model(out)` reads it.

    model: instead of loading the one named. data: instead of drawing the problems. The encoder goes to out/words.
    """
    folder = Folder(out, recipe, log)
    net, tokenizer = load_model(recipe.model) if model is None else model
    drawn = list(reasoning.problems(recipe.problems, seed=1 + recipe.seed)) if data is None else data
    if recipe.by == "words":
        chooser: nn.Module = words(recipe, drawn, tokenizer, folder)
        chooser.save_pretrained(folder.path / WORDS)  # type: ignore[operator]
        tokenizer.save_pretrained(folder.path / WORDS)
    else:
        chooser = _Chance(recipe.seed)
    skipping = asking(tokenizer, Compressor("llmlingua2", chooser, tokenizer), recipe.ratios, recipe.seed)
    wrote = answers(net.bfloat16() if recipe.bfloat16 else net, tokenizer, [p.prompt for p in drawn])
    kept = [(p, w.text) for p, w in zip(drawn, wrote, strict=True) if reasoning.right(w.text, p.answer)]
    log(f"{len(kept)} of {len(drawn)} own chains are right")
    made = [
        skipping.example(p.question, text.partition(reasoning.THOUGHT)[0], said(p.answer), i)
        for i, (p, text) in enumerate(kept)
    ]
    examples = [each for each in made if each is not None]
    rows = encoded(tokenizer, [(each["prompt"], _spaced(each["completion"])) for each in examples])
    for each in examples[:6]:
        log(f"{each['ratio']:g}: {each['completion']}")
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=0.0)
    loop = Loop(recipe.steps, recipe.warmup, bfloat16=recipe.bfloat16)
    seconds = learnt(net.float(), rows, loop, [optimizer], folder, tokens=recipe.tokens)
    if recipe.bfloat16:
        net.bfloat16()
    net.save_pretrained(folder.path)  # type: ignore[operator]
    tokenizer.save_pretrained(folder.path)
    test = reasoning.load()[: recipe.test]
    scores, achieved = dict[str, Score](), {}
    for ratio in recipe.ratios:
        prompts = [skipping.prompt(p.question, ratio) for p in test]
        score = scored(answers(net, tokenizer, prompts, longest=TokenSkip.cap(LONGEST, ratio)), test)
        scores[f"{ratio:g}"] = score
        shares = [each["achieved"] for each in examples if each["ratio"] == ratio]
        achieved[f"{ratio:g}"] = sum(shares) / max(len(shares), 1)
        log(f"asked for {ratio:g}: {score.accuracy:.1%} right, {score.tokens:.1f} tokens")
    accuracy = {ratio: score.accuracy for ratio, score in scores.items()}
    tokens = {ratio: score.tokens for ratio, score in scores.items()}
    report = Report(len(examples), achieved, accuracy, tokens, seconds, scores)
    folder.finish(replace(report, scores={}))
    return report


def _spaced(completion: str) -> str:
    """With the space before its first word that every chain begins with, whatever was cut off in front."""
    text = completion.lstrip()
    return f" {text}" if text[:1].isalnum() or text[:1] == "-" else text


def words(recipe: Skipping, problems: Sequence[Problem], tokenizer: Any, folder: Folder) -> BertForTokenClassification:
    """An encoder that says of each token of a chain whether it stays: of a step, or of a remark."""
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=recipe.word_width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=4 * recipe.word_width, max_position_embeddings=512, type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label={0: "leaves", 1: "stays"}, label2id={"leaves": 0, "stays": 1},
    )  # fmt: skip
    model = BertForTokenClassification(config)
    rows = [labelled(tokenizer, p) for p in problems]
    size = max(1, round(recipe.tokens * len(rows) / sum(len(ids) for ids, _ in rows)))

    def loss(chosen: list[int], at: At) -> dict[str, Tensor]:
        ids, labels = (nn.utils.rnn.pad_sequence([torch.tensor(rows[i][k]) for i in chosen], True, v)
                       for k, v in ((0, 0), (1, -100)))  # fmt: skip
        with at.autocast():
            logits = model(input_ids=ids, attention_mask=(labels >= 0).long()).logits
        return {"loss": F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())}

    def batches() -> Any:
        while True:
            yield from buckets([len(ids) for ids, _ in rows], size, 16)

    model.train()
    loop = Loop(recipe.word_steps, recipe.warmup, bfloat16=recipe.bfloat16)
    loop.run(model, [torch.optim.AdamW(model.parameters(), lr=recipe.word_lr)], batches(), loss, folder)
    return model.eval()


def labelled(tokenizer: Any, problem: Problem) -> Row | Any:
    """Token ids of a chain, and 1 for those of its steps, 0 for those of its remarks."""
    ids: list[int] = []
    labels: list[int] = []
    for part, needed in zip(problem.parts, problem.needed, strict=True):
        piece = tokenizer(f" {part}")["input_ids"]
        ids += piece
        labels += [int(needed)] * len(piece)
    return ids, labels


class _Chance(nn.Module):
    """Says of each token by chance whether it stays: the same for the same text."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = nn.Parameter(torch.tensor(float(seed)), requires_grad=False)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        wanted = []
        for row in input_ids.tolist():
            drawn = torch.Generator().manual_seed(hash((int(self.seed), *row)) % 2**63)
            wanted.append(torch.randn(len(row), generator=drawn))
        score = torch.stack(wanted)
        return SimpleNamespace(logits=torch.stack([-score, score], -1))
