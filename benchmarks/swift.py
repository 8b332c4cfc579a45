"""How fast a long text is written: TokenSwift, and transformers' prompt lookup, against plain decoding of that text.

SmolLM2-135M on one CPU thread, batch 1, greedy, with and without the contextual penalty (without it, small models end
in loops, which any table of n-grams foretells). All write on from the same prompt, turn by turn, a chunk of tokens
each, so that whatever else the machine does hits all of them; each in a thread of its own, whose CPU seconds are
counted. Speed-ups at a length are ratios of the seconds until then; spread is over the chunks. Whether the texts are
the same is said, too.

    python benchmarks/swift.py --new 2048 --out benchmarks/results/swift.json [--heads FOLDER] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from fewer.datasets.texts import book
from fewer.evaluation import stats
from fewer.evaluation.record import commit, now
from fewer.generation import ContextualPenalty, Swift, load, packaged
from fewer.models.zoo import load_model

LENGTHS = (256, 512, 1024, 2048, 4096)
CHAT = (
    "Write a long story, in many chapters, about a lighthouse keeper who finds a map.",
    "Explain in great detail how a bill becomes law in the United States, step by step, with examples.",
)


class Turns:
    """Whose turn it is among several threads, each of which hands on after a chunk of tokens."""

    def __init__(self, count: int) -> None:
        self.gates = [threading.Semaphore(int(i == 0)) for i in range(count)]
        self.left = set(range(count))
        self.forward = True

    def next(self, mine: int) -> None:
        """Hand on, and wait to be called again."""
        self._wake(mine)
        self.gates[mine].acquire()

    def done(self, mine: int) -> None:
        self.left.discard(mine)
        if self.left:
            self._wake(mine)

    def _wake(self, mine: int) -> None:
        later = [i for i in sorted(self.left) if i > mine]
        self.gates[(later or sorted(self.left))[0]].release()


class Clock:
    """A streamer that notes this thread's CPU seconds at every token, and ends its turn after a chunk."""

    def __init__(self, turns: Turns, mine: int, chunk: int) -> None:
        self.turns, self.mine, self.chunk = turns, mine, chunk
        self.at: list[float] = []
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt:
            self.prompt = False
            return
        before = len(self.at)
        self.at += [time.thread_time()] * value.numel()
        if before and before // self.chunk != len(self.at) // self.chunk:
            self.turns.next(self.mine)

    def end(self) -> None:
        pass


