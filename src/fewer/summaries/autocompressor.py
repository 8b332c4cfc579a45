"""AutoCompressors: each segment of a long text leaves summary vectors, which later segments read. arXiv:2305.14788.

compressor = AutoCompressor(model, count=50)
Trainer(compressor, args, train_dataset=long_texts).train()      # its forward gives the loss
summary = compressor.summary(ids, mask)
model.generate(**summary.inputs(question, mask))
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.compat import pretrained

from .placing import Placing
from .summary import Summary, SummaryError

FILE = "autocompressor.safetensors"
SETTINGS = ("segments", "longest", "accumulate", "window")
IGNORED = -100


def draw_lengths(
    total: int, count: int, *, longest: int, shortest: int = 1, generator: torch.Generator | None = None
) -> list[int]:
    """Lengths of `count` segments of `total` tokens, each within bounds: drawn one after the other, then shuffled.

    Raises   SummaryError where no such lengths exist.
    """
    if not (count >= 1 and 1 <= shortest <= longest and shortest * count <= total <= longest * count):
        raise SummaryError(
            f"{total} tokens do not part into {count} segments of {shortest} to {longest}: "
            f"{math.ceil(total / max(longest, 1))} segments or more, and no more than {total // max(shortest, 1)}"
        )
    lengths, left = [], total
    for behind in range(count - 1, -1, -1):
        low, high = max(shortest, left - behind * longest), min(longest, left - behind * shortest)
        lengths.append(int(torch.randint(low, high + 1, (), generator=generator)))
        left -= lengths[-1]
    return [lengths[i] for i in torch.randperm(count, generator=generator)]


def even_lengths(total: int, count: int) -> list[int]:
    """Lengths that differ by one at most, longer ones first."""
    return [total // count + (i < total % count) for i in range(count)]


class AutoCompressor(nn.Module):
    """A causal LM of transformers with `count` learned summary tokens. The model learns, too, unless it is frozen.

    count       k, summary vectors of a segment; 0 = segments that know nothing of each other
    segments    of a text in training, where a forward is not told their lengths
    longest     tokens of a segment at most; None = any
    accumulate  keep the summaries of all segments (the paper's), or only those of the last one
    window      compression steps that gradients go through: before each (window + 1)-th segment all summaries are cut
                off from what made them; None = never. The authors' substeps of two segments are window=1
    eos         id of the token whose embedding the summary tokens begin as; None = the config's

    In models that add learned positions (OPT, GPT-2) summaries have none, and each segment starts at 0; in others they
    take positions like tokens, and the text behind them goes on from there.
    Source   arXiv:2305.14788, sec. 3, and its code.
    """

    accepts_loss_kwargs = True  # Trainer: the loss is divided by the labels of all micro-batches, if told how many

    def __init__(
        self, model: nn.Module, count: int = 50, *, segments: int = 4, longest: int | None = None,
        accumulate: bool = True, window: int | None = 2, eos: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if count < 0 or segments < 1 or (window is not None and window < 1):
            raise SummaryError(f"count={count}, segments={segments}, window={window}: 0 or more, and 1 or more")
        self.model, self.count, self.segments, self.longest = model, count, segments, longest
        self.accumulate, self.window = accumulate, window
        table = cast(nn.Embedding, pretrained(model).get_input_embeddings()).weight.detach()
        end = pretrained(model).config.eos_token_id if eos is None else eos
        end = end[0] if isinstance(end, list) else end
        start = table.float().mean(0) if end is None else table[end].float()
        self.tokens = nn.Parameter(start.expand(count, -1).clone())
        self._keeps_few = "logits_to_keep" in inspect.signature(model.forward).parameters
        Placing.of(model)  # refuses what cannot be

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, *,
        lengths: Sequence[int] | None = None, summary: Summary | None = None, num_items_in_batch: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Read texts segment by segment.

        input_ids, attention_mask   (B, T) long; the mask is 0 at padding, on either side
        labels    (B, T): as for any causal LM, -100 = not taught. The label of a segment's last token is the next
                  segment's first one
        lengths   of the segments, T together; by default drawn anew in training, even otherwise
        summary   embeddings of what came before

        Returns   `logits` (B, T, V) and, with labels, `loss`: one mean over all taught tokens of all segments.
        """
        lengths = self._lengths(input_ids.shape[1]) if lengths is None else list(lengths)
        logits, _ = self._read(input_ids, attention_mask, lengths, summary)
        if labels is None:
            return {"logits": logits}
        taught = labels[:, 1:]
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), taught.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        count = (taught != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return {"loss": loss / count, "logits": logits}

    @torch.no_grad()
    def summary(
        self, ids: Tensor, mask: Tensor | None = None, *, lengths: Sequence[int] | None = None,
        before: Summary | None = None,
    ) -> Summary:  # fmt: skip
        """Condense texts: the summary vectors of all segments, (B, k * segments, C), or of the last one.

        ids, mask   (B, T) long; the mask is 0 at padding, on either side. lengths: of the segments; default: even ones
        before      what came before, which the result then holds, too (where summaries accumulate)

        A segment that is padding alone leaves nothing.
        """
        lengths = self._lengths(ids.shape[1], drawn=False) if lengths is None else list(lengths)
        return self._read(ids, mask, lengths, before, condense=True)[1]

    def _lengths(self, total: int, *, drawn: bool | None = None) -> list[int]:
        least = 1 if self.longest is None else math.ceil(total / self.longest)
        count = min(max(self.segments, least), max(total, 1))
        if self.training if drawn is None else drawn:
            return draw_lengths(total, count, longest=self.longest or total)
        return even_lengths(total, count)

    def _read(
        self, ids: Tensor, mask: Tensor | None, lengths: list[int], before: Summary | None, *, condense: bool = False
    ) -> tuple[Tensor, Summary]:
        """Logits and summary. condense: the last segment leaves vectors, too, and logits are not wanted."""
        if sum(lengths) != ids.shape[1] or min(lengths, default=0) < 1:
            raise SummaryError(f"segments of {lengths} tokens for {ids.shape[1]}: needs 1 or more each, and that sum")
        if self.longest is not None and max(lengths) > self.longest:
            raise SummaryError(f"a segment of {max(lengths)} tokens; longest={self.longest}")
        mask = torch.ones_like(ids) if mask is None else mask.long()
        soft, valid = self._start(len(ids), before)
        logits = []
        for i, (part, seen) in enumerate(zip(ids.split(lengths, 1), mask.split(lengths, 1), strict=True)):
            if self.window is not None and i and i % (self.window + 1) == 0:
                soft = soft.detach()
            more = self.count if condense or i < len(lengths) - 1 else 0
            scores, made = self._segment(part, seen, soft, valid, more, scored=not condense)
            logits.append(scores)
            if more:
                there = (seen.any(1, keepdim=True)).expand(-1, more)
                if self.accumulate:
                    soft, valid = torch.cat([soft, made], 1), torch.cat([valid, there], 1)
                else:  # a segment of padding leaves what was there
                    kept = soft if soft.shape[1] == more else torch.zeros_like(made)
                    had = valid if valid.shape[1] == more else torch.zeros_like(there)
                    soft, valid = torch.where(there[..., None], made, kept), there | had
        learned = Placing.of(self.model).learned
        position = torch.zeros_like(valid.sum(1)) if learned else valid.sum(1)
        return torch.cat(logits, 1), Summary(self.model, valid, position, soft)

    def _start(self, b: int, before: Summary | None) -> tuple[Tensor, Tensor]:
        if before is None:
            return self.tokens.new_zeros(b, 0, self.tokens.shape[1]), self.tokens.new_zeros(b, 0).bool()
        if before.embeddings is None:
            raise SummaryError("a summary of keys and values cannot come before a segment: give one of embeddings")
        return before.embeddings.to(self.tokens), before.valid

    def _segment(
        self, ids: Tensor, mask: Tensor, soft: Tensor, valid: Tensor, more: int, *, scored: bool
    ) -> tuple[Tensor, Tensor]:
        """[soft prompt][tokens][summary tokens]: logits of the tokens, last states of the summary tokens."""
        placing, t = Placing.of(self.model), ids.shape[1]
        text = pretrained(self.model).get_input_embeddings()(ids)
        ask = self.tokens[:more].expand(len(ids), -1, -1)
        seen = torch.cat([valid.long(), mask, mask.new_ones(len(ids), more)], 1)
        if placing.learned:
            at = torch.cat([
                mask.new_full(soft.shape[:2], -1), (mask.cumsum(1) - 1).clamp(min=0), mask.new_full(ask.shape[:2], -1)
            ], 1)  # fmt: skip
        else:
            at = (seen.cumsum(1) - 1).clamp(min=0)
        x, at = placing.placed(torch.cat([soft.to(text), text, ask.to(text)], 1), at)
        given = {"inputs_embeds": x, "attention_mask": seen, "position_ids": at, "use_cache": False}
        if not scored:
            states = pretrained(self.model).base_model(**given).last_hidden_state
            return states[:, :0], states[:, x.shape[1] - more :].float()
        few = {"logits_to_keep": t + more} if self._keeps_few else {}
        output = self.model(**given, output_hidden_states=more > 0, **few)
        made = output.hidden_states[-1][:, x.shape[1] - more :].float() if more else ask
        return output.logits[:, -(t + more) :][:, :t], made

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """The model as transformers saves it, and the summary tokens beside it."""
        from safetensors.torch import save_file

        pretrained(self.model).save_pretrained(folder, **kwargs)
        about = {name: json.dumps(getattr(self, name)) for name in SETTINGS}
        save_file({"tokens": self.tokens.detach().cpu().contiguous()}, Path(folder) / FILE, about)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> AutoCompressor:
        """The summary tokens of a folder on a model that was loaded from it."""
        from safetensors import safe_open

        with safe_open(Path(folder) / FILE, "pt") as file:
            tokens = file.get_tensor("tokens")
            about = {name: json.loads(file.metadata()[name]) for name in SETTINGS}
        made = cls(model, len(tokens), **about)
        if made.tokens.shape != tokens.shape:
            raise SummaryError(f"summary tokens of {tokens.shape[1]} channels; the model has {made.tokens.shape[1]}")
        made.tokens.data.copy_(tokens)
        return made
