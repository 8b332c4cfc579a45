"""Gist tokens: an instruction is read once, and what follows sees only the few tokens behind it. arXiv:2304.08467.

token = gist.add_token(model, tokenizer)
gisted = Gist(token, count=4)
examples = [gisted.example(instruction, question, answer) for ...]
Trainer(model, args, data_collator=Collator(token, pad=0), train_dataset=examples).train()

summary = gisted.summary(model, **gisted.after(instructions, mask))
model.generate(**summary.inputs(questions, mask))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewer.compat import cache_of, pretrained
from fewer.core.settings import Settings

from .summary import Summary, SummaryError, goes_on, rows_of

Control = Literal["gist", "positive", "negative"]
IGNORED = -100


def before_first(ids: Tensor, token: int) -> Tensor:
    """(B, T) bool: which ids stand before the first gist token; none in rows without one. ids: (B, T) long."""
    here = ids == token
    return (here.cumsum(1) == 0) & here.any(1, keepdim=True)


def after_last(ids: Tensor, token: int) -> Tensor:
    """(B, T) bool: which ids stand behind the last gist token; none in rows without one. ids: (B, T) long."""
    return before_first(ids.flip(1), token).flip(1)


def attention(ids: Tensor, token: int, valid: Tensor | None = None, *, control: Control = "gist") -> Tensor:
    """What may see what, without the causal mask: (B, 1, T, T) bool, rows are queries.

    ids       (B, T) long, padded on either side. valid: (B, T), 0 at padding, whose columns nobody sees
    control   "gist": behind the last gist token, queries see from the first one on (mask A); up to it, they see
              nothing behind it (mask B). "positive": everything. "negative": A hides the gist tokens, too

    Rows without gist tokens see everything; queries at padding are left as they are.
    Source   arXiv:2304.08467, sec. 3, and its code.
    """
    if control not in ("gist", "positive", "negative"):
        raise SummaryError(f"control={control!r} is none of 'gist', 'positive', 'negative'")
    after = after_last(ids, token)
    hidden = before_first(ids, token) if control == "gist" else ~after & after.any(1, keepdim=True)
    sees = torch.ones(*ids.shape, ids.shape[1], dtype=torch.bool, device=ids.device)
    if control != "positive":
        sees = torch.where(after[:, :, None], ~hidden[:, None], ~after[:, None])
    if valid is not None:
        sees = sees & valid.bool()[:, None]
    return sees[:, None]


def cross_attention(ids: Tensor, token: int, valid: Tensor | None = None) -> Tensor:
    """What a decoder may see of its encoder: (B, 1, 1, T) bool, the first gist token and what follows."""
    sees = ~before_first(ids, token)
    return (sees if valid is None else sees & valid.bool())[:, None, None]


def decoder_mask(
    ids: Tensor, token: int, valid: Tensor | None = None, *, control: Control = "gist",
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """`attention` and the causal mask, to be added to the logits: (B, 1, T, T) of 0 and the least number of a dtype.

    Every query sees itself, padding too, so that no row is empty.
    """
    t = ids.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool, device=ids.device).tril()
    sees = attention(ids, token, valid, control=control) & causal
    sees = sees | torch.eye(t, dtype=torch.bool, device=ids.device)
    return torch.zeros(sees.shape, dtype=dtype, device=ids.device).masked_fill(~sees, torch.finfo(dtype).min)


def positions(valid: Tensor) -> Tensor:
    """(B, T) long: 0 at the first real token; padding has some position, too. valid: (B, T), 0 at padding."""
    return (valid.long().cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def add_token(model: nn.Module, tokenizer: Any = None, *, text: str = "<GIST>") -> int:
    """Give a model one more token, whose embeddings, in and out, are the mean of all others. Returns its id.

    tokenizer   gets the token, too, as a special one; without it the id is the first one that the model has not.
    """
    model_: Any = pretrained(model)
    old = model_.get_input_embeddings().weight.shape[0]
    if tokenizer is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": [text]}, replace_extra_special_tokens=False)
        token = int(tokenizer.convert_tokens_to_ids(text))
    else:
        token = old
    if token >= old:
        model_.resize_token_embeddings(token + 1, mean_resizing=False)
    others = torch.arange(old)
    others = others[others != token]
    tables = {id(part.weight): part for part in (model_.get_input_embeddings(), model_.get_output_embeddings()) if part}
    for part in tables.values():
        for x in (part.weight, getattr(part, "bias", None)):
            if x is not None:
                x[token] = x[others.to(x.device)].float().mean(0).to(x.dtype)
    return token


@dataclass(frozen=True)
class Gist(Settings):
    """token: the id of the gist token. count: how many stand behind an instruction; the paper has 1, 2, 5 and 10."""

    token: int
    count: int = 1

    def __post_init__(self) -> None:
        if self.token < 0 or self.count < 1:
            raise SummaryError(f"Gist(token={self.token}, count={self.count}): an id, and one token or more")

    def example(self, instruction: Sequence[int], given: Sequence[int], answer: Sequence[int]) -> dict[str, list[int]]:
        """One for training, without padding: `input_ids`, and `labels` at the answer alone.

        >>> Gist(99, count=2).example([5, 6], [7], [8, 1])
        {'input_ids': [5, 6, 99, 99, 7, 8, 1], 'labels': [-100, -100, -100, -100, -100, 8, 1]}
        """
        before = [*instruction, *[self.token] * self.count, *given]
        return {"input_ids": [*before, *answer], "labels": [IGNORED] * len(before) + list(answer)}

    def after(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Instructions (B, P) with the gist tokens behind them, and their mask, both (B, P + count); padding on either
        side stays where it is."""
        mask = torch.ones_like(ids) if mask is None else mask.long()
        more = ids.new_full((len(ids), self.count), self.token)
        return {"ids": torch.cat([ids, more], 1), "mask": torch.cat([mask, torch.ones_like(more)], 1)}

    @torch.no_grad()
    def summary(self, model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Summary:
        """Read instructions with their gist tokens once and keep the keys and values of these.

        ids, mask   (B, T): as `after` makes them; what stands behind the last gist token is not read

        The next token stands right behind the last gist token, where it stood in training: nothing is renumbered.
        Raises   SummaryError where a row has not `count` gist tokens side by side, or where the model has layers in
                 which cached rows cannot keep positions of their own.
        """
        goes_on(model)
        mask = torch.ones_like(ids) if mask is None else mask.long()
        here = (ids == self.token) & mask.bool()
        at = positions(mask)
        counts = here.sum(1).tolist()
        if counts != [self.count] * len(ids):
            raise SummaryError(f"gist tokens (id {self.token}) in each row: {counts}; needs {self.count}, see `after`")
        index = here.nonzero()[:, 1].view(len(ids), self.count)
        own = at.gather(1, index)
        if bool((own != own[:, :1] + torch.arange(self.count, device=ids.device)).any()):
            raise SummaryError("the gist tokens of a row do not stand side by side")
        output = pretrained(model).base_model(ids, attention_mask=mask, position_ids=at, use_cache=True)

        def kept(x: Tensor) -> Tensor:
            return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        rows = tuple((kept(k), kept(v)) for k, v in rows_of(cache_of(output)))
        return Summary(model, torch.ones_like(index, dtype=torch.bool), own[:, -1] + 1, rows=rows)


@dataclass(frozen=True)
class Collator:
    """Examples of different lengths as a batch with the gist mask, for Trainer or any loop: `model(**batch)`.

    token     the gist token's id. pad: the id that padding gets. side: where it goes
    control   see `attention`: the two controls train and measure what the mask changes
    dtype     of the mask: that of the model's activations

    The batch has `input_ids`, `labels` (without -100 at padding only where an example gives none: then every token but
    padding is taught), `position_ids`, and `attention_mask` (B, 1, T, T). Any decoder of transformers takes it that
    takes a mask of four dimensions, with eager or SDPA attention.
    """

    token: int
    pad: int
    side: Literal["left", "right"] = "right"
    control: Control = "gist"
    dtype: torch.dtype = torch.float32

    def __call__(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        ids = [list(e["input_ids"]) for e in examples]
        labels = [list(e.get("labels", e["input_ids"])) for e in examples]
        for i, (a, b) in enumerate(zip(ids, labels, strict=True)):
            if len(a) != len(b):
                raise SummaryError(f"example {i} has {len(a)} input_ids and {len(b)} labels: give one for each token")
        valid = self._padded([[1] * len(row) for row in ids], 0)
        tokens = self._padded(ids, self.pad)
        return {
            "input_ids": tokens, "labels": self._padded(labels, IGNORED), "position_ids": positions(valid),
            "attention_mask": decoder_mask(tokens, self.token, valid, control=self.control, dtype=self.dtype),
        }  # fmt: skip

    def _padded(self, rows: list[list[int]], fill: int) -> Tensor:
        most = max(map(len, rows))
        left = self.side == "left"
        return torch.tensor([
            [fill] * (most - len(row)) * left + row + [fill] * (most - len(row)) * (not left) for row in rows
        ])  # fmt: skip
