"""What a text became: a subsequence, with everything that left at hand."""

from __future__ import annotations

import json
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewer.compression import Compressed, Shelf, Source
from fewer.compression.compressed import composed, counted, digest
from fewer.compression.compressor import _kept
from fewer.compression.forced import KINDS as PROTECTED
from fewer.compression.forced import broken, forced
from wording import KINDS, ODD, PROSE, tokenizer


def compressed(text: str, order: list[int], kind: str = "bpe") -> Compressed:
    source = Source.of([text], tokenizer(kind))
    return Compressed(source, _kept(order, len(source)), composed(source, order), len(source), len(order))


def inside(short: str, text: str) -> bool:
    """Whether a text is what is left of another when characters go."""
    rest = iter(text)
    return all(c in rest for c in short)


# -- what is left, as a text -------------------------------------------------------------------------------------------
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_what_is_left_is_a_subsequence(data: st.DataObject, kind: str) -> None:
    text = data.draw(st.sampled_from([*ODD, PROSE[:300]]) | st.text(max_size=40))
    source = Source.of([text], tokenizer(kind))
    cells = data.draw(st.sets(st.sampled_from(source.cells))) if source.cells else set()
    order = [i for i, cell in enumerate(source.cells) if cell in cells]
    one = compressed(text, order, kind)
    assert inside(one.text, text)
    gone = {c for a, b in one.dropped.values() for c in range(a, b)}
    assert len(gone) == sum(b - a for a, b in one.dropped.values())
    stayed = {c for a, b in one.spans for c in range(a, b)}
    assert gone | stayed == {*range(len(text))}
    assert not gone & stayed
    assert "".join(piece for _, piece in one.diff()) == text
    assert [piece for stays, piece in one.diff() if not stays] == [one.restore(name) for name in one.dropped]
    assert all(a != b for (a, _), (b, _) in zip(one.diff(), one.diff()[1:], strict=False))
    assert one.restore() == text


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_are_the_text_byte_for_byte(kind: str) -> None:
    for text in [*ODD, PROSE]:
        source = Source.of([text], tokenizer(kind))
        assert composed(source, range(len(source))) == (text if source.ids else "")


def left(text: str, *gone: str, kind: str = "bpe") -> str:
    """What is left of a text without these words, by words."""
    source = Source.of([text], tokenizer(kind))
    marked = source.within([(text.index(word), text.index(word) + len(word)) for word in gone])
    return composed(source, [i for i, inside in enumerate(marked) if not inside])


def test_gaps_between_words_leave_what_parted_them() -> None:
    assert left("the old man slept", "old") == "the man slept"
    assert left("the old man slept", "the") == "old man slept"
    assert left("He slept, then, badly.", "then") == "He slept,, badly."
    assert left("end.\n\nA new one", "A") == "end.\n\n new one" or left("end.\n\nA new one", "A") == "end.\n\nnew one"


def test_a_line_break_that_left_with_its_neighbours_stands_for_the_gap() -> None:
    assert left("first line\nsecond line\n\nthird", "second line", kind="wordpiece") == "first line\n\nthird"
    assert left("one\n\n\ntwo-three", "two-", kind="wordpiece") == "one\n\nthree"
    assert left("one\ttwo-three", "two-", kind="wordpiece") == "one\tthree"
    assert left("one two-three", "two-", kind="wordpiece") == "one three"


def test_contexts_in_another_order_are_parted() -> None:
    source = Source.of(["Alpha one.", "Beta two."], tokenizer("wordpiece"))
    second = [i for i, part in enumerate(source.parts) if part == 1]
    first = [i for i, part in enumerate(source.parts) if part == 0]
    assert composed(source, [*second, *first]).split() == ["Beta", "two.", "Alpha", "one."]
    assert "two.\n\nAlpha" in composed(source, [*second, *first])
    for kind in KINDS:  # what stood between them may have stayed with either
        source = Source.of(["Alpha one.", "Beta two.", "Gamma."], tokenizer(kind))
        by_part = [[i for i, part in enumerate(source.parts) if part == number] for number in range(3)]
        moved = composed(source, [*by_part[1], *by_part[0], *by_part[2]])
        assert moved == "Beta two.\n\nAlpha one.\n\nGamma."


