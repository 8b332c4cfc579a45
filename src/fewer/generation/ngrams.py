"""What was written before, as a table of what comes next: guesses that cost no pass of any model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .tree import Guess


class NGrams:
    """Counts of the next token behind every run of 1 to `order` tokens of a text that grows.

    TokenSwift (arXiv:2502.18890) keeps whole phrases by their first token. A phrase that was written is a path through
    this table, known from its first appearance on, and a longer context speaks where there is one.
    """

    def __init__(self, order: int = 4, candidates: int = 4) -> None:
        """candidates: guesses for one place at most, the most frequent ones; of equals the first seen."""
        self.order, self.candidates = order, candidates
        self.text: list[int] = []
        self._next: dict[tuple[int, ...], Counter[int]] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on."""
        for token in tokens:
            for length in range(1, min(self.order, len(self.text)) + 1):
                self._next.setdefault(tuple(self.text[-length:]), Counter())[token] += 1
            self.text.append(token)

    def guesses(self, path: Sequence[int]) -> list[Guess]:
        """What may follow the text and a path of guessed tokens behind it, by the longest context that was seen."""
        behind = [*self.text[-self.order :], *path][-self.order :] if self.order else []
        for start in range(len(behind)):
            seen = self._next.get(tuple(behind[start:]))
            if seen is None:
                continue
            total = seen.total()
            length = len(behind) - start
            return [
                Guess(token, count / (total + 1), ("ngram", length, min(count, 4), 4 * count // total))
                for token, count in seen.most_common(self.candidates)
            ]
        return []
