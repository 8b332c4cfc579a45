"""What the tests of summaries share: tiny random causal LMs of 61 words, padded texts, the official numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from decoders import decoder

GOLDENS = Path(__file__).parent / "goldens"


def golden(name: str, seed: int) -> dict[str, Tensor]:
    with np.load(GOLDENS / f"{name}_s{seed}.npz") as file:
        return {k: torch.from_numpy(file[k]) for k in file.files}


def opt(**more: object) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    settings = dict(vocab_size=61, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
                    num_attention_heads=4, max_position_embeddings=128, dropout=0.0, init_std=0.25, pad_token_id=0,
                    bos_token_id=1, eos_token_id=2)  # fmt: skip
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**settings | more)).eval()
    model.generation_config.eos_token_id = None
    return model


def causal_lm(kind: str) -> nn.Module:
    return opt() if kind == "opt" else decoder(kind).eval()


def words(b: int, t: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 61, (b, t), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Texts of different lengths as a batch, id 0 at padding, and its mask."""
    most = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), most, dtype=torch.long), torch.zeros(len(rows), most, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(most - len(row), None) if side == "left" else slice(len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask
