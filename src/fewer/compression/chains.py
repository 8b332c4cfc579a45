"""Chains of thought that skip tokens: TokenSkip's training data and the control that asks for a ratio.

    skipping = TokenSkip(Compressor("llmlingua2", "my-compressor"), mark=tokenizer.eos_token)
    rows = [skipping.example(q, chain, answer, i) for i, (q, chain, answer) in enumerate(own_and_right)]
    # fine-tune on "prompt" and "completion", then ask for half the tokens:
    asked = tokenizer(skipping.prompt(question, 0.5), return_tensors="pt")
    model.generate(**asked, max_new_tokens=skipping.cap(512, 0.5))

Source: TokenSkip, arXiv:2502.12067.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from .compressor import CompressionError, Compressor

__all__ = ["TokenSkip"]

LONGEST = 500  # tokens of a chain that is learned from


@dataclass(frozen=True, eq=False)
class TokenSkip:
    """compressor: what shortens a chain; its own share is not used. mark: stands around the ratio, as end-of-text does.

    ratios  shares of a chain that are learned, drawn evenly; 1 leaves it whole and asks for nothing, so that the plain
            prompt goes on as it was. seed: of the draw, by example. longest: tokens of a chain, else it is left out
    written how a question is put, such as a chat template; default the question itself
    """

    compressor: Compressor
    mark: str
    ratios: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    seed: int = 0
    longest: int = LONGEST
    written: Callable[[str], str] = str

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 < ratio <= 1 for ratio in self.ratios):
            raise CompressionError(f"ratios={self.ratios}: each is a share that stays, in (0, 1]")
        if 1.0 not in self.ratios:
            raise CompressionError(f"ratios={self.ratios}: 1.0 must be among them, or plain prompts get worse")
        if not self.mark:
            raise CompressionError(
                "mark='': the ratio needs something around it that the tokenizer knows, such as its EOS"
            )

    def prompt(self, question: str, ratio: float = 1.0) -> str:
        """The question, and behind it the ratio that is asked for; nothing for 1."""
        if not 0 < ratio <= 1:
            raise CompressionError(f"ratio={ratio} is outside (0, 1]; it is the share of the chain that is written")
        return self.written(question if ratio == 1 else f"{question}{self.mark}{ratio:g}{self.mark}")

    def ratio(self, index: int) -> float:
        """The ratio that an example is learned at: the same on every machine."""
        return Random(f"{self.seed} {index}").choice(self.ratios)

    def example(self, question: str, chain: str, answer: str, index: int) -> dict[str, Any] | None:
        """A row to fine-tune on; None for a chain that is too long.

        chain   the model's own, which led to the right answer. answer: the sentence that says it, never shortened
        Returns `prompt`, `completion`; `ratio`, what was asked for; `achieved`, what came, and `tokens` of the whole
                chain, counted by the compressor's tokenizer.
        """
        ratio = self.ratio(index)
        short = self.compressor(chain, rate=ratio)
        if short.before > self.longest:
            return None
        return {
            "prompt": self.prompt(question, ratio), "completion": f"{short.text}{answer}",
            "ratio": ratio, "achieved": short.rate, "tokens": short.before,
        }  # fmt: skip

    @staticmethod
    def cap(tokens: int, ratio: float) -> int:
        """The most new tokens to generate where `tokens` were enough for whole chains."""
        return max(1, math.ceil(tokens * ratio))
