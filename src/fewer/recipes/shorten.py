"""Reinforcement learning for shorter chains, with a reward of `fewer.rewards` in TRL's GRPOTrainer.

    report = train(Shortening(reward="kimi"), "out")        # needs trl, and fewer[reasoning]

The recipe is for the packaged reasoner, which a CPU trains in minutes; larger models take the rewards with TRL alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewer import rewards
from fewer.core.settings import Settings
from fewer.datasets import reasoning
from fewer.datasets.reasoning import THOUGHT, Problem, right
from fewer.evaluation.thoughts import LONGEST, Score, answers, scored
from fewer.models.zoo import load_model
from fewer.recipes.loop import Folder

__all__ = ["REWARDS", "Report", "Shortening", "train"]

REWARDS: Mapping[str, str] = {
    "correct": "right or wrong, nothing else: what reinforcement learning alone does",
    "thinkprune": "right within a limit, which falls in rounds (`limits`)",
    "fast": "right, ended, and short where the question is easy",
    "zipr1": "right, and a share for reading little: here the share of `longest` that was written",
    "lcpo": "right, and at most as long as asked (`asked` tokens for every question), L1-Max",
    "o1-pruner": "right, and shorter than the group",
    "dast": "right, and within the budget that the group's share of right answers grants",
    "kimi": "right, and the term of Kimi k1.5 within the group",
}
"""What `reward` may be."""


@dataclass(frozen=True)
class Shortening(Settings):
    """Everything a run depends on.

    reward    one of `REWARDS`. model: a reasoner, as in `load_model`
    steps     updates, of `prompts` questions with `group` answers each, sampled at temperature 1. lr: constant, AdamW
    longest   tokens that may be written
    limits    ThinkPrune: of the rounds, tokens with the answer; check: steps between validations, of `validation`
              problems; patience: validations without a rise that end a round
    asked     LCPO: tokens. alpha: what one counts there. weight: of the length term of ZipR1 and Kimi
    test      packaged problems answered before and after, greedily
    """

    reward: str = "thinkprune"
    model: str = "reasoner"
    steps: int = 60
    prompts: int = 4
    group: int = 8
    lr: float = 3e-4
    longest: int = LONGEST
    limits: tuple[int, ...] = (96, 72, 56)
    check: int = 10
    patience: int = 1
    validation: int = 100
    asked: int = 48
    alpha: float = 0.01
    weight: float = 0.5
    test: int = 300
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.reward not in REWARDS:
            raise ValueError(f"Shortening(reward={self.reward!r}): choose {', '.join(REWARDS)}")
        for name, least in (("steps", 1), ("prompts", 1), ("group", 2), ("check", 1), ("test", 1), ("longest", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"Shortening({name}={getattr(self, name)}): must be at least {least}")


@dataclass(frozen=True)
class Report:
    """What a run came to: accuracy and mean tokens of the chains on the test problems, before and after.

    limits: ThinkPrune's, step by step. seconds: training alone, validation included.
    score: after, problem by problem; not in report.json
    """

    before: dict[str, float]
    after: dict[str, float]
    limits: tuple[int, ...]
    seconds: float
    score: Score | None = field(default=None, repr=False)


def train(
    recipe: Shortening, out: str | Path, *, model: tuple[nn.Module, Any] | None = None,
    data: Sequence[Problem] | None = None, log: Callable[[str], None] = print,
) -> Report:  # fmt: skip
    """Train with TRL and save the model where `load_model(out)` reads it.

    model: instead of loading the one named. data: instead of drawing the problems.
    Raises ImportError where TRL is missing.
    """
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise ImportError("reinforcement learning needs TRL: pip install trl") from error
    folder = Folder(out, recipe, log)
    net, tokenizer = load_model(recipe.model) if model is None else model
    need = recipe.steps * recipe.prompts
    drawn = list(reasoning.problems(need + recipe.validation, seed=100 + recipe.seed)) if data is None else list(data)
    held, taught = drawn[: recipe.validation], drawn[recipe.validation :]
    test = reasoning.load()[: recipe.test]
    before = scored(answers(net.bfloat16(), tokenizer, [p.prompt for p in test]), test)
    net.float()
    log(f"before: {before.accuracy:.1%} right, {before.tokens:.1f} tokens")
    rounds = rewards.Rounds(recipe.limits, patience=recipe.patience) if recipe.reward == "thinkprune" else None
    args = GRPOConfig(
        str(folder.path / "trl"), max_steps=recipe.steps, per_device_train_batch_size=recipe.prompts * recipe.group,
        num_generations=recipe.group, max_completion_length=recipe.longest if rounds is None else rounds.limit,
        learning_rate=recipe.lr, lr_scheduler_type="constant", temperature=1.0, beta=0.0, report_to=[], use_cpu=True,
        bf16=False, disable_tqdm=True, save_strategy="no", logging_steps=5, seed=recipe.seed, shuffle_dataset=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    rows = {
        "prompt": [p.prompt for p in taught],
        "answer": [p.answer for p in taught],
        "num_tokens": [recipe.asked] * len(taught),
    }
    trainer = GRPOTrainer(net, rewarding(recipe, rounds), args, Dataset.from_dict(rows), processing_class=tokenizer)
    watch = _watch(recipe, rounds, trainer, held, log)
    trainer.add_callback(watch)
    result = trainer.train()
    if rounds is not None and watch.best is not None:
        net.load_state_dict(watch.best[1])
    net.eval().bfloat16()
    after = scored(answers(net, tokenizer, [p.prompt for p in test]), test)
    log(f"after: {after.accuracy:.1%} right, {after.tokens:.1f} tokens")
    net.save_pretrained(folder.path)  # type: ignore[operator]
    tokenizer.save_pretrained(folder.path)
    report = Report(
        {"accuracy": before.accuracy, "tokens": before.tokens}, {"accuracy": after.accuracy, "tokens": after.tokens},
        tuple(watch.limits), result.metrics["train_runtime"], after,
    )  # fmt: skip
    folder.finish(replace(report, score=None))
    return report


def rewarding(recipe: Shortening, rounds: rewards.Rounds | None) -> list[Callable[..., Any]]:
    """The rewards of a recipe, which TRL adds up."""
    group = recipe.group
    if recipe.reward == "thinkprune":
        assert rounds is not None
        return [rewards.ThinkPrune(rounds, correct=right)]
    if recipe.reward == "fast":
        return [rewards.FAST(correct=right, form=_ended, num_generations=group)]
    if recipe.reward == "zipr1":
        return [_Written(rewards.ZipR1(recipe.weight, correct=right), recipe.longest)]
    if recipe.reward == "lcpo":
        return [rewards.LCPO("max", alpha=recipe.alpha, correct=right)]
    if recipe.reward == "o1-pruner":
        return [rewards.O1Pruner(correct=right, num_generations=group)]
    if recipe.reward == "dast":
        return [rewards.DAST(longest=recipe.longest, correct=right, num_generations=group)]
    if recipe.reward == "kimi":
        kimi = rewards.Kimi(recipe.weight, correct=right, num_generations=group)
        return [rewards.Correct(correct=right), kimi]
    return [rewards.Correct(correct=right)]


def _ended(text: str) -> bool:
    """The form that FAST asks for, in this model's words: a chain that ends."""
    return THOUGHT in text


