"""The ledger: what one forward pass cost, from closed forms, and what the method itself took of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from ..hosts import Host
from .kv.state import Record


@dataclass
class Entry:
    """One block: mean tokens per sample in attention and in the MLP, the method's own FLOPs per sample, and the mean
    number of query-key pairs (by default the square of the tokens: all samples alike).

    ran  the same of the rows that were computed, padding and masked ones too; None: those that are there
    """

    attention: float
    mlp: float
    own: int = 0
    pairs: float | None = None
    ran: Entry | None = None


@dataclass
class Ledger:
    """Cost of one forward pass, per sample.

    GFLOPs follow the field's habit and count a multiply-add once. Counted: patch embedding, all linear layers of the
    blocks, q k^T and its product with v, and the method's own matrix products. Left out: norms, activations, softmax,
    the head (under 1 % together), sorting and gathering. causal: whether a token sees only those before it.
    """

    entries: list[Entry]
    full: int
    patch_macs: int
    linear: list[tuple[int, int]]
    width: int
    itemsize: int
    pair_width: int
    seconds: float | None = None
    own_seconds: float | None = None
    causal: bool = False
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, host: Host, entries: list[Entry], full: int, itemsize: int) -> Ledger:
        cut = 0 if host.patch is None else (full - host.prefix) * cast(Tensor, host.patch.weight).numel()
        linear = [host.linear_weights(i) for i in range(len(host.blocks))]
        return cls(entries, full, cut, linear, host.width, itemsize, host.pair_width)

    def _macs(self, entries: list[Entry]) -> float:
        total = float(self.patch_macs)
        for entry, (attention, mlp) in zip(entries, self.linear, strict=True):
            pairs = entry.attention**2 if entry.pairs is None else entry.pairs
            pairs = (pairs + entry.attention) / 2 if self.causal else pairs
            total += entry.attention * attention + 2 * pairs * self.pair_width + entry.mlp * mlp
        return total

    @property
    def gflops_model(self) -> float:
        """GFLOPs of the model on the tokens that were there."""
        return self._macs(self.entries) / 1e9

    @property
    def gflops_own(self) -> float:
        """GFLOPs of the method itself."""
        return sum(e.own for e in self.entries) / 2e9

    @property
    def gflops(self) -> float:
        """GFLOPs in all."""
        return self.gflops_model + self.gflops_own

    @property
    def gflops_full(self) -> float:
        """GFLOPs of the unreduced model."""
        return self._macs([Entry(self.full, self.full) for _ in self.entries]) / 1e9

    @property
    def ceiling(self) -> float:
        """Speed-up that the remaining FLOPs of the model would allow."""
        return self.gflops_full / self.gflops_model

    @property
    def reach(self) -> float:
        """Speed-up that the FLOPs really computed allow: no more than the ceiling, less where padding and masked rows
        are computed."""
        return self.gflops_full / (self._macs([entry.ran or entry for entry in self.entries]) / 1e9)

    @property
    def bytes(self) -> int:
        """Bytes of token features written by the blocks, per sample: two residual streams a block."""
        return int(sum((e.attention + e.mlp) * self.width * self.itemsize for e in self.entries))

    @property
    def mean_tokens(self) -> float:
        """Tokens per block, averaged over attention and MLP."""
        return sum(e.attention + e.mlp for e in self.entries) / (2 * len(self.entries))


@dataclass
class CacheLedger:
    """What the cache of the last pass holds, and what the method took.

    layers    one record per layer, measured on storage
    flops     the method's own floating-point operations per sample since the cache was new
    reading   cost of the last prompt's way through the blocks, where methods act there
    seconds   the host spent on the method in the last pass; on a GPU this is the launching only
    """

    layers: list[Record]
    flops: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    reading: Ledger | None = None

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(r.bytes for r in self.layers)

    @property
    def full_bytes(self) -> int:
        """Bytes the unreduced cache would hold."""
        return sum(r.full for r in self.layers)

    @property
    def peak_bytes(self) -> int:
        """The most bytes the layers held between their turns."""
        return sum(r.peak for r in self.layers)

    @property
    def stored(self) -> list[float]:
        """Rows held by each layer, averaged over samples and heads."""
        return [r.stored for r in self.layers]

    @property
    def read(self) -> list[float]:
        """Rows each layer's attention read in the last pass, averaged over samples and heads (synchronises)."""
        return [r.stored if r.read is None else float(r.read) for r in self.layers]

    @property
    def logical(self) -> list[int]:
        """Tokens each layer has seen."""
        return [r.logical for r in self.layers]


@dataclass
class StepLedger:
    """What one evaluation, or a call's evaluations so far, cost in the operations inside the blocks, per sample. A
    multiply-add counts once; left out are convolutions, norms, activations and embeddings, which no method touches.

    computed     evaluations of this call that computed every row, and how many there were
    seconds      of this thread that the last evaluation took, launching alone on a GPU; own_seconds: of the method
                 itself: planning, merging, putting back
    """

    gflops_full: float
    gflops: float
    gflops_own: float
    computed: tuple[int, int]
    notes: list[str]
    seconds: float | None = None
    own_seconds: float = 0.0

    @property
    def ceiling(self) -> float:
        """Speed-up of these operations that their remaining FLOPs would allow; inf where nothing is computed."""
        return self.gflops_full / self.gflops if self.gflops else float("inf")
