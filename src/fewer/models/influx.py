"""A policy that prunes the examples of a prompt: an encoder that stays as it is, and two small heads that learned.

pruner = ExemplarPruner.load("runs/influx")                    # made by `fewer train influx`
compressor = fewer.Compressor("influx:tokens=256", pruner, pruner.tokenizer, counter=tokenizer)
prompt = compressor(examples, question="Text: ... Topic:").text
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewer.core.written import BEHIND
from fewer.runtime.reading import Wordless, around, window_of

__all__ = ["SETTINGS", "ExampleReader", "ExemplarPruner"]

SETTINGS, WEIGHTS = "influx.json", "influx.safetensors"
TOGETHER = 32  # examples that are encoded side by side


def head(width: int, inner: int, bias: float) -> nn.Sequential:
    """Two logits, leave and stay, of features (..., width). bias: what they start at, -bias and bias."""
    last = nn.Linear(inner, 2)
    nn.init.normal_(last.weight, std=0.02)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([-bias, bias]))
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, inner), nn.LayerNorm(inner), nn.GELU(), last
    )  # fmt: skip


class ExemplarPruner(nn.Module):
    """Says of each example, and of each of its tokens, whether it stays.

    encoder    frozen; gives `last_hidden_state`. tokenizer: its own. name: what `load_model` finds it by
    inner      width of the heads. bias: what an example's and a token's logits start at
    Source     CoT-Influx, arXiv:2312.08901: an example is the mean over its tokens
    """

    def __init__(
        self, encoder: nn.Module, tokenizer: Any, name: str, *, inner: int = 512, bias: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        super().__init__()
        config: Any = encoder.config
        self.encoder, self.tokenizer, self.name, self.inner = (
            encoder.requires_grad_(False).eval(),
            tokenizer,
            name,
            inner,
        )
        self.window = min(512, window_of(encoder))
        self.example, self.token = (head(config.hidden_size, inner, start) for start in bias)
        self.config = config

    def train(self, mode: bool = True) -> ExemplarPruner:
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def features(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """(n, width) float32 for each example of n token ids, read alone; in pieces beyond the window."""
        front, behind = around(self.tokenizer)
        room = self.window - len(front) - len(behind)
        pieces = [(i, list(row[a : a + room])) for i, row in enumerate(rows) for a in range(0, max(len(row), 1), room)]
        device = next(self.encoder.parameters()).device
        found: list[list[Tensor]] = [[] for _ in rows]
        for first in range(0, len(pieces), TOGETHER):
            some = pieces[first : first + TOGETHER]
            longest = max(len(ids) for _, ids in some) + len(front) + len(behind)
            ids = torch.zeros(len(some), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for k, (_, piece) in enumerate(some):
                line = [*front, *piece, *behind]
                ids[k, : len(line)], mask[k, : len(line)] = torch.tensor(line), 1
            hidden = self.encoder(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float()
            for k, (i, piece) in enumerate(some):
                found[i].append(hidden[k, len(front) : len(front) + len(piece)])
        return [torch.cat(parts) for parts in found]

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(M, 2) and M of (n, 2): log-probabilities of leaving and staying, of examples and of their tokens."""
        means = torch.stack([f.mean(0) for f in features])
        tokens = self.token(torch.cat(list(features))).log_softmax(-1)
        return self.example(means).log_softmax(-1), list(tokens.split([len(f) for f in features]))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        heads = {k: v.contiguous() for k, v in self.state_dict().items() if not k.startswith("encoder.")}
        save_file(heads, path / WEIGHTS)
        (path / SETTINGS).write_text(json.dumps({"encoder": self.name, "inner": self.inner}) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, encoder: tuple[nn.Module, Any] | None = None) -> ExemplarPruner:
        """What `save_pretrained` wrote. encoder: with its tokenizer, instead of loading the one it was trained on.

        Raises ModelError where there is none, or the encoder is of another width.
        """
        from fewer.models.zoo import ModelError, load_model

        path = Path(folder)
        if not (path / SETTINGS).is_file() or not (path / WEIGHTS).is_file():
            raise ModelError(f"{path} has no {SETTINGS} and {WEIGHTS}: fewer train influx --out {path} makes them")
        settings = json.loads((path / SETTINGS).read_text())
        network, tokenizer = encoder if encoder is not None else load_model(settings["encoder"])
        pruner = cls(network, tokenizer, settings["encoder"], inner=settings["inner"])
        weights = load_file(path / WEIGHTS)
        have, want = weights["example.0.weight"].shape[0], network.config.hidden_size  # type: ignore[union-attr]
        if have != want:
            raise ModelError(f"{path} was trained on features of width {have}; the encoder given has {want}")
        pruner.load_state_dict(weights, strict=False)
        return pruner.eval()


@dataclass(eq=False)
class ExampleReader(Wordless):
    """What a pruner wants of texts: a reader that methods on texts ask. ids, valid, part: (B, N), see `LanguageReader`.

    wanted      (B, N): probability of staying, of the tokens of contexts; NaN elsewhere
    relevance   (B, parts): the log-odds of an example
    """

    says: ClassVar[str] = "which examples and tokens stay"
    model: ExemplarPruner
    ids: Tensor
    valid: Tensor
    part: Tensor

    @property
    def wanted(self) -> Tensor:
        return self._judged[0]

    @property
    def relevance(self) -> Tensor:
        return self._judged[1]

    @cached_property
    @torch.no_grad()
    def _judged(self) -> tuple[Tensor, Tensor]:
        inside = self.valid & (self.part >= 0) & (self.part < BEHIND)
        parts = int(self.part.masked_fill(~inside, 0).amax()) + 1
        wanted = torch.full(self.ids.shape, float("nan"), device=self.ids.device)
        odds = torch.full((len(self.ids), parts), float("nan"), device=self.ids.device)
        places = [
            (row, part, where)
            for row in range(len(self.ids))
            for part in range(parts)
            if len(where := (inside[row] & (self.part[row] == part)).nonzero()[:, 0])
        ]
        if not places:
            return wanted, odds
        features = self.model.features([self.ids[row, where].tolist() for row, _, where in places])
        examples, tokens = self.model(features)
        for (row, part, where), example, of in zip(places, examples, tokens, strict=True):
            odds[row, part] = example[1] - example[0]
            wanted[row, where] = of[:, 1].exp()
        return wanted, odds
