"""What is a summary of the text before worth? An AutoCompressor on a small language model, trained from scratch here.

The presidents' addresses (the test split is held out, whole addresses), words in 1,024 pieces learned from the training
split. A Llama first learns to read whole texts (count=0, one segment), then to condense (`fewer.recipes.condense`).
Nats per token of a held-out second segment, from the same weights: alone, behind the summary of the first segment,
behind the summary of another text, and behind the first segment in full. A seed changes weights and all draws.

    python benchmarks/summaries.py --seeds 0 1 --out benchmarks/results/summaries.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fewer.datasets import texts
from fewer.evaluation.record import commit, now
from fewer.recipes.condense import Condensing, train

PIECES = 1024


def corpus() -> tuple[Tensor, Tensor]:
    """(T,) ids of the training and of the test addresses, with an end mark between addresses."""
    sets = [texts.load("addresses", split=split).texts for split in ("train", "test")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        sets[0], trainers.BpeTrainer(vocab_size=PIECES, special_tokens=["<end>"], show_progress=False)
    )
    train_ids, held = (
        torch.tensor([i for one in tokenizer.encode_batch(list(part)) for i in (0, *one.ids)]) for part in sets
    )
    return train_ids, held


def small(width: int, layers: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=PIECES, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, max_position_embeddings=1024, eos_token_id=0, bos_token_id=0,
        tie_word_embeddings=True,
    ))  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments.add_argument("--width", type=int, default=96)
    arguments.add_argument("--layers", type=int, default=2)
    arguments.add_argument("--length", type=int, default=16)
    arguments.add_argument("--count", type=int, default=4)
    arguments.add_argument("--steps", type=int, nargs=2, default=[1500, 1000], help="to read, to condense")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    ids, held = corpus()
    rows = []
    for seed in given.seeds:
        torch.manual_seed(seed)
        model = small(given.width, given.layers)
        shared = {"seed": seed, "length": given.length, "test": 400, "threads": 1}
        reading = Condensing(
            **shared | {"length": 4 * given.length}, count=0, segments=1, steps=given.steps[0], lr=3e-3
        )
        condensing = Condensing(**shared, count=given.count, segments=4, steps=given.steps[1], lr=2e-3)
        with tempfile.TemporaryDirectory() as folder:
            train(reading, folder, model=(model, None), ids=ids, held=held)
        with tempfile.TemporaryDirectory() as folder:
            report = train(condensing, folder, model=(model, None), ids=ids, held=held)
        gains = {
            name: [a - b for a, b in zip(report.texts["after"]["alone"], report.texts["after"][name], strict=True)]
            for name in ("summary", "other", "full")
        }
        rows.append({
            "seed": seed, "before": _rounded(report.before), "after": _rounded(report.after),
            "perplexity": _rounded({name: math.exp(x) for name, x in report.after.items()}),
            "gain": {name: [round(statistics.mean(x), 4), round(1.96 * statistics.stdev(x) / len(x) ** 0.5, 4)]
                     for name, x in gains.items()},
            "recovered": report.recovered and round(report.recovered, 3), "seconds": round(report.seconds),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        if given.out:
            given.out.write_text(
                json.dumps({"passport": _passport(given, len(ids), model), "rows": rows}, indent=1) + "\n"
            )


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def _passport(given: argparse.Namespace, tokens: int, model: LlamaForCausalLM) -> dict[str, object]:
    return {
        "what": "nats per token of the second segment, its first token left out; gain: alone - x, paired over texts, "
                "and half of its 95 % interval over texts",
        "against": "the same weights reading the second segment alone",
        "model": f"Llama, {given.layers} layers of width {given.width}, {PIECES} pieces, "
                 f"{sum(p.numel() for p in model.parameters()):,} parameters, trained here",
        "data": f"presidents' addresses, {tokens:,} pieces to train on; 400 texts of held-out addresses",
        "length": given.length, "count": given.count, "steps": given.steps, "batch": 16, "threads": 1,
        "cpu": platform.machine(), "torch": torch.__version__, "commit": commit(), "when": now(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
