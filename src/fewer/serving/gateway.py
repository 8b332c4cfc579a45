"""The gateway: what answers under which path. (Annotations are evaluated here: FastAPI reads those of its routes.)"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fewer.compression import Conversation

from .metrics import Metrics
from .relay import Relay
from .settings import Settings
from .shortening import Shortener, caller

if TYPE_CHECKING:
    from fastapi import FastAPI

KEEP = 4.0  # seconds a connection to the upstream is kept for the next request; fewer than servers keep theirs


def gateway(conversation: Conversation, settings: Settings) -> "FastAPI":
    """An ASGI application.

    /v1/chat/completions   goes to the upstream with shorter messages; every other path under /v1 as it came
    /v1/fewer/spans/{id}   what was dropped, for those who sent it; /v1/fewer/tool: a tool for models to ask with
    /metrics, /health      of the gateway
    """
    import httpx
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse
    from starlette.routing import Route

    from fewer import __version__

    shortener = Shortener(conversation, settings)
    limits = httpx.Limits(
        max_connections=settings.connections, max_keepalive_connections=settings.connections, keepalive_expiry=KEEP
    )
    timeout = httpx.Timeout(settings.read, connect=settings.connect, pool=settings.connect)
    client = httpx.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False)
    for name in [*client.headers]:
        del client.headers[name]  # what the client says goes up, nothing of ours
    metrics = Metrics()
    relay = Relay(settings, shortener, client, metrics)
    metrics.gauges = {
        "in_flight": lambda: relay.in_flight,
        "texts_read_total": lambda: conversation.memo.misses,
        "memory_characters": lambda: conversation.memo.held,
    }

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        shortener.close()
        await client.aclose()

    app = FastAPI(title="fewer", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "policies": str(conversation)}

    @app.get("/metrics")
    async def counts() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/fewer/tool")
    async def tool() -> dict[str, Any]:
        return conversation.tool

    @app.get("/v1/fewer/spans/{name:path}")
    async def span(name: str, request: Request) -> JSONResponse:
        try:
            text = await shortener.restore(name, caller(request.headers.raw))
        except KeyError as error:
            metrics.add("spans_total", found="no")
            problem = {"message": error.args[0], "type": "not_found", "param": "id", "code": "span_not_found"}
            return JSONResponse({"error": problem}, 404)
        metrics.add("spans_total", found="yes")
        return JSONResponse({"id": name, "text": text})

    async def upward(scope: Any, receive: Any, send: Any) -> None:
        if ".." in scope["path"].split("/"):
            await JSONResponse({"detail": "Not Found"}, 404)(scope, receive, send)
        else:
            await relay(scope, receive, send)

    app.router.routes.append(Route("/v1/{path:path}", endpoint=_Endpoint(upward)))
    return app


class _Endpoint:
    """An ASGI application as the end of a route, of all methods: starlette takes functions for something else."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)
