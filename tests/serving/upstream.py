"""A small endpoint over real sockets that does as a request tells it, also what no endpoint should."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Upstream:
    """An ASGI application. What it does is named in a request's "behave"; what it was sent is in `seen`.

    Chat completions answer with what the last message says, so that a mix-up of answers shows.
    """

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.cancelled = 0
        self.open = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.seen.append({"path": scope["raw_path"].decode(), "query": scope["query_string"].decode(), "raw": raw,
                          "method": scope["method"], "headers": scope["headers"]})  # fmt: skip
        try:
            given = json.loads(raw)
        except ValueError:
            given = {}
        behave = given.get("behave", "stream" if given.get("stream") else "answer")
        self.open += 1
        work = asyncio.ensure_future(getattr(self, behave)(scope, given, raw, send))
        gone = asyncio.ensure_future(self._gone(receive))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            self.cancelled += 1
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
        self.open -= 1

    async def _gone(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _whole(self, send: Any, status: int, body: bytes, headers: dict[str, str]) -> None:
        found = {"content-type": "application/json", "content-length": str(len(body)), **headers}
        await send({"type": "http.response.start", "status": status,
                    "headers": [(k.encode(), v.encode()) for k, v in found.items()]})  # fmt: skip
        await send({"type": "http.response.body", "body": body})

    async def answer(self, scope: Any, given: Any, raw: bytes, send: Any) -> None:
        last = (given.get("messages") or [{}])[-1].get("content")
        message = {"role": "assistant", "content": f"You said: {last}"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        found = {"id": "c", "object": "chat.completion", "created": 1, "model": given.get("model", "m")}
        body = json.dumps({**found, "choices": [choice]})
        await self._whole(send, 200, body.encode(), {"x-request-id": "r1", "set-cookie": "a=1"})

    async def slowly(self, scope: Any, given: Any, raw: bytes, send: Any) -> None:
        await asyncio.sleep(given.get("seconds", 0.3))
        await self.answer(scope, given, raw, send)

    async def never(self, scope: Any, given: Any, raw: bytes, send: Any) -> None:
        await asyncio.sleep(3600)

    async def limited(self, scope: Any, given: Any, raw: bytes, send: Any) -> None:
        body = b'{"error": {"message": "slow down", "type": "rate_limit", "code": "rate_limit"}}'
        await self._whole(send, 429, body, {"retry-after": "7", "x-ratelimit-remaining": "0"})

    async def page(self, scope: Any, given: Any, raw: bytes, send: Any) -> None:
        await self._whole(send, 502, b"<html>Bad Gateway</html>", {"content-type": "text/html"})

    async def nonsense(self, scope: Any, given: Any, raw: bytes, send: Any) -> None:
        await self._whole(
            send, 200, b"\xff\xfe{{{", {"x-fewer-notes": "not ours", "connection": "x-mine", "x-mine": "1"}
        )

    async def redirect(self, scope: Any, given: Any, raw: bytes, send: Any) -> None:
        await self._whole(send, 307, b"", {"location": "https://elsewhere.example/v1"})

    async def stream(self, scope: Any, given: Any, raw: bytes, send: Any) -> None:
        await self._events(given, send)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def drip(self, scope: Any, given: Any, raw: bytes, send: Any) -> None:
        """An event now and then, without end."""
        await self._events(given, send, pause=0.05, most=10_000)

    async def torn(self, scope: Any, given: Any, raw: bytes, send: Any) -> None:
        """Two events and a half, then nothing: the connection breaks."""
        await self._events(given, send, most=2)
        await send({"type": "http.response.body", "body": b'data: {"choices": [{"del', "more_body": True})
        await asyncio.sleep(0.1)  # uvicorn closes the connection of an application that ends here

    async def stuck(self, scope: Any, given: Any, raw: bytes, send: Any) -> None:
        await self._events(given, send, most=2)
        await asyncio.sleep(3600)

    async def short(self, scope: Any, given: Any, raw: bytes, send: Any) -> None:
        """Less than it says."""
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-type", b"application/json"), (b"content-length", b"1000")]})  # fmt: skip
        await send({"type": "http.response.body", "body": b'{"choices": [', "more_body": True})
        await asyncio.sleep(0.1)

    async def _events(self, given: Any, send: Any, *, pause: float = 0.0, most: int = 10_000) -> None:
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]})  # fmt: skip
        words = str((given.get("messages") or [{}])[-1].get("content")).split() * (50 if pause else 1)
        for word in words[:most]:
            piece = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m",
                     "choices": [{"index": 0, "delta": {"content": word + " "}}]}  # fmt: skip
            await send({"type": "http.response.body", "body": b"data: %s\n\n" % json.dumps(piece).encode(),
                        "more_body": True})  # fmt: skip
            await asyncio.sleep(pause)


@contextmanager
def running(app: Any, **config: Any) -> Iterator[str]:
    """An application at an address of this machine, until the end of the block."""
    import uvicorn  # not where there is none: tests that need it are left out then

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="auto", **config))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive(), "the server ended"
        assert time.monotonic() < until, "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive(), "the server did not stop"
