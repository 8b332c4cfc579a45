"""What is asked about texts that get shorter, each task a list of items whose probes share one text."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from fewer.compression.source import SENTENCE
from fewer.datasets import texts
from fewer.datasets.texts import Paragraph

from .reader import Probe, Reader

DOCUMENTS, PASSAGE = 10, 60  # passages side by side, words of each at most
WRONG = 3  # answers beside the right one
SHOTS = 8


@dataclass(frozen=True)
class Item:
    """A text in parts, of which each may be shortened, and what is asked about the whole.

    labels   per part, what stands behind it and stays; () = nothing, and the parts are one prompt
    ask      whether a question is known before the text is shortened
    """

    parts: tuple[str, ...]
    probes: tuple[Probe, ...]
    labels: tuple[str, ...] = ()
    ask: bool = True

    @property
    def whole(self) -> str:
        return self.joined(self.parts)

    def joined(self, parts: Sequence[str]) -> str:
        """The text with these for its parts."""
        labels = self.labels or ("",) * len(parts)
        return "\n\n".join(part + label for part, label in zip(parts, labels, strict=True))


def asked(question: str) -> str:
    return f"\n\nQuestion: {question}\nAnswer:"


# -- questions on paragraphs -------------------------------------------------------------------------------------------
def paragraph(limit: int, seed: int, reader: Reader | None = None) -> list[Item]:
    """Up to four questions on one paragraph of Wikipedia; wrong answers are right ones to other questions on it."""
    found = []
    for text, about in _shuffled(_by_text(), f"{seed} paragraph"):
        probes = _probes(about, [p.answers[0] for p in about])[:4]
        if len(probes) > 1:
            found.append(Item((text,), tuple(probes)))
    return _up_to(found, limit)


def documents(limit: int, seed: int, reader: Reader | None = None) -> list[Item]:
    """One question on each of ten passages side by side; wrong answers are right ones for the other passages."""
    passages = [passage for text, about in _shuffled(_by_text(), f"{seed} documents") if (passage := _cut(text, about))]
    found = []
    rest = iter(passages)
    while len(some := list(islice(rest, DOCUMENTS))) == DOCUMENTS:
        whole = "\n".join(text for text, _ in some).lower()
        clear = [p for _, p in some if whole.count(p.answers[0].lower()) == 1]  # else others say it too
        probes = _probes(clear, [p.answers[0] for _, p in some])
        if probes:
            found.append(Item(tuple(text for text, _ in some), tuple(probes)))
    return _up_to(found, limit)


def _by_text() -> list[tuple[str, list[Paragraph]]]:
    by: dict[str, list[Paragraph]] = {}
    for p in texts.paragraphs("disfl-qa"):
        if p.answers:
            by.setdefault(p.text, []).append(p)
    return list(by.items())


def _cut(text: str, about: Sequence[Paragraph]) -> tuple[str, Paragraph] | None:
    """Sentences of a paragraph in a row, as many as a passage holds, about the only place where an answer stands."""
    sentences = _sentences(text)
    for p in about:
        at = [i for i, sentence in enumerate(sentences) if p.answers[0] in sentence]
        if len(at) != 1 or len(sentences[at[0]].split()) > PASSAGE:
            continue
        first = last = at[0]
        grown = True
        while grown:
            grown = False
            for a, b in ((first - 1, last), (first, last + 1)):
                if a >= 0 and b < len(sentences) and len(" ".join(sentences[a : b + 1]).split()) <= PASSAGE:
                    first, last, grown = a, b, True
        return " ".join(sentences[first : last + 1]), p
    return None


def _sentences(text: str) -> list[str]:
    ends = [0, *(m.end() for m in SENTENCE.finditer(text)), len(text)]
    return [text[a:b].strip() for a, b in pairwise(ends) if text[a:b].strip()]


def _probes(about: Sequence[Paragraph], answers: Sequence[str]) -> list[Probe]:
    """Those questions for which enough other answers are told apart from the right one."""
    found = []
    for p in about:
        right = p.answers[0].strip()
        others = dict.fromkeys(a.strip() for a in answers if not _alike(a, right))
        wrong = random.Random(f"{p.question} {right}").sample(sorted(others), min(WRONG, len(others)))
        if len(wrong) == WRONG:
            found.append(Probe(asked(p.question), tuple(f" {answer}" for answer in (right, *wrong))))
    return found


def _alike(one: str, other: str) -> bool:
    a, b = (re.sub(r"\W+", " ", text.lower()).strip() for text in (one, other))
    return a in b or b in a


# -- exemplars ---------------------------------------------------------------------------------------------------------
def exemplars(limit: int, seed: int, reader: Reader | None = None) -> list[Item]:
    """News wires with their topics, one of each of eight, then another one: which topic? The exemplars get shorter,
    their topics stay."""
    train, test = texts.load("reuters-r8", split="train"), texts.load("reuters-r8", split="test")
    draw = random.Random(f"{seed} exemplars")
    topics = [name.replace("-", " ") for name in train.classes]

    def pick(data: texts.TextSet, label: int) -> str:
        those = [t for t, c in zip(data.texts, data.labels.tolist(), strict=True) if c == label]
        return draw.choice([t for t in those if 30 <= len(t.split()) <= 90] or those)

    found = []
    for _ in range(-(-limit // (2 * SHOTS))):
        shots = [(pick(train, label), topics[label]) for label in range(len(topics))]
        draw.shuffle(shots)
        probes = []
        for label in [*range(len(topics))] * 2:
            others = [topic for topic in topics if topic != topics[label]]
            said = " ".join(pick(test, label).split()[:90])
            probes.append(Probe(f"\n\n{said}\nTopic:", tuple(f" {topic}" for topic in (topics[label], *others))))
        labels = tuple(f"\nTopic: {topic}" for _, topic in shots)
        found.append(Item(tuple(text for text, _ in shots), tuple(probes), labels, ask=False))
    return _up_to(found, limit)


# -- summaries ---------------------------------------------------------------------------------------------------------
def summary(limit: int, seed: int, reader: Reader | None = None) -> list[Item]:
    """The reader's own summary of a whole paragraph: how likely it stays when the paragraph is shorter."""
    if reader is None:
        raise ValueError("summaries are written by the reader: give it")
    found = []
    for text, _ in islice(_shuffled(_by_text(), f"{seed} summary"), limit):
        said = reader.write(f"{text}\n\nSummary in one sentence:", 48)
        if said:
            found.append(Item((text,), (Probe("\n\nSummary in one sentence:", (f" {said}",)),), ask=False))
    return found


