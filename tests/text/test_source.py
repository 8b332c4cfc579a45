"""Sources: tokens tile the text, and words, phrases, sentences and contexts are where a reader finds them."""

# ruff: noqa: RUF001
from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewer.compression import Source, SourceError
from fewer.core.written import BEFORE, BEHIND
from wording import KINDS, ODD, PROSE, tokenizer


def source(text: str, kind: str = "bpe") -> Source:
    return Source.of([text], tokenizer(kind))


def tiles(made: Source) -> None:
    at = 0
    for start, stop in made.spans:
        assert start == at <= stop
        at = stop
    assert at == len(made.text) or not made.ids
    assert len(made.ids) == len(made.spans) == len(made.parts) == len(made.cells) == len(made.words)
    for numbers in (made.cells, made.words, made.phrases, made.sentences):
        assert not numbers or numbers[0] == 0
        assert all(b - a in (0, 1) for a, b in pairwise(numbers))
    for numbers in (made.words, made.phrases, made.sentences):  # no character is in two
        owner = dict(zip(made.cells, numbers, strict=True))
        assert all(owner[cell] == number for cell, number in zip(made.cells, numbers, strict=True))


def pieces(made: Source, numbers: list[int]) -> list[str]:
    spans = zip(numbers, made.spans, strict=True)
    return ["".join(made.text[a:b] for _, (a, b) in run) for _, run in groupby(spans, key=lambda pair: pair[0])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*ODD, PROSE], ids=range(len(ODD) + 1))
def test_tokens_tile_the_text(kind: str, text: str) -> None:
    made = source(text, kind)
    tiles(made)
    assert list(made.ids) == tokenizer(kind)(text, add_special_tokens=False)["input_ids"]
    if made.ids:
        assert "".join(pieces(made, made.cells)) == text


@given(text=st.text(max_size=60), kind=st.sampled_from(KINDS))
def test_tokens_tile_any_text(text: str, kind: str) -> None:
    tiles(source(text, kind))


def test_bytes_of_one_character_are_a_cell() -> None:
    made = source("a🎉b")
    assert len(made.ids) > 4  # the tokenizer has no token for it
    assert pieces(made, made.cells) == ["a", "🎉", "b"]
    assert len({*made.words}) == 3
    assert pieces(made, made.words) == ["a", "🎉", "b"]


@pytest.mark.parametrize("kind", KINDS)
def test_words_keep_their_space_and_marks_stand_alone(kind: str) -> None:
    made = source('He didn\'t say "no": state-of-the-art, 1,200 m.', kind)
    assert pieces(made, made.words) == [
        "He", " didn't", " say", ' "', "no", '"', ":", " state-of-the-art", ",", " 1", ",", "200", " m", "."
    ]  # fmt: skip


def test_words_of_scripts_without_spaces_are_characters() -> None:
    made = source("日本語 is Japanese")
    assert pieces(made, made.words) == ["日", "本", "語", " is", " Japanese"]


@pytest.mark.parametrize("kind", KINDS)
def test_sentences(kind: str) -> None:
    made = source("It rained. Did it? “Yes!” she said.\nA line\n\nThe end", kind)
    assert [piece.strip() for piece in pieces(made, made.sentences)] == [
        "It rained.", "Did it?", "“Yes!”", "she said.", "A line", "The end"
    ]  # fmt: skip
    made = source("これは一つ。これは二つ！三つ")
    assert pieces(made, made.sentences) == ["これは一つ。", "これは二つ！", "三つ"]


def test_phrases_lean_on_what_follows() -> None:
    made = source("The men who had built it watched from the cliff, and could not sleep.")
    assert pieces(made, made.phrases) == [
        "The men", " who had built it watched", " from the cliff,", " and could not sleep."
    ]  # fmt: skip


def test_contexts_between_an_instruction_and_a_question() -> None:
    made = Source.of(["First one.", "", "Second one."], tokenizer("bpe"), instruction="Read.", question="What?")
    assert made.text == "Read.\n\nFirst one.\n\nSecond one.\n\nWhat?"
    tiles(made)
    by_part: dict[int, str] = {}
    for part, (a, b) in zip(made.parts, made.spans, strict=True):
        by_part[part] = by_part.get(part, "") + made.text[a:b]
    assert {part: text.strip() for part, text in by_part.items() if text.strip()} == {
        BEFORE: "Read.", 0: "First one.", 2: "Second one.", BEHIND: "What?"
    }  # fmt: skip
    assert made.parts == sorted(made.parts)


def test_marked_spans_touch_tokens_but_for_white_space() -> None:
    made = source("one two three")
    spans = [made.text.index(" two"), made.text.index(" two") + 4]
    found = [made.text[a:b] for (a, b), inside in zip(made.spans, made.within([(spans[0], spans[1])]), strict=True)
             if inside]  # fmt: skip
    assert "".join(found) == " two"
    assert not any(made.within([(3, 4)]))  # a space alone
    assert not any(made.within([]))
    assert all(made.within([(-5, 99)]))


class Slow:
    """A tokenizer that knows no offsets."""

    is_fast = False

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(SourceError, match="Slow does not say where in a text its tokens stand; take a fast tokenizer"):
        Source.of(["a"], Slow())


def test_nothing_is_nothing() -> None:
    made = Source.of([], tokenizer("bpe"))
    assert (made.text, len(made), made.words, made.phrases, made.sentences) == ("", 0, [], [], [])
