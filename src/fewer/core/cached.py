"""The KV cache as something to reduce: its rows, what may be looked at, and the selectors that count per KV head.

A cache layer holds S rows per sample and KV head. A plan over them has lead (B, G), or (B, 1) where all heads of a
layer keep the same rows; heads may keep different numbers. Budgets count what a sample's cache holds in the end,
protected rows included: `keep=0.5` of a prompt of 1,000 tokens leaves 500 rows, whatever the observation window is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import attention
from .attention import Seen
from .budgets import Budget, BudgetError, Capacity, KeepRatio
from .codes import Codec
from .place import Place, Site
from .plan import Hard, Plan, PlanError
from .reducer import Reducer
from .signals import SignalError, Signals, lazy
from .tokens import Group, Tokens


class CacheReducer(Reducer):
    """A method that acts on the KV cache. Its plan has lead (B, G) or (B, 1).

    decodes      also acts at every decoding step; else after passes of more than one token only
    accumulates  wants `signals.received`, the attention each row has received so far
    rotates      wants `signals.rotary`, the rotary embedding of the layer
    least        rows that stay whatever the budget says (windows, sinks): the budget is never below it
    travelling   leading rows that are re-rotated to stand right before the others, as if nothing had gone; 0 = none
    evicts       takes rows away, by `plan`; a session holds at most one such method
    reads        chooses the rows that a decoding pass reads, by `read`; nothing is taken away
    gates        adds to the attention logits of every layer that is no sliding window, by `gate`
    enters       wants `signals.entry`, the hidden states that enter the first block
    attends      wants `signals.attending`, the attention module and what it was called with
    once         acts only on the pass that fills an empty cache
    """

    site: ClassVar[Site] = Site.KV_CACHE
    decodes: bool = False
    accumulates: ClassVar[bool] = False
    rotates: ClassVar[bool] = False
    evicts: ClassVar[bool] = True
    reads: ClassVar[bool] = False
    gates: ClassVar[bool] = False
    enters: ClassVar[bool] = False
    attends: ClassVar[bool] = False
    once: ClassVar[bool] = False

    @property
    def codec(self) -> Codec | None:
        """How older rows are stored between passes; None: as they are. Sliding-window layers stay as they are."""
        return None

    def read(self, signals: CacheSignals, rows: Rows) -> Hard | None:
        """The stored rows this pass's attention reads, a plan of lead (B, G) or (B, 1); None for all.

        Asked before the attention of every layer that is no sliding window, in every pass, so that what a method keeps
        in `signals.memory` stays complete. In a pass of several tokens the answer must be None.
        """
        return None

    def gate(self, signals: CacheSignals, rows: Rows) -> Tensor:
        """(B, 1 or H, Q, S) float32, what to add to the logits of this pass's queries over all rows; 0 = nothing."""
        raise NotImplementedError

    def predictors(self, width: int, heads: int, groups: int, layers: int) -> dict[str, nn.Module]:
        """The method's own trainable modules: one set for all layers of a model of C channels, H query heads and G KV
        heads in each of its layers; none for training-free methods."""
        return {}

    @property
    def least(self) -> int:
        return 0

    @property
    def travelling(self) -> int:
        return 0

    @property
    def allowance(self) -> Budget:
        """The budget as this method spreads it over the layers."""
        return self.budget

    def check(self) -> None:
        """Raises BudgetError for a budget a cache cannot have: too small for what always stays, or of no count."""
        if isinstance(self.budget, Capacity):
            low = min(self.budget.tokens) if isinstance(self.budget.tokens, tuple) else self.budget.tokens
            if low < self.least:
                raise BudgetError(f"tokens={low} is less than the {self.least} rows that always stay; raise tokens")
        if self.budget.adaptive:
            raise BudgetError(f"{self.budget!r} names no count; a cache takes keep, tokens or r")
        if isinstance(self.budget, KeepRatio) and self.budget.of == "start":
            raise BudgetError("of=start compounds from stage to stage; a cache counts all tokens so far, leave of out")


