"""An endpoint over real sockets: what is sent, what is counted, and what is said when it fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs the extra: pip install 'fewer[serve]'")

from fewer.agents import Debate, Densify, Endpoint, EndpointError

USAGE = {"prompt_tokens": 11, "completion_tokens": 3}


class Stub(ThreadingHTTPServer):
    """Speaks the protocol. script: what it answers, in turn: a text, a status, or a whole body."""

    daemon_threads = True

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.seen: list[tuple[str, dict[str, Any], Any]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, body, self.headers))
        said = self.server.script.pop(0) if self.server.script else "yes"
        status = said if isinstance(said, int) else 200
        if isinstance(said, str):
            choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            said = {"choices": [choice], "usage": USAGE}
        raw = b"<html>busy</html>" if isinstance(said, int) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("retry-after", "0")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_what_is_sent_and_what_comes_back(stub: Stub) -> None:
    with Endpoint(stub.url + "/", "small", key="secret", system="Be brief.", tokens=7, seed=4) as endpoint:
        reply = endpoint([{"role": "user", "content": "Is it so?"}])
    assert (reply.text, reply.prompt, reply.completion, reply.finish) == ("yes", 11, 3, "stop")
    path, body, headers = stub.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer secret"
    assert body == {
        "model": "small", "max_tokens": 7, "temperature": 0.0, "seed": 4,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it so?"}],
    }  # fmt: skip


def test_one_that_is_busy_is_asked_again(stub: Stub) -> None:
    stub.script = [503, 429, "at last"]
    assert Endpoint(stub.url, "small")([{"role": "user", "content": "?"}]).text == "at last"
    assert len(stub.seen) == 3
    stub.script = [503, 503]
    with pytest.raises(EndpointError, match=r"did not answer in 2 attempts: status 503: <html>busy"):
        Endpoint(stub.url, "small", retries=1)([{"role": "user", "content": "?"}])


def test_what_it_refuses_is_said_at_once(stub: Stub) -> None:
    stub.script = [404]
    with pytest.raises(EndpointError, match="refused nobody: status 404"):
        Endpoint(stub.url, "nobody")([{"role": "user", "content": "?"}])
    assert len(stub.seen) == 1
    stub.script = [{"choices": []}]
    with pytest.raises(EndpointError, match="sent no chat completion"):
        Endpoint(stub.url, "small")([{"role": "user", "content": "?"}])
    with pytest.raises(EndpointError, match="ConnectError"):
        Endpoint("http://127.0.0.1:9/v1", "small", retries=0)([{"role": "user", "content": "?"}])
    with pytest.raises(ValueError, match="an address such as"):
        Endpoint("localhost:8000", "small")


def test_tokens_nobody_states_are_counted_or_refused(stub: Stub) -> None:
    bare = {"choices": [{"message": {"content": "one two three"}}]}
    stub.script = [bare, bare]
    with pytest.raises(EndpointError, match="give count="):
        Endpoint(stub.url, "small")([{"role": "user", "content": "?"}])
    reply = Endpoint(stub.url, "small", count=lambda text: len(text.split()))([{"role": "user", "content": "a b"}])
    assert (reply.prompt, reply.completion) == (2, 3)


def test_a_debate_and_a_chain_over_the_wire(stub: Stub) -> None:
    with Endpoint(stub.url, "small") as endpoint:
        stub.script = ["It is 4.", "4", "5", "Then 4.", "4", "4"]
        outcome = Debate(rounds=2, group=0).run("2 + 2?", [endpoint] * 3)
        assert (outcome.answer.text, outcome.ended) == ("Then 4.", "agreed")
        assert outcome.ledger.tokens == len(stub.seen) * 14
        stub.script = ["A place was built.", "Missing: Port Erin\nSummary: Port Erin was built."]
        chain = Densify(steps=2, words=10).run("In 1863 Port Erin was built.", endpoint)
    assert [step.text for step in chain.steps] == ["A place was built.", "Port Erin was built."]
    assert chain.ledger.prompt == 22
