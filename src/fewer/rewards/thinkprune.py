"""ThinkPrune: a right answer counts if it is there within a limit, which is lowered in rounds. arXiv:2504.01296.

    rounds = Rounds((4000, 3000, 2000), patience=3)
    reward = ThinkPrune(rounds)                       # asks the rounds for the limit, whenever it is called
    while not rounds.done:
        train_a_while(reward_funcs=[reward], max_completion_length=rounds.limit, prompt=told(rounds.limit) + ...)
        if rounds.observe(accuracy()):                # the limit fell: go on from the best checkpoint of the last round
            load(checkpoints[rounds.best])

What the trainer must do: truncated completions stay in the loss (TRL: `mask_truncated_completions=False`, its default).
They are graded as they are, mostly with 0, and that 0 is what teaches to be brief. Judge a trained model with a larger
limit than it was trained with, or its real length is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .batch import Batch, Graded, RewardError, Rewards


@dataclass
class Rounds:
    """The limits of the rounds, one after another; the next one starts when a score no longer rises.

    limits    tokens, falling. One alone is the paper's one-shot variant
    patience  the round ends with this many scores in a row that did not rise
    least     by how much a score must lie above the round's best one to count as a rise

    A value that changes: `observe` moves it; `state_dict` and `load_state_dict` carry it over a restart.
    Source    ThinkPrune, arXiv:2504.01296; the paper watches the validation score by eye, the rule is ours.
    """

    limits: tuple[int, ...] = (4000, 3000, 2000)
    patience: int = 2
    least: float = 0.0
    history: list[list[float]] = field(default_factory=lambda: [[]], init=False)
    done: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.limits = tuple(self.limits)
        whole = all(isinstance(limit, int) and limit > 0 for limit in self.limits)
        if not self.limits or not whole or sorted(set(self.limits), reverse=True) != list(self.limits):
            raise RewardError(f"limits={self.limits}: needs whole numbers of tokens above 0, each below the one before")
        if not isinstance(self.patience, int) or self.patience < 1:
            raise RewardError(f"patience={self.patience!r}: needs a whole number of scores, from 1 up")
        if not 0 <= self.least < float("inf"):
            raise RewardError(f"least={self.least} is no rise: needs a finite number from 0 up")

    @property
    def round(self) -> int:
        """The number of the round, from 0."""
        return len(self.history) - 1

    @property
    def limit(self) -> int:
        """The tokens a completion may have now."""
        return self.limits[self.round]

    @property
    def best(self) -> int | None:
        """Which score of all that were observed, counted from 0, was the best of the round before this one (of the last
        round, when done): its checkpoint is the one to go on from. None in the first round."""
        at = self.round if self.done else self.round - 1
        if at < 0:
            return None
        scores = self.history[at]
        return sum(len(earlier) for earlier in self.history[:at]) + scores.index(max(scores))

    def observe(self, score: float) -> bool:
        """Take note of a validation score, higher is better. Returns whether the round ended with it.

        Raises RewardError for NaN, which would never rise nor fall, and after the last round.
        """
        if self.done:
            raise RewardError(f"all rounds {self.limits} are over: nothing is left to be observed")
        if score != score:
            raise RewardError("score=nan tells nothing of a plateau: leave this validation out")
        scores = self.history[-1]
        scores.append(float(score))
        if self._waited(scores) < self.patience:
            return False
        if self.round + 1 < len(self.limits):
            self.history.append([])
        else:
            self.done = True
        return True

    def _waited(self, scores: Sequence[float]) -> int:
        """How many scores have come since the last rise."""
        best, waited = scores[0], 0
        for score in scores[1:]:
            rises = score > best + self.least
            best, waited = (score, 0) if rises else (best, waited + 1)
        return waited

    def state_dict(self) -> dict[str, Any]:
        """What was observed, as plain values."""
        return {"limits": list(self.limits), "history": [list(scores) for scores in self.history], "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one stood. Raises RewardError if its limits were others."""
        if tuple(state["limits"]) != self.limits:
            raise RewardError(f"saved with limits={tuple(state['limits'])}, loaded with {self.limits}: give the same")
        self.history, self.done = [list(scores) for scores in state["history"]], bool(state["done"])


@dataclass(frozen=True)
class ThinkPrune(Graded):
    """1 if the right answer is there within the limit, otherwise 0; no further term for the length.

    limit: tokens of the completion, its end token included: an answer that ends at token `limit` counts, one token
    later it does not. A number, or `Rounds`.
    decode: token ids -> text, such as `tokenizer.decode`. With it a longer completion is graded by its first `limit`
    tokens, as if it had been cut there; without, it gets 0. While training the trainer cuts, and it is not needed.
    Source   ThinkPrune, arXiv:2504.01296, sec. 3.
    """

    limit: int | Rounds = 4000
    decode: Callable[[Sequence[int]], str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.limit, Rounds) and (not isinstance(self.limit, int) or self.limit < 1):
            raise RewardError(f"limit={self.limit!r}: needs a whole number of tokens from 1 up, or Rounds")

    def judge(self, batch: Batch) -> Rewards:
        limit = self.limit.limit if isinstance(self.limit, Rounds) else self.limit
        texts, lengths = batch.texts, batch.lengths
        inside = [n <= limit or self.decode is not None for n in lengths]
        if self.decode is not None:
            assert batch.ids is not None  # lengths would have said so
            texts = [
                self.decode(ids[:limit]) if len(ids) > limit else text
                for text, ids in zip(texts, batch.ids, strict=True)
            ]
        grades = self.grades(batch, texts)
        return [None if right is None else float(right and fits) for right, fits in zip(grades, inside, strict=True)]


def told(limit: int) -> str:
    """What a system prompt says about the limit. Ours; any words that name it will do, the same in training and use."""
    return (
        f"Work the problem out and state the result, all within {limit} tokens: whatever comes later is cut off and "
        "does not count. Put the final answer in \\boxed{}."
    )
