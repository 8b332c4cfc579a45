"""Chain of Density: a summary is rewritten at equal length, each time with more of what the text is about.

chain = Densify(steps=5, words=80).run(article, endpoint)
chain.best.text, [step.density for step in chain.steps], chain.ledger.tokens
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fewer.core.settings import Settings

from .endpoint import Ledger, Message, Speaker

__all__ = ["Chain", "Densify", "Step", "abstractiveness", "density", "fusion", "named"]

FIRST = (
    "Text:\n{text}\n\nSummarise this text in about {words} words. Be general and wordy for now: name very few of the "
    "people, places, things and figures in it. Write the summary alone."
)
NEXT = (
    "Text:\n{text}\n\nSummary so far:\n{summary}\n\nThis summary leaves out much. First choose one to three names, "
    "places, things or figures of the text that it lacks and a reader would want. Then rewrite it so that it has them "
    "and all that it names already, in no more than {words} words: join sentences, and cut words that say "
    "nothing.\n\nAnswer in two lines:\nMissing: what you chose, with semicolons between\nSummary: the new summary"
)
AGAIN = "That does not do: {why}. Answer again, in the same two lines."
ANSWER = re.compile(r"(?is)^\W*missing\W*?:\s*(?P<missing>.*?)\n\W*summary\W*?:\W*?(?P<summary>\w.*)\Z")
# A date; or capitalised words and abbreviations, joined by small words between; or a figure with its unit.
MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
DATE = re.compile(
    rf"\b(?:\d{{1,2}}\s+{MONTH}(?:,?\s+\d{{4}})?|{MONTH}\s+\d{{1,2}}(?:,?\s+\d{{4}})?|{MONTH},?\s+\d{{4}})\b"
)
CAPITAL = r"(?:(?:[A-Z]\.)+|(?:Mrs?|Ms|Dr|St|Prof)\.|[A-Z][\w&'\u2019-]*)"
NAME = re.compile(rf"(?<!\w){CAPITAL}(?:\s+(?:(?:of|de|van|von|the|and|&)\s+)?{CAPITAL})*")
FIGURE = re.compile(r"[$\u20ac\u00a3]?\b\d(?:[\d,.]*\d)?\b%?")
SENTENCE = re.compile(r"(?<=[.!?])[\"'\u201d\u2019)]*\s+")
WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
# Words that begin a sentence with a capital and name nothing.
PLAIN = re.compile(
    "a|an|the|this|that|these|those|it|its|he|she|they|we|i|you|his|her|their|our|my|your|there|here|in|on|at"
    "|by|for|from|to|of|with|after|before|during|since|while|when|where|who|which|what|why|how|as|if|although"
    "|though|but|and|or|nor|so|yet|not|no|all|some|many|most|each|every|both|either|neither|one|two|three"
    "|several|such|other|another|more|also|only|even|just|still|however|meanwhile|moreover|instead|then|thus"
    "|among|according|despite|under|over|between|through|about|into|once|until|because|whether|is|are|was|were"
    "|be|been|has|have|had|do|does|did|will|would|can|could|may|might|must|should|shall|let|yes|new"
)


def named(text: str) -> frozenset[str]:
    """The names and figures of a text, in small letters: runs of capitalised words, abbreviations, numbers.

    A rule for English, not a model: a word that opens a sentence counts if it has its capital elsewhere too, and a name
    that ends like a longer one (Quayle, John Quayle) is that one. Any callable from a text to strings, such as a
    recogniser of spaCy's, can stand in its place.

    >>> sorted(named("In 1863 Port Erin was built. The harbour of Douglas, on the Isle of Man, cost $4.5 million."))
    ['$4.5', '1863', 'douglas', 'isle of man', 'port erin']
    """
    found = {" ".join(match[0].lower().replace(",", "").split()) for match in DATE.finditer(text)}
    text = DATE.sub(lambda match: "_" * len(match[0]), text)
    for match in NAME.finditer(text):
        words = match[0].split()
        while words and PLAIN.fullmatch(words[0].lower()):
            words = words[1:]
        name = " ".join(words)
        if name and not (len(match[0].split()) == 1 and _opens(text, match.start()) and not _again(text, name)):
            found.add(re.sub(r"['\u2019]s?$", "", name.lower()))
    found |= {match[0] for match in FIGURE.finditer(text)}
    return frozenset(one for one in found if not any(other.endswith(f" {one}") for other in found))


def _opens(text: str, at: int) -> bool:
    """Whether a word stands at the beginning of a sentence."""
    before = text[:at].rstrip(" \"'\u201c\u2018(")
    return not before or before[-1] in ".!?\n:"


def _again(text: str, name: str) -> bool:
    """Whether a name has its capital in the middle of a sentence too, or more capitals than its first."""
    inside = any(not _opens(text, m.start()) for m in re.finditer(rf"\b{re.escape(name)}\b", text))
    return inside or name[1:] != name[1:].lower()


def holds(text: str, entity: str) -> bool:
    """Whether a text names something: whole words, in any case; of several words the last will do, as people are named
    after the first time."""
    plain = text.lower()
    forms = {entity.lower(), entity.lower().split()[-1]} if len(entity.split()[-1]) > 3 else {entity.lower()}
    return any(re.search(rf"(?<!\w){re.escape(form)}(?!\w)", plain) for form in forms)


def density(entities: Iterable[str], tokens: int) -> float:
    """Different entities per token. Source: Chain of Density, arXiv:2309.04269. Raises ValueError for no tokens."""
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: a text without tokens has no density")
    return len(set(entities)) / tokens


def abstractiveness(summary: str, text: str) -> float:
    """1 minus the share of a summary's words that stand in runs of two or more in the text too; 1 = all its own.

    Source   coverage of extractive fragments, Grusky et al., arXiv:1804.11283, with fragments of two words at least.
    """
    words, source = ([w.lower() for w in WORD.findall(t)] for t in (summary, text))
    starts: dict[str, list[int]] = {}
    for i, word in enumerate(source):
        starts.setdefault(word, []).append(i)
    i = copied = 0
    while i < len(words):
        run = 0
        for j in starts.get(words[i], ()):
            n = 0
            while i + n < len(words) and j + n < len(source) and words[i + n] == source[j + n]:
                n += 1
            run = max(run, n)
        copied += run if run > 1 else 0
        i += max(run, 1)
    return 1 - copied / len(words) if words else 0.0


def fusion(summary: str, text: str) -> float:
    """How many sentences of the text a sentence of the summary draws on, mean: the one that has most of its words comes
    first, then the one that has most of the others, while each adds two words or more that are no common ones."""
    sources = [_content(sentence) for sentence in SENTENCE.split(text)]
    counts = []
    for sentence in SENTENCE.split(summary):
        left, count = _content(sentence), 0
        while left:
            best = max(sources, key=lambda s: len(s & left))
            if len(best & left) < 2:
                break
            left, count = left - best, count + 1
        counts.append(count)
    return sum(counts) / len(counts)


def _content(sentence: str) -> frozenset[str]:
    return frozenset(w for w in map(str.lower, WORD.findall(sentence)) if not PLAIN.fullmatch(w))


@dataclass(frozen=True)
class Step:
    """A summary. added: what was said to be new in it. entities: of the text's, those that it names. tokens: how long
    it is; density: entities per token."""

    text: str
    added: tuple[str, ...]
    entities: frozenset[str]
    tokens: int
    density: float


@dataclass(frozen=True)
class Chain:
    """steps: from sparse to dense. ended: "steps", or why it stopped earlier. ledger: what it cost."""

    steps: tuple[Step, ...]
    ended: str
    ledger: Ledger = field(repr=False)

    @property
    def best(self) -> Step:
        """The densest; of several the first."""
        return max(self.steps, key=lambda step: step.density)

    def nearest(self, target: float = 0.15) -> Step:
        """The one whose density is nearest to a target. In the paper people liked those in the middle best, near 0.15
        entities a token, which is what people write."""
        return min(self.steps, key=lambda step: abs(step.density - target))


@dataclass(frozen=True)
class Densify(Settings):
    """How a chain is made.

    steps      summaries, the first, sparse one included. words: of each
    tolerance  how much longer than `words` a summary may be, as a share. A shorter one is welcome
    retries    how often a summary that breaks a rule is asked for again, before the chain ends with those there are
    entities   text -> what it names; count: text -> tokens, None = words
    first, next, again   what is asked

    The rules of each step behind the first: it is no longer than allowed; it still names what the one before named; it
    names something of the text that the one before did not; its density does not fall.
    Source   Chain of Density (Adams et al. 2023), arXiv:2309.04269; the words are ours, and so are the rules, which the
             paper leaves to the model.
    """

    steps: int = 5
    words: int = 80
    tolerance: float = 0.25
    retries: int = 1
    entities: Callable[[str], Iterable[str]] = named
    count: Callable[[str], int] | None = None
    first: str = FIRST
    next: str = NEXT
    again: str = AGAIN

    def __post_init__(self) -> None:
        if self.steps < 1 or self.words < 1 or self.retries < 0 or self.tolerance < 0:
            raise ValueError(
                f"steps={self.steps}, words={self.words}, retries={self.retries}, tolerance={self.tolerance}: at least "
                "1, 1, 0 and 0"
            )

    def run(self, text: str, speaker: Speaker) -> Chain:
        """Raises ValueError for a text that names nothing, or an empty first summary; and what the speaker raises."""
        known = sorted(set(self.entities(text)), key=str)
        if not known:
            raise ValueError("the text names nothing that could be added to a summary: give another entities=")
        ledger = Ledger()
        reply = speaker([{"role": "user", "content": self.first.format(text=text, words=self.words)}])
        ledger.add(0, 0, reply)
        if not reply.text.strip():
            raise ValueError("the first summary is empty: the model said nothing")
        steps, ended = [self._step(reply.text.strip(), (), known)], "steps"
        for number in range(1, self.steps):
            asked = self.next.format(text=text, summary=steps[-1].text, words=self.words)
            found = self._better([{"role": "user", "content": asked}], steps[-1], known, speaker, ledger, number)
            if isinstance(found, str):
                ended = f"step {number + 1}: {found}"
                break
            steps.append(found)
        return Chain(tuple(steps), ended, ledger)

    def _better(
        self, talk: list[Message], before: Step, known: Sequence[str], speaker: Speaker, ledger: Ledger, number: int
    ) -> Step | str:
        """The next summary, or why there is none."""
        why = ""
        for _ in range(self.retries + 1):
            reply = speaker(talk)
            ledger.add(0, number, reply)
            found = ANSWER.match(reply.text.strip())
            if found is None:
                why = "there are no two lines that begin with Missing and Summary"
            else:
                added = tuple(part.strip() for part in found["missing"].split(";") if part.strip())
                step = self._step(found["summary"].strip(), added, known)
                why = self._wrong(step, before)
                if not why:
                    return step
            talk = [*talk, {"role": "assistant", "content": reply.text},
                    {"role": "user", "content": self.again.format(why=why)}]  # fmt: skip
        return why

    def _step(self, summary: str, added: tuple[str, ...], known: Sequence[str]) -> Step:
        names = frozenset(entity for entity in known if holds(summary, entity))
        tokens = max(len(WORD.findall(summary)) if self.count is None else self.count(summary), 1)
        return Step(summary, added, names, tokens, density(names, tokens))

    def _wrong(self, step: Step, before: Step) -> str:
        """Which rule a summary breaks, in words; "" for none."""
        words, most = len(WORD.findall(step.text)), int(self.words * (1 + self.tolerance))
        if words > most:
            return f"it has {words} words, and at most {most} are allowed"
        if lost := sorted(before.entities - step.entities):
            return f"it no longer names {', '.join(lost)}"
        if step.entities == before.entities:
            return "it names nothing of the text that the one before did not"
        if step.density < before.density:
            return f"it says less per word than the one before ({step.density:.3f} after {before.density:.3f})"
        return ""
