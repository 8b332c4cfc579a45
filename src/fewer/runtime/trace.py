"""What can be read of a pass afterwards: who stayed where, and what that cost. One shape for all sites."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core import Hard, Masked, Plan, Tokens
from ..core.plan import take
from ..core.visual.layout import Layout
from ..hosts import Host
from .costs import CacheLedger, Entry, Ledger, StepLedger
from .kv.state import Record
from .program import SessionError


@dataclass(frozen=True, eq=False)
class Step:
    """A plan that was executed, by which method (-1: none, padding moved) and after which block's attention.

    left  (B, N, C), what the tokens it dropped keep, where the model's output has a row for each; None elsewhere
    """

    layer: int
    method: int
    plan: Plan
    left: Tensor | None = None


class Readable(Protocol):
    """What a session shows of a site; where something has no meaning there, reading it says so."""

    @property
    def counts(self) -> list[int] | list[float] | Tensor: ...
    @property
    def ledger(self) -> Ledger | CacheLedger | StepLedger: ...
    @property
    def origin(self) -> Tensor: ...
    def kept(self, layer: int) -> Tensor: ...
    def restore(self, features: Tensor, fill: float | Tensor = 0.0) -> Tensor: ...
    def lines(self) -> list[str]: ...


@dataclass(eq=False)
class BlockCosts:
    """Of one block: rows in attention, in the MLP and behind it, as shapes tell; (B,) real ones where samples differ;
    those of each sample that were computed, padding and masked ones too; the methods' own FLOPs."""

    rows: list[int] = field(default_factory=lambda: [0, 0, 0])
    lengths: list[Tensor | None] = field(default_factory=lambda: [None, None, None])
    computed: list[list[int]] = field(default_factory=lambda: [[0], [0], [0]])
    own: int = 0

    def mean(self, which: int) -> float:
        lengths = self.lengths[which]
        return self.rows[which] if lengths is None else lengths.double().mean().item()

    @property
    def pairs(self) -> float:
        """Mean number of pairs of a query and a key."""
        lengths = self.lengths[0]
        return self.rows[0] ** 2 if lengths is None else lengths.double().square().mean().item()

    def entry(self) -> Entry:
        """The same for the ledger, per sample."""
        first, second, _ = self.computed
        ran = Entry(fmean(first), fmean(second), self.own, fmean(n * n for n in first))
        return Entry(self.mean(ATTENTION), self.mean(MLP), self.own, self.pairs, ran)


ATTENTION, MLP, BEHIND = range(3)  # of `BlockCosts.rows`


