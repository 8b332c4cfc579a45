"""What cache methods cost while reading and gain while writing, against the same model with its whole cache.

A random Llama in the shape of SmolLM2-135M (30 layers, width 576, 9 query and 3 KV heads) on one CPU thread in float32;
timings do not depend on weights. Seconds are this thread's CPU seconds, so other processes hardly disturb them. All
variants take turns in every round; medians of the rounds' ratios, with quartiles. `own_percent` is what the session
spent on the method, over the rest of the reading time: far less noisy than the difference of two passes. The whole
cache is timed twice in a round: how far the two are apart is the noise.

    python benchmarks/kv_speed.py --context 4096 --layers 4 --rounds 5 --steps 64 [--methods ...]

With --kvpress PYTHON, the interpreter of an environment that has kvpress, its presses take part in every round, in a
process of their own with the same weights; their ratios are to the whole cache in that process. The rows both keep are
compared: `same_rows` is the share they have in common.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fewer
from fewer.evaluation import stats
from fewer.evaluation.record import commit, now
from fewer.runtime.sites import kv_cache as caching

METHODS = ("streamingllm:keep={keep},decodes=false", "knorm:keep={keep}", "keydiff:keep={keep}",
           "snapkv:keep={keep},window=64", "expected_attention:keep={keep}", "adakv:keep={keep},window=64")  # fmt: skip
PEERS = {"snapkv": "snapkv:keep={keep},window=64", "expected_attention": "expected_attention:keep={keep}",
         "knorm": "knorm:keep={keep}"}  # fmt: skip


SHAPE = dict(
    hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
    tie_word_embeddings=True,
)  # fmt: skip


def smol(layers: int) -> LlamaForCausalLM:
    """SmolLM2-135M's shape, random weights; with fewer layers a slice of it, the vocabulary cut in proportion."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=49152 * layers // 30, num_hidden_layers=layers)).eval()


Run = tuple[float, float, int, float]


@torch.no_grad()
def timed(model: LlamaForCausalLM, ids: torch.Tensor, steps: int, method: str | None) -> Run:
    """Seconds to read the prompt and to write `steps` tokens after it, bytes of the cache once read, own over other
    seconds."""
    with fewer.apply(model, method) if method else nullcontext() as session:
        cache = DynamicCache(config=model.config)
        began = time.thread_time()
        token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        read = time.thread_time() - began
        held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
        held, own = (session.ledger.bytes, session.ledger.seconds) if session else (held, 0.0)
        token = model(token, past_key_values=cache).logits.argmax(-1)  # the first step pays for new shapes
        began = time.thread_time()
        for _ in range(steps):
            token = model(token, past_key_values=cache).logits.argmax(-1)
        return read, time.thread_time() - began, held, own / (read - own)


