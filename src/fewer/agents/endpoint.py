"""Who is asked: a model behind an OpenAI-compatible endpoint, and what it costs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

__all__ = ["Call", "Endpoint", "EndpointError", "Ledger", "Message", "Reply", "Speaker"]

BUSY = (429, 500, 502, 503, 504)  # what may pass
SHOWN = 300  # characters of a refusal that an error repeats


class EndpointError(RuntimeError):
    """An endpoint that cannot be reached, refuses, or does not answer as the protocol has it."""


class Message(TypedDict):
    role: str
    content: str


@dataclass(frozen=True)
class Reply:
    """text: what was said. prompt, completion: tokens read and written. finish: why it ended, "length" = cut."""

    text: str
    prompt: int
    completion: int
    finish: str = "stop"


class Speaker(Protocol):
    """Answers a conversation; an `Endpoint`, or any callable."""

    def __call__(self, messages: Sequence[Message], /) -> Reply: ...


@dataclass(frozen=True)
class Call:
    """Tokens of one call. who: the agent's number; round: from 0."""

    who: int
    round: int
    prompt: int
    completion: int


@dataclass
class Ledger:
    """Every call, with what was sent again each time."""

    calls: list[Call] = field(default_factory=list)

    def add(self, who: int, round: int, reply: Reply) -> None:
        self.calls.append(Call(who, round, reply.prompt, reply.completion))

    @property
    def prompt(self) -> int:
        return sum(call.prompt for call in self.calls)

    @property
    def completion(self) -> int:
        return sum(call.completion for call in self.calls)

    @property
    def tokens(self) -> int:
        """Read and written, of all calls."""
        return self.prompt + self.completion


class Endpoint:
    """A model behind `POST {url}/chat/completions`.

    url       as OpenAI's clients take it: http://127.0.0.1:8000/v1. model: its name there. key: sent as a bearer
    system    a first message of each conversation that has none, such as a role to play
    tokens    most of an answer. temperature, seed: as the endpoint takes them; None is not sent
    count     text -> tokens, used where the endpoint states no usage; without it, that is an error
    seconds   to wait for an answer. retries: how often one that is busy, or broke off, is asked again, after a second,
              two, four; `retry-after` is heeded up to a minute
    client    an httpx.Client to send by; the caller closes it

    Raises   EndpointError, naming address, status and what was said.
    """

    def __init__(
        self, url: str, model: str, *, key: str | None = None, system: str | None = None, tokens: int = 512,
        temperature: float | None = 0.0, seed: int | None = None, count: Callable[[str], int] | None = None,
        seconds: float = 600.0, retries: int = 3, client: Any = None,
    ) -> None:  # fmt: skip
        try:
            import httpx
        except ImportError as error:
            raise ImportError("asking an endpoint takes httpx: pip install 'fewer[serve]'") from error
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r}: an address such as http://127.0.0.1:8000/v1")
        if tokens < 1 or retries < 0:
            raise ValueError(f"tokens={tokens}, retries={retries}: one token or more, and no retries or more")
        self.url, self.model, self.system, self.count = url.rstrip("/"), model, system, count
        self.asked: dict[str, Any] = {"model": model, "max_tokens": tokens}
        self.asked |= {k: v for k, v in (("temperature", temperature), ("seed", seed)) if v is not None}
        self.retries, self._own = retries, client is None
        self.client = httpx.Client(timeout=seconds) if client is None else client
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._own:
            self.client.close()

    def __call__(self, messages: Sequence[Message], /) -> Reply:
        given = list(messages)
        if self.system is not None and not any(m["role"] == "system" for m in given):
            given.insert(0, {"role": "system", "content": self.system})
        return self._reply(self._sent({**self.asked, "messages": given}), given)

    def _sent(self, body: dict[str, Any]) -> Any:
        import httpx

        target = f"{self.url}/chat/completions"
        for turn in range(self.retries + 1):
            wait = 2.0**turn
            try:
                response = self.client.post(target, json=body, headers=self._headers)
            except httpx.TransportError as error:
                why = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return response
                said = response.text[:SHOWN]
                why = f"status {response.status_code}: {said}"
                if response.status_code not in BUSY:
                    raise EndpointError(f"{target} refused {self.model}: {why}")
                asked = response.headers.get("retry-after", "")
                wait = min(float(asked), 60.0) if asked.isdigit() else wait
            if turn < self.retries:
                time.sleep(wait)
        raise EndpointError(f"{target} did not answer in {self.retries + 1} attempts: {why}")

    def _reply(self, response: Any, messages: Sequence[Message]) -> Reply:
        try:
            answer = response.json()
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
        except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            raise EndpointError(f"{self.url} sent no chat completion: {response.text[:SHOWN]}") from error
        usage = answer.get("usage") or {}
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if prompt is None or completion is None:
            if self.count is None:
                raise EndpointError(
                    f"{self.url} states no usage, and tokens are counted here: give count=, text to tokens"
                )
            prompt, completion = sum(self.count(m["content"]) for m in messages), self.count(text)
        return Reply(text, int(prompt), int(completion), choice.get("finish_reason") or "stop")