class Trace:
    """Of one pass over a stack of blocks.

    first    the tokens that entered; tokens: those that are left
    grid     (height, width) of the patches, where they form one; of a video (frames, height, width)
    steps    the plans, in order
    live     masked execution: the rows still there, as a plan over all of them
    memory   what each method remembers during the pass; shared: what all of them know
    beside   of a prompt with visual rows: what is known of these
    """

    def __init__(self, host: Host, first: Tokens, methods: int, itemsize: int, grid: tuple[int, ...] | None) -> None:
        self.host, self.first, self.tokens, self.grid = host, first, first, grid
        self.itemsize = itemsize
        self.steps: list[Step] = []
        self.live: Hard | None = None
        self.memory: list[dict[str, Any]] = [{} for _ in range(methods)]
        self.shared: dict[str, Any] = {}
        self.notes: list[str] = []
        self.blocks = [BlockCosts() for _ in host.blocks]
        self.seconds: float | None = None
        self.own_seconds: float | None = None
        self.beside: Any = None

    @property
    def counts(self) -> list[int] | Tensor:
        """Tokens after each block: Python integers, or (layers, B) where samples differ."""
        if all(block.lengths[BEHIND] is None for block in self.blocks):
            return [block.rows[BEHIND] for block in self.blocks]
        full = [
            torch.full((self.first.batch,), block.rows[BEHIND]) if (n := block.lengths[BEHIND]) is None else n.cpu()
            for block in self.blocks
        ]
        return torch.stack(full)

    @property
    def ledger(self) -> Ledger:
        """What the pass cost."""
        ledger = Ledger.of(self.host, [block.entry() for block in self.blocks], self.first.n, self.itemsize)
        ledger.causal = self.host.kind == "decoder"
        ledger.seconds, ledger.own_seconds = self.seconds, self.own_seconds
        ledger.notes = list(dict.fromkeys(self.notes))
        return ledger

    @property
    def origin(self) -> Tensor:
        """(B, N0): the final row of each input token, -1 = dropped."""
        return self.rows()

    def rows(self, layer: int | None = None) -> Tensor:
        """(B, N0): the row each input token is in after `layer` (the last by default), -1 = dropped."""
        row = torch.arange(self.first.n, device=self.first.device).expand(self.first.batch, -1)
        for step in self.steps:
            if layer is None or step.layer <= layer:
                row = torch.where(row < 0, -1, step.plan.row.gather(-1, row.clamp(min=0)))
        if layer is None and self.live is not None:  # masked execution: the rows of the output are all still there
            where = self.kept(len(self.blocks) - 1) if self.host.dense else self.live.anchor
            row = torch.where(row < 0, -1, where.gather(-1, row.clamp(min=0)))
        return row

    def kept(self, layer: int) -> Tensor:
        """(B, M): the input token each row stands for after `layer`, row by row; -1 pads ragged samples. What entered
        the first block is layer -1's."""
        place = torch.arange(self.first.n, device=self.first.device).expand(self.first.batch, -1)
        valid: Tensor | None = None
        for step in self.steps:
            if step.layer <= layer:
                place = step.plan.gather(place)
                own = step.plan.valid
                valid = own if own is not None else None if valid is None else step.plan.gather(valid)
                if isinstance(step.plan, Masked):
                    valid = step.plan.policy > 0
        return place if valid is None else place.masked_fill(~valid, -1)

    def restore(self, features: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """Rows spread back over the input tokens. features: (B, M, C). Returns (B, height, width, C) for patches in a
        grid, else (B, N0 - prefix, C)."""
        dense = self.spread(features, fill)[:, self.host.prefix :]
        return dense if self.grid is None else dense.unflatten(1, self.grid)

    def spread(self, features: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """The same for all tokens, in one row. Returns (B, N0, C)."""
        if self.live is not None:
            features = take(features, self.live.anchor)
        for step in reversed(self.steps):
            features = step.plan.restore(features, fill)
        return features

    # -- visual rows of a prompt ---------------------------------------------------------------------------------------
    @property
    def layout(self) -> Layout:
        """Where the visual rows of the prompts stood.

        Raises   SessionError where there were none.
        """
        if self.beside is None:
            raise SessionError("the last prompt held no visual rows")
        layout: Layout = self.beside.layout
        return layout

    def seen(self, layer: int = -1) -> Tensor:
        """(B, S) bool: the visual rows that are left after a block; -1 is the last block's."""
        visual, kept = self.layout.visual, self.kept(range(len(self.blocks))[layer])
        b, s = self.first.batch, self.first.n
        left = torch.zeros(b, s + 1, dtype=torch.bool, device=kept.device)
        left = left.scatter(1, torch.where(kept < 0, s, kept), True)[:, :-1]
        return left & visual

    @property
    def visual_counts(self) -> list[float]:
        """Visual rows after each block, averaged over the prompts (synchronises)."""
        return [self.seen(layer).sum(-1).float().mean().item() for layer in range(len(self.blocks))]

    def visual_line(self) -> list[str]:
        """The same in words, where there were any."""
        if self.beside is None:
            return []
        counts = " ".join(f"{c:g}" for c in (round(x, 1) for x in self.visual_counts))
        return [f"visual rows {sum(self.layout.counts) / max(self.first.batch, 1):g} -> {counts}"]

    def lines(self) -> list[str]:
        """Tokens per block, cost, the method's own share, notes."""
        ledger, counts = self.ledger, self.counts
        shown = counts if isinstance(counts, list) else [round(c, 1) for c in counts.float().mean(1).tolist()]
        own = f", own share {100 * ledger.gflops_own / ledger.gflops:.1f} % of FLOPs"
        if ledger.seconds and ledger.own_seconds is not None:
            own += f", {100 * ledger.own_seconds / ledger.seconds:.1f} % of time"
        ran = ledger.ceiling - ledger.reach
        padded = "" if ran < 0.01 else f", {ledger.reach:.2f}x with the padding that was computed"
        return [
            f"tokens {self.first.n} -> {' '.join(map(str, shown))}",
            f"{ledger.gflops_full:.2f} -> {ledger.gflops:.2f} GFLOPs (ceiling {ledger.ceiling:.2f}x{padded}{own})",
            *ledger.notes,
        ]

    def fork(self) -> Trace:
        """A copy as it is now, for running a block once more without touching this one."""
        other = copy.copy(self)
        other.steps, other.notes = list(self.steps), list(self.notes)
        other.blocks = [BlockCosts(list(b.rows), list(b.lengths), list(b.computed), b.own) for b in self.blocks]
        other.memory, other.shared = [dict(m) for m in self.memory], dict(self.shared)
        return other


@dataclass(eq=False)
class CacheTrace:
    """Of a KV cache, and of the last prompt's way through the blocks where methods act there.

    records   of each block that keeps keys and values
    depth     blocks of the model
    flops     the methods' own operations per sample since the cache was new; seconds: of the host in the last pass
    prompt    the last pass over a prompt; None where no method acts between the blocks
    """

    records: dict[int, Record]
    depth: int
    flops: int
    seconds: float
    notes: list[str]
    prompt: Trace | None

    @property
    def ledger(self) -> CacheLedger:
        """What the last cache holds, layer by layer."""
        if not self.records and self.prompt is None:
            why = "".join(f" ({note})" for note in self.notes)
            raise SessionError(f"no forward pass with a cache yet{why}: call the model or generate() first")
        prefill = None if self.prompt is None else self.prompt.ledger
        notes = self.notes if prefill is None else [*self.notes, *prefill.notes]
        return CacheLedger(list(self.records.values()), self.flops, self.seconds, notes, prefill)

    @property
    def counts(self) -> list[float]:
        """Rows each layer's cache holds, averaged over samples and KV heads; without a cache, tokens after each
        block."""
        if not self.records and self.prompt is not None:
            counts = self.prompt.counts
            return [float(c) for c in counts] if isinstance(counts, list) else counts.double().mean(1).tolist()
        return self.ledger.stored

    def kept(self, layer: int) -> Tensor:
        """(B, G, M): the input positions of the rows `layer` holds, ascending; -1 pads where heads, samples differ.

        Padding that no plan removed counts as rows, and so do rows of a sliding layer that have just left its window.
        """
        block = range(self.depth)[layer]
        if not self.records and self.prompt is not None:
            return self.prompt.kept(block)[:, None]
        if block not in self.records:
            held = ", ".join(map(str, self.records)) or "none"
            raise SessionError(f"block {block} keeps no keys and values here; of all blocks, {held} do")
        return self.records[block].positions()

    def _prompt(self, what: str) -> Trace:
        if self.prompt is None:
            raise SessionError(
                f"{what} speaks of features, and rows of a cache have left behind them no feature: read kept(layer), "
                "counts, ledger, report()"
            )
        return self.prompt

    @property
    def origin(self) -> Tensor:
        return self._prompt("origin").origin

    def restore(self, features: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        return self._prompt("restore").restore(features, fill)

    def lines(self) -> list[str]:
        """Rows, bytes, the methods' own share, notes; what reading the prompt cost, where methods act there."""
        if not self.records and self.prompt is None and self.notes:
            return list(self.notes)
        ledger, prefill = self.ledger, self.ledger.reading
        seen = [] if self.prompt is None else self.prompt.visual_line()
        words = [] if prefill is None else [
            f"reading {prefill.gflops_full:.2f} -> {prefill.gflops:.2f} GFLOPs (ceiling {prefill.ceiling:.2f}x)"
        ]  # fmt: skip
        if not ledger.layers:
            return [*seen, *words, *ledger.notes]
        stored = " ".join(f"{s:g}" for s in (round(x, 1) for x in ledger.stored))
        return [
            *seen,
            f"rows {ledger.logical[0]} -> {stored}",
            f"cache {ledger.full_bytes / 1e6:.3f} -> {ledger.bytes / 1e6:.3f} MB "
            f"({ledger.full_bytes / max(ledger.bytes, 1):.2f}x smaller), own work {ledger.flops / 1e9:.3f} GFLOPs",
            *words,
            *ledger.notes,
        ]
