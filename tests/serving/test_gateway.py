"""The gateway over real sockets, in front of an endpoint that misbehaves in every way."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

httpx = pytest.importorskip("httpx", reason="needs the extra: pip install 'fewer[serve]'")
pytest.importorskip("fastapi", reason="needs the extra: pip install 'fewer[serve]'")
pytest.importorskip("uvicorn", reason="needs the extra: pip install 'fewer[serve]'")

from typer.testing import CliRunner  # noqa: E402

from fewer.cli import app  # noqa: E402
from fewer.compression import Conversation, Shelf  # noqa: E402
from fewer.serving.gateway import gateway  # noqa: E402
from fewer.serving.settings import Settings  # noqa: E402
from serving.upstream import Upstream, running  # noqa: E402
from talking import OTHER, REPORT, WORDS, compressor, talk  # noqa: E402

CHAT = "/v1/chat/completions"
ROOT = Path(__file__).resolve().parents[2]
KEY = {"authorization": "Bearer sk-very-secret-key"}


class Between:
    """A gateway in front of an upstream. url: the gateway's. address: the upstream's."""

    def __init__(self, url: str, address: str, upstream: Upstream, conversation: Conversation) -> None:
        self.url, self.address, self.upstream, self.conversation = url, address, upstream, conversation
        self.client = httpx.Client(base_url=url, timeout=30, headers=KEY)

    def chat(self, messages: Any, **more: Any) -> Any:
        return self.client.post(CHAT, json={"model": "m", "messages": messages, **more})

    def count(self, name: str) -> float:
        """A number of /metrics, the sum over labels that begin as given."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"fewer_{name}"))

    @property
    def sent(self) -> Any:
        return json.loads(self.upstream.seen[-1]["raw"])


@contextmanager
def between(policy: str = "tool=0.4", *, shelf: Shelf | None = None, upstream: str = "", **settings: Any
            ) -> Iterator[Between]:  # fmt: skip
    there = Upstream()
    conversation = Conversation(policy, compressor(), shelf=shelf)
    with (
        running(there) as url,
        running(gateway(conversation, Settings(upstream or url, **settings)), server_header=False,
                date_header=False) as own,
    ):  # fmt: skip
        found = Between(own, url, there, conversation)
        with found.client:
            yield found


@pytest.fixture(scope="module")
def gate() -> Iterator[Between]:
    with between() as found:
        yield found


def until(said: Any, seconds: float = 10.0) -> None:
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)


# -- what goes up, what comes down -------------------------------------------------------------------------------------
def test_a_chat_goes_up_shorter_and_says_by_how_much(gate):
    messages = talk(2)
    before = gate.count("tokens_saved_total")
    answer = gate.chat(messages, temperature=0.3)
    short = gate.conversation(messages)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "You said: " + messages[-1]["content"]
    assert gate.sent == {"model": "m", "messages": short.messages, "temperature": 0.3}
    assert short.changed
    told = [int(answer.headers[f"x-fewer-tokens-{name}"]) for name in ("before", "after", "saved")]
    assert told == [short.before, short.after, short.before - short.after]
    assert gate.count("tokens_saved_total") - before == told[2]
    assert answer.headers["x-request-id"] == "r1"
    assert answer.headers.get_list("set-cookie") == ["a=1"]


