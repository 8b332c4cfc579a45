"""How long `fewer.apply` takes to find a model's blocks and to verify its places: the first time, and afterwards.

Each repeat is a fresh interpreter on one thread, with torch, transformers and the model already there. "first" has an
empty cache folder; "later" the folder that was left, as every process after the first one; "again" is a second apply in
the same process. "imports" is the code of fewer that a first apply of the method needs, apart from these.

Seconds of the process (CPU), which neighbours on the machine cannot stretch, and wall seconds; the median over the
repeats counts. Tiny models have random weights; the others have their real shape and no weights (torch's meta device),
as neither finding nor verifying reads any.

    python benchmarks/discovery_time.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fewer.evaluation import record

RESULT = Path(__file__).parent / "results" / "discovery_time.json"
FIRST_S, LATER_S = 3.0, 0.05
VIT_SMALL = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)
LLAMA_SMALL = VIT_SMALL | dict(num_key_value_heads=2, vocab_size=128, pad_token_id=0)
LLAMA_1B = dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
                intermediate_size=8192, vocab_size=128256, max_position_embeddings=131072)  # fmt: skip
LLAMA_7B = dict(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32064
)
CLIP_L = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=336,
              patch_size=14, projection_dim=768)  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], str]] = {
    # name -> class, config's class, what is said of the small one, and of the real one, a method
    "ViT": ("ViTForImageClassification", "ViTConfig", VIT_SMALL | dict(image_size=32, patch_size=8), {}, "tome:r=2"),
    "BERT": ("BertForMaskedLM", "BertConfig", VIT_SMALL | dict(vocab_size=128), {}, "power_bert:keep=0.7"),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA_SMALL, LLAMA_1B, "snapkv:keep=0.5"),
    "LLaVA": (
        "LlavaForConditionalGeneration", "LlavaConfig",
        dict(text_config=LLAMA_SMALL | dict(model_type="llama"), image_token_index=7, vision_config=VIT_SMALL | dict(
            model_type="clip_vision_model", image_size=32, patch_size=8, projection_dim=64)),
        dict(text_config=LLAMA_7B | dict(model_type="llama"), vision_config=CLIP_L | dict(
            model_type="clip_vision_model"), image_token_index=32000),
        "fastv:keep=0.5",
    ),
}  # fmt: skip


def child(name: str, real: bool) -> None:
    """Print the seconds of what is imported, of apply, and of a second one."""
    import time

    import transformers

    import fewer
    from fewer.spec import parse

    torch.set_num_threads(1)
    cls, config, small, large, spelled = MODELS[name]
    torch.manual_seed(0)
    with torch.device("meta" if real else "cpu"):
        model = getattr(transformers, cls)(getattr(transformers, config)(**(large if real else small))).eval()
    wall, cpu = time.perf_counter(), time.process_time()
    apply, method = fewer.apply, parse(spelled)  # which are imported now
    took = [(time.perf_counter() - wall, time.process_time() - cpu)]
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        session = apply(model, method)
        took.append((time.perf_counter() - wall, time.process_time() - cpu))
        session.remove()
    print(json.dumps({"took": took, "parameters": sum(p.numel() for p in model.parameters())}))


def once(name: str, real: bool, folder: str) -> dict[str, Any]:
    env = os.environ | {"FEWER_CACHE": folder, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--child", name, *(["--real"] if real else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(name: str, real: bool, repeats: int) -> Iterator[tuple[str, Any]]:
    """What is known of one model: the seconds of each kind."""
    took: dict[str, list[tuple[float, float]]] = {"first": [], "later": [], "again": [], "imports": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            first, later = once(name, real, folder), once(name, real, folder)
        for kind, seconds in (
            ("first", first["took"][1]),
            *zip(("imports", "later", "again"), later["took"], strict=True),
        ):
            took[kind].append(seconds)
    yield "parameters", first["parameters"]
    for kind, seconds in took.items():
        wall, cpu = zip(*seconds, strict=True)
        spread = {"low": round(min(cpu), 4), "high": round(max(cpu), 4), "wall": round(statistics.median(wall), 4)}
        yield kind, {"cpu": round(statistics.median(cpu), 4), **spread}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="models whose name has this in it")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--real", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.real)
        return 0
    rows = []
    for name in MODELS:
        for real in (False, True) if arguments.only in name else ():
            row = {"model": name, "shape": "real" if real else "tiny", "method": MODELS[name][-1]}
            rows.append(row | dict(measured(name, real, arguments.repeats)))
            print(json.dumps(rows[-1]), flush=True)
    late = [r for r in rows if r["first"]["cpu"] > FIRST_S or r["later"]["cpu"] > LATER_S]
    result = {
        "what": "fewer.apply: finding and verifying; first, later in a fresh process, again in the same one",
        "unit": "s", "limit": {"first": FIRST_S, "later": LATER_S}, "repeats": arguments.repeats, "threads": 1,
        "spread": "lowest and highest, CPU; wall beside it", "rows": rows,
        "hardware": record.hardware(torch.device("cpu")), "versions": record.versions(), "commit": record.commit(),
        "when": record.now(),
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"over the limit: {', '.join(r['model'] + ' ' + r['shape'] for r in late) or 'none'}")
    return bool(late)


if __name__ == "__main__":
    sys.exit(main())
