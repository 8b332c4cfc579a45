"""Peak memory of matching and of attention statistics on long sequences, each measured in a process of its own.

    python benchmarks/memory.py [--threads 1] [--out benchmarks/results/memory.json]

The number is the largest resident set of the whole process: interpreter, torch, inputs and work. The row "nothing" is
the same process with its inputs and no work.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "nothing, 65536 tokens of width 64": None,
    "matching 65536 tokens of width 64": 2000,
    "nothing, 6 heads of 16384 tokens": None,
    "attention mass of 6 heads of 16384 tokens": 1000,
}  # the limit in MB, of the whole process


def measure(case: str, threads: int) -> dict[str, float]:
    """Run one case here. Returns peak resident MB and the seconds of the work."""
    import torch

    from fewer.core import Place, Remove, Seen, Tokens, attention, match

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if "65536" in case:
        metric, tokens = torch.randn(1, 65536, 64), Tokens.plain(1, 65536)
        began = time.perf_counter()
        if not case.startswith("nothing"):
            assert match.bipartite(metric, Remove(20000), tokens, at=Place()).m == 45536
    else:
        q, k, v = (torch.randn(1, 6, 16384, 64) for _ in range(3))
        began = time.perf_counter()
        if not case.startswith("nothing"):
            mass = attention.mass(Seen(q, k, v, 64**-0.5))
            assert abs(mass.sum().item() / (6 * 16384) - 1) < 1e-3
    seconds = time.perf_counter() - began
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, "seconds": seconds}


def processor() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), help="measure one case in this process and print it as JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "memory.json")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    if options.case:
        print(json.dumps(measure(options.case, options.threads)))
        return 0
    import torch

    rows, failed = [], False
    print(f"{'':44}{'peak MB':>9}{'limit':>7}{'seconds':>9}")
    for case, limit in CASES.items():
        command = [sys.executable, __file__, "--case", case, "--threads", str(options.threads)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        row = {"case": case, "limit_mb": limit, **json.loads(out)}
        rows.append(row)
        failed |= limit is not None and row["peak_mb"] >= limit
        print(f"{case:44}{row['peak_mb']:9.0f}{limit or '':>7}{row['seconds']:9.1f}")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout.strip()
    passport = {
        "what": "largest resident set of one process each", "on": processor(), "threads": options.threads,
        "dtype": "float32", "torch": torch.__version__, "python": platform.python_version(), "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"passport": passport, "rows": rows}, indent=2) + "\n")
    print(f"wrote {options.out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