def test_all_but_the_messages_goes_up_byte_for_byte(gate):
    """Spelling of numbers, order and spaces, fields nobody knows, tools; also messages that are not shortened."""
    tool = json.dumps(REPORT)
    raw = (
        '{ "seed":1.50e+2,\n "messages" : [ {"role":"user","content":"h\\u00e9",  "x":1.0e0} , {"role":"tool",'
        f'"tool_call_id":"a","content":{tool}}} ],"tools":[{{"type":"function","function":{{"name":"messages"}}}}],'
        '"unheard_of":{"a":[1.10,12345678901234567890123]}, "n":1 }'
    )
    answer = gate.client.post(CHAT, content=raw, headers={"content-type": "application/json", "x-mine": "yes"})
    assert answer.status_code == 200
    sent = gate.upstream.seen[-1]["raw"].decode()
    at = raw.index('{"role":"tool"')
    assert sent[:at] == raw[:at]
    tail = raw[raw.index(' ],"tools"') :]
    assert sent.endswith(tail)
    assert len(sent) < len(raw)
    assert json.loads(sent)["messages"][1].keys() == {"role", "tool_call_id", "content"}
    headers = dict(gate.upstream.seen[-1]["headers"])
    assert headers[b"x-mine"] == b"yes"
    assert headers[b"authorization"] == KEY["authorization"].encode()
    assert headers[b"host"].decode() == urlsplit(gate.address).netloc
    assert b"accept-encoding" in headers  # httpx, the client here, names it; nothing is added on the way
    assert {name.decode() for name in headers} == {*answer.request.headers} - {"connection"}


def test_a_growing_chat_goes_up_as_it_began(gate):
    messages = talk(4)
    sent = []
    for n in (5, 9, 13, 17):
        gate.chat(messages[:n])
        sent.append(json.dumps(gate.sent["messages"])[:-1])
    assert all(later.startswith(earlier) for earlier, later in pairwise(sent))
    assert len(sent[-1]) < len(json.dumps(messages))