class Ranker(CacheReducer):
    """A method that ranks rows whatever order they lie in, by `Rows.age` where time matters, and keeps the highest.

    While tokens are written, the newest row may take the place of the one that goes, so that no other moves.
    weighs  ranks by the attention of the pass: a session that computes it for the model need not do so twice
    """

    weighs: ClassVar[bool] = False

    def ranks(self, signals: CacheSignals, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """Scores (B, 1 or G, S), and what is protected, as `top` takes them."""
        raise NotImplementedError

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(signals, CacheSignals) and isinstance(tokens, Rows)
        scores, protected = self.ranks(signals, tokens)
        return top(scores, self.budget, tokens, at=signals.at, protected=protected, least=self.least)

    def leaver(self, signals: CacheSignals, rows: Rows) -> Tensor:
        """(B, 1 or G, 1) long: the row of each head that goes where one must. All rows are real."""
        scores, protected = self.ranks(signals, rows)
        return lowest(scores, rows, protected)


class Rereader(CacheReducer):
    """A method that has a prompt read once more, behind itself and in chunks, and ranks its rows by that.

    chunk        tokens repeated at a time; overlap: tokens before them that are repeated too
    instruction  token ids fed before each repetition
    """

    chunk: int
    overlap: int
    instruction: tuple[int, ...]

    def votes(self, signals: CacheSignals, rows: Rows, first: int, last: int) -> Tensor:
        """(B, G, last - first) float32: importance of these rows of one layer, from the pass that repeats them.

        signals: of that pass; k and v hold the rows of the prompt, then those of the repetition. rows: the prompt's.
        """
        raise NotImplementedError

    def choose(self, votes: list[Tensor], rows: Rows, at: list[Place]) -> list[Hard]:
        """What stays in each layer where the method acts. votes: (B, G, S) for each of them."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Rows(Tokens):
    """The rows of one cache layer. n: rows (S), counting padding and holes.

    totals    per sample, the rows an unreduced cache would hold: what the budget is asked with
    real      (B, 1 or G, S) bool, False = padding or a hole of ragged heads; None = all real
    age       (B or 1, 1 or G, S) long: tokens seen since the row came, itself included
    shuffled  whether rows lie in another order than they came; only for a `Ranker`, and without padding
    """

    totals: tuple[int, ...] = ()
    real: Tensor | None = None
    age: Tensor | None = None
    shuffled: bool = False

    @property
    def even(self) -> bool:
        """Whether all rows are real and all samples alike, so that counts are Python integers."""
        return self.real is None and len(set(self.totals)) == 1

    def newest(self, width: int | Tensor) -> Tensor:
        """(1 or B, 1 or G, S) bool: the last `width` real rows of each head; a (B, 1, 1) tensor for one per sample."""
        if self.shuffled and width:
            assert self.age is not None
            return self.age <= self.age.topk(min(int(width), self.n), largest=False, sorted=False).values.amax(-1, True)
        if self.real is None:
            return (torch.arange(self.n, device=self.device) >= self.n - width)[None, None]
        return self.real & (self.real.flip(-1).cumsum(-1).flip(-1) <= width)

    def newness(self) -> Tensor:
        """(1 or B, 1 or G, S) float32: rank of each real row from the oldest; higher is newer. Of rows that are
        shuffled not the rank but what orders them alike."""
        if self.shuffled:
            assert self.age is not None
            return -self.age.float()
        if self.real is None:
            return torch.arange(self.n, device=self.device, dtype=torch.float32)[None, None]
        return self.real.cumsum(-1).float()

    def sinks(self, width: int) -> Tensor:
        """(1 or B, 1 or G, S) bool: the first `width` real rows of each head."""
        if self.shuffled and width:
            assert self.age is not None
            return self.age >= self.age.topk(min(width, self.n), sorted=False).values.amin(-1, True)
        if self.real is None:
            return (torch.arange(self.n, device=self.device) < width)[None, None]
        return self.real & (self.real.cumsum(-1) <= width)

    def counts(self, budget: Budget, at: Place, least: int = 0) -> list[int]:
        """Rows each sample keeps per head: the budget's answer, never fewer than `least` nor more than there are."""
        kept = []
        for total in self.totals:
            wanted = budget.keep(total, at)
            if wanted < (floor := min(least, total)):
                at.note(f"layer {at.layer}: the budget asks for {wanted} of {total} rows, {floor} always stay")
            kept.append(min(max(wanted, floor, 1), total))
        return kept


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of one layer: x -> rotation of x by its position times the frequencies, half-split layout.

    frequencies: (d / 2,) float32, radians per position; scale: what the model multiplies rotated vectors with.
    """

    frequencies: Tensor
    scale: float = 1.0

    def tables(self, at: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine as a model hands them to its attention. at: (B, N) positions. Returns (B, N, d) each."""
        angle = at.float()[..., None] * self.frequencies
        angle = torch.cat([angle, angle], -1)
        return (angle.cos() * self.scale).to(dtype), (angle.sin() * self.scale).to(dtype)

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """x rotated by `by` positions (negative turns back), in float32, x's dtype. x: (..., S, d), by: (..., S)."""
        return self.turn_by(x, *self.angles(by))

    def angles(self, by: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of a rotation by so many positions, each (..., S, d / 2), float32."""
        angle = by.float()[..., None] * self.frequencies
        return angle.cos(), angle.sin()

    @staticmethod
    def turn_by(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`turn` by angles that are known."""
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], -1).to(x.dtype)


