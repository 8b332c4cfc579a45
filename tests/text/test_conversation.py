"""Conversations: what was sent stays as it was sent, what went comes back, and nothing is read twice."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewer.compression import Compressor, Conversation, ConversationError, Policy, PolicyError, Shelf, policies
from fewer.compression.forced import digits
from fewer.compression.memo import Memo
from fewer.compression.policy import written
from fewer.compression.structure import Strings, is_code, is_json, shape
from fewer.spec import SpecError
from talking import OTHER, REPORT, WORDS, compressor, talk, tiny

ALL = "tool=0.4,user=llmlingua:keep=0.6,least=20,assistant=selective_context:keep=0.7"
ROOT = Path(__file__).resolve().parents[2]


def conversation(given: Any = ALL, **more: Any) -> Conversation:
    return Conversation(given, compressor(), **more)


def one(text: str, policy: str = "tool=0.4,least=0", **more: Any) -> Any:
    """The only segment of a tool's answer."""
    return conversation(policy, **more)([{"role": "tool", "tool_call_id": "a", "content": text}]).segments[0]


class Reads:
    """Counts the tokens a model is given."""

    def __init__(self) -> None:
        self.calls = self.tokens = 0
        self._handle = tiny()[0].register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.calls += 1
        self.tokens += kwargs["input_ids"].numel()

    def __enter__(self) -> Reads:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


# -- policies ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("typed", "means"),
    [
        ("tool=0.4", {"tool": Policy("", 0.4)}),
        ("tool=whole,user=", {"tool": Policy(), "user": Policy("")}),
        ("tool=llmlingua:keep=0.4,segment=100,user=whole", {"tool": Policy("llmlingua:keep=0.4,segment=100"),
                                                            "user": Policy()}),
        ("tool=0.5,protect=none,least=9;assistant=random:tokens=40,protect=digits+code",
         {"tool": Policy("", 0.5, (), 9), "assistant": Policy("random:tokens=40", None, ("digits", "code"))}),
        (" system = 0.9 , tool = longllmlingua:keep=0.3 , asked = true ",
         {"system": Policy("", 0.9), "tool": Policy("longllmlingua:keep=0.3", asked=True)}),
        ("", {}),
    ],
)  # fmt: skip
def test_policies_are_typed_and_written(typed, means):
    assert policies(typed) == means
    assert policies(written(means)) == means


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ("0.4", "is of no role"), ("robot=0.4", "is of no role"), ("tool=0.4,tool=0.5", "given twice"),
        ("tool=1.5", "outside"), ("tool=0", "outside"), ("tool=nan", "outside"), ("tool=0.4,least=few", "whole number"),
        ("tool=0.4,protect=verbs", "choose of"), ("tool=0.4,asked=perhaps", "true or false"),
        ("tool=0.4,least=1,least=2", "given twice"), ("tool=0.4,user", "no method|unknown|no .*'0.4,user'"),
    ],
)  # fmt: skip
def test_policies_that_cannot_be_read(typed, complaint):
    with pytest.raises(ValueError, match=complaint):
        policies(typed)
    with pytest.raises(PolicyError):
        policies({"robot": "0.4"})


def test_a_method_is_refused_before_any_message():
    with pytest.raises(ValueError, match="inside a model"):
        conversation("tool=tome")
    with pytest.raises(SpecError):
        conversation("tool=llmlingua:kep=0.4")


# -- stable ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mark", [False, True])
def test_a_growing_conversation_begins_as_it_began(mark):
    """Byte for byte, for one that remembers and for one that never saw it before."""
    messages = talk(4)
    messages.insert(6, copy.deepcopy(messages[3]))  # the same text once more
    growing = conversation(mark=mark)
    sent = [json.dumps(growing(messages[:n]).messages)[:-1] for n in range(1, len(messages) + 1)]
    assert all(later.startswith(earlier) for earlier, later in pairwise(sent))
    for n in (1, 4, 7, len(messages)):
        assert json.dumps(conversation(mark=mark)(messages[:n]).messages)[:-1] == sent[n - 1]
    last = growing(messages)
    assert last.changed
    assert last.after < last.before
    twice = [s.text for s in last.segments if s.message in (3, 6)]
    assert twice[0] == twice[1] != messages[3]["content"]


