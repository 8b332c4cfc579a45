"""Image-text encoders of Hugging Face transformers that write their attention out: BLIP's two towers, and ViLT.

These modules do not ask the attention table, so a session puts a forward of its own into each: the same projections,
the same products in the same order (an unreduced pass gives the model's own bits), and our call in the middle.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.compat import given_cache
from fewer.core import Group, Tokens

from .base import Call, Driver, Family, Host, HostError, Visit
from .transformers_vision import Carried, TransformersDriver

FAMILIES = (
    Family(
        "BLIP vision", ("BlipVisionModel",), "BlipEncoderLayer", "layer_norm1", "self_attn", "layer_norm2", "mlp",
        patch="embeddings.patch_embedding", final_norm="post_layernorm", prefix=lambda m: 1, has_cls=lambda m: True,
        library="BLIP",
    ),
    Family(
        "BLIP text (cross-attention to an image)", ("BlipTextModel",), "BlipTextLayer",
        "crossattention.output.LayerNorm", "crossattention.self", library="cross-attention",
    ),
    Family(
        "ViLT (words and patches in one sequence)", ("ViltModel",), "ViltLayer", "layernorm_before",
        "attention.attention", "layernorm_after", "intermediate",
        after_attention=("attention.output.dense", "attention.output.dropout"),
        after_mlp=("output.dense", "output.dropout"), prefix=lambda m: 1, has_cls=lambda m: True, library="ViLT",
    ),
)  # fmt: skip


# -- attention, written out -------------------------------------------------------------------------------------------
def _product(
    divides: bool, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, dropout: float
) -> Tensor:
    """Attention as these models compute it. divides: by the root of the width, where others multiply by its inverse:
    the bits differ."""
    logits = q @ k.transpose(-1, -2)
    logits = logits / math.sqrt(q.shape[-1]) if divides else logits * scale
    if bias is not None:
        logits = logits + bias
    return F.dropout(logits.softmax(-1), dropout) @ v


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H d) -> (B, H, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attended(module: Any, q: Tensor, k: Tensor, v: Tensor, carried: Carried, divides: bool) -> Tensor:
    """(B, N, H d): what a call makes of queries, keys and values, heads side by side again."""
    carried.call.kernel = partial(_product, divides)
    dropout = module.dropout.p if module.training else 0.0
    y = carried.call(q, k, v, q.shape[-1] ** -0.5, carried.mask, dropout)
    return y.transpose(1, 2).flatten(2)


def _fused(module: Any, hidden_states: Tensor, attention_mask: Carried, **_: Any) -> tuple[Tensor, None]:
    """BLIP's vision attention: one projection for queries, keys and values."""
    parts = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, module.head_dim))
    q, k, v = parts.permute(2, 0, 3, 1, 4)
    return module.projection(_attended(module, q, k, v, attention_mask, False)), None


def _apart(
    module: Any, hidden_states: Tensor, attention_mask: Carried, encoder_hidden_states: Tensor | None = None, **_: Any
) -> tuple[Tensor, None]:
    """BERT's layout, of ViLT and of BLIP's cross-attention. encoder_hidden_states: what keys and values are made of."""
    seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    q, k, v = (
        _heads(part(x), module.num_attention_heads)
        for part, x in ((module.query, hidden_states), (module.key, seen), (module.value, seen))
    )
    return _attended(module, q, k, v, attention_mask, True), None


class WrittenOutDriver(TransformersDriver):
    """Runs attention modules that no table reaches. Their forward is ours while a session is on."""

    def attach(self, host: Host, undo: ExitStack) -> None:
        for block in host.blocks:
            module = attrgetter(host.family.attention)(block)
            module.__dict__["forward"] = partial(_fused if hasattr(module, "qkv") else _apart, module)
            undo.callback(module.__dict__.pop, "forward", None)

    def attention(self, module: nn.Module, x: Tensor, mask: Tensor | None, call: Call, kwargs: dict) -> Tensor:
        """kwargs: `images` where keys and values are made of something else than x."""
        return module(x, attention_mask=Carried(call, mask), encoder_hidden_states=kwargs.get("images"))[0]

    def checkpoint(self, host: Host, layer: int) -> Callable[..., Tensor] | None:
        again = super().checkpoint(host, layer)
        if again is not None and isinstance(host, CrossHost):
            raise HostError(
                "gradient checkpointing would run a block without the image tokens it had; call "
                "gradient_checkpointing_disable() on the text encoder"
            )
        return again


