"""What the gateway costs, besides the forwards of the language model that reads, over real sockets on one machine.

Three requests take turns: to an endpoint that answers at once (direct); through the gateway in front of it, with
nothing new to read (remembered); through the gateway, with one text that is new behind a known conversation (new).

    wall     what a request takes longer than the direct one beside it
    cpu      processor time of the gateway's process for a request, which neighbours on the machine cannot stretch; the
             mean, for clocks tick in hundredths of a second. besides: less that of the reader's forwards (hooks);
             gateway: less that of the compressor as a whole, so that softmax and choice of tokens are left out, too.
             What a gateway that waits spends (uvicorn looks up ten times a second) is taken off for the time that a
             request took

    python benchmarks/serving.py --rounds 40
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import uvicorn

from fewer.compression import Compressor, Conversation
from fewer.datasets import texts
from fewer.evaluation import record
from fewer.serving.gateway import gateway
from fewer.serving.settings import Settings

RESULT = Path(__file__).parent / "results" / "serving.json"
CHAT = "/v1/chat/completions"


async def endpoint(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    body = b'{"choices": [{"message": {"role": "assistant", "content": "yes"}}]}'
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def upstream(port: int) -> None:
    uvicorn.run(endpoint, port=port, log_level="error", lifespan="off")


def through(port: int, to: int, clocks: Any, threads: int) -> None:
    """The gateway. clocks: seconds of forwards (wall, CPU) and of the compressor (CPU), and forwards so far."""
    torch.set_num_threads(threads)
    compressor = Compressor("llmlingua:keep=0.5", model="smollm2-135m")
    began = [0.0, 0.0]

    def start(*_: Any) -> None:
        began[:] = time.perf_counter(), time.thread_time()

    def stop(*_: Any) -> None:
        clocks[0] += time.perf_counter() - began[0]
        clocks[1] += time.thread_time() - began[1]
        clocks[3] += 1

    compressor.model.register_forward_pre_hook(start)
    compressor.model.register_forward_hook(stop)
    call = Compressor.__call__

    def timed(*given: Any, **more: Any) -> Any:
        before = time.thread_time()
        try:
            return call(*given, **more)
        finally:
            clocks[2] += time.thread_time() - before

    Compressor.__call__ = timed  # type: ignore[method-assign]
    conversation = Conversation("tool=0.5,user=0.5", compressor)
    app = gateway(conversation, Settings(f"http://127.0.0.1:{to}", patience=3_600.0))
    uvicorn.run(app, port=port, log_level="error", server_header=False, date_header=False)


def free() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def chat(words: list[str], tokens: int, each: int) -> list[dict[str, Any]]:
    """A conversation of about so many tokens, in messages of `each`, of words that were not used yet."""
    found: list[dict[str, Any]] = []
    for i in range(tokens // each):
        text = " ".join(words[: int(each / 1.3)])
        del words[: int(each / 1.3)]
        found.append({"role": ("user", "tool")[i % 2], "tool_call_id": "a", "content": text})
    return found


def spread(values: list[float]) -> dict[str, float]:
    ranked = sorted(values)
    return {"median": round(statistics.median(ranked), 2), "low": round(ranked[len(ranked) // 20], 2),
            "high": round(ranked[-1 - len(ranked) // 20], 2)}  # fmt: skip


class Bench:
    """Asks, and reads the clocks. process: the gateway's."""

    def __init__(
        self, url: str, direct: str, process: psutil.Process, clocks: Any, words: list[str], each: int
    ) -> None:
        self.url, self.direct, self.process, self.clocks = url, direct, process, clocks
        self.words, self.each, self.client = words, each, httpx.Client(timeout=600)
        self.waits = 0.0

    def timed(self, base: str, messages: list[dict[str, Any]]) -> tuple[float, Any]:
        """(milliseconds, answer)."""
        began = time.perf_counter()
        answer = self.client.post(base + CHAT, json={"model": "m", "messages": messages})
        answer.raise_for_status()
        return 1e3 * (time.perf_counter() - began), answer

    def cpu(self) -> float:
        spent = self.process.cpu_times()
        return 1e3 * (spent.user + spent.system)

    def idle(self, seconds: float = 10.0) -> float:
        """Milliseconds that a waiting gateway spends in a second."""
        before = self.cpu()
        time.sleep(seconds)
        return (self.cpu() - before) / seconds

    def row(self, history: int, rounds: int) -> dict[str, Any]:
        """Behind a conversation of so many tokens, about."""
        known = chat(self.words, history, self.each)
        before = self.clocks[0]
        first, answer = self.timed(self.url, known)
        facts: dict[str, Any] = {
            "history_tokens": int(answer.headers["x-fewer-tokens-before"]), "each": self.each, "rounds": rounds,
            "first_wall_ms": round(first), "first_forwards_wall_ms": round(1e3 * (self.clocks[0] - before)),
        }  # fmt: skip
        self.waits = facts["idle_ms_per_s"] = round(self.idle(), 2)
        return facts | {"remembered": self.remembered(known, rounds), "new": self.new(known, rounds)}

    def remembered(self, known: list[dict[str, Any]], rounds: int) -> dict[str, Any]:
        calls, walls, rounds = self.clocks[3], [], 10 * rounds
        for _ in range(10):
            self.timed(self.url, known)
        spent = 0.0
        for _ in range(rounds):
            plain, _ = self.timed(self.direct, known)
            before = self.cpu()
            again, _ = self.timed(self.url, known)
            spent += self.cpu() - before
            walls.append(again - plain)
        assert self.clocks[3] == calls, "something was read again"
        return {"rounds": rounds, "wall_ms": spread(walls), "cpu_ms": round(spent / rounds, 2)}

    def new(self, known: list[dict[str, Any]], rounds: int) -> dict[str, Any]:
        walls, tokens, took = [], [], 0.0
        size = int(self.timed(self.url, known)[1].headers["x-fewer-tokens-before"])
        began, cpu = self.clocks[:], self.cpu()
        for _ in range(rounds):
            before = self.clocks[0]
            wall, answer = self.timed(self.url, known + chat(self.words, self.each, self.each))
            took += wall
            walls.append(wall - 1e3 * (self.clocks[0] - before))
            tokens.append(int(answer.headers["x-fewer-tokens-before"]) - size)
        cpu = self.cpu() - cpu - self.waits * took / 1e3
        forwards, compressor, calls = (self.clocks[i] - began[i] for i in (1, 2, 3))
        return {
            "tokens": spread(tokens), "forwards": calls / rounds, "wall_besides_forwards_ms": spread(walls),
            "cpu_ms": round(cpu / rounds, 1), "cpu_forwards_ms": round(1e3 * forwards / rounds, 1),
            "cpu_besides_forwards_ms": round((cpu - 1e3 * forwards) / rounds, 1),
            "cpu_gateway_ms": round((cpu - 1e3 * compressor) / rounds, 1),
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--each", type=int, default=256, help="tokens of a message, about")
    parser.add_argument("--history", type=int, nargs="+", default=[512, 4096, 8192])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--add", action="store_true", help="keep the rows that are there")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    words = texts.book("moby-dick").split()
    spawn = multiprocessing.get_context("spawn")
    clocks = spawn.Array("d", 4, lock=False)
    to, port = free(), free()
    processes = [
        spawn.Process(target=upstream, args=(to,), daemon=True),
        spawn.Process(target=through, args=(port, to, clocks, arguments.threads), daemon=True),
    ]
    for process in processes:
        process.start()
    try:
        url, direct = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{to}"
        wait(url + "/health")
        wait(direct + "/")
        bench = Bench(url, direct, psutil.Process(processes[1].pid), clocks, words, arguments.each)
        rows = [bench.row(history, arguments.rounds) for history in arguments.history]
    finally:
        for process in processes:
            process.terminate()
    if arguments.add:
        rows = json.loads(arguments.out.read_text())["rows"] + rows
    result = {
        "what": (__doc__ or "").strip(), "unit": "ms", "rows": rows, "rounds": arguments.rounds,
        "reader": "smollm2-135m, llmlingua:keep=0.5", "threads": arguments.threads,
        "spread": "5th and 95th percentile", "hardware": record.hardware(torch.device("cpu")),
        "versions": record.versions(), "commit": record.commit(), "when": record.now(),
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows[-len(arguments.history) :]:
        print(json.dumps(row))
    return 0


def wait(url: str) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            httpx.get(url)
            return
        except httpx.TransportError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    raise SystemExit(main())
