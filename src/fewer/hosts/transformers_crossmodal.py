"""Image-text encoders of Hugging Face transformers that need a word besides what is discovered: ViLT, whose sequence
holds words and patches, and BLIP's text encoder, whose tokens are those of the image it looks at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewer.compat import given_cache, pretrained
from fewer.core import Group, Tokens

from .anatomy import Anatomy, Layer
from .attention import Call, HostError
from .base import BlockRun, Host
from .weights import multiplied
from .written_out import entered


# -- ViLT --------------------------------------------------------------------------------------------------------------
class ViltHost(Host):
    """A ViLT row bound to one model: words, then an image's class token and its patches.

    Both class tokens stay. transformers lays the patches out in an order it draws at random in each pass; methods that
    go by place, such as pairing even with odd ones, take that order, as the model does. Fix torch's seed to repeat one.
    """

    def __init__(self, found: Anatomy, root: nn.Module, path: str) -> None:
        words = replace(found, kind="text", prefix=1, has_cls=True, patch=None)
        super().__init__(words, root, path)
        self._local = threading.local()

    def enter(self, undo: ExitStack) -> None:
        embeddings: Any = self.root.embeddings
        undo.callback(embeddings.text_embeddings.register_forward_hook(self._see_words).remove)
        super().enter(undo)

    def _see_words(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self._local.words = output.shape[1]

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
        words = int(pretrained(self.root).config.max_position_embeddings) - 1
        return words + int(embeddings.patch_embeddings.num_patches)


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

    def __init__(self, root: nn.Module, path: str) -> None:
        if not getattr(root.config, "is_decoder", False):
            raise HostError(
                f"this {type(root).__name__} has no cross-attention (is_decoder=False in its config), so it sees no "
                "image tokens that could be reduced"
            )
        blocks = [p for p, m in root.named_modules() if type(m).__name__ == "BlipTextLayer"]
        layers = tuple(Layer(p, "crossattention.self", "written") for p in blocks)
        name = "BlipTextModel, its cross-attention"
        super().__init__(Anatomy(name, "cross", layers, "attention_mask"), root, path)
        self._local = threading.local()

    def replace(
        self, forward: Callable[[int], Callable[..., Any]], undo: ExitStack, which: Collection[int] | None = None
    ) -> None:
        """Without an image, a text runs as before."""

        def either(layer: int) -> Callable[..., Any]:
            run, own = forward(layer), self.own(layer)

            def chosen(x: Tensor, *args: Any, **kwargs: Any) -> Any:
                given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
                return (own(x, **given), ()) if given.get("encoder_hidden_states") is None else run(x, **given)

            return chosen

        super().replace(either, undo, which)

    def checkpoint(self, layer: int) -> Callable[..., Tensor] | None:
        if super().checkpoint(layer) is not None:
            raise HostError(
                "gradient checkpointing would run a block without the image tokens it had; call "
                "gradient_checkpointing_disable() on the text encoder"
            )
        return None

    def entering(self, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The image tokens. The model's own mask of them does not reach its cross-attention, so they all are real."""
        return kwargs["encoder_hidden_states"], None

    def linear_weights(self, layer: int) -> tuple[int, int]:
        attention: Any = self._part(self.blocks[layer], "crossattention.self")
        return multiplied(attention.key) + multiplied(attention.value), 0

    @property
    def pair_width(self) -> int:
        return 0

    @property
    def patches(self) -> int:
        """An image has as many tokens as its tower gives."""
        return 0

    def run(
        self, layer: int, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any], visit: BlockRun
    ) -> tuple[Tensor, tuple[Any, ...]]:
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
        with entered(call, batch=x.shape[0], keys=images.shape[1]):
            y = cross.self(x, encoder_hidden_states=images)[0]
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
        return x, ()
