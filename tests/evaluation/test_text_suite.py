"""What a reader still knows of shortened texts: likelihoods, ways to shorten, tasks, and the table."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import tinytext
from fewer.datasets import texts
from fewer.datasets.texts import Paragraph
from fewer.evaluation import suites, text
from fewer.evaluation.stats import clustered
from fewer.evaluation.text import tasks
from fewer.evaluation.text.reader import Probe, Reader
from fewer.evaluation.text.shorten import WAYS, Shortener, Way, way
from fewer.evaluation.text.tasks import Item
from fewer.models.zoo import load_model

SENTENCES = [s.strip() + "." for s in tinytext.STORY.replace("\n", " ").split(". ") if s.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return tinytext.saved(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def reader(folder: Path) -> Reader:
    return Reader(*load_model(folder))


def alone(reader: Reader, text: str, question: str, answer: str) -> float:
    """Nats per token by one plain forward."""
    front, own = reader.ids(text) + reader.ids(question), reader.ids(answer)
    with torch.inference_mode():
        p = reader.model(input_ids=torch.tensor([front + own])).logits[0].float().log_softmax(-1)
    return -sum(float(p[len(front) + i - 1, token]) for i, token in enumerate(own)) / len(own)


def test_what_a_reader_says_is_what_plain_forwards_say(reader: Reader, monkeypatch: Any) -> None:
    """Questions and answers of all lengths side by side, in one group and in several."""
    probes = [
        Probe("\n\nWho came?", (" the captain", " a storm of the third day", " 6")),
        Probe("\nAnd", (" nobody", " the cook")),
        Probe("\n\nHow many barrels had the cook counted every morning?", (" 40", " bread for 55 days")),
    ]
    together = reader.judge(tinytext.STORY, probes)
    monkeypatch.setattr("fewer.evaluation.text.reader.ROWS", 3)
    for probe, one, again in zip(probes, together, reader.judge(tinytext.STORY, probes), strict=True):
        cost = [alone(reader, tinytext.STORY, probe.question, answer) for answer in probe.answers]
        assert one.nats == pytest.approx(cost[0], abs=1e-4)
        assert again.nats == pytest.approx(cost[0], abs=1e-4)
        assert one.right == again.right == (min(cost) == cost[0])
    turned = [Probe(probe.question, probe.answers[::-1]) for probe in probes[1:]]  # of two answers, one is the likelier
    assert [one.right for one in reader.judge(tinytext.STORY, turned)] == [not one.right for one in together[1:]]


def test_a_text_of_no_tokens_is_refused(reader: Reader) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        reader.judge("", [Probe("a", ("b",))])


WORDS = {name: WAYS[name] for name in ("random words", "first words")}


@pytest.mark.parametrize("name", WORDS)
def test_words_chosen_without_reading_are_as_many_as_asked_for(reader: Reader, name: str) -> None:
    item = Item((tinytext.STORY, tinytext.STORY[:300]), ())
    shortener = Shortener(reader.tokenizer)
    (short,) = shortener.texts(item, WORDS[name], 0.4)
    assert 0.37 < reader.count(short) / reader.count(item.whole) <= 0.4
    left = iter(item.whole.split())
    assert all(word in left for word in short.split())  # in their order
    assert (short.split() == item.whole.split()[: len(short.split())]) == (name == "first words")


def test_labels_stay_and_each_part_gets_shorter(reader: Reader, folder: Path) -> None:
    item = Item((SENTENCES[0] * 3, SENTENCES[1] * 3), (), ("\nTopic: sea", "\nTopic: storm"), ask=False)
    for one in (WAYS["random words"], Way("llmlingua", str(folder))):
        (short,) = Shortener(reader.tokenizer).texts(item, one, 0.4)
        first, second = short.split("\n\n")
        assert first.endswith("\nTopic: sea")
        assert second.endswith("\nTopic: storm")
        assert 0.3 < len(short) / len(item.whole) < 0.65


def test_a_way_that_is_told_the_question_shortens_for_each(reader: Reader, folder: Path) -> None:
    probes = tuple(Probe(tasks.asked(q), (" a", " b")) for q in ("How long was the ship still?", "Who said it?"))
    item = Item(tuple(SENTENCES), probes)
    short = Shortener(reader.tokenizer).texts(item, Way("longllmlingua", str(folder), aware=True), 0.4)
    assert len(short) == 2
    for one, probe in zip(short, probes, strict=True):
        assert probe.question.strip() not in one
        assert abs(reader.count(one) / reader.count(item.whole) - 0.4) < 0.06


def test_ways_are_methods_with_their_model() -> None:
    assert way("llmlingua2@runs/train") == Way("llmlingua2", "runs/train")
    assert way("longllmlingua:ramp=0").aware
    with pytest.raises(ValueError, match="no method named 'nothing'"):
        way("nothing")


# -- tasks -------------------------------------------------------------------------------------------------------------
def made_up(number: int) -> list[Paragraph]:
    """Paragraphs of eight sentences each, with a question on one of them."""
    found = []
    for i in range(number):
        draw = random.Random(i)
        name = "".join(draw.choice("abcdefghiklmnoprstu") for _ in range(8)).title()
        said = [f"The old mill number {i} stood near the river for {j + 3} long years and more ." for j in range(6)]
        said.insert(3, f"Its keeper was known as {name} in all the villages .")
        found.append(Paragraph(" ".join(said), f"Who kept mill {i} ?", (name,)))
    return found


def test_documents_hold_the_answer_once_and_wrong_answers_too(monkeypatch: Any) -> None:
    monkeypatch.setattr(texts, "paragraphs", lambda name: tuple(made_up(40)))
    items = tasks.documents(15, 0)
    assert [len(item.probes) for item in items] == [10, 10]  # whole items, until there are enough
    for item in items:
        assert len(item.parts) == tasks.DOCUMENTS
        for probe in item.probes:
            assert all(item.whole.count(answer.strip()) == 1 for answer in probe.answers)
            assert len({*probe.answers}) == 1 + tasks.WRONG
        assert all(len(part.split()) <= tasks.PASSAGE for part in item.parts)
    assert tasks.documents(15, 0) == items != tasks.documents(15, 1)


def test_a_conversation_tells_what_is_asked_for_and_nothing_else() -> None:
    (item,) = tasks.dialogue(10, 0)
    assert len(item.parts) == len(item.probes) == 10
    for probe in item.probes:
        right, *wrong = (answer.strip() for answer in probe.answers)
        assert right in item.whole
        assert not any(answer in item.whole for answer in wrong)


def test_a_summary_needs_who_writes_it() -> None:
    with pytest.raises(ValueError, match="written by the reader"):
        tasks.summary(3, 0)


# -- the suite ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def small(monkeypatch: Any, folder: Path) -> dict[str, Any]:
    monkeypatch.setattr(texts, "paragraphs", lambda name: tuple(made_up(40)))
    return {"model": str(folder), "limit": 20, "dtype": "float32", "threads": 1, "seed": 0}


def test_the_suite_measures_compares_and_goes_on_where_it_was(small: dict[str, Any], tmp_path: Path) -> None:
    given = {**small, "tasks": ["documents;dialogue"], "methods": ["first words"]}
    said: list[str] = []
    table, file = suites.run("text", given, tmp_path, said.append)
    assert len(said) == 2 * (2 + len(text.RATES))
    assert [(row[0], row[1], row[2]) for row in table.rows[:4]] == [
        ("documents", "whole text", "1"), ("documents", "no text", "0"), ("documents", "first words", "0.5"),
        ("documents", "first words", "0.3"),
    ]  # fmt: skip
    whole, first = table.record[0], table.record[2]
    assert whole["kept"] == 1
    assert 0.4 < first["kept"] <= 0.5
    assert len(whole["nats"]) == 20
    assert json.loads(file.read_text())["record"][0]["task"] == "documents"
    lines = (tmp_path / text.FILE).read_bytes()
    (tmp_path / text.FILE).write_bytes(lines[:-40])  # cut off while the last line was written
    again: list[str] = []
    same, _ = suites.run("text", given, tmp_path, again.append)
    assert len(again) == 1
    assert [row[:-1] for row in same.rows] == [row[:-1] for row in table.rows]
    with pytest.raises(ValueError, match="give another folder"):
        suites.run("text", {**given, "limit": 30}, tmp_path, said.append)


def test_what_the_suite_does_not_know_is_refused(small: dict[str, Any], tmp_path: Path) -> None:
    for given, words in (
        ({"tasks": ["poems"]}, "no task 'poems'.*documents"),
        ({"methods": ["nothing"]}, "no method named 'nothing'"),
        ({"limit": 1}, "limit=1"),
        ({"batch": 3}, "--batch does not apply"),
    ):
        with pytest.raises(ValueError, match=words):
            suites.run("text", {**small, **given}, tmp_path)


def test_differences_are_between_texts_not_questions() -> None:
    """Ten questions on each of four texts, all alike: no more certain than four questions."""
    whole = text.Cell(
        "t", "whole text", 1, 1, tuple(i for i in range(4) for _ in range(10)), (0,) * 40, (2.0,) * 40, 0, 0
    )
    hits = tuple(int(i != 0) for i in range(4) for _ in range(10))
    short = text.Cell("t", "short", 0.5, 0.5, whole.item, hits, (1.5,) * 40, 0, 0)
    more, likelier = text.compared(short, whole)
    assert (more.value, more.high) == (0.75, 1.0)
    assert more.low == 0.25
    assert (likelier.value, likelier.low, likelier.high) == (0.5, 0.5, 0.5)
    plain = clustered(hits, range(40))
    assert plain.low > 0.6
    with pytest.raises(ValueError, match="give each value its group"):
        clustered([1.0, 2.0], [0])
