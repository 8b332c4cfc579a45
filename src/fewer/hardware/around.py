"""What a model and a session spend around operations: measured on models so small that nothing else is left."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from fewer.runtime.apply import apply

from .calibrate import Around, Profile
from .ops import Op, record
from .roofline import op_seconds
from .timing import Clock

World = tuple[Callable[[], Any], Callable[[], Any]]
BLOCKS = 4
METHODS = {
    "encoder": ("tome:r=1", "evit:keep=0.7,layers=1+2+3", "evit:keep=0.7,layers=2", "random:keep=0.8,layers=1+2+3",
                "cls_topk:keep=0.8,layers=1", "pool:keep=0.7,layers=1+2+3"),
    "prompt": ("lazyllm:keep=0.8", "lazyllm:keep=0.8,layers=2", "agile_quant:bits=none,layers=1+2"),
    "step": ("snapkv:tokens=12,window=4", "knorm:tokens=12", "streamingllm:tokens=12,decodes=false"),
}  # fmt: skip


Timed = tuple[list[Op], list[float]]
ROUNDS = 21


def timings(clock: Clock, device: str, dtype: torch.dtype) -> dict[str, list[Timed]]:
    """For each kind of pass the operations of a tiny model and its seconds, round by round, in which it runs alone and
    then under each method."""
    other = torch.ones(4 << 20, device=device)  # in a model of some size, nothing around an operation is still at hand
    found: dict[str, list[Timed]] = {}
    for kind, net, prepare in _tiny(device, dtype):
        with ExitStack() as undo:
            worlds = [prepare(net)]
            for method in METHODS[kind]:
                twin = copy.deepcopy(net)
                undo.enter_context(apply(twin, method))
                worlds.append(prepare(twin))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tiny caches say what they are
                found[kind] = _in_turn(clock, other, worlds)
    return found


def _in_turn(clock: Clock, other: torch.Tensor, worlds: list[World]) -> list[Timed]:
    ops = [record(call, prepare=fill) for fill, call in worlds]
    for fill, call in worlds:
        fill()
        call()
    took = clock.rounds([call for _, call in worlds], lambda: other.add_(1), ROUNDS)
    return list(zip(ops, took, strict=True))


def fitted(profile: Profile, models: dict[str, list[Timed]]) -> dict[str, Around]:
    """What is spent around operations, the time of the operations themselves left out."""
    found = {}
    for kind, ((plain, took), *others) in models.items():
        alone = _seconds(profile, plain)
        rows = [(max(len(ops) - len(plain), 0), BLOCKS) for ops, _ in others]
        more = [statistics.median(np.subtract(longer, took).tolist()) for _, longer in others]  # inside a round
        extra = [m - (_seconds(profile, ops) - alone) for m, (ops, _) in zip(more, others, strict=True)]
        own, block = _least(np.asarray(rows, float), np.asarray(extra))
        found[kind] = Around(max((statistics.median(took) - alone) / len(plain), 0.0), own, block)
    return found


def _seconds(profile: Profile, ops: list[Op]) -> float:
    return sum(op_seconds(profile, op) for op in ops)


def _least(rows: np.ndarray, extra: np.ndarray) -> tuple[float, float]:
    """Seconds for each further operation and for each block, neither negative, that explain what sessions took more."""
    both = np.linalg.lstsq(rows, extra, rcond=None)[0]
    if both[1] < 0 or not rows[:, 0].any():
        one = float((rows[:, 0] @ extra) / max(rows[:, 0] @ rows[:, 0], 1e-9))
        return (max(one, 0.0), 0.0) if rows[:, 0].any() else (0.0, max(float(extra.mean() / BLOCKS), 0.0))
    if both[0] < 0:
        return 0.0, max(float(extra.mean() / BLOCKS), 0.0)
    return float(both[0]), float(both[1])


def _tiny(device: str, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module, Callable[[nn.Module], Any]]]:
    """Kinds of passes, a model of each, and what makes (fill, call) of one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small: dict[str, Any] = dict(
            hidden_size=16, intermediate_size=32, num_hidden_layers=BLOCKS, num_attention_heads=2
        )
        vit = ViTForImageClassification(ViTConfig(**small, image_size=64, patch_size=16)).eval()
        llama = LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=2, vocab_size=64)).eval()

    def pictures(net: nn.Module) -> Any:
        return nullcontext, lambda: net(pixel_values=torch.zeros(1, 3, 64, 64, device=device, dtype=dtype))

    def prompt(net: nn.Module) -> Any:
        return nullcontext, lambda: net(
            torch.zeros(1, 16, dtype=torch.long, device=device), use_cache=False, logits_to_keep=1
        )

    def step(net: nn.Module) -> Any:
        held: dict[str, Any] = {}

        def fill() -> None:
            held["cache"] = DynamicCache(config=net.config)  # type: ignore[arg-type]
            net(torch.zeros(1, 16, dtype=torch.long, device=device), past_key_values=held["cache"])

        def call() -> Any:
            return net(torch.zeros(1, 1, dtype=torch.long, device=device), past_key_values=held["cache"])

        return fill, call

    yield "encoder", vit.to(device, dtype), pictures
    yield "prompt", llama.to(device, dtype), prompt
    yield "step", llama, step
