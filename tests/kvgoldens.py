"""The official numbers of cache methods: arrays, settings and the model of each seed, and the settings in our words."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDENS = Path(__file__).parent / "goldens"
FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "rms_norm_eps", "tie_word_embeddings", "hidden_act",
)  # fmt: skip


@cache
def golden(seed: int) -> tuple[dict[str, Tensor], dict, nn.Module]:
    """The arrays, the settings and the model of one seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    arrays = {}
    for name in ("kv", "kv_more"):
        with np.load(GOLDENS / f"{name}_s{seed}.npz") as file:
            arrays |= {k: file[k] for k in file.files}
    config = json.loads(str(arrays.pop("config")))
    tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    model = LlamaForCausalLM(LlamaConfig(**{k: config[k] for k in FIELDS}, rope_parameters=rope)).eval()
    model.load_state_dict({k[2:]: v.float() for k, v in tensors.items() if k.startswith("w.")})
    return tensors, config, model


def specs(config: dict, keep: float) -> dict[str, str]:
    """The official settings of each method in our text form: once, after the prompt, kvpress' counting."""
    b, w, k, sink = f"keep={keep!r},rounding=trunc", config["w"], config["k"], config["sink"]
    cov, nf = str(config["cov"]).lower(), config["nf"]
    return {
        "knorm": f"knorm:{b}",
        "keyrot_knorm": f"knorm:{b},positions=cache",
        "keydiff": f"keydiff:{b}",
        "block_keydiff": f"keydiff:{b},block=32",
        "chunkkv_snapkv": f"chunkkv:keep={keep!r},window={w},kernel={k},chunk=5,fidelity=kvpress",
        "snapkv": f"snapkv:{b},window={w},kernel={k}",
        "streaming": f"streamingllm:{b},sinks={sink},positions=original,decodes=false",
        "keyrot_streaming": f"streamingllm:{b},sinks={sink},decodes=false",
        "tova": f"tova:{b},recent=1,decodes=false",
        "observed": f"h2o:{b},recent=0.0,average=true,decodes=false",
        "pyramidkv": f"pyramidkv:keep={keep!r},window={w},kernel={k},beta={config['beta']},fidelity=kvpress",
        "adakv_snapkv": f"adakv:{b},window={w},kernel={k},pool=mean,alpha={config['alpha']}",
        "expected": f"expected_attention:{b},sinks={sink},future={nf},epsilon={config['eps']},covariance={cov}",
    }


NAMES = tuple(specs({"w": 1, "k": 1, "sink": 1, "beta": 1, "alpha": 1, "nf": 1, "eps": 0, "cov": True}, 0.5))


def stays(kept: Tensor, total: int) -> Tensor:
    """(B, G, total) bool from (B, G, M) positions, -1 = none."""
    slot = torch.where(kept < 0, total, kept.long())
    return torch.zeros(*kept.shape[:-1], total + 1, dtype=torch.bool).scatter(-1, slot, True)[..., :-1]
