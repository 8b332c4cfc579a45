"""`fewer serve`: a gateway in front of an endpoint, in which messages get shorter."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from .inputs import load, use_threads
from .output import note


def command(
    upstream: Annotated[
        str, typer.Option(help="Where requests go, as clients are given it: https://api.openai.com/v1.")
    ],
    policy: Annotated[
        str,
        typer.Option(
            help="Per role what becomes of messages: tool=0.4,user=whole; a role takes whole, a share or a method, and "
            "protect=KIND+KIND, least=TOKENS, asked=true."
        ),
    ] = "tool=0.5",
    method: Annotated[str, typer.Option(help="What shortens where a policy names a share alone.")] = "llmlingua",
    model: Annotated[str, typer.Option(help="Who reads: a packaged name, a hub name or a folder.")] = "smollm2-135m",
    counter: Annotated[
        str | None,
        typer.Option(help="Whose tokens are counted, a hub name or a folder; default --model."),
    ] = None,
    force: Annotated[list[str] | None, typer.Option(help="A word that always stays; repeat for several.")] = None,
    mark: Annotated[
        bool, typer.Option("--mark/--no-mark", help="End shortened texts in the id to ask for the whole with.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 = all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at.")] = 8300,
    max_body: Annotated[float, typer.Option(help="MiB of a request's body; more is refused.")] = 64.0,
    connect: Annotated[float, typer.Option(help="Seconds to reach the upstream.")] = 10.0,
    read: Annotated[float, typer.Option(help="Seconds between two pieces of the upstream's answer.")] = 600.0,
    patience: Annotated[
        float, typer.Option(help="Seconds a request waits to be shortened; then its new texts go up whole.")
    ] = 60.0,
    workers: Annotated[int, typer.Option(min=1, help="Threads in which texts are read.")] = 1,
    keep: Annotated[int, typer.Option(min=1, help="Whole texts that are kept, to be asked for.")] = 10_000,
    keep_seconds: Annotated[float, typer.Option(help="How long each is kept.")] = 86_400.0,
    grace: Annotated[float, typer.Option(help="Seconds that requests on their way have when this is stopped.")] = 30.0,
    threads: Annotated[int, typer.Option(min=0, help="Torch threads; 0 = as torch has it.")] = 0,
) -> None:
    """An OpenAI-compatible gateway: chat completions go up with shorter messages, all else as it came."""
    from fewer.compression import Compressor, Conversation, Shelf, policies
    from fewer.serving.running import needed, server
    from fewer.serving.settings import Settings

    settings = Settings(
        upstream, int(max_body * 2**20), connect=connect, read=read, patience=patience, workers=workers, grace=grace
    )
    asked = policies(policy)
    needed()
    use_threads(threads, 0)
    network, tokenizer = load(model)
    counting = None
    if counter is not None:
        from transformers import AutoTokenizer

        counting = AutoTokenizer.from_pretrained(counter)
    compressor = Compressor(method, network, tokenizer, counter=counting, force=force or ())
    conversation = Conversation(asked, compressor, shelf=Shelf(keep, keep_seconds), mark=mark)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    running = server(conversation, settings, host, port)
    note(f"http://{host}:{port}/v1 to {upstream}, {conversation}; Ctrl-C stops")
    running.run()
