"""Dynamic Context Pruning (Anagnostidis et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewer.core import Budget, Hard, Signals, Tokens, reducer
from fewer.core.cache import CacheReducer, CacheSignals, Rows, marked
from fewer.core.learned import Learned, remember

TINY = 1e-40


class _Entmax(torch.autograd.Function):
    """First part of alpha-entmax([z, 0]) by bisection; the derivative in closed form."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, alpha: float) -> Tensor:
        a, power = (alpha - 1) * z, 1 / (alpha - 1)
        low = torch.maximum(a, torch.zeros_like(a)) - 1  # the threshold lies within one of the larger score
        high = low + 1
        for _ in range(30):
            middle = (low + high) / 2
            mass = (a - middle).clamp(min=0) ** power + (-middle).clamp(min=0) ** power
            low, high = torch.where(mass >= 1, middle, low), torch.where(mass >= 1, high, middle)
        p, rest = (a - low).clamp(min=0) ** power, (-low).clamp(min=0) ** power
        p = p / (p + rest)
        ctx.alpha = alpha
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        inside = (p > 0) & (p < 1)
        s, t = (torch.where(inside, x.clamp_min(1e-12) ** (2 - ctx.alpha), 0) for x in (p, 1 - p))
        return grad * torch.where(inside, s * t / (s + t).clamp_min(1e-30), 0), None


def sparse_sigmoid(z: Tensor, alpha: float) -> Tensor:
    """First entry of alpha-entmax([z, 0]), float32: the sigmoid at alpha = 1, a step at infinity. alpha > 1."""
    if alpha <= 1:
        raise ValueError(f"alpha={alpha}: the bisection needs more than 1; start at 1 + 1e-6")
    return (z > 0).float() if math.isinf(alpha) else _Entmax.apply(z.float(), alpha)


class Interaction(nn.Module):
    """Interaction queries and keys of every layer. alpha: of the sparse sigmoid while training."""

    def __init__(self, width: int, rank: int, layers: int, beta: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(layers, width, rank) / math.sqrt(width))
        self.key = nn.Parameter(torch.randn(layers, width, rank) / math.sqrt(width))
        self.beta = nn.Parameter(torch.full((layers,), float(beta)))
        self.alpha = 1 + 1e-6

    def forward(self, q: Tensor, k: Tensor, layer: int) -> Tensor:
        """Whether each query wants each key to stay: (B, Q, r), (B, S, r) -> (B, Q, S) float32, above 0 = yes."""
        z = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
        return z + self.beta[layer].float()


@reducer("dynamic_context_pruning", paper="arXiv:2305.15805", acts="prune", on="language", training="required")
@dataclass(frozen=True)
class DynamicContextPruning(CacheReducer):
    """Each token decides, layer by layer, which earlier ones nobody behind it will need; those leave the cache.

    Small interaction queries and keys say for each pair whether the key stays; what one query drops stays dropped for
    all later ones, and its rows of the cache are freed at once. All heads of a layer share the decision. A token never
    drops itself. How many stay is learned: a larger weight of the sparsity loss keeps fewer.

    rank: channels of the interaction vectors (the paper's r). beta: their bias before training; 2 keeps nearly all.
    decodes: whether rows go at every decoding step too, as in the paper, or only once a prompt is read.

    In training the decision is soft: a sparse sigmoid whose alpha rises from 1, multiplied up along the queries, its
    logarithm added to the attention logits. Interaction keys of tokens seen are kept even where their rows are freed:
    rank numbers per token and layer, against two rows of keys and values.
    Freeing reads how many rows stay, once per layer and step.
    """

    budget: Budget = Learned()
    layers: tuple[int, ...] | None = None
    rank: int = 16
    beta: float = 2.0
    decodes: bool = True
    gates: ClassVar[bool] = True
    attends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: interaction vectors have at least one channel")

    def check(self) -> None:
        """Any cache will do: the count is learned."""

    def predictors(self, width: int, heads: int, groups: int, layers: int) -> dict[str, nn.Module]:
        return {"interaction": Interaction(width, self.rank, layers, self.beta)}

    def gate(self, signals: CacheSignals, rows: Rows) -> Tensor:
        interaction, layer = signals.module("interaction"), signals.at.layer
        assert signals.attending is not None and rows.age is not None
        x = signals.attending.hidden
        x = x.to(interaction.query.dtype)
        q, name = x @ interaction.query[layer], f"key{layer}"
        old = signals.memory.get(name)
        keys = x @ interaction.key[layer]
        keys = keys if old is None else torch.cat([old, keys], 1)
        if not signals.training:
            signals.memory[name] = keys
        total, asked = keys.shape[1], q.shape[1]
        signals.at.spend(2 * q.shape[-1] * asked * (2 * x.shape[-1] + rows.n))
        place = (total - rows.age[:, 0]).expand(len(x), -1)
        z = interaction(q, keys.gather(1, place.clamp(min=0)[..., None].expand(-1, -1, keys.shape[-1])), layer)
        when = torch.arange(total - asked, total, device=x.device)[None, :, None]
        early = place[:, None] >= when
        if signals.training:
            p = torch.where(early, 1.0, sparse_sigmoid(z, interaction.alpha))
            keep = p.cumprod(1)
            seen = (place[:, None] <= when)[:, :-1]
            remember(signals, "share", (keep[:, :-1] * seen).sum() / (seen.sum() * len(x)).clamp_min(1))
            return (keep + TINY).log()[:, None]
        stays = ((z > 0) | early).to(torch.int8).cummin(1).values.bool()
        signals.local["stays"] = stays[:, -1:]
        return torch.zeros_like(z).masked_fill(~stays, torch.finfo(torch.float32).min)[:, None]

    def plan(self, signals: Signals, tokens: Tokens) -> Hard:
        assert isinstance(signals, CacheSignals) and isinstance(tokens, Rows)
        return marked(signals.local.pop("stays"), tokens)