# -- ids ---------------------------------------------------------------------------------------------------------------
def test_a_dropped_span_comes_back_by_its_id() -> None:
    one = compressed("zero one two three four", [0, 3])
    assert len(one.dropped) == 2
    for name, (a, b) in one.dropped.items():
        assert name == f"{digest(one.source.text)}:{a}-{b}"
        assert one.restore(name) == one.source.text[a:b]
    with pytest.raises(KeyError, match="no dropped span 'x'; such as"):
        one.restore("x")


def test_a_shelf_gives_spans_back_by_id_alone() -> None:
    one = compressed("zero one two three four", [0, 3])
    shelf = Shelf()
    shelf.put(one)
    for name in one.dropped:
        assert shelf.restore(name) == one.restore(name)
    assert shelf.restore(digest(one.source.text)) == one.source.text
    key = digest(one.source.text)
    with pytest.raises(KeyError, match="outside its text of 23 characters"):
        shelf.restore(f"{key}:5-24")
    with pytest.raises(KeyError, match="outside its text"):
        shelf.restore(f"{key}:5-5")
    with pytest.raises(KeyError, match="is no id of a span"):
        shelf.restore(f"{key}:five")
    with pytest.raises(KeyError, match="is not known here"):
        shelf.restore("0123456789ab:0-1")


def test_a_shelf_forgets_the_one_asked_for_longest_ago() -> None:
    shelf = Shelf(most=2)
    shelf.put_text("a")
    shelf.put_text("b")
    shelf.restore(digest("a"))
    shelf.put_text("c")
    assert [shelf.restore(digest(text)) for text in "ac"] == ["a", "c"]
    with pytest.raises(KeyError, match="at most 2 texts are kept"):
        shelf.restore(digest("b"))


def test_a_shelf_lets_texts_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("fewer.compression.compressed.time.monotonic", lambda: now[0])
    shelf = Shelf(seconds=60)
    shelf.put_text("a")
    now[0] = 160
    assert shelf.restore(digest("a")) == "a"
    now[0] = 161
    with pytest.raises(KeyError, match="has expired: texts are kept 60 seconds"):
        shelf.restore(digest("a"))


