"""How fast tokens are written behind a reduced cache, against the same model over a cache that really is that short.

A random Llama in the shape of SmolLM2-135M (30 layers, width 576, 9 query and 3 KV heads) on one CPU thread in float32;
timings do not depend on weights. Each method reads the prompt once, and so does the plain model, of its last tokens as
many as the method keeps. Then all write in turn, a few steps each, round after round; after each turn the plain model's
cache is cut back to its length. Ratios are taken inside a round, of this thread's CPU seconds; 1 means that the method
costs nothing while it writes. The plain model is timed twice in a round: how far the two are apart is the noise.

    python benchmarks/decode_speed.py --context 4096 --layers 12 --rounds 30 [--methods ...] [--out results.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from kv_speed import smol
from transformers import DynamicCache, LlamaForCausalLM

import fewer
from fewer.evaluation import stats
from fewer.evaluation.record import commit, now

METHODS = ("streamingllm:keep={keep}", "tova:keep={keep}", "h2o:keep={keep}", "snapkv:keep={keep},window=64",
           "knorm:keep={keep}")  # fmt: skip


class Writer:
    """A model behind a prompt. method: what reduces its cache, or None for a plain model."""

    def __init__(self, model: LlamaForCausalLM, ids: torch.Tensor, method: str | None) -> None:
        shared = {id(p): p for p in model.parameters()}
        self.model = copy.deepcopy(model, shared)
        self.method = method
        self.session = fewer.apply(self.model, method) if method else None
        self.cache = DynamicCache(config=model.config)
        self.token = ids[:, -1:]
        self.model(ids, past_key_values=self.cache, logits_to_keep=1)
        self.rows = self.cache.layers[0].keys.shape[-2]

    def write(self, steps: int) -> float:
        """Seconds for some tokens."""
        began = time.thread_time()
        for _ in range(steps):
            self.token = self.model(self.token, past_key_values=self.cache).logits.argmax(-1)
        spent = time.thread_time() - began
        if self.session is None:
            self.cache.crop(-steps)
        return spent


@torch.inference_mode()
def measure(given: argparse.Namespace, keep: float, model: LlamaForCausalLM, ids: torch.Tensor) -> list[dict[str, Any]]:
    plain = ids[:, -int(keep * given.context) :]
    writers = [Writer(model, plain, None), *(Writer(model, ids, m.format(keep=keep)) for m in given.methods)]
    writers.append(Writer(model, plain, None))
    spent: list[list[float]] = [[] for _ in writers]
    for turn in range(-2, given.rounds):  # two turns to warm up
        order = list(zip(writers, spent, strict=True))
        for writer, seconds in order if turn % 2 else order[::-1]:
            took = writer.write(given.steps)
            if turn >= 0:
                seconds.append(took / given.steps)
    rows = []
    for writer, seconds in zip(writers[1:], spent[1:], strict=True):
        ratio = stats.ratios(spent[0], seconds)
        row = {
            "method": writer.method or f"plain, {plain.shape[1]} tokens, again", "keep": keep, "rows": writer.rows,
            "of_plain": [round(x, 3) for x in (ratio.value, ratio.low, ratio.high)],
            "milliseconds": round(1000 * sorted(seconds)[len(seconds) // 2], 2),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--context", type=int, default=4096)
    arguments.add_argument("--layers", type=int, default=12, help="of 30: ratios need no more than a slice")
    arguments.add_argument("--rounds", type=int, default=30)
    arguments.add_argument("--steps", type=int, default=4, help="in a turn")
    arguments.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    arguments.add_argument("--methods", nargs="+", default=METHODS)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    model = smol(given.layers)
    ids = torch.randint(0, 1024, (1, given.context), generator=torch.Generator().manual_seed(1))
    rows = [row for keep in given.keep for row in measure(given, keep, model, ids)]
    passport = {
        "against": "the same weights behind a prompt as short as the reduced cache (DynamicCache, sdpa), interleaved",
        "layers": given.layers, "context": given.context, "rounds": given.rounds, "steps": given.steps,
        "spread": "median and quartiles of the rounds' ratios", "dtype": "float32", "threads": 1,
        "cpu": platform.machine(), "torch": torch.__version__, "transformers": transformers.__version__,
        "commit": commit(), "when": now(),
    }  # fmt: skip
    if given.out:
        given.out.write_text(json.dumps({"passport": passport, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
