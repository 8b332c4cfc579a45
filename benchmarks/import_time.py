"""What `import fewer` adds to `import torch`, in milliseconds.

Each repeat is a fresh interpreter that imports torch and then fewer; the second import is timed, in CPU seconds of the
process, which neighbours on the machine cannot stretch, and in wall seconds. The median over the repeats counts.

    python benchmarks/import_time.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from fewer.evaluation import record

RESULT = Path(__file__).parent / "results" / "import_time.json"
LIMIT_MS = 150.0
CODE = """
import time, torch
wall, cpu = time.perf_counter(), time.process_time()
import fewer
print(1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu))
"""


def once() -> tuple[float, float]:
    """(wall, CPU) milliseconds of `import fewer` after `import torch`."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    once()  # writes the bytecode, fills the disk cache
    wall, cpu = zip(*(once() for _ in range(arguments.repeats)), strict=True)
    result = {
        "what": "import fewer, after import torch",
        "unit": "ms",
        "cpu": round(statistics.median(cpu), 1),
        "wall": round(statistics.median(wall), 1),
        "wall_low": round(min(wall), 1),
        "wall_high": round(max(wall), 1),
        "limit": LIMIT_MS,
        "repeats": arguments.repeats,
        "against": "the same interpreter, torch already imported",
        "spread": "lowest and highest",
        "hardware": record.hardware(torch.device("cpu")),
        "versions": record.versions(),
        "commit": record.commit(),
        "when": record.now(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return int(result["cpu"] > LIMIT_MS)


if __name__ == "__main__":
    sys.exit(main())
