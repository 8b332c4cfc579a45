"""How much faster a prompt is read when tokens leave between the blocks, against what the remaining FLOPs promise.

A random Llama in the shape of SmolLM2-135M on one CPU thread in float32, fused attention on both sides; timings do not
depend on weights, and predictors are untrained. Seconds are this thread's CPU seconds. The unreduced model is run
before and after each reduced run; medians of the ratios, with quartiles.

    python benchmarks/prefill_speed.py --context 4096 --layers 30 --rounds 5 [--methods ...] [--out results.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from kv_speed import smol
from transformers import LlamaForCausalLM

import fewer
from fewer.evaluation import stats
from fewer.evaluation.record import commit, now

METHODS = ("lazyllm:keep=0.7", "lazyllm:keep=0.5", "sdtp", "agile_quant:bits=none")


@torch.inference_mode()
def timed(model: LlamaForCausalLM, ids: torch.Tensor, method: str | None) -> tuple[float, float, float]:
    """Seconds to read the prompt, the ceiling by FLOPs, and the method's own share of the seconds."""
    trained = method is not None and fewer.parse(method).card.training == "required"
    options = {"modules": "untrained"} if trained else {}
    with fewer.apply(model, method, **options) if method else nullcontext() as session:
        began = time.thread_time()
        model(ids, logits_to_keep=1)
        seconds = time.thread_time() - began
        if session is None:
            return seconds, 1.0, 0.0
        cost = session.ledger.reading
        return seconds, cost.ceiling, cost.own_seconds / cost.seconds


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--context", type=int, default=4096)
    arguments.add_argument("--layers", type=int, default=30, help="of 30")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--methods", nargs="+", default=METHODS)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    model = smol(given.layers)
    ids = torch.randint(0, 1024, (1, given.context), generator=torch.Generator().manual_seed(1))
    timed(model, ids, None)
    rows = []
    for method in given.methods:
        plain, reduced = [], []
        for _ in range(given.rounds):
            before = timed(model, ids, None)[0]
            seconds, ceiling, own = timed(model, ids, method)
            plain.append((before + timed(model, ids, None)[0]) / 2)
            reduced.append(seconds)
        gain = stats.ratios(plain, reduced)
        rows.append({
            "method": method, "speedup": [round(x, 3) for x in (gain.value, gain.low, gain.high)],
            "ceiling": round(ceiling, 3), "of_ceiling": round(gain.value / ceiling, 3),
            "own_percent": round(100 * own, 2),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    if given.out:
        passport = {
            "against": "the same weights reading everything, fused attention, run before and after",
            "layers": given.layers, "context": given.context, "rounds": given.rounds, "dtype": "float32", "threads": 1,
            "cpu": platform.machine(), "torch": torch.__version__, "commit": commit(), "when": now(),
        }  # fmt: skip
        given.out.write_text(json.dumps({"passport": passport, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
