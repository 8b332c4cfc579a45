"""How a decoder's heads tell near from far: which rotary pairs their logits follow, and what breaks without them.

Hong et al., "On the token distance modeling ability of higher RoPE attention dimension" (EMNLP Findings 2024), find
heads whose slowly turning pairs carry long-range attention, and that long inputs suffer when these heads are silenced.
The authors' code is not public; our measure is, for each head,

    share of the attention that goes to far keys  x  share of the far logits' variance that slow pairs account for

The second share is the sum over slow pairs of cov(c_j, logit) / var(logit): over all pairs it adds up to one. A pair is
slow if it does not come around once within the text. Whether such heads matter is measured, not assumed: they are
silenced, and as a control other heads of the same layers, as many of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer import hosts
from fewer.core import Seen, attention
from fewer.core.rope import pair_logits, slow_pairs
from fewer.core.tokens import Group
from fewer.hosts.decoder import DecoderHost

from .stats import Interval, mean

SINKS = 4  # first keys, left out: heads with nothing to say park their attention there


@dataclass(frozen=True)
class Reach:
    """What is near, what is far, and how many pairs of query and key are looked at.

    near: tokens; a key closer than that is near. far: tokens; a key that far away or farther is far.
    pairs: of either kind, drawn from each text, the same for all heads. rows: queries whose attention is added up.
    """

    near: int = 64
    far: int = 512
    pairs: int = 2000
    rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 < self.near <= self.far:
            raise ValueError(f"Reach(near={self.near}, far={self.far}): it must be 1 < near <= far")
        if self.pairs < 3 or self.rows < 1:
            raise ValueError(f"Reach(pairs={self.pairs}, rows={self.rows}): at least 3 pairs and 1 row")

    def drawn(self, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(2, pairs) queries and (2, pairs) keys, near ones first, uniform over distances and places that exist."""
        if length < self.far + SINKS + 2:
            raise ValueError(
                f"texts of {length} tokens have no key {self.far} tokens away behind {SINKS} sinks; lower far or use "
                "longer texts"
            )
        queries, keys = [], []
        for low, high in ((1, self.near), (self.far, length - SINKS)):
            distance = torch.randint(low, high, (self.pairs,), generator=generator)
            key = SINKS + (torch.rand(self.pairs, generator=generator) * (length - SINKS - distance)).long()
            keys.append(key)
            queries.append(key + distance)
        return torch.stack(queries), torch.stack(keys)