# -- a conversation ----------------------------------------------------------------------------------------------------
FACTS: Mapping[str, tuple[str, ...]] = {
    "the meeting room": ("Aspen", "Birch", "Cedar", "Maple", "Willow", "Juniper"),
    "the name of the dog": ("Biscuit", "Rocket", "Pepper", "Waffles", "Comet", "Nutmeg"),
    "the train to take": ("the 7:15", "the 8:40", "the 9:05", "the 6:50", "the 10:20", "the 11:35"),
    "the colour of the door": ("dark green", "bright red", "pale blue", "plain white", "deep purple", "light grey"),
    "the dentist's town": ("Leiden", "Ghent", "Bremen", "Lyon", "Porto", "Turin"),
    "the size of the order": ("forty boxes", "twelve boxes", "ninety boxes", "sixty boxes", "five boxes", "ten boxes"),
    "the language of the course": ("Czech", "Finnish", "Welsh", "Greek", "Danish", "Turkish"),
    "the instrument for the concert": ("the cello", "the harp", "the oboe", "the trumpet", "the flute", "the viola"),
    "the day of the visit": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"),
    "the dish for dinner": ("lentil soup", "fish pie", "mushroom rice", "onion tart", "bean stew", "lemon chicken"),
}
TURNS = (
    "By the way, {thing} is {value}, so please keep that in mind when we come back to it later on.",
    "I nearly forgot to tell you about {thing}: it is going to be {value}, as far as I know right now.",
    "After a long talk with everybody at home we agreed on {value} for {thing}, which took us most of the evening.",
    "Someone asked me again about {thing} this morning, and I told them once more that it is {value}.",
)
REPLIES = (
    "Thank you for letting me know, I have taken a note of it and will come back to it when you need it.",
    "That sounds like a good plan to me, and I am happy to help you with anything else that comes up.",
    "Understood. Is there anything else you would like me to think about before we go on with the rest?",
    "Alright, that is clear now. Let me know if any of it changes in the meantime and I will adjust.",
)


def dialogue(limit: int, seed: int, reader: Reader | None = None) -> list[Item]:
    """A made-up conversation in which ten things are told in passing; then each of them is asked for."""
    found = []
    for number in range(-(-limit // len(FACTS))):
        draw = random.Random(f"{seed} dialogue {number}")
        told = {thing: draw.choice(values) for thing, values in FACTS.items()}
        order = draw.sample(sorted(told), len(told))
        parts = [
            f"User: {draw.choice(TURNS).format(thing=thing, value=told[thing])}\nAssistant: {draw.choice(REPLIES)}"
            for thing in order
        ]
        probes = []
        for thing in order:
            wrong = draw.sample([value for value in FACTS[thing] if value != told[thing]], WRONG)
            said = f"\n\nUser: Remind me, what was {thing}?\nAssistant: It was"
            probes.append(Probe(said, tuple(f" {value}" for value in (told[thing], *wrong))))
        found.append(Item(tuple(parts), tuple(probes)))
    return _up_to(found, limit)


def _shuffled(items: Sequence[tuple[str, list[Paragraph]]], seed: str) -> list[tuple[str, list[Paragraph]]]:
    mixed = [*items]
    random.Random(seed).shuffle(mixed)
    return mixed


def _up_to(items: Sequence[Item], limit: int) -> list[Item]:
    """Whole items until there are so many probes."""
    found: list[Item] = []
    for item in items:
        if sum(len(one.probes) for one in found) >= limit:
            break
        found.append(item)
    return found


TASKS: Mapping[str, Callable[[int, int, Reader | None], list[Item]]] = {
    "documents": documents, "paragraph": paragraph, "exemplars": exemplars, "summary": summary, "dialogue": dialogue,
}  # fmt: skip
