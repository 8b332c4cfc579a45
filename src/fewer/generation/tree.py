"""Guesses as a tree below a token that is certain, grown where they are most likely to be reached."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

Kind = tuple[str, ...] | tuple[object, ...]


@dataclass(frozen=True)
class Guess:
    """A token, the chance its source gives it where it may stand, and what kind of guess it is: (source, ...)."""

    token: int
    chance: float
    kind: Kind


class Record:
    """How often guesses of each kind came true, where they were put to the test; at first what they say themselves."""

    TRUST = 8.0  # tests after which experience counts as much as what a guess says of itself

    def __init__(self) -> None:
        self.tested: dict[Kind, list[int]] = {}

    def chance(self, guess: Guess) -> float:
        tests, hits = self.tested.get(guess.kind, (0, 0))
        return (hits + self.TRUST * guess.chance) / (tests + self.TRUST)

    def add(self, kind: Kind, hit: bool) -> None:
        tests, hits = self.tested.get(kind, (0, 0))
        self.tested[kind] = [tests + 1, hits + hit]

    def by_source(self) -> dict[str, tuple[int, int]]:
        """Of each source: guesses put to the test, and those that came true."""
        found: dict[str, tuple[int, int]] = {}
        for (source, *_), (tests, hits) in sorted(self.tested.items(), key=lambda item: str(item[0])):
            before = found.get(str(source), (0, 0))
            found[str(source)] = before[0] + tests, before[1] + hits
        return found


@dataclass
class Tree:
    """Nodes in the order they were added, a parent before its children. Node 0 is the certain token."""

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    depths: list[int] = field(default_factory=lambda: [0])
    kinds: list[Kind] = field(default_factory=lambda: [()])

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, guess: Guess) -> int:
        self.tokens.append(guess.token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.kinds.append(guess.kind)
        return len(self) - 1

    def path(self, node: int) -> list[int]:
        """The nodes from the root to one."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def children(self, node: int) -> dict[int, int]:
        """By their tokens."""
        return {self.tokens[i]: i for i in range(node + 1, len(self)) if self.parents[i] == node}

    def sees(self) -> Tensor:
        """(T, T) bool: a node sees itself and those it stands behind."""
        rows = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                rows[node] |= rows[parent]
        return rows


def grow(
    root: int, guesses: Callable[[list[int]], Sequence[Guess]], record: Record, nodes: int, least: float
) -> Tree:  # fmt: skip
    """A tree below a certain token: the likeliest node goes in first, and what may follow it waits its turn.

    guesses  for what follows a path of tokens from the root on; of one token the likeliest counts
    nodes    at most, the root among them. least: chance to be reached that a node needs, by the record
    """
    tree, tie = Tree([root]), count()
    waiting: list[tuple[float, int, int, Guess]] = []

    def offer(node: int, reached: float) -> None:
        best: dict[int, tuple[float, Guess]] = {}
        for guess in guesses([tree.tokens[i] for i in tree.path(node)]):
            chance = reached * record.chance(guess)
            if chance >= least and (guess.token not in best or chance > best[guess.token][0]):
                best[guess.token] = chance, guess
        for chance, guess in best.values():
            heapq.heappush(waiting, (-chance, next(tie), node, guess))

    if nodes > 1:
        offer(0, 1.0)
    while waiting and len(tree) < nodes:
        chance, _, parent, guess = heapq.heappop(waiting)
        node = tree.add(parent, guess)
        if len(tree) < nodes:
            offer(node, -chance)
    return tree
