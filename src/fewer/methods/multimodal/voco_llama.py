"""VoCo-LLaMA: the language model itself packs an image into a few tokens' keys and values. arXiv:2406.12275, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.core import Budget, BudgetError, Capacity, Plan, Signals, Tokens, reducer
from fewer.core.cache import CacheReducer, Rows, top


@reducer("voco_llama", paper="arXiv:2406.12275", acts="distill", on="multimodal", training="required")
@dataclass(frozen=True)
class VoCoLLaMA(CacheReducer):
    """VoCo-LLaMA (Ye et al. 2025): of a prompt that ends with `<voco>` tokens, only their keys and values stay.

    A model is tuned with a mask that hides everything before the first `<voco>` from everything behind the last one, so
    that whatever an answer needs of the image has to pass through these few rows (`visible`, the training form). In use
    the prompt is read in two passes: [prefix, image, voco] fills the cache, of which each layer keeps the last rows,
    as many as there are voco tokens; then come the questions, as many as one likes, each with a copy of the cache.

        front, question = cut(ids, voco)
        cache = model(front, pixel_values=pixels, use_cache=True).cache
        model.generate(ids, cache=copy.deepcopy(cache))

    budget: `tokens=`, the number of voco tokens the first pass ends with; 1 is the paper's headline, 2 its scripts'.

    `<voco>` is an ordinary token of the model's vocabulary, repeated; its embedding is trained with the model, so there
    are no modules to load, and on a model that was not tuned this way answers no longer know the image. Nothing checks
    that the first pass really ends with voco tokens. Positions go on behind them. With the image the prefix before it
    goes too, as in the paper's code. Its video form, one group of voco tokens per clip, is not here.
    """

    budget: Budget = Capacity(2)
    layers: tuple[int, ...] | None = None
    once: ClassVar[bool] = True

    def check(self) -> None:
        if not isinstance(self.budget, Capacity) or not isinstance(self.budget.tokens, int):
            raise BudgetError(
                f"{self.budget!r}: voco_llama keeps its voco tokens' rows; give tokens=, how many there are"
            )

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(tokens, Rows)
        newest = tokens.newness().expand(tokens.batch, -1, -1)
        return top(newest, self.budget, tokens, at=signals.at)


def visible(voco: Tensor, real: Tensor | None = None) -> Tensor:
    """The mask a model is tuned with: True where a query sees a key.

    Shapes   voco: (B, S) bool, the voco tokens, one unbroken run in each sample or none; real: (B, S) bool, False =
             padding, None = all real. Returns (B, 1, S, S) bool, what transformers take as attention_mask beside the
             sdpa attention; for eager attention, 0 where True and the dtype's minimum elsewhere.
    Rule     causal; besides, what stands behind the last voco token sees nothing before the first one, image and
             prefix alike. A sample without voco tokens is plainly causal. Padding sees itself alone.
    Raises   ValueError where voco tokens are broken up by others: the rule knows one image in front of one text.
    """
    s = voco.shape[1]
    where = torch.arange(s, device=voco.device)
    last = torch.where(voco, where, -1).amax(-1)
    first = torch.where(voco, where, s).amin(-1)
    some = last >= 0
    if (some & (voco.sum(-1) != last - first + 1)).any():
        raise ValueError("the voco tokens of a sample stand apart; put all of them behind the one image, side by side")
    behind = some[:, None] & (where > last[:, None])
    hidden = behind[:, :, None] & (where < first[:, None])[:, None]
    seen = (where <= where[:, None]) & ~hidden
    if real is not None:
        own = torch.eye(s, dtype=torch.bool, device=voco.device)
        seen = (seen & real[:, None] & real[:, :, None]) | own
    return seen[:, None]


def cut(ids: Tensor, voco: int) -> tuple[Tensor, Tensor]:
    """Prompts up to their last voco token, and what comes behind. ids: (B, S) long; voco: the token's id.

    Raises   ValueError where prompts have none, or their last ones stand at different places.
    """
    where = torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(ids == voco, where, -1).amax(-1)
    ends = set(last.tolist())
    if -1 in ends or len(ends) > 1:
        raise ValueError(
            f"the last voco token (id {voco}) stands at {sorted(ends)} (-1: nowhere); all prompts of a batch need one, "
            "at the same place: pad on the left, with questions of equal length, or ask one by one"
        )
    end = ends.pop() + 1
    return ids[:, :end], ids[:, end:]
