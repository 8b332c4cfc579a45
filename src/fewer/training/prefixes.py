"""Training texts that end early: what UPFT saves is in the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from fewer.core.settings import Settings

IGNORED = -100
PER_TOKEN = ("input_ids", "attention_mask", "labels", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class Prefixes(Settings):
    """Cuts examples off behind the first labels, for `dataset.map(Prefixes(32), with_indices=True)`.

    tokens  labels of an example that stay. whole: share of the examples that stay whole. seed: of the draw, by index.
    end     what ends a shortened example, such as the EOS token; None (the default) teaches nothing about ending

    An example has `input_ids` and `labels` of one length, -100 where nothing is taught (the prompt); entries with one
    value per token are cut too. Source: UPFT, arXiv:2503.02875.

    >>> Prefixes(2, whole=0)({"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]}, 0)
    {'input_ids': [5, 6, 7, 8], 'labels': [-100, -100, 7, 8]}
    """

    tokens: int = 32
    whole: float = 0.1
    seed: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 0 <= self.whole <= 1:
            raise ValueError(f"tokens={self.tokens}, whole={self.whole}: one token or more, and a share in [0, 1]")

    def __call__(self, example: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The example, shorter. Raises ValueError where labels and input_ids differ in length."""
        labels = list(example["labels"])
        n = len(labels)
        if len(example["input_ids"]) != n:
            raise ValueError(
                f"{len(example['input_ids'])} input_ids and {n} labels: give one for each token, -100 for none"
            )
        taught = [i for i, label in enumerate(labels) if label != IGNORED]
        if len(taught) <= self.tokens or self.keeps(index):
            return dict(example)
        stop = taught[self.tokens - 1] + 1
        cut = {k: list(v)[:stop] if k in PER_TOKEN and len(v) == n else v for k, v in example.items()}
        if self.end is not None:
            for name in ("input_ids", "labels"):
                cut[name] = [*cut[name], self.end]
            for name, value in (("attention_mask", 1), ("token_type_ids", 0), ("position_ids", stop)):
                if name in cut:
                    cut[name] = [*cut[name], value]
        return cut

    def keeps(self, index: int) -> bool:
        """Whether the example at an index stays whole: the same on every machine."""
        return Random(f"{self.seed} {index}").random() < self.whole
