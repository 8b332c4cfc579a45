"""Debates: agents answer, read each other, answer again. S2-MAD lets those be silent who have nothing new to hear.

outcome = Debate(rounds=3, group=3).run("How many ...?", [endpoint] * 6)
outcome.answer, outcome.ledger.tokens, Debate.full(rounds=3).run("How many ...?", [endpoint] * 6).ledger.tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fewer.core.settings import Settings
from fewer.rewards.answers import boxed, last_number, same

from .endpoint import Ledger, Message, Speaker

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Debate", "DebateError", "Outcome", "View", "by_answer", "by_embedding"]

ALONE = "{question}\n\nThink it through briefly, and end with your answer."
AGAIN = (
    "Others who were asked the same say:\n\n{others}\n\nWeigh what they say against your own reasoning. Then answer "
    "the question once more, briefly, and end with your answer."
)


class DebateError(ValueError):
    """A debate that cannot be held."""


@dataclass(frozen=True)
class View:
    """What an agent says. who: its number; round: when it said so."""

    who: int
    round: int
    text: str


Likeness = Callable[[View, View], float]
"""How alike two views are, 1 = the same."""


@dataclass(frozen=True)
class Outcome:
    """What a debate came to.

    answer    the view most others are like; of several such the one of the earliest agent
    views     by round, each agent's. spoke: by round, the agents that were asked. sent: by round, how many views of
              others were read by someone
    ended     "agreed": all views are alike; "silent": nobody had anything new to hear; "rounds": they were over
    """

    answer: View
    views: tuple[tuple[View, ...], ...]
    spoke: tuple[tuple[int, ...], ...]
    sent: tuple[int, ...]
    ended: str
    ledger: Ledger = field(repr=False)


def by_answer(found: Callable[[str], str | None] | None = None) -> Likeness:
    """1 for views with the same answer, else 0; a view without one is like none but its own words.

    found: the answer in a text; None = its last box, else its last number, else its last line.
    """
    take = _answer if found is None else found

    def alike(a: View, b: View) -> float:
        one, two = take(a.text), take(b.text)
        if one is None or two is None:
            return float(a.text.strip() == b.text.strip())
        return float(same(one, two))

    return alike


def by_embedding(embed: Callable[[str], Tensor]) -> Likeness:
    """The cosine of what views are embedded as. embed: text -> (C,)."""
    known: dict[str, Tensor] = {}

    def vector(text: str) -> Tensor:
        if text not in known:
            one = embed(text).detach().float().flatten()
            known[text] = one / one.norm().clamp(min=1e-12)
        return known[text]

    return lambda a, b: float(vector(a.text) @ vector(b.text))


@dataclass(frozen=True)
class Debate(Settings):
    """How agents debate.

    rounds     in which they read each other, behind the one in which each answers alone
    group      agents of a group, 0 = all are one. A group's rounds come first, `inner` of them; then each group hears
               one view of each kind from the others, and so on in turn
    threshold  views that are more alike than this are one
    gate       whether an agent is asked only where a view is new to it and unlike its own, and the debate ends early;
               False is the full debate: everyone reads everyone in every round
    alike      how alike two views are, see `by_answer`, `by_embedding`
    alone, again   what agents are told, with {question} and {others}

    Who speaks in a round has read the views of the round before: the order of agents changes nothing.
    Source   S2-MAD (Zeng et al., NAACL 2025), which names the three parts; thresholds and ties are ours.
    """

    rounds: int = 3
    group: int = 3
    inner: int = 1
    threshold: float = 0.9
    gate: bool = True
    alike: Likeness = field(default_factory=by_answer)
    alone: str = ALONE
    again: str = AGAIN

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.group < 0 or self.inner < 1:
            raise ValueError(
                f"rounds={self.rounds}, group={self.group}, inner={self.inner}: 0 or more, inner at least 1"
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} is outside [0, 1]; a likeness is at most 1")
        if "{question}" not in self.alone or "{others}" not in self.again:
            raise ValueError("alone has a place for {question}, and again one for {others}")

    @classmethod
    def full(cls, rounds: int = 3, **more: object) -> Debate:
        """The debate that S2-MAD is held against: everyone reads everyone, in every round."""
        return replace(cls(rounds=rounds, group=0, gate=False), **more)  # type: ignore[arg-type]

    def run(self, question: str, speakers: Sequence[Speaker]) -> Outcome:
        """Raises DebateError for fewer than two speakers, and whatever a speaker raises."""
        if len(speakers) < 2:
            raise DebateError(f"{len(speakers)} speakers: a debate takes two or more")
        return _Course(self, question, speakers).run()

    def same(self, a: View, b: View) -> bool:
        return self.alike(a, b) > self.threshold or a.text == b.text

    def distinct(self, views: Sequence[View]) -> list[View]:
        """The first view of each kind."""
        found: list[View] = []
        for view in views:
            if not any(self.same(view, other) for other in found):
                found.append(view)
        return found

    def leading(self, views: Sequence[View]) -> View:
        """The view that most are like; of several the first."""
        return max(views, key=lambda view: (sum(self.same(view, other) for other in views), -views.index(view)))


class _Course:
    """A debate under way. seen: by agent, the views it has read."""

    def __init__(self, debate: Debate, question: str, speakers: Sequence[Speaker]) -> None:
        self.debate, self.speakers, self.ledger = debate, speakers, Ledger()
        start: Message = {"role": "user", "content": debate.alone.format(question=question)}
        self.talks: list[list[Message]] = [[start] for _ in speakers]
        self.seen: list[list[View]] = [[] for _ in speakers]
        size = debate.group or len(speakers)
        self.groups = [range(i, min(i + size, len(speakers))) for i in range(0, len(speakers), size)]
        self.home = {who: group for group in self.groups for who in group}

    def run(self) -> Outcome:
        debate = self.debate
        views = [self._said(who, 0) for who in range(len(self.speakers))]
        rounds, spoke, sent = [tuple(views)], [tuple(range(len(views)))], [0]
        ended, quiet = "rounds", 0
        for number in range(1, debate.rounds + 1):
            if debate.gate and len(debate.distinct(views)) == 1:
                ended = "agreed"
                break
            if debate.gate and quiet >= self._turns:
                ended = "silent"
                break
            heard = [self._heard(who, number, views) for who in range(len(views))]
            now = list(views)
            for who, new in enumerate(heard):
                if new or not debate.gate:
                    self.talks[who].append({"role": "user", "content": debate.again.format(others=_told(new))})
                    now[who] = self._said(who, number)
                    self.seen[who] += new
            asked = tuple(who for who, new in enumerate(heard) if new or not debate.gate)
            quiet = 0 if asked else quiet + 1
            views = now
            rounds, spoke = [*rounds, tuple(views)], [*spoke, asked]
            sent.append(len({(view.who, view.round) for new in heard for view in new}))
        else:
            if debate.gate and len(debate.distinct(views)) == 1:
                ended = "agreed"
        return Outcome(debate.leading(views), tuple(rounds), tuple(spoke), tuple(sent), ended, self.ledger)

    @property
    def _turns(self) -> int:
        """Kinds of rounds: within groups, and between them."""
        return 1 if len(self.groups) == 1 else self.debate.inner + 1

    def _said(self, who: int, number: int) -> View:
        reply = self.speakers[who](self.talks[who])
        self.ledger.add(who, number, reply)
        self.talks[who].append({"role": "assistant", "content": reply.text})
        return View(who, number, reply.text)

    def _heard(self, who: int, number: int, views: Sequence[View]) -> list[View]:
        """What an agent reads in a round, of the views before it."""
        debate, mine = self.debate, self.home[who]
        if not debate.gate:
            return [view for view in views if view.who != who]
        if len(self.groups) > 1 and number % (debate.inner + 1) == 0:
            coming = [v for group in self.groups if group != mine for v in debate.distinct([views[i] for i in group])]
        else:
            coming = [views[i] for i in mine if i != who]
        known = [views[who], *self.seen[who]]
        return [view for view in debate.distinct(coming) if not any(debate.same(view, other) for other in known)]


def _told(views: Sequence[View]) -> str:
    return "\n\n".join(f"[{number}] {view.text}" for number, view in enumerate(views, 1))


def _answer(text: str) -> str | None:
    found = boxed(text) or last_number(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return found if found is not None else (lines[-1].lower() if lines else None)
