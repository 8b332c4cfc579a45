"""Rewards for reasoning in fewer tokens, for TRL's trainers or any other loop, and the arithmetic of GRPO.

A reward is a frozen value that is called as TRL calls its `reward_funcs`:

>>> reward = ThinkPrune(limit=4, correct="number")
>>> ids = [[5, 6, 7, 2], [5, 6, 7, 8, 2]]
>>> reward(completions=["That is 12.", "So 12, or is it?"], completion_ids=ids, answer=[12, 12])
[1.0, 0.0]

Lengths are tokens of the completion, its end token included. The methods' other parts (schedules, prompts, weights,
losses) are in their modules: `thinkprune`, `fast`, `zipr1`, `lcpo`, `o1_pruner`, `dast`, `kimi`; what is added to any
of them is in `shaping`, checks of answers in `answers`, advantages and losses in `grpo`. Imports torch and the algebra,
no trainer.
"""

from . import answers, dast, fast, grpo, lcpo, o1_pruner, thinkprune, zipr1
from .batch import Batch, Graded, Grouped, Reward, RewardError
from .dast import DAST
from .fast import FAST
from .kimi import Kimi
from .lcpo import LCPO
from .o1_pruner import O1Pruner
from .shaping import Correct, Cosine, Overlong, Repetition, Sum
from .thinkprune import Rounds, ThinkPrune
from .zipr1 import ZipR1

__all__ = [
    "DAST", "FAST", "LCPO", "Batch", "Correct", "Cosine", "Graded", "Grouped", "Kimi", "O1Pruner", "Overlong",
    "Repetition", "Reward", "RewardError", "Rounds", "Sum", "ThinkPrune", "ZipR1", "answers", "dast", "fast", "grpo",
    "lcpo", "o1_pruner", "thinkprune", "zipr1",
]  # fmt: skip
