"""A tiny random Llama, a tokenizer of bytes and made-up texts: enough for every task to be carried out."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from torch import nn

from fewer.datasets.texts import Paragraph
from fewer.evaluation.language.tasks import Material

SYLLABLES = ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti")


@cache
def tokenizer() -> Any:
    """Every byte is a token; 256 to 258 are padding, beginning and end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def llama(seed: int = 7) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.2, pad_token_id=256, bos_token_id=257,
        eos_token_id=258,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def words(count: int, rng: random.Random) -> str:
    return " ".join("".join(rng.choices(SYLLABLES, k=rng.randrange(1, 4))) for _ in range(count))


@cache
def material() -> Material:
    rng = random.Random(0)
    book = "\n\n".join(" ".join(f"{words(6, rng).capitalize()}." for _ in range(5)) for _ in range(150))
    paragraphs = tuple(
        Paragraph(
            f"{SYLLABLES[i % 8] * 20} Number {i}.",
            f"{asked} {i}?",
            (words(1, rng) + str(i + 50 * k), "something else"),
        )
        for i in range(40)
        for k, asked in enumerate(("Which is", "And"))
    )
    return Material("made up", book, paragraphs)
