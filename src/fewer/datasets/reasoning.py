"""Problems with a chain of thought to every answer: sums, legs to count, equations.

    for problem in problems(10_000, seed=0): ...       # drawn anew; needs pip install 'fewer[reasoning]'
    held = load()                                      # 1,000 that no training draw contains, in the package

The questions and answers are those of reasoning-gym's generators (chain_sum, leg_counting, simple_equations), word for
word. The chains are written here, from the numbers of the problem: the steps in order, in words a person might use, and
what a person might say besides (openings, restated totals, a check at the end), each said or left unsaid by chance.
"""

from __future__ import annotations

import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from random import Random
from typing import Any, Literal

__all__ = ["KINDS", "THINK", "THOUGHT", "Problem", "ReasoningError", "load", "problems", "right"]

THINK, THOUGHT = "<think>", "</think>"
"""What stands before a chain, and behind it."""
KINDS: Mapping[str, Mapping[str, Any]] = {
    "chain_sum": {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1},
    "leg_counting": {"min_animals": 2, "max_animals": 3, "min_instances": 1, "max_instances": 10},
    "simple_equations": {"min_terms": 2, "max_terms": 3, "max_value": 8, "operators_weights": [0.5, 0.5, 0.0]},
}
"""The generators drawn from, each with the settings that differ from its defaults."""
HELD = "reasoning-test-1000.json.xz"
TEST_EVERY = 10
SPEECH = 0.8
"""Chance of each remark that a chain could do without."""


class ReasoningError(ValueError):
    """Problems cannot be drawn, or a chain does not lead to the answer."""


@dataclass(frozen=True)
class Problem:
    """A question, and how it is answered.

    question  as the generator puts it. answer: a whole number. kind: one of `KINDS`
    parts     of the chain that leads to the answer, in order. needed: which are steps; the others are remarks
    """

    question: str
    parts: tuple[str, ...]
    needed: tuple[bool, ...]
    answer: str
    kind: str

    @property
    def chain(self) -> str:
        """All parts."""
        return " ".join(self.parts)

    @property
    def prompt(self) -> str:
        """What a model goes on from."""
        return asked(self.question)

    @property
    def solution(self) -> str:
        """What a model shall write: the chain, its end, and the answer."""
        return f" {self.chain}{said(self.answer)}"


def asked(question: str) -> str:
    """A question as a model is given it, up to where the chain begins."""
    return f"{question.strip()}\n{THINK}"


def said(answer: str) -> str:
    """The end of the chain, and the sentence that says the answer."""
    return f"{THOUGHT} The answer is {answer}."


def right(completion: str, answer: Any) -> bool:
    """Whether what a model wrote says the answer: as the only number behind the end of its chain."""
    _, ended, behind = completion.partition(THOUGHT)
    found = re.findall(r"-?\d+", behind)
    return bool(ended) and found == [str(answer)]


def problems(count: int, *, seed: int = 0, split: Literal["train", "test"] = "train") -> Iterator[Problem]:
    """Draw problems of all kinds in turn.

    Whether a question is for training or for testing is decided by its words: one in `TEST_EVERY` is for testing, and
    no draw for training contains it. Raises ReasoningError where reasoning-gym is not installed.
    """
    if split not in ("train", "test"):
        raise ReasoningError(f"split={split!r}: choose train or test")
    kinds = [_drawn(kind, seed, split) for kind in KINDS]
    for i in range(count):
        yield next(kinds[i % len(kinds)])


def load() -> list[Problem]:
    """The 1,000 problems for testing that are in the package."""
    packed = resources.files("fewer").joinpath(f"assets/{HELD}").read_bytes()
    found = json.loads(lzma.decompress(packed))
    return [Problem(**{**each, "parts": tuple(each["parts"]), "needed": tuple(each["needed"])}) for each in found]


def pack(found: list[Problem]) -> bytes:
    """Problems as the package stores them."""
    return lzma.compress(json.dumps([asdict(each) for each in found]).encode())


