"""The contextual penalty: tokens of the last stretch of text are less likely to come again."""

from __future__ import annotations

from torch import Tensor
from transformers import LogitsProcessor


class ContextualPenalty(LogitsProcessor):
    """A repetition penalty that forgets: it sees the last `window` tokens only.

    Logits of tokens in them are divided by `penalty` where positive and multiplied where negative. For any
    `generate(logits_processor=[...])`. Source: TokenSwift, arXiv:2502.18890, sec. 3.4.

    >>> import torch
    >>> ContextualPenalty(2.0, window=2)(torch.tensor([[0, 1, 2]]), torch.tensor([[4.0, 4.0, -4.0, 4.0]]))
    tensor([[ 4.,  2., -8.,  4.]])
    """

    def __init__(self, penalty: float = 1.2, window: int = 1024) -> None:
        if penalty <= 0 or window < 1:
            raise ValueError(f"ContextualPenalty({penalty}, window={window}): above 0, and one token or more")
        self.penalty, self.window = penalty, window

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (B, N); scores: (B, V)."""
        recent = input_ids[:, -self.window :]
        found = scores.gather(1, recent)
        lower = found.where(found < 0, found / self.penalty).where(found >= 0, found * self.penalty)
        return scores.scatter(1, recent, lower)