def written(
    model: Any, ids: torch.Tensor, given: argparse.Namespace, ways: dict[str, Callable], processors: list
) -> Any:
    """Each way's ids, seconds since its first token, and what it counts."""
    turns, found = Turns(len(ways)), dict[str, Any]()

    def run(mine: int, name: str, way: Callable) -> None:
        turns.gates[mine].acquire()
        try:
            torch.set_num_threads(1)
            clock = Clock(turns, mine, given.chunk)
            more, counts = way(clock)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=given.new,
                min_new_tokens=given.new, logits_processor=list(processors), pad_token_id=0, **more,
            )  # fmt: skip
            found[name] = (out[0, ids.shape[1] :].tolist(), [t - clock.at[0] for t in clock.at], counts())
        finally:
            turns.done(mine)

    threads = [threading.Thread(target=run, args=(i, *item)) for i, item in enumerate(ways.items())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def plain(clock: Clock) -> tuple[dict, Callable]:
    return {"streamer": clock}, dict


def lookup(clock: Clock) -> tuple[dict, Callable]:
    return {"streamer": clock, "prompt_lookup_num_tokens": 10}, dict


def swift(**options: Any) -> Callable:
    def way(clock: Clock) -> tuple[dict, Callable]:
        writer = Swift(streamer=clock, **options)

        def counts() -> dict:
            done = writer.written
            assert done is not None
            return {
                "tokens a pass": round(done.per_pass, 3), "nodes a pass": round(sum(done.nodes) / len(done.nodes), 1),
                "guesses tested and true": done.sources,
            }  # fmt: skip

        return {"custom_generate": writer}, counts

    return way


def rows(found: dict[str, Any], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each way: cumulative speed-ups over plain by length, and the chunks' spread."""
    tokens, base, _ = found["plain"]
    made = []
    for name, (own, at, counts) in found.items():
        same = next((i for i, pair in enumerate(zip(own, tokens, strict=True)) if pair[0] != pair[1]), len(tokens))
        ends = range(given.chunk, len(tokens) + 1, given.chunk)
        seconds = [[clock[min(e, len(clock)) - 1] - clock[max(e - given.chunk - 1, 0)] for e in ends]
                   for clock in (base, at)]  # fmt: skip
        pairs = [(p, s) for p, s in zip(*seconds, strict=True) if s > 0]
        ratio = stats.ratios([p for p, _ in pairs], [s for _, s in pairs])
        made.append({
            "way": name, "same tokens": same, "of": len(tokens),
            "speed-up at": {n: round(base[n - 1] / at[n - 1], 3) for n in LENGTHS if n <= len(tokens)},
            "chunks": [round(x, 3) for x in (ratio.value, ratio.low, ratio.high)],
            "tokens a second": round((len(tokens) - 1) / at[-1], 2), **counts,
        })  # fmt: skip
    return made


def prompts(tokenizer: Any) -> dict[str, torch.Tensor]:
    """A chapter's worth of held-out text, and questions that ask for length."""
    held = torch.tensor(tokenizer(book("state-of-the-union")[-60000:-20000], verbose=False)["input_ids"])
    found = {"state-of-the-union": held[None, :256]}
    for i, text in enumerate(CHAT):
        turn = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                             add_generation_prompt=True)  # fmt: skip
        found[f"chat {i + 1}"] = torch.tensor([tokenizer(turn, add_special_tokens=False)["input_ids"]])
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--new", type=int, default=2048)
    arguments.add_argument("--chunk", type=int, default=32)
    arguments.add_argument("--heads", help="file or folder; default: the package's")
    arguments.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments.add_argument("--penalty", type=float, nargs="+", default=[1.2, 1.0])
    arguments.add_argument("--prompts", nargs="+")
    arguments.add_argument("--nodes", type=int, default=16)
    arguments.add_argument("--least", type=float, default=0.1)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model("smollm2-135m", dtype=getattr(torch, given.dtype))
    heads = load(given.heads, model) if given.heads else packaged(model)
    options = {"nodes": given.nodes, "least": given.least}
    ways = {"plain": plain, "prompt lookup": lookup, "n-grams": swift(**options)}
    if heads is not None:
        ways |= {"heads and n-grams": swift(heads=heads, **options)}
    passport = {
        "what": "CPU seconds from the first new token on, batch 1, greedy; turns of chunk tokens, interleaved",
        "against": "generate() of the same text (DynamicCache, sdpa)", "model": "SmolLM2-135M-Instruct, Q4_1 twin",
        "settings": {k: v for k, v in vars(given).items() if k not in ("out", "heads")},
        "spread": "chunks: median and quartiles of the ratios of the chunks' seconds", "threads": 1,
        "cpu": platform.machine(), "torch": torch.__version__, "transformers": transformers.__version__,
        "commit": commit(), "when": now(),
    }  # fmt: skip
    results = []
    for penalty in given.penalty:
        processors = [ContextualPenalty(penalty, 1024)] if penalty != 1 else []
        for name, ids in prompts(tokenizer).items():
            if given.prompts and name not in given.prompts:
                continue
            for row in rows(written(model, ids, given, ways, processors), given):
                results.append({"prompt": name, "read": ids.shape[1], "penalty": penalty} | row)
                print(json.dumps(results[-1]), flush=True)
            if given.out:  # what there is, whatever happens next
                given.out.write_text(json.dumps({"passport": passport, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
