"""How much faster a picture and a question are read with fewer visual tokens, against what the remaining FLOPs promise.

A random LLaVA whose language model has the shape of SmolLM2-135M or 360M, on one CPU thread in float32, fused attention
on both sides; timings do not depend on weights. Timed is the language model's prefill with everything the method does
for it; the pictures are encoded before, once for all runs of a method. Seconds are this thread's CPU seconds. The
unreduced model is run before and after each reduced run; medians of the ratios, with quartiles.

    python benchmarks/visual_speed.py --rows 576 --tokens 64 --rounds 5 [--methods ...] [--out results.json]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import fewer
from fewer.evaluation import stats
from fewer.evaluation.record import commit, now

BRIDGE = ("random:site=bridge", "grid:site=bridge", "divprune", "fastervlm", "visionzip", "vispruner", "prumerge",
          "trim", "cdpruner", "m3")  # fmt: skip
INSIDE = ("fastv", "dart", "topv")
WORDS = 40
SHAPES = {  # of SmolLM2: width, inner width, layers, heads, KV heads
    "135m": (576, 1536, 30, 9, 3),
    "360m": (960, 2560, 32, 15, 5),
}


def llava(rows: int, shape: str) -> LlavaForConditionalGeneration:
    """A small tower of so many patches before a language model of a SmolLM2's shape."""
    torch.manual_seed(0)
    side = math.isqrt(rows)
    width, inner, layers, heads, kv_heads = SHAPES[shape]
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=14 * side,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=7)
    return LlavaForConditionalGeneration(config).eval()


@torch.inference_mode()
def timed(model: Any, ids: torch.Tensor, pixels: torch.Tensor, method: str | None) -> dict[str, float]:
    """Seconds of the prefill; with a method its ceiling by FLOPs, its own share of the seconds, visual rows left."""
    trained = method is not None and fewer.parse(method).card.training == "required"
    options: dict[str, Any] = {"modules": "untrained"} if trained else {}
    with fewer.apply(model, method, **options) if method else nullcontext() as session:
        encoded = {"image": model.model.get_image_features(pixels, return_dict=True)}
        began = time.thread_time()
        model(ids, mm_encoder_outputs=encoded, logits_to_keep=1)
        seconds = time.thread_time() - began
        if session is None:
            return {"seconds": seconds}
        cost = session.ledger.reading
        return {
            "seconds": seconds, "ceiling": cost.ceiling, "own": cost.own_seconds / cost.seconds,
            "rows": session.visual_counts[-1], "own_seconds": cost.own_seconds,
        }  # fmt: skip


def settings(tokens: int, rows: int) -> list[str]:
    """The text forms measured."""
    joined = [f"{m}{',' if ':' in m else ':'}tokens={tokens}" for m in BRIDGE]
    return joined + [f"{m}:keep={tokens / rows:.4f}" for m in INSIDE]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rows", type=int, default=576, help="visual tokens, a square number")
    arguments.add_argument("--tokens", type=int, default=64, help="that stay")
    arguments.add_argument("--shape", choices=SHAPES, default="135m")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--methods", nargs="+")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    model = llava(given.rows, given.shape)
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(8, 1024, (1, WORDS), generator=generator)
    ids = torch.cat([words[:, :5], torch.full((1, given.rows), 7), words[:, 5:]], 1)
    side = 14 * math.isqrt(given.rows)
    pixels = torch.randn(1, 3, side, side, generator=generator)
    timed(model, ids, pixels, None)
    rows = []
    for method in given.methods or settings(given.tokens, given.rows):
        plain, reduced = [], []
        last: dict[str, float] = {}
        for _ in range(given.rounds):
            before = timed(model, ids, pixels, None)["seconds"]
            last = timed(model, ids, pixels, method)
            plain.append((before + timed(model, ids, pixels, None)["seconds"]) / 2)
            reduced.append(last["seconds"])
        gain = stats.ratios(plain, reduced)
        rows.append({
            "method": method, "rows": last["rows"], "speedup": [round(x, 3) for x in (gain.value, gain.low, gain.high)],
            "ceiling": round(last["ceiling"], 3), "of_ceiling": round(gain.value / last["ceiling"], 3),
            "own_percent": round(100 * last["own"], 2),
            "own_of_unreduced_percent": round(100 * last["own_seconds"] / statistics.median(plain), 3),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    if given.out:
        passport = {
            "against": "the same weights reading all visual tokens, fused attention, run before and after",
            "rows": given.rows, "tokens": given.tokens, "shape": given.shape, "words": WORDS, "rounds": given.rounds,
            "dtype": "float32", "threads": 1, "cpu": platform.machine(), "torch": torch.__version__,
            "commit": commit(), "when": now(),
        }  # fmt: skip
        given.out.write_text(json.dumps({"passport": passport, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
