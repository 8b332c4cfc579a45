"""A text encoder on labelled texts: the same measurements as for pictures, on batches of tokens.

    rows = bench.run(settings, out, subject=encoders.load(settings))

Texts are sorted by length, so that a batch holds little padding, with or without a method. A model with a head for the
data's classes is scored by its answers, any other by the nearest neighbours of the mean of its last tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewer.core import Site
from fewer.datasets import texts
from fewer.datasets.texts import Encoded
from fewer.models import zoo
from fewer.registry import lookup, names

from .bench import EncoderSettings as Settings
from .subject import Subject, SubjectError

__all__ = ["LENGTH", "Settings", "TextSubject", "load"]

LENGTH = 256
"""Tokens of a text at most, [CLS] and [SEP] included, where the tokenizer does not say less."""
METHODS = {
    "random": ",layers=none", "ends": "", "cls_topk": ",layers=none", "length_adaptive": "", "pyramid_bert": "",
    "tome": "",
}  # fmt: skip
"""Names of methods that need no training, and what they are told besides their budget."""
SHARES = (0.5, 0.3)
"""Of the tokens, averaged over blocks."""


def load(settings: Settings, loaded: tuple[nn.Module, Any] | None = None) -> TextSubject:
    """The model and the texts of some settings; `data` "embedded" = the packaged passages.

    loaded: a model and its tokenizer, instead of loading what settings name.
    Raises   ModelError, TextError, SubjectError.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    dtype, device = settings.torch_dtype, torch.device(settings.device)
    model: Any
    model, tokenizer = zoo.load_model(settings.model) if loaded is None else loaded
    data = texts.load(settings.data)
    if 0 < settings.limit < len(data):
        data = data.sample(settings.limit, seed=settings.seed)
    name = Path(settings.model).name if Path(settings.model).is_dir() else settings.model
    length = min(LENGTH, tokenizer.model_max_length, model.config.max_position_embeddings)
    return TextSubject(
        model.to(device=device, dtype=dtype), tokenizer, Encoded.of(data, tokenizer, length=length).by_length(),
        name, settings.batch, device=device, dtype=dtype,
    )  # fmt: skip


@dataclass(eq=False)
class TextSubject(Subject):
    """An encoder on texts. data: `Encoded`, longest first; processor: the tokenizer they went through."""

    model: Any
    data: Encoded  # type: ignore[assignment]
    unit = "texts"
    call = "model(input_ids, attention_mask)"

    def __post_init__(self) -> None:
        if self.layer is not None:
            raise SubjectError(f"layer={self.layer}: only the last block of a text encoder is read")
        super().__post_init__()

    @property
    def classes(self) -> int:
        return int(self.model.config.num_labels) if "ForSequenceClassification" in type(self.model).__name__ else 0

    @property
    def grid(self) -> tuple[int, int]:
        """One row of the tokens a batch in the middle has, the class token left out: what `calibrate` counts on."""
        return 1, self.length(self.batches // 2) - self.host.prefix

    def default_methods(self, *, all: bool = True) -> list[str]:
        """`METHODS`, each keeping in every block the share that makes `SHARES` of the whole, all: not the first share
        alone; and LTP as it comes."""
        blocks = len(self.host.blocks)
        forms = [
            f"{name}:keep={every_block(share, blocks, lookup(name).site)}{rest}"
            for share in (SHARES if all else SHARES[:1]) for name, rest in METHODS.items() if name in names()
        ]  # fmt: skip
        return [*forms, "ltp:learned=false"]

    def length(self, index: int) -> int:
        """Tokens of batch `index`, its padding included."""
        return max(len(row) for row in self.data.rows[index * self.batch : (index + 1) * self.batch])

    @cached_property
    def _inputs(self) -> list[dict[str, Tensor]]:
        batches = [
            self.data.batch(range(i, min(i + self.batch, len(self.data)))) for i in range(0, len(self.data), self.batch)
        ]
        return [{k: v.to(self.device) for k, v in b.items() if k != "labels"} for b in batches]

    def pixels(self, index: int) -> Any:
        """Batch `index`: input_ids and attention_mask, (B, N) each."""
        return self._inputs[index]

    def answer(self, model: nn.Module, pixels: Any) -> Tensor:
        """Class scores (B, classes), or the mean of the real tokens (B, C)."""
        if self.classifies:
            return self.forward(model, pixels).logits
        real = pixels["attention_mask"][..., None]
        rows = self.forward(model, pixels).last_hidden_state
        return (rows * real).sum(1) / real.sum(1)

    def forward(self, model: nn.Module, pixels: Any) -> Any:
        root = model if self.classifies else (self.host if model is self.model else self.twin_host).root
        return root(**pixels)


def every_block(share: float, blocks: int, site: Any) -> float:
    """The share p that each block keeps of what reached it, for a mean of `share` over attentions and MLPs; 4 decimals.

    Block l (from 0) has p^l of the tokens in front of the site where the method acts, and p^(l + 1) behind it.

    >>> every_block(0.75, 1, Site.MID_BLOCK)  # attention sees all, the MLP half
    0.5
    """
    before = {Site.BEFORE_BLOCK: 0, Site.MID_BLOCK: 1}.get(site, 2)  # halves of a block that run first
    low, high = 0.0, 1.0
    for _ in range(40):
        p = (low + high) / 2
        mean = sum(before * p**i + (2 - before) * p ** (i + 1) for i in range(blocks)) / (2 * blocks)
        low, high = (low, p) if mean > share else (p, high)
    return round(low, 4)
