"""TokenLearner: a handful of learned summaries take the place of all patches. arXiv:2106.11297, sec. 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fewer.core import Budget, Capacity, Plan, PlanError, Reducer, Signals, Site, Tokens, reducer
from fewer.core.place import Place


class AttentionMaps(nn.Module):
    """Version 1.1: LayerNorm, an MLP to one logit per summary, softmax over the positions. Needs no grid."""

    def __init__(self, width: int, summaries: int, bottleneck: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, bottleneck), nn.GELU(), nn.Linear(bottleneck, summaries))

    def forward(self, x: Tensor, grid: tuple[int, int] | None, real: Tensor | None) -> Tensor:
        """x: (B, M, C), real: (B, M) bool or None -> (B, S, M), float32, rows summing to one."""
        logits = self.mlp(self.norm(x)).float().transpose(1, 2)
        if real is not None:
            logits = logits.masked_fill(~real[:, None], float("-inf"))
        return logits.softmax(-1)

    def flops(self, n: int) -> int:
        return 2 * n * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))


class ConvolutionMaps(nn.Module):
    """Version 1.0: four 3 x 3 convolutions over the grid, sigmoid gates; the mean (or sum) of the gated patches."""

    def __init__(self, width: int, summaries: int, mean: bool) -> None:
        super().__init__()
        self.mean = mean
        self.norm = nn.LayerNorm(width)
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [nn.Conv2d(width if i == 0 else summaries, summaries, 3, padding=1, bias=False), nn.GELU()]
        self.convolutions = nn.Sequential(*layers, nn.Conv2d(summaries, summaries, 3, padding=1, bias=False))

    def forward(self, x: Tensor, grid: tuple[int, int] | None, real: Tensor | None) -> Tensor:
        """x: (B, M, C) on the grid, row-major -> (B, S, M), float32, gates in (0, 1), over M for the mean."""
        if grid is None or grid[0] * grid[1] != x.shape[1] or real is not None:
            raise PlanError(
                f"tokenlearner:version=1.0 convolves over the full patch grid; here are {x.shape[1]} tokens and the "
                f"grid is {grid}; use version=1.1, or let it act before anything else reduces"
            )
        maps = self.norm(x).transpose(1, 2).unflatten(2, grid)
        gates = self.convolutions(maps).flatten(2).float().sigmoid()
        return gates / x.shape[1] if self.mean else gates

    def flops(self, n: int) -> int:
        return 2 * n * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Conv2d))


class TokenFuser(nn.Module):
    """Back to the grid: mix the summaries, then spread them by gates read from the patches as they were.

    Source   TokenLearner, arXiv:2106.11297, sec. 3.4; layer order and the zero start of the mixing are its code's.
    """

    def __init__(self, width: int, summaries: int, bottleneck: int) -> None:
        super().__init__()
        self.enter, self.leave, self.look = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(summaries, summaries)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)
        self.gate = nn.Sequential(
            nn.Linear(width, bottleneck), nn.GELU(), nn.Linear(bottleneck, summaries), nn.Sigmoid()
        )

    def forward(self, summaries: Tensor, patches: Tensor) -> Tensor:
        """summaries: (B, S, C), patches: (B, M, C) as they were before -> (B, M, C), the patches plus their share."""
        mixed = self.leave(self.mix(self.enter(summaries).transpose(1, 2)).transpose(1, 2))
        return patches + self.gate(self.look(patches)) @ mixed


@reducer("tokenlearner", paper="arXiv:2106.11297", acts="distill", on="vision", training="required")
@dataclass(frozen=True)
class TokenLearner(Reducer):
    """Before one block, learned attention maps turn the patches into S summaries. Protected tokens are set aside.

    budget: the number of summaries (8 to 16 in the paper), of each frame in a video; the modules are made for this
        number. Other budgets need the shape of the model at hand and take its patch count.
    layers: the block before which it happens; half-way through 12 blocks.
    version: "1.1" an MLP and softmax over positions; "1.0" convolutions over the full grid and sigmoid gates.
    bottleneck: width of the MLPs.
    fidelity: "paper" averages version 1.0's gated patches, "code" sums them. Version 1.1 is the same in both.
    fuser: make a TokenFuser too. The forward pass leaves the patches as they were in
        `session.last.memory[method]["patches"][stage]`; `session.modules[method][stage]["fuser"](summaries, patches)`
        spreads final summaries over them.

    Rows are weighted sums of all patches, so a row's position in the trace is the patch with the largest weight.
    """

    budget: Budget = Capacity(16)
    layers: tuple[int, ...] | None = (6,)
    version: Literal["1.0", "1.1"] = "1.1"
    bottleneck: int = 64
    fuser: bool = False
    fidelity: Literal["paper", "code"] = "paper"
    site: ClassVar[Site] = Site.BEFORE_BLOCK

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", str(self.version))  # the text form reads 1.0 as a number
        if self.version not in ("1.0", "1.1"):
            raise ValueError(f"version={self.version}: tokenlearner has versions 1.0 and 1.1")
        if self.fidelity not in ("paper", "code"):
            raise ValueError(f"fidelity={self.fidelity!r}: it is paper or code")

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        summaries = self.budget.keep(free, Place(stages=stages, start=free))
        made: dict[str, nn.Module] = {}
        if self.version == "1.1":
            made["maps"] = AttentionMaps(width, summaries, self.bottleneck)
        else:
            made["maps"] = ConvolutionMaps(width, summaries, mean=self.fidelity == "paper")
        return made | ({"fuser": TokenFuser(width, summaries, self.bottleneck)} if self.fuser else {})

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        if signals.frames > 1:
            return self._by_frame(signals, tokens)
        free = tokens.free
        maps = signals.module("maps")
        patches = free.of(signals.hidden)
        alpha = maps(patches, signals.grid, None if tokens.valid is None else free.of(tokens.valid, -1))
        signals.at.spend(maps.flops(len(free)) + 2 * alpha.shape[1] * len(free) * patches.shape[-1])
        if self.fuser:
            signals.memory["patches"] = {**signals.memory.get("patches", {}), signals.at.stage: patches}
        p, s = tokens.prefix, alpha.shape[1]
        lengths = None
        if tokens.valid is not None:  # a text no longer than its summary stays as it is
            real = free.of(tokens.valid, -1).sum(-1)
            short = real <= s
            alpha = torch.where(short[:, None, None], torch.eye(s, len(free), device=alpha.device), alpha)
            lengths = p + real.clamp(max=s)
        aside = torch.eye(p, tokens.n, device=alpha.device).expand(tokens.batch, p, tokens.n)
        rows = torch.cat([alpha.new_zeros(tokens.batch, s, p), alpha], 2)
        return Plan.soft(torch.cat([aside, rows], 1), lengths=lengths)

    def _by_frame(self, signals: Signals, tokens: Tokens) -> Plan:
        """Each frame of a video has its own summaries, by the same maps, in the order of the frames."""
        frames, height, width = signals.space
        b, p, cells = tokens.batch, tokens.prefix, height * width
        if tokens.irregular or tokens.free_count != frames * cells:
            raise PlanError(
                f"tokenlearner takes the whole {frames} x {height} x {width} grid of a video; {tokens.free_count} "
                "tokens are left of it: let it act before anything else reduces"
            )
        maps = signals.module("maps")
        patches = tokens.free.of(signals.hidden).unflatten(1, (frames, cells)).flatten(0, 1)
        alpha = maps(patches, signals.grid, None)  # (B * T, S, HW)
        s = alpha.shape[1]
        signals.at.spend(frames * (maps.flops(cells) + 2 * s * cells * patches.shape[-1]))
        if self.fuser:
            whole = patches.unflatten(0, (b, frames)).flatten(1, 2)
            signals.memory["patches"] = {**signals.memory.get("patches", {}), signals.at.stage: whole}
        matrix = alpha.new_zeros(b, p + frames * s, tokens.n)
        matrix[:, :p, :p] = torch.eye(p, device=alpha.device)
        blocks = alpha.unflatten(0, (b, frames))
        for t in range(frames):
            matrix[:, p + t * s : p + (t + 1) * s, p + t * cells : p + (t + 1) * cells] = blocks[:, t]
        return Plan.soft(matrix)
