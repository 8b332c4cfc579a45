"""A tiny language model with a tokenizer of its own, and messages to shorten."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fewer.compression import Compressor

WORDS = (
    "the harbour was quiet when the boats came in and nobody had asked why the lamps were not lit because the keeper, "
    "who never slept, had gone to the village for oil and bread; later the wind turned, the sea rose over the stones, "
    "and a small dog barked at every wave as if it could send the water back where it belonged."
)
SYSTEM = "You are an assistant who looks things up and answers in few words. " + WORDS
REPORT = " ".join(
    f"Day {day}: {WORDS.split(';')[day % 2]} {day * 7} crates of fish were counted." for day in range(1, 9)
)
OTHER = " ".join(f"In year {year} {WORDS[year % 60 :]}" for year in range(1990, 1996))


@cache
def tiny(seed: int = 0) -> tuple[Any, Any]:
    """(model, tokenizer): random weights, byte-level tokens merged on the texts above."""
    coder = Tokenizer(models.BPE())
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    coder.train_from_iterator([SYSTEM, REPORT, OTHER], trainer)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=coder)


def compressor(method: str = "llmlingua:keep=0.5", **more: Any) -> Compressor:
    model, tokenizer = tiny()
    return Compressor(method, model, tokenizer, **more)


def talk(turns: int = 3) -> list[dict[str, Any]]:
    """A chat of an agent: system, then per turn a question, a call, its result, an answer."""
    found: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    for turn in range(turns):
        call = {"id": f"call_{turn}", "type": "function", "function": {"name": "look", "arguments": f'{{"n": {turn}}}'}}
        found += [
            {"role": "user", "content": f"Question {turn}: {WORDS}", "name": "ada"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"call_{turn}", "content": f"{turn}. {(REPORT, OTHER)[turn % 2]}"},
            {"role": "assistant", "content": f"Answer {turn}: {WORDS}"},
        ]
    return found
