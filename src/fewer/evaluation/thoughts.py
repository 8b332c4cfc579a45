"""What a reasoner writes: its chains, how long they are, and whether they end in the right answer.

wrote = answers(model, tokenizer, [p.prompt for p in problems])
scored(wrote, problems).accuracy
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fewer.datasets.reasoning import THOUGHT, Problem, right, said

__all__ = ["Score", "Wrote", "answers", "scored"]

LONGEST = 256
"""Tokens of a chain with its answer: more than any that the packaged model was trained on."""


@dataclass(frozen=True)
class Wrote:
    """text: all that was written, to the end token, which is left out. thought: tokens before the end of the chain."""

    text: str
    thought: int


@dataclass(frozen=True)
class Score:
    """rights: (N,) whether each is right. lengths: (N,) tokens of each chain."""

    rights: tuple[bool, ...]
    lengths: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        return sum(self.rights) / len(self.rights)

    @property
    def tokens(self) -> float:
        """Mean over the chains."""
        return sum(self.lengths) / len(self.lengths)

    @property
    def per_right(self) -> float:
        """Tokens of all chains for each right answer; infinite where none is."""
        return sum(self.lengths) / sum(self.rights) if any(self.rights) else float("inf")


@torch.inference_mode()
def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, most: int | None = None, longest: int = LONGEST,
    sample: bool = False, batch: int = 100,
) -> list[Wrote]:  # fmt: skip
    """Let a model answer, greedily, or by sampling at temperature 1 from torch's global generator.

    most     tokens of a chain; one that has not ended by then is ended, and the answer asked for. None: it ends itself
    longest  tokens of chain and answer. batch: prompts side by side, of like length
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Wrote] = {}
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        given = [prompts[i] for i in some]
        rows = _written(model, tokenizer, given, longest if most is None else most, sample)
        if most is not None:
            rows = _ended(model, tokenizer, given, rows, sample)
        end = tokenizer.convert_tokens_to_ids(THOUGHT)
        for i, row in zip(some, rows, strict=True):
            found[i] = Wrote(tokenizer.decode(row), row.index(end) if end in row else len(row))
    return [found[i] for i in range(len(prompts))]


def scored(wrote: Sequence[Wrote], problems: Sequence[Problem]) -> Score:
    """Whether each is right, and how long its chain."""
    rights = tuple(right(each.text, p.answer) for each, p in zip(wrote, problems, strict=True))
    return Score(rights, tuple(each.thought for each in wrote))


def _written(model: Any, tokenizer: Any, prompts: Sequence[str], most: int, sample: bool) -> list[list[int]]:
    """Token ids behind each prompt, up to the end token, which is left out."""
    given = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    made = model.generate(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=most, do_sample=sample,
        top_k=0 if sample else None, temperature=1.0 if sample else None, top_p=1.0 if sample else None,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    rows = made[:, given["input_ids"].shape[1] :].tolist()
    return [row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row for row in rows]


def _ended(model: Any, tokenizer: Any, prompts: Sequence[str], rows: list[list[int]], sample: bool) -> list[list[int]]:
    """The rows, each with an answer: those whose chain did not end are told to end it."""
    end = tokenizer.convert_tokens_to_ids(THOUGHT)
    heads = []
    for row in rows:
        chain = row[: row.index(end)] if end in row else row
        heads.append([*chain, *tokenizer(said("").rstrip(". "))["input_ids"]])
    whole = [f"{prompt}{tokenizer.decode(head)}" for prompt, head in zip(prompts, heads, strict=True)]
    tails = _written(model, tokenizer, whole, 10, sample)
    return [[*head, *tail] for head, tail in zip(heads, tails, strict=True)]
