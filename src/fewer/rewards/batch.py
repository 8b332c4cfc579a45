"""What a reward is given: completions with their tokens, in groups that answer one prompt, and columns beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar

from torch import Tensor

from fewer.core.settings import Settings

from .answers import grader

Rewards = list[float | None]


class RewardError(ValueError):
    """A setting outside its range, or a batch that a reward cannot judge."""


@dataclass(frozen=True)
class Batch:
    """One call's completions, B of them. Everything is in their order.

    prompts      texts or lists of messages, B; None where nobody asks for groups
    completions  texts or lists of messages, B
    ids          token ids of each completion, up to and including its end token, without padding; None where not given
    columns      what the data set holds beside the prompt, B values each, and what the trainer adds (`trainer_state`)
    """

    prompts: Sequence[Any] | None
    completions: Sequence[Any]
    ids: Sequence[Sequence[int]] | None
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, given in (("prompts", self.prompts), ("completion_ids", self.ids)):
            if given is not None and len(given) != len(self):
                raise RewardError(f"{len(given)} {name} for {len(self)} completions: give one for each")
        if isinstance(self.ids, Tensor):
            raise RewardError(
                f"completion_ids is a tensor of shape {tuple(self.ids.shape)}: its padding would count as tokens; "
                "give a list of lists without padding"
            )

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def texts(self) -> list[str]:
        """The text of each completion. Of messages: what the assistant wrote, message by message, a line each."""
        return [_text(each) for each in self.completions]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion, its end token included. Raises RewardError where no token ids were given."""
        if self.ids is None:
            raise RewardError(
                "completion_ids is missing: lengths are counted in tokens. TRL gives it; elsewhere pass "
                "completion_ids=[tokenizer(text)['input_ids'] for text in completions]"
            )
        return [len(each) for each in self.ids]

    def column(self, name: str) -> list[Any]:
        """A column's B values. Raises RewardError, with the columns that are there."""
        if name not in self.columns:
            there = ", ".join(sorted(self.columns)) or "none"
            raise RewardError(f"no column {name!r}; there are: {there}. Add it to the data set, or name another one")
        values = self.columns[name]
        values = values.tolist() if isinstance(values, Tensor) else values
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(self):
            raise RewardError(f"column {name!r} is {type(values).__name__}: needs a list of {len(self)} values")
        return list(values)

    def groups(self, size: int | None) -> list[list[int]]:
        """The completions of each prompt, as indices.

        size: how many stand side by side for each prompt (TRL's `num_generations`). None: as far as neighbours have
        equal prompts, so that the same prompt twice in a row is one group. Raises RewardError for a torn group.
        """
        if size is None:
            return self._runs()
        if len(self) % size:
            raise RewardError(
                f"{len(self)} completions are no whole groups of num_generations={size}: a group was torn, e.g. over "
                "processes. Make the batch of each process a multiple of it, or leave num_generations out"
            )
        found = [list(range(i, i + size)) for i in range(0, len(self), size)]
        if self.prompts is not None:
            for group in found:
                if not all(_same(self.prompts[group[0]], self.prompts[i]) for i in group[1:]):
                    raise RewardError(
                        f"completions {group[0]} to {group[-1]} answer different prompts, and num_generations={size} "
                        "says that they are a group: give the number that is generated, or leave it out"
                    )
        return found

    def _runs(self) -> list[list[int]]:
        if self.prompts is None:
            raise RewardError("neither prompts nor num_generations is given: nothing tells which completions compete")
        number, numbers = 0, []
        for i in range(len(self)):
            number += i > 0 and not _same(self.prompts[i - 1], self.prompts[i])
            numbers.append(number)
        return [list(run) for _, run in groupby(range(len(self)), key=numbers.__getitem__)]

    @property
    def steps(self) -> tuple[int, int]:
        """Optimiser steps done, and to be done in all (0 = unknown), by the trainer's state; (0, 0) without one."""
        state = self.columns.get("trainer_state")
        return (0, 0) if state is None else (int(state.global_step), int(state.max_steps or 0))


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):
        completion = [completion]
    if not isinstance(completion, Sequence):
        raise RewardError(f"a completion is {type(completion).__name__}: needs a text or a list of messages")
    return "\n".join(_content(m.get("content")) for m in completion if m.get("role", "assistant") == "assistant")


def _content(content: Any) -> str:
    """A message's text: its content, or the texts among its parts. A call of a tool has none."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text") or "" for part in content if part.get("type", "text") == "text")


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (RuntimeError, ValueError) as error:  # tensors and arrays among the messages compare item by item
        raise RewardError("prompts cannot be compared: say num_generations, and do not pass them") from error


@dataclass(frozen=True)
class Reward(Settings):
    """Base of rewards: frozen settings, called with a batch as TRL's trainers call their `reward_funcs`.

    Called   (prompts, completions, completion_ids, **columns), all by keyword; completions are texts or lists of
             messages; columns hold B values each. Columns that a reward does not know are ignored.
    Returns  B floats; None where an answer is not judged, e.g. for want of a reference answer.
    Raises   RewardError, naming what is missing and a way out.
    """

    refusal: ClassVar[type[ValueError]] = RewardError

    @property
    def __name__(self) -> str:
        """What trainers call it in their logs."""
        return type(self).__qualname__.rpartition(".")[2].lower()

    def __call__(
        self, prompts: Sequence[Any] | None = None, completions: Sequence[Any] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any,
    ) -> Rewards:  # fmt: skip
        if completions is None:
            raise RewardError(f"{type(self).__name__} judges completions: pass completions=[...]")
        return self.judge(Batch(prompts, completions, completion_ids, columns))

    def judge(self, batch: Batch) -> Rewards:
        """The reward of each completion."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Graded(Reward):
    """Base of rewards that ask whether an answer is right.

    correct: "boxed", "number" or "exact", see `fewer.rewards.answers`, or a callable (text, answer) -> bool.
    answer: the column of the right answers; where it holds None, a completion is not judged.
    """

    correct: str | Callable[[str, Any], bool | None] = "boxed"
    answer: str = "answer"

    def __post_init__(self) -> None:
        try:
            grader(self.correct)
        except ValueError as error:
            raise RewardError(str(error)) from error

    def grades(self, batch: Batch, texts: Sequence[str] | None = None) -> list[bool | None]:
        """Whether each is right; None = not judged. texts: other texts than the completions' own."""
        check = grader(self.correct)
        found = []
        for text, answer in zip(batch.texts if texts is None else texts, batch.column(self.answer), strict=True):
            right = None if answer is None else check(text, answer)
            found.append(None if right is None else bool(right))
        return found


@dataclass(frozen=True, kw_only=True)
class Grouped(Graded):
    """Base of rewards that compare the answers to one prompt. Answers that are not judged count in no group.

    num_generations: completions of each prompt, side by side; None: neighbours with equal prompts are a group.
    """

    num_generations: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.num_generations
        if size is not None and (not isinstance(size, int) or size < 1):
            raise RewardError(f"num_generations={size!r}: needs a whole number from 1 up, or None to go by the prompts")


def within(name: str, value: float, low: float, high: float, why: str, *, open_low: bool = False) -> None:
    """Refuse a setting outside [low, high], or outside (low, high] with `open_low`. NaN is outside."""
    if not (low < value <= high if open_low else low <= value <= high):
        raise RewardError(f"{name}={value} is outside {'(' if open_low else '['}{low:g}, {high:g}]: {why}")