def test_a_shelf_is_shared_by_threads() -> None:
    shelf, wrong = Shelf(most=50), []

    def work(first: int) -> None:
        for i in range(first, first + 200):
            shelf.put_text(str(i))
            try:
                if shelf.restore(digest(str(i))) != str(i):
                    wrong.append(i)
            except KeyError:
                pass  # others have filled the shelf

    threads = [threading.Thread(target=work, args=(k * 1000,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(shelf._texts) == 50


# -- answers in the words of the whole ---------------------------------------------------------------------------------
def test_an_answer_is_given_the_words_that_left() -> None:
    text = "The bridge was opened by Queen Mary of Scotland in 1561 . It fell in 1600 ."
    one = compressed(text, [])
    short = Compressed(one.source, one.plan, "bridge opened Queen Mary Scotland 1561 . fell 1600", 1, 1)
    assert short.recover("Queen Mary Scotland 1561") == "Queen Mary of Scotland in 1561"
    assert short.recover("It was Queen Mary Scotland") == "It was Queen Mary of Scotland"
    assert short.recover("nothing like it") == "nothing like it"
    assert short.recover("") == ""


# -- what must stay ----------------------------------------------------------------------------------------------------
def stays(text: str, kind: str) -> list[str]:
    return [text[a:b] for a, b in forced(text, [kind], [])]


def test_kinds_of_things_that_stay() -> None:
    assert stays("It cost 1,200.50 on 2024-05-06 at 12:30, not -3.", "digits") == [
        "1,200.50",
        "2024-05-06",
        "12:30",
        "-3",
    ]
    assert stays("I don't know; NEVER say cannot. A knot.", "negations") == ["don't", "NEVER", "cannot"]
    text = "call my_func() or camelCase in src/a/b.py, see https://x.io/y?z=1 by a.b@c.org; v2 os.path.join"
    assert stays(text, "identifiers") == [
        "my_func()", "camelCase", "src/a/b.py", "https://x.io/y?z=1", "a.b@c.org", "v2", "os.path.join"
    ]  # fmt: skip
    assert stays("use `x = 1` and\n```py\ncode here\n```\nend", "code") == ["`x = 1`", "```py\ncode here\n```"]


def test_words_that_stay_stand_alone_or_are_marks() -> None:
    text = "art, part: art."
    assert [text[a:b] for a, b in forced(text, [], ["art", "."])] == ["art", "art", "."]
    with pytest.raises(ValueError, match="force=''"):
        forced("x", [], [""])
    with pytest.raises(ValueError, match="protect=colour: choose of digits, negations, identifiers, code, json"):
        forced("x", ["colour"], [])


def test_of_json_all_stays_but_prose() -> None:
    text = 'see {"id": "ab-1", "note": "a long\\n story", "n": [1, true], "k v": null} and [1] but [x]'
    gone = "".join("." if any(a <= i < b for a, b in forced(text, ["json"], [])) else c for i, c in enumerate(text))
    assert gone.replace(".", "") == "see a long story and  but [x]"
    assert gone.count("a long") == 1


@given(data=st.data())
def test_json_without_its_prose_is_json(data: st.DataObject) -> None:
    words = st.lists(st.sampled_from(["the", "sea", "\n", '"', "\\", "é", "x1", "{", "]", ","]), max_size=5).map(
        " ".join
    )
    value = data.draw(st.recursive(words | st.integers() | st.none() | st.booleans(), lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)), max_leaves=8))  # fmt: skip
    text = json.dumps({"value": value}, ensure_ascii=data.draw(st.booleans()))
    source = Source.of([text], tokenizer("bpe"))
    must = source.within(forced(text, ["json"], []))
    some = [i for i in range(len(source)) if must[i] or data.draw(st.booleans())]
    cells = {source.cells[i] for i in some}
    short = composed(source, [i for i, cell in enumerate(source.cells) if cell in cells])
    json.loads(short)
    assert broken(text, short, (), ("json",)) == ""


def test_what_is_broken_is_told() -> None:
    assert broken("keep this", "keep", ["this"], ()) == "'this' must stay and is gone"
    assert broken("x", "y", ["this"], ()) == ""
    for after in ('{"a": 1', '{"a": 2}', '{"b": 1}', "", '{"a": 1} {"a": 1}'):
        assert broken('{"a": 1}', after, (), ["json"]) == "its JSON is another now", after
    assert broken('{"a": 1}', "", (), ()) == ""
    assert broken('{"a": "b c d"}', '{"a": "c"}', (), ["json"]) == ""
    assert broken("```\nx\n```", "```\nx", (), ()) == "a code fence is open"


@pytest.mark.parametrize("kind", PROTECTED)
@pytest.mark.parametrize(
    "unit", ["a", "a_", "a.", "a/", "1", "1-", "[", '{"a":', "`", "```\n", "```a\n", "a1", "aB", "@a"]
)
def test_hostile_texts_take_no_time(kind: str, unit: str) -> None:
    text, start = unit * 20_000, time.process_time()
    forced(text, [kind], [])
    assert time.process_time() - start < 2


def test_tokens_are_counted_without_those_that_a_model_wants_around() -> None:
    assert counted("the sea", tokenizer("wordpiece")) == 2
    assert counted("", tokenizer("bpe")) == 0