@dataclass(eq=False)
class Attending:
    """A call of an attention module. hidden: (B, Q, C), its input; arguments: by keyword; weights: (B, H, Q, S), where
    the model's own attention gives them (eager), else None."""

    module: nn.Module
    hidden: Tensor
    arguments: dict[str, Any]
    weights: Tensor | None = None


@dataclass(eq=False)
class CacheSignals(Signals):
    """What a method may look at in one cache layer: k, v (B, G, S, d) are the stored rows, the newest last; q
    (B, H, Q, d) are the queries of this pass, which stand at the last Q rows.

    asking    (B, Q) bool, which queries are real; None = all
    received  (B, G, S) float32: attention each row has received since it came, mean over the query heads of a group
    rotary    this layer's rotary embedding, for methods that declare `rotates`; None where the model has none
    at_rope   (B or 1, Q): the position each query was rotated by
    entry     (B, Q, C): hidden states that entered the first block in this pass, for methods that declare `enters`
    attending the attention module's own call, for methods that declare `attends`
    weights   (B, H, 1, S) float32: attention of the only query, where it was computed for the model; None elsewhere
    memory    what the method keeps for the life of the cache, one dict for all layers. Tensors in it are (B, ..., T, C)
              with one row for each of the T tokens seen, and follow the cache when samples are picked or tokens cropped
    local     what the method keeps for this layer's stored rows: tensors (B, ...), which follow when samples are
              picked. Emptied whenever rows go, for then the rows have new numbers
    """

    asking: Tensor | None = None
    received: Tensor | None = None
    rotary: Rotary | None = None
    at_rope: Tensor | None = None
    entry: Tensor | None = None
    attending: Attending | None = None
    weights: Tensor | None = None
    local: dict[str, Any] = field(default_factory=dict)
    _memo: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def query_scale(self) -> float:
        """The factor on q k^T."""
        return self._attention("the scale").scale

    def per_group(self, x: Tensor) -> Tensor:
        """(B, H, ...) -> (B, G, ...): mean over the query heads that share a KV head."""
        return x if x.shape[1] == self.kv_heads else x.unflatten(1, (self.kv_heads, -1)).mean(2)

    def _last(self, width: int) -> tuple[Group, Tensor | None]:
        """The last `width` real queries as a group, and (B, width) weights that are zero where there are fewer."""
        q = self.q.shape[-2]
        width = min(width, q)
        if self.asking is None:
            return Group(q - width, q), None
        order = self.asking.to(torch.int8).argsort(dim=-1, stable=True)[:, q - width :]  # real ones last, ascending
        return Group(index=order), self.asking.gather(-1, order).float()

    def window_mass(self, width: int) -> Tensor:
        """(B, H, S) float32: attention the last `width` real queries of this pass give each row, averaged over them.

        A pass with fewer queries uses all of them. Memory is linear in S.
        """
        if self.weights is not None:
            return self.weights.sum(2)
        if width not in self._memo:
            group, weight = self._last(width)
            _, h, _, d = self.q.shape
            self.at.spend(2 * h * len(group) * self.k.shape[-2] * d)
            mass = attention.mass(self._attention("attention"), group, weight)
            number = len(group) if weight is None else weight.sum(-1).clamp(min=1)[:, None, None]
            self._memo[width] = mass / number
        return self._memo[width]

    def attention_mass_of_all(self) -> Tensor:
        """(B, H, S) float32: attention all real queries of this pass give each row, summed; memory linear in S."""
        if self.weights is not None:
            return self.weights.sum(2)
        n, h, d = self.q.shape[-2], self.q.shape[1], self.q.shape[-1]
        self.at.spend(2 * h * n * self.k.shape[-2] * d)
        weight = None if self.asking is None else self.asking.float()
        return attention.mass(self._attention("attention"), None, weight)

    def before(self, rows: Rows, width: int) -> Tensor:
        """(1 or B, 1 or H, S) bool: the real rows older than the newest `width`."""
        older = ~rows.newest(width) if rows.real is None else rows.real & ~rows.newest(width)
        return older if older.shape[1] == 1 else older.repeat_interleave(self.q.shape[1] // older.shape[1], dim=1)

    @lazy
    def _back(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine that turn this pass's queries back, each (B or 1, 1, Q, d / 2), over the model's scale."""
        assert self.rotary is not None
        if self.at_rope is None:
            raise SignalError("the positions of this pass are not known; pass position_ids to the model")
        cos, sin = self.rotary.angles(-self.at_rope[:, None])
        return cos / self.rotary.scale, sin / self.rotary.scale

    def plain_queries(self, heads: slice = slice(None)) -> Tensor:
        """(B, H, Q, d) float32: this pass's queries, of all heads or some, as before the rotary embedding."""
        q = self.q[:, heads].float()
        return q if self.rotary is None else self.rotary.turn_by(q, *self._back)


def attended(seen: Seen) -> tuple[Tensor, Tensor]:
    """Attention of one query that sees every row: (B, 1, H, d), and its probabilities, (B, H, 1, S) float32."""
    p = attention.rows(seen, Group(0, 1))
    v = seen.v
    out = p.to(v.dtype).view(p.shape[0], v.shape[1], -1, p.shape[-1]) @ v  # (B, G, H / G, d)
    return out.flatten(1, 2)[:, None], p


def check_window(window: int, kernel: int, pool: str) -> None:
    """Raises ValueError for an observation window or a pooling that cannot be."""
    if window < 1:
        raise ValueError(f"window={window}: at least one query must vote")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel}: the pooling width must be odd, 1 for none")
    if pool not in ("mean", "max"):
        raise ValueError(f"pool={pool!r} is neither 'mean' nor 'max'")


def check_alpha(alpha: float) -> None:
    """Raises BudgetError for a safeguard that is no share."""
    if not 0 <= alpha <= 1:
        raise BudgetError(f"alpha={alpha} is outside [0, 1]; it is the share of the budget each head is sure of")


def pooled_votes(signals: CacheSignals, rows: Rows, window: int, kernel: int, pool: str) -> Tensor:
    """(B, G, S) float32: attention of the last `window` queries on the rows before them, pooled along the sequence.

    Pooling comes before the mean over the query heads of a group. Zeros beyond the ends count in the mean.
    Source   SnapKV, arXiv:2404.14469, sec. 4 and listing 1.
    """
    votes = signals.window_mass(window).masked_fill(~signals.before(rows, window), 0)
    if pool == "mean":
        votes = F.avg_pool1d(votes, kernel, stride=1, padding=kernel // 2)
    else:
        votes = F.max_pool1d(votes, kernel, stride=1, padding=kernel // 2)
    return signals.per_group(votes)


def _candidates(scores: Tensor, rows: Rows, protected: Tensor | None) -> Tensor:
    """Scores with what must stay at +inf and what is not there at -inf; NaN counts lowest."""
    if scores.shape[-1] != rows.n:
        raise PlanError(f"scores are for {scores.shape[-1]} rows, the cache holds {rows.n}")
    scores = scores.float().nan_to_num(nan=torch.finfo(torch.float32).min)
    if protected is not None:
        scores = scores.masked_fill(protected, float("inf"))
    return scores if rows.real is None else scores.masked_fill(~rows.real, float("-inf"))


def ragged(keep: Tensor, n: int, width: int) -> Hard:
    """The plan of a mask. keep: (B, G, S) bool; width: the most rows any head can keep."""
    order = (~keep).to(torch.int8).argsort(dim=-1, stable=True)[..., :width]
    return Plan.keep(order, n, keep.sum(-1))


def marked(keep: Tensor, rows: Rows) -> Hard:
    """The plan of a mask, ragged where samples or heads keep different numbers. keep: (B, 1 or G, S) bool."""
    keep = keep if rows.real is None else keep & rows.real
    return ragged(keep, rows.n, rows.n)


def lowest(scores: Tensor, rows: Rows, protected: Tensor | None = None) -> Tensor:
    """(B, 1 or G, 1) long: the row of each head that `top` drops where it drops one; of equal ones the newest.

    Shapes as in `top`; rows may be shuffled, all of them are real."""
    assert rows.age is not None
    s = _candidates(scores, rows, protected)
    age = torch.where(s == s.amin(-1, keepdim=True), rows.age, torch.iinfo(rows.age.dtype).max)
    return age.argmin(-1, keepdim=True)


def _highest(s: Tensor, k: int) -> Tensor:
    """(B, G, k) long: where the k highest scores of each head stand, ascending; of equal ones the earlier.

    s: (B, G, S) without NaN. Selecting the k-th highest takes half the time of a sort."""
    edge = s.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, level = s > edge, s == edge
    keep = above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    slot = torch.where(keep, keep.cumsum(-1) - 1, k)  # what goes is written behind the end, and cut off
    where = torch.arange(s.shape[-1], device=s.device).expand_as(slot)
    return where.new_empty(*s.shape[:-1], k + 1).scatter_(-1, slot, where)[..., :k]


def top(
    scores: Tensor, budget: Budget, rows: Rows, *, at: Place, protected: Tensor | None = None, least: int = 0
) -> Hard:
    """Every head keeps its highest scores.

    Shapes   scores: (B, G, S) or (B, 1, S), any float; higher stays. protected: bool, broadcastable to it; these rows
             count against the budget and stay first. least: how many of them there are at most, the budget's floor.
    Returns  a hard plan of lead (B, G) or (B, 1), rows ascending; ragged where samples are padded or heads differ.
    Ties     the earlier row wins, on every device.
    Cost     one selection of S per head, or a sort where samples are padded; no synchronisation.
    """
    s = _candidates(scores, rows, protected)
    counts = rows.counts(budget, at, least)
    if rows.even:
        return Plan.keep(_highest(s, counts[0]), rows.n)
    order = s.sort(dim=-1, descending=True, stable=True).indices
    limit = torch.tensor(counts, device=s.device)[:, None, None]
    rank = torch.arange(rows.n, device=s.device)
    keep = torch.zeros_like(s, dtype=torch.bool).scatter(-1, order, (rank < limit).expand_as(order))
    return ragged(keep & (s > float("-inf")), rows.n, max(counts))


def shared(
    scores: Tensor, budget: Budget, rows: Rows, *, at: Place, alpha: float = 0.2, protected: Tensor | None = None,
    least: int = 0,
) -> Hard:  # fmt: skip
    """The heads of a layer share one budget: each keeps its own best first, the rest goes to the best of all heads.

    Shapes   scores: (B, G, S), comparable between heads (probabilities); higher stays. protected, least: see `top`.
    alpha    share of the even budget K that each head is sure of, floor(alpha K), at least one row.
    Returns  a ragged hard plan of lead (B, G): G K rows in all for each sample, floor(alpha K) or more per head.
    Ties     the earlier row wins, then the lower head.
    Source   Ada-KV, arXiv:2407.11550, alg. 1.
    """
    s = _candidates(scores, rows, protected)
    b, g, n = s.shape
    counts = rows.counts(budget, at, least)
    pools = [k * g for k in counts]
    sure = [max(int(k * alpha), min(least, k), 1) for k in counts]
    order = s.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(n, device=s.device)
    own = (rank < torch.tensor(sure, device=s.device)[:, None, None]).expand_as(order)
    own = torch.zeros_like(s, dtype=torch.bool).scatter(-1, order, own) & (s > float("-inf"))
    flat = s.masked_fill(own, float("inf")).flatten(1)
    order = flat.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(g * n, device=s.device)
    keep = (rank < torch.tensor(pools, device=s.device)[:, None]).expand_as(order)
    keep = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, order, keep) & (flat > float("-inf"))
    return ragged(keep.view(b, g, n), rows.n, min(max(pools), n))
