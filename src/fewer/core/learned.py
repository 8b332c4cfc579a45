"""What learned reducers share: a keep predictor, hard decisions with soft gradients, and their training record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .budgets import Budget
from .place import Place
from .plan import Plan
from .signals import Signals
from .tokens import Tokens


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of hard, to the bit, with the gradient of soft."""
    return hard + (soft - soft.detach())


def gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise, float32, of like's shape and device."""
    uniform = torch.rand(like.shape, generator=generator, device=like.device)
    tiny = torch.finfo(torch.float32).tiny
    return -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()


def keep_decision(logp: Tensor, noise: Tensor, tau: float = 1.0) -> Tensor:
    """Sample keep (1) or drop (0) for each token.

    Shapes   logp: (B, M, 2) log-probabilities, class 0 = keep; noise: Gumbel noise of the same shape.
    Returns  (B, M) float32, exactly 0 or 1, with the gradient of softmax((logp + noise) / tau).
    Source   Gumbel-softmax with straight-through gradients, arXiv:1611.01144.
    """
    soft = ((logp + noise) / tau).softmax(-1)[..., 0]
    noisy = logp + noise
    return straight_through((noisy[..., 0] >= noisy[..., 1]).float(), soft)


class _Perturbed(torch.autograd.Function):
    """Mean of the one-hot top-k sets of noisy scores; backward by the score function of the noise."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: int, noise: Tensor, sigma: float, diagonal: bool) -> Tensor:
        picked = _tops(scores, k, noise, sigma)  # (S, B, k)
        ctx.save_for_backward(noise, picked)
        ctx.sigma, ctx.diagonal = sigma, diagonal
        return F.one_hot(picked, scores.shape[-1]).float().mean(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        noise, picked = ctx.saved_tensors
        s, (b, k, d) = len(noise), grad.shape
        # what each draw's choice is worth, sum over its k rows of the gradient there: (S, B, k)
        worth = grad.expand(s, b, k, d).gather(-1, picked[..., None])[..., 0]
        if ctx.diagonal:  # only a token's own noise, as the authors' code does
            own = torch.zeros_like(noise).scatter_add(-1, picked, worth)
            out = (noise * own).sum(0)
        else:
            out = (noise * worth.sum(-1, keepdim=True)).sum(0)
        return out / (s * ctx.sigma), None, None, None, None


def _tops(scores: Tensor, k: int, noise: Tensor, sigma: float) -> Tensor:
    return (scores + sigma * noise).topk(k, dim=-1).indices.sort(-1).values


def perturbed_top(
    scores: Tensor, k: int, *, sigma: float = 0.05, samples: int = 500, diagonal: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Soft selectors of the k highest scores: (B, d) -> (B, k, d), each row summing to one, in the order of positions.

    sigma      of the Gaussian noise; at 0 the hard choice, without gradient
    diagonal   the gradient of the authors' code (a token's own noise only) instead of that of the smoothed choice
    Memory     samples x B x (k + d) numbers; no one-hot of the samples is kept for the backward pass.
    Source   Cordonnier et al., CVPR 2021, after Berthet et al., arXiv:2002.08676; as STTS and TS2-Net use it.
    """
    with torch.no_grad():
        noise = torch.randn((samples, *scores.shape), generator=generator, device=scores.device)
    if sigma == 0:
        return F.one_hot(_tops(scores.detach(), k, noise[:1], 0.0)[0], scores.shape[-1]).float()
    return _Perturbed.apply(scores.float(), k, noise, sigma, diagonal)


@dataclass(frozen=True)
class Learned(Budget):
    """The count comes from the method's trained modules."""

    @property
    def adaptive(self) -> bool:
        return True  # not known from shapes alone, so the method is always asked

    def keep(self, free: int, at: Place) -> int:
        return free


M = TypeVar("M", bound=nn.Module)


class ModuleListOf(nn.ModuleList, Generic[M]):
    """An nn.ModuleList whose modules are all of one class, for those who read the types."""

    if TYPE_CHECKING:

        def __init__(self, modules: Iterable[M] | None = None) -> None: ...
        def __iter__(self) -> Iterator[M]: ...
        @overload
        def __getitem__(self, idx: slice) -> ModuleListOf[M]: ...
        @overload
        def __getitem__(self, idx: int) -> M: ...
        def __getitem__(self, idx: Any) -> Any: ...


