"""Train a small reasoner from nothing: a Llama that writes a chain of thought, and then the answer.

report = train(Reasoning(), "out")                      # the packaged model "reasoner"; needs fewer[reasoning]
wrote = answers(*load_model("out"), [p.prompt for p in reasoning.load()])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fewer.core.settings import Settings
from fewer.datasets import reasoning
from fewer.datasets.reasoning import THINK, THOUGHT
from fewer.evaluation.thoughts import answers, scored
from fewer.models.zoo import load_model
from fewer.recipes.classify import FLOAT32_ATTENTION
from fewer.recipes.loop import At, Folder, Loop, buckets, muon_and_adamw

__all__ = ["Reasoning", "Report", "build", "encoded", "learnt", "train", "vocabulary"]

IGNORED = -100
END = "<eos>"
STEP = 16
Row = tuple[list[int], int]
"""Token ids, and how many of them are the prompt's, which teaches nothing."""


@dataclass(frozen=True)
class Reasoning(Settings):
    """Everything a run depends on; the defaults made the packaged model.

    start     a folder of an earlier run whose weights and tokenizer are gone on from; "" = new ones
    problems  drawn for training, in passes until the steps are done. test: how many of the packaged ones are answered
    steps     updates, of about `tokens` tokens each
    lr        Muon's peak rate, for the matrices in the blocks. lr_rest: AdamW's, for the rest. weight_decay: Muon's
    width, depth, heads, inner   of the Llama; the head is the embedding
    bfloat16  multiply in bfloat16 while training, and store the weights so
    seed      of the problems, the weights and the order. threads: None leaves them
    """

    start: str = ""
    problems: int = 30_000
    test: int = 1000
    steps: int = 600
    tokens: int = 6000
    lr: float = 5e-3
    lr_rest: float = 3e-3
    weight_decay: float = 0.02
    warmup: float = 0.05
    width: int = 192
    depth: int = 4
    heads: int = 3
    inner: int = 512
    bfloat16: bool = True
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("problems", "test", "steps", "tokens", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"Reasoning({name}={getattr(self, name)}): must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"Reasoning(width={self.width}, heads={self.heads}): the heads share the width evenly")


@dataclass(frozen=True)
class Report:
    """What a run came to. accuracy: share of the test problems answered rightly, greedily; tokens: of their chains, on
    average. seconds: training alone."""

    accuracy: float
    tokens: float
    problems: int
    parameters: int
    seconds: float


def vocabulary(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are words with the space before them, single digits and marks; its decoding gives the
    text back to the letter. <pad> is 0; it pads on the left."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    learnt = Tokenizer(models.WordLevel(unk_token="<unk>"))
    pieces = Regex(r" ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]|\s")
    learnt.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    learnt.decoder = decoders.Fuse()
    digits = [f"{space}{digit}" for digit in range(10) for space in ("", " ")]
    special = ["<pad>", "<unk>", END]
    trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    learnt.train_from_iterator([*texts, *digits], trainer)
    learnt.add_tokens([AddedToken(mark, normalized=False) for mark in (THINK, THOUGHT)])
    return PreTrainedTokenizerFast(
        tokenizer_object=learnt, unk_token="<unk>", pad_token="<pad>", eos_token=END, padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=512, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def build(recipe: Reasoning, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=recipe.width, num_hidden_layers=recipe.depth,
        num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads, intermediate_size=recipe.inner,
        max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    return model


def encoded(tokenizer: Any, pairs: Iterable[tuple[str, str]]) -> list[Row]:
    """Prompts and what shall be written behind them, as token ids with an end."""
    prompts, completions = zip(*pairs, strict=True)
    heads = tokenizer(list(prompts))["input_ids"]
    tails = tokenizer(list(completions))["input_ids"]
    return [([*head, *tail, tokenizer.eos_token_id], len(head)) for head, tail in zip(heads, tails, strict=True)]


def learnt(
    model: Any, rows: Sequence[Row], loop: Loop, optimizers: Sequence[torch.optim.Optimizer], folder: Folder,
    *, tokens: int,
) -> float:  # fmt: skip
    """Train on what stands behind the prompts, about `tokens` tokens a step. Returns the seconds it took."""
    size = max(1, round(tokens * len(rows) / sum(len(ids) for ids, _ in rows)))

    def batches() -> Iterator[list[int]]:
        while True:
            yield from buckets([len(ids) for ids, _ in rows], size, 16)

    def loss(chosen: list[int], at: At) -> dict[str, Any]:
        ids, labels = _batch([rows[i] for i in chosen])
        with at.autocast():
            logits = model(input_ids=ids).logits[:, :-1]
        return {"loss": F.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)}

    model.set_attn_implementation(FLOAT32_ATTENTION)
    model.train()
    lines = loop.run(model, optimizers, batches(), loss, folder)
    model.eval()
    model.set_attn_implementation("sdpa")
    return lines[-1]["seconds"]


def _batch(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """(B, T) ids and labels, padded on the right: causal attention keeps padding out of all that is taught. T is a
    multiple of `STEP`: kernels are prepared for each shape they meet, and kept."""
    longest = -(-max(len(ids) for ids, _ in rows) // STEP) * STEP
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for i, (row, prompt) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, prompt : len(row)] = ids[i, prompt : len(row)]
    return ids, labels


def train(
    recipe: Reasoning, out: str | Path, *, data: Sequence[reasoning.Problem] | None = None,
    log: Callable[[str], None] = print,
) -> Report:  # fmt: skip
    """Train a reasoner and save it where `load_model(out)` reads it. data: instead of drawing the problems."""
    folder = Folder(out, recipe, log)
    drawn = list(reasoning.problems(recipe.problems, seed=recipe.seed)) if data is None else data
    model: Any
    tokenizer: Any
    if recipe.start:
        model, tokenizer = load_model(recipe.start, dtype=torch.float32)
    else:
        tokenizer = vocabulary(f"{p.prompt}{p.solution}" for p in drawn)
        model = build(recipe, tokenizer)
    tokenizer.save_pretrained(folder.path)
    rows = encoded(tokenizer, [(p.prompt, p.solution) for p in drawn])
    optimizers = muon_and_adamw(recipe, model.model.layers, [(1.0, model.parameters())])
    loop = Loop(recipe.steps, recipe.warmup, bfloat16=recipe.bfloat16)
    seconds = learnt(model, rows, loop, optimizers, folder, tokens=recipe.tokens)
    if recipe.bfloat16:
        model.bfloat16()
    model.save_pretrained(folder.path)
    test = reasoning.load()[: recipe.test]
    wrote = answers(model, tokenizer, [p.prompt for p in test])
    score = scored(wrote, test)
    report = Report(
        score.accuracy, score.tokens, len(test),
        sum(p.numel() for p in model.parameters()), seconds,
    )  # fmt: skip
    folder.finish(report)
    log(f"{report.accuracy:.1%} of {report.problems} right, {report.tokens:.1f} tokens of chain")
    return report