def test_questions_of_the_past_alone_are_asked():
    """With `asked` a result depends on the question in front of it, and on none behind it."""
    asking = "tool=longllmlingua:keep=0.4,asked=true,least=0"
    messages = talk(3)
    growing = conversation(asking)
    sent = [json.dumps(growing(messages[:n]).messages)[:-1] for n in range(1, len(messages) + 1)]
    assert all(later.startswith(earlier) for earlier, later in pairwise(sent))
    other = copy.deepcopy(messages)
    other[1]["content"] = "How many crates of fish were counted on day 5?"
    first, second = conversation(asking)(messages).segments[2], conversation(asking)(other).segments[2]
    assert first.key == second.key != ""
    assert first.text != second.text
    assert second.after <= round(0.4 * second.before) + 2
    assert "crates of fish were counted on day 5?" not in second.text


def test_another_process_says_the_same():
    code = (
        "import json, sys; from talking import compressor, talk; from fewer.compression import Conversation; "
        f"print(json.dumps(Conversation({ALL!r}, compressor())(talk(2)).messages))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    there = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                       env=environment | {"PYTHONHASHSEED": str(seed)}).stdout
        for seed in (1, 2)
    ]  # fmt: skip
    assert there[0] == there[1]
    assert json.loads(there[0]) == conversation()(talk(2)).messages


# -- in time proportional to what is new -------------------------------------------------------------------------------
def test_only_what_is_new_is_read():
    new = []
    for turns in (1, 4, 12):
        messages, here = talk(turns), conversation()
        here(messages)
        with Reads() as again:
            here(messages)
        assert again.calls == 0
        with Reads() as reads:
            here([*messages, {"role": "tool", "tool_call_id": "x", "content": "Something new. " + OTHER}])
        new.append((reads.calls, reads.tokens))
    assert len(set(new)) == 1  # whatever stood before it
    assert new[0][0] >= 1


def test_remembered_reads_nothing():
    messages, here = talk(2), conversation()
    with Reads() as reads:
        assert here.remembered(messages) is None
        assert reads.calls == 0
        made = here(messages)
        calls = reads.calls
        again = here.remembered(messages)
        assert again is not None
        assert again.messages == made.messages
        assert reads.calls == calls > 0


def test_threads_that_ask_for_the_same_read_it_once():
    messages, here, other = talk(2), conversation(), conversation()
    with Reads() as alone:
        other(messages)
    gate = threading.Barrier(8)

    def run(_: int) -> list[Any]:
        gate.wait()
        return here(messages).messages

    with Reads() as together, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, range(8)))
    assert together.calls == alone.calls
    assert all(each == found[0] for each in found)


def test_memory_is_bounded_and_forgetting_changes_nothing():
    messages = talk(6)
    small, large = conversation(memory=5_000), conversation()
    for _ in range(2):
        assert small(messages).messages == large(messages).messages
    assert small.memo.held <= 5_000
    assert len(small.memo) < len(large.memo)


def test_memo_keeps_what_came_first_and_forgets_the_oldest():
    memo: Memo[str] = Memo(10)
    assert memo.put("a", "first", 5) == "first"
    assert memo.put("a", "second", 5) == "first"
    memo.put("b", "other", 5)
    assert memo.get("a") == "first"  # used again
    memo.put("c", "third", 5)
    assert memo.get("b") is None
    assert memo.get("a") == "first"
    with pytest.raises(KeyError):
        memo.made("d", lambda: {}["d"], len)
    assert memo.made("d", lambda: "now", len) == "now"  # a failure is not remembered