@dataclass(frozen=True)
class _Written:
    """ZipR1's reward where what is read is what was written: a share of the longest there may be."""

    reward: rewards.ZipR1
    longest: int

    @property
    def __name__(self) -> str:
        return "zipr1"

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> Any:
        shares = [min(len(ids) / self.longest, 1.0) for ids in completion_ids]
        return self.reward(completion_ids=completion_ids, token_ratio=shares, **columns)


def _watch(
    recipe: Shortening, rounds: rewards.Rounds | None, trainer: Any, held: Sequence[Problem], log: Callable[[str], None]
) -> Any:
    """A callback that moves ThinkPrune's rounds on, and says how a run goes."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        best: tuple[float, dict[str, Any]] | None = None
        limits: list[int] = []  # noqa: RUF012

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logs = logs or {}
            if "reward" in logs:
                length = logs.get("completions/mean_length", float("nan"))
                log(f"step {state.global_step}  reward {logs['reward']:.3f}  tokens {length:.1f}")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if rounds is None:
                return
            self.limits.append(rounds.limit)
            if state.global_step % recipe.check == 0 and not rounds.done:
                self.validate(control)

        def validate(self, control: Any) -> None:
            assert rounds is not None
            model = trainer.model
            model.eval()
            prompts = [p.prompt for p in held]
            wrote = answers(model, trainer.processing_class, prompts, longest=rounds.limit, sample=True)
            model.train()
            score = scored(wrote, held).accuracy
            log(f"limit {rounds.limit}: {score:.1%} of {len(held)} held-out answers are right within it")
            if self.best is None or score > self.best[0]:
                self.best = score, {k: v.detach().clone() for k, v in model.state_dict().items()}
            if not rounds.observe(score):
                return
            with torch.no_grad():
                model.load_state_dict(self.best[1])
            if rounds.done:
                control.should_training_stop = True
            else:
                self.best = None
                trainer.generation_config.max_new_tokens = rounds.limit
                log(f"the limit falls to {rounds.limit}")

    watch = Watch()
    watch.limits = []
    return watch