# -- ViLT --------------------------------------------------------------------------------------------------------------
class ViltHost(Host):
    """A ViLT row bound to one model: words, then an image's class token and its patches.

    Both class tokens stay. transformers lays the patches out in an order it draws at random in each pass; methods that
    go by place, such as pairing even with odd ones, take that order, as the model does. Fix torch's seed to repeat one.
    """

    def __init__(self, family: Family, root: nn.Module, path: str, driver: Driver) -> None:
        super().__init__(family, root, path, driver)
        self._local = threading.local()

    def attach(self, forward: Callable[[int], Callable[..., Tensor]], undo: ExitStack) -> None:
        embeddings: Any = self.root.embeddings
        undo.callback(embeddings.text_embeddings.register_forward_hook(self._see_words).remove)
        super().attach(forward, undo)

    def _see_words(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self._local.words = output.shape[1]

    def replace(self, forward: Callable[[int], Callable[..., Tensor]], undo: ExitStack) -> None:
        """A ViLT block gives its rows in a tuple, and attention maps behind them, which a session does not have."""

        def wrapped(layer: int) -> Callable[..., Any]:
            run = forward(layer)
            return lambda *args, **kwargs: (run(*args, **kwargs), None)

        super().replace(wrapped, undo)

    def opening(self, tokens: Tokens) -> Tokens:
        """Words are modality 0, the image 1; its class token stays, as that of the text does."""
        words = self._local.words
        where = torch.arange(tokens.n, device=tokens.device)
        modality = (where >= words).long().expand(tokens.batch, -1)
        known = replace(tokens, modality=modality, images=tokens.n - words)
        return known.protect(Group(words, words + 1))

    @property
    def patches(self) -> int:
        """Words and patches at the most, without the class tokens."""
        embeddings: Any = self.root.embeddings
        return int(self.root.config.max_position_embeddings) - 1 + int(embeddings.patch_embeddings.num_patches)  # type: ignore[union-attr, arg-type]


# -- cross-attention ---------------------------------------------------------------------------------------------------
def _of_keys(call: Call) -> Call:
    """A call whose queries are others than its keys: masked rows are hidden, and no query is one that sees itself.

    Raises   HostError for packed rows and for masks that learn, which need self-attention.
    """
    if call.split is not None:
        raise HostError("cross-attention to packed rows is not supported; use execution='padded'")
    if call.policy is None:
        return call
    if call.policy.requires_grad:
        raise HostError("a learned mask has no training form in cross-attention; call model.eval()")
    gone = torch.zeros_like(call.policy).masked_fill(call.policy <= 0, float("-inf"))[:, None, None]
    call.bias, call.policy = gone if call.bias is None else call.bias + gone, None
    return call


class CrossHost(Host):
    """BLIP's text encoder bound: its tokens are those of the image its cross-attention looks at, its text is never
    reduced. Image tokens that go are not looked at by the layers that follow.

    The ledger counts what depends on image tokens: the keys and values made of them.
    """

    def __init__(self, family: Family, root: nn.Module, path: str, driver: Driver) -> None:
        if not getattr(root.config, "is_decoder", False):
            raise HostError(
                f"this {type(root).__name__} has no cross-attention (is_decoder=False in its config), so it sees no "
                "image tokens that could be reduced"
            )
        super().__init__(family, root, path, driver)
        self._local = threading.local()

    def replace(self, forward: Callable[[int], Callable[..., Tensor]], undo: ExitStack) -> None:
        """Without an image, a text runs as before."""

        def wrapped(layer: int) -> Callable[..., Tensor]:
            run, block = forward(layer), self.blocks[layer]

            def either(x: Tensor, encoder_hidden_states: Tensor | None = None, **kwargs: Any) -> Tensor:
                if encoder_hidden_states is None:
                    return type(block).forward(block, x, None, **kwargs)
                return run(x, encoder_hidden_states=encoder_hidden_states, **kwargs)

            return either

        super().replace(wrapped, undo)

    def entering(self, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The image tokens. The model's own mask of them does not reach its cross-attention, so they all are real."""
        return kwargs["encoder_hidden_states"], None

    def linear_weights(self, layer: int) -> tuple[int, int]:
        attention: Any = self._part(self.blocks[layer], self.family.attention)
        return int(attention.key.weight.numel() + attention.value.weight.numel()), 0

    @property
    def pair_width(self) -> int:
        return 0

    @property
    def patches(self) -> int:
        """An image has as many tokens as its tower gives."""
        return 0

    def run(self, layer: int, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any], visit: Visit) -> Tensor:
        """x: (B, T, C), the text; its mask hides padding. The visit's sites see the image tokens."""
        if given_cache(kwargs) is not None:
            raise HostError(
                "a cache of cross-attention keeps all image tokens; generate with use_cache=False while a session is on"
            )
        block: Any = self.blocks[layer]
        images = visit.before(layer, self._local.images if layer else kwargs["encoder_hidden_states"])
        x = block.attention(x, attention_mask=mask)[0]
        call = _of_keys(visit.call(layer))
        cross = block.crossattention
        y = self.driver.attention(cross.self, x, None, call, {"images": images})
        if call.seen is not None:
            q = call.seen.q
            if mask is not None:  # a padded word has no opinion: it looks at all alike
                real = (mask if mask.dtype == torch.bool else mask >= 0).any(-2)
                q = q.masked_fill(~real[..., None], 0)
            call.seen = replace(call.seen, q=q, across=True)
        x = cross.output(y, x)
        images = visit.mid(layer, images, call)
        x = block.feed_forward_chunk(x)
        self._local.images = visit.after(layer, images, call)
        return x
