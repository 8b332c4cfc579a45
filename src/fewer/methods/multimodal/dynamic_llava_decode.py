"""Dynamic-LLaVA, its text part (Huang et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, Hard, Plan, Signals, Tokens, reducer
from fewer.core.cache import CacheReducer, CacheSignals, Rows, marked
from fewer.core.learned import Learned, gumbel, keep_decision, remember

FLOOR = 1e-30  # of a policy whose logarithm is taken: the gradient of the product comes out right down to here


class OutputPredictor(nn.Module):
    """Whether later tokens will need one that was written: LayerNorm, then C -> width -> width/2 -> width/4 -> 2, GELU.

    While training: tau, temperature of the sampled decisions; start, the first token that may be forgotten; generator:
    source of the noise, None = torch's global one.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter = nn.LayerNorm(channels)
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in ((channels, width), (width, width // 2), (width // 2, width // 4))
        )
        self.out = nn.Linear(width // 4, 2)
        self.tau, self.start = 1.0, 0
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 2), float32 log-probabilities, 0 = keep."""
        x = self.enter(x.to(self.out.weight.dtype))
        for layer in self.layers:
            x = F.gelu(layer(x))
        return F.log_softmax(self.out(x).float(), dim=-1)

    def flops(self) -> int:
        """Of one token."""
        return 2 * sum(p.numel() for p in self.parameters() if p.dim() == 2)


@reducer("dynamic_llava_decode", paper="arXiv:2412.00876", acts="prune", on="kv-cache", training="required")
@dataclass(frozen=True)
class DynamicLLaVADecode(CacheReducer):
    """A trained predictor says which written tokens deeper layers remember (Dynamic-LLaVA, its half for answers).

    Stack it on `dynamic_llava`, which chooses among the visual tokens. A token itself is always computed in full and
    sees itself; where the answer is no, its keys and values are kept in no layer from the first one on. Prompts stay
    whole. How many tokens are kept is learned.

    k: layers that remember everything; by default a sixteenth of the depth (2 of 32), at least one. width: of the
    predictor. It reads what enters the attention of layer k, behind that layer's norm (the authors' reads what enters
    the layer). learning: set while it is trained (`fewer.recipes.exits.train_output`); decisions are then sampled and
    weigh as keys, without a cache. decodes: whether it decides at every step; it is about nothing else.

    Counts are read from the device once per layer and step, as wherever rows leave a cache by themselves.
    """

    budget: Budget = Learned()
    k: int | None = None
    width: int = 512
    decodes: bool = True
    learning: bool = False
    attends: ClassVar[bool] = True

    @property
    def gates(self) -> bool:
        """Only its training form adds to logits."""
        return self.learning

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise ValueError(f"k={self.k}: k counts the layers that remember everything, from 1 up")
        if self.width < 4:
            raise ValueError(f"width={self.width}: the predictor narrows to a quarter, so at least 4")

    def acts_at(self, depth: int) -> tuple[int, ...]:
        return tuple(range(max(1, round(depth / 16)) if self.k is None else self.k, depth))

    def check(self) -> None:
        """Any cache will do: the count is learned."""

    def predictors(self, width: int, heads: int, groups: int, layers: int) -> dict[str, nn.Module]:
        return {"predictor": OutputPredictor(width, self.width)}

    def gate(self, signals: CacheSignals, rows: Rows) -> Tensor:
        """The training form: log of the policy on the keys; a token always sees itself."""
        if signals.at.stage == 0:
            assert signals.attending is not None
            predictor: OutputPredictor = signals.module("predictor")
            logp = predictor(signals.attending.hidden)
            decision = keep_decision(logp, gumbel(logp, predictor.generator), predictor.tau)
            free = torch.arange(rows.n, device=decision.device) >= predictor.start
            remember(signals, "keep", decision[:, predictor.start :])
            signals.memory["policy"] = torch.where(free, decision, 1.0)
        policy = signals.memory["policy"]
        own = torch.eye(rows.n, device=policy.device)
        weight = policy[:, None] + (1 - policy[:, None]) * own
        return (weight * (1 - FLOOR) + FLOOR).log()[:, None]

    def plan(self, signals: Signals, tokens: Tokens) -> Hard:
        assert isinstance(signals, CacheSignals) and isinstance(tokens, Rows)
        if signals.q.shape[2] > 1:
            return Plan.identity((tokens.batch, 1), tokens.n, signals.device)
        if signals.at.stage == 0:
            assert signals.attending is not None
            predictor: OutputPredictor = signals.module("predictor")
            logp = predictor(signals.attending.hidden[:, -1])
            signals.at.spend(predictor.flops())
            signals.memory["stays"] = logp[:, 0] > logp[:, 1]
        # The decision lives for one pass: what outlives it in this memory must have a row per token.
        last = signals.at.stage == signals.at.stages - 1
        stays = signals.memory.pop("stays") if last else signals.memory["stays"]
        return marked(~tokens.newest(1) | stays[:, None, None], tokens)
