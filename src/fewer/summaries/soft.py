"""Soft prompts that stand for a hard one, and steering by two contexts. Wingate et al., EMNLP Findings 2022.

summary = soft.distill(model, prompt_ids, texts, count=4)
steer = Contrastive(rude, kind, weight=-2.0)               # summaries of two prompts
model.generate(ids, logits_processor=LogitsProcessorList([steer]), do_sample=True)
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LogitsProcessor

from fewer.compat import cache_of, cached, pretrained

from .summary import Summary, SummaryError, stacked


@torch.enable_grad()
def distill(
    model: nn.Module, prompt: Tensor, texts: Tensor, mask: Tensor | None = None, *, count: int = 4, steps: int = 1000,
    lr: float = 0.1, batch: int = 8, start: Literal["prompt", "vocabulary"] | Tensor = "prompt",
    generator: torch.Generator | None = None,
) -> Summary:  # fmt: skip
    """Learn `count` embeddings behind which a model expects what it expects behind a hard prompt.

    prompt      (P,) long. texts, mask: (N, T), 0 at padding: ordinary texts without the prompt
    start       the prompt's first embeddings (and, beyond P, random rows of the vocabulary), random rows alone, or
                (count, C) embeddings of your own
    lr          of Adam; the loss falls from noise, so rates decay to 0 along half a cosine

    The model stays as it is, to the bit. The embeddings are float32 whatever it multiplies in.
    Returns  one summary, of (1, count, C); text goes on at position `count`.
    Source   Wingate et al. 2022, sec. 3: the mean over tokens of KL(behind the prompt || behind the embeddings).
    """
    if prompt.dim() != 1 or not len(prompt) or texts.dim() != 2 or not texts.numel() or count < 1 or steps < 0:
        raise SummaryError(
            f"prompt {tuple(prompt.shape)}, texts {tuple(texts.shape)}, count={count}, steps={steps}: needs a prompt "
            "of (P,) ids, texts of (N, T) ids, and at least one embedding"
        )
    theta = _start(model, prompt, count, start, generator).requires_grad_()
    hard = Summary.of_prompt(model, prompt[None])
    mask = torch.ones_like(texts) if mask is None else mask.long()
    valid = torch.ones(1, count, dtype=torch.bool, device=theta.device)
    learner = torch.optim.Adam([theta], lr=lr)
    rates = torch.optim.lr_scheduler.LambdaLR(learner, lambda i: 0.5 * (1 + math.cos(math.pi * i / max(steps, 1))))
    for _ in range(steps):
        rows = torch.randint(len(texts), (min(batch, len(texts)),), generator=generator).to(texts.device)
        found = divergence(hard, Summary(model, valid, valid.sum(1), theta[None]), texts[rows], mask[rows])
        (theta.grad,) = torch.autograd.grad(found, theta)  # of the embeddings alone: the model's own stay untouched
        learner.step()
        rates.step()
    return Summary(model, valid, valid.sum(1), theta.detach()[None])


def divergence(teacher: Summary, student: Summary, texts: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the tokens of texts of KL(teacher || student) of what is expected there; one number, float32.

    texts, mask: (N, T), 0 at padding on the right. The first token is foretold by the summaries alone, where they have
    a last row; gradients go to the student's embeddings alone.
    """
    mask = torch.ones_like(texts) if mask is None else mask.long()
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise SummaryError("texts are padded on the left, so that nothing stands right behind the summary: pad right")
    with torch.no_grad():
        told = _expected(teacher, texts, mask)
    kl = F.kl_div(_expected(student, texts, mask), told, reduction="none", log_target=True).sum(-1)
    return (kl * mask).sum() / mask.sum().clamp(min=1)


def _expected(summary: Summary, texts: Tensor, mask: Tensor) -> Tensor:
    """(N, T, V): log-probabilities of each token, the first one's by the last row of the summary."""
    if summary.embeddings is None:
        raise SummaryError("keys and values foretell no first token: give a summary that holds embeddings")
    logits = summary.model(**summary.given(texts, mask)).logits[:, -texts.shape[1] - 1 : -1]
    return F.log_softmax(logits.float(), -1)