@dataclass(frozen=True, eq=False)
class Distance:
    """What the heads of L layers do, averaged over texts.

    near, far    (L, H, d / 2): rank correlation of each pair's contribution with the logit, over near and far keys
    reach        (L, H): share of the attention of late queries that goes to far keys, sinks left out
    slow         (L, H): share of the far logits' variance that slow pairs account for
    score        (L, H): the product, slow below zero counted as zero: how positional a head is
    pairs        (L,): slow pairs of each layer, out of d / 2
    """

    near: Tensor
    far: Tensor
    reach: Tensor
    slow: Tensor
    pairs: Tensor

    @property
    def score(self) -> Tensor:
        return self.reach * self.slow.clamp(min=0)

    def heads(self, count: int) -> list[tuple[int, int]]:
        """The `count` most positional heads as (layer, head), the best first; ties: the lower layer and head."""
        order = self.score.flatten().sort(descending=True, stable=True).indices[:count].tolist()
        return [divmod(i, self.score.shape[1]) for i in order]


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Rank correlation along the last axis, equal values sharing their mean rank; 0 where either is constant.

    x, y: (..., P); the leading axes broadcast.
    """

    def centred(t: Tensor) -> Tensor:
        ordered = t.contiguous().sort(dim=-1).values
        r = torch.searchsorted(ordered, t.contiguous()) + torch.searchsorted(ordered, t.contiguous(), right=True)
        r = r.double()
        return r - r.mean(-1, keepdim=True)

    a, b = centred(x), centred(y)
    scale = a.square().sum(-1) * b.square().sum(-1)
    return ((a * b).sum(-1) / scale.clamp(min=1e-300).sqrt()).masked_fill(scale == 0, 0).float()


@dataclass(eq=False)
class _Look:
    """A visit that measures every layer of one text as it passes. Implements the hosts' BlockRun."""

    host: DecoderHost
    reach: Reach
    queries: Tensor
    keys: Tensor
    found: list[tuple[Tensor, ...]] = field(default_factory=list)

    def attend(self, module: nn.Module, plain: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
               kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        given = kwargs.get("scaling")
        scale = q.shape[-1] ** -0.5 if given is None else float(given)
        layer = cast(int, module.layer_idx)
        rotary = self.host.rotary(layer)
        assert rotary is not None
        slow = slow_pairs(rotary.frequencies, q.shape[2]).to(q.device)
        group = q.shape[1] // k.shape[1]
        near, far = (
            pair_logits(q[0][:, asked], k[0][:, wanted].repeat_interleave(group, dim=0), scale)  # (H, pairs, d / 2)
            for asked, wanted in zip(self.queries, self.keys, strict=True)
        )
        late = torch.linspace(self.reach.far + SINKS, q.shape[2] - 1, self.reach.rows).long().unique()
        rows = attention.rows(Seen(q, k, v, scale, mask, causal=mask is None), Group(index=late[None].to(q.device)))[0]
        distance = late[:, None] - torch.arange(k.shape[2])
        away = (distance >= self.reach.far) & (torch.arange(k.shape[2]) >= SINKS)
        mass = (rows * away.to(rows.device)).sum(-1).mean(-1)
        self.found.append((_correlations(near), _correlations(far), mass, _explained(far, slow), slow.sum()))
        return plain(module, q, k, v, mask, **kwargs)


def _correlations(c: Tensor) -> Tensor:
    """(H, P, d / 2) contributions -> (H, d / 2) rank correlation of each with their sum."""
    return spearman(c.transpose(1, 2), c.sum(-1)[:, None])


def _explained(c: Tensor, chosen: Tensor) -> Tensor:
    """(H, P, d / 2) contributions -> (H,): share of their sum's variance the chosen pairs (d / 2,) account for."""
    total = c.sum(-1, keepdim=True)
    shared = ((c - c.mean(1, keepdim=True)) * (total - total.mean(1, keepdim=True))).sum(1)  # covariances times P
    return (shared * chosen).sum(-1) / shared.sum(-1).clamp(min=1e-12)


@torch.no_grad()
def probe(model: nn.Module, ids: Tensor, reach: Reach | None = None) -> Distance:
    """Look at all heads of a decoder with rotary positions.

    ids: (W, N) token ids, W texts of N tokens; one pass each. The model is left as it was.
    Raises   ValueError for texts too short for `far`, HostError for a model that is no known decoder or learns its
             positions.
    """
    reach, host = reach or Reach(), _host(model)
    generator = torch.Generator().manual_seed(reach.seed)
    sums: list[Tensor] = []
    for row in ids:
        look = _Look(host, reach, *reach.drawn(ids.shape[1], generator))
        with host.watched(look):
            host.root(input_ids=row[None], use_cache=False)
        parts = [torch.stack(part).float().cpu() for part in zip(*look.found, strict=True)]
        sums = parts if not sums else [a + b for a, b in zip(sums, parts, strict=True)]
    near, far, mass, slow, pairs = (s / len(ids) for s in sums)
    return Distance(near, far, mass, slow, pairs.long())


def _host(model: nn.Module) -> DecoderHost:
    host = hosts.find(model)
    if not isinstance(host, DecoderHost) or host.rotary(0) is None:
        raise hosts.HostError(
            f"{type(model).__name__}: the distance probe looks at rotary pairs, and {host.name} has none; give "
            "a decoder with rotary positions"
        )
    return host


# -- silencing heads --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Silence:
    """A visit in which some heads say nothing. heads: (layer, head) pairs."""

    heads: tuple[tuple[int, int], ...] = ()

    def attend(self, module: nn.Module, plain: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
               kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        out, weights = plain(module, q, k, v, mask, **kwargs)
        mute = [head for layer, head in self.heads if layer == module.layer_idx]
        if mute:
            out = out.index_fill(2, torch.tensor(mute, device=out.device), 0.0)  # (B, N, H, d)
        return out, weights


@torch.no_grad()
def token_losses(model: nn.Module, ids: Tensor, heads: Sequence[tuple[int, int]] = ()) -> Tensor:
    """(W, N - 1) float32 cross-entropies in nats of tokens 1 to N - 1, with some heads silenced."""
    host, found = _host(model), []
    with host.watched(Silence(tuple(heads))):
        for row in ids:
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
            found.append(F.cross_entropy(logits, row[1:].to(logits.device), reduction="none").cpu())
    return torch.stack(found)


def control(heads: Sequence[tuple[int, int]], total: int, seed: int) -> list[tuple[int, int]]:
    """As many other heads from the same layers, drawn at random; from any layer where one has too few left.

    total: heads of a layer. What a head costs depends much on its layer, so a draw over all layers would be unfair.
    """
    rng, taken = np.random.default_rng(seed), set(heads)
    drawn: list[tuple[int, int]] = []
    for layer in sorted({layer for layer, _ in heads}):
        free = [(layer, h) for h in range(total) if (layer, h) not in taken]
        wanted = sum(1 for other, _ in heads if other == layer)
        drawn += [free[i] for i in rng.permutation(len(free))[:wanted]]
    spare = [(layer, h) for layer in sorted({x for x, _ in heads}) for h in range(total)]
    spare = [head for head in spare if head not in taken and head not in drawn]
    drawn += [spare[i] for i in rng.permutation(len(spare))[: len(heads) - len(drawn)]]
    return drawn


@dataclass(frozen=True)
class Ablation:
    """What silencing some heads costs. early, late: rise of the loss (nats per token, mean over texts, 95 % interval)
    of tokens with fewer than `near`, and with `far` or more, tokens before them."""

    name: str
    heads: tuple[tuple[int, int], ...]
    early: Interval
    late: Interval


@dataclass(frozen=True, eq=False)
class Report:
    """The probe's answer: what the heads do, the loss of the whole model, and what silencing heads does to it."""

    distance: Distance
    early: float
    late: float
    ablations: list[Ablation]
    texts: tuple[int, int]
    reach: Reach
    seconds: float

    def lines(self) -> list[str]:
        """The answer in words: the most positional heads, and the table of silenced ones."""
        d, width = self.distance, self.distance.near.shape[-1]
        layers = ", ".join(str(n) for n in sorted(set(d.pairs.tolist())))
        rows = [f"slow pairs (no full turn in {self.texts[1]} tokens): {layers} of {width}"]
        for layer, head in self.ablations[0].heads:
            far = d.far[layer, head]
            rows.append(
                f"layer {layer:2d} head {head:2d}  score {d.score[layer, head]:.3f} = far attention "
                f"{d.reach[layer, head]:.3f} x slow share {d.slow[layer, head]:.3f}; far logits follow pair "
                f"{int(far.argmax())} most (rank correlation {far.max():.2f})"
            )
        rows.append(f"loss {self.early:.3f} with fewer than {self.reach.near} tokens before, {self.late:.3f} with "
                    f"{self.reach.far} or more; {self.texts[0]} texts")  # fmt: skip
        for a in self.ablations:
            sides = (f"{i.value:+.3f} ({i.low:+.3f} to {i.high:+.3f})" for i in (a.early, a.late))
            rows.append(f"{a.name:>10}, {len(a.heads)} heads silenced: early {next(sides)}, late {next(sides)} nats")
        return rows

    def plain(self) -> dict[str, Any]:
        """Everything as numbers and lists, for JSON."""
        d = self.distance

        def told(i: Interval) -> list[float]:
            return [round(x, 4) for x in (i.value, i.low, i.high)]

        return {
            "texts": self.texts[0],
            "tokens": self.texts[1],
            "settings": asdict(self.reach),
            "loss": {"early": round(self.early, 4), "late": round(self.late, 4)},
            "ablations": [
                {"name": a.name, "heads": a.heads, "early": told(a.early), "late": told(a.late)} for a in self.ablations
            ],
            "seconds": round(self.seconds, 1),
            "slow_pairs": d.pairs.tolist(),
            **{n: getattr(d, n).mul(1e4).round().div(1e4).tolist() for n in ("score", "reach", "slow", "near", "far")},
        }


def passages(ids: Tensor, count: int, length: int) -> Tensor:
    """(count, length): passages of a text of (T,) token ids, evenly spread from its beginning to its end.

    Raises   ValueError where they would overlap.
    """
    if len(ids) < count * length:
        raise ValueError(
            f"{count} passages of {length} tokens need {count * length}, the text has {len(ids)}: ask for fewer or "
            "shorter ones, or give a longer text"
        )
    starts = torch.linspace(0, len(ids) - length, count).long()
    return torch.stack([ids[s : s + length] for s in starts.tolist()])


def run(
    model: nn.Module, ids: Tensor, *, heads: int = 10, draws: int = 3, reach: Reach | None = None,
    others: Tensor | None = None, log: Callable[[str], None] = lambda _: None,
) -> Report:  # fmt: skip
    """Find the positional heads on some texts, silence them on others, and compare with random heads.

    ids: (W, N) token ids to find the heads on. others: (V, N) to measure the losses on; by default the same.
    heads: how many are silenced. draws: random sets to compare with.
    Raises   ValueError for counts that cannot be, and what `probe` raises.
    """
    reach, others, began = reach or Reach(), ids if others is None else others, time.perf_counter()
    distance = probe(model, ids, reach)
    depth, total = distance.score.shape
    if not 1 <= heads <= depth * total // 2:
        raise ValueError(f"heads={heads}: between 1 and half of the model's {depth * total}, so that others remain")
    log(f"looked at {depth} layers x {total} heads in {len(ids)} texts")
    found = distance.heads(heads)
    base = token_losses(model, others)
    early, late = slice(0, reach.near - 1), slice(reach.far - 1, None)  # entry i is the loss of token i + 1
    ablations = []
    for name, chosen in [("positional", found), *((f"random {i}", control(found, total, i)) for i in range(draws))]:
        rise = token_losses(model, others, chosen) - base
        ablations.append(
            Ablation(name, tuple(chosen), *(mean(rise[:, part].mean(1).numpy()) for part in (early, late)))
        )
        log(f"{name}: {ablations[-1].late.value:+.3f} nats far into the text")
    before, behind = (base[:, part].mean().item() for part in (early, late))
    size = (len(others), others.shape[1])
    return Report(distance, before, behind, ablations, size, reach, time.perf_counter() - began)
