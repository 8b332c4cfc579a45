"""A gateway that runs until it is stopped."""

from __future__ import annotations

import logging
from typing import Any

from fewer.compression import Conversation

from .settings import ServeError, Settings

NEEDS = "fewer serve stands on FastAPI, uvicorn and httpx: pip install 'fewer[serve]'"


def needed() -> None:
    """Raises ServeError where the extra is not installed."""
    try:
        import fastapi
        import httpx
        import uvicorn
    except ImportError as error:
        raise ServeError(f"{NEEDS} ({error})") from error
    del fastapi, httpx, uvicorn


def server(conversation: Conversation, settings: Settings, host: str, port: int) -> Any:
    """A uvicorn.Server; `run()` serves until a signal, then lets requests on their way come to their end.
    Raises ServeError where the extra is not installed."""
    needed()
    import uvicorn

    from .gateway import gateway

    for name in ("httpx", "httpcore"):  # they log addresses and headers
        logging.getLogger(name).setLevel(logging.WARNING)
    config = uvicorn.Config(
        gateway(conversation, settings), host=host, port=port, access_log=False, log_level="warning",
        server_header=False, date_header=False, timeout_graceful_shutdown=int(settings.grace),
    )  # fmt: skip
    return uvicorn.Server(config)
