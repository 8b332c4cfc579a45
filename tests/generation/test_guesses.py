"""What is guessed: by whom, from what, where the tree grows. It changes no text, so it is held to its word here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from decoders import prompt
from fewer.generation import Chained, NGrams, swift
from fewer.generation import writing as module
from fewer.generation.levels import levels_of
from fewer.generation.tree import Guess, Record, Tree, grow
from guessing import exact, heads_for


@pytest.mark.parametrize("kind", ["chained", "layers"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_heads_see_the_certain_text(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind every pass, what the heads say is what they say of a plain pass over the text so far."""
    model, (ids, _) = exact(family), prompt(17)
    heads, said = heads_for(model, kind), list[tuple[int, Tensor]]()

    def watched(*args: Any) -> Any:
        context = levels_of(*args)

        class Watching:
            def __enter__(self) -> Any:
                levels = context.__enter__()
                own = levels.before
                levels.before = lambda token, position: (said.append((position, levels.states().clone())),
                                                         own(token, position))[1]  # fmt: skip
                return levels

            def __exit__(self, *error: Any) -> Any:
                return context.__exit__(*error)

        return Watching()

    monkeypatch.setattr(module, "levels_of", watched)
    written = swift(model, ids, heads=heads, max_new_tokens=24, least=0.0)
    assert any(n > 1 for n in written.accepted)
    assert len(said) == len(written.accepted)
    for position, states in said:
        with heads.reading(model) as read, torch.no_grad():
            model(written.sequences[:, :position])
            want = torch.cat([state[:, -1] for state in heads(*read.take())])
        assert_close(states, want)


def test_chained_heads_are_the_papers() -> None:
    torch.manual_seed(0)
    heads = Chained(3, 8, eps=1e-5).double()
    for p in heads.parameters():
        nn.init.normal_(p)

    def norm(x: Tensor, weight: Any) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    x = torch.randn(2, 5, 8, dtype=torch.float64)
    h, want = x, []
    for k in range(3):
        h = h + norm(h, heads.inward[k].weight) @ heads.linear[k].weight.T  # type: ignore[union-attr,operator]
        want.append(norm(h, heads.outward[k].weight))
    assert_close(heads(x), want)


def test_the_table_knows_the_longest_context_and_the_most_frequent_word() -> None:
    table = NGrams(order=2, candidates=2)
    table.extend([1, 2, 3, 1, 2, 3, 1, 2, 4, 9, 2, 5, 1, 2])
    assert [(g.token, g.kind[1]) for g in table.guesses([])] == [(3, 2), (4, 2)]  # behind 1 2
    assert [g.token for g in table.guesses([3])] == [1]  # behind 2 3
    assert [(g.token, g.kind[1]) for g in table.guesses([7, 9])] == [(2, 1)]  # 7 9 was never there: behind 9
    assert table.guesses([8]) == []
    assert table.guesses([])[0].chance == pytest.approx(2 / 4)
    assert NGrams(order=0).guesses([1]) == []
    fresh = NGrams(order=3)
    fresh.extend([5, 6])
    fresh.extend([5])
    assert [g.token for g in fresh.guesses([])] == [6]  # known from its first appearance


def test_experience_counts_more_the_more_there_is() -> None:
    record, guess = Record(), Guess(3, 0.9, ("ngram", 2))
    assert record.chance(guess) == pytest.approx(0.9)
    for _ in range(8):
        record.add(guess.kind, False)
    assert record.chance(guess) == pytest.approx(0.45)
    record.add(("head 1", 0), True)
    assert record.chance(guess) == pytest.approx(0.45)
    assert record.by_source() == {"ngram": (8, 0), "head 1": (1, 1)}


def test_the_likeliest_node_goes_in_first() -> None:
    """Chances: 7 .6, 8 .3; below 7: 1 .54, 2 .06; below 8: 1 .27; below 7 1: 4 .49."""
    after = {
        (0,): [(7, 0.6), (8, 0.3), (7, 0.2)],
        (0, 7): [(1, 0.9), (2, 0.1)],
        (0, 8): [(1, 0.9)],
        (0, 7, 1): [(4, 0.9)],
    }

    def guesses(path: list[int]) -> list[Guess]:
        return [Guess(token, p, ("x",)) for token, p in after.get(tuple(path), [])]

    tree = grow(0, guesses, Record(), nodes=6, least=0.1)
    assert (tree.tokens, tree.parents) == ([0, 7, 1, 4, 8, 1], [-1, 0, 1, 2, 0, 4])
    assert tree.depths == [0, 1, 2, 3, 1, 2]
    assert grow(0, guesses, Record(), nodes=3, least=0.1).tokens == [0, 7, 1]
    assert grow(0, guesses, Record(), nodes=9, least=0.5).tokens == [0, 7, 1]
    assert grow(0, guesses, Record(), nodes=1, least=0.0).tokens == [0]
    doubtful = Record()
    for _ in range(100):
        doubtful.add(("x",), False)
    assert grow(0, guesses, doubtful, nodes=9, least=0.1).tokens == [0]


def test_a_node_sees_its_path() -> None:
    tree = Tree([9])
    left, right = (tree.add(0, Guess(t, 1, ())) for t in (1, 2))
    below = tree.add(left, Guess(3, 1, ()))
    assert tree.sees().int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    assert tree.children(0) == {1: left, 2: right}
    assert tree.path(below) == [0, left, below]
