"""What is hidden in a context and asked about it, and how answers are judged, on cases one can read."""

from __future__ import annotations

import math
import re

import pytest
import torch

from evaluation.toys import llama, material, tokenizer
from fewer.evaluation.language.subject import LanguageSubject
from fewer.evaluation.language.tasks import (
    DEFAULT,
    NEEDLES,
    TASKS,
    Maker,
    Material,
    Probe,
    TaskError,
    distinct,
    judge,
    repetition,
)


def maker(tokens: int = 1200, **changes: object) -> Maker:
    return Maker(tokenizer(), material(), tokens, **{"horizon": 64, "limit": 2, **changes})  # type: ignore[arg-type]


def said(ids: tuple[int, ...]) -> str:
    return tokenizer().decode(list(ids))


@pytest.fixture(scope="module")
def contexts() -> list:
    return maker().contexts(DEFAULT)


def test_every_context_is_as_long_as_asked(contexts: list) -> None:
    assert [len(c.ids) for c in contexts[:2]] == [1200, 1200]
    assert all(len(c.ids) <= 1200 for c in contexts)


def test_needles_stand_where_they_say_and_each_answer_is_in_the_text_once(contexts: list) -> None:
    for context in contexts[:2]:
        text = said(context.ids)
        needles = [p for p in context.probes if p.task == "needles"]
        assert len(needles) == NEEDLES
        for probe in needles:
            question, answer = said(probe.question), said(probe.answers[0])
            sentence = question.strip() + answer + "."
            assert text.count(sentence) == 1
            assert re.fullmatch(r"\n\nThe secret number of \w+ is", question)
            assert text.index(sentence) / len(text) == pytest.approx(probe.depth, abs=0.12)
            assert text[text.index(sentence) - 2] in ".!?"  # between sentences


def test_the_book_goes_on_behind_its_context(contexts: list) -> None:
    context = contexts[0]
    (probe,) = (p for p in context.probes if p.task == "perplexity")
    tail = said(context.ids[-40:]) + said(probe.answers[0])
    assert tail in material().book
    assert len(probe.answers[0]) == 64


def test_a_list_is_asked_from_its_second_word_on(contexts: list) -> None:
    (probe,) = (p for p in contexts[0].probes if p.task == "copy")
    whole = (said(probe.question) + said(probe.answers[0])).strip()
    assert whole in said(contexts[0].ids)
    assert whole.count(",") == 15
    assert said(probe.question).count(",") == 1


def test_questions_are_asked_about_paragraphs_that_are_there(contexts: list) -> None:
    context = contexts[2]
    text = said(context.ids)
    assert len(context.probes) >= 4
    for probe in context.probes:
        number = re.search(r"\d+", said(probe.question))[0]  # type: ignore[index]
        assert f"Number {number}." in text
        right = said(probe.answers[0])
        assert len({said(a) for a in probe.answers}) == 3
        assert all(said(a).strip() not in text for a in probe.answers[1:])
        assert int(re.search(r"\d+", right)[0]) % 50 == int(number)  # type: ignore[index]


def test_paragraphs_do_not_come_twice() -> None:
    numbers = [n for c in maker(limit=4).contexts(("qa",)) for n in re.findall(r"Number (\d+)\.", said(c.ids))]
    assert len(numbers) == len(set(numbers))


def test_a_single_needle_sinks_from_context_to_context() -> None:
    made = maker(limit=4).contexts(("needle",))
    assert [c.probes[0].depth for c in made] == [0.125, 0.375, 0.625, 0.875]


def test_the_same_seed_makes_the_same_contexts() -> None:
    assert maker().contexts(DEFAULT) == maker().contexts(DEFAULT)
    assert maker(seed=1).contexts(DEFAULT) != maker().contexts(DEFAULT)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(TaskError, match="no task 'needel'"):
        maker().contexts(("needel",))
    with pytest.raises(TaskError, match="too short for what is hidden"):
        maker(200).contexts(("needles",))
    with pytest.raises(TaskError, match="made up is too short"):
        Maker(tokenizer(), Material("made up", "Too little. " * 9), 400).contexts(("perplexity",))
    with pytest.raises(TaskError, match="no paragraph with questions fits"):
        maker(40).contexts(("qa",))
    assert set(DEFAULT) < set(TASKS)


# -- judging ------------------------------------------------------------------------------------------------------
def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_an_exact_answer_is_greedy_at_every_token() -> None:
    probe = Probe("needles", "exact", (), ((0, 1),))
    good, bad = logits((0.7, 0.3), (0.4, 0.6)), logits((0.7, 0.3), (0.6, 0.4))
    assert judge(probe, [good]).value == 1
    assert judge(probe, [bad]).value == 0
    assert judge(probe, [bad]).nats.tolist() == pytest.approx([-math.log(0.7), -math.log(0.4)], rel=1e-5)


def test_a_choice_is_by_nats_per_token() -> None:
    probe = Probe("qa", "choice", (), ((0,), (1, 1)))
    right, longer = logits((0.3, 0.7)), logits((0.5, 0.5), (0.9, 0.1))  # 1.20 against (0.69 + 2.30) / 2 = 1.50
    assert judge(probe, [right, longer]).value == 1
    assert judge(probe, [right, logits((0.5, 0.5), (0.5, 0.5))]).value == 0
    tie = Probe("qa", "choice", (), ((0,), (1,)))
    assert judge(tie, [right, right.flip(1)]).value == 0  # no better than the other: not known


def test_a_copy_counts_tokens_and_nonsense_counts_nothing() -> None:
    probe = Probe("copy", "copy", (), ((0, 1, 1, 1),))
    assert judge(probe, [logits(*[(0.4, 0.6)] * 4)]).value == 0.75
    assert judge(probe, [torch.full((4, 2), float("nan"))]).value == 0


def test_repetition_and_distinct_pairs() -> None:
    assert repetition(range(50)) == 0  # type: ignore[arg-type]
    assert repetition([1, 2, 3] * 40) > 0.95
    assert distinct([1, 2, 3] * 40) == 3 / 119
    assert repetition([]) == 0
    assert distinct([4]) == 1


# -- asking a model -----------------------------------------------------------------------------------------------
def test_asking_equals_reading_everything_in_one_pass(contexts: list) -> None:
    model = llama()
    subject = LanguageSubject(model, tokenizer(), contexts)
    with torch.inference_mode():
        for context in (contexts[0], contexts[2]):
            cache, behind = subject.read(model, context.ids)
            for probe in context.probes:
                found = subject.ask(model, cache, behind, probe)
                whole = (*context.ids, *probe.question, *probe.answers[0])
                out = model(torch.tensor([whole])).logits[0, -len(probe.answers[0]) - 1 : -1]
                nats = torch.nn.functional.cross_entropy(out, torch.tensor(probe.answers[0]), reduction="none")
                torch.testing.assert_close(found.nats, nats.double(), atol=1e-4, rtol=1e-4)
            assert cache.get_seq_length() == len(context.ids)
