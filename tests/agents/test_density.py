"""Chain of Density with a scripted model: rules that are kept, and what happens where they are not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fewer.agents import Densify, Message, Reply, abstractiveness, density, fusion, named
from fewer.agents.density import holds

TEXT = (
    "In 1863 the harbour of Port Erin was built by John Quayle. The sea broke it on 14 October 1881. The council of "
    "Douglas sold the blocks, and Mrs Watterson made twelve houses of them. A lighthouse was never needed. Quayle died."
)
SPARSE = "This text tells of a harbour, of what became of it, and of who made use of what was left in the end."
ONE = "The harbour of Port Erin was built by Quayle; the sea broke it, and its blocks became houses in the end."
TWO = "Quayle built Port Erin's harbour in 1863; the sea broke it, and Watterson made its blocks twelve houses."


class Script:
    """Says its lines in turn, and keeps what it was asked."""

    def __init__(self, *lines: str) -> None:
        self.lines, self.asked = list(lines), list[str]()

    def __call__(self, messages: Sequence[Message], /) -> Reply:
        self.asked.append(messages[-1]["content"])
        return Reply(self.lines.pop(0), 100, 20)


def said(summary: str, missing: str = "something") -> str:
    return f"Missing: {missing}\nSummary: {summary}"


def test_names_are_found() -> None:
    assert named(TEXT) == {"1863", "port erin", "john quayle", "14 october 1881", "douglas", "mrs watterson"}
    assert named("The USA and the U.S. agree: 3.5% of $2,000.") == {"usa", "u.s.", "3.5%", "$2,000"}
    assert named("Mr. Hall met Dr. Ann Lee on May 3, 1999 in May's shop. Hall left.") == {
        "mr. hall", "dr. ann lee", "may 3 1999", "may"
    }  # fmt: skip
    assert named("Nothing. However, it is so.") == frozenset()
    assert holds("Later Quayle left.", "john quayle")
    assert not holds("Quayles left.", "john quayle")


def test_a_chain_gets_denser_and_keeps_what_it_names() -> None:
    script = Script(SPARSE, said(ONE, "Port Erin; John Quayle"), said(TWO, "1863; Mrs Watterson"))
    chain = Densify(steps=3, words=20).run(TEXT, script)
    assert chain.ended == "steps"
    assert [len(step.entities) for step in chain.steps] == [0, 2, 4]
    assert chain.steps[1].added == ("Port Erin", "John Quayle")
    densities = [step.density for step in chain.steps]
    assert densities == sorted(densities)
    assert chain.best is chain.steps[2]
    assert chain.nearest(0.0) is chain.steps[0]
    assert (chain.ledger.prompt, chain.ledger.completion) == (300, 60)
    assert ONE in script.asked[2]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (said(ONE + " And so on" * 10), "it has 51 words, and at most 25 are allowed"),
        (said("Douglas sold blocks."), "it no longer names john quayle, port erin"),
        (said(ONE.replace("in the end", "at last")), "it names nothing of the text that the one before did not"),
        ("Port Erin, again.", "there are no two lines that begin with Missing and Summary"),
    ],
)
def test_a_broken_rule_is_told_once_and_then_ends_the_chain(bad: str, why: str) -> None:
    script = Script(SPARSE, said(ONE), bad, said(TWO))
    chain = Densify(steps=3, words=20).run(TEXT, script)
    assert script.asked[3] == f"That does not do: {why}. Answer again, in the same two lines."
    assert len(chain.steps) == 3
    script = Script(SPARSE, said(ONE), bad, bad)
    chain = Densify(steps=4, words=20).run(TEXT, script)
    assert chain.ended == f"step 3: {why}"
    assert len(chain.steps) == 2
    assert len(chain.ledger.calls) == 4  # what did not help was paid for


def test_less_per_word_is_a_fault() -> None:
    longer = ONE.replace("in the end", "which stand in Douglas to this day") + " So it went on."
    chain = Densify(steps=3, words=25, retries=0).run(TEXT, Script(SPARSE, said("Port Erin. Quayle."), said(longer)))
    assert "it says less per word" in chain.ended


def test_tokens_and_names_may_be_counted_otherwise() -> None:
    chain = Densify(steps=1, entities=lambda text: {"harbour"}, count=len).run(TEXT, Script(SPARSE))
    assert chain.steps[0].tokens == len(SPARSE)
    assert chain.steps[0].density == 1 / len(SPARSE)


def test_measures() -> None:
    assert density(["a", "b", "a"], 20) == 0.1
    assert abstractiveness("The sea broke it.", TEXT) == 0
    assert abstractiveness("Waves destroyed everything.", TEXT) == 1
    assert abstractiveness("The sea broke nothing there", TEXT) == pytest.approx(0.4)
    assert fusion("The harbour was built.", TEXT) == 1
    assert fusion("The harbour was built and the council sold its blocks.", TEXT) == 2
    with pytest.raises(ValueError, match="no density"):
        density([], 0)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="names nothing"):
        Densify().run("nothing at all.", Script("x"))
    with pytest.raises(ValueError, match="empty"):
        Densify().run(TEXT, Script(" "))
    with pytest.raises(ValueError, match="steps=0"):
        Densify(steps=0)
