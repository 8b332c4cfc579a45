"""TRL's own trainer takes the rewards as they are, and makes of them what `grpo` does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fewer.rewards import FAST, Correct, Kimi, Repetition, Rounds, Sum, ThinkPrune, grpo

WORDS = ["[PAD]", "[END]", "[UNK]", "one", "two", "three", "and", "is", "4", "5"]
REWARDS = {
    "thinkprune": ThinkPrune(Rounds((6, 4)), correct="number"),
    "correct+kimi": Sum((Correct(correct="number"), Kimi(0.5, correct="number", num_generations=4))),
    "fast": FAST(correct="number", sampling=True),  # leaves groups out, so that None is met
    "repetition": Repetition(2),
}
WEIGHTS = [1.0, 0.5, 0.25, 0.1]


@pytest.fixture(scope="module")
def trl() -> Any:
    """The library; its import takes half a minute."""
    return pytest.importorskip("trl", reason="trl is not installed: pip install trl, to see the rewards in its trainer")


def trainer(trl: Any, folder: Path, chat: bool) -> Any:
    """GRPOTrainer on a random Llama of a few thousand weights and ten words, which notes what it is given and makes."""
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    class Watched(trl.GRPOTrainer):
        def _calculate_rewards(self, *args: Any) -> torch.Tensor:
            found = super()._calculate_rewards(*args)
            self.rewarded.append(found.clone())
            return found

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            self.advantages.append(output["advantages"].clone())
            return output

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[END]")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    ))  # fmt: skip
    prompts: list[Any] = ["one and two is", "two and three is"] * 4
    if chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    data = datasets.Dataset.from_dict({"prompt": prompts, "answer": ["4", "5"] * 4})
    args = trl.GRPOConfig(
        str(folder), max_steps=2, per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
        learning_rate=0.05, reward_weights=WEIGHTS, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        save_strategy="no", seed=0, logging_steps=1,
    )  # fmt: skip
    run = Watched(model, list(REWARDS.values()), args, train_dataset=data, processing_class=tokenizer)
    run.rewarded, run.advantages = [], []
    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chat", [False, True], ids=["text", "conversation"])
def test_two_steps_of_grpo(trl: Any, tmp_path: Path, chat: bool):
    """Four rewards, one of which leaves groups out: its logs name them, its advantages are ours, and weights move."""
    run = trainer(trl, tmp_path, chat)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train()
    assert run.state.global_step == len(run.rewarded) == 2
    logged = {name for line in run.state.log_history for name in line}
    assert {f"rewards/{name}/mean" for name in REWARDS} <= logged
    for rewarded, advantages in zip(run.rewarded, run.advantages, strict=True):
        assert rewarded.shape == (8, len(REWARDS))
        assert not rewarded[:, [0, 1, 3]].isnan().any()
        assert_close(advantages, grpo.advantages(grpo.total(rewarded, WEIGHTS), 4), atol=1e-5, rtol=1e-4)
    assert any(advantages.abs().max() > 0.1 for advantages in run.advantages)
    assert torch.cat(run.rewarded)[:, 2].isnan().any()
    assert any((value != before[name]).any() for name, value in run.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_the_least_certain_tokens_are_those_of_trl(trl: Any, share: float):
    """Its trainer asks its accelerator to gather; here there is one process."""
    one = SimpleNamespace(pad_across_processes=lambda x, **_: x, gather=lambda x: x)
    entropy, mask = torch.rand(6, 9), torch.arange(9) < torch.randint(1, 10, (6, 1))
    theirs = trl.GRPOTrainer.get_high_entropy_mask(SimpleNamespace(accelerator=one), entropy, mask.int(), 1 - share)
    assert torch.equal(grpo.entropy_mask(entropy, mask, share), theirs.bool() & mask)
