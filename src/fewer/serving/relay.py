"""One request on its way: in, shortened, up, and its answer down, piece by piece."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from .metrics import Metrics
from .settings import Settings
from .shortening import Shortened, Shortener, caller

LOG = logging.getLogger("fewer.serving")
CHAT = "/v1/chat/completions"
HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)
"""Headers between two neighbours, which go no further."""
EVENT = re.compile(rb"\r\n\r\n|\n\n|\r\r")
HELD = 1 << 20  # bytes of one event that are waited for
Headers = list[tuple[bytes, bytes]]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class _TooLarge(Exception):
    """A body is larger than is taken."""


class _Gone(Exception):
    """A client left."""


class Relay:
    """An ASGI application for what goes to the upstream. client: an httpx.AsyncClient."""

    def __init__(self, settings: Settings, shortener: Shortener, client: Any, metrics: Metrics) -> None:
        self.settings, self.shortener, self.client, self.metrics = settings, shortener, client, metrics
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.in_flight += 1
        try:
            await self._watched(scope, receive, _Answer(send))
        finally:
            self.in_flight -= 1

    async def _watched(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        """Answers, and stops where the client leaves: then nothing goes on upstream either."""
        route = "chat" if scope["path"] == CHAT and scope["method"] == "POST" else "other"
        began = time.perf_counter()
        try:
            raw = await _body(scope, receive, self.settings.most_bytes)
        except _Gone:
            self.metrics.add("disconnects_total")
            return
        except _TooLarge:
            said = f"The body is larger than this gateway takes, {self.settings.most_bytes:,} bytes."
            await answer.error(413, said, "body_too_large", close=True)
            self._done(route, answer, began, None)
            return
        work = asyncio.ensure_future(self._answered(scope, route, raw, answer, began))
        gone = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answer.whole:  # what is left to do is to tidy up
                await work
            elif not work.done():
                self.metrics.add("disconnects_total")
                LOG.info("%s: the client left", route)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled() and (error := work.exception()) is not None:
            raise error

    async def _answered(self, scope: Scope, route: str, raw: bytes, answer: _Answer, began: float) -> None:
        headers: Headers = list(scope["headers"])
        short = None
        if route == "chat":
            short = await self._shortened(raw, headers)
            raw, answer.extra = short.body, short.headers
        try:
            await self._relayed(scope, headers, raw, answer)
        finally:
            self._done(route, answer, began, short)

    async def _shortened(self, raw: bytes, headers: Headers) -> Shortened:
        coding = dict(headers).get(b"content-encoding", b"identity")
        if coding.strip().lower() != b"identity":
            short = Shortened(raw, whole="body", why="sent as it came: the body is compressed already")
        else:
            short = await self.shortener(raw, caller(headers))
        count = self.metrics.add
        if short.whole:
            count("went_whole_total", reason=short.whole)
        if (one := short.conversed) is not None:
            count("tokens_before_total", one.before)
            count("tokens_after_total", one.after)
            count("tokens_saved_total", one.before - one.after)
            count("texts_shortened_total", sum(bool(s.key) for s in one.segments))
            count("texts_left_total", sum(bool(s.notes) and not s.key for s in one.segments))
        self.metrics.time("shorten_seconds", short.seconds)
        return short

    async def _relayed(self, scope: Scope, headers: Headers, raw: bytes, answer: _Answer) -> None:
        import httpx

        sent = time.perf_counter()
        query = scope.get("query_string", b"").decode("latin-1")
        path = scope.get("raw_path", b"").decode("latin-1") or scope["path"]
        try:
            request = self.client.build_request(
                scope["method"], self.settings.target(path, query), content=raw or None, headers=_onward(headers)
            )
            response = await self.client.send(request, stream=True)
        except httpx.PoolTimeout:
            self.metrics.add("upstream_errors_total", kind="busy")
            await answer.error(503, "The gateway has no connection to the upstream free.", "busy", retry=1)
            return
        except (httpx.TransportError, httpx.InvalidURL) as error:
            late = isinstance(error, httpx.TimeoutException)
            self.metrics.add("upstream_errors_total", kind="timeout" if late else "connect")
            said = "did not answer in time" if late else "could not be reached"
            await answer.error(504 if late else 502, f"The upstream {said} ({type(error).__name__}).", "upstream_error")
            return
        self.metrics.time("upstream_seconds", time.perf_counter() - sent)
        try:
            await self._down(scope, response, answer)
        finally:
            await asyncio.shield(response.aclose())

    async def _down(self, scope: Scope, response: Any, answer: _Answer) -> None:
        import httpx

        found: Headers = [(name.lower(), value) for name, value in response.headers.raw]
        dropped = HOP | _named(found)
        found = [(name, value) for name, value in found if name not in dropped and not name.startswith(b"x-fewer-")]
        await answer.start(response.status_code, found)
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        events = kind == "text/event-stream" and "content-encoding" not in response.headers
        pieces = response.aiter_raw()
        try:
            async for piece in _events(pieces) if events else pieces:
                await answer.piece(piece)
        except (httpx.TransportError, httpx.StreamError) as error:
            late = isinstance(error, httpx.TimeoutException)
            self.metrics.add("upstream_errors_total", kind="timeout" if late else "broken")
            LOG.warning("the upstream broke off its answer (%s)", type(error).__name__)
            if not events or "content-length" in response.headers:
                answer.broken = True  # left unfinished, so that nobody takes a part for the whole
                return
            said = f"The upstream broke off its answer ({type(error).__name__})."
            await answer.piece(b"data: " + _problem(said, "upstream_error") + b"\n\n")
        await answer.end()

    def _done(self, route: str, answer: _Answer, began: float, short: Shortened | None) -> None:
        status = answer.status or 499
        self.metrics.add("requests_total", route=route, status=str(status))
        one = short.conversed if short else None
        LOG.info(
            "%s %s in %.0f ms%s%s", route, status, 1e3 * (time.perf_counter() - began),
            f", {one.before} tokens to {one.after} in {1e3 * short.seconds:.0f} ms" if short and one else "",
            ", broken off" if answer.broken else "",
        )  # fmt: skip


class _Answer:
    """What goes down to a client. extra: headers of ours. whole: all of it is sent; broken: it never will be."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.broken = self.whole = False
        self.extra: Headers = []

    async def start(self, status: int, headers: Headers) -> None:
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *self.extra]})

    async def piece(self, body: bytes) -> None:
        if body:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        self.whole = True  # from here on a client that closes its end has not left
        await self._send({"type": "http.response.body", "body": b""})

    async def error(self, status: int, said: str, code: str, *, retry: int = 0, close: bool = False) -> None:
        """In the form that OpenAI's clients read."""
        body = _problem(said, code)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(b"retry-after", str(retry).encode())] * bool(retry) + [(b"connection", b"close")] * close
        await self.start(status, headers)
        await self.piece(body)
        await self.end()


def _problem(said: str, code: str) -> bytes:
    return json.dumps({"error": {"message": said, "type": code, "param": None, "code": code}}).encode()


async def _body(scope: Scope, receive: Receive, most: int) -> bytes:
    length = dict(scope["headers"]).get(b"content-length", b"")
    if length.isdigit() and int(length) > most:
        raise _TooLarge
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise _TooLarge
        if not message.get("more_body", False):
            return b"".join(parts)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes, cut where events end, so that an answer that breaks off ends in whole ones."""
    held = b""
    async for piece in pieces:
        held += piece
        ends = [match.end() for match in EVENT.finditer(held)]
        cut = ends[-1] if ends else len(held) if len(held) > HELD else 0
        if cut:
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _named(headers: Headers) -> frozenset[bytes]:
    """Headers that a connection header names as its own."""
    return frozenset(
        name.strip().lower() for key, value in headers if key == b"connection" for name in value.split(b",")
    )


def _onward(headers: Headers) -> Headers:
    dropped = HOP | _named(headers) | {b"host", b"content-length", b"expect"}
    return [(name, value) for name, value in headers if name not in dropped]
