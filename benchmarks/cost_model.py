"""How well the cost model foretells speed-ups it has not seen, against two naive rules.

The profile (`fewer.hardware.calibrate`) times single operations on this machine; no model of this benchmark, and none
of its shapes, is among them. Each case is a shape, a batch and a method: predicted from shapes alone (no number is
computed), then measured on one thread in that thread's CPU seconds, the unreduced model before and after each reduced
pass. The error of a prediction is |predicted / measured - 1|. The naive rules: time goes with FLOPs (all counted, the
method's own too), time goes with tokens (mean over blocks). Weights are random: speed does not depend on them.

    python benchmarks/cost_model.py --rounds 5 --out benchmarks/results/cost_model.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import fewer
from fewer import hosts
from fewer.evaluation import stats
from fewer.evaluation.record import commit, now
from fewer.hardware import calibrate
from fewer.hardware.ops import Work, record
from fewer.hardware.roofline import by_flops, by_tokens, speed_up

VITS = {  # width, heads, blocks, image side, samples
    "deit-ti, 1": (192, 3, 12, 224, 1), "deit-ti, 4": (192, 3, 12, 224, 4), "deit-s, 1": (384, 6, 12, 224, 1),
    "vit-b, 1": (768, 12, 12, 224, 1), "deit-s at 384, 1": (384, 6, 12, 384, 1), "vit of 512, 2": (512, 8, 12, 256, 2),
}  # fmt: skip
ON_VITS = ("tome:r=8", "tome:r=16", "evit:keep=0.7", "evit:keep=0.5", "dynamicvit:keep=0.7", "cls_topk:keep=0.3")
LLAMAS = {  # width, MLP, heads, KV heads, blocks, tokens
    "llama of 576, 512": (576, 1536, 9, 3, 8, 512), "llama of 576, 1280": (576, 1536, 9, 3, 6, 1280),
    "llama of 960, 400": (960, 2560, 15, 5, 6, 400),
}  # fmt: skip
ON_LLAMAS = ("lazyllm:keep=0.7", "lazyllm:keep=0.5", "sdtp", "agile_quant:bits=none")
DECODERS = {  # width, MLP, heads, KV heads, blocks, tokens of the prompt, samples
    "llama of 576, behind 3000": (576, 1536, 9, 3, 6, 3000, 1),
    "llama of 576, behind 900, 8": (576, 1536, 9, 3, 6, 900, 8),
    "llama of 320, behind 1500, 4": (320, 960, 5, 5, 8, 1500, 4),
}  # fmt: skip
ON_CACHES = ("snapkv:keep=0.5", "snapkv:keep=0.2", "streamingllm:keep=0.25,decodes=false", "knorm:keep=0.1")

Pass = Callable[[], Any]


def vit(width: int, heads: int, blocks: int, side: int, batch: int) -> tuple[torch.nn.Module, Callable[[Any], Any]]:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_hidden_layers=blocks,
        image_size=side, num_labels=1000,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    return model, lambda net: net(pixel_values=torch.randn(batch, 3, side, side))


def llama(width: int, mlp: int, heads: int, groups: int, blocks: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=width, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=groups,
        num_hidden_layers=blocks, vocab_size=8192, max_position_embeddings=8192, tie_word_embeddings=True,
    )).eval()  # fmt: skip


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 8192, (batch, tokens))


def on(model: torch.nn.Module, method: str | None) -> Any:
    if method is None:
        return nullcontext()
    needs = fewer.parse(method).card.training == "required"
    return fewer.apply(model, method, **({"modules": "untrained"} if needs else {}))


def clocked(run: Pass) -> float:
    began = time.thread_time()
    run()
    return time.thread_time() - began


def counted(session: Any) -> list[tuple[float, float]]:
    ledger = getattr(session.ledger, "reading", None) or session.ledger
    return [(e.attention, e.mlp) for e in ledger.entries]


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights under modules of their own."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def interleaved(runs: dict[str | None, Pass], rounds: int, warm: int = 1) -> dict[str, Any]:
    """Measured speed-ups: the mean of the plain passes around a reduced one, over it; and seconds of each."""
    ratios: dict[str, list[float]] = {m: [] for m in runs if m is not None}
    seconds: dict[str | None, list[float]] = {m: [] for m in runs}
    for turn in range(rounds + warm):
        before = clocked(runs[None])
        for method, mine in ratios.items():
            spent, after = clocked(runs[method]), clocked(runs[None])
            if turn >= warm:
                mine.append((before + after) / 2 / spent)
                seconds[method].append(spent)
                seconds[None].append(after)
            before = after
    return {m: stats.ratios(r, [1.0] * len(r)) for m, r in ratios.items()} | {
        f"{m} seconds": statistics.median(s) for m, s in seconds.items()
    }


@torch.inference_mode()
def in_turn(
    model: torch.nn.Module, call: Callable[[torch.nn.Module], Any], methods: Sequence[str], rounds: int
) -> dict[str, Any]:
    """The same of a model with each method on, all sessions kept."""
    runs: dict[str | None, Pass] = {None: lambda: call(model)}
    for method in methods:
        net = twin(model)
        on(net, method)
        runs[method] = lambda net=net: call(net)
    return interleaved(runs, rounds)


def passes(kind: str, model: torch.nn.Module, run: Pass, methods: Sequence[str]) -> dict[str | None, Work]:
    """What each pass asks for, from shapes alone."""
    blocks = hosts.find(model).blocks
    work: dict[str | None, Work] = {None: Work(record(run, blocks), kind=kind)}
    for method in methods:
        with on(model, method) as session:
            work[method] = Work(record(run, blocks), counted(session), kind)
        full = max(t for pair in work[method].tokens for t in pair)
        work[None].tokens = [(full, full)] * len(work[method].tokens)
    return work


def rows_of(
    profile: calibrate.Profile, phase: str, case: str, works: dict[str | None, Work], measured: dict[str, Any]
) -> Iterator[dict]:
    plain = works[None]
    for method, work in works.items():
        if method is None:
            continue
        guess, truth = speed_up(profile, plain, work), measured[method]
        yield {
            "phase": phase, "case": case, "method": method, "measured": round(truth.value, 4),
            "spread": [round(truth.low, 4), round(truth.high, 4)], "predicted": round(guess.value, 4),
            "uncertain": [round(guess.low, 4), round(guess.high, 4)],
            "flops_rule": round(by_flops(plain, work), 4), "tokens_rule": round(by_tokens(plain, work), 4),
            "milliseconds": round(1e3 * measured[f"{method} seconds"], 2),
            "predicted_milliseconds": round(1e3 * guess.after.seconds, 2),
            "plain_milliseconds": round(1e3 * measured["None seconds"], 2),
            "predicted_plain_milliseconds": round(1e3 * guess.before.seconds, 2), "bound": guess.after.bound,
        }  # fmt: skip


def encoders(profile: calibrate.Profile, rounds: int) -> Iterator[dict]:
    for case, shape in VITS.items():
        model, call = vit(*shape)
        works = passes("encoder", model, lambda model=model, call=call: call(model), ON_VITS)
        yield from rows_of(profile, "vit", case, works, in_turn(model, call, ON_VITS, rounds))


def prefills(profile: calibrate.Profile, rounds: int) -> Iterator[dict]:
    for case, (*shape, tokens) in LLAMAS.items():
        model, prompt = llama(*shape), ids(1, tokens)
        call = lambda net, prompt=prompt: net(prompt, use_cache=False, logits_to_keep=1)  # noqa: E731
        works = passes("prompt", model, lambda model=model, call=call: call(model), ON_LLAMAS)
        yield from rows_of(profile, "prefill", case, works, in_turn(model, call, ON_LLAMAS, rounds))


def decodings(profile: calibrate.Profile, rounds: int) -> Iterator[dict]:
    for case, (*shape, tokens, batch) in DECODERS.items():
        model, prompt, one = llama(*shape), ids(batch, tokens), ids(batch, 1)
        works: dict[str | None, Work] = {}
        for method in (None, *ON_CACHES):
            with on(model, method) as session:
                held: dict[str, Any] = {}

                def fill(held: dict = held, model: Any = model, prompt: Any = prompt) -> None:
                    held["cache"] = DynamicCache(config=model.config)
                    model(prompt, past_key_values=held["cache"], logits_to_keep=1)

                step = lambda held=held, model=model, one=one: model(one, past_key_values=held["cache"])  # noqa: E731
                works[method] = Work(record(step, hosts.find(model).blocks, prepare=fill), kind="step")
                stored = tokens + 1 if session is None else statistics.mean(session.ledger.stored)
                works[method].tokens = [(stored, stored)]
        yield from rows_of(profile, "decode", case, works, decoded(model, prompt, one, rounds))


@torch.inference_mode()
def decoded(model: Any, prompt: torch.Tensor, one: torch.Tensor, rounds: int, steps: int = 8) -> dict[str, Any]:
    """Measured speed-ups of writing: all writers stand behind the same prompt and write in turn."""
    runs: dict[str | None, Pass] = {}
    for method in (None, *ON_CACHES):
        net = twin(model)
        if method:
            fewer.apply(net, method)
        cache = DynamicCache(config=net.config)
        net(prompt, past_key_values=cache, logits_to_keep=1)
        runs[method] = lambda net=net, cache=cache: [net(one, past_key_values=cache) for _ in range(steps)]
    found = interleaved(runs, rounds, warm=2)
    return {k: v / steps if k.endswith(" seconds") else v for k, v in found.items()}


def summary(rows: list[dict]) -> dict[str, Any]:
    """Errors of each rule, and what comes of deciding by it."""
    truth = np.array([r["measured"] for r in rows])
    told: dict[str, Any] = {"cases": len(rows), "shapes": len({r["case"] for r in rows})}
    for rule in ("predicted", "flops_rule", "tokens_rule"):
        guess = np.array([r[rule] for r in rows])
        errors = np.abs(guess / truth - 1)
        told[rule] = {
            "median_error": round(float(np.median(errors)), 4), "worst_error": round(float(errors.max()), 4),
            "quartiles": [round(float(q), 4) for q in np.quantile(errors, (0.25, 0.75))],
            "faster_or_slower_right": round(float(np.mean((guess > 1) == (truth > 1))), 4),
            "rank_correlation": round(float(np.corrcoef(*(x.argsort().argsort() for x in (guess, truth)))[0, 1]), 4),
            "regret": round(regret(rows, rule), 4),
        }  # fmt: skip
    seconds = [abs(r["predicted_milliseconds"] / r["milliseconds"] - 1) for r in rows]
    told["median_error_of_seconds"] = round(statistics.median(seconds), 4)
    told["noise"] = round(statistics.median((r["spread"][1] - r["spread"][0]) / 2 / r["measured"] for r in rows), 4)
    return told


def regret(rows: list[dict], rule: str) -> float:
    """How much slower the method a rule calls the fastest is than the fastest, averaged over shapes."""
    lost = []
    for case in dict.fromkeys(r["case"] for r in rows):
        mine = [r for r in rows if r["case"] == case]
        lost.append(1 - max(mine, key=lambda r: r[rule])["measured"] / max(r["measured"] for r in mine))
    return statistics.mean(lost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--phases", nargs="+", default=["vit", "prefill", "decode"])
    parser.add_argument("--fresh", action="store_true", help="measure the machine again")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    profile = calibrate.profile(fresh=given.fresh, log=print)
    rows: list[dict] = []
    for phase, cases in (("vit", encoders), ("prefill", prefills), ("decode", decodings)):
        if phase not in given.phases:
            continue
        for row in cases(profile, given.rounds):
            rows.append(row)
            print(json.dumps(row), flush=True)
        told = {
            name: summary([r for r in rows if r["phase"] == name]) for name in dict.fromkeys(r["phase"] for r in rows)
        }
        told["all"] = summary(rows)
        print(json.dumps(told, indent=1), flush=True)
        if given.out:
            passport = {
                "error": "|predicted / measured - 1| of the speed-up; no shape measured here is in the calibration",
                "machine": profile.machine, "calibration_seconds": round(profile.seconds, 1), "rounds": given.rounds,
                "spread": "median and quartiles of ratios inside a round", "clock": "CPU seconds of the one thread",
                "torch": torch.__version__, "transformers": transformers.__version__, "commit": commit(), "when": now(),
            }  # fmt: skip
            given.out.write_text(json.dumps({"passport": passport, "summary": told, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
