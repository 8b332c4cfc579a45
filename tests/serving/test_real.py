"""The gateway in front of a real endpoint: `transformers serve` with a real language model, asked by OpenAI's client.

`pip install 'transformers[serving]'`, and the packaged SmolLM2-135M; left out where either is missing.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="needs the extra: pip install 'fewer[serve]'")
openai = pytest.importorskip("openai", reason="needs pip install 'transformers[serving]'")

from fewer.compression import Compressor, Conversation  # noqa: E402
from fewer.models.zoo import load_model  # noqa: E402
from fewer.serving.gateway import gateway  # noqa: E402
from fewer.serving.settings import Settings  # noqa: E402
from serving.upstream import running  # noqa: E402
from talking import OTHER, REPORT, talk  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.download]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("uvicorn") is None:
        pytest.skip("needs pip install 'transformers[serving]'")
    where = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = load_model("smollm2-135m")
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def endpoint(folder: Path) -> Iterator[str]:
    """The address of a real endpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)],
            stdout=out, stderr=out, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        end = time.monotonic() + 240
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, log.read_text()[-2000:]
            try:
                httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def conversation() -> Conversation:
    return Conversation("tool=0.4,user=0.6,least=64", Compressor(model="smollm2-135m"))


@pytest.fixture(scope="module")
def client(endpoint: str, conversation: Conversation) -> Iterator[Any]:
    with running(gateway(conversation, Settings(endpoint)), server_header=False, date_header=False) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="sk-none", timeout=300, max_retries=0)


def asked(report: str = REPORT) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": f"Here is a report.\n\n{report}\n\nWhat is it about?"},
    ]


def test_answers_are_those_to_the_shorter_text(client, endpoint, conversation, folder):
    """The same words as the endpoint itself gives to what went up, and fewer prompt tokens than to the whole."""
    settings: dict[str, Any] = {"model": str(folder), "max_tokens": 24, "temperature": 0.0}
    through = client.chat.completions.with_raw_response.create(messages=asked(), **settings)
    direct = openai.OpenAI(base_url=endpoint, api_key="sk-none", timeout=300)
    short = direct.chat.completions.create(messages=conversation(asked()).messages, **settings)
    whole = direct.chat.completions.create(messages=asked(), **settings)
    answer = through.parse()
    assert answer.choices[0].message.content == short.choices[0].message.content
    assert len(answer.choices[0].message.content) > 5
    saved = int(through.headers["x-fewer-tokens-saved"])
    assert saved > 50
    assert answer.usage.prompt_tokens == short.usage.prompt_tokens
    assert abs(whole.usage.prompt_tokens - answer.usage.prompt_tokens - saved) <= 3  # words that meet a template


def test_streams(client, folder):
    settings: dict[str, Any] = {"model": str(folder), "max_tokens": 24, "temperature": 0.0}
    whole = client.chat.completions.create(messages=asked(OTHER), **settings)
    pieces = list(client.chat.completions.create(messages=asked(OTHER), stream=True, **settings))
    assert len(pieces) > 5
    said = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert said == whole.choices[0].message.content


def test_tools_and_a_chat_that_grows(client, conversation, folder):
    tools = [{"type": "function", "function": {"name": "look", "description": "Looks something up.", "parameters": {
        "type": "object", "properties": {"n": {"type": "integer"}}}}}, conversation.tool]  # fmt: skip
    messages = talk(1)[:4]
    messages[2]["content"] = ""  # the template of this model wants a text
    answer = client.chat.completions.with_raw_response.create(
        messages=messages, tools=tools, model=str(folder), max_tokens=8, temperature=0.0
    )
    assert int(answer.headers["x-fewer-tokens-saved"]) > 100
    assert answer.parse().choices[0].message.role == "assistant"
    reads = conversation.memo.misses
    messages += [{"role": "assistant", "content": "Fish."}, {"role": "user", "content": "How many crates?"}]
    client.chat.completions.create(messages=messages, model=str(folder), max_tokens=4)
    assert conversation.memo.misses == reads + 2  # what is new, and nothing else


def test_models_and_errors_are_the_endpoints(client):
    assert client.models.list().object == "list"
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(messages=asked(), model="no/such-model", max_tokens=4)
    assert caught.value.status_code >= 400
