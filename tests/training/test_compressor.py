"""LLMLingua-2's encoder, learned from what words are worth to a language model that restores a text."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tinytext
from fewer.compression import Compressor
from fewer.models.zoo import load_model
from fewer.recipes import compressor
from fewer.recipes.compressor import Distilling, captured, correlation, passages, weigh, words_of


class Restorer(nn.Module):
    """A teacher of our own: it foretells small words always, others where the draft in front holds them."""

    def __init__(self, tokenizer: Any, small: set[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokenizer, self.small = tokenizer, small

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int) -> Any:
        row = input_ids[0].tolist()
        logits = torch.zeros(1, len(row), len(self.tokenizer))
        draft = {*row[: len(row) - logits_to_keep + 1]}
        for i, after in enumerate(row[1:]):
            logits[0, i, after] = 8.0 if after in self.small or after in draft else 0.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


@pytest.fixture(scope="module")
def worded() -> Any:
    """A tokenizer with a token for each word of two kinds, 30 of each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", *(f"small{i}" for i in range(30)), *(f"Great{i}" for i in range(30)), "The", "same", "text", "in",
             "full", ":"]  # fmt: skip
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[PAD]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")


def texts(count: int) -> list[str]:
    draw = random.Random(0)
    kinds = [[f"{kind}{i}" for i in range(30)] for kind in ("small", "Great")]
    return [" ".join(word for kind in kinds for word in draw.sample(kind, 12)) for _ in range(count)]


def test_a_word_is_worth_what_a_reader_loses_without_it(worded: Any) -> None:
    text = texts(1)[0]
    one = weigh(text, Restorer(worded, {*range(1, 31)}), worded, torch.Generator().manual_seed(0))
    great = torch.tensor([text[a:b].startswith("Great") for a, b in one.spans])
    loss = torch.log(torch.tensor(len(worded) - 1 + torch.e**8)) - 8
    assert one.worth[~great].abs().max() < 1e-5
    assert one.worth[great] == pytest.approx(float(torch.log(torch.tensor(float(len(worded)))) - loss), abs=1e-4)
    assert one.rank[great].min() > one.rank[~great].max()


def test_a_token_is_of_the_word_it_ends_in() -> None:
    offsets = [(0, 0), (0, 3), (3, 5), (5, 9), (9, 10), (10, 12), (0, 0)]  # "would go", a mark, and one space too many
    assert words_of(offsets, [(0, 5), (6, 10)]).tolist() == [-1, 0, 0, 1, 1, -1, -1]


def test_passages_begin_with_sentences_and_never_overlap() -> None:
    whole = " ".join(f"Sentence {i} has as many as eight words ." for i in range(60))
    found = passages(whole, 5, 20)
    assert [len(one.split()) for one in found] == [20] * 5
    numbers = [re.findall(r"Sentence (\d+)", one) for one in found]
    assert all(one.startswith("Sentence") for one in found)
    assert not {*numbers[0]} & {*numbers[1]}
    with pytest.raises(ValueError, match="has 20 passages of 20 words, asked for are 500"):
        passages(whole, 500, 20)


def test_shares_and_correlations() -> None:
    worth = torch.tensor([3.0, -1.0, 1.0, 0.0])
    assert captured(worth, worth) == 1
    assert captured(-worth, worth) == 0
    assert captured(torch.tensor([4.0, 3.0, 2.0, 1.0]), worth) == 0.75
    assert correlation(worth, 2 * worth) == pytest.approx(1)
    assert correlation(worth, -worth) == pytest.approx(-1)


def test_the_student_learns_which_words_stay(worded: Any, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    body = BertModel(
        BertConfig(
            vocab_size=len(worded), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
        )
    )
    frozen = body.encoder.layer[0].output.dense.weight.detach().clone()
    recipe = Distilling(steps=120, batch=8, lr=3e-3, layers=2, bfloat16=False)
    report = compressor.train(
        recipe, tmp_path, teacher=(Restorer(worded, {*range(1, 31)}), worded), student=(body, worded), texts=texts(60),
        log=lambda line: None,
    )  # fmt: skip
    assert report.kept > 0.9 > 0.7 > report.drawn
    assert report.best == pytest.approx(1, abs=1e-4)
    assert report.weighed == 60
    tagger, tokenizer = load_model(tmp_path)
    assert torch.equal(tagger.bert.encoder.layer[0].output.dense.weight, frozen)
    short = Compressor("llmlingua2", tagger, tokenizer)(texts(61)[-1], rate=0.5).text.split()
    assert sum(word.startswith("Great") for word in short) >= 10


def test_a_real_decoder_weighs_any_text(tmp_path: Path) -> None:
    model, tokenizer = load_model(tinytext.saved(tmp_path))
    one = weigh(tinytext.STORY, model, tokenizer, torch.Generator().manual_seed(1))
    assert len(one.worth) == len(tinytext.STORY.split())
    assert torch.isfinite(one.worth).all()
    assert one.worth.std() > 0


@pytest.mark.parametrize(("field", "value"), [("passages", 3), ("words", 2), ("steps", 0), ("layers", -1)])
def test_what_cannot_be_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"Distilling\({field}={value}\)"):
        Distilling(**{field: value})