def test_answers_are_streamed_as_they_come(gate):
    with gate.client.stream("POST", CHAT, json={"messages": talk(1), "stream": True, "behave": "drip"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert int(answer.headers["x-fewer-tokens-saved"]) > 0
        began, times = time.monotonic(), []
        for line in answer.iter_lines():
            if line:
                times.append(time.monotonic() - began)
            if len(times) == 8:
                break
    assert times[-1] - times[0] > 0.2  # 50 ms apart, not all at once
    whole = gate.chat([{"role": "user", "content": WORDS}], stream=True)
    pieces = [json.loads(line[6:]) for line in whole.text.split("\n\n") if line.startswith("data: {")]
    assert "".join(p["choices"][0]["delta"]["content"] for p in pieces).split() == WORDS.split()
    assert whole.text.endswith("data: [DONE]\n\n")


def test_other_paths_go_through_as_they_are(gate):
    answer = gate.client.get("/v1/models?limit=3&after=%2Fa")
    assert answer.status_code == 200
    seen = gate.upstream.seen[-1]
    assert (seen["method"], seen["path"], seen["query"], seen["raw"]) == (
        "GET",
        "/v1/models",
        "limit=3&after=%2Fa",
        b"",
    )
    raw = bytes(range(256)) * 40
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert gate.client.request(method, "/v1/files/a%20b", content=raw).status_code == 200
        assert gate.upstream.seen[-1]["method"] == method
        assert gate.upstream.seen[-1]["path"] == "/v1/files/a%20b"
        assert gate.upstream.seen[-1]["raw"] == raw
    assert "x-fewer-tokens-before" not in answer.headers
    n = len(gate.upstream.seen)
    for path in ("/", "/admin", "/v1/%2e%2e/admin", "/v2/models"):
        assert gate.client.get(path).status_code == 404
    assert len(gate.upstream.seen) == n


def test_where_the_upstream_has_a_path():
    assert Settings("https://a.b").target("/v1/models") == "https://a.b/v1/models"
    assert Settings("https://a.b/").target("/v1/models", "x=1") == "https://a.b/v1/models?x=1"
    assert Settings("https://a.b/v1").target("/v1/models") == "https://a.b/v1/models"
    assert Settings("https://a.b/beta/openai/").target("/v1/models") == "https://a.b/beta/openai/models"
    for wrong in ("", "a.b", "ftp://a.b", "https://", "https://user:key@a.b", "https://a.b/v1?key=1"):
        with pytest.raises(ValueError, match="--upstream"):
            Settings(wrong)
    for wrong in ({"patience": 0}, {"workers": 0}, {"read": float("nan")}):
        with pytest.raises(ValueError, match="more than 0"):
            Settings("https://a.b", **wrong)


# -- bodies that are none ----------------------------------------------------------------------------------------------
LONG = [{"role": "tool", "tool_call_id": "a", "content": REPORT}]


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "not JSON"), (b"hello", "not JSON"), (b"[1]", "not JSON"), (b'{"messages": [', "not JSON"),
        (b'{"a": NaN, "messages": []}', "not JSON"), (b"{}", "no messages"), (b'{"messages": "x"}', "no list"),
        (b'{"messages": [], "messages": []}', "twice"), (b"\xff\xfe", "UTF-8"), (b'{"messages": []} x', "not JSON"),
        (b'{"messages":' + b"[" * 200_000, "not JSON"),
        (b'{"x": 1e999, "messages": [{"role": "tool", "n": 1e999, "content": ' + json.dumps(REPORT).encode() + b"}]}",
         "ValueError"),
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_read_goes_up_as_it_came(gate, raw, why):
    answer = gate.client.post(CHAT, content=raw)
    assert gate.upstream.seen[-1]["raw"] == raw
    assert why in answer.headers["x-fewer-notes"]


def test_a_body_that_is_compressed_already_goes_up_as_it_came(gate):
    raw = gzip.compress(json.dumps({"messages": LONG}).encode())
    answer = gate.client.post(CHAT, content=raw, headers={"content-encoding": "gzip"})
    assert gate.upstream.seen[-1]["raw"] == raw
    assert "compressed already" in answer.headers["x-fewer-notes"]


def test_a_chat_that_needs_nothing_goes_up_as_it_came(gate):
    raw = b'{"messages":[ {"role":"user","content":"hello"}, 3, {"role": "tool", "content": null} ]}'
    answer = gate.client.post(CHAT, content=raw)
    assert gate.upstream.seen[-1]["raw"] == raw
    assert answer.headers["x-fewer-tokens-saved"] == "0"
    assert "x-fewer-notes" not in answer.headers


def test_bodies_that_are_too_large_are_refused():
    with between(most_bytes=10_000) as gate:
        answer = gate.client.post(CHAT, content=b"x" * 10_001)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"

        def pieces() -> Iterator[bytes]:  # no length is said
            for _ in range(20):
                yield b"x" * 1_000

        assert gate.client.post(CHAT, content=pieces()).status_code == 413
        assert gate.client.post("/v1/files", content=b"x" * 10_001).status_code == 413
        assert gate.upstream.seen == []
        assert gate.client.post(CHAT, content=b"x" * 10_000).status_code == 200


# -- an upstream that fails --------------------------------------------------------------------------------------------
def test_too_many_requests_are_told_as_they_are(gate):
    answer = gate.chat(LONG, behave="limited")
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "7"
    assert answer.headers["x-ratelimit-remaining"] == "0"
    assert answer.json()["error"]["code"] == "rate_limit"
    assert int(answer.headers["x-fewer-tokens-saved"]) > 0


def test_answers_that_are_no_json_come_down_as_they_are(gate):
    page = gate.chat(LONG, behave="page")
    assert (page.status_code, page.text, page.headers["content-type"]) == (502, "<html>Bad Gateway</html>", "text/html")
    odd = gate.chat(LONG, behave="nonsense")
    assert (odd.status_code, odd.content) == (200, b"\xff\xfe{{{")
    assert "x-mine" not in odd.headers  # named by the upstream's connection header: between neighbours
    assert "not ours" not in odd.headers.get("x-fewer-notes", "")
    elsewhere = gate.chat(LONG, behave="redirect")
    assert elsewhere.status_code == 307  # keys are not carried to other hosts
    assert elsewhere.headers["location"] == "https://elsewhere.example/v1"


def test_an_upstream_that_is_not_there():
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        with between(upstream=f"http://127.0.0.1:{taken.getsockname()[1]}") as gate:
            answer = gate.chat(LONG)
            assert answer.status_code == 502
            assert "could not be reached" in answer.json()["error"]["message"]
            assert int(answer.headers["x-fewer-tokens-saved"]) > 0
            assert gate.count('upstream_errors_total{kind="connect"}') == 1
            assert gate.count('requests_total{route="chat",status="502"}') == 1


def test_an_upstream_that_does_not_answer():
    with between(read=0.3, connections=1, connect=0.3) as gate:
        answer = gate.chat(LONG, behave="never")
        assert answer.status_code == 504
        assert "in time" in answer.json()["error"]["message"]
        until(lambda: gate.upstream.cancelled == 1)
        stuck = gate.chat([{"role": "user", "content": WORDS}], behave="stuck", stream=True)
        events = stuck.text.rstrip("\n").split("\n\n")
        assert len(events) == 3
        assert json.loads(events[-1][6:])["error"]["code"] == "upstream_error"
        assert "[DONE]" not in stuck.text
        assert gate.count('upstream_errors_total{kind="timeout"}') == 2


def test_no_connection_free():
    with between(connections=1, connect=0.3) as gate, gate.client.stream(
        "POST", CHAT, json={"messages": talk(1), "behave": "drip", "stream": True}
    ) as first:  # fmt: skip
        lines = first.iter_lines()
        assert next(lines)
        answer = gate.chat(LONG)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"


def test_a_stream_that_breaks_off_ends_in_whole_events_and_an_error(gate):
    answer = gate.chat([{"role": "user", "content": WORDS}], behave="torn", stream=True)
    events = answer.text.rstrip("\n").split("\n\n")
    assert [set(json.loads(event[6:])) for event in events] == [{"id", "object", "created", "model", "choices"}] * 2 + [
        {"error"}
    ]
    assert "broke off" in json.loads(events[-1][6:])["error"]["message"]


def test_a_part_of_an_answer_is_not_taken_for_the_whole(gate):
    with pytest.raises(httpx.RemoteProtocolError):
        gate.chat(LONG, behave="short")
    assert gate.chat(LONG).status_code == 200


# -- clients that leave ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("behave", ["never", "drip"])
def test_a_client_that_leaves_is_not_answered_any_more_upstream(gate, behave):
    before, left = gate.upstream.cancelled, gate.count("disconnects_total")
    parts = urlsplit(gate.url)
    with socket.create_connection((parts.hostname, parts.port)) as client:
        raw = json.dumps({"messages": talk(1), "behave": behave, "stream": True}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n"
        client.sendall(head.encode() + raw)
        if behave == "drip":
            assert client.recv(100)
        else:
            until(lambda: gate.upstream.open == 1)
    until(lambda: gate.upstream.cancelled == before + 1)
    until(lambda: gate.upstream.open == 0)
    until(lambda: gate.count("disconnects_total") == left + 1)
    assert gate.count("in_flight") == 0


def test_a_client_that_has_its_answer_has_not_left(gate, caplog):
    left = gate.count("disconnects_total")
    with caplog.at_level(logging.INFO, "fewer.serving"):
        for stream in (False, True) * 5:
            httpx.post(gate.url + CHAT, json={"messages": LONG, "stream": stream})  # a connection of its own each time
        httpx.post(gate.url + CHAT, json={"messages": LONG, "behave": "torn"})
        until(lambda: gate.count("in_flight") == 0)
    assert gate.count("disconnects_total") == left
    assert "left" not in caplog.text


def test_a_client_that_leaves_while_it_sends(gate):
    n, left = len(gate.upstream.seen), gate.count("disconnects_total")
    parts = urlsplit(gate.url)
    with socket.create_connection((parts.hostname, parts.port)) as client:
        client.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{{".encode())
        time.sleep(0.1)
    until(lambda: gate.count("disconnects_total") == left + 1)
    assert len(gate.upstream.seen) == n


# -- when shortening fails ---------------------------------------------------------------------------------------------
def test_a_text_that_cannot_be_shortened_goes_up_whole_with_a_note(gate, monkeypatch):
    def fails(self, *given, **more):
        raise RuntimeError(f"out of memory at {REPORT}")

    messages = [{"role": "tool", "content": "fails: " + REPORT}]
    with monkeypatch.context() as patch:
        patch.setattr("fewer.compression.compressor.Compressor.__call__", fails)
        answer = gate.chat(messages)
    assert gate.sent["messages"] == messages
    assert "could not be shortened (RuntimeError)" in answer.headers["x-fewer-notes"]
    assert "Day" not in answer.headers["x-fewer-notes"]
    assert gate.chat(messages).status_code == 200
    assert gate.sent["messages"] == messages


def test_a_fault_of_the_whole_costs_nobody_an_answer(gate, monkeypatch):
    before = gate.count('went_whole_total{reason="fault"}')
    monkeypatch.setattr(Conversation, "remembered", lambda *_: 1 / 0)
    answer = gate.chat(LONG)
    assert answer.status_code == 200
    assert gate.sent["messages"] == LONG
    assert "ZeroDivisionError" in answer.headers["x-fewer-notes"]
    assert gate.count('went_whole_total{reason="fault"}') == before + 1


def test_what_takes_too_long_goes_up_whole_and_stays_whole(monkeypatch):
    with between(patience=0.3) as gate:
        read = Conversation._read
        monkeypatch.setattr(Conversation, "_read", lambda *given: (time.sleep(1.5), read(*given))[1])
        slow = [{"role": "tool", "content": REPORT}]
        answer = gate.chat(slow)
        assert gate.sent["messages"] == slow
        assert "no time" in answer.headers["x-fewer-notes"]
        assert gate.count('went_whole_total{reason="patience"}') == 1
        time.sleep(1.6)  # the reader has come to its end, too late
        assert gate.chat(slow).status_code == 200
        assert gate.sent["messages"] == slow
        monkeypatch.setattr(Conversation, "_read", read)
        gate.chat([{"role": "tool", "content": OTHER}])
        assert len(gate.sent["messages"][0]["content"]) < len(OTHER)


def test_reading_does_not_hold_up_who_needs_none(gate, monkeypatch):
    """While one text is read, requests that are remembered, streams and metrics go on."""
    known = [{"role": "tool", "content": "known: " + REPORT}]
    gate.chat(known)
    read = Conversation._read
    monkeypatch.setattr(Conversation, "_read", lambda *given: (time.sleep(2.0), read(*given))[1])

    async def run() -> list[float]:
        async with httpx.AsyncClient(base_url=gate.url, timeout=30) as client:
            began = time.monotonic()

            async def timed(call: Any) -> float:
                assert (await call).status_code == 200
                return time.monotonic() - began

            slow = asyncio.ensure_future(timed(client.post(CHAT, json={"messages": [
                {"role": "tool", "content": "new: " + OTHER}]})))  # fmt: skip
            await asyncio.sleep(0.2)
            quick = await asyncio.gather(
                *(timed(client.post(CHAT, json={"messages": known})) for _ in range(5)),
                timed(client.get("/health")), timed(client.get("/metrics")), timed(client.get("/v1/models")),
            )  # fmt: skip
            return [max(quick), await slow]

    quick, slow = asyncio.run(run())
    assert quick < 1.5 < 2.0 <= slow


# -- many at once ------------------------------------------------------------------------------------------------------
def test_a_hundred_at_once_are_all_answered_right(gate):
    """Each gets its own answer, streamed or not; what goes up is what goes up when it is alone."""
    chats = []
    for i in range(100):
        messages = [*talk(1), {"role": "tool", "tool_call_id": "x", "content": f"{i % 10}. {OTHER}"},
                    {"role": "user", "content": f"number {i} of all, {WORDS}"}]  # fmt: skip
        chats.append({"model": "m", "messages": messages, "behave": ("slowly", "stream", "answer")[i % 3], "n": i})

    async def run() -> list[Any]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=gate.url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(client.post(CHAT, json=chat) for chat in chats))

    at = len(gate.upstream.seen)
    answers = asyncio.run(run())
    assert [answer.status_code for answer in answers] == [200] * 100
    for i, (chat, answer) in enumerate(zip(chats, answers, strict=True)):
        last = chat["messages"][-1]["content"]
        if chat["behave"] == "stream":
            pieces = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
            assert "".join(p["choices"][0]["delta"]["content"] for p in pieces).split() == last.split()
        else:
            assert answer.json()["choices"][0]["message"]["content"] == f"You said: {last}"
        assert f"number {i} " in last
    sent = {body["n"]: body["messages"] for body in (json.loads(seen["raw"]) for seen in gate.upstream.seen[at:])}
    alone = Conversation("tool=0.4", compressor())
    for i in (0, 37, 99):
        assert sent[i] == alone(chats[i]["messages"]).messages
    assert len(sent) == 100
    assert gate.count("in_flight") == 0


# -- spans, metrics, health --------------------------------------------------------------------------------------------
def test_spans_come_back_to_those_who_sent_them():
    with between(shelf=Shelf(most=2)) as gate:
        gate.chat(LONG)
        segment = gate.conversation(LONG).segments[0]
        for name in segment.dropped[:3]:
            start, stop = map(int, name.partition(":")[2].split("-"))
            answer = gate.client.get(f"/v1/fewer/spans/{name}")
            assert answer.json() == {"id": name, "text": REPORT[start:stop]}
        assert gate.client.get(f"/v1/fewer/spans/{segment.key}").json()["text"] == REPORT
        other = gate.client.get(f"/v1/fewer/spans/{segment.key}", headers={"authorization": "Bearer sk-other"})
        unknown = gate.client.get("/v1/fewer/spans/0123456789ab:0-3")
        assert other.status_code == unknown.status_code == 404
        assert "not known here, or not yours" in other.json()["error"]["message"]
        assert unknown.json()["error"]["code"] == "span_not_found"
        odd = gate.client.get(f"/v1/fewer/spans/{segment.key}:nine")
        assert "no id of a span" in odd.json()["error"]["message"]
        for text in ("a " + OTHER, "b " + OTHER):
            gate.chat([{"role": "tool", "content": text}])
        gone = gate.client.get(f"/v1/fewer/spans/{segment.key}")
        assert gone.status_code == 404
        assert "at most 2 texts are kept" in gone.json()["error"]["message"]
        assert gate.count('spans_total{found="yes"}') == 4
        assert gate.count('spans_total{found="no"}') == 4
        assert gate.client.get("/v1/fewer/tool").json()["function"]["name"] == "restore"
        assert gate.upstream.seen[-1]["path"] == CHAT


def test_spans_that_have_expired_are_said_to_have():
    with between(shelf=Shelf(seconds=0.2)) as gate:
        gate.chat(LONG)
        key = gate.conversation(LONG).segments[0].key
        time.sleep(0.3)
        answer = gate.client.get(f"/v1/fewer/spans/{key}")
        assert answer.status_code == 404
        assert "expired" in answer.json()["error"]["message"]
        gate.chat(LONG)  # sent again, kept again, though nothing is read again
        assert gate.client.get(f"/v1/fewer/spans/{key}").json()["text"] == REPORT


def test_metrics_are_as_prometheus_reads_them(gate):
    gate.chat(LONG)
    answer = gate.client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    names, buckets = set(), []
    for line in answer.text.splitlines():
        if line.startswith("#"):
            assert line.split()[1] in ("HELP", "TYPE")
            names.add(line.split()[2])
            continue
        name, value = line.rsplit(" ", 1)
        float(value)
        plain = name.partition("{")[0]
        assert any(plain == known or plain.startswith(known + "_") for known in names)
        if name.startswith("fewer_shorten_seconds_bucket"):
            buckets.append(float(value))
    assert buckets == sorted(buckets)
    assert buckets[-1] == gate.count("shorten_seconds_count") > 0
    assert gate.count("tokens_before_total") == gate.count("tokens_after_total") + gate.count("tokens_saved_total")


def test_health(gate):
    assert gate.client.get("/health").json() | {"version": ""} == {
        "status": "ok",
        "version": "",
        "policies": "tool=0.4",
    }


# -- nothing is told ---------------------------------------------------------------------------------------------------
def test_neither_keys_nor_prompts_are_logged(gate, caplog, capfd, monkeypatch):
    secret = "the-password-is-swordfish"
    messages = [{"role": "tool", "content": f"{secret} {OTHER}"}, {"role": "user", "content": f"{secret}?"}]
    with caplog.at_level(logging.DEBUG):
        for behave in ("answer", "stream", "torn", "limited", "page"):
            gate.client.post(f"{CHAT}?key=sk-in-a-query", json={"messages": messages, "behave": behave})
        with monkeypatch.context() as patch:
            patch.setattr(Conversation, "remembered", lambda self, given: {}[given[0]["content"]])
            gate.chat(messages)
        gate.client.post(CHAT, content=f'{{"messages": "{secret}')
    logged = "\n".join(r.getMessage() for r in caplog.records if r.name.partition(".")[0] != "httpx") + repr(
        [r.exc_info for r in caplog.records if r.exc_info and r.name.startswith("fewer")]
    )
    logged += "".join(capfd.readouterr()) + gate.client.get("/metrics").text
    assert "chat 200" in logged
    assert "KeyError" in logged
    for word in ("swordfish", "sk-very-secret", "sk-in-a-query"):
        assert word not in logged


# -- the command -------------------------------------------------------------------------------------------------------
def serve(*options: str, **environment: str) -> Any:
    return subprocess.Popen(
        [sys.executable, "-m", "fewer.cli", "serve", *options], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src"), **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--upstream", "nowhere"], "is no address"),
        (["--upstream", "http://a.b", "--policy", "robot=0.4"], "is of no role"),
        (["--upstream", "http://a.b", "--policy", "tool=llmlingua:kep=1"], "has no parameter 'kep'"),
        (["--upstream", "http://a.b", "--max-body", "0"], "more than 0"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(options, said):
    ran = CliRunner().invoke(app, ["serve", *options])
    assert ran.exit_code == 2
    assert said in " ".join(ran.output.split())


def test_without_the_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    ran = CliRunner().invoke(app, ["serve", "--upstream", "http://a.b"])
    assert ran.exit_code == 2
    assert "pip install 'fewer[serve]'" in " ".join(ran.output.split())


@pytest.mark.slow
def test_a_gateway_that_is_stopped_lets_requests_end(tmp_path):
    """SIGTERM while a request is on its way: it is answered, then the process ends with 0."""
    model, tokenizer = compressor().model, compressor().tokenizer
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    there = Upstream()
    with running(there) as url:
        process = serve("--upstream", url, "--model", str(tmp_path), "--port", str(port))
        try:

            def up() -> bool:
                assert process.poll() is None, process.stderr.read()
                try:
                    return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
                except httpx.TransportError:
                    return False

            until(up, 120)

            async def run() -> Any:
                async with httpx.AsyncClient(timeout=30) as client:
                    chat = {"messages": LONG, "behave": "slowly", "seconds": 1.5}
                    answer = asyncio.ensure_future(client.post(f"http://127.0.0.1:{port}{CHAT}", json=chat))
                    while not there.seen:
                        await asyncio.sleep(0.02)
                    process.send_signal(signal.SIGTERM)
                    return await answer

            answer = asyncio.run(run())
            assert answer.status_code == 200
            assert int(answer.headers["x-fewer-tokens-saved"]) > 0
            assert len(json.loads(there.seen[-1]["raw"])["messages"][0]["content"]) < len(REPORT)
            process.wait(20)
            assert process.returncode in (0, -signal.SIGTERM)
        finally:
            process.kill()
