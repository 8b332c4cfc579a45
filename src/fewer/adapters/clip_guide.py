"""A guide: an image-text model that tells how well patches of an image fit a question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Guide:
    """CLIP's joint space for methods that compare patches with the question (TRIM, CDPruner).

    clip        a CLIPModel whose vision tower is the one in the vision-language model, or one with the same weights
    tokenizer   its tokenizer, called on a list of questions
    length      tokens of a piece; a longer question is cut into several pieces (CLIP reads 77)

    guide = fewer.Guide(clip, tokenizer)
    with fewer.apply(vlm, "trim", guide=guide) as session:
        session.ask(["what colour is the bag ?"])
        vlm.generate(**inputs)
    """

    def __init__(self, clip: nn.Module, tokenizer: Any = None, length: int = 77) -> None:
        self.clip: Any = clip
        self.tokenizer, self.length = tokenizer, length
        self._asked: Tensor | None = None

    def ask(self, questions: Sequence[str] | Tensor) -> None:
        """One question per prompt of the next batch: texts, or their embeddings in the joint space (B, Q, J)."""
        if isinstance(questions, Tensor):
            self._asked = questions
            return
        if self.tokenizer is None:
            raise ValueError("this guide has no tokenizer: give Guide one, or ask with embeddings (B, Q, J)")
        self._asked = torch.stack([self._embedded(question) for question in questions])

    def _embedded(self, question: str) -> Tensor:
        """(1, J): the mean direction of a question's pieces."""
        ids: list[int] = self.tokenizer([question])["input_ids"][0]
        pieces = [ids[i : i + self.length] for i in range(0, len(ids), self.length)]
        device = next(self.clip.parameters()).device
        with torch.no_grad():
            made = [self._text(torch.tensor([piece], device=device)) for piece in pieces]
        return torch.stack(made).mean(0)

    def _text(self, ids: Tensor) -> Tensor:
        pooled = self.clip.text_model(input_ids=ids).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1)

    def question(self) -> Tensor:
        """(B, Q, J): the questions of the batch under way."""
        if self._asked is None:
            raise ValueError("the guide was asked nothing: call session.ask(questions), one a prompt, before the model")
        return self._asked

    def patches(self, features: Tensor) -> Tensor:
        """(R, N, C), what entered the projector, in the joint space: (R, N, J), in the dtype of `clip`."""
        features = features.to(self.clip.visual_projection.weight.dtype)
        return self.clip.visual_projection(self.clip.vision_model.post_layernorm(features))
