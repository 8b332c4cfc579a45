"""DyVTE, dynamic visual-token exit (Wu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, Plan, Shape, Signals, Site, Tokens, Visual, VisualReducer, reducer
from fewer.core.learned import Learned, remember
from fewer.core.visual import Scope


class Gate(nn.Module):
    """Whether the visual tokens may leave, from two vectors side by side: 2 C -> hidden -> 2 with GELU, no bias."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2 * width, hidden, bias=False), nn.Linear(hidden, 2, bias=False)
        for layer in (self.first, self.second):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(R, 2 C) -> (R, 2) logits, 0 = stay, 1 = leave."""
        return self.second(F.gelu(self.first(x)))

    def flops(self) -> int:
        return 2 * (self.first.weight.numel() + self.second.weight.numel())


def feature(visual: Visual) -> Tensor:
    """(R, 2 C): mean of the text behind the visual tokens, the last token left out, and the last token.

    Without a gradient. Where the last token is all there is, the mean is zero."""
    sample = visual.view.sample
    index, valid = visual.words()
    rows = visual.hidden[sample[:, None], index].detach()
    last = visual.last()
    at = last.index[sample] if last.index is not None else last.start  # (R, 1)
    counted = (valid & (index != at))[..., None]
    mean = rows.masked_fill(~counted, 0).float().sum(1) / counted.sum(1).clamp_min(1)
    final = last.of(visual.hidden)[sample, 0].detach()
    return torch.cat([mean.to(final.dtype), final], -1)


@reducer("dyvte", paper="arXiv:2411.19628", acts="prune", on="multimodal", training="required")
@dataclass(frozen=True)
class DyVTE(VisualReducer):
    """Gates behind the blocks say when a prompt's visual tokens may leave, all at once (DyVTE, dynamic exit).

    A gate looks at the text only: the mean of what stands behind the visual tokens, and the last token. Each prompt
    of a batch leaves at a layer of its own and never comes back to the visual tokens.

    layers: behind which blocks there are gates; by default all but the last. hidden: width of the gates.
    Once all prompts of a batch have left, the gates behind are not asked.

    Only the gates are trained, `fewer.recipes.exits`. In training nothing leaves, and the pass's memory holds each
    gate's logits ("leave"). The gates are tied to the wording of prompts they were trained on.
    """

    layers: tuple[int, ...] | None = None
    hidden: int = 2048
    budget: ClassVar[Budget] = Learned()
    site: ClassVar[Site] = Site.AFTER_BLOCK
    scope: ClassVar[Scope] = "prompt"

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden={self.hidden}: the gates need at least one hidden channel")

    def acts_at(self, depth: int) -> tuple[int, ...]:
        return tuple(range(max(1, depth - 1))) if self.layers is None else self.layers

    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        return {"gate": Gate(shape.width, self.hidden)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        gate: Gate = signals.module("gate")
        logits = gate(feature(signals.visual).to(gate.first.weight.dtype)).float()
        signals.at.spend(gate.flops())
        everyone = torch.arange(tokens.n, device=signals.device).expand(tokens.batch, tokens.n)
        if signals.training:
            remember(signals, "leave", logits)
            return Plan.identity((tokens.batch,), tokens.n, signals.device)
        present = everyone.new_full((tokens.batch,), tokens.n) if tokens.valid is None else tokens.valid.sum(-1)
        leave = (logits[:, 1] > logits[:, 0]) & (present > 0)
        stay = torch.where(leave, 0, present)
        return Plan.keep(everyone, tokens.n, stay)
