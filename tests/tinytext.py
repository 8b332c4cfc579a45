"""A tiny language model and a tiny tagger, random weights, with a fast tokenizer, in folders as save_pretrained writes
them: shortening texts is tried on these without a download."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

STORY = """The ship left the harbour of Lisbon on the 14th of May with 32 sailors, and nobody on board knew where it \
would go. The captain had told them that they would not be back before the winter. On the third day a storm came up, \
and the mast broke. "We shall repair it," the captain said, "and we shall not turn back." The carpenter needed 6 days.

They had water for 40 days and bread for 55. When the mast stood again, the wind was gone; the ship lay still for two \
weeks, and every morning the cook counted the barrels. There were never as many as he had hoped.
"""


def tokenizer(size: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level pieces, learned from the story: any text can be written with them, and each knows its place."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    made.train_from_iterator([STORY], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>", model_max_length=1024)


def saved(folder: Path, kind: str = "lm", seed: int = 0) -> Path:
    """A folder with a model and its tokenizer. kind: "lm", a Llama; "tagger", a BERT that says which words stay."""
    own = tokenizer()
    torch.manual_seed(seed)
    model: PreTrainedModel
    if kind == "lm":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(own), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.4,
            )
        )  # fmt: skip
    else:
        model = BertForTokenClassification(
            BertConfig(
                vocab_size=len(own), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_labels=2, initializer_range=0.4,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder
