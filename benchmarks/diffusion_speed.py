"""How much faster a denoiser runs with fewer tokens, against what the remaining FLOPs promise, and its memory.

A random UNet of Stable Diffusion's design, half as wide and three levels deep, fused attention on both sides, one CPU
thread in float32: timings do not depend on weights. Seconds are this thread's CPU seconds. The unreduced model is run
before and after each reduced run; medians of the ratios, with quartiles. FLOPs are those torch counts in the model.

    python benchmarks/diffusion_speed.py --side 40 --rounds 5 [--peer FOLDER] [--memory] [--steps] [--out results.json]

--peer: a folder with the official package tomesd 0.1.3, which is then run in the same rounds.
--memory: peak of the memory that torch takes in one evaluation, in a process of its own.
--steps: methods over 12 steps on a DiT of 256 tokens, against as many full steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fewer
from fewer.evaluation.record import commit, now

FORMS = ("tomesd:ratio=0.5", "tomesd:ratio=0.5,proportional=true", "tomesd:ratio=0.75",
         "tomesd:ratio=0.5,cross=true,mlp=true")  # fmt: skip
OVER_STEPS = ("fora:every=3", "toca:every=3", "toca:every=4", "duca:every=3", "first_block_cache:threshold=0.1")
PEER = "the official package"


def unet(side: int) -> tuple[Any, Callable[[Any], Any]]:
    """A UNet of half of Stable Diffusion's width, its three finest levels, on latents of side x side; one evaluation of
    it for two pictures."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model: Any = UNet2DConditionModel(
        sample_size=side, in_channels=4, out_channels=4, block_out_channels=(160, 320, 640), layers_per_block=2,
        cross_attention_dim=768, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    x, words = torch.randn(2, 4, side, side), torch.randn(2, 77, 768)
    return model, lambda model: model(x, 500, words).sample


def dit() -> tuple[Any, Callable[[Any], Any]]:
    """A DiT on 32 x 32 pixels of patch 2, and 12 steps of it for eight pictures."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model: Any = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, num_layers=12, sample_size=32, patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    start, labels = torch.randn(8, 4, 32, 32), torch.arange(8)

    def steps(model: Any) -> Any:
        x = start
        for time_ in range(960, 0, -80):
            x = x - 0.08 * model(x, timestep=torch.full((8,), time_), class_labels=labels).sample
        return x

    return model, steps


@contextmanager
def peer(folder: str, model: Any) -> Any:
    sys.path.insert(0, folder)
    import tomesd

    tomesd.apply_patch(model, ratio=0.5)
    try:
        yield None
    finally:
        tomesd.remove_patch(model)
        sys.path.remove(folder)


@torch.inference_mode()
def seconds(call: Callable[[], Any]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


@torch.inference_mode()
def flops(call: Callable[[], Any]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # CPU kernels are not counted
        call()
    return int(counter.get_total_flops())


def measured(model: Any, run: Callable[[Any], Any], on: Callable[[], AbstractContextManager[Any]], rounds: int) -> dict:
    """Speed-ups with quartiles, the ceiling by FLOPs, the method's own share of the seconds."""
    ratios, own = [], []
    for _ in range(rounds):
        before = seconds(lambda: run(model))
        with on() as session:
            mine = seconds(lambda: run(model))
            if session is not None:
                own.append(session.ledger.own_seconds / session.ledger.seconds)
        after = seconds(lambda: run(model))
        ratios.append((before + after) / 2 / mine)
    full = flops(lambda: run(model))
    with on():
        ceiling = full / flops(lambda: run(model))
    low, _, high = quantiles(ratios, n=4) if rounds > 1 else (ratios[0],) * 3
    row = {"speedup": median(ratios), "low": low, "high": high, "ceiling": ceiling, "reached": median(ratios) / ceiling}
    return row | ({"own": median(own)} if own else {})


def peak(side: int, form: str) -> float:
    """MB that one evaluation adds to the process's peak, in a process of its own."""
    code = (
        "import resource, sys, torch, fewer; sys.path.insert(0, 'benchmarks'); import diffusion_speed as d\n"
        f"model, run = d.unet({side})\nfrom contextlib import nullcontext\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"on = fewer.apply(model, {form!r}) if {form!r} else nullcontext()\n"
        "with torch.inference_mode(), on: run(model)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024)"
    )
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=FORMS)
    parser.add_argument("--peer")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "on": f"{platform.machine()}, 1 thread, float32, torch {torch.__version__}", "rounds": given.rounds,
        "commit": commit(), "when": now(), "side": given.side,
    }  # fmt: skip
    if given.memory:
        found["peak MB"] = {form or "unreduced": peak(given.side, form) for form in ("", *given.methods)}
        print(found["peak MB"])
    else:
        model, run = dit() if given.steps else unet(given.side)
        forms = given.methods if given.methods is not FORMS or not given.steps else OVER_STEPS
        with torch.inference_mode():
            run(model)
        choices: dict[str, Callable[[], Any]] = {f: lambda f=f: fewer.apply(model, f) for f in forms}  # type: ignore[misc]
        if given.peer and not given.steps:
            choices[PEER] = lambda: peer(given.peer, model)
        choices = {"unreduced": nullcontext, **choices}
        found["rows"] = {}
        for name, on in choices.items():
            found["rows"][name] = row = measured(model, run, on, given.rounds)
            print(name, {k: round(v, 3) for k, v in row.items()}, flush=True)
    if given.out:
        old = json.loads(given.out.read_text()) if given.out.exists() else {}
        kind = "memory" if given.memory else "steps" if given.steps else f"unet-{given.side}"
        given.out.write_text(json.dumps(old | {kind: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
