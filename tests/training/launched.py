"""What `accelerate launch` starts in test_launched.py: a task's name and a folder; losses go to its losses.json."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

WORDS = 60


def llama(seed: int) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, attention_dropout=0.0,
        )
    )  # fmt: skip


def texts(count: int, longest: int) -> list[dict[str, list[int]]]:
    """Texts of different lengths."""
    draw = torch.Generator().manual_seed(7)
    found = []
    for _ in range(count):
        n = int(torch.randint(4, longest + 1, (1,), generator=draw))
        found.append({"input_ids": torch.randint(3, WORDS, (n,), generator=draw).tolist()})
    return found


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])], mask[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"]), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def selection(method: str, folder: Path) -> None:
    """Trainer as it is, with a method on the training loss: eight texts make a step, in two parts."""
    from accelerate import PartialState
    from transformers import Trainer, TrainingArguments

    import fewer

    processes = PartialState(cpu=True).num_processes
    model = llama(3)
    with fewer.apply(model, method, guide=llama(5).eval().requires_grad_(False)):
        trainer = Trainer(
            model,
            TrainingArguments(
                str(folder / "out"), per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2,
                max_steps=4,
                learning_rate=3e-3, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
                max_grad_norm=0.5,
            ),
            train_dataset=texts(64, 14), data_collator=padded,
        )  # fmt: skip
        trainer.train()
    if trainer.is_world_process_zero():
        rows = [row for row in trainer.state.log_history if "loss" in row]
        written = {"losses": [r["loss"] for r in rows], "norms": [r["grad_norm"] for r in rows], "processes": processes}
        (folder / "losses.json").write_text(json.dumps(written))


def recipe(folder: Path) -> None:
    """`fewer train ltp` on a tiny classifier."""
    from fewer.datasets.texts import Encoded
    from fewer.recipes import encode

    torch.manual_seed(1)
    net = BertForSequenceClassification(
        BertConfig(vocab_size=WORDS, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
                   max_position_embeddings=32, num_labels=3, hidden_dropout_prob=0.0,
                   attention_probs_dropout_prob=0.0)
    ).eval()  # fmt: skip
    draw = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, WORDS, (12,), generator=draw) for _ in range(48)]
    data = Encoded(rows, torch.randint(3, (48,), generator=draw), name="toy", classes=("a", "b", "c"))
    settings = encode.Encode("ltp", steps=50, batch=8, length=16, lr=1e-2, backbone=1e-3, second=0.0, held=0, price=0.1)
    (folder / f"process-{os.environ.get('RANK', 0)}").touch()
    encode.train(settings, folder / "out", model=(net, None), data=(data, data), log=lambda line: None)


if __name__ == "__main__":
    task, where = sys.argv[1], Path(sys.argv[2])
    recipe(where) if task == "recipe" else selection(task, where)
