"""Speed of token reduction on a video encoder against the same model on fused attention.

VideoMAE-S on a clip of 16 frames of 224 x 224 pixels: 8 x 196 tokens, 12 blocks of width 384. Measured as
`vision_speed.py` measures pictures: every repeat runs the unreduced model and all settings in turn.

    python benchmarks/video_speed.py --batch 1 --threads 1
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification
from vision_speed import paired, save

SHAPES = {"videomae-ti": (192, 3), "videomae-s": (384, 6), "videomae-b": (768, 12)}
DEFAULT = (
    "frames:keep=1.0", "frames:keep=0.5", "rlt:keep=0.5", "testa:r=12,frames=0", "testa:r=6,frames=1,layers=0+3+6+9",
    "evad:keep=0.7", "evad:keep=0.5,layers=0+4", "stts:keep=0.625", "stts:by=windows,keep=0.6", "ts2_net:keep=0.5",
    "vtm:keep=0.3333", "vtm:targets=learned,keep=0.5", "storm:keep=0.5", "tempme", "tome:r=65",
)  # fmt: skip


def model_of(shape: str) -> VideoMAEForVideoClassification:
    width, heads = SHAPES[shape]
    config = VideoMAEConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_labels=400)
    return VideoMAEForVideoClassification(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="videomae-s", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--settings", nargs="+", default=list(DEFAULT), help="text forms")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--execution", default="padded", choices=["padded", "packed"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    model = model_of(args.shape).to(args.device, dtype)
    x = torch.randn(args.batch, 16, 3, 224, 224, device=args.device, dtype=dtype)
    rows = paired(model, x, args.settings, args.repeats, args.execution)
    for row in rows:
        print(
            f"{args.shape} b{args.batch} {row['setting']:36s} {row['speedup']:.3f}x "
            f"[{row['low']:.3f}, {row['high']:.3f}] ceiling {row['ceiling']:.3f}x achieved {row['achieved']:.3f} "
            f"tokens {row['mean_tokens']:.0f}"
        )
    if args.out:
        save(args.out, [{"shape": args.shape, "batch": args.batch} | row for row in rows], args)


if __name__ == "__main__":
    main()
