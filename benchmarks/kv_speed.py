"""What cache methods cost while reading and gain while writing, against the same model with its whole cache.

A random Llama in the shape of SmolLM2-135M (30 layers, width 576, 9 query and 3 KV heads) on one CPU thread in float32;
timings do not depend on weights. Seconds are this thread's CPU seconds, so other processes hardly disturb them. All
variants take turns in every round; medians of the rounds' ratios, with quartiles. `own_percent` is the share of the
reading time that the session spent on the method, by its own clock. The whole cache is timed twice in a round: how far
the two are apart is the noise.

    python benchmarks/kv_speed.py --context 1024 --rounds 5 --steps 16 [--methods ...] [--out results.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fewer
from fewer.evaluation import stats

METHODS = ("streamingllm:keep={keep},decodes=false", "knorm:keep={keep}", "keydiff:keep={keep}",
           "snapkv:keep={keep},window=64", "expected_attention:keep={keep}", "adakv:keep={keep},window=64")  # fmt: skip


def smol(layers: int) -> LlamaForCausalLM:
    """SmolLM2-135M's shape, random weights; with fewer layers a slice of it, the vocabulary cut in proportion."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=49152 * layers // 30, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )).eval()  # fmt: skip


@torch.no_grad()
def timed(
    model: LlamaForCausalLM, ids: torch.Tensor, steps: int, method: str | None
) -> tuple[float, float, int, float]:
    """Seconds to read the prompt and to write `steps` tokens after it, bytes of the cache once read, the own share."""
    with fewer.apply(model, method) if method else nullcontext() as session:
        cache = DynamicCache(config=model.config)
        began, wall = time.thread_time(), time.perf_counter()
        token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        read, wall = time.thread_time() - began, time.perf_counter() - wall
        held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
        held, own = (session.ledger.bytes, session.ledger.seconds / wall) if session else (held, 0.0)
        token = model(token, past_key_values=cache).logits.argmax(-1)  # the first step pays for new shapes
        began = time.thread_time()
        for _ in range(steps):
            token = model(token, past_key_values=cache).logits.argmax(-1)
        return read, time.thread_time() - began, held, own


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--context", type=int, default=1024)
    arguments.add_argument(
        "--layers", type=int, default=30, help="of 30: ratios need no more than a slice of the model"
    )
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=16)
    arguments.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    arguments.add_argument("--methods", nargs="+", default=METHODS)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    model = smol(given.layers)
    ids = torch.randint(0, 1024, (1, given.context), generator=torch.Generator().manual_seed(1))
    variants = ["", *(m.format(keep=k) for m in given.methods for k in given.keep), " "]
    runs: dict[str, list[tuple[float, float, int, float]]] = {v: [] for v in variants}
    timed(model, ids[:, :128], 2, None)
    for i in range(given.rounds):
        for variant in variants if i % 2 == 0 else variants[::-1]:
            runs[variant].append(timed(model, ids, given.steps, variant.strip() or None))
    rows = []
    for variant, own in runs.items():
        cost = stats.ratios([r[0] for r in own], [r[0] for r in runs[""]])
        gain = stats.ratios([r[1] for r in runs[""]], [r[1] for r in own])
        rows.append({
            "method": variant.strip() or ("whole cache" if not variant else "whole cache, again"),
            "prefill_cost_percent": [round(100 * (x - 1), 2) for x in (cost.value, cost.low, cost.high)],
            "decode_speedup": [round(x, 3) for x in (gain.value, gain.low, gain.high)],
            "own_percent": round(100 * statistics.median(r[3] for r in own), 2),
            "cache_mb": round(own[0][2] / 1e6, 3),
        })  # fmt: skip
        print(json.dumps(rows[-1]))
    if given.out:
        passport = {
            "layers": given.layers, "context": given.context, "rounds": given.rounds, "steps": given.steps,
            "dtype": "float32", "threads": 1, "cpu": platform.machine(), "torch": torch.__version__,
        }  # fmt: skip
        given.out.write_text(json.dumps({"passport": passport, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
