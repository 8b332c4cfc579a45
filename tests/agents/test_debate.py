"""Debates with scripted agents: who is silent, what travels, when it ends, what it costs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.agents import Debate, DebateError, Message, Reply, View, by_answer, by_embedding


class Agent:
    """Says what its rule makes of the views that it is told, the first time of (); a token is a word."""

    def __init__(self, rule: Callable[[list[str]], str]) -> None:
        self.rule, self.told = rule, list[list[str]]()

    def __call__(self, messages: Sequence[Message], /) -> Reply:
        lines = messages[-1]["content"].split("\n\n") if len(messages) > 1 else []
        self.told.append([line.split("] ", 1)[1] for line in lines if line.startswith("[")])
        text = self.rule(self.told[-1])
        return Reply(text, sum(len(m["content"].split()) for m in messages), len(text.split()))


def firm(answer: str) -> Agent:
    return Agent(lambda others: answer)


def yielding(answer: str, to: str) -> Agent:
    """Takes over an answer as soon as it hears it."""
    return Agent(lambda others: to if to in others else answer)


def test_those_who_agree_need_no_exchange() -> None:
    agents = [firm("It is 12."), firm("12"), firm(r"\boxed{12}")]
    outcome = Debate().run("5 + 7?", agents)
    assert outcome.ended == "agreed"
    assert (len(outcome.views), outcome.sent, outcome.answer) == (1, (0,), View(0, 0, "It is 12."))
    assert len(outcome.ledger.calls) == 3


def test_of_those_who_agree_only_the_dissenter_is_heard() -> None:
    agents = [firm("12"), firm("so 12"), firm("13"), firm("12!")]
    outcome = Debate(rounds=3, group=0).run("5 + 7?", agents)
    assert [agent.told[1] for agent in (agents[0], agents[1], agents[3])] == [["13"]] * 3
    assert agents[2].told[1:] == [["12"]]  # one of three that say the same
    assert outcome.sent == (0, 2, 0)  # the dissenter's view, and one of the others'
    assert outcome.spoke[1:] == ((0, 1, 2, 3), ())
    assert outcome.ended == "silent"
    assert outcome.answer.text == "12"


def test_a_dissenter_who_gives_in_ends_it() -> None:
    outcome = Debate(rounds=5, group=0).run("?", [firm("12"), firm("12"), yielding("13", to="12")])
    assert (outcome.ended, len(outcome.views), outcome.answer.text) == ("agreed", 2, "12")


def test_what_was_read_once_is_not_read_again() -> None:
    """Two who take over what they hear change places; once each has read both, nobody speaks."""

    def echo(start: str) -> Agent:
        return Agent(lambda others: others[0] if others else start)

    agents = [echo("1"), echo("2")]
    outcome = Debate(rounds=9, group=0).run("?", agents)
    assert outcome.ended == "silent"
    assert [agent.told for agent in agents] == [[[], ["2"], ["1"]], [[], ["1"], ["2"]]]
    assert len(outcome.ledger.calls) == 6


def test_groups_first_then_one_view_of_each_kind_between_them() -> None:
    agents = [firm("1"), firm("2"), firm("1"), firm("3"), firm("3"), firm("4")]
    outcome = Debate(rounds=2, group=3).run("?", agents)
    assert agents[0].told[1] == ["2"]
    assert agents[3].told[1] == ["4"]
    assert agents[0].told[2] == ["3", "4"]  # of the other group, and each once
    assert agents[5].told[2] == ["1", "2"]
    assert outcome.ended == "rounds"
    assert outcome.answer.text == "1"  # two each for 1 and 3: the earliest agent's


def test_everyone_reads_everyone_in_the_full_debate() -> None:
    agents = [firm("1") for _ in range(4)]
    outcome = Debate.full(rounds=2).run("?", agents)
    assert [len(agent.told) for agent in agents] == [3] * 4
    assert agents[1].told[2] == ["1"] * 3
    assert outcome.sent == (0, 4, 4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=7), st.integers(0, 4), st.integers(0, 3), st.integers(0, 99))
def test_it_never_costs_more_than_the_full_debate(answers: list[int], rounds: int, group: int, seed: int) -> None:
    """Agents whose next answer is drawn, all of one length: the gated debate's calls are fewer, and each is shorter."""

    def made() -> list[Agent]:
        draws = [random.Random(f"{seed} {who}") for who in range(len(answers))]
        return [
            Agent(lambda others, a=a, draw=draw: str(draw.randint(0, 3)) if others else str(a))
            for a, draw in zip(answers, draws, strict=True)
        ]

    sparse = Debate(rounds=rounds, group=group).run("What is it?", made()).ledger
    full = Debate.full(rounds=rounds).run("What is it?", made()).ledger
    assert sparse.tokens <= full.tokens
    assert sparse.prompt <= full.prompt


def test_the_order_of_agents_changes_only_who_is_who() -> None:
    answers = ["1", "2", "2", "3"]
    for order in ([3, 0, 2, 1], [1, 2, 3, 0]):
        outcome = Debate(rounds=2, group=0).run("?", [firm(answers[i]) for i in order])
        plain = Debate(rounds=2, group=0).run("?", [firm(a) for a in answers])
        assert outcome.answer.text == plain.answer.text == "2"
        assert sorted(c.prompt for c in outcome.ledger.calls) == sorted(c.prompt for c in plain.ledger.calls)


def test_likeness_by_embedding_and_by_answer() -> None:
    table = {"a": [1.0, 0.0], "b": [0.99, 0.1], "c": [0.0, 2.0]}
    alike = by_embedding(lambda text: torch.tensor(table[text]))
    assert alike(View(0, 0, "a"), View(1, 0, "b")) == pytest.approx(0.995, abs=1e-3)
    agents = [firm("a"), firm("b"), firm("c")]
    Debate(rounds=1, group=0, alike=alike).run("?", agents)
    assert agents[0].told[1] == ["c"]
    said = by_answer()
    assert said(View(0, 0, "x = 0.5"), View(1, 0, r"so \boxed{\frac{1}{2}}")) == 1
    assert said(View(0, 0, "It is Paris\n"), View(1, 0, "thought\nit is paris")) == 1
    assert said(View(0, 0, "Rome"), View(1, 0, "Paris")) == 0


@pytest.mark.parametrize(
    ("given", "why"),
    [({"rounds": -1}, "rounds=-1"), ({"threshold": 1.5}, "outside"), ({"again": "none"}, "place for"),
     ({"inner": 0}, "at least 1"), ({"threshold": float("nan")}, "outside")],
)  # fmt: skip
def test_what_cannot_be_is_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Debate(**given)


def test_one_speaker_is_no_debate() -> None:
    with pytest.raises(DebateError, match="two or more"):
        Debate().run("?", [firm("1")])
