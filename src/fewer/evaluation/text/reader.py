"""Who answers behind a text: a causal language model, asked how likely answers are."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fewer.compat import cached

ROWS, TOKENS = 48, 600  # answers, and their tokens with padding, that are read side by side
Ids = list[int]


@dataclass(frozen=True)
class Probe:
    """A question and its answers, the right one first."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Said:
    """What a reader made of a probe.

    right   whether the first answer is likelier per token than every other; of a single one, False
    nats    -log p of the right answer, per token
    """

    right: bool
    nats: float


@dataclass(eq=False)
class Reader:
    """A causal language model with a cache that grows by rows, and its tokenizer.

    The text is read once, then all questions behind it, then all answers behind these.
    """

    model: nn.Module
    tokenizer: Any

    def count(self, text: str) -> int:
        return len(self.ids(text))

    def ids(self, text: str) -> Ids:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def judge(self, text: str, probes: Sequence[Probe]) -> list[Said]:
        """What comes of each probe behind a text, which has one token at least."""
        prefix = self._tensor([self.ids(text)])
        if not prefix.shape[1]:
            raise ValueError("a text of no tokens: nothing would be read before the questions")
        config: Any = self.model.config
        cache = DynamicCache(config=config)
        self.model(input_ids=prefix, use_cache=True, logits_to_keep=1, **cached(self.model, cache))
        found: list[Said] = []
        for group in self._groups(probes):
            found += self._asked(copy.deepcopy(cache), prefix.shape[1], group)
        return found

    @torch.inference_mode()
    def write(self, text: str, tokens: int) -> str:
        """The greedy continuation of a text, up to so many tokens or a line's end."""
        prefix = self._tensor([self.ids(text)])
        written = self.model.generate(  # type: ignore[operator]
            input_ids=prefix, attention_mask=torch.ones_like(prefix), max_new_tokens=tokens, do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        said = self.tokenizer.decode(written[0, prefix.shape[1] :], skip_special_tokens=True)
        return str(said).strip().partition("\n")[0].strip()

    def _groups(self, probes: Sequence[Probe]) -> Iterator[Sequence[Probe]]:
        first, rows, longest = 0, 0, 0
        for at, probe in enumerate(probes):
            mine = max(self.count(answer) for answer in probe.answers)
            rows, longest = rows + len(probe.answers), max(longest, mine)
            if at > first and (rows > ROWS or rows * longest > TOKENS):
                yield probes[first:at]
                first, rows, longest = at, len(probe.answers), mine
        if probes:
            yield probes[first:]

    def _asked(self, cache: DynamicCache, there: int, probes: Sequence[Probe]) -> list[Said]:
        questions = [self.ids(probe.question) for probe in probes]
        width = max(map(len, questions))
        mask = self._tensor([[1] * there + [0] * (width - len(q)) + [1] * len(q) for q in questions])
        rows = self._tensor([[0] * (width - len(q)) + q for q in questions])
        cache.batch_repeat_interleave(len(probes))
        first = self._logits(rows, mask, cache, last=1)[:, 0].log_softmax(-1)
        asked = [i for i, probe in enumerate(probes) for _ in probe.answers]
        answers = [self.ids(answer) for probe in probes for answer in probe.answers]
        longest, index = max(map(len, answers)), torch.tensor(asked, device=mask.device)
        nats = [[-float(first[i, answer[0]])] for i, answer in zip(asked, answers, strict=True)]
        if longest > 1:
            cache.batch_select_indices(index)
            ids = self._tensor([a + [0] * (longest - len(a)) for a in answers])
            lengths = self._tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers])
            logits = self._logits(ids, torch.cat([mask[index], lengths], 1), cache, last=longest)
            for row, answer in enumerate(answers):
                p = logits[row, : len(answer) - 1].log_softmax(-1)
                nats[row] += (-p.gather(-1, ids[row, 1 : len(answer), None])[:, 0]).tolist()
        each = iter(nats)
        return [_said([next(each) for _ in probe.answers]) for probe in probes]

    def _logits(self, rows: Tensor, mask: Tensor, cache: DynamicCache, *, last: int) -> Tensor:
        """(B, last, V) float32. mask: (B, rows in the cache and of these), zeros are padding."""
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -rows.shape[1] :]
        given = self.model(
            input_ids=rows, attention_mask=mask, position_ids=places, use_cache=True, logits_to_keep=last,
            **cached(self.model, cache),
        )  # fmt: skip
        return given.logits.float()

    def _tensor(self, rows: list[Ids]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=next(self.model.parameters()).device)


def _said(nats: list[list[float]]) -> Said:
    cost = [sum(one) / len(one) for one in nats]
    return Said(len(cost) > 1 and all(cost[0] < other for other in cost[1:]), cost[0])