def _start(
    model: nn.Module, prompt: Tensor, count: int, start: str | Tensor, generator: torch.Generator | None
) -> Tensor:
    """(count, C) float32."""
    table = pretrained(model).get_input_embeddings()
    if isinstance(start, Tensor):
        if start.shape != (count, table.weight.shape[1]):  # type: ignore[index]
            raise SummaryError(f"start is {tuple(start.shape)}; needs {(count, table.weight.shape[1])}")  # type: ignore[index]
        return start.detach().float().clone()
    if start not in ("prompt", "vocabulary"):
        raise SummaryError(f"start={start!r} is neither 'prompt', 'vocabulary' nor embeddings")
    first = prompt[:count] if start == "prompt" else prompt[:0]
    rows = len(table.weight)  # type: ignore[arg-type]
    more = torch.randint(rows, (count - len(first),), generator=generator).to(prompt.device)
    return table(torch.cat([first, more])).detach().float()


class Contrastive(LogitsProcessor):
    """Steers `generate` towards one context and away from another: log p(x) + w (log p(x | c+) - log p(x | c-)).

    toward, away  summaries of one text each, or of as many as are written; hard prompts: `Summary.of_prompt`
    weight        w, of order 1 to 10; 0 changes nothing, below 0 turns it round
    least         tokens that are less likely than this without a context are not steered: both logs are far down
                  there, and their difference is noise
    mask          (B, T) of the prompt that is given to `generate`, 0 at padding, which the contexts shall not see

    Both contexts are read in one batch, and each step reads the new tokens alone; where rows are not those of the step
    before (beams), all is read again. The same value serves one `generate` after the other.
    Source   Wingate et al. 2022, sec. 5.
    """

    def __init__(
        self, toward: Summary, away: Summary, weight: float = 1.0, *, least: float = 1e-6, mask: Tensor | None = None
    ) -> None:
        if not math.isfinite(weight) or not 0 <= least < 1:
            raise SummaryError(f"weight={weight}, least={least}: needs a finite weight, and a probability below 1")
        self.toward, self.away, self.weight, self.least, self.mask = toward, away, weight, least, mask
        self._read: Tensor | None = None  # ids that the contexts have seen so far, and what is left of reading them:
        self._cache: Any = None
        self._seen = self._next = torch.empty(0, dtype=torch.long)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V): steered log-probabilities of the next token."""
        if self.weight == 0:
            return scores
        plus, minus = F.log_softmax(self._logits(input_ids).float(), -1).chunk(2)
        plain = F.log_softmax(scores.float(), -1)
        steered = torch.where(plain > math.log(max(self.least, 1e-38)), plain + self.weight * (plus - minus), plain)
        return F.log_softmax(steered, -1).to(scores.dtype)

    def _logits(self, ids: Tensor) -> Tensor:
        """(2 B, V) of the next token, behind both contexts."""
        seen, known = ids, self._read
        model = self.toward.model
        if known is not None and len(known) == len(ids) and ids.shape[1] > known.shape[1] and torch.equal(
            ids[:, : known.shape[1]], known
        ):  # fmt: skip
            new = ids[:, known.shape[1] :].repeat(2, 1)
            more = self._seen.new_ones(new.shape)
            at = self._next[:, None] + torch.arange(new.shape[1], device=ids.device)
            self._seen = torch.cat([self._seen, more], 1)
            output = model(
                new, attention_mask=self._seen, position_ids=at, use_cache=True, **cached(model, self._cache)
            )
        else:
            both = stacked([self._for(self.toward, len(ids)), self._for(self.away, len(ids))])
            given = both.given(ids.repeat(2, 1), self._mask(ids).repeat(2, 1))
            output = model(**given, use_cache=True)
            self._seen, at = given["attention_mask"], given["position_ids"]
        self._next, self._cache, self._read = at[:, -1] + 1, cache_of(output), seen
        return output.logits[:, -1]

    @staticmethod
    def _for(one: Summary, rows: int) -> Summary:
        return one.take([0] * rows) if len(one) == 1 else one

    def _mask(self, ids: Tensor) -> Tensor:
        if self.mask is None:
            return torch.ones_like(ids)
        mask = self.mask.repeat_interleave(len(ids) // len(self.mask), 0)
        return F.pad(mask.long(), (0, ids.shape[1] - mask.shape[1]), value=1)