class Peer:
    """kvpress in a process of its own, on the same weights and the same prompt."""

    def __init__(self, python: str, model: LlamaForCausalLM, ids: torch.Tensor, folder: str) -> None:
        given, self.answers = Path(folder) / "given.pt", Path(folder) / "kept.pt"
        config = {k: getattr(model.config, k) for k in (*SHAPE, "vocab_size", "num_hidden_layers")}
        torch.save({"config": config, "weights": model.state_dict(), "ids": ids}, given)
        script = Path(__file__).with_name("kvpress_peer.py")
        self.process = subprocess.Popen(
            [python, str(script), str(given), str(self.answers)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._line("ready")

    def _line(self, wanted: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(wanted):
                return line
        raise RuntimeError(f"the kvpress process ended with {self.process.wait()}; its error is above")

    def timed(self, method: str, keep: float, steps: int, kept: bool = False) -> Run:
        """As `timed`; method "" is the whole cache. kept: leave the kept positions in `answers`."""
        assert self.process.stdin is not None
        asked = {"method": method, "keep": keep, "steps": steps, "kept": kept}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self._line("{"))
        return answer["read"], answer["write"], answer["bytes"], 0.0

    @torch.no_grad()
    def same_rows(self, model: LlamaForCausalLM, ids: torch.Tensor, method: str, keep: float) -> float:
        """The share of rows that both keep, over all layers and heads. The first layer must agree but for rounding."""
        self.timed(method, keep, 1, kept=True)
        theirs = torch.load(self.answers)
        with fewer.apply(model, PEERS[method].format(keep=keep)) as session:
            model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
            ours = [session.kept(i)[0] for i in range(len(theirs))]
        shares = [torch.isin(a[g], b[g]).float().mean().item()
                  for a, b in zip(ours, theirs, strict=True) for g in range(len(b))]  # fmt: skip
        assert ours[0].shape == theirs[0].shape, (ours[0].shape, theirs[0].shape)
        assert min(shares[: len(theirs[0])]) > 0.99, (method, keep, shares)
        return sum(shares) / len(shares)


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
    arguments.add_argument("--kvpress", metavar="PYTHON", help="interpreter of an environment with kvpress")
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kv_speed.json")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    caching.time = SimpleNamespace(perf_counter=time.thread_time)  # type: ignore[attr-defined, assignment]
    model = smol(given.layers)
    ids = torch.randint(0, 1024, (1, given.context), generator=torch.Generator().manual_seed(1))
    variants = ["", *(m.format(keep=k) for m in given.methods for k in given.keep), " "]
    peers = [("", 1.0), *((m, k) for m in PEERS for k in given.keep)] if given.kvpress else []
    runs: dict[str, list[Run]] = {v: [] for v in variants}
    theirs: dict[tuple[str, float], list[Run]] = {p: [] for p in peers}
    same: dict[tuple[str, float], float] = {}
    timed(model, ids[:, :128], 2, None)
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(given.kvpress, model, ids, folder) if given.kvpress else None
        for i in range(given.rounds):
            for variant in variants if i % 2 == 0 else variants[::-1]:
                runs[variant].append(timed(model, ids, given.steps, variant.strip() or None))
            for method, keep in peers if i % 2 == 0 else peers[::-1]:
                assert peer is not None
                theirs[method, keep].append(peer.timed(method, keep, given.steps))
        if peer is not None:
            same = {p: peer.same_rows(model, ids, *p) for p in peers if p[0]}
            peer.process.stdin.close()  # type: ignore[union-attr]
            peer.process.wait()
    names = {"": "whole cache", " ": "whole cache, again"}
    rows = [row(names.get(v, v), own, runs[""]) for v, own in runs.items()]
    for (method, keep), own in theirs.items():
        name = f"kvpress {method}, keep={keep}" if method else "kvpress, whole cache"
        rows.append(row(name, own, theirs[peers[0]], same.get((method, keep))))
    passport = {
        "against": "the same weights with the whole cache (DynamicCache, sdpa), interleaved", "layers": given.layers,
        "context": given.context, "rounds": given.rounds, "steps": given.steps, "dtype": "float32", "threads": 1,
        "cpu": platform.machine(), "torch": torch.__version__, "transformers": transformers.__version__,
        "commit": commit(), "when": now(),
    }  # fmt: skip
    given.out.write_text(json.dumps({"passport": passport, "rows": rows}, indent=1) + "\n")


def row(name: str, own: list[Run], whole: list[Run], same: float | None = None) -> dict[str, Any]:
    """One line of the table, printed as soon as it is known: medians of the rounds' ratios and their quartiles."""
    cost = stats.ratios([r[0] for r in own], [r[0] for r in whole])
    gain = stats.ratios([r[1] for r in whole], [r[1] for r in own])
    line = {
        "method": name,
        "prefill_cost_percent": [round(100 * (x - 1), 2) for x in (cost.value, cost.low, cost.high)],
        "decode_speedup": [round(x, 3) for x in (gain.value, gain.low, gain.high)],
        "own_percent": round(100 * statistics.median(r[3] for r in own), 2),
        "cache_mb": round(own[0][2] / 1e6, 3),
        "seconds": [round(statistics.median(r[i] for r in own), 3) for i in (0, 1)],
    } | ({} if same is None else {"same_rows": round(same, 5)})
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