# -- gated -------------------------------------------------------------------------------------------------------------
def test_a_mark_longer_than_what_it_saves_is_not_set():
    text = " ".join(WORDS.split()[:30])
    assert one(text, "tool=0.9,least=0").key
    left = one(text, "tool=0.9,least=0", mark=True)
    assert left.text == text
    assert left.before == left.after
    assert "it has" in left.notes[0]


def test_forced_words_stay_and_where_they_fill_the_text_it_is_left():
    here = Conversation("tool=0.4,least=0", compressor(force=["harbour", "crates"]))
    short = here([{"role": "tool", "content": REPORT}]).segments[0]
    assert short.key
    assert short.text.count("harbour") == REPORT.count("harbour")
    left = here([{"role": "tool", "content": "crates " * 200}]).segments[0]
    assert not left.key
    assert "must stay" in left.notes[0]


def test_digits_stay_numbers_or_all_stays():
    for text in (REPORT, REPORT.replace(" crates", " crates,5 pears"), "3 apples,5 pears and " * 40):
        found = one(text, "tool=0.5,least=0,protect=digits")
        if found.key:
            assert [found.text[a:b] for a, b in digits(found.text)] == [text[a:b] for a, b in digits(text)]
        else:
            assert found.notes


FENCED = "See:\n\n```python\ndef f(x):\n    if x:\n        return 1\n\n    return 2\n```\n" + REPORT


def test_code_in_a_text_stays_with_its_indentation():
    found = one(FENCED)
    assert found.key
    assert FENCED[FENCED.index("```") : FENCED.rindex("```") + 3] + "\n" in found.text


def test_a_text_that_is_code_is_left_whole():
    source = Path(sys.modules["fewer.compression.memo"].__file__).read_text()
    assert is_code(source)
    found = one(source)
    assert not found.key
    assert found.notes == ("left as it was: it reads as code",)
    assert not is_code(REPORT.replace(". ", ".\n"))
    assert not is_code((ROOT / "README.md").read_text())
    assert one(source, "tool=0.4,least=0,protect=none").key


def test_what_fails_is_left_whole_once_and_for_all_and_does_not_tell_what_it_said(monkeypatch):
    here = conversation("tool=0.4")
    calls = []

    def fails(self, *given, **more):
        calls.append(1)
        raise RuntimeError(f"no room for {REPORT[:40]}")

    with monkeypatch.context() as patch:
        patch.setattr("fewer.compression.compressor.Compressor.__call__", fails)
        found = here([{"role": "tool", "content": REPORT}])
        assert found.messages == [{"role": "tool", "content": REPORT}]
        assert found.notes == ["message 0 (tool): left as it was: it could not be shortened (RuntimeError)"]
    assert len(calls) == 1
    assert not here([{"role": "tool", "content": REPORT}]).changed  # it was sent whole, so it stays whole


def test_left_whole_stays_whole():
    here, messages = conversation(), talk(2)
    here(messages[:4])
    with Reads() as reads:
        left = here.leave(messages, "too busy")
        again = here(messages)
    assert reads.calls == 0
    assert left.messages == again.messages
    assert left.messages[3] != messages[3]  # known before
    assert left.messages[4:] == messages[4:]
    assert any("too busy" in note for note in left.notes)


# -- JSON --------------------------------------------------------------------------------------------------------------
RESULT = {"id": "x-12", "n": 3, "price": 1.50, "ok": True, "none": None, "pages": [{"body": REPORT, "url": "a/b"},
          {"body": OTHER, "tags": ["fish", "sea"]}], "é": "ü " * 20}  # fmt: skip


def bare(value: Any) -> Any:
    return "" if isinstance(value, str) else (
        {k: bare(v) for k, v in value.items()} if isinstance(value, dict)
        else [bare(v) for v in value] if isinstance(value, list) else value
    )  # fmt: skip


