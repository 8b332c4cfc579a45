"""The slow twins: one sample, Python loops, the paper's sentences in the paper's order. For tests and for readers.

A metric is a list of N vectors, a row map is a list of N rows (-1 = dropped). Row maps number the tokens that stay by
position; of two equal candidates the earlier one is taken. Nothing here is fast, and nothing here is clever.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]
Vectors = Sequence[Vector]


# -- vectors --------------------------------------------------------------------------------------------------------
def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Vector, b: Vector) -> float:
    """0 for a vector of length zero."""
    length = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / length if length else 0.0


def squared(a: Vector, b: Vector) -> float:
    return math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def _best(values: Sequence[float]) -> int:
    """The first of the largest."""
    return max(range(len(values)), key=lambda i: (values[i], -i))


def _least(values: Sequence[float]) -> int:
    """The first of the smallest."""
    return min(range(len(values)), key=lambda i: (values[i], i))


def _ranked(values: Sequence[float]) -> list[int]:
    """Positions by falling value, the earlier of equals first."""
    return sorted(range(len(values)), key=lambda i: -values[i])


# -- plans ----------------------------------------------------------------------------------------------------------
def rows_of_groups(groups: Sequence[Sequence[int]], n: int) -> list[int]:
    """Each source's row, the groups in order of their first member; -1 for a source in no group."""
    row = [-1] * n
    for r, group in enumerate(sorted(groups, key=min)):
        for i in group:
            row[i] = r
    return row


def rows_of_merges(source: Sequence[int], into: Sequence[int], n: int) -> list[int]:
    """Each source's row when some fold into another token and the rest keep their order."""
    target = dict(zip(source, into, strict=True))
    row_of = {i: r for r, i in enumerate(i for i in range(n) if i not in target)}
    return [row_of[target.get(i, i)] for i in range(n)]


def averages(row: Sequence[int], size: Sequence[float]) -> list[float]:
    """Combining weights: a source's size over the sizes in its row."""
    total: dict[int, float] = {}
    for r, s in zip(row, size, strict=True):
        total[r] = total.get(r, 0.0) + s
    return [s / total[r] if r >= 0 else 0.0 for r, s in zip(row, size, strict=True)]


def reduce(row: Sequence[int], weight: Sequence[float], x: Vectors, m: int) -> list[list[float]]:
    """Row r is the weighted sum of the sources in it."""
    out = [[0.0] * len(x[0]) for _ in range(m)]
    for i, r in enumerate(row):
        if r >= 0:
            out[r] = [o + weight[i] * v for o, v in zip(out[r], x[i], strict=True)]
    return out


def restore(row: Sequence[int], y: Vectors, fill: float = 0.0) -> list[list[float]]:
    """Every source gets a copy of its row, a dropped one gets fill."""
    return [list(y[r]) if r >= 0 else [fill] * len(y[0]) for r in row]


def sizes(row: Sequence[int], size: Sequence[float], m: int) -> list[float]:
    return [math.fsum(s for r, s in zip(row, size, strict=True) if r == k) for k in range(m)]


def then(
    row: Sequence[int], weight: Sequence[float], next_row: Sequence[int], next_weight: Sequence[float]
) -> tuple[list[int], list[float]]:
    """Follow each source through both plans; its weights multiply."""
    rows = [next_row[r] if r >= 0 else -1 for r in row]
    weights = [w * next_weight[r] if r >= 0 else 0.0 for r, w in zip(row, weight, strict=True)]
    return rows, [w if r >= 0 else 0.0 for r, w in zip(rows, weights, strict=True)]


def mlerp(members: Vectors, size: Sequence[float]) -> list[float]:
    """The size-weighted mean, as long as the longest member."""
    total = math.fsum(size)
    mean = [math.fsum(s * v[c] for s, v in zip(size, members, strict=True)) / total for c in range(len(members[0]))]
    length = math.sqrt(dot(mean, mean))
    return [c / length * max(math.sqrt(dot(v, v)) for v in members) for c in mean]


# -- matchers -------------------------------------------------------------------------------------------------------
def fold(metric: Vectors, sources: Sequence[int], targets: Sequence[int], r: int) -> list[int]:
    """Each source finds its most similar target; the r most similar pairs merge."""
    if not sources or not targets:
        return list(range(len(metric)))
    similar = [[cosine(metric[a], metric[b]) for b in targets] for a in sources]
    partner = [_best(row) for row in similar]
    first = _ranked([max(row) for row in similar])[:r]
    return rows_of_merges([sources[i] for i in first], [targets[partner[i]] for i in first], len(metric))


