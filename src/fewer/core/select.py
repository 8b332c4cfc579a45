"""Selectors: scores and a budget in, a pruning plan out. Pure, deterministic, stable ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from . import cluster
from .budgets import Budget, Mass, Outliers, Threshold
from .match import unit
from .place import Place
from .plan import Hard, Plan, PlanError, on_device, take
from .tokens import Group, Tokens

Fidelity = Literal["paper", "code"]
NEAR = 1024  # tokens up to which all pairs fit into a processor's cache: keeping them is cheaper than asking twice
EXPLAINED = 1e-5  # of a token's length squared: below it, what others leave of the token is rounding noise
INF = float("inf")


def top(scores: Tensor, budget: Budget, tokens: Tokens, *, at: Place, among: Group | None = None) -> Hard:
    """Keep the highest scores. Protected tokens stay besides what the budget grants.

    Shapes   scores: (B, N), any float; higher stays. among: only these tokens may go; the budget counts them.
    Returns  a hard pruning plan, rows ascending by position; ragged for adaptive budgets or padded input.
    Ties     the earlier position wins, on every device.
    Cost     one sort of N per sample, one scatter; no synchronisation.
    Raises   PlanError if scores and tokens disagree on N.
    """
    _check(scores, tokens)
    scores = _candidates(scores, tokens, among)
    free = tokens.free_count if among is None else len(among)
    fixed = tokens.n - free
    if budget.adaptive:
        return _ragged(_adaptive(scores, budget), tokens, fixed + budget.most(free, at))
    if tokens.valid is None and budget.keep(free, at) == free:
        return tokens.unchanged(scores.device)
    return _first(scores.sort(dim=-1, descending=True, stable=True).indices, budget, tokens, at, fixed)


def outliers(scores: Tensor, tokens: Tokens, *, at: Place, factor: float = 1.5) -> Hard:
    """Keep the tokens whose score lies above the upper fence, Q3 + factor (Q3 - Q1), of their sample; at least one.

    Shapes   scores: (B, N), any float. Quartiles of the free tokens, interpolated linearly.
    Returns  a ragged pruning plan. The same as `top` with the budget `Outliers(factor)`.
    Source   Tukey 1977; LLaVA-PruMerge, arXiv:2403.15388, sec. 3.2.
    """
    return top(scores, Outliers(factor), tokens, at=at)


def sampled(
    scores: Tensor, budget: Budget, tokens: Tokens, *, at: Place, fidelity: Fidelity = "paper",
    whole: Tensor | None = None,
) -> Hard:  # fmt: skip
    """Inverse transform sampling: K fixed points of the distribution of scores; a token hit twice stays once.

    Shapes   scores: (B, N), non-negative; they need not sum to one. A sample whose scores are all zero counts as even.
    whole    (B,) bool, samples of at most K tokens that keep them all; None = none.
    Returns  a ragged pruning plan: at most K free tokens stay, fewer where the scores are peaked. Deterministic.
    Points   the free tokens in order of rising score (the earlier position first) are summed up from 0 to 1. "paper":
             the points (2i - 1) / 2K, each takes the token whose step holds it. "code": K points spread from 0 to 1,
             each takes the token whose sum, rescaled to run from 0 to 1, is nearest (the first of equals).
    Cost     one sort of N and two searches per point; no synchronisation.
    Raises   PlanError if scores and tokens disagree on N, or for a budget that names no count.
    Source   ATS, arXiv:2111.15667, sec. 3.2.
    """
    _check(scores, tokens)
    if budget.adaptive:
        raise PlanError(f"{budget!r} names no count; sampling takes r, keep or tokens")
    free = tokens.free_count
    k = budget.keep(free, at)
    place = tokens.free_index()
    f = place.shape[1]
    if k == 0 or f == 0:
        return top(scores, budget, tokens, at=at)
    with torch.no_grad():
        s = scores.gather(-1, place).double().nan_to_num(0.0).clamp(min=0)
        number: Tensor | int = k
        real = None if tokens.valid is None else tokens.valid.gather(-1, place)
        even = torch.ones_like(s)
        if real is not None:
            number = budget.granted(real.sum(-1), free, at)[:, None]
            s, even = s.masked_fill(~real, 0), real.to(s.dtype)
        s = torch.where(s.sum(-1, keepdim=True) > 0, s, even)
        order = (s if real is None else s.masked_fill(~real, -1)).sort(dim=-1, stable=True).indices  # padding first
        total = s.gather(-1, order).cumsum(-1)
        total = total / total[:, -1:].clamp(min=1e-300)
        i = torch.arange(k, device=s.device, dtype=s.dtype).expand(tokens.batch, k)
        if fidelity == "paper":  # a point on an edge takes the lower token; sums of float32 in float64 are exact
            hit = torch.searchsorted(total, (2 * i + 1) / (2 * number))
        else:
            low = total[:, :1] if real is None else total.gather(-1, (f - real.sum(-1, keepdim=True)).clamp(max=f - 1))
            total = (total - low) / (1 - low).clamp(min=1e-300)
            if real is not None:
                total = total.masked_fill(~real.gather(-1, order), -9)
            hit = _nearest_step(total, i / (number - 1 if isinstance(number, Tensor) else max(number - 1, 1)))
        hit = order.gather(-1, hit.clamp(max=f - 1))
        hit = hit.masked_fill(i >= number, f)
        keep = torch.zeros(tokens.batch, f + 1, dtype=torch.bool, device=s.device).scatter(-1, hit, True)[:, :-1]
        keep = keep if whole is None else keep | whole[:, None]
        return _kept(keep, place, tokens, tokens.n - free + k, ragged=True)


def _nearest_step(steps: Tensor, points: Tensor) -> Tensor:
    """For each point the step nearest to it, the first of equals. steps: (B, F) ascending, points: (B, K)."""
    points = points.nan_to_num(0.0)
    above = torch.searchsorted(steps, points).clamp(max=steps.shape[-1] - 1)
    below = (above - 1).clamp(min=0)
    lower = points - steps.gather(-1, below) <= steps.gather(-1, above) - points
    return torch.searchsorted(steps, steps.gather(-1, torch.where(lower, below, above)))


def stratified(
    scores: Tensor, budget: Budget, tokens: Tokens, *, at: Place, grid: tuple[int, int],
    window: tuple[int, int] = (2, 2), offset: int | None = None,
) -> Hard:  # fmt: skip
    """Every window of the patch grid keeps its best token, then every window its second best, until the budget is met.

    Shapes   scores: (B, N), any float; higher stays. The last round goes by score.
    grid     (height, width) of the input patches; a token belongs to the window of the patch it stands for, so earlier
             reductions do no harm. window: (height, width) in patches; windows at the edge may be smaller.
    offset   input tokens before the first patch; None = the protected prefix.
    Returns  a hard pruning plan, rows ascending by position.
    Cost     three sorts of N per sample, no synchronisation.
    """
    _check(scores, tokens)
    if min(window) < 1:
        raise PlanError(f"windows of {window[0]} x {window[1]} hold no patch")
    if budget.adaptive:
        raise PlanError(f"{budget!r} names no count; stratified takes r, keep or tokens")
    s = _candidates(scores, tokens, None)
    patch = (tokens.ordinal() - (tokens.prefix if offset is None else offset)).clamp(min=0)
    across = -(-grid[1] // window[1])
    cell = patch // grid[1] // window[0] * across + patch % grid[1] // window[1]
    turn = rank_within(s, cell.masked_fill(~s.isfinite(), -1))
    turn = turn.masked_fill(s == float("inf"), -1).masked_fill(s == float("-inf"), tokens.n)
    by_score = s.sort(dim=-1, descending=True, stable=True).indices
    turn = turn.gather(-1, by_score)
    order = by_score.gather(-1, turn.sort(dim=-1, stable=True).indices)
    return _first(order, budget, tokens, at, tokens.n - tokens.free_count)


def maxmin(metric: Tensor, budget: Budget, tokens: Tokens, *, at: Place) -> Hard:
    """Greedy max-min diversity: always the token farthest from all that were chosen.

    Shapes   metric: (B, N, d), any float; the distance is 1 - cosine, in float32, without gradient. The first choice
             is the token whose nearest neighbour is farthest. At least one free token stays.
    Returns  a hard pruning plan, rows ascending by position.
    Cost     at most (F^2 + 2 F K) d FLOPs per sample for F free tokens, K of them chosen, and memory linear in F; F^2 d
             FLOPs and F^2 floats up to `NEAR` tokens, or four times as many where more than F / 4 are chosen. K steps,
             no sync.
    Source   DivPrune, arXiv:2503.02175, alg. 1.
    """
    block = cluster.Field.of(metric, budget, tokens, at)
    if block.all_stay:
        return tokens.unchanged(metric.device)
    few = block.f > (NEAR if 4 * block.k <= block.f else 2 * cluster.NEAR)
    at.spend((cluster.pairs(block.f) + 2 * block.f * block.k * few) * metric.shape[-1])
    with torch.no_grad():
        if few:  # columns of the matrix of pairs are computed again when they are wanted: cheaper than keeping them
            u = unit(block.take(metric))
            first, reach = cluster.loneliest(u, block.real), _cosine_from(u)
        else:
            d = cluster.cosine_distance(block.take(metric), block.real)
            alone = d.amin(-1) if block.real is None else d.amin(-1).masked_fill(~block.real, -1)
            first, reach = alone.argmax(-1), cluster.known(d)
        chosen = cluster.farthest(reach, first, block.k, block.f, block.real)
        return _chosen(chosen, block, tokens)


def dpp(metric: Tensor, quality: Tensor, budget: Budget, tokens: Tokens, *, at: Place) -> Hard:
    """Greedy maximum a posteriori set of a determinantal point process: always the token of which most is left that no
    chosen token explains, times its quality squared.

    Shapes   metric: (B, N, d), any float; quality: (B, N), at least zero. The kernel is q_i cos(x_i, x_j) q_j, in
             float32, without gradient. At least one free token stays.
    Returns  a hard pruning plan, rows ascending by position. Beyond the rank of the metric every token is explained;
             those that are go by quality. Ties: the earlier position.
    Cost     2 F K d + F K^2 FLOPs per sample for F free tokens, K of them chosen, and K F floats: a column of the
             kernel per choice, never all of it. K steps, no sync.
    Raises   PlanError if metric, quality and tokens disagree on N, or for a budget that names no count.
    Source   Chen et al., arXiv:1709.05135, alg. 1; as CDPruner, arXiv:2506.10967, uses it.
    """
    _check(quality, tokens)
    block = cluster.Field.of(metric, budget, tokens, at)
    if block.all_stay:
        return tokens.unchanged(metric.device)
    at.spend(2 * block.f * block.k * metric.shape[-1] + block.f * block.k**2)
    with torch.no_grad():
        u = unit(block.take(metric))
        # The kernel's determinant is that of the cosines times the qualities squared: what is left of a token, once the
        # chosen ones have explained their part, does not depend on quality, and logarithms bear any scale.
        weight = 2 * block.take(quality).detach().float().nan_to_num(0.0).clamp(1e-38, 1e38).log()
        if block.real is not None:
            weight = weight.masked_fill(~block.real, -INF)
        left = (u * u).sum(-1)  # 1, or 0 for a row of zeros
        known = u.new_zeros(tokens.batch, block.k, block.f)
        chosen: list[Tensor] = []
        for step in range(block.k):
            gain = (weight + left.log()).masked_fill(left <= EXPLAINED, -INF)
            new = gain.amax(-1, keepdim=True) > -INF
            pick = torch.where(new, gain, weight).argmax(-1, keepdim=True)
            chosen.append(pick)
            past = known[:, :step]
            mine = past.gather(-1, pick[:, None].expand(-1, step, -1)).transpose(-1, -2)
            column = (u @ take(u, pick).transpose(-1, -2))[..., 0] - (mine @ past)[:, 0]  # copies none of the past
            known[:, step] = (column * left.gather(-1, pick).clamp_min(EXPLAINED).rsqrt()).masked_fill(~new, 0)
            left = (left - known[:, step].square()).clamp(min=0).scatter(-1, pick, 0.0)
            weight = weight.scatter(-1, pick, -INF)
        return _chosen(torch.cat(chosen, -1), block, tokens)


def _cosine_from(u: Tensor) -> Callable[[Tensor], Tensor]:
    """Positions (B,) -> (B, F): 1 - cosine to the rows there. u: (B, F, d) of length one."""
    return lambda at: 1 - (u @ take(u, at[:, None]).transpose(-1, -2))[..., 0]


def _chosen(chosen: Tensor, block: cluster.Field, tokens: Tokens) -> Hard:
    """The plan that keeps the first ones of a choice among the free tokens. chosen: (B, K), places in the block."""
    if block.count is not None:
        late = torch.arange(block.k, device=chosen.device) >= block.count[:, None]
        chosen = chosen.masked_fill(late, block.f)
    keep = torch.zeros(tokens.batch, block.f + 1, dtype=torch.bool, device=chosen.device).scatter(-1, chosen, True)
    m = tokens.n - block.f + block.k
    return _kept(keep[:, :-1], tokens.free_index(), tokens, m, ragged=block.count is not None)


def core_set(metric: Tensor, budget: Budget, tokens: Tokens, *, at: Place, block: int = 1) -> Hard:
    """Greedy k-centre selection: the protected tokens are centres, then always the token farthest from all centres.

    Shapes   metric: (B, N, d), any float; Euclidean, in float32, without gradient. block: tokens taken per round.
    Returns  a hard pruning plan, rows ascending by position; ragged where the input is padded. Without a protected
             token the first one is the first centre and counts. Ties: the earlier position.
    Cost     2 N K d FLOPs for K tokens that stay, N x block distances at once; K / block rounds, no sync. With
             block = 1 every token lies within twice the optimal radius of a centre.
    Raises   PlanError for a block below 1, a metric of another length or a budget that names no count.
    Source   Gonzalez 1985; as Pyramid-BERT, ACL 2022, uses it.
    """
    if block < 1:
        raise PlanError(f"block={block}: every round takes at least one token")
    if budget.adaptive:
        raise PlanError(f"{budget!r} names no count; a core-set takes r, keep or tokens")
    _check(metric[..., 0], tokens)
    free = tokens.free_count
    most = budget.keep(free, at) if tokens.valid is None else budget.most(free, at)
    if tokens.valid is None and most == free:
        return tokens.unchanged(metric.device)
    at.spend(2 * tokens.n * (tokens.n - free + most) * metric.shape[-1])
    with torch.no_grad():
        centres = tokens.protected
        order = cluster.spread(metric, most, centres, tokens.n - free, tokens.valid, block)
        return top(order, budget, tokens, at=at)


def marked(keep: Tensor, tokens: Tokens) -> Hard:
    """Keep what a mask says and what is protected; padding goes.

    Shapes   keep: (B, N) bool.
    Returns  a ragged pruning plan, rows ascending by position. Where nothing at all would stay, the first token does.
    """
    _check(keep, tokens)
    if tokens.protected is not None:
        keep = keep | tokens.protected
    if tokens.valid is not None:
        keep = keep & tokens.valid
    if tokens.prefix == 0:
        first = torch.arange(tokens.n, device=keep.device) == 0
        keep = keep | (first & ~keep.any(-1, keepdim=True))
    return _ragged(keep, tokens)


def counted(keep: Tensor, tokens: Tokens, most: int) -> Hard:
    """Keep what a mask says, where the count is known beforehand.

    Shapes   keep: (B, N) bool. Without padding it marks exactly `most` tokens of every sample, else at most as many.
    Returns  a hard pruning plan of `most` rows, ascending by position; ragged where the input is padded.
    """
    _check(keep, tokens)
    if tokens.valid is not None:
        return _ragged(keep & tokens.valid, tokens, most)
    return Plan.keep((~keep).to(torch.int8).argsort(dim=-1, stable=True)[:, :most], tokens.n)


def allowed(budget: Budget, tokens: Tokens, *, at: Place, device: torch.device) -> tuple[Tensor, int]:
    """How many free tokens each sample keeps, (B,) long, and the most that any of them keeps; at least one each.

    Raises BudgetError for a budget that names no count.
    """
    free = tokens.free_count
    most = budget.counts(free, at, least=1)[free]
    if tokens.valid is None:
        return torch.full((tokens.batch,), most, device=device), most
    real = (tokens.valid.sum(-1) - (tokens.n - free)).clamp(min=0)
    return budget.granted(real, free, at, least=1), budget.most(free, at, least=1)


def within(scores: Tensor, group: Tensor, budget: Budget, tokens: Tokens, *, at: Place) -> Hard:
    """Every group of a sample keeps its highest scores, as many as the budget grants a sample of its size.

    Shapes   scores: (B, N), any float. group: (B, N) long, any numbers from 0 up. Nothing may be protected.
    Returns  a ragged pruning plan as wide as the input, for how many tokens a group has is not known on the host.
    Raises   BudgetError for a budget that names no count.
    """
    _check(scores, tokens)
    group = group if tokens.valid is None else group.masked_fill(~tokens.valid, -1)
    ranked = group.sort(dim=-1).values
    size = torch.searchsorted(ranked, group, right=True) - torch.searchsorted(ranked, group)
    number = on_device(budget.counts(tokens.n, at), group.device)[size]
    return marked(rank_within(_candidates(scores, tokens, None), group) < number, tokens)


def rank_within(scores: Tensor, group: Tensor) -> Tensor:
    """How many tokens of its own group come before each token by score; of equals the earlier position.

    scores: (B, N), any float; higher first. group: (B, N) long, any numbers. Returns (B, N) long. Two sorts, no sync.
    """
    by_score = scores.sort(dim=-1, descending=True, stable=True).indices
    ranked, order = group.gather(-1, by_score).sort(dim=-1, stable=True)
    turn = torch.arange(group.shape[-1], device=group.device) - torch.searchsorted(ranked, ranked)
    return torch.empty_like(group).scatter_(-1, by_score.gather(-1, order), turn)


def apportion(
    total: Tensor, weight: Tensor, room: Tensor, *, left: Literal["fraction", "weight"] = "fraction"
) -> Tensor:
    """Share numbers out in proportion to weights, none beyond its room.

    Shapes   total: (B,) long; weight, room: (B, G), non-negative. Returns (B, G) long, in each sample of the sum
             min(total, all room): what a full group cannot take goes to the others, again in proportion.
    Rounding shares are rounded down; what is left goes one by one to the groups that lost the largest fraction, or to
             the heaviest (left="weight") that are not full; of equals to the earlier.
    Zero     groups of weight zero take what no other can, evenly; so do all where every weight is zero.
    """
    room = room.double()
    total = torch.minimum(total.double(), room.sum(-1))[:, None]
    weight = weight.double()
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-300)
    w = weight.clamp(min=1e-12)
    level, order = (room / w).sort(dim=-1, stable=True)  # the first groups to be full come first
    full, after = room.gather(-1, order).cumsum(-1), w.gather(-1, order).flip(-1).cumsum(-1).flip(-1)
    after = torch.nn.functional.pad(after, (0, 1))
    number = (full + level * after[:, 1:] <= total).sum(-1, keepdim=True)  # groups that are full in the end
    taken = torch.nn.functional.pad(full, (1, 0)).gather(-1, number)
    rate = (total - taken) / after.gather(-1, number).clamp(min=1e-300)
    exact = torch.where(number == room.shape[-1], room, torch.minimum(rate * w, room))
    share = (exact + 1e-6).floor()
    key = (exact - share + 1e-6).mul(1e6).round() if left == "fraction" else weight  # rounded: equal is equal
    turn = rank_within(key.masked_fill(share >= room, -1), torch.zeros_like(share, dtype=torch.long))
    return (share + (turn < total - share.sum(-1, keepdim=True))).long()


def _check(scores: Tensor, tokens: Tokens) -> None:
    if scores.shape[-1] != tokens.n:
        raise PlanError(f"scores are for {scores.shape[-1]} tokens, the sequence has {tokens.n}")


def _kept(keep: Tensor, place: Tensor, tokens: Tokens, m: int, *, ragged: bool) -> Hard:
    """The plan that keeps some free tokens and all protected ones. keep, place: (B, F); m: rows."""
    full = torch.zeros(tokens.batch, tokens.n, dtype=torch.bool, device=keep.device).scatter(-1, place, keep)
    if tokens.protected is not None:
        full = full | tokens.protected
    if tokens.valid is not None:
        full = full & tokens.valid
    if ragged:
        return _ragged(full, tokens, m)
    return Plan.keep((~full).to(torch.int8).argsort(dim=-1, stable=True)[:, :m], tokens.n)


def _candidates(scores: Tensor, tokens: Tokens, among: Group | None) -> Tensor:
    """Scores with what must stay at +inf, padding at -inf, NaN lowest among the candidates."""
    scores = scores.float().nan_to_num(nan=torch.finfo(torch.float32).min)
    keep = tokens.protected
    if among is not None:
        outside = ~tokens.where(among)
        keep = outside if keep is None else keep | outside
    if keep is not None:
        scores = scores.masked_fill(keep, float("inf"))
    return scores if tokens.valid is None else scores.masked_fill(~tokens.valid, float("-inf"))


def _adaptive(scores: Tensor, budget: Budget) -> Tensor:
    """(B, N) bool: what a threshold or mass budget keeps; always at least the best candidate."""
    candidate = scores.isfinite()
    if isinstance(budget, Threshold):
        keep = scores >= budget.value
    elif isinstance(budget, Mass):
        ranked, order = scores.masked_fill(~candidate, -1).sort(dim=-1, descending=True, stable=True)
        ranked = ranked.clamp(min=0)
        before = ranked.cumsum(-1) - ranked
        wanted = (before < budget.share * ranked.sum(-1, keepdim=True)) | (budget.share == 1)
        keep = torch.zeros_like(wanted).scatter(-1, order, wanted)
    elif isinstance(budget, Outliers):
        keep = scores > _fence(scores.masked_fill(~candidate, float("inf")), candidate.sum(-1, keepdim=True), budget)
    else:
        raise PlanError(f"{type(budget).__name__} does not say which scores stay")
    best = scores.masked_fill(~candidate, float("-inf")).argmax(-1, keepdim=True)
    keep = keep.scatter(-1, best, True) & candidate
    return keep | (scores == float("inf"))


def _fence(scores: Tensor, number: Tensor, budget: Outliers) -> Tensor:
    """(B, 1): Q3 + factor (Q3 - Q1) of the `number` finite scores of each sample."""
    ranked = scores.sort(dim=-1).values
    quartile = []
    for share in (0.25, 0.75):
        at = share * (number - 1).clamp(min=0)
        low, high = at.floor().long(), at.ceil().long()
        quartile.append(torch.lerp(ranked.gather(-1, low), ranked.gather(-1, high), (at - low).float()))
    return quartile[1] + budget.factor * (quartile[1] - quartile[0])


def _ragged(keep: Tensor, tokens: Tokens, width: int | None = None) -> Hard:
    """A ragged pruning plan from a mask. keep: (B, N) bool. width: rows, the most any sample can keep (default N)."""
    order = (~keep).to(torch.int8).argsort(dim=-1, stable=True)
    return Plan.keep(order[:, :width], tokens.n, keep.sum(-1))


def _first(order: Tensor, budget: Budget, tokens: Tokens, at: Place, fixed: int) -> Hard:
    """Keep as many as the budget grants, and the `fixed` ones. order: (B, N), what stays first, padding last.

    Where samples are padded, each keeps the budget's share of its own tokens, as it would alone.
    """
    if tokens.valid is None:
        count = fixed + budget.keep(tokens.n - fixed, at)
        return Plan.keep(order[..., :count].sort(dim=-1).values, tokens.n)
    free = tokens.n - fixed
    lengths = fixed + budget.granted((tokens.valid.sum(-1) - fixed).clamp(min=0), free, at)
    rank = torch.arange(tokens.n, device=order.device)
    keep = torch.zeros_like(tokens.valid).scatter(-1, order, rank < lengths[:, None]) & tokens.valid
    return _ragged(keep, tokens, fixed + budget.most(free, at))
