"""Which tokens teach, on a real corpus into which noise was put: Rho-1 against plain training and a random choice.

A small Llama learns the addresses on the state of the union from scratch; a share of the training tokens, in runs of
eight, is replaced by words drawn at random. The reference is a model of the same shape that read a fifth of the clean
corpus first. Held-out text is clean. All runs of a seed see the same batches; differences are paired over seeds.

    python benchmarks/selection.py --steps 500 --seeds 3 --out benchmarks/results/selection.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

import fewer
from fewer.datasets import texts
from fewer.evaluation.record import commit, now
from fewer.models.zoo import load_model

LENGTH, BATCH, RUN = 96, 12, 8
METHODS = ("plain", "rho1:keep=0.6", "random:site=loss,keep=0.6")
SPIKE = 2.0  # times the median of the fifty gradients before


def corpus(split: Any, tokenizer: Any) -> Tensor:
    """(windows, LENGTH) long: passages one behind the other."""
    ids = tokenizer(list(texts.load("eras", split=split).texts), add_special_tokens=False, verbose=False)["input_ids"]
    flat = torch.tensor([token for row in ids for token in row])
    return flat[: len(flat) // LENGTH * LENGTH].view(-1, LENGTH)


def noisy(windows: Tensor, share: float, words: int, seed: int) -> tuple[Tensor, Tensor]:
    """The windows with noise in them, and (windows, LENGTH) bool, where it is."""
    draw = torch.Generator().manual_seed(seed)
    hit = torch.rand(len(windows), LENGTH // RUN, generator=draw) < share
    where = hit.repeat_interleave(RUN, 1)
    return torch.where(where, torch.randint(words, windows.shape, generator=draw), windows), where


def small(words: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words, hidden_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=448, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        )
    )  # fmt: skip


@torch.no_grad()
def held_out(model: LlamaForCausalLM, windows: Tensor) -> float:
    """Mean loss in nats on clean text."""
    model.eval()
    losses = [float(model(part, labels=part).loss) for part in windows.split(BATCH * 2)]
    model.train()
    return statistics.fmean(losses)


def train(
    model: LlamaForCausalLM, windows: Tensor, held: Tensor, steps: int, seed: int, method: str | None,
    reference: Any = None, noise: Tensor | None = None, every: int = 50,
) -> dict[str, Any]:  # fmt: skip
    """What a run shows: held-out losses by step, norms of the gradients, and what share of the teaching is noise."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = get_scheduler("cosine", optimizer, steps // 10, steps)
    draw = torch.Generator().manual_seed(seed)
    curve, norms, losses, noise_taught = [], [], [], []
    model.train()
    began = time.process_time()
    with fewer.apply(model, method, guide=reference) if method else nullcontext() as session:
        for step in range(1, steps + 1):
            some = torch.randint(len(windows), (BATCH,), generator=draw)
            loss = model(windows[some], labels=windows[some]).loss
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            losses.append(float(loss))
            if noise is not None:
                hit = noise[some][:, 1:]
                if session is not None:
                    tokens = session.last.tokens
                    hit = hit.gather(1, tokens.place())[tokens.unpadded]
                noise_taught.append(float(hit.float().mean()))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % every == 0 or step == steps:
                if session is not None:
                    session.remove()
                curve.append((step, held_out(model, held)))
                if session is not None and step < steps:
                    session = fewer.apply(model, method, guide=reference)
    spikes = sum(norms[i] > SPIKE * statistics.median(norms[i - 50 : i]) for i in range(50, len(norms)))
    return {
        "curve": curve, "final": curve[-1][1], "seconds": time.process_time() - began, "spikes": spikes,
        "gradient_norm": statistics.fmean(norms[steps // 4 :]),
        "gradient_norm_spread": statistics.stdev(norms[steps // 4 :]),
        "loss_spread": statistics.stdev(losses[-steps // 4 :]),
        "noise_taught": statistics.fmean(noise_taught) if noise_taught else None,
    }  # fmt: skip


def reached(curve: list[tuple[int, float]], level: float) -> int | None:
    """The first step that is measured at which a held-out loss is as low."""
    return next((step for step, loss in curve if loss <= level), None)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=500)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--noise", type=float, default=0.3, help="share of the training tokens")
    arguments.add_argument("--methods", nargs="+", default=METHODS)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    _, tokenizer = load_model("bert-eras")
    words = len(tokenizer)
    clean, held = corpus("train", tokenizer), corpus("test", tokenizer)[:192]
    rows = []
    for seed in range(given.seeds):
        windows, where = noisy(clean, given.noise, words, seed)
        reference = small(words, 100 + seed)
        fifth = clean[torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))[: len(clean) // 5]]
        learned = train(reference, fifth, held, given.steps // 2, seed, None)
        reference.eval().requires_grad_(False)
        for method in given.methods:
            form = None if method == "plain" else method
            guide = reference if method.startswith("rho1") else None
            run = train(small(words, seed), windows, held, given.steps, seed, form, guide, where)
            rows.append({"seed": seed, "method": method, **run, "reference": learned["final"]})
            print(f"seed {seed} {method}: held-out {run['final']:.3f}, spikes {run['spikes']}, "
                  f"noise among what teaches {run['noise_taught']:.2f}", flush=True)  # fmt: skip
    for row in rows:
        plain = next(r for r in rows if r["seed"] == row["seed"] and r["method"] == "plain")
        row["against_plain"] = row["final"] - plain["final"]
        row["reaches_plain_at"] = reached(row["curve"], plain["final"])
    if given.out:
        about = {
            "commit": commit(), "date": now(), "machine": platform.machine(), "threads": 1, "steps": given.steps,
            "tokens_a_step": LENGTH * BATCH, "noise": given.noise, "held_out_windows": len(held),
        }  # fmt: skip
        given.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
