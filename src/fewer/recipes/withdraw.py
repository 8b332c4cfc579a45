"""Find the layer from which a vision-language model does without its visual tokens, as VTW does.

found = search_layer(model, [processor(images=image, text=question, return_tensors="pt"), ...])
session = fewer.apply(model, "vtw", k=found.k)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewer import hosts
from fewer.runtime.apply import apply
from fewer.training.losses import logit_kl

__all__ = ["Search", "search_layer"]


@dataclass(frozen=True)
class Search:
    """What a search came to. k: blocks that must see the visual tokens, for `vtw`; the model's depth where no smaller
    number met eta. divergence: of each k that was tried, the mean KL divergence, in nats. eta: the limit."""

    k: int
    divergence: dict[int, float]
    eta: float


@torch.no_grad()
def search_layer(
    model: nn.Module, inputs: Sequence[Mapping[str, Any]], eta: float = 0.003, *, first: int | None = None
) -> Search:
    """The first layer where withdrawing all visual tokens moves the next token's distribution by at most eta.

    inputs   some prompts (the paper takes about 20), each the keyword arguments of one forward pass
    eta      nats: mean KL divergence of the withdrawn model's next-token distribution from the full one's, behind the
             last real token of each prompt. The paper's: 0.003, for larger or better models 0.0005 and 0.0001
    first    the smallest k tried; by default at the relative depth of 5 of 32. Every k up to the depth minus one is
             tried, so that the whole curve is known

    Raises   ValueError for no inputs, or a first layer outside the model.
    Source   VTW, arXiv:2405.05803, sec. 3.3.
    """
    depth = len(hosts.find(model).blocks)
    first = max(1, round(depth * 5 / 32)) if first is None else first
    if not inputs:
        raise ValueError("inputs is empty: the divergence is a mean over some prompts; give at least one")
    if not 1 <= first <= depth:
        raise ValueError(f"first={first} is no number of blocks of this model; it has {depth}")
    full = [_next(model, given) for given in inputs]
    divergence = {}
    for k in range(first, depth):
        with apply(model, "vtw", k=k):
            divergence[k] = sum(
                float(logit_kl(expected, _next(model, given))) for given, expected in zip(inputs, full, strict=True)
            ) / len(full)
    best = next((k for k, value in divergence.items() if value <= eta), depth)
    return Search(best, divergence, eta)


def _next(model: nn.Module, given: Mapping[str, Any]) -> Tensor:
    """(B, V) float32 logits behind the last real token of each prompt."""
    logits = model(**given, use_cache=False).logits.float()
    mask = given.get("attention_mask")
    if mask is None:
        return logits[:, -1]
    last = torch.where(mask != 0, torch.arange(mask.shape[1], device=mask.device), 0).amax(-1)
    return logits[torch.arange(len(logits), device=logits.device), last]
