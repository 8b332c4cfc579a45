"""Small real tokenizers of every common kind, trained on a few sentences, and tiny random readers for them."""

# ruff: noqa: RUF001
from __future__ import annotations

from functools import cache
from typing import Any

import torch

PROSE = """The harbour of Port Erin was built in 1863, and the sea broke it twice. On 14 October 1881 a storm took the
pier; the men who had built it watched from the cliff and could not do a thing. Nobody asked who should pay. "We will
build it again," said the mayor, "and we will build it of stone." He didn't. The council of 1884 sold the blocks to a
man from Douglas, who made houses of them: twelve houses, each with a small garden and a view of the broken wall.

A lighthouse was never needed there. Ships that came by night kept well away from the rocks, and those that did not
were found in the morning by children, who knew where to look. In the winter of 1890 three ships were lost within one
week. The school was closed, and the church bell rang until the rope gave way.
"""
ODD = [
    "", " ", "\n\n", "\t a\tb \n", "x", "naïve café", "Z̃ȃl̾go té̂xt", "日本語の文章です。これは二つ目。",
    "🎉Hello 👩\u200d👩\u200d👧 world🇩🇪!", "مرحبا بالعالم", "a  b   c", "  lead and trail  ", "line\r\nline\r\n",
    "def f(x):\n    return x  # ok\n", '{"a": [1, 2.5, null]}', "\u00a0non\u200bbreaking\ufeff", "ﬁne ﬂow Ⅷ ①",
    "don't stop—e.g. U.S.A.", "aaaaaaaaaaaaaaaaaaaaaaaaaaaa", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "ひらカタ漢字mixed",
]  # fmt: skip


@cache
def tokenizer(kind: str) -> Any:
    """kind: bpe (bytes, as GPT-2), llama (BPE with ▁ and bytes for what is unknown), unigram (T5), wordpiece (BERT)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    lines = [PROSE]
    if kind == "bpe":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=700, special_tokens=["<pad>", "<s>"], initial_alphabet=alphabet)
    elif kind == "llama":
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256))]
        )
        lines = [line for line in PROSE.split("\n") if line]
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>", "<s>"], unk_token="<unk>")
    else:
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    made.train_from_iterator(lines, trainer)
    if kind == "wordpiece":
        pair = [("[CLS]", 2), ("[SEP]", 3)]
        made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pair)
    if kind == "llama":
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made)


KINDS = ("bpe", "llama", "unigram", "wordpiece")


@cache
def reader(kind: str = "bpe", *, positions: int = 4096) -> Any:
    """A random causal model for a tokenizer: its surprisals are arbitrary, and all different."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer(kind)), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions,
                    initializer_range=0.25)
    ).eval()  # fmt: skip


@cache
def chooser() -> Any:
    """A random encoder that says which words stay."""
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(5)
    return BertForTokenClassification(
        BertConfig(vocab_size=len(tokenizer("wordpiece")), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                   intermediate_size=48, max_position_embeddings=128, initializer_range=0.3, num_labels=2)
    ).eval()  # fmt: skip


def prose(tokens: int, kind: str = "bpe") -> str:
    """A text of about so many tokens, no sentence of it twice in a row."""
    words = [f"{word}" if i % 7 else f"{word} {i * 37 % 1000}" for i, word in enumerate((PROSE * 40).split(" "))]
    text = " ".join(words)
    spans = tokenizer(kind)(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    assert len(spans) >= tokens
    return text[: spans[tokens - 1][1]]
