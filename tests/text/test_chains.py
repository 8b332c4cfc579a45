"""TokenSkip's data: balanced ratios, chains that lost words and nothing else, answers as they were."""

from __future__ import annotations

from collections import Counter

import pytest

from fewer.compression import CompressionError, Compressor
from fewer.compression.chains import TokenSkip
from fewer.models.zoo import load_model

CHAIN = "First we add 12 and 30, which makes 42. Then we take 2 away, and 40 is left. So the result must be 40.\n\n"
ANSWER = "The final answer is 40."


@pytest.fixture(scope="module")
def skipping() -> TokenSkip:
    model, tokenizer = load_model("bert-eras")
    return TokenSkip(Compressor("random", model, tokenizer, protect=("digits",)), mark="[SEP]")


def subsequence(short: str, whole: str) -> bool:
    rest = iter(whole)
    return all(mark in rest for mark in short)


def test_ratios_are_balanced_and_the_same_everywhere(skipping: TokenSkip) -> None:
    counts = Counter(skipping.ratio(i) for i in range(6000))
    assert set(counts) == set(skipping.ratios)
    assert all(850 < count < 1150 for count in counts.values()), "1,000 each, five standard deviations about"
    assert [skipping.ratio(i) for i in range(20)] == [skipping.ratio(i) for i in range(20)]


def test_examples(skipping: TokenSkip) -> None:
    rows = [skipping.example("What is 12 + 30 - 2?", CHAIN, ANSWER, i) for i in range(40)]
    assert {row["ratio"] for row in rows} == set(skipping.ratios)
    for row in rows:
        assert row["completion"].endswith(ANSWER)
        chain = row["completion"].removesuffix(ANSWER)
        assert subsequence(chain, CHAIN)
        assert all(number in chain for number in ("12", "30", "42", "40")), "digits were to stay"
        assert abs(row["achieved"] - row["ratio"]) * row["tokens"] <= 1.5
        if row["ratio"] == 1:
            assert (chain, row["prompt"]) == (CHAIN, "What is 12 + 30 - 2?")
        else:
            assert row["prompt"] == f"What is 12 + 30 - 2?[SEP]{row['ratio']:g}[SEP]"


def test_long_chains_are_left_out_and_caps_follow_the_ratio(skipping: TokenSkip) -> None:
    assert skipping.example("q", CHAIN * 40, ANSWER, 0) is None
    assert [skipping.cap(512, r) for r in (1.0, 0.5, 0.001)] == [512, 256, 1]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ratios": (0.5,)}, "1.0 must be among them"), ({"ratios": (1.0, 0.0)}, "a share that stays"),
        ({"mark": ""}, "something around it"),
    ],
)  # fmt: skip
def test_bad_settings(skipping: TokenSkip, options: dict, why: str) -> None:
    with pytest.raises(CompressionError, match=why):
        TokenSkip(**{"compressor": skipping.compressor, "mark": "|"} | options)
    with pytest.raises(CompressionError, match="outside"):
        skipping.prompt("q", 1.5)
