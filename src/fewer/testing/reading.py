"""A small random language model with a real tokenizer, for examples and tests of what is done to texts."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

STORY = """The harbour of Port Erin was built in 1863, and the sea broke it twice. On 14 October 1881 a storm took the
pier; the men who had built it watched from the cliff and could not do a thing. Nobody asked who should pay. "We will
build it again," said the mayor, "and we will build it of stone." He didn't. The council of 1884 sold the blocks to a
man from Douglas, who made houses of them: twelve houses, each with a small garden and a view of the broken wall.
"""


@cache
def tiny_reader() -> tuple[Any, Any]:
    """A causal model in eval mode and its tokenizer of bytes and their most frequent pairs. Always the same ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([STORY], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=4096, initializer_range=0.25,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = LlamaForCausalLM(config).eval()
    return model, PreTrainedTokenizerFast(tokenizer_object=made)