@pytest.mark.parametrize("mark", [False, True])
@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"ensure_ascii": False}])
def test_json_keeps_keys_numbers_and_structure(options, mark):
    text = json.dumps(RESULT, **options)
    found = one(text, mark=mark)
    assert found.key
    assert found.after < 0.6 * found.before
    short = json.loads(found.text)
    assert bare(short) == bare(RESULT)
    assert list(short) == list(RESULT)
    assert [short["id"], short["pages"][0]["url"], short["pages"][1]["tags"]] == ["x-12", "a/b", ["fish", "sea"]]
    for page, was in zip(short["pages"], RESULT["pages"], strict=True):
        words, left = iter(was["body"].split()), page["body"].split(" [shortened")[0].split()
        assert len(left) < len(was["body"].split())
        assert all(word in words for word in left)  # whole words, in their order
    assert ("[shortened" in found.text) == mark


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30)
        | st.lists(st.sampled_from([*WORDS.split(), "\n", '"', "\\", "é", "\u4e2d\u6587", "\U0001f41f"]),
                   max_size=40).map(" ".join),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=10,
    ),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_keeps_its_shape(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    found = one(text)
    assert found.before >= found.after
    if is_json(text):
        assert bare(json.loads(found.text)) == bare(value)


def test_json_as_it_is_written_stays_so():
    text = '{"a": 1.50e+3,  "a": 12345678901234567890.10, "b":"' + " ".join(WORDS.split()) + '"\n, "c": [ ] }'
    found = one(text)
    assert found.key
    assert found.text.startswith('{"a": 1.50e+3,  "a": 12345678901234567890.10, "b":"')
    assert found.text.endswith('"\n, "c": [ ] }')


def test_json_that_would_break_is_left(monkeypatch):
    text = json.dumps(RESULT)
    monkeypatch.setattr(Strings, "shortened", lambda self, *_: (self.source.replace('"n": 3', '"n": 4'), [(0, 5)]))
    found = one(text)
    assert found.text == text
    assert "JSON would not hold" in found.notes[0]


def test_shapes_tell_jsons_apart():
    assert shape('{"a": 1, "b": "x"}') == shape('{"a":1,"b":""}')
    for other in ('{"a": 1.0, "b": ""}', '{"b": "", "a": 1}', '{"a": 1, "b": null}', '[["a", 1], ["b", ""]]', "{"):
        assert shape(other) != shape('{"a": 1, "b": ""}')
    deep = "[" * 100_000 + "]" * 100_000
    with pytest.raises(RecursionError):
        shape(deep)
    found = one(deep)
    assert found.text == deep
    assert "RecursionError" in found.notes[0]


# -- reversible --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", [REPORT, FENCED])
def test_what_went_comes_back_by_its_id(text):
    here = conversation("tool=0.4")
    found = here([{"role": "tool", "content": text}]).segments[0]
    assert found.dropped
    for name in found.dropped:
        start, stop = map(int, name.partition(":")[2].split("-"))
        assert here.restore(name) == text[start:stop]
    assert here.restore(found.key) == text
    gone = sum(len(here.restore(name)) for name in found.dropped)
    assert len(text) - gone <= len(found.text) + text.count("\n") + 1  # what stays is in what is sent


def test_what_went_of_json_comes_back():
    here = conversation("tool=0.4")
    text = json.dumps(RESULT)
    found = here([{"role": "tool", "content": text}]).segments[0]
    pieces = [here.restore(name) for name in found.dropped]
    assert pieces
    assert all(any(piece in value for value in (REPORT, OTHER, RESULT["é"])) for piece in pieces)
    assert here.restore(found.key) == text


def test_a_tool_restores_and_what_it_gives_is_not_shortened_again():
    here = conversation("tool=0.4", mark=True)
    messages = talk(1)
    short = here(messages)
    mark = short.messages[3]["content"].rpartition("restore ")[2].rstrip("]")
    assert mark == short.segments[2].key
    assert here.tool["function"]["name"] == "restore"
    call = {"id": "c9", "type": "function", "function": {"name": "restore", "arguments": json.dumps({"id": mark})}}
    answer = here.answer(call["function"]["arguments"])
    assert answer == messages[3]["content"]
    longer = [*messages, {"role": "assistant", "content": None, "tool_calls": [call]},
              {"role": "tool", "tool_call_id": "c9", "content": answer}]  # fmt: skip
    sent = here(longer).messages
    assert sent[-1] == longer[-1]
    assert sent[:5] == short.messages


def test_ids_that_are_unknown_or_expired_are_answered_clearly():
    here = conversation("tool=0.4", shelf=Shelf(seconds=-1.0))
    key = here([{"role": "tool", "content": REPORT}]).segments[0].key
    assert "expired" in here.answer({"id": key})
    assert "not known" in here.answer('{"id": "0123456789ab"}')
    assert "no id of a span" in here.answer({"id": "0123456789ab:x"})
    for wrong in ("", "[]", "{", '{"id": 3}', '{"name": "x"}', '"x"', "null"):
        assert "Call this with the id" in here.answer(wrong)
    with pytest.raises(KeyError, match="not known"):
        here.restore("0123456789ab")


# -- messages ----------------------------------------------------------------------------------------------------------
def test_nothing_but_texts_is_touched_and_nothing_of_the_callers():
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
    sound = {"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}}
    cached = {"type": "text", "text": REPORT, "cache_control": {"type": "ephemeral"}}
    messages = [
        *talk(1), {"role": "user", "name": "ada", "content": [picture, cached, sound, {"type": "text", "text": ""}]},
        {"role": "assistant", "content": None, "refusal": "no", "unheard_of": {"x": [1]}, "reasoning_content": OTHER},
        {"role": "developer", "content": OTHER}, {"role": "function", "name": "look", "content": OTHER},
        {"role": "user", "content": ""}, {"role": "robot", "content": REPORT}, {"role": "tool", "content": [REPORT]},
    ]  # fmt: skip
    before = copy.deepcopy(messages)
    found = conversation(ALL + ",system=0.5")(messages)
    assert messages == before
    sent = found.messages
    assert len(sent) == len(messages)
    assert sent[5]["content"][0] is picture
    assert sent[5]["content"][2] is sound
    assert len(sent[5]["content"][1]["text"]) < len(REPORT)
    assert sent[5]["content"][1]["cache_control"] == {"type": "ephemeral"}
    assert sent[6] == messages[6]
    assert len(sent[7]["content"]) < len(OTHER)
    assert len(sent[8]["content"]) < len(OTHER)
    assert sent[9:] == messages[9:]
    assert sent[2]["tool_calls"] == messages[2]["tool_calls"]
    assert [set(a) for a in sent] == [set(b) for b in messages]
    assert found.before == sum(s.before for s in found.segments) > found.after


def test_messages_that_are_none():
    here = conversation()
    assert here([]).messages == []
    assert here(["hello", None, 3, {}, {"role": None, "content": 3}]).messages == [
        "hello", None, 3, {}, {"role": None, "content": 3},
    ]  # fmt: skip
    for wrong in ("hello", {"role": "user"}, None):
        with pytest.raises(ConversationError, match="list"):
            here(wrong)


@pytest.mark.parametrize(
    "text", ["\ud800 " * 90, "\U0001f600" * 300, "\u4e2d\u6587" * 300, " \n" * 400, "\x00" * 200, "a" * 20_000]
)
def test_odd_texts_are_shortened_or_left(text):
    found = one(text)
    assert found.after <= found.before
    assert found.key or found.text == text


def test_short_messages_are_left_alone_without_a_note():
    found = one(WORDS, "tool=0.4,least=1000")
    assert (found.text, found.notes, found.key) == (WORDS, (), "")


def test_a_template_without_a_system_role_is_no_problem():
    model, tokenizer = tiny()
    strict = copy.deepcopy(tokenizer)
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    strict.chat_template = refuse + "{{ messages[0].content }}"
    here = Conversation("system=0.5,user=0.5", Compressor("llmlingua", model, strict))
    found = here([{"role": "system", "content": REPORT}, {"role": "user", "content": OTHER}])
    assert [bool(s.key) for s in found.segments] == [True, True]
