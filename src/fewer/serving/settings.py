"""What a gateway is told."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit


class ServeError(ValueError):
    """Settings that cannot be followed."""


@dataclass(frozen=True)
class Settings:
    """upstream: where requests go, as clients are given it: "https://api.openai.com/v1". With a path, it stands for
    /v1; without one, /v1 is put behind it.

    most_bytes    of a request's body; more is refused with 413
    connect, read   seconds: to reach the upstream; between two pieces of its answer, the first included
    patience      seconds a request waits for its texts to be read, then what is not read yet goes up whole
    workers       threads in which texts are read. One model reads one text at a time; more help little
    connections   to the upstream at once; a request that gets none in `connect` seconds is answered with 503
    grace         seconds that requests on their way have when the gateway is stopped
    callers       pairs of a caller and a text that are remembered, so that spans are given to those who sent them
    """

    upstream: str
    most_bytes: int = 64 << 20
    connect: float = 10.0
    read: float = 600.0
    patience: float = 60.0
    workers: int = 1
    connections: int = 1_000
    grace: float = 30.0
    callers: int = 100_000

    def __post_init__(self) -> None:
        url = urlsplit(self.upstream)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ServeError(f"--upstream {self.upstream!r} is no address; such as https://api.openai.com/v1")
        if url.username or url.password or url.query or url.fragment:
            raise ServeError("--upstream takes an address alone: keys are passed on from clients, none is kept here")
        for name in ("most_bytes", "connect", "read", "patience", "workers", "connections", "callers"):
            if not getattr(self, name) > 0:
                raise ServeError(f"{name}={getattr(self, name)}: more than 0")

    def target(self, path: str, query: str = "") -> str:
        """Where a request for /v1/... goes."""
        base, where = self.upstream.rstrip("/"), urlsplit(self.upstream).path.strip("/")
        return base + (path.removeprefix("/v1") if where else path) + ("?" + query if query else "")
