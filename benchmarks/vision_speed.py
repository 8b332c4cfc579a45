"""Speed of token reduction on ViT shapes against the same model on fused attention.

Every repeat runs the unreduced model and all settings in turn, so a drifting machine drifts for all of them; ratios are
taken inside a repeat and their median and quartiles reported. `achieved` = speed-up / ceiling, where the ceiling is
the ratio of FLOPs the blocks are left with. Weights are random: speed does not depend on them.

    python benchmarks/vision_speed.py --shape deit-s --batch 8 --threads 1
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import ViTConfig, ViTForImageClassification

import fewer
from fewer.evaluation.record import commit, now

SHAPES = {"deit-ti": (192, 3), "deit-s": (384, 6), "vit-b": (768, 12)}
DEFAULT = ("tome:r=0", "tome:r=8", "tome:r=13", "tome:r=16", "evit:keep=0.7")
OTHERS = (
    "random:keep=0.7", "grid:keep=0.7", "pool:keep=0.7", "cls_topk:keep=0.7", "tofu:r=13", "diffrate:r=13", "ppt",
    "tps", "atc:keep=0.7", "atc:keep=0.7,linkage=single", "atc:keep=0.7,linkage=complete", "dpc_knn:keep=0.7",
    "kmedoids:keep=0.7", "token_transforming:keep=0.7", "dynamicvit", "spvit", "heatvit", "tokenlearner",
)  # fmt: skip
RAGGED = ("evit:mass=0.5,fuse=false", "evit:mass=0.7,fuse=false", "ats")
LISTS = {"default": DEFAULT, "others": OTHERS, "ragged": RAGGED}


def model_of(shape: str) -> ViTForImageClassification:
    width, heads = SHAPES[shape]
    config = ViTConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_labels=1000)
    return ViTForImageClassification(config).eval()


def modules_of(setting: str) -> str | None:
    """Untrained modules where a method has any: they cost what trained ones do."""
    return "untrained" if fewer.parse(setting).modules(8, 2, 1, 4) else None


def seconds(model: torch.nn.Module, x: torch.Tensor) -> float:
    """CPU seconds of this thread on one thread (others cannot disturb it), else wall seconds."""
    clock = time.thread_time if torch.get_num_threads() == 1 and x.device.type == "cpu" else time.perf_counter
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    model(pixel_values=x)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


@torch.inference_mode()
def measure(
    shape: str, batch: int, settings: list[str], repeats: int, execution: str, device: str, dtype: str
) -> list[dict]:
    torch.manual_seed(0)
    model = model_of(shape).to(device, getattr(torch, dtype))
    x = torch.randn(batch, 3, 224, 224, device=device, dtype=getattr(torch, dtype))
    return [{"shape": shape, "batch": batch} | row for row in paired(model, x, settings, repeats, execution)]


@torch.inference_mode()
def paired(model: torch.nn.Module, x: torch.Tensor, settings: list[str], repeats: int, execution: str) -> list[dict]:
    """A row for each setting."""
    ratios: dict[str, list[float]] = {s: [] for s in settings}
    facts: dict[str, dict] = {}
    plain: list[float] = []
    for turn in range(repeats + 1):
        base = seconds(model, x)
        for setting in settings:
            with fewer.apply(model, setting, execution=execution, modules=modules_of(setting)) as session:
                spent = seconds(model, x)
            if turn == 0:  # warm-up, and the counts
                ledger = session.ledger
                facts[setting] = {"gflops": ledger.gflops, "ceiling": ledger.ceiling, "tokens": ledger.mean_tokens}
                continue
            ratios[setting].append(base / spent)
            ledger = session.ledger
            if ledger.seconds and ledger.own_seconds is not None:  # both on the wall clock, of the blocks
                facts[setting].setdefault("own", []).append(ledger.own_seconds / ledger.seconds)
        if turn:
            plain.append(base)
    rows = []
    for setting in settings:
        quartiles = statistics.quantiles(ratios[setting], n=4) if repeats > 1 else [ratios[setting][0]] * 3
        fact = facts[setting]
        rows.append({
            "setting": setting, "execution": execution,
            "speedup": quartiles[1], "low": quartiles[0], "high": quartiles[2],
            "ceiling": fact["ceiling"], "achieved": quartiles[1] / fact["ceiling"],
            "own_time_share": statistics.median(fact["own"]) if "own" in fact else None,
            "gflops": fact["gflops"], "mean_tokens": fact["tokens"],
            "plain_seconds": statistics.median(plain), "repeats": repeats,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["deit-s"], choices=SHAPES)
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--settings", nargs="+", default=["default"], help=f"text forms, or one of {', '.join(LISTS)}")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--execution", default="padded", choices=["padded", "packed"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.settings = [form for item in args.settings for form in LISTS.get(item, (item,))]
    torch.set_num_threads(args.threads)
    rows: list[dict] = []
    for shape in args.shape:
        for batch in args.batch:
            rows += measure(shape, batch, args.settings, args.repeats, args.execution, args.device, args.dtype)
            for row in rows[-len(args.settings) :]:
                print(
                    f"{shape:8s} b{batch:<3d} {row['setting']:28s} {row['speedup']:.3f}x "
                    f"[{row['low']:.3f} {row['high']:.3f}] ceiling {row['ceiling']:.3f} "
                    f"achieved {row['achieved']:.3f} own {100 * (row['own_time_share'] or 0):.1f}%",
                    flush=True,
                )
    if args.out:
        save(args.out, rows, args)


def save(path: Path, rows: list[dict], args: argparse.Namespace) -> None:
    """Add rows to a file, in place of earlier ones of the same setting; each says when and at which commit."""

    def key(row: dict) -> tuple:
        return row["shape"], row["batch"], row["execution"], row["setting"]

    old = json.loads(path.read_text())["rows"] if path.exists() else []
    new = [row | {"commit": commit(), "when": now()} for row in rows]
    cpu = f"{platform.machine()} CPU, {args.threads} thread(s)"
    passport = {
        "against": "the same weights, unreduced, fused attention (SDPA), interleaved",
        "hardware": cpu if args.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__, "transformers": transformers.__version__, "dtype": args.dtype,
    }  # fmt: skip
    kept = [row for row in old if key(row) not in {key(row) for row in new}]
    path.write_text(json.dumps({"passport": passport, "rows": kept + new}, indent=1) + "\n")


if __name__ == "__main__":
    main()
