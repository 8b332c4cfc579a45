"""What a text was condensed to, in the form its model reads: saved, loaded, and put before any other text.

summary = gist.summary(model, ids, mask)
model.generate(**summary.inputs(question, mask), max_new_tokens=20)
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewer.compat import cache_of, cached, pretrained

from .placing import Placing

Rows = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of each layer, (B, G, M, d)."""
FORMAT = "1"


class SummaryError(ValueError):
    """A summary cannot be made, does not fit its model, or does not fit what is to stand behind it."""


@dataclass(frozen=True, eq=False)
class Summary:
    """M rows that stand for a text before other text. Either `embeddings` or `rows` is there.

    model       that reads it
    valid       (B, M) bool: which rows there are
    position    (B,) long: the position of the first token behind it. The last row stands right before it, the others
                before that one; embeddings whose position comes out below 0 get none, where positions are learned
    embeddings  (B, M, C): input embeddings
    rows        keys (as cached, turned where the model turns them) and values of each layer, (B, G, M, d)
    """

    model: nn.Module
    valid: Tensor
    position: Tensor
    embeddings: Tensor | None = None
    rows: Rows | None = None

    def __post_init__(self) -> None:
        if (self.embeddings is None) == (self.rows is None):
            raise SummaryError("a summary is either embeddings or keys and values of all layers: give one of them")
        b, m = self.valid.shape
        given = (self.embeddings,) if self.rows is None else tuple(x for pair in self.rows for x in pair)
        for x in given:
            assert x is not None
            if x.shape[0] != b or x.shape[-2] != m or self.position.shape != (b,):
                raise SummaryError(
                    f"valid is (B, M) = {(b, m)}, position {tuple(self.position.shape)}, and some rows are "
                    f"{tuple(x.shape)}: needs (B,) positions, and (B, M, C) embeddings or (B, G, M, d) keys and values"
                )

    def __len__(self) -> int:
        """B, how many texts."""
        return len(self.valid)

    @classmethod
    def of_prompt(cls, model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Summary:
        """A text in full, as the embeddings of its tokens. ids: (B, P) long; mask: (B, P), 0 at padding."""
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return cls(model, valid, valid.sum(1), _embed(model, ids))

    def inputs(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """The arguments of `model.generate`, which then returns (B, T + new) ids, those given and the new ones.

        ids    (B, T) long, padded on the left: what stands behind the summaries. One summary serves any B
        mask   (B, T), 0 at padding; by default there is none

        Each call makes a fresh cache: a summary is never changed. Beams and several returned sequences need embeddings.
        Raises   SummaryError where ids are empty, padded on the right, or of another number of texts.
        """
        mask = _whole(ids, mask)
        if bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise SummaryError("ids are padded on the right, and what is written goes on at the end: pad on the left")
        return {"input_ids": ids} | self.given(ids, mask)

    def given(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """The arguments of the model's forward: `inputs` without `input_ids` for embeddings; any padding will do."""
        mask = _whole(ids, mask)
        if not ids.shape[1] > 0:
            raise SummaryError("ids is empty: give at least one token to stand behind the summary, such as BOS")
        if len(self) == 1 and len(ids) > 1:
            return self.take([0] * len(ids)).given(ids, mask)
        if len(self) != len(ids):
            raise SummaryError(f"{len(self)} summaries and {len(ids)} texts behind them: `take` one for each")
        behind = (self.position[:, None] + mask.cumsum(1) - 1).clamp(min=0)
        seen = torch.cat([self.valid.to(mask.dtype), mask], 1)
        if self.rows is not None:
            past = cached(self.model, _cache(self.rows))
            return {"input_ids": ids, "attention_mask": seen, "position_ids": behind} | past
        assert self.embeddings is not None
        before, own = Placing.of(self.model).placed(self.embeddings, self._own())
        text = _embed(self.model, ids)
        return {
            "inputs_embeds": torch.cat([before.to(text), text], 1), "attention_mask": seen,
            "position_ids": torch.cat([own, behind], 1),
        }  # fmt: skip

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, V): what the model expects behind each token of ids, (B, T), with the summaries before them."""
        return self.model(**self.given(ids, mask)).logits[:, -ids.shape[1] :]

    def take(self, index: Sequence[int] | Tensor) -> Summary:
        """Some of the B summaries, in any order, any number of times."""
        at = torch.as_tensor(index, device=self.valid.device)
        rows = None if self.rows is None else tuple((k[at], v[at]) for k, v in self.rows)
        embeddings = None if self.embeddings is None else self.embeddings[at]
        return replace(self, valid=self.valid[at], position=self.position[at], embeddings=embeddings, rows=rows)

    @torch.no_grad()
    def prefilled(self) -> Summary:
        """The same as keys and values, so that nothing is read again: one pass of the model over the embeddings."""
        if self.embeddings is None:
            return self
        before, own = Placing.of(self.model).placed(self.embeddings, self._own())
        weight = _table(self.model).weight
        output = pretrained(self.model).base_model(
            inputs_embeds=before.to(weight), attention_mask=self.valid.long(), position_ids=own, use_cache=True
        )
        return replace(self, embeddings=None, rows=rows_of(cache_of(output)))

    def _own(self) -> Tensor:
        """(B, M): the position of each row."""
        return self.position[:, None] - self.valid.long().flip(1).cumsum(1).flip(1)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file. Its folder must be there."""
        from safetensors.torch import save_file

        tensors = {"valid": self.valid, "position": self.position}
        if self.embeddings is not None:
            tensors["embeddings"] = self.embeddings
        for i, (k, v) in enumerate(self.rows or ()):
            tensors |= {f"layers.{i}.k": k, f"layers.{i}.v": v}
        about = {"format": FORMAT, "model": type(self.model).__name__, "fingerprint": fingerprint(self.model)}
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, path, about)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> Summary:
        """Read a file for the model it was made with, onto its device; keys and values in its dtype.

        Raises   SummaryError where the file is no summary, or one of another model: of a class with another name, or
                 with other weights of the first tokens' embeddings.
        """
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise SummaryError(f"{path} holds no summary of format {FORMAT}, but {about.get('format')!r}")
            own = {"model": type(model).__name__, "fingerprint": fingerprint(model)}
            if any(about[name] != value for name, value in own.items()):
                raise SummaryError(
                    f"{path} was made with a {about['model']} of other weights ({about['fingerprint']}) than this "
                    f"{own['model']} ({own['fingerprint']}): only that model can read it"
                )
            device = _table(model).weight.device
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
        layers, dtype = sum(name.endswith(".k") for name in tensors), _table(model).weight.dtype
        rows = tuple(
            (tensors[f"layers.{i}.k"].to(dtype), tensors[f"layers.{i}.v"].to(dtype)) for i in range(layers)
        ) or None  # fmt: skip
        return cls(model, tensors["valid"], tensors["position"], tensors.get("embeddings"), rows)


def joined(summaries: Sequence[Summary]) -> Summary:
    """Embeddings of several texts one behind the other, each (B, M_i, C), as one summary.

    Raises   SummaryError for keys and values: those of a later text have seen nothing of the earlier ones.
    """
    parts = [s.embeddings for s in summaries if s.embeddings is not None]
    if len(parts) < len(summaries) or not parts:
        raise SummaryError("keys and values cannot be joined, nor can nothing: join summaries that hold embeddings")
    valid, position = torch.cat([s.valid for s in summaries], 1), torch.stack([s.position for s in summaries]).sum(0)
    return Summary(summaries[0].model, valid, position, torch.cat(parts, 1))


def stacked(summaries: Sequence[Summary]) -> Summary:
    """Several batches as one, shorter ones padded on the left. All hold embeddings, or all keys and values."""
    most = max(s.valid.shape[1] for s in summaries)

    def padded(x: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] = most - x.shape[dim]
        return torch.cat([x.new_zeros(shape), x], dim)

    valid, position = torch.cat([padded(s.valid, 1) for s in summaries]), torch.cat([s.position for s in summaries])
    if all(s.embeddings is not None for s in summaries):
        parts = [padded(s.embeddings, 1) for s in summaries if s.embeddings is not None]
        return Summary(summaries[0].model, valid, position, torch.cat(parts))
    if any(s.rows is None for s in summaries):
        raise SummaryError("some summaries hold embeddings and some keys and values: make all `prefilled()`")
    layers = zip(*(s.rows for s in summaries if s.rows is not None), strict=True)
    rows = tuple(
        (torch.cat([padded(k, 2) for k, _ in layer]), torch.cat([padded(v, 2) for _, v in layer])) for layer in layers
    )
    return Summary(summaries[0].model, valid, position, rows=rows)


def goes_on(model: nn.Module) -> None:
    """Refuse a model whose layers count stored rows where positions are meant: cached rows would stand elsewhere.

    Raises   SummaryError for sliding windows, recurrent layers, ALiBi, and forwards without `position_ids`.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config: Any = pretrained(model).config
    odd = {type(layer).__name__ for layer in DynamicCache(config=config).layers if type(layer) is not DynamicLayer}
    local = "local" in (getattr(config, "attention_layers", None) or ())
    named = "position_ids" in inspect.signature(model.forward).parameters
    if odd or local or not named or getattr(config, "alibi", False):
        why = "has layers of local attention" if local else "takes no position_ids, or biases attention by distance"
        why = f"keeps {', '.join(sorted(odd))} in its cache" if odd else why
        raise SummaryError(
            f"{type(model).__name__} {why}: keys at positions of their own need full attention in every layer; "
            "summaries that are embeddings (AutoCompressor, ICAE, soft prompts) work"
        )


def rows_of(cache: Any) -> Rows:
    """Keys and values of a transformers cache, (B, G, S, d) for each layer."""
    return tuple((layer.keys, layer.values) for layer in cache.layers)


def fingerprint(model: nn.Module) -> str:
    """Twelve characters of the first embeddings, equal in float32 and bfloat16."""
    first = _table(model).weight[:8].detach().cpu().to(torch.bfloat16).contiguous()
    return hashlib.sha256(first.view(torch.int16).numpy().tobytes()).hexdigest()[:12]


def _cache(rows: Rows) -> Any:
    """A cache of its own: layers that grow make new tensors, those given stay as they are."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    for i, (k, v) in enumerate(rows):
        cache.update(k, v, i)
    return cache


def _table(model: nn.Module) -> nn.Embedding:
    return pretrained(model).get_input_embeddings()  # type: ignore[return-value]


def _embed(model: nn.Module, ids: Tensor) -> Tensor:
    return _table(model)(ids)


def _whole(ids: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and mask.shape != ids.shape:
        raise SummaryError(f"ids are {tuple(ids.shape)} and their mask is {tuple(mask.shape)}: give one value per id")
    return torch.ones_like(ids) if mask is None else mask.long()