def _drawn(kind: str, seed: int, split: str) -> Iterator[Problem]:
    """Problems of one kind without end. A generator's draw number i under seed s is that of number i - 1 under s + 1,
    so that seeds are put far apart."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ReasoningError(
            f"drawing problems needs reasoning-gym ({error}): pip install 'fewer[reasoning]'; load() has 1,000 "
            "without it"
        ) from error
    made = reasoning_gym.create_dataset(kind, seed=seed * 10_000_000, size=10_000_000, **KINDS[kind])
    index = -1
    while True:
        index += 1
        entry = made[index]
        question = entry["question"].strip()
        if (zlib.crc32(question.encode()) % TEST_EVERY == 0) != (split == "test"):
            continue
        written = CHAINS[kind](entry["metadata"], Random(f"{seed} {index}"))
        if written is None:
            continue
        talk, found = written
        if str(found) != entry["answer"]:
            raise ReasoningError(f"the chain of {question!r} comes to {found}, and the answer is {entry['answer']}")
        yield Problem(question, tuple(talk.parts), tuple(talk.needed), entry["answer"], kind)


# -- how a person might put it ----------------------------------------------------------------------------------------
class _Talk:
    """Sentences one after another; a remark is said or not."""

    def __init__(self, random: Random) -> None:
        self.random, self.parts, self.needed = random, list[str](), list[bool]()

    def say(self, *ways: str, needed: bool = True) -> None:
        """One of these."""
        self.parts.append(self.random.choice(ways))
        self.needed.append(needed)

    def remark(self, *ways: str) -> None:
        """One of these, or nothing."""
        if self.random.random() < SPEECH:
            self.say(*ways, needed=False)


def _sum(metadata: Mapping[str, Any], random: Random) -> tuple[_Talk, int]:
    """Left to right, a running total."""
    first, *rest = metadata["expression"].split()
    talk, total = _Talk(random), int(first)
    steps = []
    talk.remark("Okay, let me work this out step by step.", "Let me go from left to right.", "Alright, one by one.")
    talk.remark(f"The first number is {first}, so we start with {first}.", f"We begin with {first}.")
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        before, total = total, total + int(term) if sign == "+" else total - int(term)
        verb = f"add {term}" if sign == "+" else f"take away {term}"
        talk.remark(f"Now we {verb}:", f"Next, we {verb} from the problem:", f"Then {verb}, which makes it:")
        talk.say(f"{before} {sign} {term} = {total}.")
        talk.remark(f"So now we have {total}.", f"That gives us {total} so far.", f"So the total is {total} now.")
        steps.append((before, sign, term, total))
    before, sign, term, total = steps[-1]
    back = "-" if sign == "+" else "+"
    talk.remark(
        f"Let me check the last step: {total} {back} {term} = {before}, which is right.",
        "All the numbers are used, so we are done.",
    )
    return talk, total


def _legs(metadata: Mapping[str, Any], random: Random) -> tuple[_Talk, int]:
    """Kind by kind, legs times animals, and a running total."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    talk, total = _Talk(random), 0
    talk.remark("Okay, let me count the legs of each animal.", "Let me go through the animals one by one.")
    for i, (animal, count) in enumerate(metadata["animals"].items()):
        legs = ANIMALS[animal]
        before, total = total, total + count * legs
        talk.remark(f"Now the {animal}:", f"We know that a {animal} has {legs} legs, and there are {count} of them:")
        talk.say(f"{count} * {legs} = {count * legs}.")
        talk.remark(f"So that is {count * legs} legs for the {animal}.", f"That makes {count * legs} legs.")
        if i:
            talk.remark("Now add this to what we had before:", "We add it to the total:")
            talk.say(f"{before} + {count * legs} = {total}.")
            talk.remark(f"So now we have {total} legs.", f"The total is {total} so far.")
    talk.remark("There are no more animals, so we are done.", f"So all of them together have {total} legs.")
    return talk, total


def _equation(metadata: Mapping[str, Any], random: Random) -> tuple[_Talk, int] | None:
    """Constants to the right, then divide. None for an equation that is not of the form a*x + b = c."""
    x, equation = metadata["variable"], metadata["equation"]
    left, _, right_side = equation.partition(" = ")
    terms = re.findall(r"([+-]?) ?(\d+\*[a-z]|\d+|[a-z])", left)
    factor = constant = 0
    for sign, term in terms:
        value = term.removesuffix(x).removesuffix("*") if term.endswith(x) else term
        number = int(value or 1) * (-1 if sign == "-" else 1)
        if term.endswith(x):
            factor += number
        else:
            constant += number
    if not factor:
        return None
    talk, c = _Talk(random), int(right_side)
    talk.remark(f"Okay, we want {x} alone on one side.", f"Let me solve this for {x} step by step.")
    talk.remark(f"The equation is {equation}.", f"We have {left} on the left and {right_side} on the right.")
    if constant:
        verb = f"take away {constant}" if constant > 0 else f"add {-constant}"
        talk.remark(f"First we {verb} on both sides:", f"To move {abs(constant)} over, we {verb}:")
        talk.say(f"{c} {'-' if constant > 0 else '+'} {abs(constant)} = {c - constant}.")
        c -= constant
        talk.remark(f"So now we have {_times(factor, x)} = {c}.", f"That leaves {_times(factor, x)} = {c}.")
    if factor != 1:
        talk.remark(f"Now we divide both sides by {factor}:", f"Then divide by {factor} to get {x}:")
        talk.say(f"{c} / {factor} = {c // factor}.")
    solution = c // factor
    talk.remark(f"So {x} = {solution}.", f"That means {x} is {solution}.")
    talk.remark(
        f"Let me check: {factor} * {solution} = {c}, which fits.",
        f"To check, put {solution} in for {x}: {factor} * {solution} = {c}, and that is right.",
    )
    return talk, solution


def _times(factor: int, x: str) -> str:
    return x if factor == 1 else f"{factor}*{x}"


CHAINS: Mapping[str, Callable[[Mapping[str, Any], Random], tuple[_Talk, int] | None]] = {
    "chain_sum": _sum,
    "leg_counting": _legs,
    "simple_equations": _equation,
}