def bipartite(metric: Vectors, r: int, prefix: int = 0) -> list[int]:
    """ToMe: even positions into odd ones; the protected prefix neither goes nor receives; at most half go."""
    n = len(metric)
    r = min(r, (n - prefix) // 2)
    even = [i for i in range(n) if i % 2 == 0 and i >= prefix]
    odd = [i for i in range(n) if i % 2 == 1 and i >= prefix]
    return fold(metric, even, odd, r) if r > 0 else list(range(n))


def kth_bipartite(metric: Vectors, k: int, r: int | None = None, prefix: int = 0) -> list[int]:
    """Every k-th token receives; all others, or the r most similar, fold into their best."""
    n = len(metric)
    targets = [i for i in range(k - 1, n, k) if i >= prefix]
    sources = [i for i in range(prefix, n) if i % k != k - 1]
    return fold(metric, sources, targets, len(sources) if r is None else r)


def random_bipartite(metric: Vectors, order: Sequence[int], r: int, prefix: int = 0) -> list[int]:
    """The first r of the drawn order go, the others receive; one always stays to receive."""
    free = [i for i in order if i >= prefix]
    r = min(r, max(len(free) - 1, 0))
    return fold(metric, free[:r], sorted(free[r:]), r)


def grid_bipartite(
    metric: Vectors, r: int, grid: tuple[int, int], stride: tuple[int, int], choice: Sequence[Sequence[int]],
    prefix: int = 0,
) -> list[int]:  # fmt: skip
    """One chosen cell of every whole window receives, all other patches are sources."""
    (h, w), (sy, sx) = grid, stride
    targets = []
    for wy in range(h // sy):
        for wx in range(w // sx):
            y, x = divmod(choice[wy][wx], sx)
            targets.append(prefix + (wy * sy + y) * w + wx * sx + x)
    sources = [i for i in range(prefix, prefix + h * w) if i not in targets]
    return fold(metric, sources, sorted(targets), r)


# -- clusterings ----------------------------------------------------------------------------------------------------
def ranked_bipartite(
    scores: Vector, metric: Vectors, r: int, pruned: float = 0.0, fixed: Sequence[int] = ()
) -> list[int]:
    """The less important half of the tokens: its r that are most like one of the other half go, the first share
    `pruned` of them dropped, the others merged. fixed: tokens that take no part."""
    free = [i for i in range(len(scores)) if i not in fixed]
    order = sorted(free, key=lambda i: scores[i])
    low, high = order[: len(free) // 2], sorted(order[len(free) // 2 :])
    partner = {i: high[_best([cosine(metric[i], metric[j]) for j in high])] for i in low}
    going = sorted(low, key=lambda i: -cosine(metric[i], metric[partner[i]]))[:r]
    dropped = going[: int(r * pruned + 1e-9)]
    row_of = {i: row for row, i in enumerate(i for i in range(len(scores)) if i not in going)}
    return [-1 if i in dropped else row_of[partner[i]] if i in going else row_of[i] for i in range(len(scores))]


def agglomerative(metric: Vectors, k: int, linkage: str = "average", prefix: int = 0) -> list[int]:
    """ATC: begin with single tokens, merge the two closest clusters until k are left (and the prefix).

    The distance of two clusters is the smallest, the largest or the mean distance of their members, taken anew.
    """
    n = len(metric)
    single = {(i, j): 1 - cosine(metric[i], metric[j]) for i in range(prefix, n) for j in range(prefix, n) if i < j}
    members = {i: [i] for i in range(prefix, n)}
    d = dict(single)
    while len(members) > k:
        i, j = min(d, key=lambda pair: (d[pair], pair))
        members[i] += members.pop(j)
        d = {pair: value for pair, value in d.items() if j not in pair}
        for u in members:
            if u != i:
                pairs = [single[min(a, b), max(a, b)] for a in members[u] for b in members[i]]
                link = {"single": min(pairs), "complete": max(pairs), "average": math.fsum(pairs) / len(pairs)}
                d[min(u, i), max(u, i)] = link[linkage]
    return rows_of_groups([[i] for i in range(prefix)] + list(members.values()), n)


def _nearest(x: Vectors, centres: Sequence[int]) -> list[int]:
    """The nearest centre of each token, by number; a centre belongs to itself."""
    label = [_least([squared(v, x[c]) for c in centres]) for v in x]
    for number, c in enumerate(centres):
        label[c] = number
    return label


def _clustered(label: Sequence[int], k: int, prefix: int) -> list[int]:
    groups = [[i + prefix for i, own in enumerate(label) if own == c] for c in range(k)]
    return rows_of_groups([[i] for i in range(prefix)] + groups, len(label) + prefix)


def dpc_knn(metric: Vectors, k: int, neighbours: int = 5, prefix: int = 0) -> list[int]:
    """Density from the nearest neighbours, separation from the nearest denser token, centres by their product."""
    x = metric[prefix:]
    n, width = len(x), len(metric[0])
    d = [[squared(a, b) / width for b in x] for a in x]
    density = [math.exp(-math.fsum(sorted(row)[:neighbours]) / min(neighbours, n)) for row in d]
    score = []
    for i in range(n):
        denser = [j for j in range(n) if (density[j], -j) > (density[i], -i)]
        apart = min(d[i][j] for j in denser) if denser else max(max(row) for row in d)
        score.append(density[i] * math.sqrt(apart))
    return _clustered(_nearest(x, sorted(_ranked(score)[:k])), k, prefix)


def kmeans(metric: Vectors, k: int, iterations: int = 3, weight: Vector | None = None, prefix: int = 0) -> list[int]:
    """Lloyd: assign to the nearest mean, move the means; the evenly spaced seeds never leave their cluster."""
    x = metric[prefix:]
    w = [1.0] * len(x) if weight is None else weight[prefix:]
    seeds = [c * len(x) // k for c in range(k)]
    means = [list(x[i]) for i in seeds]
    label: list[int] = []
    for _ in range(max(iterations, 1)):
        label = [_least([squared(v, m) for m in means]) for v in x]
        for c, seed in enumerate(seeds):
            label[seed] = c
        for c in range(k):
            total = math.fsum(w[i] for i, own in enumerate(label) if own == c)
            if total > 0:
                means[c] = [
                    math.fsum(w[i] * v[a] for i, v in enumerate(x) if label[i] == c) / total for a in range(len(x[0]))
                ]
    return _clustered(label, k, prefix)


def kmedoids(metric: Vectors, k: int, iterations: int = 3, weight: Vector | None = None, prefix: int = 0) -> list[int]:
    """The heaviest tokens start as centres; the next centre is the member with the least weighted distance to all."""
    x = metric[prefix:]
    w = [1.0] * len(x) if weight is None else weight[prefix:]
    centres = sorted(_ranked(w)[:k])
    label = _nearest(x, centres)
    for _ in range(iterations):
        for c in range(k):
            members = [i for i, own in enumerate(label) if own == c]
            cost = [math.fsum(w[j] * squared(x[i], x[j]) for j in members) for i in members]
            centres[c] = members[_least(cost)]
        label = _nearest(x, centres)
    return _clustered(label, k, prefix)


def kcentre(metric: Vectors, k: int, prefix: int = 0) -> list[int]:
    """From the first token on, the one farthest from all centres is the next centre."""
    x = metric[prefix:]
    return _clustered(_nearest(x, sorted(_spread([[squared(a, b) for b in x] for a in x], 0, k))), k, prefix)


def _spread(d: Vectors, first: int, k: int) -> list[int]:
    chosen = [first]
    while len(chosen) < k:
        apart = [-1.0 if i in chosen else min(d[i][c] for c in chosen) for i in range(len(d))]
        chosen.append(_best(apart))
    return chosen


# -- selectors: the positions that stay, ascending ------------------------------------------------------------------
def top(scores: Vector, keep: int, prefix: int = 0) -> list[int]:
    """The prefix and the highest scores."""
    free = _ranked(scores[prefix:])[:keep]
    return sorted([*range(prefix), *(i + prefix for i in free)])


def threshold(scores: Vector, value: float, prefix: int = 0) -> list[int]:
    """Scores that reach a value, at least the best."""
    free = scores[prefix:]
    stay = [i for i, s in enumerate(free) if s >= value] or [_best(free)]
    return sorted([*range(prefix), *(i + prefix for i in stay)])


def mass(scores: Vector, share: float, prefix: int = 0) -> list[int]:
    """Go down the ranking until the share of the total is held; at least the best. A share of one is everything."""
    free = [max(s, 0.0) for s in scores[prefix:]]
    if share == 1:
        return list(range(len(scores)))
    stay: list[int] = []
    held, total = 0.0, math.fsum(free)
    for i in _ranked(scores[prefix:]):
        if stay and held >= share * total:
            break
        stay.append(i)
        held += free[i]
    return sorted([*range(prefix), *(i + prefix for i in stay)])


def outliers(scores: Vector, factor: float = 1.5, prefix: int = 0) -> list[int]:
    """Above the upper fence, at least the best."""
    free = sorted(scores[prefix:])

    def quartile(share: float) -> float:
        at = share * (len(free) - 1)
        low = math.floor(at)
        return free[low] + (at - low) * (free[math.ceil(at)] - free[low])

    fence = quartile(0.75) + factor * (quartile(0.75) - quartile(0.25))
    stay = [i for i, s in enumerate(scores[prefix:]) if s > fence] or [_best(scores[prefix:])]
    return sorted([*range(prefix), *(i + prefix for i in stay)])


def sampled(scores: Vector, k: int, prefix: int = 0, fidelity: str = "paper") -> list[int]:
    """ATS: sort, sum up, push K points through the inverse; a token hit twice stays once."""
    free = [max(s, 0.0) for s in scores[prefix:]]
    if math.fsum(free) == 0:
        free = [1.0] * len(free)
    order = sorted(range(len(free)), key=lambda i: free[i])
    total = [math.fsum(free[i] for i in order[: j + 1]) for j in range(len(order))]
    total = [t / total[-1] for t in total]
    hit = set()
    for i in range(k):
        if fidelity == "paper":
            point = (2 * i + 1) / (2 * k)
            hit.add(order[next(j for j, t in enumerate(total) if t >= point)])
        else:
            point = i / max(k - 1, 1)
            low = total[0]
            steps = [(t - low) / (1 - low) if low < 1 else 0.0 for t in total]
            hit.add(order[_least([abs(s - point) for s in steps])])
    return sorted([*range(prefix), *(i + prefix for i in hit)])


def stratified(scores: Vector, keep: int, grid: tuple[int, int], window: tuple[int, int], prefix: int = 0) -> list[int]:
    """Windows take turns, each giving its best token that is left; the last round goes by score."""
    left: dict[tuple[int, int], list[int]] = {}
    for i in _ranked(scores[prefix:]):
        y, x = divmod(i, grid[1])
        left.setdefault((y // window[0], x // window[1]), []).append(i)
    stay: list[int] = []
    while len(stay) < keep:
        turn = sorted((cell.pop(0) for cell in left.values() if cell), key=lambda i: (-scores[prefix + i], i))
        stay += turn[: keep - len(stay)]
    return sorted([*range(prefix), *(i + prefix for i in stay)])


def maxmin(metric: Vectors, keep: int, prefix: int = 0) -> list[int]:
    """DivPrune: begin with the token whose nearest neighbour is farthest, then always the farthest from the chosen."""
    x = metric[prefix:]
    d = [[1 - cosine(a, b) for b in x] for a in x]
    alone = [min((d[i][j] for j in range(len(x)) if j != i), default=math.inf) for i in range(len(x))]
    return sorted([*range(prefix), *(i + prefix for i in _spread(d, _best(alone), keep))])


def core_set(metric: Vectors, keep: int, prefix: int = 0) -> list[int]:
    """The prefix are centres; then always the token farthest from all centres. Without a prefix the first one is."""
    chosen = list(range(prefix)) or [0]
    while len(chosen) < prefix + keep:
        left = [i for i in range(len(metric)) if i not in chosen]
        apart = [min(squared(metric[i], metric[c]) for c in chosen) for i in left]
        chosen.append(left[_best(apart)])
    return sorted(chosen)


# -- attention ------------------------------------------------------------------------------------------------------
def paid(q: Vectors, k: Vectors, scale: float, keys: Sequence[int], causal: bool = False) -> list[float]:
    """Of one head: the attention each query pays to some keys."""
    out = []
    for i, query in enumerate(q):
        seen = range(i + 1) if causal else range(len(k))
        logits = {j: scale * dot(query, k[j]) for j in seen}
        top = max(logits.values())
        total = math.fsum(math.exp(v - top) for v in logits.values())
        out.append(math.fsum(math.exp(logits[j] - top) / total for j in keys if j in logits))
    return out
