"""The suite on texts at more questions and rates than `fewer bench --suite text` takes by default.

python benchmarks/text_suite.py --limit 300 --rates 0.5 0.3 0.2 --out runs/text
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from fewer.evaluation import text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=300, help="questions of each task")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.3, 0.2])
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/text"), help="folder; an interrupted run goes on there")
    given = parser.parse_args()
    options = {
        **text.OPTIONS, "limit": given.limit, "tasks": tuple(given.tasks), "methods": tuple(given.methods)
    }  # fmt: skip
    cells = text.measure(options, given.out, lambda line: print(line, flush=True), rates=given.rates)
    table = text.table(cells, options)
    (given.out / "text.json").write_text(json.dumps(asdict(table), indent=1) + "\n")
    for row in table.rows:
        print(" | ".join(row))
    print("\n".join(table.notes))


if __name__ == "__main__":
    main()