Modules = ModuleListOf[ModuleListOf[nn.ModuleDict]]
"""Trained modules of some methods: for each a list with one nn.ModuleDict per stage."""


class Whole(nn.Module):
    """A learned whole number: `forward` computes it as a scalar from the module's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._read: tuple[int, int] | None = None

    @property
    def number(self) -> int:
        """The number as a Python integer. Read from the device once after each change of the parameters."""
        if any(p.is_inference() for p in self.parameters()):  # these do not tell when they change
            return int(self().item())
        version = sum(p._version for p in self.parameters())
        if self._read is None or self._read[0] != version:
            self._read = (version, int(self().item()))
        return self._read[1]


class Predictor(nn.Module):
    """Keep or drop, from a token's own features and the mean of those still present.

    h = GELU(Linear(LayerNorm(x))); the first half of h's channels is the token's own, the second half is averaged over
    the present tokens; both go through C -> C/2 -> C/4 -> 2 with GELU. Source: DynamicViT, arXiv:2106.02034, sec. 3.2.

    generator: source of the training noise; None = torch's global one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half, quarter = max(1, width // 2), max(1, width // 4)
        self.own = half
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.decide = nn.Sequential(
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        )
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """x: (B, M, C); present: (B, M) in [0, 1], None = all. -> (B, M, 2), float32 log-probabilities, 0 = keep."""
        h = self.embed(x)
        own, shared = h[..., : self.own], h[..., self.own :]
        if present is None:
            mean = shared.mean(1, keepdim=True)
        else:
            weight = present[..., None].to(h.dtype)
            mean = (shared * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1e-6)
        return F.log_softmax(self.decide(torch.cat([own, mean.expand_as(shared)], -1)).float(), dim=-1)

    def noise(self, logp: Tensor) -> Tensor:
        """What is added to the log-probabilities in training."""
        return gumbel(logp, self.generator)

    def flops(self, n: int) -> int:
        """The linear layers on n tokens: 2 multiply-adds per weight and token."""
        return 2 * n * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))


def present(tokens: Tokens) -> Tensor | None:
    """(B, M) in [0, 1]: which free tokens are still there, by earlier decisions and padding; None = all."""
    stream = tokens.policy
    if tokens.valid is not None:
        stream = tokens.valid.float() if stream is None else stream * tokens.valid
    return None if stream is None else tokens.free.of(stream, -1)


def training_policy(signals: Signals, tokens: Tokens, budget: Budget, decision: Tensor) -> Tensor:
    """The policy after a learned decision, and its entry in the pass's memory.

    decision: (B, M) in {0, 1} for the free tokens. A token dropped once stays dropped; protected tokens stay.
    Returns  (B, N) policy. `signals.memory` gains, under the stage: "keep", the free tokens' decisions (B, M), and
             "target", the share of the starting tokens that the budget grants. The training losses read both.
    """
    there = present(tokens)
    keep = decision if there is None else decision * there
    policy = torch.cat([keep.new_ones(tokens.batch, tokens.prefix), keep], 1)
    if tokens.guarded is not None:
        policy = policy.masked_fill(tokens.guarded, 1)
    at = signals.at
    left = signals.memory.get("left", tokens.free_count)  # in training no row goes, so the budget's own count is kept
    left = budget.keep(left, at)
    remember(signals, "keep", tokens.free.of(policy, -1))
    remember(signals, "target", left / at.start)
    signals.memory["left"] = left
    return policy


def remember(signals: Signals, name: str, value: Any) -> None:
    """One stage's entry of a record in the pass's memory. Written anew, so that forked passes do not share it."""
    signals.memory[name] = {**signals.memory.get(name, {}), signals.at.stage: value}


def with_package(policy: Tensor, package: Tensor, some: Tensor, tokens: Tokens) -> Plan:
    """The training plan of methods that pack what goes: all rows, and behind the prefix one more of weights package
    (B, N), real where some (B, 1)."""
    n, p = tokens.n, tokens.prefix
    eye = torch.eye(n, device=package.device).expand(tokens.batch, n, n)
    matrix = torch.cat([eye[:, :p], package[:, None], eye[:, p:]], 1)
    where = torch.arange(n, device=package.device).expand(tokens.batch, n)
    position = torch.cat([where[:, :p], package.detach().argmax(-1, keepdim=True), where[:, p:]], 1)
    change = Plan.soft(matrix, position=position)
    return Plan.mask(torch.cat([policy[:, :p], some, policy[:, p:]], 1), change, front=1)
