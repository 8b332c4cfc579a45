"""Bodies shortened beside the event loop, in a few threads; whatever happens there, a request goes up."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fewer.compression import Conversation, Conversed

from .bodies import Body, BodyError
from .settings import Settings

LOG = logging.getLogger("fewer.serving")
NOTES = 1_000  # characters of notes in a header


@dataclass(frozen=True)
class Shortened:
    """body: to send. conversed: what became of its messages, None where it goes up as it came; whole: then why."""

    body: bytes
    conversed: Conversed | None = None
    whole: str = ""
    why: str = ""
    seconds: float = 0.0

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """What a client is told."""
        one = self.conversed
        found: list[tuple[str, Any]] = []
        if one is not None:
            saved = one.before - one.after
            found = [("tokens-before", one.before), ("tokens-after", one.after), ("tokens-saved", saved)]
        if said := _line([self.why] * bool(self.why) + (one.notes if one else [])):
            found.append(("notes", said))
        return [(f"x-fewer-{name}".encode(), str(value).encode()) for name, value in found]


class Shortener:
    """A conversation's policies, on bodies. What is remembered does not wait for what has to be read."""

    def __init__(self, conversation: Conversation, settings: Settings) -> None:
        import torch

        threads = torch.get_num_threads()  # of the thread that loaded the model: other numbers may round otherwise

        def ready() -> None:
            torch.set_num_threads(threads)

        self.conversation, self.settings = conversation, settings
        self._quick = ThreadPoolExecutor(2, "fewer-quick", ready)
        self._reading = ThreadPoolExecutor(settings.workers, "fewer-read", ready)
        self._owners: OrderedDict[tuple[str, str], None] = OrderedDict()

    def close(self) -> None:
        for pool in (self._quick, self._reading):
            pool.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, raw: bytes, caller: str) -> Shortened:
        """Never raises for what is in a body, nor for what a model makes of it."""
        began = time.perf_counter()
        found = await self._shortened(raw)
        if found.conversed is not None:
            self._own(caller, found.conversed)
        return Shortened(found.body, found.conversed, found.whole, found.why, time.perf_counter() - began)

    async def _shortened(self, raw: bytes) -> Shortened:
        try:
            body, made = await self._in(self._quick, self._remembered, raw)
            if made is not None:
                return made
            return await asyncio.wait_for(self._in(self._reading, self._made, raw, body), self.settings.patience)
        except BodyError as error:
            return Shortened(raw, whole="body", why=f"sent as it came: {error}")
        except TimeoutError:
            return await self._whole(raw, body, "patience", "there was no time to shorten it")
        except Exception as error:  # a request is not lost to a fault of ours
            LOG.error("shortening failed: %s at %s", type(error).__name__, _where(error))
            return Shortened(raw, whole="fault", why=f"sent as it came: shortening failed ({type(error).__name__})")

    async def _whole(self, raw: bytes, body: Body, whole: str, why: str) -> Shortened:
        """What is not remembered goes up whole, and does so from now on."""
        made = await self._in(self._quick, lambda: self._with(raw, body, self.conversation.leave(body.messages, why)))
        return Shortened(made.body, made.conversed, whole, "")

    def _remembered(self, raw: bytes) -> tuple[Body, Shortened | None]:
        body = Body.of(raw)
        known = self.conversation.remembered(body.messages)
        return body, None if known is None else self._with(raw, body, known)

    def _made(self, raw: bytes, body: Body) -> Shortened:
        return self._with(raw, body, self.conversation(body.messages))

    def _with(self, raw: bytes, body: Body, one: Conversed) -> Shortened:
        return Shortened(body.with_messages(one.messages) if one.changed else raw, one)

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[..., Any], *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *given)

    # -- spans ---------------------------------------------------------------------------------------------------------
    async def restore(self, name: str, caller: str) -> str:
        """A span, for the caller who sent it. Raises KeyError."""
        key = name.strip().partition(":")[0]
        if (caller, key) not in self._owners:
            raise KeyError(f"{name!r} is not known here, or not yours: ask with the key the text was sent with")
        self._owners.move_to_end((caller, key))
        return await self._in(self._quick, self.conversation.restore, name)

    def _own(self, caller: str, one: Conversed) -> None:
        for segment in one.segments:
            if segment.key:
                for key in {segment.key, segment.dropped[0].partition(":")[0]}:
                    self._owners[caller, key] = None
                    self._owners.move_to_end((caller, key))
        while len(self._owners) > self.settings.callers:
            self._owners.popitem(last=False)


def caller(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Who asks: a digest of the key, which is kept nowhere."""
    keys = [value for name, value in headers if name in (b"authorization", b"api-key", b"x-api-key")]
    return hashlib.sha256(b"\n".join(keys)).hexdigest()


def _line(notes: list[str]) -> str:
    """Notes as a header holds them."""
    said = "".join(c if " " <= c <= "~" else "?" for c in "; ".join(notes))
    return said if len(said) <= NOTES else said[: NOTES - 3] + "..."


def _where(error: BaseException) -> str:
    """The place an error comes from; its text may quote a prompt, and is not for logs."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
