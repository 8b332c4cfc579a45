"""What a denoiser can do with fewer tokens: around an operation, and over denoising steps.

All rows are wanted back behind every operation, so nothing is lost for good. Around an operation (attention, an MLP) a
plan is executed in front of it and taken back behind it. Over steps, rows that are not computed take what the same
operation gave them at an earlier step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .budgets import Budget, BudgetError, KeepRatio
from .noise import noise
from .place import Site
from .plan import Plan
from .reducer import Reducer
from .signals import Signals
from .tokens import Tokens

OPERATIONS = ("attention", "cross", "mlp")


@dataclass(frozen=True)
class Moment:
    """One evaluation of a denoiser.

    evaluation   its number in this call of the pipeline, in this branch of guidance, from 0
    evaluations  how many there will be; None where nobody said so
    step         the step of the sampler it belongs to, which may take several evaluations
    operation    which operation of a block is asked about: "attention", "cross" or "mlp"
    factor       how much coarser the block's grid is than the finest in the model
    branches     samples in the batch that belong to one picture, where guidance asks for both at once; 1 = not known
    """

    evaluation: int = 0
    evaluations: int | None = None
    step: int = 0
    operation: str = "attention"
    factor: int = 1
    branches: int = 1

    def draw(self, place: Tensor, seed: int, layer: int) -> Tensor:
        """Numbers in [0, 1) for some places, (same shape) float32: others in each step, block and seed, the same for
        both branches of guidance, on every device, however often the step is asked."""
        return noise(place, seed * 7919 + self.step, layer) / (1 << 24)

    @property
    def left(self) -> float:
        """Share of the evaluations that lie ahead, in (0, 1]; 1 where their number is not known."""
        return 1.0 if self.evaluations is None else 1 - self.evaluation / max(self.evaluations, 1)


class OperationReducer(Reducer):
    """A method around the operations of a denoiser's blocks. Its plan is over the rows that enter a block; each of the
    chosen operations runs on what it leaves, and its answer goes back to all rows.

    ratio           share of the rows that go, rounded down
    operations      those of OPERATIONS that a field of that name says; self-attention alone where there is none
    max_downsample  blocks on a grid that is so many times coarser, or finer, are reduced
    proportional    keys of merged rows count as often as there are tokens in them, by a bias of log(size)
    """

    site: ClassVar[Site] = Site.AROUND_OPERATION
    ratio: float = 0.5
    max_downsample: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise BudgetError(f"ratio={self.ratio} is outside [0, 1); it is the share of the tokens that goes")

    @property
    def budget(self) -> Budget:
        return KeepRatio(1 - self.ratio, rounding="ceil")

    @property
    def operations(self) -> tuple[str, ...]:
        return tuple(name for name in OPERATIONS if getattr(self, name, name == "attention"))


class StepReducer(Reducer):
    """A method that reuses over denoising steps what was computed before.

    whole    the unit is the whole stack of blocks: `holds` decides behind the first of them whether the others run, or
             with `early` in front of all; else each operation by itself, as `renews` and `plan` say
    attends  wants at each evaluation that renews what attention says of the rows: `signals.memory["received"]`, (B, N),
             the attention each received in its block, and "spread", the entropy of what each pays to the words
    """

    site: ClassVar[Site] = Site.DENOISING
    whole: ClassVar[bool] = False
    early: ClassVar[bool] = False
    attends: ClassVar[bool] = False

    @property
    def budget(self) -> Budget:
        return KeepRatio(1.0)

    @property
    def adaptive(self) -> bool:
        return True

    def renews(self, moment: Moment, memory: dict[str, Any]) -> bool:
        """Whether this evaluation computes everything. memory: of this call and branch."""
        raise NotImplementedError

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        """Which rows of an operation are computed in between; the others are reused. None at all is a plan, too.
        signals.memory is of this call, branch and operation."""
        return none(tokens, signals)

    def holds(self, signals: Signals) -> bool:
        """Of the whole stack: whether what it added before still holds. signals.hidden: (B, N, C), what the first block
        added; with `early` what its attention is given. signals.memory is of this call and branch."""
        raise NotImplementedError

    def renewed(self, signals: Signals) -> None:
        """Of the whole stack: it was computed again, all of it."""


def none(tokens: Tokens, signals: Signals) -> Plan:
    """The plan in which no row is computed."""
    return Plan.keep(torch.empty(tokens.batch, 0, dtype=torch.long, device=signals.device), tokens.n)


def shared(score: Tensor, branches: int) -> Tensor:
    """Scores that are the same for all samples of one picture: their mean over the branches of guidance, which stand
    one after the other in the batch. score: (B, N)."""
    if branches < 2:
        return score
    return score.unflatten(0, (branches, -1)).mean(0).repeat(branches, 1)


def near(now: Tensor, before: Tensor) -> Tensor:
    """How far something has moved, as a share: mean |now - before| / mean |before|, a number on the device."""
    return (now - before).abs().mean() / before.abs().mean().clamp_min(1e-12)


def best_of_cells(score: Tensor, grid: tuple[int, int], cell: int) -> Tensor:
    """1 for the highest score of each whole cell of the grid, 0 elsewhere. score: (B, N)."""
    height, width = grid
    plane = score.unflatten(1, (height, width))[:, : height // cell * cell, : width // cell * cell]
    cells = plane.unflatten(2, (-1, cell)).unflatten(1, (-1, cell)).transpose(2, 3).flatten(3)
    best = F.one_hot(cells.argmax(-1), cell * cell).to(score.dtype)
    plane = best.unflatten(3, (cell, cell)).transpose(2, 3).flatten(3).flatten(1, 2)
    return F.pad(plane, (0, width - plane.shape[2], 0, height - plane.shape[1])).flatten(1)
